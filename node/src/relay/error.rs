//! Why a sandbox's guest cannot be reached, sorted by who must act.

use std::error::Error;
use std::io;

use jiff::Timestamp;
use proto::ids::SandboxId;
use proto::units::Stamp;
use raft::state::Phase;

use super::peers::PeerError;
use super::refusal::Refusal;
use super::remote::Target;
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
    /// Its guest is not ready, or is about to end: the record will say so in a moment.
    #[error("the guest of capsule {id} is not ready")]
    NotReady {
        /// Which one.
        id: SandboxId,
    },
    /// Its ownership has just changed, and not every node knows.
    #[error("capsule {id} has just moved; try again")]
    Moved {
        /// Which one.
        id: SandboxId,
    },
    /// Its owner is not to be reached from here; nothing was done.
    #[error("{host}, the host of capsule {id}, cannot be reached{}: {why}", since_when(*.since))]
    HostUnreachable {
        /// Which one.
        id: SandboxId,
        /// The owner's name.
        host: String,
        /// Since when the cluster has not heard of the owner, where it has noticed.
        since: Option<Stamp>,
        /// What was tried.
        why: String,
    },
    /// The way to its owner broke under a request.
    #[error(
        "the connection to {host}, the host of capsule {id}, broke; what was asked may have happened"
    )]
    HostLost {
        /// Which one.
        id: SandboxId,
        /// The owner's name.
        host: String,
    },
    /// Its guest stands still until its owner hears of the cluster again.
    #[error("capsule {id} stands still: {host}, its host, lost touch with the cluster")]
    Frozen {
        /// Which one.
        id: SandboxId,
        /// The owner's name.
        host: String,
    },
    /// Its owner relays as many streams as it can.
    #[error("{host}, the host of capsule {id}, relays as many streams as it can")]
    Busy {
        /// Which one.
        id: SandboxId,
        /// The owner's name.
        host: String,
    },
    /// Its owner is there and its guest is not.
    #[error("the guest of capsule {id} takes no connection: {why}")]
    Guest {
        /// Which one.
        id: SandboxId,
        /// What the owner saw.
        why: String,
    },
    /// The two nodes do not understand each other.
    #[error("{host}, the host of capsule {id}, does not understand this node: {why}")]
    Misunderstood {
        /// Which one.
        id: SandboxId,
        /// The owner's name.
        host: String,
        /// What it said.
        why: String,
    },
}

impl RelayError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::NoSuchSandbox(_) => Remedy::NotThere,
            Self::NotRunning { .. } => Remedy::WrongState,
            Self::NotReady { .. }
            | Self::Moved { .. }
            | Self::HostUnreachable { .. }
            | Self::HostLost { .. }
            | Self::Frozen { .. }
            | Self::Busy { .. } => Remedy::RetryLater,
            Self::Guest { .. } => Remedy::BlameGuest,
            Self::Misunderstood { .. } => Remedy::CallOperator,
        }
    }

    /// Whether nothing at all was done, so that asking again cannot act twice.
    #[must_use]
    pub const fn nothing_happened(&self) -> bool {
        !matches!(self, Self::HostLost { .. })
    }

    /// The one that lies somewhere among the causes of `err`: the guest's client wraps what its
    /// dialler said.
    #[must_use]
    pub fn among_causes<'a>(err: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(err);
        while let Some(err) = next {
            // An I/O error shows the source of what it wraps, and not what it wraps.
            let wrapped = err.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let found = err.downcast_ref().or_else(|| wrapped?.downcast_ref());
            if found.is_some() {
                return found;
            }
            next = err.source();
        }
        None
    }

    /// What an owner's refusal means to whoever asked for the sandbox.
    pub(super) fn refused(target: &Target, refusal: Refusal) -> Self {
        let (id, host) = (target.id, target.host.clone());
        match refusal {
            Refusal::NoSuchSandbox => Self::NoSuchSandbox(id),
            Refusal::NotReady => Self::NotReady { id },
            Refusal::NotOwner | Refusal::StaleEpoch { .. } | Refusal::Early => Self::Moved { id },
            Refusal::Frozen => Self::Frozen { id, host },
            Refusal::Busy => Self::Busy { id, host },
            Refusal::Guest(why) => Self::Guest { id, why },
            Refusal::Garbled(_) | Refusal::Version(_) => Self::Misunderstood {
                id,
                host,
                why: refusal.to_string(),
            },
        }
    }

    /// What a peer that cannot be asked means to whoever asked for the sandbox. For questions and
    /// openings, which do nothing that could not be done again.
    pub(super) fn unreachable(target: &Target, err: &PeerError) -> Self {
        Self::HostUnreachable {
            id: target.id,
            host: target.host.clone(),
            since: None,
            why: err.to_string(),
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
        Phase::Pausing => "pausing",
        Phase::Paused => "paused",
        Phase::Resuming => "resuming",
        Phase::Snapshotting => "snapshotting",
    }
}

/// For the end of a phrase.
fn since_when(since: Option<Stamp>) -> String {
    let at = since
        .and_then(|it| i64::try_from(it.0).ok())
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    at.map_or_else(String::new, |at| format!(" since {at}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("send the request")]
    struct Wrapper(#[source] io::Error);

    #[test]
    fn a_relay_error_is_found_under_io_errors_and_wrappers() {
        let id = SandboxId([1; 16]);
        let relay = RelayError::NotReady { id };
        let wrapped = Wrapper(io::Error::other(relay.clone()));
        assert_eq!(RelayError::among_causes(&wrapped), Some(&relay));
        let other = Wrapper(io::Error::other("something else"));
        assert_eq!(RelayError::among_causes(&other), None);
    }

    #[test]
    fn an_unreachable_host_is_named_with_since_when() {
        let err = RelayError::HostUnreachable {
            id: SandboxId::default(),
            host: "otter".into(),
            since: Some(Stamp(1_700_000_000_000)),
            why: "no answer".into(),
        };
        let told = err.to_string();
        assert!(
            told.contains("otter") && told.contains("since 2023-11-14T22:13:20Z"),
            "{told}"
        );
    }
}
