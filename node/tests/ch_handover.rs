//! A real Cloud Hypervisor whose other side is not as it should be: silent, gone at any step, of
//! another version, or offering the wrong thing.

mod ch_world;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use ch_world::raw::{Handing, Moment, Raw, Taking, connect, kept_in, kill_at, listen_and_go};
use ch_world::{Guest, MEMORY, Saved, World, file_of, skip, soon};
use nix::sys::signal::Signal;
use proto::units::Mib;
use wrenn_node::pager::layout::Mapping;
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::region::ImageOffset;
use wrenn_node::pager::target::Target;
use wrenn_node::vmm::cloud_hypervisor::api::{ApiError, Call, MemoryMode};
use wrenn_node::vmm::cloud_hypervisor::config::{MemoryFrom, machine};
use wrenn_node::vmm::cloud_hypervisor::kept::Kept;
use wrenn_node::vmm::cloud_hypervisor::offload::codec::{
    Command as Said, HEADER_BYTES, Request, Status, encode_answer,
};
use wrenn_node::vmm::cloud_hypervisor::offload::{OffloadError, link};
use wrenn_node::vmm::cloud_hypervisor::version::known;
use wrenn_node::vmm::error::MoveStateError;
use wrenn_node::vmm::jail::pidfd_open;
use wrenn_node::vmm::probe::prove_kvm;
use wrenn_node::vmm::{Driver, SpawnVmmError, VmmError, spawn_incoming};

/// The ways in which a guest's memory comes.
const MODES: [MemoryMode; 2] = [MemoryMode::Precopy, MemoryMode::Postcopy];

/// A guest with a gap below 4 GiB in its memory, so with two slots. Next to none of it is touched.
fn large_world() -> Option<World> {
    let mut world = World::new()?;
    world.spec.memory = Mib(4096);
    Some(world)
}

/// Saves `guest`, whose memory is too large to be read.
fn save(guest: &Guest, memory: Mib) -> (File, Kept) {
    let state = tempfile::tempfile().expect("tempfile");
    guest.vmm.save_state(state.as_fd(), soon()).expect("saved");
    let kept = kept_in(&state, memory);
    (state, kept)
}

/// Where the process `pid` has mapped `memory`; nowhere, it may be.
fn mappings(pid: u32, memory: &GuestMemory) -> Vec<Mapping> {
    let target = Target::new(pid, pidfd_open(pid).expect("there"));
    let layout = target.layout(memory.as_fd(), memory.region());
    layout.map_or_else(|_| Vec::new(), |layout| layout.mappings().to_vec())
}

/// After so many requests are answered and while the next is said, from none to `most`.
fn moments(most: usize) -> impl Iterator<Item = Moment> {
    (0..=most).flat_map(|answers| [Moment::Answered(answers), Moment::SaidAfter(answers)])
}

/// As the driver asks for it: the guest stands still before.
#[test]
fn a_vmm_that_is_killed_at_any_step_of_a_save_is_an_error_at_once() {
    let Some(world) = World::new() else { return };
    for moment in moments(4) {
        let raw = Raw::boot(&world);
        raw.call(&Call::Pause).expect("stands still");
        let (path, url) = raw.place("save");
        let listener = UnixListener::bind(&path).expect("bound");
        raw.call(&Call::Send(&url)).expect("begun");
        let (asker, _) = listener.accept().expect("it comes");
        let (ours, answerer) = UnixStream::pair().expect("a pair");
        let vmm = raw.child.id();
        let between = thread::spawn(move || kill_at(moment, asker, answerer, vmm));
        let began = Instant::now();
        let taken = link::take(ours, raw.memory.as_fd(), soon());
        assert!(began.elapsed() < Duration::from_secs(5), "{moment:?}");
        let all_was_said = [Moment::Answered(4), Moment::SaidAfter(4)];
        match taken {
            // It died afterwards; what was taken is whole.
            Ok(taken) if all_was_said.contains(&moment) => assert!(!taken.state.is_empty()),
            Ok(_) => panic!("{moment:?}: half a guest was taken for a whole one"),
            Err(err) => assert!(matches!(err, OffloadError::Closed { .. }), "{err}"),
        }
        between.join().expect("no panic");
        let resumed = raw.call(&Call::Resume);
        assert!(resumed.is_err(), "{moment:?}: nobody is there to go on");
    }
}

