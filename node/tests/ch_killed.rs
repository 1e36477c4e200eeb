//! A real Cloud Hypervisor that is killed while its guest is saved, brought back, or just goes on,
//! under a real shim and pager: the error or the end has a name, comes at once, and nothing is left.
//! The steps of the hand-over itself are those of `ch_handover.rs`.

mod ch_shims;
mod ch_world;
mod pager_world;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ch_shims::{Bringing, Dir, WRENN, merged, restoring, spec_of, start};
use ch_world::{FIRST, Guest, MEMORY, STRIDE, World, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pager_world::daemon::{Daemon, Mood};
use pager_world::{Image, PAGE, SOON, eventually, pages_of};
use wrenn_node::base::chain::chain;
use wrenn_node::pager::handle::{Pager, PagerSpec, WORKING_SET};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::page_map::PageMap;
use wrenn_node::pager::pages::PageSet;
use wrenn_node::pager::region::{Region, WINDOW_BYTES, WindowIndex};
use wrenn_node::pager::uffd::Tracking;
use wrenn_node::pager::working_set::{Recorder, WorkingSet};
use wrenn_node::shim::client::{self, ShimClient};
use wrenn_node::shim::dirty::{Basis, DirtyList};
use wrenn_node::shim::error::{CallShimError, SpawnShimError};
use wrenn_node::shim::saved::{GuestStand, Saved};
use wrenn_node::shim::spec::RestoreSpec;
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::vmm::Hardware;
use wrenn_node::vmm::cloud_hypervisor::spawn::first_argument;
use wrenn_node::vmm::confinement::HostConfinement;

/// Longest that anything may take of which the VMM is dead.
const AT_ONCE: Duration = Duration::from_secs(5);
/// The ways in which a guest's memory comes.
const MODES: [Bringing; 2] = [Bringing::Watched, Bringing::Asked];

/// Kills `pid`, if it is still there.
fn kill_now(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    let _gone_already = kill(pid, Signal::SIGKILL);
}

fn kill_in(pid: u32, wait: Duration) -> JoinHandle<()> {
    thread::spawn(move || {
        thread::sleep(wait);
        kill_now(pid);
    })
}

/// No process, or one that is dead and only not reaped, which is not our affair.
fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|it| it.chars().next());
    matches!(state, None | Some('Z'))
}

/// The VMM of `dir`, once it is there.
fn vmm_of(dir: &Path) -> u32 {
    let name = first_argument(&dir.canonicalize().expect("there").to_string_lossy());
    let is_it = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).next() == Some(name.as_bytes())
    };
    let end = Instant::now() + SOON;
    loop {
        let entries = fs::read_dir("/proc").expect("listed").flatten();
        let mut pids = entries.filter_map(|it| it.file_name().to_str()?.parse().ok());
        if let Some(pid) = pids.find(is_it) {
            return pid;
        }
        assert!(Instant::now() < end, "no VMM came");
    }
}

/// A world whose next guest has a user, a root and a control group of its own.
struct Host {
    world: World,
    confinement: HostConfinement,
    guests: AtomicU16,
}

impl Host {
    fn new(name: &str) -> Option<Self> {
        let tag = format!("{name}-{}", std::process::id());
        Some(Self {
            world: World::new()?,
            confinement: HostConfinement::of_this_host(&tag),
            guests: AtomicU16::new(0),
        })
    }

    fn next_guest(&mut self) {
        let number = self.guests.fetch_add(1, Ordering::Relaxed);
        let confinement = &self.confinement;
        self.world.spec.confinement = confinement.of_sandbox(&format!("guest-{number}"), number);
    }

    async fn boot(&mut self) -> (Dir, ShimClient) {
        self.next_guest();
        let dir = Dir::new();
        let shim = start(&self.world, &dir, None).await;
        dir.await_round(2);
        (dir, shim)
    }

