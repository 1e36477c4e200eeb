//! A real Debian guest with its agent, saved and brought back in another directory, namespace and
//! tap: what it had in memory and on its disk is there, and what it was doing it goes on doing.
//!
//! Ignored unless asked for: needs root, QEMU and the guest images (`WRENN_IMAGES`).

mod shim_support;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use shim_support::{BOOT, QEMU, SOON, Sandbox, WRENN, copy_memory};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use wrenn_node::guest::dial::DialFuture;
use wrenn_node::guest::{AgentSetup, Dial, Guest, GuestStream, ProcessCommand};
use wrenn_node::net::netns;
use wrenn_node::net::slot::{GATEWAY_ADDR, GATEWAY_MAC, GUEST_ADDR, GUEST_MAC};
use wrenn_node::pager::region::Region;
use wrenn_node::shim::client::{self, ShimClient};
use wrenn_node::shim::dirty::DirtyList;
use wrenn_node::shim::saved::{GuestStand, Saved};
use wrenn_node::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use wrenn_node::store::Overlay;
use wrenn_node::vmm::cmdline::GuestArgs;
use wrenn_node::vmm::{Hardware, NetworkSpec};

/// The port of the agent.
const AGENT_PORT: u16 = 49983;
const TOKEN: &str = "0123456789abcdef";
/// Longest that a command in a guest takes on a busy machine.
const COMMAND: Duration = Duration::from_secs(60);

/// A namespace with a tap, removed when dropped.
struct Netns {
    name: String,
    tap: &'static str,
}

impl Netns {
    fn new(tap: &'static str) -> Self {
        let netns = Self {
            name: format!("vmm-{}-{tap}", std::process::id()),
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

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    fn spec(&self) -> NetworkSpec {
        NetworkSpec {
            netns: self.path(),
            tap: self.tap.into(),
            mac: GUEST_MAC,
        }
    }

    /// A client of the agent that nobody has called yet.
    fn guest(&self) -> Guest {
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

fn images() -> PathBuf {
    std::env::var_os("WRENN_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev/images"),
        PathBuf::from,
    )
}

fn debian(sandbox: &Sandbox, network: NetworkSpec) -> ShimSpec {
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

async fn run(guest: &Guest, line: &str) -> String {
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
async fn boot(sandbox: &Sandbox, netns: &Netns) -> (ShimClient, Guest) {
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

const SUMS: &str = "sha256sum /dev/shm/memory /root/synced /root/unsynced; cat /dev/shm/pid";

async fn count(guest: &Guest) -> u64 {
    // The shell empties the file before it writes.
    loop {
        let told = run(guest, "cat /dev/shm/count").await;
        if let Ok(count) = told.parse() {
            return count;
        }
    }
}

/// Everything a resume elsewhere needs, in the directory of another sandbox.
fn carry_over(saved: &Saved, from: &Sandbox, to: &Sandbox) {
    let region = Region::new(proto::units::Mib(256));
    let list = DirtyList::read(&from.dir, region).expect("listed");
    let memory = saved.memory.open().expect("it can be read");
    let image = to.dir.join("memory");
    copy_memory(&memory, list.ranges(), saved.memory.bytes, &image);
    std::fs::copy(&saved.state.path, to.dir.join("state")).expect("copied");
    // Copied while the VMM has it open and stands still.
    std::fs::copy(from.dir.join("root.qcow2"), to.dir.join("root.qcow2")).expect("copied");
    let checked = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(to.dir.join("root.qcow2"))
        .output()
        .expect("qemu-img runs");
    let said = String::from_utf8_lossy(&checked.stdout);
    println!("{}", said.lines().next().unwrap_or_default());
    assert!(checked.status.success(), "{said}");
}

fn restoring(saved: &Saved, hardware: &Hardware, to: &Sandbox, network: NetworkSpec) -> ShimSpec {
    let mut spec = debian(to, network);
    let mut state = saved.state.clone();
    state.path = to.dir.join("state");
    spec.restore = Some(RestoreSpec {
        state,
        hardware: hardware.clone(),
        memory: MemoryImage::Flat(to.dir.join("memory")),
    });
    spec
}

fn print_times(saved: &Saved) {
    let (mib, state) = (saved.memory.dirty_bytes >> 20, saved.state.bytes);
    let (state_took, dirty_took) = (saved.state_took, saved.dirty_took);
    let sync_took = saved.sync_took;
    println!(
        "saved: {state} bytes of state in {state_took:?}, {mib} MiB of memory listed in \
         {dirty_took:?}, both synced in {sync_took:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real guest"]
async fn debian_is_saved_thawed_and_brought_back_elsewhere_with_all_it_had() {
    let (here, there) = (Sandbox::new(), Sandbox::new());
    let (home, away) = (Netns::new("tap0"), Netns::new("away7"));
    let (shim, guest) = boot(&here, &home).await;
    let hardware = shim.known_status().hardware.clone();
    let sums = run(&guest, SUMS).await;

    let before = count(&guest).await;
    print_times(&shim.save(SOON).await.expect("saved"));
    shim.thaw().await.expect("goes on");
    guest
        .wait_ready(Instant::now() + SOON)
        .await
        .expect("ready");
    assert!(count(&guest).await > before);
    assert_eq!(run(&guest, SUMS).await, sums);

    let before = count(&guest).await;
    let saved = shim.save(SOON).await.expect("saved");
    print_times(&saved);
    carry_over(&saved, &here, &there);
    shim.stop(Duration::ZERO).await.expect("stopped");
    let [closed, copied] = [&here, &there].map(|it| it.dir.join("root.qcow2"));
    let same = Command::new("cmp").args([closed, copied]).status();
    assert!(same.expect("cmp runs").success(), "the disk has changed");

    let spec = restoring(&saved, &hardware, &there, away.spec());
    let began = Instant::now();
    let shim = client::spawn(&there.dir, &spec, WRENN.as_ref()).await;
    let shim = shim.expect("back");
    let up = began.elapsed();
    assert_eq!(shim.known_status().stand, GuestStand::Still);
    shim.thaw().await.expect("goes on");
    let guest = away.guest();
    guest
        .wait_ready(Instant::now() + SOON)
        .await
        .expect("ready");
    println!("back after {up:?}, answers after {:?}", began.elapsed());
    let status = shim.status().await.expect("answers");
    println!("QEMU {:?}, {:?}", status.vmm_start, status.restored);
    let after = count(&guest).await;
    // What it counted between our last look and the save is unknown, and not minutes' worth.
    assert!((before..before + 600).contains(&after), "{before}, {after}");
    assert_eq!(run(&guest, SUMS).await, sums);
    // Its disk takes writes, those under way at the save as well as new ones.
    run(&guest, "echo new > /root/new && sync && cat /root/new").await;
    let rounds = "wc -l < /dev/shm/rounds";
    let before = run(&guest, rounds).await;
    run(
        &guest,
        &format!("until [ $({rounds}) -gt $(({before} + 1)) ]; do sleep 0.1; done"),
    )
    .await;
    assert_eq!(
        run(&guest, "dmesg | grep -c 'I/O error' || true").await,
        "0"
    );
    // And it can be saved from here.
    print_times(&shim.save(SOON).await.expect("saved"));
    shim.thaw().await.expect("goes on");
    assert_eq!(run(&guest, SUMS).await, sums);
    shim.stop(Duration::ZERO).await.expect("stopped");
}
