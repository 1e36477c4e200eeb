//! A guest's memory through a real pager process, in a process that plays the VMM.

mod pager_world;

use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pager_world::daemon::{Daemon, Mood};
use pager_world::{Elsewhere, PAGE, PAGES, SOON, World, eventually, hash, pages_of, stats, vmm};
use wrenn_node::pager::dirty::{DirtyError, probe};
use wrenn_node::pager::handle::{ListWrittenError, Pager, PagerEnd, StartPagerError};
use wrenn_node::pager::prefetch::Fill;
use wrenn_node::pager::region::PageIndex;
use wrenn_node::pager::target::Target;
use wrenn_node::pager::uffd::Tracking;
use wrenn_node::pager::uffd::sys::pidfd_open;
use wrenn_node::pager::working_set::WorkingSet;

/// Not a test: what this program is when it is started as a VMM.
#[test]
fn vmm() {
    vmm::be_one_if_asked();
}

fn kill_pager(pager: &Pager) -> u32 {
    let pid = pager.pid();
    let raw = i32::try_from(pid).expect("a pid");
    kill(Pid::from_raw(raw), Signal::SIGKILL).expect("it is there");
    pid
}

fn fill_page(image: &mut [u8], page: u64, byte: u8) {
    let at = usize::try_from(page).expect("small") * PAGE;
    image[at..at + PAGE].fill(byte);
}

#[test]
fn every_byte_arrives_whole_from_packs_holes_and_the_daemon() {
    let world = World::new(Elsewhere::EveryThird);
    let daemon = Daemon::start(world.dir.path(), &world.image, Mood::Finds);
    let pager = world.start(world.spec());
    assert_eq!(world.vmm.hash(0, PAGES), world.image.hash(0, PAGES));

    let told = stats(&pager);
    println!("{told:#?}");
    assert_eq!(told.faults, 256, "one for each window");
    assert_eq!(told.hole_faults, 64);
    assert_eq!(told.peer_faults, 64);
    assert_eq!(told.local_bytes, 128 * 65536);
    assert_eq!(told.peer_bytes, 64 * 65536);
    assert!(told.p50_ns > 0 && told.p50_ns <= told.p99_ns && told.p99_ns <= told.max_ns);
    assert_eq!(daemon.asked().len(), 64);
    assert!(daemon.asked().iter().all(|asked| !asked.spoiled));
    // Reading is not writing.
    assert!(
        pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed")
            .is_empty()
    );
}

fn written_pages_are_listed(tracking: Tracking) {
    let world = World::new(Elsewhere::None);
    let mut spec = world.spec();
    spec.tracking = tracking;
    let pager = world.start(spec);
    assert_eq!(pager.tracking(), tracking);
    let mut expected = world.image.bytes.clone();
    // Into windows that were read, that were not, and that are holes; first pages and last.
    world.vmm.hash(0, 64);
    let written = [0, 1, 17, 63, 64, 200, 513, 1024, PAGES - 1];
    for page in written {
        world.vmm.write(page, 0xab);
        fill_page(&mut expected, page, 0xab);
    }
    let listed = || {
        pages_of(
            &pager
                .written_since_parent(Instant::now() + SOON)
                .expect("listed"),
        )
    };
    assert_eq!(listed(), written);
    assert_eq!(listed(), written, "listing changes nothing");

    // What was brought and given back is zero now, also where it is read again.
    world.vmm.discard(16, 4);
    fill_page(&mut expected, 16, 0);
    for page in 17..20 {
        fill_page(&mut expected, page, 0);
    }
    let with_discarded = [0, 1, 16, 17, 18, 19, 63, 64, 200, 513, 1024, PAGES - 1];
    assert_eq!(listed(), with_discarded);
    assert_eq!(world.vmm.hash(16, 16), hash(&expected, 16, 16));
    assert_eq!(listed(), with_discarded);
    assert_eq!(world.vmm.hash(0, PAGES), hash(&expected, 0, PAGES));
    assert_eq!(listed(), with_discarded);
}

#[test]
fn exactly_the_written_pages_are_listed() {
    assert_eq!(probe(), Tracking::WriteProtect, "this test needs Linux 6.7");
    written_pages_are_listed(Tracking::WriteProtect);
}

