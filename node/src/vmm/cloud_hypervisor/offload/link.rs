//! The protocol on a socket, each step with a deadline: Cloud Hypervisor has no limits of its own.
//!
//! What is read is read exactly: a byte too many behind the header of `MemoryFd` would cost its
//! descriptor. Every descriptor that is offered is compared with the memory that the guest was
//! given, and closed: we have it already.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::fstat;

use super::OffloadError;
use super::codec::{HEADER_BYTES, Request, Status, decode_answer, encode_answer};
use super::giving::{Configured, Fresh, Payload, Say};
use super::taking::{Ask, Taking};
use crate::pager::uffd::sys;

/// How long a farewell may take: it is 16 bytes into an empty socket.
const FAREWELL: Duration = Duration::from_millis(500);

/// A guest that Cloud Hypervisor has laid open, and still holds.
#[derive(Debug)]
pub struct Taken {
    /// The numbers of its memory slots.
    pub slots: Vec<u32>,
    /// The configuration document.
    pub config: Vec<u8>,
    /// The state document.
    pub state: Vec<u8>,
    /// Its last question.
    pub held: Held,
}

/// The last question of a hand-over, not answered yet: until then the guest stands still on the
/// other side. Dropped, it is answered as by [`Held::keep_it`], by the end of the connection.
#[derive(Debug)]
pub struct Held(Link);

impl Held {
    /// Tells the VMM to keep the guest, as it is: standing still where it was told to before.
    pub fn keep_it(mut self) {
        // The end of the connection says the same.
        let _told = self.0.answer(Status::Error, Instant::now() + FAREWELL);
    }
}

