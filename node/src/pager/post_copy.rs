//! Bringing pages that the VMM itself asks for, where no pager may watch over its page faults.
//!
//! ```text
//! question (peeked) ─> page of the image ─> its window put ─> question taken ─> "there"
//! ```
//!
//! Cloud Hypervisor can notice its guest's missing pages by itself and ask for each over a socket,
//! one at a time; between faults it asks for all others in turn, until it has asked for every page.
//! It is told *that* a page is there, never its bytes: those are written into the guest's memory,
//! which it has mapped. [`super::inject`] needs less work and less memory, and is not permitted
//! everywhere; this needs no right at all. Two threads write ahead of it, so that most questions are
//! about pages that are there. A window that they cannot have is left to whoever is asked for it, and
//! his failure ends the guest: nothing but a hole is ever taken for one.
//!
//! Pages are made by `pwrite` alone: it shows no half of one. A page of a hole is made only when
//! it is asked for a second time: the VMM asks for every page once, and a guest that touches one
//! asks again, since a page that does not exist cannot be woken to.
//!
//! A question stays in the socket until its page is there, so a pager may die over it. Between
//! taking it and answering lie two system calls; whoever takes over therefore brings everything
//! first, and then says "there" once if nothing is asked: true of any page by then.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use crate::pager::region::{ImageOffset, PAGE_BYTES, PageIndex, WINDOW_BYTES, WindowIndex, index};
use crate::pager::serve::{OnFailure, ServeError, new_scratch};
use crate::pager::source::{Content, PageSource, Scratch};
use crate::pager::states::{PageState, StateTable};
use crate::pager::stats::{Counters, add};

/// Length of a question: a header of 16 bytes and the page's address and length.
pub const QUESTION_BYTES: usize = 32;
/// Length of an answer.
pub const ANSWER_BYTES: usize = 16;
/// The number of a question in its first two bytes.
const QUESTION: u16 = 9;
/// What follows a header, as it says.
const RANGE_BYTES: u64 = 16;
/// "It is there", and nothing follows.
const THERE: [u8; ANSWER_BYTES] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A page that nothing is in.
const EMPTY: [u8; 4096] = [0; 4096];
const _: () = assert!(EMPTY.len() as u64 == PAGE_BYTES);
/// Threads that write ahead: one decodes while the kernel makes pages for the other.
const PUSHERS: usize = 2;
/// Pause between two looks for a page that somebody else is just writing, which takes some 50 µs.
const NAP: Duration = Duration::from_micros(20);
/// Stack of a thread: buffers are on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// Where the guest sees a part of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its first address there.
    pub gpa: u64,
    /// Its length.
    pub bytes: u64,
    /// Where it begins in the image.
    pub image: u64,
}

/// The questions of a VMM, and what their addresses mean.
#[derive(Debug)]
pub struct Questions {
    /// The connection.
    pub stream: UnixStream,
    /// The guest's memory, as it sees it.
    pub slots: Vec<Slot>,
}

/// The page that `question` is about, or why it makes no sense.
///
/// # Errors
/// It is no question, or about something that is no page of the guest.
pub fn page_in(question: &[u8; QUESTION_BYTES], slots: &[Slot]) -> Result<PageIndex, &'static str> {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&question[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if u16::from_le_bytes([question[0], question[1]]) != QUESTION || number(8) != RANGE_BYTES {
        return Err("it is no question for a page");
    }
    let (gpa, bytes) = (number(16), number(24));
    if bytes != PAGE_BYTES || gpa % PAGE_BYTES != 0 {
        return Err("it asks for something else than a page");
    }
    let slot = slots
        .iter()
        .find(|slot| gpa >= slot.gpa && gpa - slot.gpa < slot.bytes);
    let slot = slot.ok_or("it asks for a page that the guest does not have")?;
    Ok(ImageOffset(slot.image + (gpa - slot.gpa)).page())
}

/// Everything that answering one VMM takes. Shared by all threads that do.
pub struct Answerer {
    questions: Questions,
    memory: File,
    table: Arc<StateTable>,
    source: Box<dyn PageSource>,
    counters: Counters,
    /// Which pages were asked for, a bit each.
    asked: Vec<AtomicU64>,
    next_push: AtomicU64,
    pushed: Mutex<Pushed>,
    on_failure: OnFailure,
}

/// How far the writing ahead has come.
#[derive(Debug, Default)]
struct Pushed {
    /// Threads that have been through all windows.
    ended: usize,
    /// Windows that they could not have, and that nobody has written since.
    left: BTreeSet<u64>,
}

