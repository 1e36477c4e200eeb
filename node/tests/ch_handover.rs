//! A real Cloud Hypervisor whose other side is not as it should be: silent, gone at any step, of
//! another version, or offering the wrong thing.

mod ch_world;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ch_world::{MEMORY, Saved, World, file_of, soon};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::target::Target;
use wrenn_node::vmm::cloud_hypervisor::api::{Api, ApiError, Call, MemoryMode};
use wrenn_node::vmm::cloud_hypervisor::config::{MemoryFrom, machine};
use wrenn_node::vmm::cloud_hypervisor::kept::Kept;
use wrenn_node::vmm::cloud_hypervisor::offload::codec::{
    Command as Said, HEADER_BYTES, Request, Status, encode_answer,
};
use wrenn_node::vmm::cloud_hypervisor::offload::{OffloadError, link};
use wrenn_node::vmm::jail::Jail;
use wrenn_node::vmm::probe::prove_kvm;
use wrenn_node::vmm::{Driver, SpawnVmmError, VmmError};

/// Cloud Hypervisor without our driver, so that the other side can misbehave.
struct Raw {
    child: Child,
    api: Api,
    home: tempfile::TempDir,
    memory: GuestMemory,
}

impl Raw {
    fn start(world: &World) -> Self {
        let home = tempfile::tempdir().expect("tempdir");
        let socket = home.path().join("api");
        let memory = GuestMemory::create(MEMORY).expect("memory");
        let mut command = Command::new(&world.spec.program);
        command
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()))
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(home.path().join("console")).expect("made"))
            .stderr(Stdio::null())
            .arg0("ch-test-raw");
        Jail::new(None, &[memory.as_fd()]).confine(&mut command);
        let child = command.spawn().expect("started");
        let end = soon();
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < end, "no API");
            thread::sleep(Duration::from_millis(2));
        }
        Self {
            child,
            api: Api::new(socket),
            home,
            memory,
        }
    }

    fn boot(world: &World) -> Self {
        let raw = Self::start(world);
        let from = MemoryFrom::Inherited(raw.memory.as_fd().as_raw_fd());
        let machine = machine(&world.spec, from).expect("can be built");
        raw.call(&Call::Create(&machine)).expect("made");
        raw.call(&Call::Boot).expect("booted");
        raw.await_rounds(2);
        raw
    }

    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, ApiError> {
        self.api.call(call, soon())
    }

    fn rounds(&self) -> usize {
        let said = std::fs::read_to_string(self.home.path().join("console")).expect("there");
        assert!(
            said.matches("bad 00000000\n").count() == said.matches("bad ").count()
                || !said.ends_with('\n')
        );
        said.matches("bad 00000000\n").count()
    }

    fn await_rounds(&self, rounds: usize) {
        let end = soon();
        while self.rounds() < rounds {
            assert!(Instant::now() < end, "no round {rounds}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn place(&self, name: &str) -> (PathBuf, String) {
        let path = self.home.path().join(name);
        let url = format!("unix:{}", path.display());
        (path, url)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _gone = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// What was written for a guest.
fn kept_of(saved: &Saved) -> Kept {
    let length = saved.state.metadata().expect("told").len();
    let mut bytes = vec![0; usize::try_from(length).expect("small")];
    saved.state.read_exact_at(&mut bytes, 0).expect("read");
    Kept::decode(&bytes, MEMORY.bytes()).expect("ours")
}

/// To where a VMM takes a guest in, once it is there.
fn connect(path: &Path) -> UnixStream {
    let end = soon();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(err) => assert!(Instant::now() < end, "{err}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Reads requests and answers them, and is gone before it answers the one numbered `until`.
fn listen_and_go(stream: &mut UnixStream, until: usize) -> Option<Said> {
    for number in 0.. {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).ok()?;
        let request = Request::decode(header).expect("a request");
        if request.command == Said::MemoryFd {
            let mut slot = [0; 4];
            let mut space = nix::cmsg_space!([i32; 1]);
            let mut parts = [std::io::IoSliceMut::new(&mut slot)];
            let fd = stream.as_raw_fd();
            let got = recvmsg::<()>(fd, &mut parts, Some(&mut space), MsgFlags::empty());
            let got = got.expect("received");
            let fds = got
                .cmsgs()
                .expect("whole")
                .filter(|it| matches!(it, ControlMessageOwned::ScmRights(_)));
            assert_eq!(fds.count(), 1);
        } else {
            let mut document = vec![0; usize::try_from(request.length).expect("small")];
            stream.read_exact(&mut document).ok()?;
        }
        if number == until {
            return Some(request.command);
        }
        stream.write_all(&encode_answer(Status::Ok)).expect("sent");
    }
    None
}

/// Carries what `from` says to `to`, descriptors included.
fn carry(from: &UnixStream, to: &UnixStream) -> std::io::Result<Option<usize>> {
    let (mut bytes, mut space) = (vec![0; 64 << 10], nix::cmsg_space!([i32; 4]));
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            for number in numbers {
                // A copy that is ours to close; the one that came is closed right away.
                let path = format!("/proc/self/fd/{number}");
                fds.push(
                    std::fs::File::options()
                        .read(true)
                        .write(true)
                        .open(path)?
                        .into(),
                );
                nix::unistd::close(number)?;
            }
        }
    }
    let count = got.bytes;
    if count == 0 {
        return Ok(None);
    }
    let numbers: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let with = [ControlMessage::ScmRights(&numbers)];
    let with = if fds.is_empty() { &[][..] } else { &with[..] };
    // A header that came before the descriptor has to go out before it as well.
    let before = if fds.is_empty() { 0 } else { count - 4 };
    let (before, rest) = bytes[..count].split_at(before);
    let mut stream = to;
    stream.write_all(before)?;
    let part = [std::io::IoSlice::new(rest)];
    sendmsg::<()>(to.as_raw_fd(), &part, with, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(Some(count))
}

/// Stands between a VMM and us, and kills the VMM once so many answers have passed `to_asker`: what
/// comes after that is never said. Both connections end with it.
fn kill_after(answers: usize, asker: UnixStream, answerer: UnixStream, vmm: u32) {
    let vmm = nix::unistd::Pid::from_raw(i32::try_from(vmm).expect("a pid"));
    let (questions_from, questions_to) = (
        asker.try_clone().expect("a clone"),
        answerer.try_clone().expect("a clone"),
    );
    let questions = thread::spawn(move || {
        while let Ok(Some(_)) = carry(&questions_from, &questions_to) {}
        let _ended = questions_to.shutdown(std::net::Shutdown::Both);
    });
    let mut passed = 0;
    loop {
        if passed == answers * HEADER_BYTES {
            nix::sys::signal::kill(vmm, Signal::SIGKILL).expect("there");
            break;
        }
        match carry(&answerer, &asker) {
            Ok(Some(count)) => passed += count,
            _ => break,
        }
    }
    let _ended = asker.shutdown(std::net::Shutdown::Both);
    let _ended = answerer.shutdown(std::net::Shutdown::Both);
    questions.join().expect("no panic");
}

/// After Start, MemoryFd, Config and State, and before all of them.
#[test]
fn a_vmm_that_is_killed_at_any_step_of_a_save_is_an_error_at_once() {
    let Some(world) = World::new() else { return };
    for answers in 0..5 {
        let raw = Raw::boot(&world);
        let (path, url) = raw.place("save");
        let listener = UnixListener::bind(&path).expect("bound");
        raw.call(&Call::Send(&url)).expect("begun");
        let (asker, _) = listener.accept().expect("it comes");
        let (ours, answerer) = UnixStream::pair().expect("a pair");
        let vmm = raw.child.id();
        let between = thread::spawn(move || kill_after(answers, asker, answerer, vmm));
        let began = Instant::now();
        let taken = link::take(ours, raw.memory.as_fd(), soon());
        assert!(began.elapsed() < Duration::from_secs(5), "{answers}");
        match taken {
            // All was said before it died; what was taken is whole.
            Ok(taken) if answers == 4 => assert!(!taken.state.is_empty()),
            Ok(_) => panic!("{answers}: half a guest was taken for a whole one"),
            Err(err) => assert!(matches!(err, OffloadError::Closed { .. }), "{err}"),
        }
        between.join().expect("no panic");
    }
}

#[test]
fn a_vmm_that_is_killed_at_any_step_of_a_bringing_back_is_an_error_at_once() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let saved = guest.save();
    drop(guest);
    let kept = kept_of(&saved);
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    let memory = saved.copied();
    for answers in 0..4 {
        let raw = Raw::start(&world);
        let (path, url) = raw.place("receive");
        let pending = raw
            .api
            .begin(&Call::Receive(&url, MemoryMode::Precopy), soon());
        let pending = pending.expect("asked");
        let answerer = connect(&path);
        let (ours, asker) = UnixStream::pair().expect("a pair");
        let vmm = raw.child.id();
        let between = thread::spawn(move || kill_after(answers, asker, answerer, vmm));
        let began = Instant::now();
        let slots = kept.foundation.slots();
        let given = link::give(ours, &slots, memory.as_fd(), &config, soon());
        let failed = given
            .and_then(|given| given.state(memory.as_fd(), &kept.state, soon()))
            .expect_err("it was killed");
        assert!(
            matches!(failed, OffloadError::Closed { .. }),
            "{answers}: {failed}"
        );
        assert!(pending.finish(soon()).is_err(), "{answers}");
        assert!(began.elapsed() < Duration::from_secs(5), "{answers}");
        between.join().expect("no panic");
        assert_eq!(raw.rounds(), 0, "{answers}: it ran");
    }
}

/// What a slot that nobody gave becomes: memory of the VMM's own. It is found before the guest runs,
/// by what is mapped.
#[test]
fn a_guest_of_which_half_is_mapped_from_elsewhere_is_noticed() {
    let Some(mut world) = World::new() else {
        return;
    };
    // With a gap below 4 GiB, so two slots. Next to none of it is touched.
    world.spec.memory = proto::units::Mib(4096);
    let guest = world.boot();
    let state = tempfile::tempfile().expect("tempfile");
    guest.vmm.save_state(state.as_fd(), soon()).expect("saved");
    let mut bytes = vec![0; usize::try_from(state.metadata().expect("told").len()).expect("small")];
    state.read_exact_at(&mut bytes, 0).expect("read");
    let kept = Kept::decode(&bytes, world.spec.memory.bytes()).expect("ours");
    let slots = kept.foundation.slots();
    assert_eq!(slots.len(), 2);
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    for (given, mapped) in [(&slots[..], 4096), (&slots[..1], 3072)] {
        let raw = Raw::start(&world);
        let (path, url) = raw.place("receive");
        let pending = raw
            .api
            .begin(&Call::Receive(&url, MemoryMode::Precopy), soon());
        let memory = GuestMemory::create(world.spec.memory).expect("memory");
        let done = link::give(connect(&path), given, memory.as_fd(), &config, soon());
        let (pid, region) = (raw.child.id(), memory.region());
        let pidfd = wrenn_node::vmm::jail::pidfd_open(pid).expect("there");
        let layout = Target::new(pid, pidfd).layout(memory.as_fd(), region);
        let found = layout.map_or(0, |layout| {
            layout.mappings().iter().map(|it| it.bytes).sum()
        });
        // Either it says no, or what it has mapped is too little: never silently less.
        let whole = world.spec.memory.bytes();
        assert_eq!(
            found == whole,
            mapped == 4096,
            "{found} of {whole}: {done:?}"
        );
        drop((pending, done));
    }
}

/// Above the gap a guest has a second slot; all of it goes over.
#[test]
fn a_guest_with_memory_on_both_sides_of_the_gap_goes_on_elsewhere() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.spec.memory = proto::units::Mib(4096);
    let mut guest = world.boot();
    let state = tempfile::tempfile().expect("tempfile");
    guest.vmm.save_state(state.as_fd(), soon()).expect("saved");
    let round = guest.round();
    let hardware = guest.vmm.hardware().clone();
    let spare = GuestMemory::create(MEMORY).expect("memory");
    let memory = std::mem::replace(&mut guest.memory, spare);
    drop(guest);
    let (file, ram) = (state.as_fd(), memory.as_fd());
    let started =
        wrenn_node::vmm::spawn_incoming(&world.spec, &hardware, file, "ch-test", ram, soon());
    let mut state = state.try_clone().expect("a clone");
    std::io::Seek::rewind(&mut state).expect("rewound");
    let guest = ch_world::Guest::new(memory, started.expect("up"));
    guest.vmm.load_state(state.as_fd(), soon()).expect("loaded");
    guest.vmm.resume(soon()).expect("goes on");
    guest.await_round(round + 2);
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
        seen.push(kept_of(&saved).foundation.slots());
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
        eprintln!("!!! SKIPPED: WRENN_CLOUD_HYPERVISOR_UNFIT names no build that cannot save !!!");
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

/// The whole of a hand-over that is cut off before each of its steps.
#[test]
fn a_vmm_whose_giver_is_gone_at_any_step_has_no_guest_that_runs() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let saved = guest.save();
    let kept = kept_of(&saved);
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    let memory = saved.copied();
    for step in 0..3 {
        let raw = Raw::start(&world);
        let (path, url) = raw.place("receive");
        let pending = raw
            .api
            .begin(&Call::Receive(&url, MemoryMode::Precopy), soon())
            .expect("asked");
        let mut stream = connect(&path);
        match step {
            0 => {}
            1 => stream
                .write_all(&Request::new(Said::Start, 0).encode())
                .expect("sent"),
            _ => drop(
                link::give(
                    stream.try_clone().expect("a clone"),
                    &kept.foundation.slots(),
                    memory.as_fd(),
                    &config,
                    soon(),
                )
                .expect("given"),
            ),
        }
        drop(stream);
        let failed = pending.finish(soon());
        assert!(
            matches!(failed, Err(ApiError::Refused { .. })),
            "{step}: {failed:?}"
        );
        assert!(
            raw.call(&Call::Resume).is_err(),
            "{step}: there is nothing to run"
        );
        assert_eq!(raw.rounds(), 0);
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

/// The notes' worst case: with a slot that nobody gave, the VMM would map fresh memory, and the
/// guest would run on zeros without any error.
#[test]
fn a_guest_is_never_started_on_memory_that_is_not_its_own() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let saved = guest.save();
    drop(guest);
    // Its layout says more memory than it is given here.
    let mut larger = World::new().expect("as before");
    larger.spec.memory = proto::units::Mib(128);
    let memory = GuestMemory::create(larger.spec.memory).expect("memory");
    let refused = larger.try_incoming(&saved, &memory).err().expect("refused");
    assert!(matches!(refused, SpawnVmmError::Saved(_)), "{refused:?}");
}

#[test]
fn a_state_that_was_damaged_or_is_of_another_machine_is_refused_before_anything_runs() {
    let Some(world) = World::new() else { return };
    let guest = world.boot();
    let saved = guest.save();
    drop(guest);
    let length = saved.state.metadata().expect("told").len();
    saved.state.set_len(length - 100).expect("cut");
    let memory = saved.copied();
    let refused = world.try_incoming(&saved, &memory).err().expect("refused");
    assert!(matches!(refused, SpawnVmmError::Saved(_)), "{refused:?}");

    let guest = world.boot();
    let mut saved = guest.save();
    saved.hardware.machine = "cloud-hypervisor-99/1".into();
    let refused = world.try_incoming(&saved, &memory).err().expect("refused");
    assert!(matches!(refused, SpawnVmmError::Saved(_)), "{refused:?}");
}

/// A VMM that ends itself in the middle, as it does when its filter of system calls objects to one
/// of a build against another libc: the error comes at once.
#[test]
fn a_vmm_that_dies_somewhere_in_a_save_is_noticed_at_once() {
    let Some(world) = World::new() else { return };
    for micros in [0, 300, 600, 1000, 1500, 2500, 4000, 8000] {
        let guest = world.boot();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(guest.vmm.pid()).expect("a pid"));
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_micros(micros));
            nix::sys::signal::kill(pid, Signal::SIGSYS).expect("there");
        });
        let began = Instant::now();
        let file = tempfile::tempfile().expect("tempfile");
        match guest.vmm.save_state(file.as_fd(), soon()) {
            Ok(()) | Err(VmmError::Save(_)) => {}
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
}