/// Takes the guest that the VMM lays open on `stream`, whose memory has to be `memory`.
///
/// # Errors
/// See [`OffloadError`]. The VMM keeps the guest.
pub fn take(
    stream: UnixStream,
    memory: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Taken, OffloadError> {
    let mut link = Link::new(stream);
    let mut taking = Taking::default();
    let (mut config, mut state) = (Vec::new(), Vec::new());
    loop {
        let header = link.read_header("waiting for its next request", deadline)?;
        match taking.hear(Request::decode(header)?)? {
            Ask::Answer => {}
            Ask::Slot => taking.slot(link.read_slot(memory, deadline)?)?,
            Ask::Config(bytes) => {
                config = link.read_document(bytes, "reading its configuration", deadline)?;
            }
            Ask::State(bytes) => {
                state = link.read_document(bytes, "reading its state", deadline)?;
            }
            Ask::Whole => {
                return Ok(Taken {
                    slots: taking.slots().to_vec(),
                    config,
                    state,
                    held: Held(link),
                });
            }
        }
        link.answer(Status::Ok, deadline)?;
    }
}

/// A guest whose memory the VMM has mapped, and whose state is to come.
#[derive(Debug)]
pub struct Given {
    link: Link,
    phase: Configured,
}

/// Gives the VMM behind `stream` a machine: `memory` in `slots`, and the document that describes it.
///
/// # Errors
/// See [`OffloadError`]. The VMM is of no further use.
pub fn give(
    stream: UnixStream,
    slots: &[u32],
    memory: BorrowedFd<'_>,
    config: &[u8],
    deadline: Instant,
) -> Result<Given, OffloadError> {
    let mut link = Link::new(stream);
    let (start, mut started) = Fresh::default().start();
    link.say(start, memory, deadline)?;
    for &slot in slots {
        let (said, same) = started.memory(slot);
        link.say(said, memory, deadline)?;
        started = same;
    }
    let (said, phase) = started.config(config);
    link.say(said, memory, deadline)?;
    Ok(Given { link, phase })
}

impl Given {
    /// Gives the state as well. The guest stands still afterwards.
    ///
    /// # Errors
    /// See [`OffloadError`]. The VMM is of no further use.
    pub fn state(
        mut self,
        memory: BorrowedFd<'_>,
        state: &[u8],
        deadline: Instant,
    ) -> Result<(), OffloadError> {
        let (said, stated) = self.phase.state(state);
        self.link.say(said, memory, deadline)?;
        self.link.say(stated.still(), memory, deadline)
    }
}

/// One connection.
#[derive(Debug)]
struct Link {
    stream: UnixStream,
    since: Instant,
}

impl Link {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            since: Instant::now(),
        }
    }

    fn say(
        &mut self,
        said: Say<'_>,
        memory: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), OffloadError> {
        const DOING: &str = "telling it the next";
        let command = said.request.command;
        self.write(&said.request.encode(), DOING, deadline)?;
        match said.payload {
            Payload::None => {}
            Payload::Slot(slot) => self.send_slot(slot, memory, deadline)?,
            Payload::Document(document) => self.write(document, DOING, deadline)?,
        }
        let header = self.read_header("waiting for its answer", deadline)?;
        match decode_answer(header)? {
            Status::Ok => Ok(()),
            Status::Error => Err(OffloadError::Refused { command }),
        }
    }

    fn answer(&mut self, status: Status, deadline: Instant) -> Result<(), OffloadError> {
        self.write(&encode_answer(status), "answering it", deadline)
    }

    fn read_header(
        &mut self,
        doing: &'static str,
        deadline: Instant,
    ) -> Result<[u8; HEADER_BYTES], OffloadError> {
        let mut header = [0; HEADER_BYTES];
        self.read(&mut header, doing, deadline)?;
        Ok(header)
    }

    fn read_document(
        &mut self,
        bytes: usize,
        doing: &'static str,
        deadline: Instant,
    ) -> Result<Vec<u8>, OffloadError> {
        let mut document = vec![0; bytes];
        self.read(&mut document, doing, deadline)?;
        Ok(document)
    }

    /// Reads a slot's number, whose descriptor must be `memory`.
    fn read_slot(
        &mut self,
        memory: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<u32, OffloadError> {
        const DOING: &str = "reading a memory slot";
        self.within(DOING, deadline, UnixStream::set_read_timeout)?;
        let mut number = [0; 4];
        let (count, fds) = sys::receive(self.stream.as_fd(), &mut number)
            .map_err(|errno| self.failed(DOING, errno.into()))?;
        if count == 0 {
            return Err(OffloadError::Closed { doing: DOING });
        }
        let slot = u32::from_le_bytes(number);
        if count != number.len() {
            let what = "in half";
            return Err(OffloadError::Slot { slot, what });
        }
        let same = |fd: BorrowedFd<'_>| -> Result<bool, Errno> {
            let (theirs, ours) = (fstat(fd)?, fstat(memory)?);
            Ok((theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino))
        };
        match &fds[..] {
            [fd] if same(fd.as_fd()) == Ok(true) => Ok(slot),
            _ => Err(OffloadError::ForeignMemory { slot }),
        }
    }

    fn send_slot(
        &mut self,
        slot: u32,
        memory: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), OffloadError> {
        const DOING: &str = "giving it the memory";
        self.within(DOING, deadline, UnixStream::set_write_timeout)?;
        let number = slot.to_le_bytes();
        let (part, fds) = ([IoSlice::new(&number)], [memory.as_raw_fd()]);
        let with = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        // Four bytes go out whole or not at all.
        sendmsg::<()>(self.stream.as_raw_fd(), &part, &with, flags, None)
            .map(drop)
            .map_err(|errno| self.failed(DOING, errno.into()))
    }

    fn read(
        &mut self,
        mut bytes: &mut [u8],
        doing: &'static str,
        deadline: Instant,
    ) -> Result<(), OffloadError> {
        while !bytes.is_empty() {
            self.within(doing, deadline, UnixStream::set_read_timeout)?;
            match (&self.stream).read(bytes) {
                Ok(0) => return Err(OffloadError::Closed { doing }),
                Ok(count) => bytes = &mut bytes[count..],
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(self.failed(doing, err)),
            }
        }
        Ok(())
    }

    fn write(
        &mut self,
        mut bytes: &[u8],
        doing: &'static str,
        deadline: Instant,
    ) -> Result<(), OffloadError> {
        while !bytes.is_empty() {
            self.within(doing, deadline, UnixStream::set_write_timeout)?;
            match (&self.stream).write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(self.failed(doing, err)),
            }
        }
        Ok(())
    }

    /// Lets the next call on the socket wait until `deadline` at most.
    fn within(
        &self,
        doing: &'static str,
        deadline: Instant,
        set: fn(&UnixStream, Option<Duration>) -> io::Result<()>,
    ) -> Result<(), OffloadError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.late(doing));
        }
        set(&self.stream, Some(left)).map_err(|source| OffloadError::Socket { doing, source })
    }

    fn late(&self, doing: &'static str) -> OffloadError {
        let waited = self.since.elapsed();
        OffloadError::TimedOut { doing, waited }
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> OffloadError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.late(doing),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                OffloadError::Closed { doing }
            }
            _ => OffloadError::Socket { doing, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proto::units::Mib;

    use super::super::codec::{Command, SLOT_BYTES};
    use super::*;
    use crate::pager::memory::GuestMemory;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn memory() -> GuestMemory {
        GuestMemory::create(Mib(1)).expect("memfd")
    }

    #[test]
    fn a_guest_goes_over_whole_and_is_kept_or_not() {
        let memory = memory();
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let same = memory.as_fd().try_clone_to_owned().expect("a clone");
        let giver = thread::spawn(move || {
            let given = give(theirs, &[7, 2], same.as_fd(), b"machine", soon())?;
            given.state(same.as_fd(), b"devices", soon())
        });
        let taken = take(ours, memory.as_fd(), soon()).expect("taken");
        assert_eq!(taken.slots, [7, 2]);
        assert_eq!(
            (&taken.config[..], &taken.state[..]),
            (&b"machine"[..], &b"devices"[..])
        );
        taken.held.keep_it();
        let outcome = giver.join().expect("no panic");
        let command = Command::CompletePaused;
        assert!(
            matches!(outcome, Err(OffloadError::Refused { command: refused }) if refused == command),
            "{outcome:?}"
        );
    }

    #[test]
    fn memory_of_another_guest_is_refused() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let other = memory();
        let giver =
            thread::spawn(move || give(theirs, &[0], other.as_fd(), b"{}", soon()).map(drop));
        let refused = take(ours, memory().as_fd(), soon()).expect_err("foreign");
        assert!(
            matches!(refused, OffloadError::ForeignMemory { slot: 0 }),
            "{refused}"
        );
        assert!(giver.join().expect("no panic").is_err());
    }

    #[test]
    fn a_slot_without_its_descriptor_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs
            .write_all(&Request::new(Command::Start, 0).encode())
            .expect("sent");
        let slot = Request::new(Command::MemoryFd, SLOT_BYTES).encode();
        theirs.write_all(&slot).expect("sent");
        theirs.write_all(&[0; 4]).expect("sent");
        let refused = take(ours, memory().as_fd(), soon()).expect_err("none");
        assert!(
            matches!(refused, OffloadError::ForeignMemory { .. }),
            "{refused}"
        );
    }

    #[test]
    fn a_vmm_that_falls_silent_or_goes_away_is_not_waited_for() {
        let (ours, silent) = UnixStream::pair().expect("a pair");
        let brief = Instant::now() + Duration::from_millis(20);
        let late = take(ours, memory().as_fd(), brief).expect_err("silent");
        assert!(matches!(late, OffloadError::TimedOut { .. }), "{late}");
        drop(silent);
        let (ours, gone) = UnixStream::pair().expect("a pair");
        drop(gone);
        let memory = memory();
        let closed = give(ours, &[0], memory.as_fd(), b"{}", soon()).expect_err("gone");
        assert!(matches!(closed, OffloadError::Closed { .. }), "{closed}");
    }
}