/// Up to the middle of its state; what comes then is in `ch_killed.rs`.
#[test]
fn a_vmm_that_is_killed_at_any_step_of_a_bringing_back_is_an_error_at_once_and_runs_nothing() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let saved = guest.save();
    drop(guest);
    let kept = kept_in(&saved.state, MEMORY);
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    let memory = saved.copied();
    for (mode, moment) in MODES
        .into_iter()
        .flat_map(|mode| moments(3).map(move |it| (mode, it)))
    {
        let at = format!("{mode:?}, {moment:?}");
        let raw = Raw::start(&world);
        let Taking {
            answer,
            stream: answerer,
            questions,
        } = raw.take_in(mode);
        let (ours, asker) = UnixStream::pair().expect("a pair");
        let vmm = raw.child.id();
        let between = thread::spawn(move || kill_at(moment, asker, answerer, vmm));
        let began = Instant::now();
        let slots = kept.foundation.slots();
        let given = link::give(ours, &slots, memory.as_fd(), &config, soon());
        let given = given.and_then(|given| given.state(memory.as_fd(), &kept.state, soon()));
        let told = answer.finish(soon());
        let failed = given.expect_err("it was killed");
        let is_end = matches!(failed, OffloadError::Closed { .. });
        assert!(is_end && told.is_err(), "{at}: {failed}");
        // Whoever answers its questions is not left waiting either.
        let asked = questions.map(|it| it.join().expect("no panic"));
        assert!(began.elapsed() < Duration::from_secs(5), "{at}");
        let has_state = !matches!(moment, Moment::Answered(0..=2) | Moment::SaidAfter(0..=2));
        assert!(
            has_state || asked.unwrap_or(0) == 0,
            "{at}: {asked:?} questions"
        );
        between.join().expect("no panic");
        assert!(raw.call(&Call::Resume).is_err(), "{at}: nobody is there");
        assert_eq!(raw.rounds(), 0, "{at}: it ran");
    }
}

/// What a slot that nobody gave becomes: memory of the VMM's own, without an error. It shows in what is
/// mapped of ours, which the driver looks at before the guest runs.
#[test]
fn a_slot_that_was_not_given_is_missing_in_what_the_vmm_has_mapped() {
    let Some(world) = large_world() else { return };
    let guest = world.boot();
    let (_state, kept) = save(&guest, world.spec.memory);
    let slots = kept.foundation.slots();
    assert_eq!(slots.len(), 2);
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    for (given, mapped) in [(&slots[..], 4096), (&slots[..1], 3072)] {
        let raw = Raw::start(&world);
        let taking = raw.take_in(MemoryMode::Precopy);
        let memory = GuestMemory::create(world.spec.memory).expect("memory");
        let done = link::give(taking.stream, given, memory.as_fd(), &config, soon());
        assert!(done.is_ok(), "it says no by itself: {done:?}");
        let found: u64 = mappings(raw.child.id(), &memory)
            .iter()
            .map(|it| it.bytes)
            .sum();
        assert_eq!(found, mapped << 20, "{} slots given", given.len());
        drop(done);
    }
}

