//! Guests that are resumed on a node that has none of their memory: what they touch is brought from
//! the node that has it, the rest follows, and a pause waits for it. Real guests in real slots, two
//! daemons' worth of rooms in one process, on a host of their own.
//!
//! Ignored unless asked for: needs root, QEMU and the guest images (`WRENN_IMAGES`).

#![allow(clippy::unwrap_used)] // a failed test may panic

mod shim_support;

use std::io;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use futures::future::BoxFuture;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId};
use proto::units::Mib;
use raft::state::SnapshotKind;
use shim_support::debian::{images, run};
use shim_support::{BOOT, QEMU, SOON, WRENN};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use transport::Identity;
use wrenn_node::base::stop::Tasks;
use wrenn_node::guest::{Guest, ProcessCommand};
use wrenn_node::net::{NetConfig, SlotPool};
use wrenn_node::sandbox::paging::Paging;
use wrenn_node::sandbox::{
    End, Host, Keeping, ObservedState, Origin, Registry, StartSpec, WarmStarts, adopt,
};
use wrenn_node::shim::client;
use wrenn_node::shim::saved::PagingStatus;
use wrenn_node::store::fetch::{Holders, Wire};
use wrenn_node::store::serve::{Asked, Wants};
use wrenn_node::store::{DataPaths, ImageDigest, Limits, SnapshotDigest, Store, durable};
use wrenn_node::vmm::confinement::HostConfinement;
use wrenn_node::vmm::{Accelerator, Driver};

const ID: SandboxId = SandboxId([4; 16]);
const BASE: ImageDigest = ImageDigest([7; 32]);
const HOLDER: NodeId = NodeId(1);
const PIPE_BYTES: usize = 1 << 16;
/// For this long a chunk must be had of nobody before it counts as lost, and then some.
const LOST: Duration = Duration::from_secs(150);
/// Things to lose, in three files that are touched one after the other.
const FILES: &str = "for it in 1 2 3; do head -c 6000000 /dev/urandom > /dev/shm/$it; done";

/// Runs `test` on a host of its own.
fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
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
        Runtime::new().unwrap().block_on(async { test().await });
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// As a node of its own has: tests side by side have sandboxes of the same names.
fn confinement(data: &DataPaths) -> HostConfinement {
    let home = data.root().file_name().expect("a name");
    HostConfinement::of_this_host(&format!("test{}", home.display()))
}

/// The one other node, and what it gives.
#[derive(Debug)]
struct Other {
    store: Store,
    /// It has the snapshot.
    has: AtomicBool,
    /// It gives whatever it is asked for. Else, once a guest has asked for a chunk, only such.
    gives_all: AtomicBool,
    asked_by_guest: AtomicBool,
    streams: Mutex<JoinSet<()>>,
}

impl Other {
    /// Its disk is gone: it has nothing any more, and every stream to it breaks.
    fn lose(&self) {
        self.has.store(false, Ordering::SeqCst);
        self.streams.lock().unwrap().abort_all();
    }
}

impl Holders for Other {
    fn holders(&self, _: SnapshotDigest) -> Vec<NodeId> {
        let has = self.has.load(Ordering::SeqCst);
        has.then_some(HOLDER).into_iter().collect()
    }

    fn open(&self, _: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let asked = Asked::read(&header).expect("the header is understood");
        if asked.wants == Wants::Urgent {
            self.asked_by_guest.store(true, Ordering::SeqCst);
        }
        let all = self.gives_all.load(Ordering::SeqCst);
        let first = !self.asked_by_guest.load(Ordering::SeqCst);
        let gives = all || first || asked.wants == Wants::Urgent;
        if !gives || !self.has.load(Ordering::SeqCst) {
            return Box::pin(async { Err(io::ErrorKind::ConnectionRefused.into()) });
        }
        let (near, mut far) = tokio::io::duplex(PIPE_BYTES);
        let store = self.store.clone();
        self.streams.lock().unwrap().spawn(async move {
            let _broken = store.serve(asked, &mut far).await;
        });
        Box::pin(async { Ok(Box::new(near) as Box<dyn Wire>) })
    }

    fn may_seal(&self, _: &NodeKey) -> bool {
        true
    }
}

/// A node's data and what outlives its daemons.
struct Place {
    data: DataPaths,
    store: Store,
    holders: Arc<Other>,
    index_base: u16,
    _home: TempDir,
}

