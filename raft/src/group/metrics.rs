//! How a group is doing, in our own words.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use openraft::{Instant, RaftMetrics, ServerState};
use proto::ids::NodeId;

use crate::types::{DiskId, LogId, Node, StoredMembership, Types};

/// What a member is at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Takes proposals. Whether it may at this very moment only a proposal tells.
    Leader,
    /// Votes and follows.
    Follower,
    /// Stands for election.
    Candidate,
    /// Receives the log, does not vote.
    #[default]
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

/// Which membership a decision was based on: the entry that brought it. A change that names one
/// is refused once there is a newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MembershipStamp(pub(super) LogId);

impl MembershipStamp {
    pub(super) fn of(stored: &StoredMembership) -> Option<Self> {
        stored.log_id().map(Self)
    }

    /// The entry's index.
    #[must_use]
    pub const fn index(self) -> u64 {
        self.0.index
    }
}

impl fmt::Display for MembershipStamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The part of [`Metrics`] that changes rarely and that tasks wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What this member is.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Who leads, as far as is known.
    pub leader: Option<NodeId>,
    /// The newest membership this member has in its log, committed or not.
    pub membership: Option<MembershipStamp>,
    /// Whether a change of voters is half done.
    pub is_joint: bool,
    /// Whether the membership is committed. Until it is, no other change is taken.
    pub is_settled: bool,
    /// Set once a member addressed this one by a disk that is not its own: this node lost its
    /// disk, will never be let in again under its id, and has to join anew.
    pub known_by: Option<DiskId>,
}

impl Standing {
    pub(super) fn new(metrics: &RaftMetrics<Types>) -> Self {
        let membership = &metrics.membership_config;
        Self {
            role: role_of(metrics.state),
            term: metrics.current_term,
            leader: metrics.current_leader.map(NodeId),
            membership: MembershipStamp::of(membership),
            is_joint: membership.membership().get_joint_config().len() > 1,
            is_settled: is_settled(metrics),
            known_by: None,
        }
    }

    /// Takes over what openraft knows; whether that changed anything.
    pub(super) fn update(&mut self, now: Self) -> bool {
        let now = Self {
            known_by: self.known_by,
            ..now
        };
        let is_new = *self != now;
        *self = now;
        is_new
    }
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
    /// All members, by id. The newest membership in the log, committed or not.
    pub members: BTreeMap<NodeId, Member>,
    /// The entry that brought this membership.
    pub stamp: Option<MembershipStamp>,
    /// Whether a change of voters is half done: members of either set are voters then. The leader
    /// has to finish it with another change.
    pub is_joint: bool,
    /// Whether the membership is committed. Until it is, no other change is taken.
    pub is_settled: bool,
    /// On the leader: how far each member's log is known to agree with its own.
    pub matched: BTreeMap<NodeId, u64>,
    /// On the leader: how long ago the last message was sent that a member answered.
    pub heard: BTreeMap<NodeId, Duration>,
    /// On the leader: the same for a quorum. `None` also on one that no quorum has answered yet.
    pub quorum_age: Option<Duration>,
}

impl Metrics {
    pub(super) fn new(role: Role, metrics: &RaftMetrics<Types>) -> Self {
        let stored = &metrics.membership_config;
        let membership = stored.membership();
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
            stamp: MembershipStamp::of(stored),
            is_joint: membership.get_joint_config().len() > 1,
            is_settled: is_settled(metrics),
            matched: matched(metrics),
            heard: heard(metrics),
            quorum_age: quorum_age(metrics),
        }
    }
}

pub(super) fn is_settled(metrics: &RaftMetrics<Types>) -> bool {
    metrics.membership_config.log_id() == metrics.committed_membership_config.log_id()
}

fn quorum_age(metrics: &RaftMetrics<Types>) -> Option<Duration> {
    let mut voters = metrics.membership_config.voter_ids();
    if metrics.state == ServerState::Leader && voters.all(|id| id == metrics.id) {
        return Some(Duration::ZERO);
    }
    metrics.last_quorum_acked.map(|at| at.elapsed())
}

fn matched(metrics: &RaftMetrics<Types>) -> BTreeMap<NodeId, u64> {
    let known = metrics.replication.iter().flatten();
    let known = known.filter_map(|(&id, matched)| Some((NodeId(id), matched.as_ref()?.index)));
    known.collect()
}

pub(super) fn heard(metrics: &RaftMetrics<Types>) -> BTreeMap<NodeId, Duration> {
    let known = metrics.heartbeat.iter().flatten();
    let known = known.filter_map(|(&id, at)| Some((NodeId(id), at.as_ref()?.elapsed())));
    known.collect()
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