/// Above the gap a guest has a second slot. What is in it is seen by the next VMM, at the same address
/// of the guest.
#[test]
fn a_guest_with_memory_on_both_sides_of_the_gap_goes_on_elsewhere() {
    let Some(world) = large_world() else { return };
    let mut guest = world.boot();
    // The payload is too small to see any of these: the ends of both slots.
    let marked = [(3072 << 20) - 4096, 3072 << 20, (4096 << 20) - 4096].map(|at: u64| {
        let mark = [u8::try_from((at >> 24) & 0x7f).expect("small") | 0x80; 4096];
        file_of(&guest.memory)
            .write_all_at(&mark, at)
            .expect("written");
        (at, mark)
    });
    let (mut state, kept) = save(&guest, world.spec.memory);
    let places = kept.foundation.places();
    assert_eq!(places.len(), 2, "{places:?}");
    let round = guest.round();
    let hardware = guest.vmm.hardware().clone();
    let spare = GuestMemory::create(MEMORY).expect("memory");
    let memory = std::mem::replace(&mut guest.memory, spare);
    drop(guest);
    let (file, ram) = (state.as_fd(), memory.as_fd());
    let started = spawn_incoming(&world.spec, &hardware, file, "ch-test", ram, soon());
    state.rewind().expect("rewound");
    let guest = Guest::new(memory, started.expect("up"));
    guest.vmm.load_state(state.as_fd(), soon()).expect("loaded");
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(round + 2);
    let mapped = mappings(guest.vmm.pid(), &guest.memory);
    let theirs = File::open(format!("/proc/{}/mem", guest.vmm.pid())).expect("readable");
    for (at, mark) in marked {
        let image = ImageOffset(at);
        let holds = |it: &&Mapping| (it.image.0..it.image.0 + it.bytes).contains(&image.0);
        let mapping = mapped.iter().find(holds).expect("mapped");
        let mut seen = [0; 4096];
        let hva = mapping.hva.0 + (at - mapping.image.0);
        theirs.read_exact_at(&mut seen, hva).expect("read");
        assert!(seen == mark, "at {at:#x}");
    }
    let (_, again) = save(&guest, world.spec.memory);
    assert_eq!(again.foundation.places(), places);
}

/// A slot has another number after each bringing back, so none may be remembered.
#[test]
fn the_numbers_of_slots_are_those_of_the_last_save_and_of_no_other() {
    let Some(world) = World::new() else { return };
    let mut guest = world.boot();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let saved = guest.save();
        drop(guest);
        seen.push(kept_in(&saved.state, MEMORY).foundation.slots());
        guest = world.incoming(&saved, saved.copied());
        guest
            .vmm
            .load_state(saved.state.as_fd(), soon())
            .expect("loaded");
        guest.vmm.resume(soon()).expect("goes on");
        guest.await_round(saved.round + 2);
    }
    eprintln!("slots by generation: {seen:?}");
    assert!(seen.iter().all(|slots| slots.len() == 1), "{seen:?}");
    assert!(seen.windows(2).any(|two| two[0] != two[1]), "{seen:?}");
}

/// A build whose save does not work on this host, by its filter of system calls or for the KVM's
/// want of the state of nested guests. Without one there is nothing to test.
#[test]
fn a_build_that_cannot_save_its_guest_is_refused_with_the_reason() {
    let Some(unfit) = std::env::var_os("WRENN_CLOUD_HYPERVISOR_UNFIT") else {
        skip("WRENN_CLOUD_HYPERVISOR_UNFIT names no build that cannot save");
        return;
    };
    let Some(_world) = World::new() else { return };
    let began = Instant::now();
    let why = prove_kvm(Driver::CloudHypervisor, unfit.as_ref()).expect_err("it cannot");
    assert!(why.contains("cannot be saved"), "{why}");
    assert!(began.elapsed() < Duration::from_secs(5), "{why}");
    eprintln!("{why}");
}

/// The smallest guest runs and is saved, without an image of ours.
#[test]
fn kvm_is_proved_by_a_guest_of_some_bytes() {
    let Some(world) = World::new() else { return };
    let took = prove_kvm(Driver::CloudHypervisor, &world.spec.program).expect("it runs");
    eprintln!("proved in {took:?}");
    let other = prove_kvm(Driver::CloudHypervisor, "/bin/true".as_ref());
    assert!(other.is_err(), "{other:?}");
}

