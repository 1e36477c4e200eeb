//! What the tests with a whole guest of ours share: its network and disk, and calls to its agent.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use std::fmt;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use proto::units::Mib;
use wrenn_node::guest::dial::DialFuture;
use wrenn_node::guest::{Dial, Guest, GuestStream, ProcessCommand};
use wrenn_node::net::netns;
use wrenn_node::net::slot::{GATEWAY_MAC, GUEST_ADDR, GUEST_MAC};
use wrenn_node::vmm::cmdline::GuestArgs;
use wrenn_node::vmm::{Accelerator, Confinement, Driver, NetworkSpec, VmmSpec};

use crate::shim_support::QEMU;

/// The guest's memory.
pub const MEMORY: Mib = Mib(256);

/// A namespace with a tap, and a root disk; gone with the test.
pub struct Place {
    name: String,
    disk: tempfile::TempDir,
}

impl Place {
    pub fn new(test: &str) -> Self {
        let name = format!("{test}-{}", std::process::id());
        let mac = GATEWAY_MAC.map(|byte| format!("{byte:02x}")).join(":");
        shell(&format!(
            "ip netns add {name}
             ip -n {name} tuntap add dev tap0 mode tap
             ip -n {name} link set tap0 address {mac} up
             ip -n {name} addr add 169.254.0.22/30 dev tap0"
        ));
        let disk = tempfile::tempdir().expect("a directory");
        let base = images().join("templates/minimal/rootfs.raw");
        let overlay = disk.path().join("root.qcow2");
        let (base, overlay) = (base.display(), overlay.display());
        shell(&format!(
            "qemu-img create -q -f qcow2 -F raw -b $(realpath {base}) {overlay}"
        ));
        Self { name, disk }
    }

    pub fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub fn spec(&self) -> VmmSpec {
        VmmSpec {
            driver: Driver::Qemu,
            program: QEMU.into(),
            accelerator: Accelerator::Tcg,
            kernel: images().join("kernel/vmlinuz"),
            initramfs: images().join("initramfs"),
            cmdline: GuestArgs::default().to_string(),
            vcpus: 1,
            memory: MEMORY,
            root_disk: Some(self.disk.path().join("root.qcow2")),
            network: Some(NetworkSpec {
                netns: self.netns(),
                tap: "tap0".into(),
                mac: GUEST_MAC,
            }),
            confinement: Confinement::of_probe(),
        }
    }

    /// A client with connections of its own.
    pub fn guest(&self, token: &str) -> Guest {
        let dial = InNetns {
            netns: self.netns(),
            port: 49983,
        };
        Guest::new(Arc::new(dial), token).expect("a guest")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        shell(&format!("ip netns del {}", self.name));
    }
}

fn images() -> PathBuf {
    std::env::var_os("WRENN_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev/images"),
        PathBuf::from,
    )
}

pub fn shell(line: &str) {
    let done = Command::new("sh").args(["-ec", line]).status();
    assert!(done.expect("sh runs").success(), "{line}");
}

/// Dials the guest from inside the namespace of its tap.
#[derive(Clone)]
struct InNetns {
    netns: PathBuf,
    port: u16,
}

impl fmt::Debug for InNetns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InNetns({}, {})", self.netns.display(), self.port)
    }
}

impl Dial for InNetns {
    fn dial(&self) -> DialFuture {
        let here = self.clone();
        Box::pin(async move {
            let address = SocketAddr::from((GUEST_ADDR, here.port));
            let connect = move || {
                netns::enter(&here.netns, || {
                    TcpStream::connect_timeout(&address, Duration::from_secs(5))
                })
            };
            let connected = tokio::task::spawn_blocking(connect).await;
            let stream = connected.map_err(std::io::Error::other)??;
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            Ok(GuestStream::new(tokio::net::TcpStream::from_std(stream)?))
        })
    }

    fn at_port(&self, port: u16) -> Arc<dyn Dial> {
        Arc::new(Self {
            netns: self.netns.clone(),
            port,
        })
    }
}

/// A shell line.
pub fn sh(line: &str) -> ProcessCommand {
    ProcessCommand {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), line.into()],
        ..ProcessCommand::default()
    }
}

/// Everything a guest says on its console, once it has ended.
pub fn read_console(
    mut console: std::os::unix::net::UnixStream,
) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        // It ends with the VMM, in whichever way.
        let _ended = std::io::Read::read_to_end(&mut console, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    })
}
