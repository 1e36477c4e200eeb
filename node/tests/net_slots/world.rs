//! A host to itself, and the outside world it is connected to.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use wrenn_node::base::stop::Tasks;
use wrenn_node::net::{Cidr, NetConfig, SlotPool, netns};

/// The host's own address, public as far as anyone can tell.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// A second address of the host.
pub(crate) const HOST_TOO: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// A host on the internet.
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// A name server on the internet.
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// Addresses that answer to the host, and must not to a guest.
pub(crate) const PRIVATE: [Ipv4Addr; 9] = [
    Ipv4Addr::new(10, 9, 9, 9),
    Ipv4Addr::new(172, 16, 5, 5),
    Ipv4Addr::new(172, 31, 255, 254),
    Ipv4Addr::new(192, 168, 7, 7),
    Ipv4Addr::new(100, 70, 0, 1),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(192, 0, 0, 9),
    Ipv4Addr::new(198, 19, 200, 200),
    Ipv4Addr::new(240, 1, 1, 1),
];
/// Who answers when all is well.
pub(crate) const NOBODY: [Ipv4Addr; 0] = [];
/// Where everyone who listens does, by TCP and UDP.
pub(crate) const PORT: u16 = 7000;
/// How long to wait for what is expected to come: a busy machine stands still for seconds at times.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait for what is expected not to come. Answers here take well under 10 ms.
const DOUBT: Duration = Duration::from_millis(500);

/// Runs `test` on a host of its own.
pub(crate) fn on_a_host(test: impl FnOnce(&World) + Send + 'static) {
    assert!(nix::unistd::geteuid().is_root(), "network tests need root");
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let world = World::new();
        test(&world);
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a program on this host; tests may, the code under test may not.
pub(crate) fn shell(line: &str) -> String {
    let out = Command::new("sh").args(["-ec", line]).output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{line}: {errors}");
    String::from_utf8(out.stdout).unwrap()
}

/// Waits for what the kernel does in the background.
pub(crate) fn wait_until(mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "it did not come");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The host.
pub(crate) struct World {
    pub(crate) runtime: Runtime,
    folder: TempDir,
}

/// A node's pool, and what stops it.
pub(crate) struct Node {
    pub(crate) pool: SlotPool,
    pub(crate) tasks: Tasks,
}

impl World {
    fn new() -> Self {
        shell(
            "ip link set lo up
             ip netns add out
             ip link add up0 type veth peer name up1 netns out
             ip addr add 203.0.113.1/24 dev up0
             ip addr add 203.0.113.9/24 dev up0
             ip link set up0 up
             ip -n out link set lo up
             ip -n out addr add 203.0.113.2/24 dev up1
             ip -n out link set up1 up
             ip -n out route add 198.18.0.0/16 via 203.0.113.1
             ip route add default via 203.0.113.2",
        );
        for address in PRIVATE.iter().chain([&RESOLVER]) {
            shell(&format!(
                "ip -n out addr add {address}/32 dev lo; ip route add {address} via {OUTSIDE}"
            ));
        }
        let public = [OUTSIDE, RESOLVER];
        serve(&outside(), &[&PRIVATE[..], &public].concat());
        let world = Self {
            runtime: Runtime::new().unwrap(),
            folder: TempDir::new().unwrap(),
        };
        serve_here(&[HOST, HOST_TOO]).unwrap();
        world
    }

    /// How a node of this host is set up, unless a test says otherwise.
    pub(crate) fn config(&self) -> NetConfig {
        NetConfig {
            tag: "t".parse().unwrap(),
            index_base: 0,
            index_count: 16,
            pool_target: 2,
            egress_allow: Vec::new(),
            serial_file: self.folder.path().join("serial"),
        }
    }

    /// Starts a node as `change` wants it.
    pub(crate) fn node(&self, change: impl FnOnce(&mut NetConfig)) -> Node {
        let mut config = self.config();
        change(&mut config);
        let tasks = Tasks::new();
        let pool = self.wait(SlotPool::start(config, &tasks)).unwrap();
        Node { pool, tasks }
    }

    /// Runs a future to its end.
    pub(crate) fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }
}

/// The namespace of the outside world.
pub(crate) fn outside() -> PathBuf {
    PathBuf::from("/run/netns/out")
}

/// Networks by text.
pub(crate) fn nets(texts: &[&str]) -> Vec<Cidr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// Everything a slot could leave behind.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traces {
    files: BTreeSet<String>,
    links: BTreeSet<String>,
    tables: String,
    mounts: usize,
}

