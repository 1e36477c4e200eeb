//! What a shim answers, on behalf of one VMM.
//!
//! One thread a client, at most [`MAX_CLIENTS`]; a client that sends nonsense loses its own
//! connection and nothing else. Nothing here polls: a client that waits for the end sleeps on a
//! pipe whose other end is closed when the end is known, and on its own socket, so that it is let
//! go when it hangs up.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proto::wire::shim::request::Call;
use proto::wire::shim::response::Answer;
use proto::wire::shim::{self as wire, Request, Response};

use crate::base::chain::chain;
use crate::pager::handle::Pager;
use crate::shim::console::BoundedLog;
use crate::shim::error::StopError;
use crate::shim::exit::ExitRecord;
use crate::shim::files;
use crate::shim::protocol;
use crate::shim::save::{Saver, Stand};
use crate::vmm::process::poll_timeout;

/// Clients served at once. The daemon needs three (one waits for the exit, and one for a freeze of
/// a guest bound to a lease); a second daemon, a
/// person with a tool and some that hang leave room to spare.
pub const MAX_CLIENTS: usize = 16;
/// Longest wait for a client's next byte. The daemon opens a connection for each call.
const CLIENT_SILENCE: Duration = Duration::from_secs(30);
/// Longest grace a stop may ask for.
const MAX_GRACE: Duration = Duration::from_secs(600);
/// Longest wait for the VMM to take a command that ends it, before it is killed.
const TELL_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for a killed VMM to be gone: freeing a large guest's memory takes a while.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the pager's counters, which it tells within microseconds. One that is being
/// replaced has none.
const COUNTERS_TIMEOUT: Duration = Duration::from_millis(200);
/// Pause after the kernel had no descriptor or thread for a new client.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Stack of a client's thread: a frame is on the heap, and calls go a few levels deep.
const STACK_BYTES: usize = 128 * 1024;

/// The end of a VMM as it is told to all who wait for it.
#[derive(Debug)]
pub struct Ending {
    asked: AtomicBool,
    record: OnceLock<ExitRecord>,
    /// Its far end is closed when `record` is set.
    known: PipeReader,
    open: Mutex<Option<PipeWriter>>,
}

impl Ending {
    /// An end that has not come.
    ///
    /// # Errors
    /// The kernel has no descriptors to give.
    pub fn new() -> io::Result<Self> {
        let (known, open) = io::pipe()?;
        Ok(Self {
            asked: AtomicBool::new(false),
            record: OnceLock::new(),
            known,
            open: Mutex::new(Some(open)),
        })
    }

