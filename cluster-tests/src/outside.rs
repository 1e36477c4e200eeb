//! An outside world for guests: a namespace behind a link of this host, with a public address, a
//! private one, and a private one that an operator may allow.
//!
//! All of them answer to the host, so what does not answer to a guest was refused and is not merely
//! absent.

use std::ffi::OsStr;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use nix::sched::{CloneFlags, setns};

/// A namespace behind a link of the host, gone when dropped.
#[derive(Debug)]
pub struct Outside {
    name: String,
    /// An address of the internet.
    pub public: Ipv4Addr,
    /// An address of somebody's own network.
    pub private: Ipv4Addr,
    /// Another one, which the operator allows.
    pub allowed: Ipv4Addr,
}

impl Outside {
    /// Its link, routes and addresses. One exists at a time in a test program.
    ///
    /// # Panics
    /// Without root, or where `ip` is not installed.
    #[must_use]
    pub fn new() -> Self {
        // Names and addresses that another test program on this machine does not use.
        let number = u8::try_from(std::process::id() % 250).expect("below 250");
        let outside = Self {
            name: format!("wrt{number}"),
            public: Ipv4Addr::new(203, 0, 113, number),
            private: Ipv4Addr::new(10, 213, number, 7),
            allowed: Ipv4Addr::new(10, 213, number, 9),
        };
        outside.raise(number);
        outside
    }

    fn raise(&self, number: u8) {
        let name = &self.name;
        let (here, there) = (
            format!("198.51.100.{}", number & !1),
            format!("198.51.100.{}", number | 1),
        );
        shell(&format!(
            "ip netns add {name}
             ip link add {name} type veth peer name uplink netns {name}
             ip addr add {here}/31 dev {name}
             ip link set {name} up
             ip -n {name} addr add {there}/31 dev uplink
             ip -n {name} link set uplink up
             ip -n {name} link set lo up
             ip -n {name} route add default via {here}"
        ));
        for address in [self.public, self.private, self.allowed] {
            shell(&format!(
                "ip -n {name} addr add {address}/32 dev lo
                 ip route add {address}/32 via {there}"
            ));
        }
    }

    /// Has `answer` meet whoever connects to `port` of any of its addresses, each caller in a thread
    /// of its own, until this program ends.
    ///
    /// # Panics
    /// When the port is taken.
    pub fn serve(&self, port: u16, answer: fn(TcpStream)) {
        let path = format!("/run/netns/{}", self.name);
        let (ready, is_ready) = mpsc::channel();
        thread::spawn(move || {
            let netns = File::open(path).expect("the namespace");
            setns(netns, CloneFlags::CLONE_NEWNET).expect("root may");
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
            let listener = listener.expect("a free port");
            ready.send(()).expect("somebody waits");
            for stream in listener.incoming().flatten() {
                thread::spawn(move || answer(stream));
            }
        });
        is_ready.recv().expect("it listens");
    }
}

/// Programs in it.
impl Outside {
    /// A program as it runs there.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Default for Outside {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // The link and the routes over it go with the namespace's end of it; the namespace itself
        // would otherwise live as long as the listener in it.
        let name = &self.name;
        let done = Command::new("sh")
            .args(["-c", &format!("ip link del {name}; ip netns del {name}")])
            .status();
        assert!(done.is_ok_and(|status| status.success()) || thread::panicking());
    }
}

fn shell(line: &str) {
    let done = Command::new("sh")
        .args(["-ec", line])
        .output()
        .expect("a shell");
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{line}: {errors}");
}
