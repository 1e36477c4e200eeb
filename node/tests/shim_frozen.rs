//! What a daemon makes of guests that lost their lease: real guests in real slots, driven by the
//! registry, on a host of their own (network and mount namespaces that go with the test).
//!
//! Ignored unless asked for: needs root, QEMU and the guest images (`WRENN_IMAGES`).

#![allow(clippy::unwrap_used)] // a failed test may panic

mod shim_support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Mib;
use shim_support::{BOOT, QEMU, SOON, WRENN};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep};
use transport::Identity;
use wrenn_node::base::clock::BootInstant;
use wrenn_node::base::stop::Tasks;
use wrenn_node::guest::{Guest, ProcessCommand};
use wrenn_node::net::{NetConfig, SlotPool};
use wrenn_node::sandbox::{
    End, Host, Keeping, ObservedState, Origin, Registry, StartSpec, WarmStarts, adopt,
};
use wrenn_node::shim::lease::{self, LeaseTimes, LeaseWriter};
use wrenn_node::store::fetch::NoHolders;
use wrenn_node::store::{DataPaths, ImageDigest, Limits, Store, durable};
use wrenn_node::vmm::confinement::HostConfinement;
use wrenn_node::vmm::{Accelerator, Driver};

const ID: SandboxId = SandboxId([3; 16]);
const EPOCH: Epoch = Epoch(5);
const BASE: ImageDigest = ImageDigest([7; 32]);
const LONG: Duration = Duration::from_secs(600);
/// Long enough for a clock that counts 24 bits of 3.58 MHz (4.7 s) to lose count, as the one of
/// guests under TCG does: nobody told them, they were 4.5 s behind.
const A_WHILE: Duration = Duration::from_secs(6);
/// How far a guest's clock may be off after a thaw.
const CLOCK_LIMIT: f64 = 0.5;

/// As a node of its own has: tests side by side have sandboxes of the same names.
fn confinement(data: &DataPaths) -> HostConfinement {
    let home = data.root().file_name().expect("a name");
    HostConfinement::of_this_host(&format!("test{}", home.display()))
}

/// A host of its own and its data directory.
struct World {
    data: DataPaths,
    lease: LeaseWriter,
    _home: TempDir,
}

/// A daemon's part that matters here.
struct Node {
    registry: Arc<Registry>,
    tasks: Tasks,
    slots: SlotPool,
    slot_tasks: Tasks,
}

/// Runs `test` on a host of its own.
fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce(World) -> F + Send + 'static) {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        Runtime::new()
            .unwrap()
            .block_on(async { test(World::new()).await });
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

impl World {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let data = DataPaths::new(home.path());
        for dir in [data.sandboxes(), data.net()] {
            durable::create_dir(&dir).unwrap();
        }
        durable::create_dir(&data.templates()).unwrap();
        let rootfs = images().join("templates/minimal/rootfs.raw");
        std::os::unix::fs::symlink(rootfs, data.template_image(BASE)).unwrap();
        let lease = LeaseWriter::open(&lease::file_in(data.root())).unwrap();
        let world = Self {
            data,
            lease,
            _home: home,
        };
        world.lease_for(LONG, LONG);
        world
    }

    fn lease_for(&self, freeze: Duration, kill: Duration) {
        let now = BootInstant::now();
        let (freeze_at, kill_at) = (now + freeze, now + kill);
        self.lease
            .write(LeaseTimes::Limited { freeze_at, kill_at })
            .unwrap();
    }

    /// Starts a daemon, which takes over what an earlier one left.
    async fn node(&self) -> Node {
        let (tasks, slot_tasks) = (Tasks::new(), Tasks::new());
        let leftovers = adopt::scan(&self.data).await.unwrap();
        let slots = SlotPool::start(self.net(), &slot_tasks).await.unwrap();
        let images = images();
        let host = Host {
            data: self.data.clone(),
            keeping: Keeping {
                store: Store::open(&self.data.store(), Limits::default()).unwrap(),
                holders: Arc::new(NoHolders),
                identity: Arc::new(Identity::ephemeral().unwrap()),
            },
            paging: None,
            warm: WarmStarts::default(),
            slots: slots.clone(),
            kernel: images.join("kernel/vmlinuz"),
            kernel_release: "test".into(),
            initramfs: images.join("initramfs"),
            vmm_driver: Driver::Qemu,
            vmm_program: QEMU.into(),
            accelerator: Accelerator::Tcg,
            confinement: confinement(&self.data),
            wrenn: WRENN.into(),
            boot_timeout: BOOT,
        };
        let registry = Arc::new(Registry::new(Arc::new(host), tasks.clone()));
        adopt::take_over(&registry, leftovers).await;
        Node {
            registry,
            tasks,
            slots,
            slot_tasks,
        }
    }

    fn net(&self) -> NetConfig {
        NetConfig {
            tag: "lz".parse().unwrap(),
            index_base: 0,
            index_count: 4,
            pool_target: 0,
            egress_allow: Vec::new(),
            serial_file: self.data.net().join("serial"),
        }
    }
}

