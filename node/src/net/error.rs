//! What can go wrong with network slots, and who must act on it.

use std::io;
use std::path::PathBuf;

use crate::base::remedy::Remedy;
use crate::net::slot::{Serial, SlotIndex};

/// Why a network slot could not be had, kept or given back.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A slot tag that cannot be part of interface names.
    #[error("slot tag {0:?} is not one to four of a-z and 0-9")]
    BadTag(String),
    /// A network that is not written as one.
    #[error("{0:?} is not an IPv4 network such as 10.1.0.0/16 with all host bits zero")]
    BadNet(String),
    /// A slot range that runs past the last index.
    #[error("{count} slots from index {base} on run past index {}", u16::MAX)]
    BadRange {
        /// First index of the range.
        base: u16,
        /// How many indexes it has.
        count: u16,
    },
    /// Every index of this node is in use.
    #[error("all {count} network slots of this node are in use")]
    Exhausted {
        /// How many slots the node may have.
        count: u16,
    },
    /// The slot is not one this pool has given out or found.
    #[error("slot {0} is not held by a sandbox of this node")]
    NotHeld(Serial),
    /// The slot on record does not exist on this host, or has another index.
    #[error("slot {serial} with index {index} does not exist on this host")]
    Gone {
        /// The serial on record.
        serial: Serial,
        /// The index on record.
        index: SlotIndex,
    },
    /// The kernel refused one operation.
    #[error("{doing} {subject}")]
    Kernel {
        /// What was being done, as a verb phrase.
        doing: &'static str,
        /// What it was done to.
        subject: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file that remembers used serials failed.
    #[error("keep used slot serials in {path}")]
    Serials {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// The pool's task has ended.
    #[error("the slot pool has stopped")]
    Stopped,
}

impl NetError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::BadTag(_) | Self::BadNet(_) | Self::BadRange { .. } => Remedy::FixRequest,
            Self::Exhausted { .. } | Self::Stopped => Remedy::RetryLater,
            Self::NotHeld(_) => Remedy::WrongState,
            Self::Gone { .. } => Remedy::NotThere,
            Self::Kernel { .. } | Self::Serials { .. } => Remedy::CallOperator,
        }
    }

    /// Wraps what the kernel said to `doing` something to `subject`.
    pub(crate) fn kernel<E: Into<io::Error>>(
        doing: &'static str,
        subject: impl ToString,
    ) -> impl FnOnce(E) -> Self {
        let subject = subject.to_string();
        move |err| Self::Kernel {
            doing,
            subject,
            source: err.into(),
        }
    }
}