    /// No process, no socket, no directory, no control group, and no half of a file.
    fn assert_nothing_is_left(&self, dir: &Dir, at: &str) {
        let killed = kill_leftovers(dir.path()).expect("swept");
        assert!(killed.is_empty(), "{at}: these were left: {killed:?}");
        for entry in fs::read_dir(dir.path()).expect("listed") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            // That one is the daemon's.
            let is_left = name == "shim.sock" || name.starts_with('.');
            let is_dir = entry.file_type().expect("told").is_dir();
            assert!(!is_left && !is_dir, "{at}: {name} was left");
        }
        let group = self.world.spec.confinement.group.as_ref();
        assert!(group.is_none_or(|group| !group.exists()), "{at}: {group:?}");
    }

    /// The guest's end is known by its signal, its shim goes, and so does all that belonged to it.
    async fn assert_ended(&self, dir: &Dir, shim: &ShimClient, at: &str) {
        let deadline = tokio::time::Instant::now() + AT_ONCE;
        let exit = shim.wait_exit(deadline).await.expect(at).expect(at);
        assert_eq!(
            (exit.signal, exit.asked),
            (Some(9), false),
            "{at}: {exit:?}"
        );
        let pid = shim.known_status().shim_pid;
        assert!(eventually(AT_ONCE, || is_gone(pid)), "{at}: the shim stays");
        self.assert_nothing_is_left(dir, at);
    }
}

/// A guest that was saved, to be brought back as often as one likes.
struct Template {
    _dir: Dir,
    saved: Saved,
    hardware: Hardware,
    memory: Vec<u8>,
    round: u64,
}

impl Template {
    async fn make(host: &mut Host) -> Self {
        let (dir, shim) = host.boot().await;
        let saved = shim.save(SOON).await.expect("saved");
        let zeros = vec![0; usize::try_from(MEMORY.bytes()).expect("small")];
        let memory = merged(&dir, &saved, &zeros);
        let hardware = shim.known_status().hardware.clone();
        shim.stop(Duration::ZERO).await.expect("ended");
        Self {
            round: dir.round(),
            _dir: dir,
            saved,
            hardware,
            memory,
        }
    }

    fn restoring(&self, dir: &Dir, bringing: Bringing) -> RestoreSpec {
        let hardware = self.hardware.clone();
        restoring(dir, &self.saved, hardware, &self.memory, bringing)
    }

    /// A guest that goes on from it.
    async fn go_on(&self, host: &mut Host, bringing: Bringing) -> (Dir, ShimClient) {
        host.next_guest();
        let dir = Dir::new();
        let restore = self.restoring(&dir, bringing);
        let shim = start(&host.world, &dir, Some(restore)).await;
        shim.thaw(false).await.expect("goes on");
        dir.await_round(self.round + 2);
        (dir, shim)
    }

    /// The pages of the image in `dir` from `from` on are nowhere but with a daemon that says nothing.
    fn hold_back(&self, dir: &Dir, from: u64) -> Daemon {
        let map = PageMap::read(&dir.path().join("pages")).expect("whole");
        let mut windows = (from / WINDOW_BYTES..).map(|it| map.extents_of(WindowIndex(it)));
        let first = windows.find_map(|it| it.first()).expect("some");
        let index = usize::try_from(first.chunk).expect("small");
        let place = map.chunks()[index].place.clone().expect("in the pack");
        let pack = File::options().write(true).open(&*place.pack);
        pack.and_then(|pack| pack.set_len(place.offset))
            .expect("cut off");
        let image = Image {
            bytes: Vec::new(),
            map,
            elsewhere: Vec::new(),
        };
        Daemon::start(dir.path(), &image, Mood::SaysNothing)
    }
}

/// Who runs a guest that is to be saved.
#[derive(Clone, Copy, Debug)]
enum Source {
    Booted,
    Resumed(Bringing),
}