#[test]
fn comparing_lists_the_same_pages() {
    written_pages_are_listed(Tracking::Compare);
}

#[test]
fn each_generation_lists_its_own_writes() {
    let world = World::new(Elsewhere::None);
    let pager = world.start(world.spec());
    let listed = || {
        pages_of(
            &pager
                .written_since_parent(Instant::now() + SOON)
                .expect("listed"),
        )
    };
    for generation in 0..4 {
        // Some anew, some that an earlier generation had written, some never touched before.
        let written: Vec<u64> = (0..40).map(|at| at * 37 + generation * 11).collect();
        for page in &written {
            world
                .vmm
                .write(*page, u8::try_from(generation + 1).expect("small"));
        }
        assert_eq!(listed(), written, "generation {generation}");
        pager.rearm().expect("armed");
        assert!(listed().is_empty());
        // Reading on, pages come that nobody wrote.
        world.vmm.hash(generation * 512, 512);
        assert!(listed().is_empty(), "generation {generation} only read");
    }
}

/// A guest of many gigabytes would stand still for as long as all of it takes.
#[test]
fn comparing_is_given_up_in_time_and_what_may_differ_is_still_told() {
    let world = World::new(Elsewhere::None);
    let mut spec = world.spec();
    spec.tracking = Tracking::Compare;
    let pager = world.start(spec);
    world.vmm.write(7, 1);
    let late = pager.written_since_parent(Instant::now());
    let late = late.expect_err("nothing is compared in no time");
    assert!(
        matches!(late, ListWrittenError::Dirty(DirtyError::TooSlow)),
        "{late}"
    );
    assert!(pages_of(&pager.may_differ().expect("listed")).contains(&7));
}

#[test]
fn comparing_cannot_start_anew_and_says_so() {
    let world = World::new(Elsewhere::None);
    let mut spec = world.spec();
    spec.tracking = Tracking::Compare;
    let pager = world.start(spec);
    let refused = pager.rearm();
    assert!(
        matches!(refused, Err(ListWrittenError::Dirty(_))),
        "{refused:?}"
    );
}

#[test]
fn a_killed_pager_is_replaced_and_nothing_is_lost() {
    let world = World::new(Elsewhere::None);
    let pager = world.start(world.spec());
    let mut expected = world.image.bytes.clone();
    world.vmm.hash(0, 256);
    world.vmm.write(5, 0xee);
    fill_page(&mut expected, 5, 0xee);
    world.vmm.discard(32, 8);
    (32..40).for_each(|page| fill_page(&mut expected, page, 0));

    let old = kill_pager(&pager);
    let killed = Instant::now();
    // This fault finds nobody; it waits and is served all the same.
    assert_eq!(world.vmm.hash(512, 16), hash(&expected, 512, 16));
    println!("a fault was served {:?} after the kill", killed.elapsed());
    assert!(eventually(SOON, || pager.pid() != old));
    assert_eq!(stats(&pager).takeovers, 1);
    // The successor knows what was given back: the image's old bytes must not come again.
    assert_eq!(world.vmm.hash(0, PAGES), hash(&expected, 0, PAGES));
    let listed = pages_of(
        &pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed"),
    );
    assert_eq!(listed, [5, 32, 33, 34, 35, 36, 37, 38, 39]);
}

#[test]
fn faults_of_many_threads_survive_kills_while_everything_is_pushed() {
    let world = World::new(Elsewhere::EveryThird);
    let _daemon = Daemon::start(world.dir.path(), &world.image, Mood::Finds);
    let mut spec = world.spec();
    spec.fill = Fill::Everything {
        bytes_per_second: 0,
    };
    let pager = world.start(spec);
    let mut lines: Vec<_> = (0..4).map(|_| world.vmm.line()).collect();
    for (at, line) in (0..4).zip(&mut lines) {
        // Each thread a quarter, then the next one's, so that they meet.
        let from = at * PAGES / 4;
        line.say(&format!("hash {from} {}", PAGES / 4));
        line.say(&format!(
            "hash {} {}",
            (from + PAGES / 4) % PAGES,
            PAGES / 4
        ));
    }
    for _ in 0..3 {
        let old = kill_pager(&pager);
        assert!(eventually(SOON, || pager.pid() != old), "replaced");
    }
    for (at, line) in (0..4).zip(&mut lines) {
        let from = at * PAGES / 4;
        assert_eq!(line.answer(), world.image.hash(from, PAGES / 4));
        let next = (from + PAGES / 4) % PAGES;
        assert_eq!(line.answer(), world.image.hash(next, PAGES / 4));
    }
    assert!(eventually(SOON, || stats(&pager).pushing_done));
    assert_eq!(world.vmm.hash(0, PAGES), world.image.hash(0, PAGES));
    assert!(
        pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed")
            .is_empty()
    );
    println!("{:#?}", stats(&pager));
}

