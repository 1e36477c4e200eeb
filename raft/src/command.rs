//! Every change there is.
//!
//! A command names what it creates by an id that the proposer chose, so proposing it again after
//! a lost answer finds the first one's work and answers the same: no command acts twice.

use proto::epoch::Epoch;
use proto::ids::{KeyId, NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use crate::placement::Lack;
use crate::state::{GuestVersions, Key, Node, SandboxSpec, Template};

/// A command and the proposer's clock when it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The proposer's wall clock. The state machine has none of its own.
    pub at: Stamp,
    /// What to do.
    pub command: Command,
}

/// One change of the replicated state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Adds a node, or replaces what is known of it (address, capacity, versions).
    AdmitNode(Node),
    /// Adds a template or replaces the one of that name.
    PutTemplate(Template),
    /// Adds an API key.
    PutKey(Key),
    /// Makes a key useless at once and for ever.
    RevokeKey(KeyId),
    /// Places a new sandbox and gives its ownership out.
    CreateSandbox {
        /// Chosen by the proposer.
        id: SandboxId,
        /// Whose it is.
        team: TeamId,
        /// What it asks for.
        spec: SandboxSpec,
    },
    /// From now on the sandbox is wanted stopped.
    StopSandbox {
        /// Which one.
        id: SandboxId,
        /// Who wanted it.
        cause: StopCause,
    },
    /// What the owner saw.
    ReportSandbox {
        /// Which one.
        id: SandboxId,
        /// Under which ownership it was seen.
        epoch: Epoch,
        /// Who saw it.
        node: NodeId,
        /// What was seen.
        report: Report,
    },
    /// Forgets sandboxes that ended before an instant.
    PruneSandboxes {
        /// Everything that ended earlier goes.
        ended_before: Stamp,
    },
}

/// Why a sandbox is to be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// A client asked.
    Asked,
    /// Its inactivity timeout passed.
    Idle,
}

/// What the owner of a sandbox saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The guest answered and is ready for work.
    Running(GuestVersions),
    /// Everything it used is released; `reason` is empty when a stop was asked for.
    Stopped {
        /// Why it ended, for people.
        reason: String,
    },
    /// It could not be started, or it broke; everything it used is released.
    Failed {
        /// What broke, for people.
        reason: String,
    },
}

/// What applying a command gave.
pub type Answer = Result<Receipt, Refusal>;

/// A command that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// Done; the count of objects it touched where that is of interest.
    Done(u64),
    /// The sandbox belongs to this node under this epoch.
    Placed {
        /// The owner.
        node: NodeId,
        /// Its fencing token.
        epoch: Epoch,
    },
}

/// A command that does not fit the state it met. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The log holds bytes that no version of this program wrote.
    #[error("the command could not be read: {0}")]
    Unreadable(String),
    /// No sandbox of that id.
    #[error("no capsule {0}")]
    NoSuchSandbox(String),
    /// No template of that name.
    #[error("no template {0:?}")]
    NoSuchTemplate(String),
    /// No key of that id.
    #[error("no API key {0}")]
    NoSuchKey(String),
    /// No node has room for it.
    #[error("no host can take this capsule: {0}")]
    NoRoom(Lack),
    /// The id stands for something else already.
    #[error("the id {0} is taken")]
    IdTaken(String),
    /// The effect was made under an ownership that is no longer the newest.
    #[error("epoch is over; the newest is {newest}")]
    Fenced {
        /// The epoch that now counts.
        newest: Epoch,
    },
}
