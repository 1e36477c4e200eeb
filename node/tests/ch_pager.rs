//! A guest under a real Cloud Hypervisor whose memory a pager brings: page by page, with a list of
//! what was written, for generations, with pagers that are killed.

mod ch_world;
mod pager_world;

use std::io::Seek;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ch_world::{FIRST, Guest, MEMORY, Payload, STRIDE, Saved, World, content_of, soon};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::fstat;
use nix::unistd::Pid;
use pager_world::{Image, PAGE, SOON, eventually, pages_of, stats};
use wrenn_node::pager::handle::{Pager, PagerEnd, PagerSpec, WORKING_SET};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::pages::PageSet;
use wrenn_node::pager::prefetch::Fill;
use wrenn_node::pager::region::{PageIndex, WINDOW_BYTES};
use wrenn_node::pager::uffd::Tracking;
use wrenn_node::pager::working_set::WorkingSet;

/// A guest whose memory is in `dir`, and its pager; it stands still.
fn resume_in(world: &World, dir: &Path, saved: &Saved, fill: Fill) -> (Guest, Pager) {
    Image::of(dir, &saved.memory);
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let guest = world.incoming(saved, memory);
    assert_eq!(
        blocks(&guest.memory),
        0,
        "it touches nothing before the state comes"
    );
    let pager = page(dir, &guest, fill);
    guest
        .vmm
        .load_state(saved.state.as_fd(), soon())
        .expect("loaded");
    (guest, pager)
}

fn page(dir: &Path, guest: &Guest, fill: Fill) -> Pager {
    let (daemon, sandbox) = (dir.join("pager.sock"), "cl-test".to_owned());
    let mut spec = PagerSpec::new(dir, guest.vmm.pid(), daemon, sandbox);
    // This program is no pager.
    spec.program = PathBuf::from(env!("CARGO_BIN_EXE_wrenn"));
    spec.fill = fill;
    assert_eq!(spec.tracking, Tracking::WriteProtect, "needs Linux 6.7");
    Pager::start(spec, &guest.memory, Instant::now() + SOON, drop).expect("it serves")
}

fn blocks(memory: &GuestMemory) -> i64 {
    fstat(memory.as_fd()).expect("fstat").st_blocks
}

fn kill_now(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill(pid, Signal::SIGKILL).expect("there");
}

/// What the guest had before, with the pages that are listed as they are now: what a snapshot
/// would hold. Every page that differs must be listed.
fn merged(guest: &Guest, pager: &Pager, parent: &[u8]) -> Vec<u8> {
    let listed = pages_of(
        &pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed"),
    );
    let now = content_of(&guest.memory);
    let region = guest.memory.region();
    let existing = PageSet::present_in(guest.memory.as_fd(), region).expect("listed");
    let mut whole = parent.to_vec();
    let pages = whole.chunks_exact_mut(PAGE).zip(now.chunks_exact(PAGE));
    for (page, (before, after)) in (0..).zip(pages) {
        let is_listed = listed.binary_search(&page).is_ok();
        let differs = existing.contains(PageIndex(page)) && before != after;
        assert!(
            is_listed || !differs,
            "page {page} was written and not listed"
        );
        if is_listed {
            before.copy_from_slice(after);
        }
    }
    whole
}

/// The list is exact: of the payload's pages it names those of the rounds since, and no other.
fn assert_exact(pager: &Pager, payload: Payload, from: u64, to: u64) {
    let listed = pages_of(
        &pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed"),
    );
    let is_of = |page: u64, rounds: std::ops::RangeInclusive<u64>| {
        rounds
            .into_iter()
            .any(|round| round % STRIDE == page % STRIDE)
    };
    for page in 0..payload.pages {
        let is_listed = listed.binary_search(&(FIRST / PAGE as u64 + page)).is_ok();
        // The first round may have been half done before, the last may be half done now.
        assert!(
            is_listed || !is_of(page, from + 2..=to),
            "page {page} of {from}..{to}"
        );
        assert!(
            !is_listed || is_of(page, from + 1..=to + 1),
            "page {page} of {from}..{to}"
        );
    }
}

#[test]
fn a_guest_goes_on_for_generations_each_made_of_its_parent_and_the_listed_pages() {
    let payload = Payload {
        pages: 512,
        // Its writes are listed too, and its pages missed as well.
        vcpus: 2,
        ..Payload::default()
    };
    let Some(world) = World::with(payload) else {
        return;
    };
    let first = world.boot();
    let mut saved = first.save();
    drop(first);
    for generation in 0..4 {
        let dir = tempfile::tempdir().expect("tempdir");
        let (guest, pager) = resume_in(&world, dir.path(), &saved, Fill::Nothing);
        let (at_load, asked) = (stats(&pager).faults, Instant::now());
        guest.vmm.resume(soon()).expect("goes on");
        guest.await_round(saved.round + 1);
        eprintln!(
            "generation {generation}: {at_load} faults until it ran, first round after {:?}",
            asked.elapsed()
        );
        // A pager may die at any time; the last generation has to bring every page.
        let rounds = if generation == 3 { STRIDE } else { 3 };
        kill_now(pager.pid());
        guest.await_round(saved.round + 1 + rounds);
        let next = guest.save();
        assert_exact(&pager, payload, saved.round, next.round);
        let memory = merged(&guest, &pager, &saved.memory);
        saved = Saved { memory, ..next };
    }
}