#[test]
fn a_filled_guest_has_its_holes_left_out_and_faults_only_there() {
    let world = World::new(Elsewhere::None);
    let mut spec = world.spec();
    spec.fill = Fill::Everything {
        bytes_per_second: 0,
    };
    let pager = world.start(spec);
    assert!(eventually(SOON, || stats(&pager).pushing_done));
    assert_eq!(stats(&pager).pushed_windows, 192);
    assert_eq!(world.vmm.hash(0, PAGES), world.image.hash(0, PAGES));
    let told = stats(&pager);
    assert_eq!((told.faults, told.hole_faults), (64, 64));
}

#[test]
fn what_was_touched_before_ready_is_there_before_it_is_touched_again() {
    let world = World::new(Elsewhere::None);
    let mut spec = world.spec();
    let record = world.path("working-set");
    spec.record_to = Some(record.clone());
    let pager = world.start(spec);
    for window in [7, 200, 3] {
        world.vmm.hash(window * 16 + 5, 1);
    }
    pager.mark_ready();
    assert!(eventually(SOON, || record.exists()), "saved");
    world.vmm.hash(100 * 16, 1);
    let set = WorkingSet::read(&record).expect("whole");
    let recorded: Vec<u64> = set.windows().iter().map(|window| window.0).collect();
    assert_eq!(recorded, [7, 200, 3], "in order, and nothing after ready");

    let again = World::new(Elsewhere::None);
    let mut spec = again.spec();
    spec.working_set = Some(record);
    let pager = again.start(spec);
    assert!(eventually(SOON, || stats(&pager).pushing_done));
    for window in [3, 7, 200] {
        assert_eq!(
            again.vmm.hash(window * 16, 16),
            again.image.hash(window * 16, 16)
        );
    }
    let told = stats(&pager);
    assert_eq!((told.faults, told.pushed_windows), (0, 3));
}

#[test]
fn a_daemon_that_is_away_holds_up_only_what_it_is_needed_for() {
    let world = World::new(Elsewhere::EveryThird);
    let pager = world.start(world.spec());
    // Window 0 is elsewhere, and nobody listens.
    let mut waiting = world.vmm.line();
    waiting.say("hash 0 16");
    assert!(waiting.is_silent_for(Duration::from_millis(100)));
    assert_eq!(world.vmm.hash(16, 16), world.image.hash(16, 16));
    let not_now = Daemon::start(world.dir.path(), &world.image, Mood::SaysNotNow);
    assert!(eventually(SOON, || !not_now.asked().is_empty()));
    drop(not_now);
    let _daemon = Daemon::start(world.dir.path(), &world.image, Mood::Finds);
    assert_eq!(waiting.answer(), world.image.hash(0, 16));
    assert_eq!(stats(&pager).stalled_questions, 0);
}

#[test]
fn a_chunk_that_is_gone_for_good_ends_it_with_the_reason() {
    let world = World::new(Elsewhere::EveryThird);
    let _daemon = Daemon::start(world.dir.path(), &world.image, Mood::SaysGone);
    let (_pager, end) = world.try_start(world.spec()).expect("it serves");
    let mut waiting = world.vmm.line();
    waiting.say("hash 0 1");
    let PagerEnd::Failed { reason } = end.recv_timeout(SOON).expect("it ends") else {
        panic!("the VMM is still there");
    };
    assert!(reason.contains("no holder is left"), "{reason}");
    assert!(
        waiting.is_silent_for(Duration::from_millis(1)),
        "the guest never saw wrong bytes"
    );
}