/// Whatever the save had come to: it is an error by name, or a guest that is saved whole, and then its
/// VMM's end is told.
async fn saves_of_a_vmm_that_is_killed(source: Source) {
    let Some(mut host) = Host::new(&format!("saves-{source:?}").replace(['(', ')'], "-")) else {
        return;
    };
    let template = Template::make(&mut host).await;
    let (mut done, mut failed) = (0, 0);
    for micros in [
        0, 300, 700, 1200, 1800, 2500, 3500, 5000, 7000, 10_000, 15_000,
    ] {
        let at = format!("{source:?}, {micros} us");
        let (dir, shim) = match source {
            Source::Booted => host.boot().await,
            Source::Resumed(bringing) => template.go_on(&mut host, bringing).await,
        };
        let first = shim.save(SOON).await.expect("saved");
        // Later there may be nobody any more to open it with.
        let memory = first.memory.open().expect("there");
        shim.thaw(false).await.expect("goes on");
        let vmm = shim.known_status().vmm_pid;
        let (killer, began) = (kill_in(vmm, Duration::from_micros(micros)), Instant::now());
        let saving = shim.save(SOON).await;
        assert!(began.elapsed() < AT_ONCE, "{at}: {saving:?}");
        match saving {
            Ok(_) => {
                assert_lists_all(&dir, &memory, &template.memory, &at);
                done += 1;
            }
            Err(CallShimError::Failed { message, .. }) => {
                let is_named = message.contains("save the guest") || message.contains("ended");
                assert!(is_named, "{at}: {message}");
                failed += 1;
            }
            // It was killed so early that nobody was there to be asked, or who was there is going.
            Err(CallShimError::Gone { .. } | CallShimError::Frame { .. }) => failed += 1,
            Err(err) => panic!("{at}: {}", chain(&err)),
        }
        killer.join().expect("no panic");
        host.assert_ended(&dir, &shim, &at).await;
    }
    eprintln!("{source:?}: {done} were done, {failed} failed");
    assert!(failed > 0, "none was killed in the middle");
}

