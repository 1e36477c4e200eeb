//! Changing the replicated state.
//!
//! A proposal that was answered is durable. One that timed out may still happen: it is *unknown*,
//! and the caller may propose the same command again, since every command is idempotent.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use raft::command::{Attributed, Command, Proposal, Receipt, Refusal};
use raft::state::Actor;
use raft::wire;
use tokio::sync::watch;

use super::view::{Seen, View};
use crate::base::clock::Clock;
use crate::base::remedy::Remedy;

/// Longest a proposal waits for a quorum. Far above a leader change (about a second), well below
/// the 30 s after which clients give up.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A future that owns what it needs.
pub type LogFuture = Pin<Box<dyn Future<Output = Result<Vec<u8>, LogError>> + Send>>;

/// A read's future.
pub type ReadFuture = Pin<Box<dyn Future<Output = Result<u64, LogError>> + Send>>;

/// Whatever orders and keeps proposals.
pub trait Log: fmt::Debug + Send + Sync + 'static {
    /// Appends a proposal and returns what applying it answered.
    fn propose(&self, proposal: Vec<u8>, timeout: Duration) -> LogFuture;

    /// Waits until the applied state here holds everything that was acknowledged anywhere before
    /// the call; returns the entry it has reached.
    fn read_index(&self, timeout: Duration) -> ReadFuture;

    /// The applied state, published after every batch.
    fn seen(&self) -> watch::Receiver<Seen>;
}

/// Why a proposal got no answer.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    /// The cluster has no leader that this node can reach; nothing was changed.
    #[error("no leader could be reached within {waited:?}: the cluster may have lost its quorum")]
    NoLeader {
        /// How long was waited.
        waited: Duration,
    },
    /// No quorum answered in time; the proposal may or may not happen.
    #[error("no quorum answered within {waited:?}; the change may still happen")]
    Unknown {
        /// How long was waited.
        waited: Duration,
    },
    /// This node is stopping, or its log is broken.
    #[error("this node's log has stopped: {0}")]
    Stopped(String),
}

/// Why a change was not made, or may not have been.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// The state machine said no; nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There was no answer.
    #[error(transparent)]
    Log(#[from] LogError),
}

impl ProposeError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Refused(refusal) => match refusal {
                Refusal::NoSuchSandbox(_)
                | Refusal::NoSuchTemplate(_)
                | Refusal::NoSuchSnapshot(_)
                | Refusal::NoSuchKey(_)
                | Refusal::NoSuchTeam(_)
                | Refusal::NoSuchMember(_)
                | Refusal::NoSuchNode(_)
                | Refusal::NoSuchToken(_)
                | Refusal::NoSuchBuild(_) => Remedy::NotThere,
                Refusal::NoRoom(_) => Remedy::RetryLater,
                Refusal::IdTaken(_)
                | Refusal::NameTaken(_)
                | Refusal::Fenced { .. }
                | Refusal::TokenExpired(_)
                | Refusal::TokenUsed(_)
                | Refusal::Unfit(_) => Remedy::WrongState,
                _ => Remedy::CallOperator,
            },
            Self::Log(LogError::Unknown { .. } | LogError::NoLeader { .. }) => Remedy::RetryLater,
            Self::Log(LogError::Stopped(_)) => Remedy::CallOperator,
        }
    }
}

/// The right to propose changes. Cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    log: Arc<dyn Log>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Proposer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proposer")
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

impl Proposer {
    /// Proposes to `log`, stamped by `clock`.
    #[must_use]
    pub fn new(log: Arc<dyn Log>, clock: Arc<dyn Clock>) -> Self {
        Self { log, clock }
    }

    /// A view of what the proposals lead to.
    #[must_use]
    pub fn view(&self) -> View {
        View::new(self.log.seen())
    }

    /// Waits until [`Self::view`] holds everything that was acknowledged anywhere before the call.
    ///
    /// # Errors
    /// [`LogError`]: no quorum could be asked in time.
    pub async fn linearize(&self) -> Result<u64, LogError> {
        self.log.read_index(PROPOSE_TIMEOUT).await
    }

    /// Makes one change; when this returns `Ok` it is durable.
    ///
    /// # Errors
    /// - [`ProposeError::Refused`]: nothing changed.
    /// - [`ProposeError::Log`]: unknown or impossible; see [`LogError`].
    pub async fn propose(&self, command: Command) -> Result<Receipt, ProposeError> {
        let answer = self.log.propose(self.stamped(command), PROPOSE_TIMEOUT);
        Ok(wire::decode_answer(&answer.await?)?)
    }

    /// The same for a change that `actor` asked for, which the audit log keeps.
    ///
    /// While nodes are left that could not read who asked, the change goes without; what they could
    /// not read at all is refused.
    ///
    /// # Errors
    /// As [`Self::propose`].
    pub async fn propose_by(&self, actor: Actor, change: Command) -> Result<Receipt, ProposeError> {
        if self.names_are_read() {
            let change = Box::new(change);
            return self
                .propose(Command::By(Attributed { actor, change }))
                .await;
        }
        if change.needs_readers() {
            let why = "some nodes run an earlier release, which knows no teams, members and scopes of \
                       keys: upgrade them, or remove those that are gone";
            return Err(Refusal::Unfit(why.into()).into());
        }
        self.propose(change).await
    }

    /// Whether every node reads `command`. Those of earlier releases would stop at some.
    #[must_use]
    pub fn is_read(&self, command: &Command) -> bool {
        !command.needs_readers() || self.names_are_read()
    }

    /// Once a change that names who asked is in the log, all nodes do.
    fn names_are_read(&self) -> bool {
        let state = self.view().state();
        state.keeps_audit() || state.nodes().all(|node| node.reads_actors)
    }

    /// `command` as it goes into the log, with the time it is now.
    pub(super) fn stamped(&self, command: Command) -> Vec<u8> {
        let at = self.clock.now();
        Proposal { at, command }.encode()
    }
}
