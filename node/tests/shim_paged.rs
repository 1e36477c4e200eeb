//! A real Debian guest whose memory comes as it is touched: hop after hop, with its pager killed
//! under it, and with each pause keeping only what has changed.
//!
//! Ignored unless asked for: needs root, QEMU and the guest images (`WRENN_IMAGES`).

mod shim_support;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use shim_support::debian::{Netns, SUMS, boot, count, debian, run};
use shim_support::{BOOT, SOON, Sandbox, WRENN, eventually, runs, signal};
use tokio::time::Instant;
use wrenn_node::base::stop::Tasks;
use wrenn_node::guest::Guest;
use wrenn_node::pager::handle::WORKING_SET;
use wrenn_node::pager::page_map::PAGES;
use wrenn_node::pager::region::Region;
use wrenn_node::pager::working_set::WorkingSet;
use wrenn_node::sandbox::paging::{Paging, map_of};
use wrenn_node::shim::client::{self, ShimClient};
use wrenn_node::shim::dirty::{Basis, DirtyList};
use wrenn_node::shim::saved::{GuestStand, PagingStatus, Saved};
use wrenn_node::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::store::{Content, Kept, Limits, Manifest, Store};
use wrenn_node::vmm::{Hardware, NetworkSpec};

/// Of what a guest has written since it was resumed.
const WRITTEN_SUMS: &str = "sha256sum /dev/shm/more /dev/shm/later";

/// A daemon, as far as a resume needs one.
struct Daemon {
    home: tempfile::TempDir,
    store: Store,
    tasks: Tasks,
}

/// A pause: what is kept of the memory, and what that took.
struct Sealed {
    memory: Manifest,
    listed_bytes: u64,
    new_bytes: u64,
    basis: Basis,
    _kept: Kept,
}

/// The second pause of one resume.
struct Again {
    saved: Saved,
    sealed: Sealed,
    /// How far the guest had counted.
    counted: u64,
    /// The sums of what it has written since it was resumed.
    written: String,
}

impl Daemon {
    fn start() -> Self {
        let home = tempfile::tempdir().expect("tempdir");
        let store = Store::open(&home.path().join("store"), Limits::default()).expect("a store");
        let daemon = Self {
            home,
            store,
            tasks: Tasks::new(),
        };
        let paging = Arc::new(Paging::new(daemon.store.clone()));
        paging
            .serve(&daemon.socket(), &daemon.tasks)
            .expect("bound");
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.home.path().join("pager.sock")
    }

    /// Keeps the memory of a guest that stands still, as a change of `parent` if its list is one: of what
    /// it was resumed from, or sealed as since.
    fn seal(&self, saved: &Saved, from: &Sandbox, parent: Option<&Manifest>) -> Sealed {
        let bytes = saved.memory.bytes;
        let region = Region::of_bytes(bytes).expect("whole pages");
        let list = DirtyList::read(&from.dir, region).expect("listed");
        let memory = saved.memory.open().expect("it can be read");
        let seal = self.store.begin();
        let image = match (list.basis(), parent) {
            (Basis::Zeros, _) => seal.image(&memory, bytes),
            (Basis::Parent | Basis::LastSeal, Some(parent)) => {
                seal.image_changed(parent, &memory, bytes, list.ranges())
            }
            (Basis::Parent | Basis::LastSeal, None) => {
                panic!("a guest that was booted has no parent")
            }
        };
        let image = image.expect("sealed");
        let new_bytes = seal.tally().written_bytes;
        let listed_bytes = list.bytes();
        println!("sealed: {listed_bytes} bytes listed, {new_bytes} new");
        Sealed {
            memory: image.manifest,
            listed_bytes,
            new_bytes,
            basis: list.basis(),
            _kept: seal.finish(None).expect("durable"),
        }
    }

    /// Everything a resume in `to` needs.
    fn carry_over(&self, saved: &Saved, sealed: &Sealed, from: &Sandbox, to: &Sandbox) {
        std::fs::copy(&saved.state.path, to.dir.join("state")).expect("copied");
        std::fs::copy(from.dir.join("root.qcow2"), to.dir.join("root.qcow2")).expect("copied");
        let map = map_of(&self.store, &sealed.memory).expect("a map");
        map.write(&to.dir.join(PAGES)).expect("written");
        let set = from.dir.join(WORKING_SET);
        if set.exists() {
            std::fs::copy(set, to.dir.join(WORKING_SET)).expect("copied");
        }
    }

    fn spec(
        &self,
        saved: &Saved,
        hardware: &Hardware,
        to: &Sandbox,
        network: NetworkSpec,
    ) -> ShimSpec {
        let mut spec = debian(to, network);
        let mut state = saved.state.clone();
        state.path = to.dir.join("state");
        spec.restore = Some(RestoreSpec {
            state,
            hardware: hardware.clone(),
            memory: MemoryImage::Paged {
                daemon: self.socket(),
            },
        });
        spec
    }
}

async fn paging(shim: &ShimClient) -> PagingStatus {
    let status = shim.status().await.expect("answers");
    status.paging.expect("it has a pager")
}