/// Each page that is not as in what the list begins with is listed.
fn assert_lists_all(dir: &Dir, memory: &File, parent: &[u8], at: &str) {
    let region = Region::new(MEMORY);
    let list = DirtyList::read(dir.path(), region).expect("listed");
    let existing = PageSet::present_in(memory.as_fd(), region).expect("listed");
    let mut page = vec![0; PAGE];
    for number in existing.iter() {
        let from = number.offset().0;
        memory.read_exact_at(&mut page, from).expect("read");
        let index = usize::try_from(from).expect("small");
        let before = match list.basis() {
            Basis::Zeros => &[0; PAGE][..],
            _ => &parent[index..index + PAGE],
        };
        let is_listed = list.ranges().iter().any(|it| it.contains(&from));
        assert!(is_listed || page == before, "{at}: {number:?} is missing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_of_a_vmm_that_is_killed_fails_by_name_or_is_whole_and_leaves_nothing() {
    saves_of_a_vmm_that_is_killed(Source::Booted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_of_a_resumed_vmm_that_is_killed_fails_by_name_or_is_whole_and_leaves_nothing() {
    saves_of_a_vmm_that_is_killed(Source::Resumed(Bringing::Watched)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_of_an_asking_vmm_that_is_killed_fails_by_name_or_is_whole_and_leaves_nothing() {
    saves_of_a_vmm_that_is_killed(Source::Resumed(Bringing::Asked)).await;
}

/// Held by its last question, or while that is answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_is_killed_with_its_saved_guest_does_not_go_on_and_its_end_is_told() {
    let Some(mut host) = Host::new("held") else {
        return;
    };
    for wait in [None, Some(0), Some(500), Some(1000), Some(2000), Some(5000)] {
        let at = format!("{wait:?} us after the order to go on");
        let (dir, shim) = host.boot().await;
        shim.save(SOON).await.expect("saved");
        let vmm = shim.known_status().vmm_pid;
        let killer = kill_in(vmm, Duration::from_micros(wait.unwrap_or(0)));
        if wait.is_none() {
            assert!(eventually(SOON, || is_gone(vmm)), "it was killed");
        }
        let began = Instant::now();
        let told = shim.thaw(false).await;
        assert!(began.elapsed() < AT_ONCE, "{at}: {told:?}");
        match told {
            Ok(()) => assert!(wait.is_some(), "a dead guest goes on"),
            // The last is a shim that is going, and had not heard it.
            Err(
                CallShimError::Failed { .. }
                | CallShimError::Gone { .. }
                | CallShimError::Frame { .. },
            ) => {}
            Err(err) => panic!("{at}: {}", chain(&err)),
        }
        killer.join().expect("no panic");
        host.assert_ended(&dir, &shim, &at).await;
    }
}

/// From its start to its going on, in steps of the clock: those of the protocol are among them.
async fn bringing_back_of_a_vmm_that_is_killed(bringing: Bringing) {
    let Some(mut host) = Host::new(&format!("back-{bringing:?}")) else {
        return;
    };
    let template = Template::make(&mut host).await;
    let (mut up, mut failed) = (0, 0);
    for millis in [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30, 40, 60] {
        let at = format!("{bringing:?}, {millis} ms");
        host.next_guest();
        let dir = Dir::new();
        let spec = spec_of(&host.world, Some(template.restoring(&dir, bringing)));
        let killer = kill_when_there(dir.path(), Duration::from_millis(millis));
        let spawned = client::spawn(dir.path(), &spec, Path::new(WRENN)).await;
        let (vmm, killed_at) = killer.join().expect("no panic");
        assert!(killed_at.elapsed() < AT_ONCE, "{at}: {spawned:?}");
        match spawned {
            Ok(shim) => {
                up += 1;
                // It may have gone in between.
                let _told = shim.thaw(false).await;
                host.assert_ended(&dir, &shim, &at).await;
            }
            Err(SpawnShimError::GaveUp { reason }) => {
                failed += 1;
                assert!(reason.len() > 20, "{at}: no reason: {reason:?}");
                assert!(is_gone(vmm), "{at}");
                host.assert_nothing_is_left(&dir, &at);
            }
            // It had come up, and its end is on the disk.
            Err(SpawnShimError::Greet(
                CallShimError::Failed { .. } | CallShimError::Gone { .. },
            )) => {
                up += 1;
                let exit = client::read_exit(dir.path()).await.expect("read");
                assert_eq!(exit.expect(&at).signal, Some(9), "{at}");
            }
            Err(err) => panic!("{at}: {err}"),
        }
    }
    eprintln!("{bringing:?}: {up} were up, {failed} failed");
    assert!(failed > 0, "none was killed in the middle");
}

/// Kills the VMM of `dir` so long after it was there. Returns which, and when it did.
fn kill_when_there(dir: &Path, wait: Duration) -> JoinHandle<(u32, Instant)> {
    let dir = dir.to_owned();
    thread::spawn(move || {
        let vmm = vmm_of(&dir);
        thread::sleep(wait);
        kill_now(vmm);
        (vmm, Instant::now())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_is_killed_while_its_guest_is_brought_back_is_an_error_and_leaves_nothing() {
    bringing_back_of_a_vmm_that_is_killed(Bringing::Watched).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_is_killed_while_it_takes_in_a_guest_that_asks_is_an_error_and_leaves_nothing() {
    bringing_back_of_a_vmm_that_is_killed(Bringing::Asked).await;
}

/// Its devices cannot be loaded without a page that nobody brings: the pager waits for a daemon, the VMM
/// for the pager, the shim for the VMM.
#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_is_killed_while_everybody_waits_for_a_page_is_an_error_and_leaves_nothing() {
    let Some(mut host) = Host::new("waits") else {
        return;
    };
    let template = Template::make(&mut host).await;
    for bringing in MODES {
        let at = format!("{bringing:?}");
        host.next_guest();
        let dir = Dir::new();
        let spec = spec_of(&host.world, Some(template.restoring(&dir, bringing)));
        let daemon = template.hold_back(&dir, 0);
        let home = dir.path().to_owned();
        let spawning = tokio::spawn(async move {
            let spawned = client::spawn(&home, &spec, Path::new(WRENN)).await;
            (spawned, Instant::now())
        });
        assert!(eventually(SOON, || !daemon.asked().is_empty()), "{at}");
        let vmm = vmm_of(dir.path());
        // One that asks comes as far as standing still, where it needs no page for that. Whether it
        // does so before it is killed is for the clock.
        let is_up = || dir.path().join("shim.sock").exists();
        let came_up = eventually(Duration::from_millis(300), is_up);
        let killed_at = Instant::now();
        kill_now(vmm);
        let (spawned, told_at) = spawning.await.expect("no panic");
        assert!(told_at < killed_at + AT_ONCE, "{at}: {spawned:?}");
        match spawned {
            Err(SpawnShimError::GaveUp { reason }) => {
                assert!(
                    reason.contains("bring back the guest's devices"),
                    "{reason}"
                );
                host.assert_nothing_is_left(&dir, &at);
            }
            Ok(shim) => {
                assert_eq!(
                    bringing,
                    Bringing::Asked,
                    "{at}: it came up without its page"
                );
                host.assert_ended(&dir, &shim, &at).await;
            }
            other => panic!("{at}: {other:?}"),
        }
        eprintln!("{at}: it came up at first: {came_up}");
    }
}

/// The guest goes on, and the first page that it touches does not come; and the same while the pager is
/// in the middle of bringing what nobody has asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_is_killed_before_its_first_pages_have_come_has_an_end_by_name() {
    let Some(mut host) = Host::new("first") else {
        return;
    };
    let template = Template::make(&mut host).await;
    for (bringing, ahead, runs) in MODES.into_iter().flat_map(|bringing| {
        [(false, true), (true, false), (true, true)]
            .map(move |(ahead, runs)| (bringing, ahead, runs))
    }) {
        let at = format!("{bringing:?}, ahead: {ahead}, runs: {runs}");
        host.next_guest();
        let dir = Dir::new();
        let restore = template.restoring(&dir, bringing);
        let daemon = template.hold_back(&dir, FIRST);
        if ahead {
            push_from(FIRST, &dir.path().join(WORKING_SET));
        }
        let shim = start(&host.world, &dir, Some(restore)).await;
        assert_eq!(shim.known_status().stand, GuestStand::Still, "{at}");
        if runs {
            shim.thaw(false).await.expect("goes on");
        }
        assert!(eventually(SOON, || !daemon.asked().is_empty()), "{at}");
        let paging = shim
            .status()
            .await
            .expect("told")
            .paging
            .expect("it has one");
        let counters = paging.counters.expect("told");
        assert!(!counters.pushing_done || !ahead, "{at}: {counters:?}");
        kill_now(shim.known_status().vmm_pid);
        host.assert_ended(&dir, &shim, &at).await;
        assert!(is_gone(paging.pager_pid), "{at}: its pager stays");
        assert!(dir.round() == 0, "{at}: it ran without its memory");
    }
}

/// A working set of sixteen windows from `from` on.
fn push_from(from: u64, path: &Path) {
    let mut recorder = Recorder::new(Region::new(MEMORY), &WorkingSet::default());
    for window in 0..16 {
        recorder.note(WindowIndex(from / WINDOW_BYTES + window));
    }
    let set = recorder.finish().expect("some");
    set.write(path).expect("written");
}

/// Not every kernel calls it an error to list what a process wrote whose memory is gone: a snapshot by an
/// empty list would have the guest's pages as they were before it ran.
#[test]
fn a_list_of_written_pages_of_a_vmm_that_dies_is_whole_or_an_error() {
    let Some(world) = World::new() else { return };
    let saved = world.boot().save();
    for _ in 0..8 {
        let dir = tempfile::tempdir().expect("tempdir");
        Image::of(dir.path(), &saved.memory);
        let memory = GuestMemory::create(MEMORY).expect("memory");
        let guest = world.incoming(&saved, memory);
        let pager = page(dir.path(), &guest);
        let state = saved.state.try_clone().expect("a clone");
        std::io::Seek::rewind(&mut &state).expect("rewound");
        guest.vmm.load_state(state.as_fd(), soon()).expect("loaded");
        guest.vmm.resume(soon()).expect("goes on");
        guest.await_round(saved.round + STRIDE);
        guest.save();
        let list = || pager.written_since_parent(Instant::now() + SOON);
        let wanted = pages_of(&list().expect("listed"));
        assert!(wanted.len() > 200, "{} pages", wanted.len());
        let killer = kill_in(guest.vmm.pid(), Duration::from_millis(1));
        let mut lists = 0;
        while let Ok(listed) = list() {
            let listed = pages_of(&listed);
            let missing = wanted.iter().filter(|it| listed.binary_search(it).is_err());
            assert_eq!(missing.count(), 0, "of {}, in list {lists}", wanted.len());
            lists += 1;
        }
        killer.join().expect("no panic");
        let rest = pages_of(&pager.may_differ().expect("listed"));
        assert!(wanted.iter().all(|it| rest.binary_search(it).is_ok()));
    }
}

fn page(dir: &Path, guest: &Guest) -> Pager {
    let (daemon, sandbox) = (dir.join("pager.sock"), "cl-test".to_owned());
    let mut spec = PagerSpec::new(dir, guest.vmm.pid(), daemon, sandbox);
    spec.program = PathBuf::from(WRENN);
    assert_eq!(spec.tracking, Tracking::WriteProtect, "needs Linux 6.7");
    Pager::start(spec, &guest.memory, Instant::now() + SOON, drop).expect("it serves")
}