/// Start, MemoryFd, Config, State, Complete: whoever takes the guest may die at any of them.
#[test]
fn a_guest_outlives_whoever_was_to_take_it_at_every_step() {
    let Some(world) = World::new() else { return };
    let raw = Raw::boot(&world);
    let mut died_at = Vec::new();
    for until in 0..5 {
        let (path, url) = raw.place(&format!("save-{until}"));
        let listener = UnixListener::bind(&path).expect("bound");
        raw.call(&Call::Send(&url)).expect("begun");
        let (mut stream, _) = listener.accept().expect("it comes");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("set");
        died_at.extend(listen_and_go(&mut stream, until));
        drop(stream);
        let rounds = raw.rounds();
        // It had been running, so it goes on by itself.
        raw.await_rounds(rounds + 2);
    }
    let last = Said::Complete;
    assert_eq!(
        died_at,
        [Said::Start, Said::MemoryFd, Said::Config, Said::State, last]
    );
}

/// What the driver does with a daemon that is not there: nothing is lost, and it can be tried again.
#[test]
fn a_save_to_nobody_leaves_the_guest_running() {
    let Some(world) = World::new() else { return };
    let raw = Raw::boot(&world);
    let (_, url) = raw.place("nobody");
    raw.call(&Call::Send(&url)).expect("it says so only later");
    let rounds = raw.rounds();
    raw.await_rounds(rounds + 2);
    assert_eq!(raw.api.info(soon()).expect("told").state, "Running");
}

/// Before each request of a hand-over up to State, and in the middle of each document.
#[test]
fn a_vmm_whose_giver_is_gone_before_the_state_has_come_has_no_guest_that_runs() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let saved = guest.save();
    drop(guest);
    let kept = kept_in(&saved.state, MEMORY);
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    let memory = saved.copied();
    let handing = Handing {
        kept: &kept,
        config: &config,
        memory: memory.as_fd(),
    };
    let whole = (0..=3).map(|steps| (steps, None));
    let cut = [(2, Some(Said::Config)), (3, Some(Said::State))];
    let ends: Vec<_> = whole.chain(cut).collect();
    for (mode, &(steps, half)) in MODES
        .iter()
        .flat_map(|mode| ends.iter().map(move |it| (*mode, it)))
    {
        let at = format!("{mode:?}, {steps} steps, then half of {half:?}");
        let raw = Raw::start(&world);
        let mut taking = raw.take_in(mode);
        for said in &Handing::STEPS[..steps] {
            let answer = handing.say(*said, &mut taking.stream);
            let wanted = encode_answer(Status::Ok);
            assert_eq!(answer, wanted, "{at}, {said:?}: {}", raw.complaints());
        }
        if let Some(half) = half {
            handing.say_half(half, &mut taking.stream);
        }
        drop(taking.stream);
        let failed = taking.answer.finish(soon());
        assert!(
            matches!(failed, Err(ApiError::Refused { .. })),
            "{at}: {failed:?}"
        );
        let resumed = raw.call(&Call::Resume);
        assert!(resumed.is_err(), "{at}: there is nothing to run");
        assert_eq!(raw.rounds(), 0, "{at}");
    }
}

#[test]
fn a_vmm_refuses_a_protocol_that_it_does_not_speak() {
    let Some(world) = World::new() else { return };
    let raw = Raw::start(&world);
    let (path, url) = raw.place("receive");
    let pending = raw
        .api
        .begin(&Call::Receive(&url, MemoryMode::Precopy), soon())
        .expect("asked");
    let mut stream = connect(&path);
    let newer = Request {
        version: 99,
        ..Request::new(Said::Start, 0)
    };
    stream.write_all(&newer.encode()).expect("sent");
    let mut answer = [0; HEADER_BYTES];
    stream.read_exact(&mut answer).expect("answered");
    assert_eq!(answer, encode_answer(Status::Error));
    assert!(pending.finish(soon()).is_err());
}

/// A layout of other memory would leave a part of the guest's to be made of zeros.
#[test]
fn a_guest_that_was_saved_with_other_memory_is_refused_before_anything_is_started() {
    let Some(mut world) = World::new() else {
        return;
    };
    let saved = world.boot().save();
    world.spec.program = "/nonexistent/cloud-hypervisor".into();
    for size in [128, 96, 65] {
        world.spec.memory = Mib(size);
        let memory = GuestMemory::create(world.spec.memory).expect("memory");
        let refused = world.try_incoming(&saved, &memory).err().expect("refused");
        assert!(matches!(refused, SpawnVmmError::Saved(_)), "{refused:?}");
    }
    would_have_been_started(&world, &saved);
}

