//! A real Debian guest with its agent, in a namespace of its own, and things to lose in it.
//!
//! Needs root, QEMU and the guest images (`WRENN_IMAGES`).

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::Instant;
use wrenn_node::guest::dial::DialFuture;
use wrenn_node::guest::{AgentSetup, Dial, Guest, GuestStream, ProcessCommand};
use wrenn_node::net::netns;
use wrenn_node::net::slot::{GATEWAY_ADDR, GATEWAY_MAC, GUEST_ADDR, GUEST_MAC};
use wrenn_node::shim::client::{self, ShimClient};
use wrenn_node::shim::spec::ShimSpec;
use wrenn_node::store::Overlay;
use wrenn_node::vmm::NetworkSpec;
use wrenn_node::vmm::cmdline::GuestArgs;

use super::{BOOT, QEMU, Sandbox, WRENN};

/// The port of the agent.
const AGENT_PORT: u16 = 49983;
const TOKEN: &str = "0123456789abcdef";
/// Longest that a command in a guest takes on a busy machine.
const COMMAND: Duration = Duration::from_secs(60);

/// A namespace with a tap, removed when dropped.
pub struct Netns {
    name: String,
    tap: &'static str,
}

impl Netns {
    pub fn new(tap: &'static str) -> Self {
        // Tests of one program run side by side, with taps of the same names.
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let netns = Self {
            name: format!("vmm-{}-{number}", std::process::id()),
            tap,
        };
        let name = &netns.name;
        let mac = GATEWAY_MAC.map(|byte| format!("{byte:02x}")).join(":");
        for line in [
            format!("netns add {name}"),
            format!("-n {name} tuntap add dev {tap} mode tap"),
            format!("-n {name} link set {tap} address {mac} up"),
            format!("-n {name} addr add {GATEWAY_ADDR}/30 dev {tap}"),
        ] {
            let done = Command::new("ip").args(line.split(' ')).status();
            assert!(done.expect("ip runs").success(), "ip {line}");
        }
        netns
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub fn spec(&self) -> NetworkSpec {
        NetworkSpec {
            netns: self.path(),
            tap: self.tap.into(),
            mac: GUEST_MAC,
        }
    }

    /// A client of the agent.
    pub fn guest(&self) -> Guest {
        Guest::new(Arc::new(InNetns(self.path())), TOKEN).expect("a client")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _removed = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// Dials from inside a namespace.
#[derive(Debug)]
struct InNetns(PathBuf);

impl Dial for InNetns {
    fn dial(&self) -> DialFuture {
        let path = self.0.clone();
        Box::pin(async move {
            let address = SocketAddr::from((GUEST_ADDR, AGENT_PORT));
            let connect = move || {
                netns::enter(&path, || {
                    TcpStream::connect_timeout(&address, Duration::from_secs(2))
                })
            };
            let stream = spawn_blocking(connect).await.map_err(io::Error::other)??;
            stream.set_nonblocking(true)?;
            let stream = tokio::net::TcpStream::from_std(stream)?;
            Ok(GuestStream::new(stream))
        })
    }

    fn at_port(&self, _port: u16) -> Arc<dyn Dial> {
        unimplemented!("the agent has one port")
    }
}

pub fn images() -> PathBuf {
    std::env::var_os("WRENN_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev/images"),
        PathBuf::from,
    )
}

pub fn debian(sandbox: &Sandbox, network: NetworkSpec) -> ShimSpec {
    let images = images();
    let mut spec = sandbox.spec("");
    spec.vmm.program = QEMU.into();
    spec.vmm.kernel = images.join("kernel/vmlinuz");
    spec.vmm.initramfs = images.join("initramfs");
    spec.vmm.cmdline = GuestArgs::default().to_string();
    spec.vmm.root_disk = Some(sandbox.dir.join("root.qcow2"));
    spec.vmm.network = Some(network);
    spec
}

pub async fn run(guest: &Guest, line: &str) -> String {
    let command = ProcessCommand {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), line.into()],
        ..ProcessCommand::default()
    };
    let ran = guest.run(command, Some(COMMAND)).await.expect(line);
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), ran.stderr);
    assert_eq!(
        ran.exit_code,
        0,
        "{line}: {}",
        String::from_utf8_lossy(&err)
    );
    out.trim().to_owned()
}

/// Boots Debian, and gives it things to lose: in memory, on its disk, on the way there, and a
/// process that counts, and another that keeps the disk busy.
pub async fn boot(sandbox: &Sandbox, netns: &Netns) -> (ShimClient, Guest) {
    let overlay = Overlay {
        base: &images().join("templates/minimal/rootfs.raw"),
        size: proto::units::Mib(5 * 1024),
    };
    overlay
        .create(&sandbox.dir.join("root.qcow2"))
        .expect("a disk");
    let spec = debian(sandbox, netns.spec());
    let shim = client::spawn(&sandbox.dir, &spec, WRENN.as_ref()).await;
    let shim = shim.expect("up");
    let guest = netns.guest();
    guest
        .wait_ready(Instant::now() + BOOT)
        .await
        .expect("ready");
    let setup = AgentSetup {
        token: TOKEN.into(),
        sandbox_id: sandbox.id.to_string(),
        template: "minimal".into(),
        hostname: None,
        default_user: Some("root".into()),
    };
    guest.set_up(&setup).await.expect("set up");
    run(
        &guest,
        "head -c 8000000 /dev/urandom > /dev/shm/memory
         head -c 4000000 /dev/urandom > /root/synced; sync /root/synced
         head -c 4000000 /dev/urandom > /root/unsynced
         (i=0; while true; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.1; done) \
         > /dev/null 2>&1 &
         echo $! > /dev/shm/pid
         (while true; do head -c 1000000 /dev/urandom > /root/busy; sync /root/busy; \
         echo >> /dev/shm/rounds; done) > /dev/null 2>&1 &",
    )
    .await;
    (shim, guest)
}

/// What a guest of [`boot`] must not lose.
pub const SUMS: &str = "sha256sum /dev/shm/memory /root/synced /root/unsynced; cat /dev/shm/pid";

pub async fn count(guest: &Guest) -> u64 {
    // The shell empties the file before it writes.
    loop {
        let told = run(guest, "cat /dev/shm/count").await;
        if let Ok(count) = told.parse() {
            return count;
        }
    }
}
