//! Making the guest ready to be sealed, and undoing that.
//!
//! ```text
//! gate closed, served connections told to finish → requests inside have been answered (bounded)
//! → sync → page cache dropped? → workload frozen → sync of what it wrote meanwhile → disk frozen?
//! ```
//!
//! The long parts, the first sync and the dropping, happen while the workload runs; what it reads
//! again in between is what it needs. Whatever goes wrong undoes all of it; so does the watchdog,
//! should the host die before it seals the guest or says otherwise. A guest that is quiesced may be
//! quiesced again.
//!
//! Why the agent cannot lock itself up: it runs in no frozen control group; it writes to no disk by
//! itself (its own file, its log and its notes are in memory); the disk is frozen only when none of
//! its requests may be writing to it, and the workload only when none is about to fork.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use proto::epoch::Epoch;
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::{Instant, timeout_at};

use super::hold::{HoldError, Turn, Workload};
use super::lineage::StaleEpoch;
use super::machine::Machine;
use super::watchdog::Watchdog;
use super::{Busy, Snapshots};
use crate::connections::ConnectionId;
use crate::log;

/// How long requests inside may take to be answered before the guest is quiesced around them. What
/// is not answered by then is sealed in the middle of its work, and its connection is cut later.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long dropping the page cache may take before it is left to end by itself: it only makes the
/// snapshot smaller.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(1);
/// Bounds on what a caller may ask for; inside them, the caller knows best.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(120);
/// What a caller gets that does not say how long it may take.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// When the watchdog goes off, unless the caller says otherwise: later than any pause and resume
/// that will still succeed, as far as the guest runs during them.
pub const DEFAULT_UNDO_AFTER: Duration = Duration::from_secs(60);
/// The longest a workload may stand still before it is let go.
pub const MAX_UNDO_AFTER: Duration = Duration::from_secs(600);

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Under which ownership.
    pub epoch: Option<Epoch>,
    /// Whether the workload is to be frozen.
    pub freeze_workload: bool,
    /// Whether the root disk is to be frozen.
    pub freeze_disk: bool,
    /// Whether the page cache is to be dropped.
    pub reclaim: bool,
    /// How long all of it may take.
    pub timeout: Duration,
    /// After how long of running, from the answer on, it is undone.
    pub undo_after: Duration,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiesced {
    /// How still the workload stands.
    pub workload: Workload,
    /// Whether the disk is frozen.
    pub disk_frozen: bool,
    /// Connections that are left open because something streams on them.
    pub streams: usize,
    /// Requests that were not answered in time.
    pub unfinished: usize,
    /// How long the workload stands still already.
    pub still_for: Duration,
    /// How long all of it took.
    pub took: Duration,
}