#[test]
fn a_state_that_was_damaged_or_is_of_another_machine_is_refused_before_anything_is_started() {
    let Some(mut world) = World::new() else {
        return;
    };
    let guest = world.boot();
    let mut saved = guest.save();
    drop(guest);
    world.spec.program = "/nonexistent/cloud-hypervisor".into();
    would_have_been_started(&world, &saved);
    let memory = saved.copied();
    let assert_refused = |world: &World, saved: &Saved, what: &str| {
        let refused = world.try_incoming(saved, &memory).err().expect(what);
        assert!(
            matches!(refused, SpawnVmmError::Saved(_)),
            "{what}: {refused:?}"
        );
    };
    let machine = std::mem::replace(&mut saved.hardware.machine, "cloud-hypervisor-99/1".into());
    assert_refused(&world, &saved, "another machine");
    saved.hardware.machine = machine;
    let whole = kept_in(&saved.state, MEMORY).encode().expect("written");
    // Its beginning, its machine's name, its foundation.
    for at in [0, 20, 60] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x80;
        saved.state.write_all_at(&damaged, 0).expect("written");
        assert_refused(&world, &saved, &format!("byte {at}"));
    }
    saved.state.write_all_at(&whole, 0).expect("written");
    for missing in [1, 100, whole.len() - 1, whole.len()] {
        let left = (whole.len() - missing) as u64;
        saved.state.set_len(left).expect("cut");
        assert_refused(&world, &saved, &format!("{left} bytes"));
        saved.state.write_all_at(&whole, 0).expect("written");
    }
    would_have_been_started(&world, &saved);
}

/// Nothing else is wrong with it: it comes as far as a program that cannot be started.
fn would_have_been_started(world: &World, saved: &Saved) {
    let mut world_of_it = World::new().expect("as before");
    world_of_it.spec.program = world.spec.program.clone();
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let failed = world_of_it
        .try_incoming(saved, &memory)
        .err()
        .expect("not there");
    // Whoever makes it a root of its own looks for it first.
    let is_missed = matches!(failed, SpawnVmmError::Start { .. } | SpawnVmmError::Jail(_));
    assert!(is_missed, "{failed:?}");
}

/// A VMM that ends itself in the middle, as it does when its filter of system calls objects to one
/// of a build against another libc: the error comes at once, and says so of a release that does.
#[test]
fn a_vmm_that_dies_somewhere_in_a_save_is_noticed_at_once() {
    let Some(world) = World::new() else { return };
    let mut explained = 0;
    for micros in [0, 300, 600, 1000, 1500, 2500, 4000, 8000] {
        let guest = world.boot();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(guest.vmm.pid()).expect("a pid"));
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_micros(micros));
            nix::sys::signal::kill(pid, Signal::SIGSYS).expect("there");
        });
        let began = Instant::now();
        let file = tempfile::tempfile().expect("tempfile");
        let filters = known(guest.vmm.version())
            .expect("known")
            .behaviour
            .filter_ends_glibc_save;
        match guest.vmm.save_state(file.as_fd(), soon()) {
            // All was said before it died, or none of it.
            Ok(()) | Err(VmmError::Save(MoveStateError::Talk(_))) => {}
            Err(VmmError::Save(MoveStateError::GaveUp { reason })) if filters => {
                assert!(reason.contains("filter of system calls"), "{reason}");
                explained += 1;
            }
            Err(VmmError::Save(MoveStateError::Offload(_))) if !filters => {}
            other => panic!("{other:?}"),
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{micros}");
        killer.join().expect("no panic");
        let exit = guest.vmm.wait(soon()).expect("waited").expect("ended");
        // As the first process of its namespace it cannot raise a signal that kills it; then the
        // last resort of `abort` does.
        let ends = [Some(Signal::SIGSYS as i32), Some(Signal::SIGSEGV as i32)];
        assert!(ends.contains(&exit.signal), "{exit:?}");
        let _memory_is_ours = file_of(&guest.memory);
    }
    eprintln!("explained {explained} of them");
}
