//! The guest's half of pause and resume.
//!
//! ```text
//! quiesce ── sealed, stopped, started elsewhere ──> restore ──> the workload runs
//!    │                                                 (another clock, other random numbers, no
//!    ├── undo: the pause failed                         connection of the past life)
//!    └── watchdog: the host died
//! ```
//!
//! Orders come over HTTP ([`crate::http::snapshot`]) and are carried out one at a time. What holds
//! throughout: between quiesce and restore no instruction of the workload runs, where there are
//! control groups to freeze it with; no request is begun; and nothing stays frozen for ever in a
//! guest whose host has died ([`watchdog`]).
//!
//! | file | what it knows |
//! |---|---|
//! | [`gate`] | which requests may begin |
//! | [`hold`] | what is frozen, and how it is let go |
//! | [`lineage`] | which word of the host is the newest (pure) |
//! | [`machine`] | the machine that is changed, behind a trait |
//! | [`identity`] | what must differ between two forks |

pub mod gate;
pub mod hold;
pub mod identity;
pub mod lineage;
pub mod machine;
pub mod quiesce;
pub mod restore;
pub mod watchdog;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;

use crate::boot::cgroup::Groups;
use crate::connections::{ConnectionId, Connections};
use gate::Gate;
use hold::Hold;
use lineage::Lineage;
use machine::Machine;

/// How long an order waits for the one before it.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);

/// Another order is being carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another snapshot order is in progress")]
pub struct Busy;

/// The state that the orders share.
#[derive(Debug)]
pub struct Snapshots {
    /// Who may begin something.
    pub gate: Arc<Gate>,
    /// The open connections.
    pub connections: Arc<Connections>,
    hold: Arc<Hold>,
    machine: Arc<dyn Machine>,
    /// Held by the one order that is being carried out.
    lineage: Mutex<Lineage>,
}

impl Snapshots {
    /// A guest that was never sealed.
    #[must_use]
    pub fn new(machine: Arc<dyn Machine>, groups: Groups) -> Self {
        let gate = Arc::<Gate>::default();
        let hold = Hold::new(Arc::clone(&machine), groups, Arc::clone(&gate));
        Self {
            gate,
            connections: Arc::default(),
            hold: Arc::new(hold),
            machine,
            lineage: Mutex::default(),
        }
    }

    /// Lets the disk go, so that it can be written to; the workload stays as it is.
    pub fn before_init(&self) {
        if self.gate.is_closed() {
            self.hold.end_turn();
        }
    }

    /// Lets everything go after an `/init` that came over connection `own`: to hosts that know no
    /// other word, it says that a resume is done.
    pub fn after_init(&self, own: ConnectionId) {
        if self.gate.is_closed() {
            self.connections.cut_before(own);
            self.hold.release_to(own);
        }
    }

    /// Lets everything go, because the guest ends: a frozen workload cannot end in order, and a
    /// frozen disk cannot be let go of.
    pub fn release(&self) {
        self.hold.release();
    }

    async fn turn(&self) -> Result<MutexGuard<'_, Lineage>, Busy> {
        timeout(TURN_TIMEOUT, self.lineage.lock())
            .await
            .map_err(|_| Busy)
    }
}