/// Why the guest is not quiesced.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// Another order is being carried out.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Somebody else owns the sandbox by now.
    #[error(transparent)]
    Stale(#[from] StaleEpoch),
    /// Requests are under way around which it must not be done.
    #[error("{count} requests are {doing}")]
    Inside {
        /// How many.
        count: usize,
        /// What they do.
        doing: &'static str,
    },
    /// The workload or the disk could not be held.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// It took longer than it might.
    #[error("not quiesced within {waited:?}")]
    TimedOut {
        /// How long it might have taken.
        waited: Duration,
    },
    /// There is no thread for it.
    #[error("start the watchdog")]
    Watchdog(#[source] io::Error),
    /// The part that blocks ended without a word.
    #[error("sync and freeze")]
    Panicked(#[source] tokio::task::JoinError),
}

/// What the part that blocks has done.
struct Stopped {
    workload: Workload,
    since: Instant,
}

impl Snapshots {
    /// Quiesces the guest on the word of connection `own`.
    ///
    /// # Errors
    /// [`QuiesceError`]; then nothing is held.
    pub async fn quiesce(&self, order: Order, own: ConnectionId) -> Result<Quiesced, QuiesceError> {
        let began = Instant::now();
        let deadline = began + order.timeout.min(MAX_TIMEOUT);
        let mut lineage = self.turn().await?;
        lineage.admit(order.epoch)?;
        let turn = self.begin(&order)?;
        self.finish_served().await;
        let done = timeout_at(deadline, self.still(order, turn, deadline)).await;
        let waited = order.timeout;
        let done = done.unwrap_or(Err(QuiesceError::TimedOut { waited }));
        let (stopped, unfinished) = match done {
            Ok(done) => done,
            Err(err) => {
                self.let_go().await;
                return Err(err);
            }
        };
        Ok(Quiesced {
            workload: stopped.workload,
            disk_frozen: order.freeze_disk,
            streams: self.connections.open_except(own),
            unfinished,
            still_for: stopped.since.elapsed(),
            took: began.elapsed(),
        })
    }

    /// Drops the page cache where it is large enough for a snapshot without it to be worth more than
    /// the reading of files anew. Tells whether it did.
    ///
    /// # Errors
    /// What the kernel said.
    pub async fn reclaim(&self) -> io::Result<bool> {
        let machine = Arc::clone(&self.machine);
        let reclaim = move || {
            if !machine.memory()?.caches_much() {
                return Ok(false);
            }
            // Dirty pages are not dropped.
            machine.sync();
            machine.reclaim()?;
            Ok(true)
        };
        spawn_blocking(reclaim).await.map_err(io::Error::other)?
    }

    /// What hosts get that ask for no more: everything written so far is on the disk, and idle
    /// connections are closed.
    ///
    /// # Errors
    /// When the thread that waits for the disks could not run.
    pub async fn prepare(&self) -> io::Result<()> {
        self.finish_served().await;
        let machine = Arc::clone(&self.machine);
        spawn_blocking(move || machine.sync())
            .await
            .map_err(io::Error::other)
    }

    /// Has each connection end with what it is at.
    async fn finish_served(&self) {
        self.connections.finish_served();
        // The asking connection hears of it before the answer is written, and says so in it.
        yield_now().await;
    }

    /// Undoes a quiesce, and sets the clock if told to: the guest may have stood still meanwhile.
    /// Tells whether there was anything to undo.
    ///
    /// # Errors
    /// [`QuiesceError::Busy`] or [`QuiesceError::Stale`]; then nothing has changed.
    pub async fn undo(
        &self,
        epoch: Option<Epoch>,
        now: Option<Timestamp>,
    ) -> Result<bool, QuiesceError> {
        let received = Instant::now();
        let mut lineage = self.turn().await?;
        lineage.admit(epoch)?;
        let was_closed = self.gate.is_closed();
        if let Some(now) = now {
            let now = now.saturating_add(received.elapsed()).unwrap_or(now);
            if let Err(err) = self.machine.set_clock(now) {
                log!("set the clock: {err}");
            }
        }
        self.let_go().await;
        Ok(was_closed)
    }

    fn begin(&self, order: &Order) -> Result<Turn, QuiesceError> {
        // While it is under way, its own time limit undoes it; the watchdog is for the case that
        // its caller vanishes and takes it along.
        let limit = order.timeout.min(MAX_TIMEOUT) + order.undo_after.min(MAX_UNDO_AFTER);
        let begun = self.hold.begin(|turn| self.watchdog(turn, limit));
        begun.map_err(QuiesceError::Watchdog)
    }

    fn watchdog(&self, turn: Turn, limit: Duration) -> io::Result<Watchdog> {
        let hold = Arc::clone(&self.hold);
        Watchdog::start(limit, move || {
            if hold.expire(turn) {
                log!("nobody sealed or thawed the guest within {limit:?}; thawed it");
            }
        })
    }

    async fn still(
        &self,
        order: Order,
        turn: Turn,
        deadline: Instant,
    ) -> Result<(Stopped, usize), QuiesceError> {
        let settled_by = deadline.min(Instant::now() + SETTLE_TIMEOUT);
        let inside = self.gate.settle(settled_by).await;
        for (wanted, count, doing) in [
            (order.freeze_workload, inside.forks, "starting a process"),
            (order.freeze_disk, inside.work, "at work on files"),
        ] {
            if wanted && count > 0 {
                return Err(QuiesceError::Inside { count, doing });
            }
        }
        let (hold, machine) = (Arc::clone(&self.hold), Arc::clone(&self.machine));
        let stop = move || {
            machine.sync();
            if order.reclaim {
                reclaim(Arc::clone(&machine));
            }
            let mut stopped = Stopped {
                workload: Workload::Free,
                since: Instant::now(),
            };
            if order.freeze_workload {
                stopped.workload = hold.freeze_workload(turn)?;
                machine.sync();
            }
            if order.freeze_disk {
                hold.freeze_disk(turn)?;
            }
            Ok::<_, HoldError>(stopped)
        };
        let stopped = spawn_blocking(stop)
            .await
            .map_err(QuiesceError::Panicked)??;
        let watchdog = self.watchdog(turn, order.undo_after.min(MAX_UNDO_AFTER));
        let watchdog = watchdog.map_err(QuiesceError::Watchdog)?;
        self.hold.watch(turn, watchdog)?;
        Ok((stopped, inside.forks + inside.work))
    }

    /// Lets the guest go on as if nothing had been.
    async fn let_go(&self) {
        let hold = Arc::clone(&self.hold);
        // The kernel answers at once, but it is a disk all the same.
        if let Err(err) = spawn_blocking(move || hold.release()).await {
            log!("let the guest go: {err}");
        }
    }
}

/// Drops the page cache, and waits for it no longer than it is worth. A failure is no reason not to
/// go on: the snapshot is larger then, and no worse.
fn reclaim(machine: Arc<dyn Machine>) {
    let (tell, told) = mpsc::channel();
    // Whoever asked may have gone on.
    let drop_it = move || drop(tell.send(machine.reclaim()));
    if let Err(err) = thread::Builder::new().spawn(drop_it) {
        return log!("drop the page cache: {err}");
    }
    match told.recv_timeout(RECLAIM_TIMEOUT) {
        Ok(Ok(())) => {}
        Ok(Err(err)) => log!("drop the page cache: {err}"),
        Err(_) => log!("dropping the page cache takes longer than {RECLAIM_TIMEOUT:?}"),
    }
}
