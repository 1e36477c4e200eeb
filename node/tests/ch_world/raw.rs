//! Cloud Hypervisor without our driver, and what stands on the other side of its hand-over: the parts of
//! which tests make one that misbehaves.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use proto::units::Mib;
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::post_copy::{ANSWER_BYTES, QUESTION_BYTES};
use wrenn_node::vmm::cloud_hypervisor::api::{Api, ApiError, Call, MemoryMode, Pending};
use wrenn_node::vmm::cloud_hypervisor::config::{MemoryFrom, machine};
use wrenn_node::vmm::cloud_hypervisor::kept::Kept;
use wrenn_node::vmm::cloud_hypervisor::offload::codec::{
    Command as Said, FAULT_ROLE, HEADER_BYTES, Request, Status, encode_answer,
};
use wrenn_node::vmm::jail::Jail;

use super::{MEMORY, World, soon};

/// Cloud Hypervisor without our driver, so that the other side can misbehave.
pub(crate) struct Raw {
    pub(crate) child: Child,
    pub(crate) api: Api,
    home: tempfile::TempDir,
    pub(crate) memory: GuestMemory,
}

impl Raw {
    pub(crate) fn start(world: &World) -> Self {
        let home = tempfile::tempdir().expect("tempdir");
        let socket = home.path().join("api");
        let memory = GuestMemory::create(MEMORY).expect("memory");
        let mut command = Command::new(&world.spec.program);
        command
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()))
            .stdin(Stdio::null())
            .stdout(File::create(home.path().join("console")).expect("made"))
            .stderr(File::create(home.path().join("complaints")).expect("made"))
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

    pub(crate) fn boot(world: &World) -> Self {
        let raw = Self::start(world);
        let from = MemoryFrom::Inherited(raw.memory.as_fd().as_raw_fd());
        let machine = machine(&world.spec, from).expect("can be built");
        raw.call(&Call::Create(&machine)).expect("made");
        raw.call(&Call::Boot).expect("booted");
        raw.await_rounds(2);
        raw
    }

    pub(crate) fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, ApiError> {
        self.api.call(call, soon())
    }

    pub(crate) fn rounds(&self) -> usize {
        let said = std::fs::read_to_string(self.home.path().join("console")).expect("there");
        assert!(
            said.matches("bad 00000000\n").count() == said.matches("bad ").count()
                || !said.ends_with('\n')
        );
        said.matches("bad 00000000\n").count()
    }

    /// What it says of itself.
    pub(crate) fn complaints(&self) -> String {
        std::fs::read_to_string(self.home.path().join("complaints")).expect("there")
    }

    pub(crate) fn await_rounds(&self, rounds: usize) {
        let end = soon();
        while self.rounds() < rounds {
            assert!(Instant::now() < end, "no round {rounds}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn place(&self, name: &str) -> (PathBuf, String) {
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

/// To where a VMM takes a guest in, once it is there.
pub(crate) fn connect(path: &Path) -> UnixStream {
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
pub(crate) fn listen_and_go(stream: &mut UnixStream, until: usize) -> Option<Said> {
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

/// Carries what `from` says to `to`, descriptors included. Returns how much had been `answered` when it
/// was said; `None` at the end.
fn carry(
    from: &UnixStream,
    to: &UnixStream,
    answered: &AtomicUsize,
) -> std::io::Result<Option<usize>> {
    let (mut bytes, mut space) = (vec![0; 64 << 10], nix::cmsg_space!([i32; 4]));
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let answered = answered.load(Ordering::SeqCst);
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            for number in numbers {
                // A copy that is ours to close; the one that came is closed right away.
                let path = format!("/proc/self/fd/{number}");
                fds.push(File::options().read(true).write(true).open(path)?.into());
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
    Ok(Some(answered))
}

/// A moment of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// So many requests have been answered.
    Answered(usize),
    /// And the next one has begun to be said.
    SaidAfter(usize),
}

/// Stands between a VMM and us, and kills the VMM at `moment`: what comes after that is never said.
/// Both connections end with it.
pub(crate) fn kill_at(moment: Moment, asker: UnixStream, answerer: UnixStream, vmm: u32) {
    let vmm = nix::unistd::Pid::from_raw(i32::try_from(vmm).expect("a pid"));
    let kill = move || nix::sys::signal::kill(vmm, Signal::SIGKILL).expect("there");
    let answers = Arc::new(AtomicUsize::new(0));
    let (questions_from, questions_to) = (
        asker.try_clone().expect("a clone"),
        answerer.try_clone().expect("a clone"),
    );
    let answered = Arc::clone(&answers);
    let questions = thread::spawn(move || {
        while let Ok(Some(answers)) = carry(&questions_from, &questions_to, &answered) {
            // Strictly in turn: what is said now is the request after that answer.
            if moment == Moment::SaidAfter(answers) {
                kill();
                break;
            }
        }
        let _ended = questions_to.shutdown(std::net::Shutdown::Both);
    });
    loop {
        if moment == Moment::Answered(answers.load(Ordering::SeqCst)) {
            kill();
            break;
        }
        if carry_answer(&answerer, &asker, &answers).is_err() {
            break;
        }
    }
    let _ended = asker.shutdown(std::net::Shutdown::Both);
    let _ended = answerer.shutdown(std::net::Shutdown::Both);
    questions.join().expect("no panic");
}

/// Carries one answer, which counts before whoever waits for it can say the next.
fn carry_answer(
    mut from: &UnixStream,
    mut to: &UnixStream,
    answers: &AtomicUsize,
) -> std::io::Result<()> {
    let mut answer = [0; HEADER_BYTES];
    from.read_exact(&mut answer)?;
    answers.fetch_add(1, Ordering::SeqCst);
    to.write_all(&answer)
}

/// A VMM that has been asked to take a guest in.
pub(crate) struct Taking {
    /// The call that is answered when all of it is over.
    pub(crate) answer: Pending,
    /// Where it is given the guest.
    pub(crate) stream: UnixStream,
    /// Who tells it that each page is there for which it asks, and how often he did.
    pub(crate) questions: Option<JoinHandle<usize>>,
}

impl Raw {
    /// Has it take in a guest, whose memory is all there.
    pub(crate) fn take_in(&self, mode: MemoryMode) -> Taking {
        let (path, url) = self.place("receive");
        let answer = self.api.begin(&Call::Receive(&url, mode), soon());
        let stream = connect(&path);
        let questions = (mode == MemoryMode::Postcopy).then(|| {
            let mut asking = connect(&path);
            asking.write_all(&FAULT_ROLE.to_le_bytes()).expect("sent");
            thread::spawn(move || tell_it_is_there(asking))
        });
        Taking {
            answer: answer.expect("asked"),
            stream,
            questions,
        }
    }
}

/// Answers until nobody asks any more. Returns how often.
fn tell_it_is_there(mut asking: UnixStream) -> usize {
    let (mut question, mut count) = ([0; QUESTION_BYTES], 0);
    let there = encode_answer(Status::Ok);
    assert_eq!(there.len(), ANSWER_BYTES);
    while asking.read_exact(&mut question).is_ok() && asking.write_all(&there).is_ok() {
        count += 1;
    }
    count
}

/// Of a guest with one slot: all that is said until it has its state.
pub(crate) struct Handing<'a> {
    pub(crate) kept: &'a Kept,
    pub(crate) config: &'a [u8],
    pub(crate) memory: BorrowedFd<'a>,
}

impl Handing<'_> {
    /// What is said, in order.
    pub(crate) const STEPS: [Said; 3] = [Said::Start, Said::MemoryFd, Said::Config];

    fn document(&self, said: Said) -> &[u8] {
        match said {
            Said::Config => self.config,
            Said::State => &self.kept.state,
            _ => &[],
        }
    }

    /// Says it. Returns the answer.
    pub(crate) fn say(&self, said: Said, stream: &mut UnixStream) -> [u8; HEADER_BYTES] {
        let slots = self.kept.foundation.slots();
        let bytes = match said {
            Said::MemoryFd => 4,
            said => self.document(said).len() as u64,
        };
        let header = Request::new(said, bytes).encode();
        stream.write_all(&header).expect("sent");
        if said == Said::MemoryFd {
            let (slot, fd) = (slots[0].to_le_bytes(), [self.memory.as_raw_fd()]);
            let parts = [std::io::IoSlice::new(&slot)];
            let with = [ControlMessage::ScmRights(&fd)];
            let to = stream.as_raw_fd();
            sendmsg::<()>(to, &parts, &with, MsgFlags::MSG_NOSIGNAL, None).expect("sent");
        } else {
            stream.write_all(self.document(said)).expect("sent");
        }
        let mut answer = [0; HEADER_BYTES];
        stream.read_exact(&mut answer).expect("answered");
        answer
    }

    /// Begins to say it, and never ends.
    pub(crate) fn say_half(&self, said: Said, stream: &mut UnixStream) {
        let document = self.document(said);
        let header = Request::new(said, document.len() as u64).encode();
        stream.write_all(&header).expect("sent");
        stream
            .write_all(&document[..document.len() / 2])
            .expect("sent");
    }
}

/// What was written for a guest of `memory`.
pub(crate) fn kept_in(state: &File, memory: Mib) -> Kept {
    let length = state.metadata().expect("told").len();
    let mut bytes = vec![0; usize::try_from(length).expect("small")];
    state.read_exact_at(&mut bytes, 0).expect("read");
    Kept::decode(&bytes, memory.bytes()).expect("ours")
}
