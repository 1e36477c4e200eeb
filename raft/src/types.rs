//! The types openraft is instantiated with.
//!
//! Proposals and answers are opaque bytes here; what they mean is the [`Machine`]'s business. The
//! serde derives are a bound openraft sets: nothing on our disks or wires is written by serde, see
//! `codec.rs`.
//!
//! [`Machine`]: crate::machine::Machine

use std::fmt;
use std::sync::Arc;

use openraft::impls::leader_id_adv::LeaderId;
use openraft::type_config::alias::{
    CommittedLeaderIdOf, EntryOf, LogIdOf, SnapshotMetaOf, StoredMembershipOf, VoteOf,
};
use proto::ids::NodeKey;
use serde::{Deserialize, Serialize};

openraft::declare_raft_types!(
    /// Our choices for openraft's type parameters.
    pub Types:
        D = ProposalBytes,
        R = AnswerBytes,
        NodeId = u64,
        Node = Node,
);

/// Position of an entry: who led, in which term, and the index.
pub type LogId = LogIdOf<Types>;
/// A vote given, or the leader accepted.
pub type Vote = VoteOf<Types>;
/// A log entry.
pub type Entry = EntryOf<Types>;
/// A membership and the entry that brought it.
pub type StoredMembership = StoredMembershipOf<Types>;
/// Voters and learners.
pub type Membership = openraft::Membership<u64, Node>;
/// What a snapshot covers.
pub type SnapshotMeta = SnapshotMetaOf<Types>;
/// A leader: term and node.
pub(crate) type Leader = LeaderId<u64, u64>;
/// The part of a [`LogId`] that names the leader.
pub(crate) type CommittedLeader = CommittedLeaderIdOf<Types>;

/// An encoded proposal; clones share the bytes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProposalBytes(pub Arc<[u8]>);

impl fmt::Debug for ProposalBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProposalBytes({})", self.0.len())
    }
}

impl fmt::Display for ProposalBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// An encoded answer; empty for entries that are not proposals.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerBytes(pub Vec<u8>);

impl fmt::Debug for AnswerBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnswerBytes({})", self.0.len())
    }
}

/// The random identity of the disk that holds a node's log. A node that comes back under its id
/// but on another disk has forgotten what it voted for, and must not be let in.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskId(pub [u8; 16]);

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskId({self})")
    }
}

/// What the membership records of each member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Where other members reach it.
    pub address: String,
    /// SHA-256 of its public key: a connection counts as this member only under this key.
    pub key: [u8; 32],
    /// The disk its log lies on; [`Group::open`](crate::group::Group::open) fills it in for the
    /// node itself.
    pub disk: DiskId,
}

impl Node {
    /// A node whose disk is not known yet.
    #[must_use]
    pub fn new(address: impl Into<String>, key: NodeKey) -> Self {
        Self {
            address: address.into(),
            key: key.0,
            disk: DiskId::default(),
        }
    }
}
