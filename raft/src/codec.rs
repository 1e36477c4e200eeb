//! openraft's values as our own messages, and back.
//!
//! Everything that reaches a disk or a wire goes through here, so an upgrade of openraft cannot
//! change a stored byte. Reading never panics: bytes come from disks and from other nodes.

use openraft::EntryPayload;
use prost::Message;
use proto::wire::raftlog as pb;

use crate::types::{
    CommittedLeader, DiskId, Entry, Leader, LogId, Membership, Node, ProposalBytes,
    StoredMembership, Vote,
};

/// Why stored or received bytes are no value of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadBytes(pub(crate) &'static str);

/// Reads a message.
pub(crate) fn decode<M: Message + Default>(
    what: &'static str,
    bytes: &[u8],
) -> Result<M, BadBytes> {
    M::decode(bytes).map_err(|_| BadBytes(what))
}

pub(crate) fn log_id_to_wire(id: &LogId) -> pb::LogId {
    pb::LogId {
        term: id.leader_id.term,
        leader: id.leader_id.node_id,
        index: id.index,
    }
}

pub(crate) fn log_id_from_wire(id: &pb::LogId) -> LogId {
    let leader = CommittedLeader {
        term: id.term,
        node_id: id.leader,
    };
    LogId::new(leader, id.index)
}

pub(crate) fn vote_to_wire(vote: &Vote) -> pb::Vote {
    pb::Vote {
        term: vote.leader_id.term,
        node: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub(crate) fn vote_from_wire(vote: &pb::Vote) -> Vote {
    Vote {
        leader_id: Leader {
            term: vote.term,
            node_id: vote.node,
        },
        committed: vote.committed,
    }
}

pub(crate) fn membership_to_wire(membership: &Membership) -> pb::Membership {
    let configs = membership.get_joint_config().iter();
    pb::Membership {
        configs: configs
            .map(|ids| pb::Voters {
                ids: ids.iter().copied().collect(),
            })
            .collect(),
        members: membership
            .nodes()
            .map(|(&id, node)| pb::Member {
                id,
                node: Some(node_to_wire(node)),
            })
            .collect(),
    }
}

fn node_to_wire(node: &Node) -> pb::Node {
    pb::Node {
        address: node.address.clone(),
        key: node.key.to_vec(),
        disk: node.disk.0.to_vec(),
    }
}

fn node_from_wire(node: pb::Node) -> Result<Node, BadBytes> {
    let key = node.key.try_into();
    let disk = node.disk.try_into();
    Ok(Node {
        address: node.address,
        key: key.map_err(|_| BadBytes("a member's key is not 32 bytes"))?,
        disk: DiskId(disk.map_err(|_| BadBytes("a member's disk identity is not 16 bytes"))?),
    })
}

pub(crate) fn membership_from_wire(wire: pb::Membership) -> Result<Membership, BadBytes> {
    let mut nodes = std::collections::BTreeMap::new();
    for member in wire.members {
        let node = member.node.ok_or(BadBytes("a member without a node"))?;
        nodes.insert(member.id, node_from_wire(node)?);
    }
    let configs = wire.configs.into_iter();
    let configs = configs.map(|config| config.ids.into_iter().collect());
    Membership::new(configs.collect(), nodes)
        .map_err(|_| BadBytes("a membership names a voter it does not know"))
}

pub(crate) fn stored_membership_to_wire(stored: &StoredMembership) -> pb::StoredMembership {
    pb::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_wire),
        membership: Some(membership_to_wire(stored.membership())),
    }
}

pub(crate) fn stored_membership_from_wire(
    wire: Option<pb::StoredMembership>,
) -> Result<StoredMembership, BadBytes> {
    let wire = wire.unwrap_or_default();
    let membership = membership_from_wire(wire.membership.unwrap_or_default())?;
    let log_id = wire.log_id.as_ref().map(log_id_from_wire);
    Ok(StoredMembership::new(log_id, membership))
}

pub(crate) fn entry_to_wire(entry: &Entry) -> pb::Entry {
    use pb::entry::Payload as Wire;
    pb::Entry {
        log_id: Some(log_id_to_wire(&entry.log_id)),
        payload: Some(match &entry.payload {
            EntryPayload::Blank => Wire::Blank(pb::Blank {}),
            EntryPayload::Normal(proposal) => Wire::Proposal(proposal.0.to_vec()),
            EntryPayload::Membership(membership) => {
                Wire::Membership(membership_to_wire(membership))
            }
        }),
    }
}

pub(crate) fn entry_from_wire(wire: pb::Entry) -> Result<Entry, BadBytes> {
    use pb::entry::Payload as Wire;
    let log_id = wire.log_id.ok_or(BadBytes("an entry without a position"))?;
    let payload = match wire.payload {
        Some(Wire::Blank(_)) => EntryPayload::Blank,
        Some(Wire::Proposal(bytes)) => EntryPayload::Normal(ProposalBytes(bytes.into())),
        Some(Wire::Membership(wire)) => EntryPayload::Membership(membership_from_wire(wire)?),
        None => return Err(BadBytes("an entry of an unknown kind")),
    };
    Ok(Entry {
        log_id: log_id_from_wire(&log_id),
        payload,
    })
}

/// Bytes an entry costs in memory, near enough to bound a cache with.
pub(crate) fn entry_bytes(entry: &Entry) -> usize {
    /// A log id, a payload tag and the container's slot.
    const OVERHEAD_BYTES: usize = 96;
    /// A member's address, key and disk identity.
    const MEMBER_BYTES: usize = 160;
    OVERHEAD_BYTES
        + match &entry.payload {
            EntryPayload::Blank => 0,
            EntryPayload::Normal(proposal) => proposal.0.len(),
            EntryPayload::Membership(membership) => membership.nodes().count() * MEMBER_BYTES,
        }
}