/// A daemon's part that matters here.
struct Node {
    registry: Arc<Registry>,
    tasks: Tasks,
    slots: SlotPool,
    slot_tasks: Tasks,
    epoch: Epoch,
}

impl Place {
    /// `of` is the store of the other node; its own, if there is none.
    fn new(of: Option<&Store>, index_base: u16) -> Self {
        let home = tempfile::tempdir().unwrap();
        let data = DataPaths::new(home.path());
        for dir in [data.sandboxes(), data.net(), data.templates()] {
            durable::create_dir(&dir).unwrap();
        }
        let rootfs = images().join("templates/minimal/rootfs.raw");
        std::os::unix::fs::symlink(rootfs, data.template_image(BASE)).unwrap();
        let store = Store::open(&data.store(), Limits::default()).unwrap();
        let holders = Arc::new(Other {
            store: of.unwrap_or(&store).clone(),
            has: AtomicBool::new(of.is_some()),
            gives_all: AtomicBool::new(false),
            asked_by_guest: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        Self {
            data,
            store,
            holders,
            index_base,
            _home: home,
        }
    }

    /// Starts a daemon, which takes over what an earlier one left.
    async fn node(&self, epoch: u64) -> Node {
        let (tasks, slot_tasks) = (Tasks::new(), Tasks::new());
        let leftovers = adopt::scan(&self.data).await.unwrap();
        let net = NetConfig {
            tag: format!("ly{}", self.index_base).parse().unwrap(),
            index_base: self.index_base,
            index_count: 4,
            pool_target: 0,
            egress_allow: Vec::new(),
            serial_file: self.data.net().join("serial"),
        };
        let slots = SlotPool::start(net, &slot_tasks).await.unwrap();
        let paging = Paging::new(self.store.clone());
        paging.serve(&self.data.pager_socket(), &tasks).unwrap();
        let host = Host {
            data: self.data.clone(),
            keeping: Keeping {
                store: self.store.clone(),
                holders: self.holders.clone(),
                identity: Arc::new(Identity::ephemeral().unwrap()),
            },
            paging: Some(paging),
            warm: WarmStarts::default(),
            slots: slots.clone(),
            kernel: images().join("kernel/vmlinuz"),
            kernel_release: "test".into(),
            initramfs: images().join("initramfs"),
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
            epoch: Epoch(epoch),
        }
    }

    /// How many chunks of a snapshot's memory are not here.
    fn missing(&self, snapshot: SnapshotDigest) -> usize {
        let signed = self.store.snapshot(&snapshot).unwrap();
        let memory = signed.manifest().running.unwrap().memory.digest;
        self.store
            .missing(&self.store.image(&memory).unwrap())
            .len()
    }

    async fn paging(&self) -> PagingStatus {
        let shim = client::connect(self.data.sandbox(ID).dir()).await.unwrap();
        shim.known_status().paging.clone().expect("it has a pager")
    }
}

impl Node {
    /// Starts a guest and waits until it can be used.
    async fn start(&self, origin: Origin) -> Guest {
        self.registry.start(StartSpec {
            let_begin: true,
            id: ID,
            epoch: self.epoch,
            template: "minimal".into(),
            origin,
            vcpus: 1,
            memory: Mib(256),
            disk: Mib(5 * 1024),
            lease_bound: false,
            keep_warm: false,
        });
        self.guest().await
    }

    async fn guest(&self) -> Guest {
        let guest = || self.registry.guest(ID, self.epoch);
        self.await_that(2 * BOOT, || guest().is_some()).await;
        guest().unwrap()
    }

    fn state(&self) -> ObservedState {
        self.registry.observed()[&ID].state.clone()
    }

    async fn await_that(&self, timeout: Duration, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + timeout;
        while !holds() {
            assert!(Instant::now() < deadline, "still {:?}", self.state());
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn sealed(&self) -> Option<SnapshotDigest> {
        match self.state() {
            ObservedState::Sealed(sealed) => Some(SnapshotDigest(sealed.digest)),
            _ => None,
        }
    }

    /// Ends the sandbox, and this daemon.
    async fn end(self) {
        self.registry.stop(ID);
        let gone = || matches!(self.state(), ObservedState::Gone(_));
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

async fn sum(guest: &Guest, file: u8) -> String {
    run(guest, &format!("sha256sum /dev/shm/{file}")).await
}

/// A place that holds a snapshot, what that is, and the sums of the files in its memory.
async fn sealed_elsewhere() -> (Place, SnapshotDigest, Vec<String>) {
    let there = Place::new(None, 0);
    let node = there.node(1).await;
    let guest = node.start(Origin::Image(BASE)).await;
    run(&guest, FILES).await;
    let mut sums = Vec::new();
    for file in 1..=3 {
        sums.push(sum(&guest, file).await);
    }
    node.registry.seal(ID, 1, SnapshotKind::Snapshot);
    node.await_that(BOOT, || node.sealed().is_some()).await;
    let snapshot = node.sealed().unwrap();
    node.end().await;
    (there, snapshot, sums)
}

#[test]
#[ignore = "boots a real guest"]
fn a_guest_runs_before_its_memory_is_here_outlives_a_daemon_and_is_paused_once_all_of_it_is() {
    on_a_host(async || {
        let (there, snapshot, sums) = sealed_elsewhere().await;
        let here = Place::new(Some(&there.store), 8);
        let node = here.node(2).await;
        let began = Instant::now();
        let guest = node.start(Origin::Snapshot(snapshot)).await;
        println!("ready after {:?}", began.elapsed());
        let all = there.store.stats().unwrap().chunks;
        let missing = here.missing(snapshot);
        println!("{missing} chunks of memory are not here, of {all} in all");
        assert!(missing > 300, "there was nothing to bring");
        assert_eq!(sum(&guest, 1).await, sums[0]);
        let counters = here.paging().await.counters.expect("told");
        println!("{counters:?}");
        assert!(counters.peer_faults > 0);

        // The guest, and its pager, outlive their daemon; the next one goes on.
        node.detach().await;
        let node = here.node(2).await;
        let guest = node.guest().await;
        assert_eq!(sum(&guest, 2).await, sums[1]);

        let missing = here.missing(snapshot);
        assert!(missing > 0, "all of it is here");
        node.registry.seal(ID, 2, SnapshotKind::Snapshot);
        let asked = Instant::now();
        let sealing = || matches!(node.state(), ObservedState::Sealing);
        node.await_that(SOON, sealing).await;
        sleep(Duration::from_secs(2)).await;
        assert!(sealing(), "{:?}", node.state());
        here.holders.gives_all.store(true, Ordering::SeqCst);
        node.await_that(BOOT, || node.sealed().is_some()).await;
        println!("sealed {:?} after it was asked", asked.elapsed());
        let second = node.sealed().unwrap();
        assert_eq!((here.missing(snapshot), here.missing(second)), (0, 0));
        node.end().await;

        // From here on nobody else is needed.
        here.holders.lose();
        let node = here.node(3).await;
        let guest = node.start(Origin::Snapshot(second)).await;
        for (file, wanted) in (1..=3).zip(&sums) {
            assert_eq!(sum(&guest, file).await, *wanted);
        }
        node.end().await;
    });
}

#[test]
#[ignore = "boots a real guest"]
fn a_guest_whose_memory_nobody_has_any_more_is_ended_and_its_end_says_so() {
    on_a_host(async || {
        let (there, snapshot, sums) = sealed_elsewhere().await;
        let here = Place::new(Some(&there.store), 8);
        let node = here.node(2).await;
        let guest = node.start(Origin::Snapshot(snapshot)).await;
        assert_eq!(sum(&guest, 1).await, sums[0]);
        here.holders.lose();
        // It never hears of this.
        let command = ProcessCommand {
            cmd: "sha256sum".into(),
            args: vec!["/dev/shm/2".into()],
            ..ProcessCommand::default()
        };
        let asking = tokio::spawn(async move { guest.run(command, Some(LOST)).await });
        let gone = || matches!(node.state(), ObservedState::Gone(_));
        node.await_that(LOST, gone).await;
        asking.abort();
        let ObservedState::Gone(End::Failed { reason }) = node.state() else {
            panic!("{:?}", node.state());
        };
        println!("{reason}");
        assert!(reason.contains("memory-lost"), "{reason}");
        assert!(reason.contains("no host has a sound copy"), "{reason}");
        node.detach().await;
    });
}
