//! What can go wrong with a group, sorted by what the caller does next.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::ids::NodeId;

use crate::fault::Fault;
use crate::log::OpenLogError;
use crate::store::OpenStoreError;
use crate::types::{DiskId, Node};

/// Why a group cannot be opened. All but [`Self::InUse`] and [`Self::Config`] need an operator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it open.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The log was removed but the disk's identity is still there. This member has forgotten what
    /// it voted for: remove it from the cluster and let it join anew.
    #[error("the log in {} is gone: this node must join anew", .0.display())]
    LogGone(PathBuf),
    /// The reverse: a log whose identity was removed.
    #[error("{} is gone: this node must join anew", .0.display())]
    IdentityGone(PathBuf),
    /// The cluster knows this node with another disk.
    #[error("this node's disk is {here}, the cluster knows it by {known}: it must join anew")]
    OtherDisk {
        /// The identity found here.
        here: DiskId,
        /// The one in the membership.
        known: DiskId,
    },
    /// The log cannot be read.
    #[error("open the log in {}", .0.display())]
    Log(PathBuf, #[source] OpenLogError),
    /// No usable state.
    #[error("open the state")]
    Store(#[from] OpenStoreError),
    /// The disk refused.
    #[error("open {}", .0.display())]
    Disk(PathBuf, #[source] std::io::Error),
    /// A snapshot folder that cannot be used.
    #[error("open the snapshots")]
    Snapshots(#[source] Fault),
    /// Contradicting settings.
    #[error("the timeouts contradict each other: {0}")]
    Config(String),
    /// openraft refuses what it found.
    #[error("start raft: {0}")]
    Core(String),
}

/// Why a proposal brought no answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ProposeError {
    /// Definitely not taken: ask the leader, or, if none is known, try again soon.
    #[error("this node is not the leader")]
    NotLeader {
        /// Who is, as far as is known.
        leader: Option<(NodeId, Node)>,
    },
    /// Definitely not taken, nor will it ever be: the caller must make it smaller.
    #[error("a proposal of {bytes} bytes exceeds {limit}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The largest allowed.
        limit: usize,
    },
    /// The deadline passed. It may have been applied, or may still be: repeat it under the same
    /// request id.
    #[error("no answer before the deadline; the outcome is unknown")]
    Timeout,
    /// Leadership moved while it was under way; like [`Self::Timeout`].
    #[error("the leader changed; the outcome is unknown")]
    LeaderChanged,
    /// The group was shut down; like [`Self::Timeout`] for proposals that were under way.
    #[error("the group was shut down")]
    Stopped,
    /// This member is broken; the outcome is unknown. An operator must act.
    #[error("this node cannot go on")]
    Fatal(#[source] Arc<Fault>),
}

/// Why a read is not known to be current.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Ask the leader, or, if none is known, try again soon.
    #[error("this node is not the leader")]
    NotLeader {
        /// Who is, as far as is known.
        leader: Option<(NodeId, Node)>,
    },
    /// Too few voters answered.
    #[error("no quorum answers")]
    NoQuorum,
    /// The group was shut down.
    #[error("the group was shut down")]
    Stopped,
    /// This member is broken. An operator must act.
    #[error("this node cannot go on")]
    Fatal(#[source] Arc<Fault>),
}

/// Why the membership was not changed, or not surely.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// Definitely not taken: ask the leader, or, if none is known, try again soon.
    #[error("this node is not the leader")]
    NotLeader {
        /// Who is, as far as is known.
        leader: Option<(NodeId, Node)>,
    },
    /// Definitely not taken: look at the membership again and decide anew.
    #[error("the membership is not what the change was based on: {0}")]
    Conflict(String),
    /// Definitely not taken, nor will it ever be as it stands.
    #[error("the change makes no sense: {0}")]
    Refused(&'static str),
    /// Definitely not taken: too few of the voters there would be are answering.
    #[error("the voters {0} would have no quorum now")]
    NoQuorum(String),
    /// The deadline passed. The change goes on by itself as long as this node leads; it may be
    /// done, half done or never happen: look at the membership.
    #[error("no answer before the deadline; the outcome is unknown")]
    Timeout,
    /// Leadership moved while it was under way; like [`Self::Timeout`].
    #[error("the leader changed; the outcome is unknown")]
    LeaderChanged,
    /// The group was shut down; like [`Self::Timeout`] for what was under way.
    #[error("the group was shut down")]
    Stopped,
    /// This member is broken; the outcome is unknown. An operator must act.
    #[error("this node cannot go on")]
    Fatal(#[source] Arc<Fault>),
}

/// Why entries cannot be handed out.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EntriesError {
    /// The log begins later: a snapshot is needed first.
    #[error("the log no longer has the entries before {first}")]
    Purged {
        /// Where it begins.
        first: u64,
    },
    /// The group was shut down.
    #[error("the group was shut down")]
    Stopped,
    /// This member is broken; ask another one.
    #[error("this node cannot go on")]
    Fatal(#[source] Arc<Fault>),
}

/// Why there is no snapshot to hand out.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Nothing was applied yet, or writing takes long: ask again, or ask another member.
    #[error("there is no snapshot yet")]
    NotYet,
    /// The file cannot be opened; ask another member.
    #[error("open snapshot")]
    Disk(#[source] Arc<std::io::Error>),
    /// The group was shut down.
    #[error("the group was shut down")]
    Stopped,
    /// This member is broken; ask another one.
    #[error("this node cannot go on")]
    Fatal(#[source] Arc<Fault>),
}

/// Why a cluster of one could not be formed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// It did not become ready in time; trying again is safe.
    #[error("not ready after {0:?}")]
    TimedOut(Duration),
    /// The group was shut down.
    #[error("the group was shut down")]
    Stopped,
    /// This member is broken. An operator must act.
    #[error("this node cannot go on")]
    Fatal(#[source] Arc<Fault>),
}

/// Why the core answers no more.
pub(super) enum Ended {
    Stopped,
    Fault(Arc<Fault>),
}

impl From<Ended> for ProposeError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Stopped => Self::Stopped,
            Ended::Fault(fault) => Self::Fatal(fault),
        }
    }
}

impl From<Ended> for ReadError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Stopped => Self::Stopped,
            Ended::Fault(fault) => Self::Fatal(fault),
        }
    }
}

impl From<Ended> for BootstrapError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Stopped => Self::Stopped,
            Ended::Fault(fault) => Self::Fatal(fault),
        }
    }
}

impl From<Ended> for ChangeError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Stopped => Self::Stopped,
            Ended::Fault(fault) => Self::Fatal(fault),
        }
    }
}

impl From<Ended> for EntriesError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Stopped => Self::Stopped,
            Ended::Fault(fault) => Self::Fatal(fault),
        }
    }
}

impl From<Ended> for SnapshotError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Stopped => Self::Stopped,
            Ended::Fault(fault) => Self::Fatal(fault),
        }
    }
}