/// Brings a guest back, and checks that it stands still with next to nothing of its memory.
async fn bring_back(spec: &ShimSpec, there: &Sandbox) -> ShimClient {
    let began = Instant::now();
    let shim = client::spawn(&there.dir, spec, WRENN.as_ref()).await;
    let shim = shim.unwrap_or_else(|err| panic!("{err:?}\n{}", there.file("shim.log")));
    let status = shim.known_status().clone();
    assert_eq!(status.stand, GuestStand::Still);
    println!(
        "back after {:?}: {:?} {:?}",
        began.elapsed(),
        status.restored,
        status.paging
    );
    shim
}

/// Kills the pager of a guest that had counted to `before` when it was saved; the next one takes over.
async fn outlives_its_pager(shim: &ShimClient, guest: &Guest, before: u64, sums: &str) {
    let killed = paging(shim).await.pager_pid;
    signal(killed, Signal::SIGKILL);
    let after = count(guest).await;
    assert!((before..before + 600).contains(&after), "{before}, {after}");
    assert_eq!(run(guest, SUMS).await, sums);
    let served = paging(shim).await;
    println!("{served:?}");
    assert_ne!(served.pager_pid, killed);
    assert_eq!(served.counters.expect("told").takeovers, 1);
}

/// Has a guest that was sealed as `last` go on, write a little and be sealed again: the list is of what it
/// wrote from then on.
async fn seal_again(
    daemon: &Daemon,
    shim: &ShimClient,
    guest: &Guest,
    here: &Sandbox,
    last: &Sealed,
) -> Again {
    shim.thaw(true).await.expect("goes on");
    run(guest, "head -c 100000 /dev/urandom > /dev/shm/later").await;
    let written = run(guest, WRITTEN_SUMS).await;
    let counted = count(guest).await;
    let saved = shim.save(SOON).await.expect("saved");
    let sealed = daemon.seal(&saved, here, Some(&last.memory));
    assert_eq!(sealed.basis, Basis::LastSeal, "{}", here.file("shim.log"));
    assert!(sealed.listed_bytes < last.listed_bytes);
    Again {
        saved,
        sealed,
        counted,
        written,
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real guest"]
async fn a_guest_goes_on_lazily_hop_after_hop_with_its_pager_killed_and_keeps_what_it_changed() {
    let daemon = Daemon::start();
    let homes = [Sandbox::new(), Sandbox::new(), Sandbox::new()];
    let netns = [Netns::new("tap0"), Netns::new("pgd1"), Netns::new("pgd2")];
    let (shim, guest) = boot(&homes[0], &netns[0]).await;
    let hardware = shim.known_status().hardware.clone();
    assert_eq!(shim.known_status().paging, None);
    let sums = run(&guest, SUMS).await;
    let mut before = count(&guest).await;
    let mut saved = shim.save(SOON).await.expect("saved");
    let first = daemon.seal(&saved, &homes[0], None);
    assert_eq!(first.basis, Basis::Zeros);
    let mut last = first;
    daemon.carry_over(&saved, &last, &homes[0], &homes[1]);
    shim.stop(Duration::ZERO).await.expect("stopped");
    let (full_listed, full_new) = (last.listed_bytes, last.new_bytes);
    let mut written = None;

    for hop in 1..homes.len() {
        let here = &homes[hop];
        let spec = daemon.spec(&saved, &hardware, here, netns[hop].spec());
        let shim = bring_back(&spec, here).await;
        let untouched = paging(&shim).await;
        // Pushed ahead, while it stands still.
        let pushed = untouched
            .counters
            .as_ref()
            .map_or(0, |it| it.pushed_windows);
        let asked_for = untouched.resident_bytes.saturating_sub(pushed << 16);
        assert!(asked_for < 16 << 20, "{untouched:?}");
        println!("hop {hop}: {pushed} windows were pushed");
        shim.thaw(false).await.expect("goes on");
        let guest = netns[hop].guest();
        guest
            .wait_ready(Instant::now() + SOON)
            .await
            .expect("ready");
        shim.mark_ready().await.expect("told");
        let set = here.dir.join(WORKING_SET);
        assert!(eventually(SOON, || set.exists()), "no working set");
        let set = WorkingSet::read(&set).expect("sound");
        println!(
            "hop {hop}: {} windows in the working set",
            set.windows().len()
        );
        assert!(!set.windows().is_empty());

        outlives_its_pager(&shim, &guest, before, &sums).await;
        if let Some(written) = &written {
            assert_eq!(&run(&guest, WRITTEN_SUMS).await, written);
        }

        run(&guest, "head -c 1000000 /dev/urandom > /dev/shm/more").await;
        saved = shim.save(SOON).await.expect("saved");
        let next = daemon.seal(&saved, here, Some(&last.memory));
        assert_eq!(next.basis, Basis::Parent, "{}", here.file("shim.log"));
        assert!(next.listed_bytes < full_listed / 2);
        assert!(next.new_bytes < full_new / 2);

        let again = seal_again(&daemon, &shim, &guest, here, &next).await;
        (before, saved, last) = (again.counted, again.saved, again.sealed);
        written = Some(again.written);
        if let Some(there) = homes.get(hop + 1) {
            daemon.carry_over(&saved, &last, here, there);
        }
        let pager = paging(&shim).await.pager_pid;
        let stopped = shim.known_status().shim_pid;
        shim.stop(Duration::ZERO).await.expect("stopped");
        assert!(!runs(pager), "its pager outlived it");
        // It answers before it ends.
        assert!(eventually(SOON, || !runs(stopped)), "its shim stays");
        assert!(kill_leftovers(&here.dir).expect("swept").is_empty());
    }
    daemon.tasks.stop_and_join().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real guest"]
async fn a_killed_shim_leaves_no_pager_even_of_one_that_is_stopped() {
    let daemon = Daemon::start();
    let (here, there) = (Sandbox::new(), Sandbox::new());
    let (home, away) = (Netns::new("tap0"), Netns::new("pgk1"));
    let (shim, _guest) = boot(&here, &home).await;
    let hardware = shim.known_status().hardware.clone();
    let saved = shim.save(SOON).await.expect("saved");
    let sealed = daemon.seal(&saved, &here, None);
    daemon.carry_over(&saved, &sealed, &here, &there);
    shim.stop(Duration::ZERO).await.expect("stopped");
    let spec = daemon.spec(&saved, &hardware, &there, away.spec());
    let shim = bring_back(&spec, &there).await;
    let pager = paging(&shim).await.pager_pid;
    signal(pager, Signal::SIGSTOP);
    signal(shim.known_status().shim_pid, Signal::SIGKILL);
    assert!(eventually(SOON, || !runs(pager)), "its pager outlived it");
    assert!(eventually(SOON, || !runs(shim.known_status().vmm_pid)));
    daemon.tasks.stop_and_join().await;
}

/// Bytes that are written and given back: several of the blocks of 2 MiB that a guest reports.
const GIVEN_BACK: u64 = 48 << 20;

fn data_bytes(memory: &Manifest) -> u64 {
    let data = memory.extents().iter();
    data.filter(|extent| extent.content != Content::Hole)
        .map(|extent| extent.len_bytes)
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real guest"]
async fn what_a_guest_gives_back_leaves_the_host_and_the_next_snapshot_and_comes_back_as_zero() {
    let daemon = Daemon::start();
    let (here, there) = (Sandbox::new(), Sandbox::new());
    let (home, away) = (Netns::new("tap0"), Netns::new("pgb1"));
    let (shim, guest) = boot(&here, &home).await;
    let hardware = shim.known_status().hardware.clone();
    let loaded = run(&guest, "ls -d /sys/module/virtio_balloon || true").await;
    assert!(!loaded.is_empty(), "deploy/images/initramfs is of before");
    let sums = run(&guest, SUMS).await;
    let saved = shim.save(SOON).await.expect("saved");
    let first = daemon.seal(&saved, &here, None);
    daemon.carry_over(&saved, &first, &here, &there);
    shim.stop(Duration::ZERO).await.expect("stopped");

    let spec = daemon.spec(&saved, &hardware, &there, away.spec());
    let shim = bring_back(&spec, &there).await;
    shim.thaw(false).await.expect("goes on");
    let guest = away.guest();
    guest
        .wait_ready(Instant::now() + SOON)
        .await
        .expect("ready");
    let fill = format!("head -c {GIVEN_BACK} /dev/urandom > /dev/shm/big; sha256sum /dev/shm/big");
    run(&guest, &fill).await;
    let full = paging(&shim).await;
    run(&guest, "rm /dev/shm/big").await;
    // A guest reports whole blocks, of which these pages are parts among others: those that are in
    // the way are moved, or thrown away where they are files, until enough is in one piece.
    let tidy = "echo 1 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory";
    let deadline = Instant::now() + BOOT;
    let left = loop {
        run(&guest, tidy).await;
        let left = paging(&shim).await;
        if left.resident_bytes + GIVEN_BACK / 4 < full.resident_bytes {
            break left;
        }
        assert!(Instant::now() < deadline, "{full:?}, {left:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    println!(
        "{} of {} bytes are left",
        left.resident_bytes, full.resident_bytes
    );

    let saved = shim.save(SOON).await.expect("saved");
    let next = daemon.seal(&saved, &there, Some(&first.memory));
    shim.thaw(false).await.expect("goes on");
    let (before, after) = (data_bytes(&first.memory), data_bytes(&next.memory));
    println!("{before} bytes of memory in the first snapshot, {after} in the second");
    let given_back = full.resident_bytes - left.resident_bytes;
    assert!(after < before + GIVEN_BACK - given_back / 2);
    // Used again, by a file that must not have anything of the old one.
    let written = run(&guest, &fill).await;
    let zeroed = paging(&shim).await.counters.expect("told").discard_faults;
    assert!(zeroed > 0, "nothing that was given back was used again");
    assert_eq!(run(&guest, "sha256sum /dev/shm/big").await, written);
    assert_eq!(run(&guest, SUMS).await, sums);
    shim.stop(Duration::ZERO).await.expect("stopped");
    daemon.tasks.stop_and_join().await;
}
