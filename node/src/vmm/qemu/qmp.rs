//! QEMU's management protocol over an inherited socket: one JSON object a line.
//!
//! One command is under way at a time, and whoever runs it reads the socket; there is no reader
//! thread. Each command carries a number, so the late answer to one that was given up is known as
//! such and dropped. Events that arrive in between are kept, the newest [`MAX_EVENTS`] of them.
//!
//! QEMU may die in mid-line, and a guest that took it over may write anything: a line that is not
//! JSON is skipped, one without an end is cut at [`MAX_LINE_BYTES`] and fails the command in
//! whose time it came, and the end of the stream is [`QmpError::Closed`] for every later call.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

/// The longest line believed. Answers to the commands we send have a few hundred bytes.
pub const MAX_LINE_BYTES: usize = 256 * 1024;
/// Events kept for [`Qmp::events`]. A guest can cause them, so the oldest give way.
pub const MAX_EVENTS: usize = 64;
/// Bytes asked of the socket at once.
const READ_BYTES: usize = 4096;

/// Why a command was not carried out, as far as we know.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU understood and said no.
    #[error("QEMU refused `{command}`: {reason}")]
    Refused {
        /// What it was told.
        command: &'static str,
        /// In QEMU's words.
        reason: String,
    },
    /// No answer in time; the command may still take effect.
    #[error("QEMU did not answer `{command}` within {waited:?}")]
    TimedOut {
        /// What it was told.
        command: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU is dead or dying: its end of the socket is closed.
    #[error("QEMU closed its socket before it answered `{command}`")]
    Closed {
        /// What it was told.
        command: &'static str,
    },
    /// What came in the answer's place was longer than any answer.
    #[error("QEMU answered `{command}` with a line of more than {MAX_LINE_BYTES} bytes")]
    LineTooLong {
        /// What it was told.
        command: &'static str,
    },
    /// The socket failed otherwise.
    #[error("talk to QEMU about `{command}`")]
    Socket {
        /// What it was told.
        command: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Something QEMU reported by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Such as `SHUTDOWN`.
    pub name: String,
    /// Its details; `null` if it has none.
    pub data: Value,
}

/// A conversation with one QEMU, past its handshake.
#[derive(Debug)]
pub struct Qmp {
    version: String,
    /// Taken out by whoever runs a command, so that others can wait with a deadline.
    line: Mutex<Option<Line>>,
    free: Condvar,
    events: Mutex<VecDeque<Event>>,
}

impl Qmp {
    /// Shakes hands over `stream`.
    ///
    /// # Errors
    /// QEMU died, fell silent, or is not QEMU.
    pub fn connect(stream: UnixStream, deadline: Instant) -> Result<Self, QmpError> {
        const COMMAND: &str = "qmp_capabilities";
        let started = Instant::now();
        let mut line = Line::new(stream);
        let mut qmp = Self {
            version: String::new(),
            line: Mutex::new(None),
            free: Condvar::new(),
            events: Mutex::default(),
        };
        qmp.version = loop {
            let said = line
                .read(deadline)
                .map_err(|broken| broken.during(COMMAND, started))?;
            if let Some(greeting) = said.get("QMP") {
                break version_in(greeting);
            }
        };
        qmp.converse(&mut line, COMMAND, json!({}), None, deadline)?;
        qmp.line = Mutex::new(Some(line));
        Ok(qmp)
    }

    /// The version in QEMU's greeting, such as `7.2.22`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Runs one command and returns what QEMU returned.
    ///
    /// # Errors
    /// See [`QmpError`]. After `TimedOut` and `LineTooLong` the command may yet take effect, and
    /// the conversation goes on.
    pub fn execute(
        &self,
        command: &'static str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, None, deadline)
    }

    /// As [`Self::execute`], and hands `fd` over with the command.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn execute_with_fd(
        &self,
        command: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, Some(fd), deadline)
    }

    fn run(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let started = Instant::now();
        let Some(mut line) = self.take(deadline) else {
            return Err(QmpError::TimedOut {
                command,
                waited: started.elapsed(),
            });
        };
        let outcome = self.converse(&mut line, command, arguments, fd, deadline);
        self.put_back(line);
        outcome
    }

    /// Reads what has arrived by itself, until the stream ends or `deadline`.
    pub fn drain(&self, deadline: Instant) {
        let Some(mut line) = self.take(deadline) else {
            return;
        };
        loop {
            match line.read(deadline) {
                Ok(said) => self.note_event(&said),
                Err(Broken::TooLong) => {}
                Err(Broken::TimedOut | Broken::Closed | Broken::Socket(_)) => break,
            }
        }
        self.put_back(line);
    }

    /// The newest events, oldest first.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().cloned().collect()
    }

    fn converse(
        &self,
        line: &mut Line,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let started = Instant::now();
        let id = line.next_id;
        line.next_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        line.write(&request, fd, deadline)
            .map_err(|broken| broken.during(command, started))?;
        loop {
            let mut said = line
                .read(deadline)
                .map_err(|broken| broken.during(command, started))?;
            if said.get("id").and_then(Value::as_u64) != Some(id) {
                self.note_event(&said);
            } else if let Some(returned) = said.get_mut("return") {
                return Ok(returned.take());
            } else if let Some(error) = said.get("error") {
                let reason = error.get("desc").and_then(Value::as_str);
                return Err(QmpError::Refused {
                    command,
                    reason: reason.unwrap_or("no reason given").to_owned(),
                });
            }
        }
    }

    fn note_event(&self, said: &Value) {
        let Some(name) = said.get("event").and_then(Value::as_str) else {
            return;
        };
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(Event {
            name: name.to_owned(),
            data: said.get("data").cloned().unwrap_or_default(),
        });
    }

    fn take(&self, deadline: Instant) -> Option<Line> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(line) = line.take() {
                return Some(line);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.free.wait_timeout(line, left);
            line = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn put_back(&self, line: Line) {
        *self.line.lock().unwrap_or_else(PoisonError::into_inner) = Some(line);
        self.free.notify_one();
    }
}