#[test]
fn a_guest_can_be_saved_while_most_of_it_is_missing_and_then_goes_on() {
    let Some(world) = World::new() else { return };
    let first = world.boot();
    let saved = first.save();
    drop(first);
    let dir = tempfile::tempdir().expect("tempdir");
    let (guest, pager) = resume_in(&world, dir.path(), &saved, Fill::Nothing);
    guest.vmm.resume(soon()).expect("goes on");
    let again = guest.save();
    let missing = stats(&pager);
    assert!(
        blocks(&guest.memory) * 512 < i64::from(MEMORY.0) << 20,
        "{missing:#?}"
    );
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(again.round + STRIDE + 1);
}

#[test]
fn a_guest_is_complete_where_the_pager_pushes_everything() {
    let Some(world) = World::new() else { return };
    let first = world.boot();
    let saved = first.save();
    drop(first);
    let dir = tempfile::tempdir().expect("tempdir");
    let all = Fill::Everything {
        bytes_per_second: 0,
    };
    let (guest, pager) = resume_in(&world, dir.path(), &saved, all);
    assert!(
        eventually(SOON, || content_of(&guest.memory) == saved.memory),
        "equal memory: {:#?}",
        stats(&pager)
    );
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(saved.round + 2);
}

/// What a guest touched on its way is put into it before it asks, the next time that it takes the same
/// way; whatever else there is, and whatever was pushed, is as it was saved.
#[test]
fn a_guest_has_the_pages_of_its_working_set_without_a_fault_on_any_of_them() {
    let Some(world) = World::new() else { return };
    let first = world.boot();
    let saved = first.save();
    drop(first);
    // So many rounds touch every page of the payload.
    let way = saved.round + STRIDE + 1;
    let dir = tempfile::tempdir().expect("tempdir");
    let record = dir.path().join(WORKING_SET);
    let (guest, pager) = resume_in(&world, dir.path(), &saved, Fill::Nothing);
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(way);
    let missed = stats(&pager).faults;
    pager.mark_ready();
    assert!(eventually(SOON, || record.exists()), "recorded");
    drop((guest, pager));
    let set = WorkingSet::read(&record).expect("whole");
    assert!(missed > 0 && !set.windows().is_empty(), "{missed} faults");

    let again = tempfile::tempdir().expect("tempdir");
    std::fs::copy(&record, again.path().join(WORKING_SET)).expect("copied");
    Image::of(again.path(), &saved.memory);
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let guest = world.incoming(&saved, memory);
    let pager = page(again.path(), &guest, Fill::Nothing);
    assert!(eventually(SOON, || stats(&pager).pushing_done), "pushed");
    let pushed = content_of(&guest.memory);
    for window in set.windows() {
        let start = usize::try_from(window.offset().0).expect("small");
        let bytes = start..start + usize::try_from(WINDOW_BYTES).expect("small");
        assert!(pushed[bytes.clone()] == saved.memory[bytes], "{window:?}");
    }
    let told = stats(&pager);
    assert_eq!(
        (told.faults, told.pushed_windows),
        (0, set.windows().len() as u64)
    );
    // It was read before.
    (&saved.state).rewind().expect("rewound");
    guest
        .vmm
        .load_state(saved.state.as_fd(), soon())
        .expect("loaded");
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(way);
    let told = stats(&pager);
    eprintln!("{missed} faults without the set, {} with it", told.faults);
    assert_eq!(told.faults, 0, "{told:#?}");
    guest.save();
    // Looks at every page: each is listed, or as it was.
    let merged = merged(&guest, &pager, &saved.memory);
    assert_ne!(merged, saved.memory, "it has run");
}

/// The most dangerous end of all: without its pager's descriptor a guest would run on zeros.
#[test]
fn a_guest_whose_vmm_dies_takes_its_pager_with_it() {
    let Some(world) = World::new() else { return };
    let first = world.boot();
    let saved = first.save();
    drop(first);
    let dir = tempfile::tempdir().expect("tempdir");
    Image::of(dir.path(), &saved.memory);
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let guest = world.incoming(&saved, memory);
    let (told, ended) = std::sync::mpsc::channel();
    let (daemon, sandbox) = (dir.path().join("pager.sock"), "cl-test".to_owned());
    let mut spec = PagerSpec::new(dir.path(), guest.vmm.pid(), daemon, sandbox);
    spec.program = PathBuf::from(env!("CARGO_BIN_EXE_wrenn"));
    let on_end = move |end| told.send(end).expect("heard");
    let _pager =
        Pager::start(spec, &guest.memory, Instant::now() + SOON, on_end).expect("it serves");
    guest.vmm.kill().expect("killed");
    let end = ended.recv_timeout(Duration::from_secs(10)).expect("told");
    assert_eq!(end, PagerEnd::VmmEnded);
    let began = Instant::now();
    let failed = guest.vmm.load_state(saved.state.as_fd(), soon());
    assert!(failed.is_err() && began.elapsed() < Duration::from_secs(5));
}