impl Node {
    /// Starts a guest and waits until it can be used.
    async fn start(&self) -> Guest {
        self.registry.start(StartSpec {
            let_begin: true,
            id: ID,
            epoch: EPOCH,
            template: "minimal".into(),
            origin: Origin::Image(BASE),
            vcpus: 1,
            memory: Mib(256),
            disk: Mib(5 * 1024),
            lease_bound: true,
            keep_warm: false,
        });
        self.await_that(2 * BOOT, |it| it.guest().is_some()).await;
        self.guest().unwrap()
    }

    fn guest(&self) -> Option<Guest> {
        self.registry.guest(ID, EPOCH)
    }

    fn state(&self) -> ObservedState {
        self.registry.observed()[&ID].state.clone()
    }

    async fn await_that(&self, timeout: Duration, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + timeout;
        while !holds(self) {
            assert!(Instant::now() < deadline, "still {:?}", self.state());
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends the sandbox, and this daemon.
    async fn end(self) {
        self.registry.stop(ID);
        let gone = |it: &Self| matches!(it.state(), ObservedState::Gone(_));
        self.await_that(2 * SOON, gone).await;
        self.detach().await;
    }

    /// Ends this daemon, and leaves the sandbox as it is.
    async fn detach(self) {
        self.tasks.stop_and_join().await;
        self.slots.shutdown().await;
        self.slot_tasks.stop_and_join().await;
    }
}

fn images() -> PathBuf {
    std::env::var_os("WRENN_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev/images"),
        PathBuf::from,
    )
}

async fn run(guest: &Guest, line: &str) -> String {
    let command = ProcessCommand {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), line.into()],
        ..ProcessCommand::default()
    };
    let ran = guest.run(command, Some(SOON)).await.unwrap();
    String::from_utf8(ran.stdout).unwrap().trim().to_owned()
}

fn wall_clock() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs_f64()
}

/// How many seconds the guest's wall clock is off, at the least that the two readings of ours
/// around its own allow for. Negative where it is behind.
async fn clock_error(guest: &Guest) -> f64 {
    let before = wall_clock();
    let shown: f64 = run(guest, "date +%s.%N").await.parse().unwrap();
    let after = wall_clock();
    shown - shown.clamp(before, after)
}

#[test]
#[ignore = "boots a real guest"]
fn a_frozen_guest_is_withheld_and_comes_back_with_the_right_time() {
    on_a_host(|world| async move {
        let node = world.node().await;
        let guest = node.start().await;
        assert!(clock_error(&guest).await.abs() < CLOCK_LIMIT);
        world.lease_for(Duration::ZERO, LONG);
        node.await_that(SOON, |it| it.registry.frozen(ID)).await;
        assert!(node.guest().is_none());
        assert!(matches!(node.state(), ObservedState::Ready(_)));
        sleep(A_WHILE).await;
        world.lease_for(LONG, LONG);
        node.await_that(SOON, |it| it.guest().is_some()).await;
        assert!(!node.registry.frozen(ID));
        assert!(clock_error(&guest).await.abs() < CLOCK_LIMIT);
        node.end().await;
    });
}

#[test]
#[ignore = "boots a real guest"]
fn a_frozen_guest_is_adopted_frozen_and_its_end_names_the_lease() {
    on_a_host(|world| async move {
        let first = world.node().await;
        first.start().await;
        world.lease_for(Duration::ZERO, LONG);
        first.await_that(SOON, |it| it.registry.frozen(ID)).await;
        first.detach().await;
        let second = world.node().await;
        let ready = |it: &Node| matches!(it.state(), ObservedState::Ready(_));
        second.await_that(SOON, ready).await;
        assert!(second.registry.frozen(ID));
        assert!(second.guest().is_none());
        // It also comes back to the daemon that did not freeze it, and to one after that.
        world.lease_for(LONG, LONG);
        second.await_that(SOON, |it| it.guest().is_some()).await;
        second.detach().await;
        let second = world.node().await;
        second.await_that(SOON, |it| it.guest().is_some()).await;
        world.lease_for(Duration::ZERO, Duration::from_millis(500));
        let gone = |it: &Node| matches!(it.state(), ObservedState::Gone(_));
        second.await_that(2 * SOON, gone).await;
        let ObservedState::Gone(End::LeaseLost { reason }) = second.state() else {
            panic!("{:?}", second.state());
        };
        assert!(reason.contains("lease-lost"), "{reason}");
        assert!(reason.contains("lost contact with the cluster"), "{reason}");
        assert!(!world.data.sandbox(ID).dir().exists());
        second.detach().await;
    });
}