/// How reading or writing a line can break.
#[derive(Debug)]
enum Broken {
    TimedOut,
    Closed,
    TooLong,
    Socket(io::Error),
}

impl Broken {
    fn during(self, command: &'static str, started: Instant) -> QmpError {
        match self {
            Self::TimedOut => QmpError::TimedOut {
                command,
                waited: started.elapsed(),
            },
            Self::Closed => QmpError::Closed { command },
            Self::TooLong => QmpError::LineTooLong { command },
            Self::Socket(source) => QmpError::Socket { command, source },
        }
    }
}

impl From<io::Error> for Broken {
    fn from(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Socket(source),
        }
    }
}

/// The socket, cut into lines.
#[derive(Debug)]
struct Line {
    stream: UnixStream,
    /// Read and not yet used; never longer than a line and one read.
    pending: Vec<u8>,
    /// The present line was too long: it is thrown away up to its end.
    skipping: bool,
    next_id: u64,
}

impl Line {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            pending: Vec::new(),
            skipping: false,
            next_id: 1,
        }
    }

    /// The next line that is JSON.
    fn read(&mut self, deadline: Instant) -> Result<Value, Broken> {
        loop {
            let line = self.read_bytes(deadline)?;
            if let Ok(said) = serde_json::from_slice(&line) {
                return Ok(said);
            }
        }
    }

    fn read_bytes(&mut self, deadline: Instant) -> Result<Vec<u8>, Broken> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.pending[searched..].iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=searched + at).collect();
                if std::mem::take(&mut self.skipping) {
                    return Err(Broken::TooLong);
                }
                return Ok(line);
            }
            if self.pending.len() > MAX_LINE_BYTES {
                self.pending = Vec::new();
                self.skipping = true;
            }
            searched = if self.skipping { 0 } else { self.pending.len() };
            if self.skipping {
                self.pending.clear();
            }
            self.fill(deadline)?;
        }
    }

    fn fill(&mut self, deadline: Instant) -> Result<(), Broken> {
        self.stream.set_read_timeout(Some(time_left(deadline)?))?;
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(Broken::Closed),
            Ok(count) => {
                self.pending.extend_from_slice(&bytes[..count]);
                Ok(())
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    fn write(
        &mut self,
        request: &Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), Broken> {
        let mut line = request.to_string();
        line.push('\n');
        self.stream.set_write_timeout(Some(time_left(deadline)?))?;
        let sent = match fd {
            Some(fd) => send_with_fd(&self.stream, line.as_bytes(), fd)?,
            None => 0,
        };
        Ok(self.stream.write_all(&line.as_bytes()[sent..])?)
    }
}

/// Sends the beginning of `bytes`, and `fd` with it. Returns how many bytes have gone.
fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd.as_raw_fd()];
    loop {
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Err(Errno::EINTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// The time left until `deadline`, which is never zero: to a socket, zero means for ever.
fn time_left(deadline: Instant) -> Result<Duration, Broken> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(Broken::TimedOut)
    } else {
        Ok(left)
    }
}

fn version_in(greeting: &Value) -> String {
    let qemu = &greeting["version"]["qemu"];
    let part = |name| qemu[name].as_u64().unwrap_or(0);
    format!("{}.{}.{}", part("major"), part("minor"), part("micro"))
}
