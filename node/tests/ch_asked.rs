//! A guest under a real Cloud Hypervisor that asks for its pages, as on hosts where no pager may
//! watch over its page faults.

mod ch_world;
mod pager_world;

use std::fs;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ch_world::{Guest, MEMORY, STRIDE, Saved, World, content_of, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pager_world::daemon::{Daemon, Mood};
use pager_world::{Image, PAGE, SOON, pages_of, stats};
use wrenn_node::base::chain::chain;
use wrenn_node::pager::handle::{Pager, PagerEnd, PagerSpec};
use wrenn_node::pager::inject::userfaultfd;
use wrenn_node::pager::main::{COMMAND, PROBE_OPTION};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::probe::probe;
use wrenn_node::pager::uffd::Tracking;
use wrenn_node::store::chunk::CHUNK_BYTES;
use wrenn_node::vmm::VmmError;
use wrenn_node::vmm::error::MoveStateError;
use wrenn_node::vmm::jail::Jail;

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
    let listed = pages_of(
        &pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed"),
    );
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

/// A peer that is slow holds up a save, and not the guest: what is missing is nothing that it touches.
#[test]
fn a_guest_runs_while_a_save_waits_for_its_last_pages_and_after_one_that_gave_up() {
    let Some(world) = World::new() else { return };
    let mut saved = saved(&world);
    // Far above all that the payload works on, and the last that is in the pack.
    let far = usize::try_from(MEMORY.bytes()).expect("small") - PAGE;
    saved.memory[far..far + PAGE].fill(0x5a);
    let dir = tempfile::tempdir().expect("tempdir");
    let mut image = Image::of(dir.path(), &saved.memory);
    let pack = dir.path().join("0001.pack");
    let length = fs::metadata(&pack).expect("told").len();
    let cut = fs::File::options().write(true).open(&pack).expect("open");
    cut.set_len(length - 8).expect("cut off");
    let last = image.map.chunks().last().expect("some").id;
    let start = far / CHUNK_BYTES * CHUNK_BYTES;
    let window = saved.memory[start..start + CHUNK_BYTES].to_vec();
    image.elsewhere.push((last, window));
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let guest = world.asking(&saved, memory);
    let pager = answer(dir.path(), &guest, drop);
    guest
        .vmm
        .load_state(saved.state.as_fd(), soon())
        .expect("loaded");
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(saved.round + STRIDE + 1);

    let file = tempfile::tempfile().expect("tempfile");
    let before = guest.round();
    let wait = Duration::from_secs(2);
    let refused = guest
        .vmm
        .save_state(file.as_fd(), Instant::now() + wait)
        .expect_err("pages are missing");
    let during = guest.round();
    assert!(during > before, "it stood still in round {before}");
    let why = chain(&refused);
    assert!(
        matches!(refused, VmmError::Save(MoveStateError::PagesMissing { waited }) if waited >= wait / 2),
        "{why}"
    );
    assert_eq!(file.metadata().expect("told").len(), 0, "{why}");
    // Nobody has told it to go on.
    guest.await_round(during + 2);
    guest
        .vmm
        .resume(soon())
        .expect("no harm, as a shim does it");

    let daemon = Daemon::start(dir.path(), &image, Mood::Finds);
    let next = guest.save();
    assert!(!daemon.asked().is_empty());
    assert!(next.memory[far..far + PAGE].iter().all(|it| *it == 0x5a));
    merged(&guest, &pager, &saved.memory);
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(next.round + 2);
}

#[test]
fn a_vmm_that_dies_while_it_asks_ends_its_pager_and_a_save_that_waits() {
    let Some(world) = World::new() else { return };
    let saved = saved(&world);
    for wait in [0, 2, 10, 40] {
        let dir = tempfile::tempdir().expect("tempdir");
        let (told, ended) = std::sync::mpsc::channel();
        let on_end = move |end| told.send(end).expect("heard");
        let (guest, _pager) = resume_in(&world, dir.path(), &saved, on_end);
        guest.vmm.resume(soon()).expect("goes on");
        let pid = guest.vmm.pid();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(wait));
            kill_now(pid);
        });
        let began = Instant::now();
        let file = tempfile::tempfile().expect("tempfile");
        let saving = guest.vmm.save_state(file.as_fd(), soon());
        assert!(saving.is_err(), "it was done within {wait} ms");
        assert!(began.elapsed() < Duration::from_secs(5), "{wait}");
        let end = ended.recv_timeout(Duration::from_secs(10)).expect("told");
        assert_eq!(end, PagerEnd::VmmEnded);
        killer.join().expect("no panic");
    }
}

/// With the rights of the daemon it would be given what a VMM is refused.
#[test]
fn whoever_is_tried_on_at_the_start_has_no_more_rights_than_a_jailed_vmm() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
    command.args([COMMAND, PROBE_OPTION]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut waits = [0];
    let said = child.stdout.as_mut().expect("piped").read_exact(&mut waits);
    said.expect("it waits");
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("there");
    for (what, wanted) in [
        ("CapPrm:", 0),
        ("CapEff:", 0),
        ("CapInh:", 0),
        ("NoNewPrivs:", 1),
    ] {
        let line = status.lines().find_map(|line| line.strip_prefix(what));
        let found = u64::from_str_radix(line.expect(what).trim(), 16);
        assert_eq!(found, Ok(wanted), "{what}");
    }
    drop(child.stdin.take());
    assert!(child.wait().expect("reaped").success());
}

#[test]
fn paging_is_found_where_a_jailed_process_is_given_a_userfaultfd_and_nowhere_else() {
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    Jail::new(None, &[]).confine(&mut command);
    let mut child = command.spawn().expect("cat");
    let given = userfaultfd(child.id(), || (), Instant::now() + SOON);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let found = probe(env!("CARGO_BIN_EXE_wrenn"));
    assert_eq!(found.is_ok(), given.is_ok(), "{found:?} {given:?}");
}
