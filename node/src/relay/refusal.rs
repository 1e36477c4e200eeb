//! Why an owner would not relay: named, so that the asking node can tell its client the truth.

use proto::epoch::Epoch;
use proto::wire::relay as pb;

use super::wire::short;

/// Why an owner would not relay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Garbled(String),
    /// It is of a version that is not spoken here.
    #[error("relay version {0} is not spoken")]
    Version(u32),
    /// No such sandbox is known.
    #[error("no such sandbox is known")]
    NoSuchSandbox,
    /// Another node owns it.
    #[error("another node owns the sandbox")]
    NotOwner,
    /// Its ownership has been given out anew.
    #[error("the epoch is over, the newest is {newest}")]
    StaleEpoch {
        /// The newest.
        newest: Epoch,
    },
    /// The owner's log has not got that far.
    #[error("the epoch is not known yet")]
    Early,
    /// Its guest is not ready, or is about to end.
    #[error("the guest is not ready")]
    NotReady,
    /// Its guest stands still.
    #[error("the guest stands still because its node lost touch with the cluster")]
    Frozen,
    /// The guest does not take the connection.
    #[error("the guest does not answer: {0}")]
    Guest(String),
    /// As many streams are relayed as may be.
    #[error("as many streams are relayed as may be")]
    Busy,
}

impl From<Refusal> for pb::Refusal {
    fn from(refusal: Refusal) -> Self {
        use pb::RefusalKind as Kind;
        let kind = match &refusal {
            Refusal::Garbled(_) => Kind::Garbled,
            Refusal::Version(_) => Kind::Version,
            Refusal::NoSuchSandbox => Kind::NoSuchSandbox,
            Refusal::NotOwner => Kind::NotOwner,
            Refusal::StaleEpoch { .. } => Kind::StaleEpoch,
            Refusal::Early => Kind::Early,
            Refusal::NotReady => Kind::NotReady,
            Refusal::Frozen => Kind::Frozen,
            Refusal::Guest(_) => Kind::Guest,
            Refusal::Busy => Kind::Busy,
        };
        let (detail, epoch) = match refusal {
            Refusal::Garbled(why) | Refusal::Guest(why) => (short(&why), 0),
            Refusal::Version(version) => (version.to_string(), 0),
            Refusal::StaleEpoch { newest } => (String::new(), newest.0),
            _ => (String::new(), 0),
        };
        Self {
            kind: kind.into(),
            detail,
            epoch,
        }
    }
}

impl From<pb::Refusal> for Refusal {
    fn from(refusal: pb::Refusal) -> Self {
        use pb::RefusalKind as Kind;
        let kind = refusal.kind();
        let detail = short(&refusal.detail);
        match kind {
            Kind::Version => Self::Version(detail.parse().unwrap_or(0)),
            Kind::NoSuchSandbox => Self::NoSuchSandbox,
            Kind::NotOwner => Self::NotOwner,
            Kind::StaleEpoch => Self::StaleEpoch {
                newest: Epoch(refusal.epoch),
            },
            Kind::Early => Self::Early,
            Kind::NotReady => Self::NotReady,
            Kind::Frozen => Self::Frozen,
            Kind::Guest => Self::Guest(detail),
            Kind::Busy => Self::Busy,
            // A kind of a later version is a no all the same.
            Kind::Garbled | Kind::Unspecified => Self::Garbled(detail),
        }
    }
}
