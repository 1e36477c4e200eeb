//! Why a sandbox's guest cannot be reached.

use proto::ids::{NodeId, SandboxId};
use raft::state::Phase;

use crate::base::remedy::Remedy;

/// Why a sandbox's guest cannot be reached.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelayError {
    /// There is no such sandbox.
    #[error("no capsule {0}")]
    NoSuchSandbox(SandboxId),
    /// It is not running, so there is nobody to talk to.
    #[error("capsule {id} is {}, not running", phase_word(*.phase))]
    NotRunning {
        /// Which one.
        id: SandboxId,
        /// Where it stands.
        phase: Phase,
    },
    /// Its owner is not to be reached from here.
    #[error("{node}, the host of capsule {id}, cannot be reached")]
    OwnerUnreachable {
        /// Which one.
        id: SandboxId,
        /// Who owns it.
        node: NodeId,
    },
}

impl RelayError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::NoSuchSandbox(_) => Remedy::NotThere,
            Self::NotRunning { .. } => Remedy::WrongState,
            Self::OwnerUnreachable { .. } => Remedy::RetryLater,
        }
    }
}

/// The phase in the word that clients know.
const fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Error => "in error",
    }
}
