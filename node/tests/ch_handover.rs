//! A real Cloud Hypervisor whose other side is not as it should be: silent, gone at any step, of
//! another version, or offering the wrong thing.

mod ch_world;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ch_world::{MEMORY, World, file_of, soon};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::vmm::cloud_hypervisor::api::{Api, ApiError, Call};
use wrenn_node::vmm::cloud_hypervisor::config::{MemoryFrom, machine};
use wrenn_node::vmm::cloud_hypervisor::kept::Kept;
use wrenn_node::vmm::cloud_hypervisor::offload::codec::{
    Command as Said, HEADER_BYTES, Request, Status, encode_answer,
};
use wrenn_node::vmm::cloud_hypervisor::offload::link;
use wrenn_node::vmm::jail::Jail;
use wrenn_node::vmm::{SpawnVmmError, VmmError};

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
    let mut bytes =
        vec![0; usize::try_from(saved.state.metadata().expect("told").len()).expect("small")];
    saved.state.read_exact_at(&mut bytes, 0).expect("read");
    let kept = Kept::decode(&bytes, MEMORY.bytes()).expect("ours");
    let machine = machine(&world.spec, MemoryFrom::HandOver).expect("can be built");
    let config = kept.foundation.config_with(&machine).expect("written");
    let memory = saved.copied();
    for step in 0..3 {
        let raw = Raw::start(&world);
        let (path, url) = raw.place("receive");
        let pending = raw.api.begin(&Call::Receive(&url), soon()).expect("asked");
        let end = soon();
        let mut stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(err) => assert!(Instant::now() < end, "{err}"),
            }
            thread::sleep(Duration::from_millis(1));
        };
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
    let pending = raw.api.begin(&Call::Receive(&url), soon()).expect("asked");
    let end = soon();
    let mut stream = loop {
        match UnixStream::connect(&path) {
            Ok(stream) => break stream,
            Err(err) => assert!(Instant::now() < end, "{err}"),
        }
        thread::sleep(Duration::from_millis(1));
    };
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

/// A VMM that is killed in the middle, as its own filter of system calls does to one that is built
/// against another libc: the error comes at once, and says what was being done.
#[test]
fn a_vmm_that_dies_somewhere_in_a_save_is_noticed_at_once() {
    let Some(world) = World::new() else { return };
    for micros in [0, 300, 600, 1000, 1500, 2500, 4000, 8000] {
        let guest = world.boot();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(guest.vmm.pid()).expect("a pid"));
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_micros(micros));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSYS).expect("there");
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
        assert_eq!(exit.signal, Some(31), "{exit:?}");
        let _memory_is_ours = file_of(&guest.memory);
    }
}