    /// Whether somebody asked for it.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Tells everybody.
    pub fn announce(&self, record: ExitRecord) {
        let _first = self.record.set(record);
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Waits for the end, until `deadline` if there is one, and as long as `client` stays.
    fn wait(
        &self,
        deadline: Option<Instant>,
        client: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<&ExitRecord>> {
        loop {
            if let Some(record) = self.record.get() {
                return Ok(Some(record));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let mut wakers = vec![PollFd::new(self.known.as_fd(), PollFlags::POLLIN)];
            // Asked for nothing, `poll` still tells of a hang-up.
            wakers.extend(client.map(|client| PollFd::new(client, PollFlags::empty())));
            match poll(&mut wakers, left.map(poll_timeout)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if wakers
                .get(1)
                .is_some_and(|client| client.any() == Some(true))
            {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
    }

    /// Waits for `change` or the end. Returns whether `client` hung up before either.
    fn until(&self, change: BorrowedFd<'_>, client: BorrowedFd<'_>) -> io::Result<bool> {
        loop {
            let mut wakers = [
                PollFd::new(change, PollFlags::POLLIN),
                PollFd::new(self.known.as_fd(), PollFlags::POLLIN),
                PollFd::new(client, PollFlags::empty()),
            ];
            match poll(&mut wakers, PollTimeout::NONE) {
                Ok(_) => {
                    let [changed, ended, _] = wakers.map(|waker| waker.any() == Some(true));
                    return Ok(!changed && !ended);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A shim's answering half.
pub struct Server {
    status: wire::Status,
    saver: Saver,
    /// Of a guest whose memory comes as it is touched.
    pager: Option<Arc<Pager>>,
    ending: Ending,
    clients: Mutex<Clients>,
    quiet: Condvar,
}

#[derive(Debug, Default)]
struct Clients {
    connected: usize,
    /// Of those, how many are owed an answer.
    asking: usize,
}

impl Server {
    /// A server that answers for the guest of `saver`, to whom `pager` may bring its memory.
    ///
    /// # Errors
    /// The kernel has no descriptors to give.
    pub fn new(
        status: wire::Status,
        saver: Saver,
        pager: Option<Arc<Pager>>,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            status,
            saver,
            pager,
            ending: Ending::new()?,
            clients: Mutex::default(),
            quiet: Condvar::new(),
        }))
    }

    /// The end of the VMM, as its clients see it.
    #[must_use]
    pub fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Serves whoever connects, for ever.
    pub fn accept_all(self: &Arc<Self>, listener: &UnixListener) {
        for client in listener.incoming() {
            let started = client.and_then(|client| self.start(client));
            if started.is_err() {
                thread::sleep(ACCEPT_BACKOFF);
            }
        }
    }

    /// Waits until no client is owed an answer, or `deadline`.
    pub fn wait_quiet(&self, deadline: Instant) {
        let mut clients = self.lock();
        while clients.asking > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.quiet.wait_timeout(clients, left);
            clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn start(self: &Arc<Self>, client: UnixStream) -> io::Result<()> {
        {
            let mut clients = self.lock();
            if clients.connected == MAX_CLIENTS {
                // Closing tells it; the daemon tries again.
                return Ok(());
            }
            clients.connected += 1;
        }
        let connected = Connected(Arc::clone(self));
        thread::Builder::new()
            .name("client".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // However it ends, this client alone is affected.
                let _ended = connected.0.serve(client);
            })
            .map(drop)
    }

    fn serve(&self, mut client: UnixStream) -> Result<(), protocol::FrameError> {
        client.set_read_timeout(Some(CLIENT_SILENCE))?;
        client.set_write_timeout(Some(CLIENT_SILENCE))?;
        while let Some(request) = protocol::read::<Request>(&mut client)? {
            let _asking = Asking::new(self);
            let answer = self.answer(request, client.as_fd())?;
            protocol::write(
                &mut client,
                &Response {
                    answer: Some(answer),
                },
            )?;
        }
        Ok(())
    }

    fn answer(&self, request: Request, client: BorrowedFd<'_>) -> io::Result<Answer> {
        Ok(match request.call {
            // A shim on its way out is not alive: what became of the guest is on disk.
            Some(Call::Hello(wire::Hello {})) if self.ending.record.get().is_some() => {
                failure(ENDED)
            }
            Some(Call::Hello(wire::Hello {})) => Answer::Status(wire::Status {
                paging: self.paging(),
                ..self.status()
            }),
            Some(Call::WaitFreeze(wire::WaitFreeze { frozen })) => {
                self.wait_freeze(frozen, client)?
            }
            Some(Call::WaitExit(wire::WaitExit {})) => {
                match self.ending.wait(None, Some(client))? {
                    Some(record) => Answer::Exit(record.into()),
                    None => failure("the wait ended early"),
                }
            }
            Some(Call::Stop(wire::Stop { grace_ms })) => {
                let grace = Duration::from_millis(u64::from(grace_ms)).min(MAX_GRACE);
                match self.stop(grace) {
                    Ok(record) => Answer::Exit(record.into()),
                    Err(err) => failure(&chain(&err)),
                }
            }
            Some(Call::Save(order)) => self.save(order),
            Some(Call::Thaw(wire::Thaw { sealed })) => self.thaw(sealed),
            Some(Call::Ready(wire::Ready {})) => {
                if let Some(pager) = &self.pager {
                    pager.mark_ready();
                }
                Answer::Status(self.status())
            }
            None => failure("this shim does not know the request"),
        })
    }

    fn status(&self) -> wire::Status {
        let stand = wire::Stand::from(&self.saver.stand());
        wire::Status {
            frozen: self.saver.frozen().get(),
            stand: stand.into(),
            ..self.status.clone()
        }
    }

    /// How the guest's memory comes; `None` for one that has all of it.
    fn paging(&self) -> Option<wire::Paging> {
        let pager = self.pager.as_ref()?;
        let told = pager.stats(Instant::now() + COUNTERS_TIMEOUT);
        Some(wire::Paging {
            pager_pid: pager.pid(),
            resident_bytes: self.saver.resident_bytes(),
            counters: told.ok().map(wire::PagerCounters::from),
        })
    }

    fn save(&self, order: wire::Save) -> Answer {
        let timeout = Duration::from_millis(u64::from(order.timeout_ms));
        match self.saver.save(timeout, order.since_resume) {
            Ok(saved) => Answer::Saved(saved),
            Err(err) => failure(&chain(&err)),
        }
    }

    fn thaw(&self, sealed: bool) -> Answer {
        match self.saver.thaw(sealed) {
            Ok(()) => Answer::Status(self.status()),
            Err(err) => failure(&chain(&err)),
        }
    }

    /// Waits until `frozen` is not `known` any more, as long as `client` stays.
    fn wait_freeze(&self, known: bool, client: BorrowedFd<'_>) -> io::Result<Answer> {
        if let Some(change) = self.saver.frozen().change_from(known)? {
            let hung_up = self.ending.until(change.as_fd(), client)?;
            if hung_up {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
        Ok(match self.ending.record.get() {
            Some(_) => failure(ENDED),
            None => Answer::Status(self.status()),
        })
    }

    /// Presses the power button, and after `grace` ends the VMM: by its own hand if it still
    /// listens (it then closes its disk properly), by ours if not; a frozen one hears nothing and
    /// is killed. A guest that stands still hears no button: it is not given the grace. A caller
    /// that hangs up does not stop the stopping.
    fn stop(&self, grace: Duration) -> Result<&ExitRecord, StopError> {
        self.ending.asked.store(true, Ordering::Release);
        if self.saver.frozen().get() {
            return self.kill();
        }
        if !grace.is_zero() && self.saver.stand() == Stand::Running {
            // A VMM that cannot be told will be killed below.
            let _told = self.saver.vmm().shutdown(Instant::now() + TELL_TIMEOUT);
            if let Some(record) = self.ended_within(grace) {
                return Ok(record);
            }
        }
        let why = match self.saver.vmm().quit(Instant::now() + TELL_TIMEOUT) {
            Ok(()) => match self.ended_within(TELL_TIMEOUT) {
                Some(record) => return Ok(record),
                None => format!("it did not end within {TELL_TIMEOUT:?}"),
            },
            Err(err) => chain(&err),
        };
        let line = format!("the VMM was told to quit, and is killed: {why}\n");
        BoundedLog::new(self.saver.dir(), files::LOG).append(line.as_bytes());
        self.kill()
    }

    fn kill(&self) -> Result<&ExitRecord, StopError> {
        self.saver.vmm().kill()?;
        self.ended_within(KILL_TIMEOUT).ok_or(StopError::Lingers {
            waited: KILL_TIMEOUT,
        })
    }

    fn ended_within(&self, timeout: Duration) -> Option<&ExitRecord> {
        self.ending
            .wait(Some(Instant::now() + timeout), None)
            .ok()
            .flatten()
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a client is told that asks for the living.
const ENDED: &str = "the VMM has ended";

fn failure(message: &str) -> Answer {
    Answer::Failure(wire::Failure {
        message: message.to_owned(),
    })
}

/// One connected client; its place is given back however its thread ends.
struct Connected(Arc<Server>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.lock().connected -= 1;
    }
}

/// One request under way.
struct Asking<'a>(&'a Server);

impl<'a> Asking<'a> {
    fn new(server: &'a Server) -> Self {
        server.lock().asking += 1;
        Self(server)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.lock().asking -= 1;
        self.0.quiet.notify_all();
    }
}

#[cfg(test)]
mod tests;