#[test]
fn a_spoiled_pack_is_reported_and_the_right_bytes_are_served() {
    let mut world = World::new(Elsewhere::None);
    // Window 0 is stored raw behind four bytes.
    let pack = world.path("0001.pack");
    let mut bytes = std::fs::read(&pack).expect("read");
    bytes[1000] ^= 0x40;
    std::fs::write(&pack, bytes).expect("written");
    let first = world.image.bytes[..65536].to_vec();
    let id = world.image.map.chunks()[0].id;
    world.image.elsewhere.push((id, first));
    let daemon = Daemon::start(world.dir.path(), &world.image, Mood::Finds);
    let _pager = world.start(world.spec());
    assert_eq!(world.vmm.hash(0, 64), world.image.hash(0, 64));
    let asked = daemon.asked();
    assert_eq!((asked.len(), asked[0].spoiled), (1, true));
}

/// A process that lives and does nothing, as one does whose disk hangs.
#[test]
fn a_pager_that_is_stopped_is_replaced_and_its_guest_goes_on() {
    let world = World::new(Elsewhere::None);
    let pager = world.start(world.spec());
    assert_eq!(world.vmm.hash(0, 16), world.image.hash(0, 16));
    let old = pager.pid();
    let raw = i32::try_from(old).expect("a pid");
    kill(Pid::from_raw(raw), Signal::SIGSTOP).expect("it is there");
    let stopped = Instant::now();
    assert!(eventually(3 * SOON, || pager.pid() != old), "it was let be");
    println!("another serves {:?} after the stop", stopped.elapsed());
    assert_eq!(world.vmm.hash(0, PAGES), world.image.hash(0, PAGES));
    assert_eq!(stats(&pager).takeovers, 1);
}

#[test]
fn a_pager_that_hangs_at_its_end_is_killed() {
    let world = World::new(Elsewhere::None);
    let pager = world.start(world.spec());
    let raw = i32::try_from(pager.pid()).expect("a pid");
    kill(Pid::from_raw(raw), Signal::SIGSTOP).expect("it is there");
    pager.end(Instant::now() + Duration::from_millis(100));
    assert!(kill(Pid::from_raw(raw), None).is_err(), "it is still there");
}

#[test]
fn a_pager_ends_with_its_vmm() {
    let mut world = World::new(Elsewhere::None);
    let (pager, end) = world.try_start(world.spec()).expect("it serves");
    world.vmm.kill();
    assert_eq!(end.recv_timeout(SOON), Ok(PagerEnd::VmmEnded));
    assert!(!std::fs::exists(format!("/proc/{}", pager.pid())).expect("asked"));
}

#[test]
fn a_pager_ends_with_its_shim() {
    let world = World::new(Elsewhere::None);
    let (pager, end) = world.try_start(world.spec()).expect("it serves");
    let proc = format!("/proc/{}", pager.pid());
    drop(pager);
    assert!(eventually(SOON, || !std::fs::exists(&proc).expect("asked")));
    assert!(end.recv_timeout(SOON).is_err(), "nothing to be told");
}

#[test]
fn a_pager_that_dies_again_and_again_is_a_failure_and_no_loop() {
    let world = World::new(Elsewhere::None);
    let (pager, end) = world.try_start(world.spec()).expect("it serves");
    let mut ended = None;
    for _ in 0..20 {
        let old = kill_pager(&pager);
        assert!(eventually(SOON, || {
            ended = end.try_recv().ok();
            ended.is_some() || pager.pid() != old
        }));
        if ended.is_some() {
            break;
        }
    }
    let end = ended;
    assert!(matches!(&end, Some(PagerEnd::Failed { reason }) if reason.contains("too often")));
}

/// A registration ends with the last copy of its descriptor: the guest would read zeros from then on,
/// and nobody would see it. So it is ended.
#[test]
fn a_guest_whose_registration_is_lost_is_ended_with_the_reason() {
    let world = World::new(Elsewhere::None);
    let (pager, end) = world.try_start(world.spec()).expect("it serves");
    assert_eq!(world.vmm.hash(0, 16), world.image.hash(0, 16));
    // The pager's copy is left, so nothing is wrong yet.
    world.vmm.forget();
    assert_eq!(world.vmm.hash(16, 16), world.image.hash(16, 16));
    kill_pager(&pager);
    let PagerEnd::Failed { reason } = end.recv_timeout(SOON).expect("it ends") else {
        panic!("the VMM lives");
    };
    assert!(reason.contains("closed the descriptor"), "{reason}");
}