/// What is there now.
pub(crate) fn traces() -> Traces {
    let lines = |text: String| text.lines().map(str::to_owned).collect();
    Traces {
        files: lines(shell("ls -1 /run/netns")),
        links: lines(shell("ip -o link | cut -d' ' -f2")),
        tables: shell("nft list ruleset"),
        mounts: shell("grep -c /run/netns/ /proc/thread-self/mounts || true")
            .trim()
            .parse()
            .unwrap(),
    }
}

/// Waits until the host looks like `wanted` again: the kernel takes devices of a dead namespace
/// apart in its own time.
pub(crate) fn await_traces(wanted: &Traces) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut seen = traces();
    while seen != *wanted && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
        seen = traces();
    }
    assert_eq!(seen, *wanted);
}

/// Answers on [`PORT`], inside the namespace at `path`: TCP of every address, UDP of `addresses`
/// (one socket each, so that the answer comes from the address that was asked).
pub(crate) fn serve(path: &Path, addresses: &[Ipv4Addr]) {
    netns::enter(path, || serve_here(addresses)).unwrap();
}

fn serve_here(addresses: &[Ipv4Addr]) -> io::Result<()> {
    answer_tcp(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?);
    for address in addresses {
        answer_udp(UdpSocket::bind((*address, PORT))?);
    }
    Ok(())
}

/// These threads end with the process.
fn answer_tcp(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().map(|peer| peer.ip().to_string());
            let _gone = peer.map(|peer| (&stream).write_all(peer.as_bytes()));
        }
    });
}

/// So does this one.
fn answer_udp(socket: UdpSocket) {
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _gone = socket.send_to(peer.ip().to_string().as_bytes(), peer);
        }
    });
}

/// Calls `to` by TCP from the namespace at `from`, which must be answered; tells what it thinks who called.
pub(crate) fn call(from: &Path, to: Ipv4Addr) -> Option<Ipv4Addr> {
    call_port(from, to, PORT)
}

/// The same at another port.
pub(crate) fn call_port(from: &Path, to: Ipv4Addr, port: u16) -> Option<Ipv4Addr> {
    netns::enter(from, || Ok(tcp(to, port, PATIENCE))).unwrap()
}

/// Calls `to` by UDP from the namespace at `from`, which must be answered.
pub(crate) fn call_udp(from: &Path, to: Ipv4Addr) -> Option<Ipv4Addr> {
    netns::enter(from, || Ok(udp(to, PATIENCE))).unwrap()
}

/// Whether nothing answers at a port by TCP to the namespace at `from`.
pub(crate) fn is_closed(from: &Path, to: Ipv4Addr, port: u16) -> bool {
    netns::enter(from, || Ok(tcp(to, port, DOUBT)))
        .unwrap()
        .is_none()
}

/// Calls `to` by TCP from the host.
pub(crate) fn call_from_host(to: Ipv4Addr) -> Option<Ipv4Addr> {
    tcp(to, PORT, PATIENCE)
}

/// Calls `to` by UDP from the host.
pub(crate) fn call_udp_from_host(to: Ipv4Addr) -> Option<Ipv4Addr> {
    udp(to, PATIENCE)
}

fn tcp(to: Ipv4Addr, port: u16, wait: Duration) -> Option<Ipv4Addr> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((to, port)), wait).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).ok()?;
    said.parse().ok()
}

fn udp(to: Ipv4Addr, wait: Duration) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    socket.set_read_timeout(Some(wait)).unwrap();
    socket.send_to(b"who am I", (to, PORT)).ok()?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).ok()?;
    String::from_utf8_lossy(&buffer[..length]).parse().ok()
}

/// Which of `targets` answer to the namespace at `from`, by TCP or UDP, where none should; asks all at once.
pub(crate) fn reachable(from: &Path, targets: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    let from: Arc<Path> = from.into();
    let tries: Vec<_> = targets
        .iter()
        .map(|&to| {
            let from = from.clone();
            let tries = move || Ok(tcp(to, PORT, DOUBT).or_else(|| udp(to, DOUBT)));
            (
                to,
                thread::spawn(move || netns::enter(&from, tries).unwrap()),
            )
        })
        .collect();
    tries
        .into_iter()
        .filter_map(|(to, answer)| answer.join().unwrap().map(|_| to))
        .collect()
}
