//! A guest under a real Cloud Hypervisor that asks for its pages, as on hosts where no pager may
//! watch over its page faults.

mod ch_world;
mod pager_world;

use std::io::Seek;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ch_world::{Guest, MEMORY, STRIDE, Saved, World, content_of, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pager_world::{Image, PAGE, SOON, pages_of, stats};
use wrenn_node::pager::handle::{Pager, PagerEnd, PagerSpec};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::uffd::Tracking;

/// A guest whose memory is in `dir` and which stands still, and who answers it.
fn resume_in(
    world: &World,
    dir: &Path,
    saved: &Saved,
    on_end: impl FnOnce(PagerEnd) + Send + 'static,
) -> (Guest, Pager) {
    Image::of(dir, &saved.memory);
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let guest = world.asking(saved, memory);
    let pager = answer(dir, &guest, on_end);
    // It may have been read before.
    (&saved.state).rewind().expect("rewound");
    guest
        .vmm
        .load_state(saved.state.as_fd(), soon())
        .expect("loaded");
    (guest, pager)
}

fn answer(dir: &Path, guest: &Guest, on_end: impl FnOnce(PagerEnd) + Send + 'static) -> Pager {
    let (daemon, sandbox) = (dir.join("pager.sock"), "cl-test".to_owned());
    let mut spec = PagerSpec::new(dir, guest.vmm.pid(), daemon, sandbox);
    spec.program = PathBuf::from(env!("CARGO_BIN_EXE_wrenn"));
    let questions = guest.vmm.take_questions().expect("it asks");
    assert!(guest.vmm.take_questions().is_none(), "once");
    let deadline = Instant::now() + SOON;
    let pager = Pager::answer(spec, questions, &guest.memory, deadline, on_end);
    let pager = pager.expect("it answers");
    assert_eq!(pager.tracking(), Tracking::Compare);
    pager
}

fn saved(world: &World) -> Saved {
    world.boot().save()
}

fn kill_now(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill(pid, Signal::SIGKILL).expect("there");
}

/// The parent with the pages that are listed as they are now; none that differs may be missing.
fn merged(guest: &Guest, pager: &Pager, parent: &[u8]) -> Vec<u8> {
    let listed = pages_of(&pager.written_since_parent().expect("listed"));
    let now = content_of(&guest.memory);
    let mut whole = parent.to_vec();
    for page in listed {
        let at = usize::try_from(page).expect("small") * PAGE;
        whole[at..at + PAGE].copy_from_slice(&now[at..at + PAGE]);
    }
    assert!(whole == now, "a written page is not listed");
    whole
}

#[test]
fn a_guest_that_asks_goes_on_for_generations() {
    let Some(world) = World::new() else { return };
    let mut saved = saved(&world);
    for generation in 0..3 {
        let dir = tempfile::tempdir().expect("tempdir");
        let (guest, pager) = resume_in(&world, dir.path(), &saved, drop);
        let asked = Instant::now();
        guest.vmm.resume(soon()).expect("goes on");
        guest.await_round(saved.round + 1);
        eprintln!(
            "generation {generation}: first round after {:?}",
            asked.elapsed()
        );
        guest.await_round(saved.round + STRIDE + 1);
        // It cannot be saved before it has asked for everything, and that is waited for.
        let next = guest.save();
        eprintln!(
            "saved {:?} after it went on: {:?}",
            asked.elapsed(),
            stats(&pager)
        );
        let memory = merged(&guest, &pager, &saved.memory);
        saved = Saved { memory, ..next };
    }
}

#[test]
fn a_pager_that_dies_over_a_question_is_replaced_and_nothing_is_lost() {
    let Some(world) = World::new() else { return };
    let saved = saved(&world);
    for wait in [0, 1, 5, 20, 60] {
        let dir = tempfile::tempdir().expect("tempdir");
        let (guest, pager) = resume_in(&world, dir.path(), &saved, drop);
        guest.vmm.resume(soon()).expect("goes on");
        std::thread::sleep(Duration::from_millis(wait));
        kill_now(pager.pid());
        guest.await_round(saved.round + STRIDE + 2);
        let next = guest.save();
        merged(&guest, &pager, &saved.memory);
        assert!(next.round > saved.round);
    }
}

/// The daemon that would bring what the packs lack is not there: the guest waits, since the next
/// answer may come any time, and what it must never do is run on zeros.
#[test]
fn a_guest_whose_pages_cannot_be_had_stands_still_and_invents_nothing() {
    let Some(world) = World::new() else { return };
    let saved = saved(&world);
    let dir = tempfile::tempdir().expect("tempdir");
    Image::of(dir.path(), &saved.memory);
    std::fs::write(dir.path().join("0001.pack"), b"").expect("cut off");
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let guest = world.asking(&saved, memory);
    let pager = answer(dir.path(), &guest, drop);
    let brief = || Instant::now() + Duration::from_millis(500);
    // Where it comes to that, loading the state waits for a page as well.
    let loaded = guest.vmm.load_state(saved.state.as_fd(), brief());
    let gone_on = loaded.and_then(|()| guest.vmm.resume(brief()));
    eprintln!("told to go on: {gone_on:?}");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.said(), "", "it ran without its memory");
    assert!(content_of(&guest.memory).iter().all(|it| *it == 0));
    assert!(
        stats(&pager).faults <= 1,
        "it was told that a page is there"
    );
}