#[test]
fn a_page_map_of_another_guest_is_refused_before_anything_is_touched() {
    let world = World::new(Elsewhere::None);
    let other = tempfile::tempdir().expect("tempdir");
    pager_world::Image::make(other.path(), proto::units::Mib(8), Elsewhere::None);
    let mut spec = world.spec();
    spec.pages = other.path().join("pages");
    let Err(StartPagerError::GaveUp { reason }) = world.try_start(spec) else {
        panic!("refused");
    };
    assert!(reason.contains("8388608 bytes"), "{reason}");
    // The VMM is as it was: without a pager its memory is empty.
    assert_eq!(world.vmm.hash(0, 1), hash(&[0; PAGE], 0, 1));
}

#[test]
fn a_pager_that_dies_while_injecting_is_reported() {
    let world = World::new(Elsewhere::None);
    let mut spec = world.spec();
    let script = world.path("dies");
    let text = format!(
        "#!/bin/sh\nWRENN_FAULT_ABORT={} exec {} \"$@\"\n",
        wrenn_node::pager::main::INJECTING,
        spec.program.display()
    );
    // Written by another process: a child of ours that held the file open would keep it from
    // running.
    let write = "printf '%s' \"$1\" > \"$2\" && chmod 700 \"$2\"";
    let written = Command::new("sh")
        .args(["-c", write, "sh", &text])
        .arg(&script)
        .status();
    assert!(written.expect("sh").success());
    spec.program = script;
    let refused = world.try_start(spec).map(drop);
    assert!(
        matches!(refused, Err(StartPagerError::GaveUp { .. })),
        "{refused:?}"
    );
    // It died with the VMM's thread stopped but unchanged, which then went on by itself.
    assert_eq!(world.vmm.hash(0, 1), hash(&[0; PAGE], 0, 1));
}

/// A disk that is read into guest memory faults inside the kernel, not in the VMM's own code.
#[test]
fn faults_of_the_kernel_itself_are_served() {
    let world = World::new(Elsewhere::None);
    let pager = world.start(world.spec());
    let target = Target::new(world.vmm.pid(), pidfd_open(world.vmm.pid()).expect("there"));
    let layout = target
        .layout(world.memory.as_fd(), world.memory.region())
        .expect("mapped");
    assert_eq!(layout.mappings().len(), 2);
    for page in [100, 3000] {
        let image = PageIndex(page).offset()..PageIndex(page + 1).offset();
        let place = layout.places(image).next().expect("mapped").hva;
        let mut read = [0; PAGE];
        let remote = RemoteIoVec {
            base: usize::try_from(place.0).expect("64-bit"),
            len: PAGE,
        };
        let pid = Pid::from_raw(i32::try_from(world.vmm.pid()).expect("a pid"));
        let count = process_vm_readv(pid, &mut [IoSliceMut::new(&mut read)], &[remote]);
        assert_eq!(count, Ok(PAGE));
        assert_eq!(hash(&read, 0, 1), world.image.hash(page, 1));
    }
    assert_eq!(stats(&pager).faults, 2);
}

#[test]
fn a_pager_keeps_few_rights_and_little_memory() {
    let world = World::new(Elsewhere::None);
    let pager = world.start(world.spec());
    world.vmm.hash(0, PAGES);
    let status = std::fs::read_to_string(format!("/proc/{}/status", pager.pid())).expect("read");
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect("there").trim().to_owned()
    };
    for set in ["CapPrm:", "CapEff:"] {
        let bits = u64::from_str_radix(&line(set), 16).expect("hex");
        assert_eq!(bits & !(1 << 2), 0, "{set}");
    }
    assert_eq!(line("NoNewPrivs:"), "1");
    println!(
        "resident: {}, anonymous: {}",
        line("VmRSS:"),
        line("RssAnon:")
    );
}
