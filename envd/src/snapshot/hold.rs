//! What of the guest is held still: its requests, its workload and its disk; and letting go of all.
//!
//! Quiescing holds, step by step, on a thread that may block. Undoing, restoring and the watchdog
//! let go, from other threads, perhaps while such a step is under way or even stuck. Each quiesce
//! is therefore a *turn*: letting go ends the turn, and a step that finds its turn ended takes back
//! what it has just done. So nothing stays frozen that nobody would thaw, and a watchdog that goes
//! off too late finds its turn ended and lets nothing go.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::gate::Gate;
use super::machine::Machine;
use super::watchdog::Watchdog;
use crate::boot::cgroup::Groups;
use crate::connections::ConnectionId;
use crate::log;

/// How long the workload may take to stand still. A process in the middle of a system call that
/// does not end (a dead network file system) would take for ever.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// How still the workload stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// All of it.
    Frozen,
    /// Some of it is still on its way into the freezer, and runs no instruction of its own.
    Partly,
    /// It runs: freezing was not asked for, or there are no control groups to do it with.
    Free,
}

/// Nothing may be held any more: the quiesce was undone while it was under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("undone while it was under way")]
pub struct TurnOver;

/// Why something could not be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// It was undone meanwhile.
    #[error(transparent)]
    TurnOver(#[from] TurnOver),
    /// The kernel did not freeze the workload.
    #[error("freeze the workload")]
    Workload(#[source] io::Error),
    /// The kernel did not freeze the disk.
    #[error("freeze the root disk")]
    Disk(#[source] io::Error),
}

/// One quiesce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn(u64);

#[derive(Debug, Default)]
struct Held {
    turn: u64,
    workload: bool,
    disk: bool,
    watchdog: Option<Watchdog>,
}

/// The holder.
#[derive(Debug)]
pub struct Hold {
    machine: Arc<dyn Machine>,
    groups: Groups,
    gate: Arc<Gate>,
    held: Mutex<Held>,
}

impl Hold {
    /// A holder that holds nothing yet.
    #[must_use]
    pub fn new(machine: Arc<dyn Machine>, groups: Groups, gate: Arc<Gate>) -> Self {
        Self {
            machine,
            groups,
            gate,
            held: Mutex::default(),
        }
    }

    /// Begins a turn: closes the gate, with a watchdog over it that `watch` starts. What an earlier
    /// turn holds stays held.
    ///
    /// # Errors
    /// What `watch` said; then nothing has begun.
    pub fn begin(&self, watch: impl FnOnce(Turn) -> io::Result<Watchdog>) -> io::Result<Turn> {
        let mut held = self.lock();
        let turn = Turn(held.turn + 1);
        held.watchdog = Some(watch(turn)?);
        held.turn = turn.0;
        self.gate.close();
        Ok(turn)
    }

    /// Replaces the watchdog over `turn`: from now on its time counts anew.
    ///
    /// # Errors
    /// [`HoldError::TurnOver`].
    pub fn watch(&self, turn: Turn, watchdog: Watchdog) -> Result<(), HoldError> {
        let mut held = self.lock();
        held.check(turn)?;
        held.watchdog = Some(watchdog);
        Ok(())
    }

    /// Freezes the workload and waits, bounded, until it stands still. Blocks.
    ///
    /// # Errors
    /// [`HoldError`]; then nothing more is held than before.
    pub fn freeze_workload(&self, turn: Turn) -> Result<Workload, HoldError> {
        {
            let mut held = self.lock();
            held.check(turn)?;
            if !self.groups.freeze().map_err(HoldError::Workload)? {
                return Ok(Workload::Free);
            }
            held.workload = true;
        }
        let still = self.groups.await_frozen(FREEZE_TIMEOUT);
        if still.map_err(HoldError::Workload)? {
            Ok(Workload::Frozen)
        } else {
            Ok(Workload::Partly)
        }
    }

    /// Freezes the root disk. Blocks, for as long as the disk takes to write everything.
    ///
    /// # Errors
    /// [`HoldError`]; then nothing more is held than before.
    pub fn freeze_disk(&self, turn: Turn) -> Result<(), HoldError> {
        self.lock().check(turn)?;
        // Not under the lock: it may take long, and letting go must not wait for it.
        self.machine.freeze_disk().map_err(HoldError::Disk)?;
        let mut held = self.lock();
        if let Err(over) = held.check(turn) {
            self.thaw_disk();
            return Err(over.into());
        }
        held.disk = true;
        Ok(())
    }

    /// Ends the turn and lets the disk go, which whoever goes on needs first. Tells whether the
    /// workload is still held; [`Self::release_to`] lets it go.
    pub fn end_turn(&self) -> bool {
        let mut held = self.lock();
        self.end(&mut held);
        held.workload
    }

    /// Lets the workload run, and requests begin that came over connection `oldest` or later ones.
    pub fn release_to(&self, oldest: ConnectionId) {
        self.thaw_workload(&mut self.lock());
        self.gate.open_from(oldest);
    }

    /// Ends the turn and lets everything go.
    pub fn release(&self) {
        self.release_locked(&mut self.lock());
    }

    /// As [`Self::release`], unless `turn` has ended already; tells whether it had not.
    pub fn expire(&self, turn: Turn) -> bool {
        let mut held = self.lock();
        let in_time = held.check(turn).is_ok();
        if in_time {
            self.release_locked(&mut held);
        }
        in_time
    }

    fn release_locked(&self, held: &mut Held) {
        self.end(held);
        self.thaw_workload(held);
        self.gate.open();
    }

    fn end(&self, held: &mut Held) {
        held.turn += 1;
        held.watchdog = None;
        if std::mem::take(&mut held.disk) {
            self.thaw_disk();
        }
    }

    fn thaw_workload(&self, held: &mut Held) {
        if std::mem::take(&mut held.workload)
            && let Err(err) = self.groups.thaw()
        {
            log!("thaw the workload: {err}");
        }
    }

    fn thaw_disk(&self) {
        if let Err(err) = self.machine.thaw_disk() {
            log!("thaw the root disk: {err}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn check(&self, turn: Turn) -> Result<(), TurnOver> {
        if self.turn == turn.0 {
            Ok(())
        } else {
            Err(TurnOver)
        }
    }
}
