//! How a group is doing, in our own words.

use std::collections::BTreeMap;

use openraft::{RaftMetrics, ServerState};
use proto::ids::NodeId;

use crate::types::{Node, Types};

/// What a member is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes proposals. Whether it may at this very moment only a proposal tells.
    Leader,
    /// Votes and follows.
    Follower,
    /// Stands for election.
    Candidate,
    /// Receives the log, does not vote.
    Learner,
    /// Stopped, or broken.
    Stopped,
}

/// One member as the membership has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its record.
    pub node: Node,
    /// Whether it counts for the quorum.
    pub voter: bool,
}

/// How a group is doing.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// What this member is.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Who leads, as far as is known.
    pub leader: Option<NodeId>,
    /// The last entry in its log.
    pub last_log: Option<u64>,
    /// The last entry applied to its state.
    pub applied: Option<u64>,
    /// The entry its newest snapshot covers.
    pub snapshot: Option<u64>,
    /// The last entry purged from its log.
    pub purged: Option<u64>,
    /// All members, by id.
    pub members: BTreeMap<NodeId, Member>,
}

impl Metrics {
    pub(super) fn new(role: Role, metrics: &RaftMetrics<Types>) -> Self {
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let members = membership.nodes().map(|(&id, node)| {
            let member = Member {
                node: node.clone(),
                voter: voters.contains(&id),
            };
            (NodeId(id), member)
        });
        Self {
            role,
            term: metrics.current_term,
            leader: metrics.current_leader.map(NodeId),
            last_log: metrics.last_log_index,
            applied: metrics.last_applied.map(|id| id.index),
            snapshot: metrics.snapshot.map(|id| id.index),
            purged: metrics.purged.map(|id| id.index),
            members: members.collect(),
        }
    }
}

pub(super) const fn role_of(state: ServerState) -> Role {
    match state {
        ServerState::Leader => Role::Leader,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Learner => Role::Learner,
        ServerState::Shutdown => Role::Stopped,
    }
}