impl Answerer {
    /// Answers `questions` about `memory` from `source`. Nothing runs yet.
    ///
    /// # Errors
    /// The memory's descriptor cannot be kept.
    pub fn new(
        questions: Questions,
        memory: BorrowedFd<'_>,
        table: Arc<StateTable>,
        source: Box<dyn PageSource>,
        on_failure: OnFailure,
    ) -> io::Result<Self> {
        let words = table.region().pages().div_ceil(u64::BITS.into());
        Ok(Self {
            questions,
            memory: File::from(memory.try_clone_to_owned()?),
            table,
            source,
            counters: Counters::default(),
            asked: (0..words).map(|_| AtomicU64::new(0)).collect(),
            next_push: AtomicU64::new(0),
            pushed: Mutex::default(),
            on_failure,
        })
    }

    /// Starts the threads. `in_doubt` says that another pager has answered before, of which nobody
    /// knows how far it came with its last question.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(self: &Arc<Self>, in_doubt: bool) -> Result<(), ServeError> {
        for _ in 0..PUSHERS {
            self.spawn("push", Self::push_all)?;
        }
        self.spawn("answer", move |it| it.answer_all(in_doubt))
    }

    /// The counters.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// True once all of the image has been written.
    #[must_use]
    pub fn pushing_done(&self) -> bool {
        let pushed = self.pushed();
        pushed.ended == PUSHERS && pushed.left.is_empty()
    }

    fn pushed(&self) -> MutexGuard<'_, Pushed> {
        self.pushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(&Self) -> Result<(), ServeError> + Send + 'static,
    ) -> Result<(), ServeError> {
        let shared = Arc::clone(self);
        let run = move || {
            if let Err(err) = work(&shared) {
                (shared.on_failure)(err);
            }
        };
        let spawned = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(run);
        let doing = "start a thread";
        spawned
            .map(drop)
            .map_err(|source| ServeError::Kernel { doing, source })
    }

    fn answer_all(&self, in_doubt: bool) -> Result<(), ServeError> {
        let doing = "answer the VMM";
        let failed = |source| ServeError::Kernel { doing, source };
        let mut scratch = new_scratch()?;
        if in_doubt {
            self.write_rest(&mut scratch)?;
            if nothing_asked(&self.questions.stream) {
                (&self.questions.stream).write_all(&THERE).map_err(failed)?;
            }
        }
        while let Some(question) = peek(&self.questions.stream).map_err(failed)? {
            let since = Instant::now();
            let page = page_in(&question, &self.questions.slots);
            let page = page.map_err(|why| failed(io::Error::other(why)))?;
            add(&self.counters.faults, 1);
            self.bring(page, &mut scratch)?;
            let mut stream = &self.questions.stream;
            let mut taken = [0; QUESTION_BYTES];
            let done = stream
                .read_exact(&mut taken)
                .and_then(|()| stream.write_all(&THERE));
            self.counters.latency.record(since.elapsed());
            match done {
                Ok(()) => {}
                // It needs no more answers.
                Err(err) if has_ended(&err) => return Ok(()),
                Err(err) => return Err(failed(err)),
            }
        }
        Ok(())
    }

    /// Waits until all windows were tried, and writes those that could not be had.
    fn write_rest(&self, scratch: &mut Scratch) -> Result<(), ServeError> {
        while self.pushed().ended < PUSHERS {
            thread::sleep(NAP);
        }
        let left = self.pushed().left.clone();
        left.into_iter().try_for_each(|window| {
            let window = WindowIndex(window);
            self.write_window(window, true, scratch).map(drop)
        })
    }

    /// Has `page` be there, unless nothing is in it.
    fn bring(&self, page: PageIndex, scratch: &mut Scratch) -> Result<(), ServeError> {
        loop {
            let found = self.write_window(page.window(), true, scratch)?;
            while self.table.get(page) == PageState::Filling {
                thread::sleep(NAP);
            }
            // One that was given up by a thread that could not have it is no hole: it is ours to write,
            // and ours to fail.
            if found == Some(Content::Hole) || self.table.get(page) == PageState::Present {
                break;
            }
        }
        if self.was_asked(page) && !self.exists(page)? {
            // A hole, or given back by the guest.
            add(&self.counters.zero_bytes, PAGE_BYTES);
            self.write(page.offset(), &EMPTY)?;
            let _already = self.table.claim(page);
            self.table.settle(page);
        }
        Ok(())
    }

    /// Writes what of `window` is absent. A hole stays one. What cannot be had is an error where it
    /// is `needed`, and else noted, and left for the day it is. Returns what stands in it, or `None`
    /// where that was not found out.
    fn write_window(
        &self,
        window: WindowIndex,
        needed: bool,
        scratch: &mut Scratch,
    ) -> Result<Option<Content>, ServeError> {
        let pages = self.table.region().pages_of(window);
        let claimed: Vec<PageIndex> = pages
            .map(PageIndex)
            .filter(|page| self.table.claim(*page))
            .collect();
        if claimed.is_empty() {
            return Ok(None);
        }
        let here = self.source.read_here(window, scratch);
        let is_peers = here.is_none();
        let content = match here {
            Some(content) => Ok(content),
            None => self.source.read(window, None, scratch),
        };
        let give_up = || claimed.iter().for_each(|page| self.table.give_up(*page));
        match content {
            Ok(Content::Bytes) => {}
            Ok(Content::Hole) => {
                give_up();
                self.pushed().left.remove(&window.0);
                return Ok(Some(Content::Hole));
            }
            Err(err) if needed => {
                give_up();
                return Err(err.into());
            }
            Err(_) => {
                // Noted first: whoever writes the last page of it then takes it off the list.
                self.pushed().left.insert(window.0);
                give_up();
                return Ok(None);
            }
        }
        for &page in &claimed {
            let at = index(page.offset().0 - window.offset().0);
            let bytes = &scratch.window[at..at + index(PAGE_BYTES)];
            self.write(page.offset(), bytes)?;
            self.table.settle(page);
        }
        let counter = match is_peers {
            true => &self.counters.peer_bytes,
            false => &self.counters.local_bytes,
        };
        add(counter, claimed.len() as u64 * PAGE_BYTES);
        self.strike_off(window);
        Ok(Some(Content::Bytes))
    }

    /// Takes `window` off the list of those that are left, if all of it is there.
    fn strike_off(&self, window: WindowIndex) {
        let mut pages = self.table.region().pages_of(window).map(PageIndex);
        if pages.all(|page| self.table.get(page) == PageState::Present) {
            self.pushed().left.remove(&window.0);
        }
    }

    fn push_all(&self) -> Result<(), ServeError> {
        let mut scratch = new_scratch()?;
        let windows = self.table.region().bytes().div_ceil(WINDOW_BYTES);
        loop {
            let window = self.next_push.fetch_add(1, Ordering::Relaxed);
            if window >= windows {
                break;
            }
            self.write_window(WindowIndex(window), false, &mut scratch)?;
            add(&self.counters.pushed_windows, 1);
        }
        self.pushed().ended += 1;
        Ok(())
    }

    /// Whether it was asked for before; from now on it was.
    fn was_asked(&self, page: PageIndex) -> bool {
        let (word, bit) = (page.0 / u64::from(u64::BITS), page.0 % u64::from(u64::BITS));
        let Some(word) = self.asked.get(index(word)) else {
            return true;
        };
        word.fetch_or(1 << bit, Ordering::Relaxed) & 1 << bit != 0
    }

    fn exists(&self, page: PageIndex) -> Result<bool, ServeError> {
        let doing = "look for a page of the guest";
        let failed = |source| ServeError::Kernel { doing, source };
        let at = i64::try_from(page.offset().0).map_err(|err| failed(io::Error::other(err)))?;
        match lseek(&self.memory, at, Whence::SeekData) {
            Ok(found) => Ok(found == at),
            Err(Errno::ENXIO) => Ok(false),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    fn write(&self, at: ImageOffset, bytes: &[u8]) -> Result<(), ServeError> {
        let doing = "write a page of the guest";
        let failed = |source| ServeError::Kernel { doing, source };
        self.memory.write_all_at(bytes, at.0).map_err(failed)
    }
}

/// The next question, which stays where it is; `None` once there will be none.
fn peek(stream: &UnixStream) -> io::Result<Option<[u8; QUESTION_BYTES]>> {
    let mut question = [0; QUESTION_BYTES];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
    loop {
        match recv(stream.as_raw_fd(), &mut question, flags) {
            Ok(QUESTION_BYTES) => return Ok(Some(question)),
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(None),
            // Half of one, and no more is to come or it is just being written.
            Ok(_) => thread::sleep(NAP),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn nothing_asked(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
}

fn has_ended(err: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(err.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

impl Questions {
    /// The same, for a pager that is started.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// What a pager was given.
    pub(super) fn of_parts(stream: OwnedFd, slots: Vec<Slot>) -> Self {
        Self {
            stream: UnixStream::from(stream),
            slots,
        }
    }
}

#[cfg(test)]
mod tests;
