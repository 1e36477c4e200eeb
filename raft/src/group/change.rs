//! Changing who belongs to the group, and who leads it.
//!
//! Voters change in two entries: a joint membership, in which both the old and the new voters have
//! to agree, then the new one alone. Three things guard that:
//!
//! - Every change names the membership it was decided on ([`MembershipStamp`]); openraft refuses
//!   it once there is another. Two deciders cannot interleave.
//! - A set of voters whose majority is not answering is refused here: once the joint entry is in
//!   the log, nothing at all is committed until that majority is back.
//! - The two entries are driven by a task of the group's own runtime, so a caller that gives up does
//!   not leave the change half done. Losing leadership does: the next leader sees
//!   [`Metrics::is_joint`](super::Metrics::is_joint) and finishes it with a change of its own.
//!
//! Records of members are never replaced (`SetNodes` to a wrong address can make two quorums): a
//! new address is a removal and an addition.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use openraft::ChangeMembers;
use openraft::Raft;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, ForwardReason, ForwardToLeader, RaftError,
};
use openraft::raft::Precondition;
use proto::ids::NodeId;
use tokio::time;

use super::metrics::{heard, is_settled, role_of};
use super::{ChangeError, Group, LEASE_RETRY, MembershipStamp, Role, leader_of};
use crate::adapter::StateMachine;
use crate::machine::Machine;
use crate::types::{DiskId, Membership, Node, StoredMembership, Types};

/// A member counts as answering if it answered within this many of the longest election timeouts:
/// it outlasts one lost heartbeat and one slow sync, and is short enough to mean "now".
const ANSWERING_TIMEOUTS: u32 = 2;
/// Heartbeats a silent member is waited for: after a standstill of this process the first one is
/// overdue, and the second makes up for one that was lost.
const SILENT_HEARTBEATS: u32 = 2;
/// How long a handover may take before it counts as failed, in longest election timeouts: if the
/// chosen member does not take over, some other one does after two of them.
const TRANSFER_TIMEOUTS: u32 = 3;

type Change = ChangeMembers<u64, Node>;
type Refusal = RaftError<Types, ClientWriteError<Types>>;

/// What a decision is based on.
struct Current {
    stored: Arc<StoredMembership>,
    stamp: MembershipStamp,
    is_settled: bool,
}

impl Current {
    fn membership(&self) -> &Membership {
        self.stored.membership()
    }

    /// The voters; in a joint membership those that shall remain.
    fn voters(&self) -> BTreeSet<u64> {
        let sets = self.membership().get_joint_config();
        sets.last().cloned().unwrap_or_default()
    }

    fn is_joint(&self) -> bool {
        self.membership().get_joint_config().len() > 1
    }
}

impl<M: Machine> Group<M> {
    /// Has `node` receive the log under `id`, without a vote. Returns when that is committed, not
    /// when the learner has caught up: see [`Metrics::matched`](super::Metrics::matched). Adding a
    /// member that is there, with the same record, changes nothing.
    ///
    /// # Errors
    /// [`ChangeError`]; [`ChangeError::Conflict`] where `id` is there with another record: remove
    /// it first.
    pub async fn add_learner(
        &self,
        id: NodeId,
        node: Node,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        if node.disk == DiskId::default() {
            return Err(ChangeError::Refused("the learner's disk is not known"));
        }
        let current = self.current()?;
        match current.membership().get_node(&id.0) {
            Some(known) if *known == node && current.is_settled => return Ok(()),
            Some(known) if *known == node => return Err(under_way()),
            Some(_) => {
                let why = format!("{id} is a member with another record");
                return Err(ChangeError::Conflict(why));
            }
            None => {}
        }
        let added = Change::AddNodes(BTreeMap::from([(id.0, node)]));
        self.change(added, current.stamp, deadline).await.map(drop)
    }

    /// Makes exactly `voters` the voters; all of them must be members. Those who were voters before
    /// stay on as learners. Also finishes a change that was left half done.
    ///
    /// `expected` is the membership the choice was made on; `None` takes what is there.
    ///
    /// # Errors
    /// [`ChangeError`]; [`ChangeError::Refused`] for a set without the leader: hand over to a member
    /// of it first.
    pub async fn change_voters(
        &self,
        voters: BTreeSet<NodeId>,
        expected: Option<MembershipStamp>,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        let current = self.expect(expected)?;
        let voters = voters.into_iter().map(|id| id.0).collect();
        self.replace_voters(&current, voters, deadline)
            .await
            .map(drop)
    }

    /// Removes members. Voters among them lose their vote first, as in [`Self::change_voters`].
    /// Ids that are no members are passed over.
    ///
    /// # Errors
    /// [`ChangeError`]; [`ChangeError::Refused`] where no voter would be left, or for the leader
    /// itself: hand over first.
    pub async fn remove_members(
        &self,
        ids: BTreeSet<NodeId>,
        expected: Option<MembershipStamp>,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        let current = self.expect(expected)?;
        if ids.contains(&self.inner.node_id) {
            return Err(ChangeError::Refused("the leader cannot remove itself"));
        }
        let is_member = |id: &u64| current.membership().get_node(id).is_some();
        let ids: BTreeSet<u64> = ids.into_iter().map(|id| id.0).filter(is_member).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let remaining = current.voters().difference(&ids).copied().collect();
        let stamp = self.replace_voters(&current, remaining, deadline).await?;
        let removed = Change::RemoveNodes(ids);
        self.change(removed, stamp, deadline).await.map(drop)
    }

    /// Hands leadership to the voter `to`; returns when this member no longer leads. No election
    /// timeout passes, so proposals wait for milliseconds only.
    ///
    /// # Errors
    /// [`ChangeError`]; on [`ChangeError::Timeout`] some other member may have been elected.
    pub async fn transfer_leader(&self, to: NodeId) -> Result<(), ChangeError> {
        let current = self.current()?;
        if to == self.inner.node_id {
            return Ok(());
        }
        if !current.voters().contains(&to.0) {
            return Err(ChangeError::Refused("only a voter can lead"));
        }
        let patience = self.inner.timeouts.election_max * TRANSFER_TIMEOUTS;
        let deadline = Instant::now() + patience;
        self.check_quorum(&BTreeSet::from([to.0]), deadline).await?;
        let mut standing = self.watch_metrics();
        let limit = time::Instant::now() + patience;
        // Asked again until it works: a member that lacks the newest entries lets the first request
        // pass, and by now nobody else is heard.
        while time::Instant::now() < limit {
            let asked = self.inner.raft.trigger().transfer_leader(to.0).await;
            asked.map_err(|fatal| ChangeError::from(self.ended(&fatal)))?;
            let patience = time::Instant::now() + self.inner.timeouts.heartbeat;
            let handed = standing.wait_for(|standing| standing.role != Role::Leader);
            if let Ok(handed) = time::timeout_at(patience.min(limit), handed).await {
                return handed.map(drop).map_err(|_| ChangeError::Stopped);
            }
        }
        Err(ChangeError::Timeout)
    }

    async fn replace_voters(
        &self,
        current: &Current,
        voters: BTreeSet<u64>,
        deadline: Instant,
    ) -> Result<MembershipStamp, ChangeError> {
        if voters.is_empty() {
            return Err(ChangeError::Refused("no voter would be left"));
        }
        let is_stranger = |id: &u64| current.membership().get_node(id).is_none();
        if voters.iter().any(is_stranger) {
            return Err(ChangeError::Refused("a voter must be a member first"));
        }
        if !current.is_joint() && current.voters() == voters {
            return Ok(current.stamp);
        }
        // It would go on leading without a vote, and nobody would be elected in its place.
        if !voters.contains(&self.inner.node_id.0) {
            return Err(ChangeError::Refused("the leader must hand over first"));
        }
        self.check_quorum(&voters, deadline).await?;
        let replaced = Change::ReplaceAllVoters(voters);
        self.change(replaced, current.stamp, deadline).await
    }

    /// A majority of `voters` must be answering. A new leader has not heard of everybody yet, and
    /// waits for those. Who fell silent is given [`SILENT_HEARTBEATS`] only: it may have been this
    /// member that stood still.
    async fn check_quorum(
        &self,
        voters: &BTreeSet<u64>,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        let recent = self.inner.timeouts.election_max * ANSWERING_TIMEOUTS;
        let started = time::Instant::now();
        let limit = time::Instant::from_std(deadline).min(started + recent);
        let silent_until = started + self.inner.timeouts.heartbeat * SILENT_HEARTBEATS;
        loop {
            let now = time::Instant::now();
            let heard = heard(&self.inner.raft.metrics().borrow_watched());
            let own = |id: &&u64| **id == self.inner.node_id.0;
            let answers = |id: &&u64| heard.get(&NodeId(**id)).is_some_and(|age| *age < recent);
            let may_answer = |id: &&u64| now < silent_until || !heard.contains_key(&NodeId(**id));
            let answering = voters.iter().filter(|id| own(id) || answers(id)).count();
            if answering * 2 > voters.len() {
                return Ok(());
            }
            let is_hoped_for = |id: &&u64| !own(id) && !answers(id) && may_answer(id);
            let hoped_for = voters.iter().filter(is_hoped_for).count();
            if (answering + hoped_for) * 2 <= voters.len() || now >= limit {
                return Err(ChangeError::NoQuorum(format!("{voters:?}")));
            }
            time::sleep(LEASE_RETRY).await;
        }
    }

    /// The membership, where this member may change it.
    fn current(&self) -> Result<Current, ChangeError> {
        if let Some(fault) = self.inner.files.fault.get() {
            return Err(ChangeError::Fatal(fault));
        }
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let stored = &metrics.membership_config;
        match (role_of(metrics.state), MembershipStamp::of(stored)) {
            (Role::Leader, Some(stamp)) => Ok(Current {
                stored: Arc::clone(stored),
                stamp,
                is_settled: is_settled(&metrics),
            }),
            (Role::Stopped, _) => Err(ChangeError::Stopped),
            _ => {
                let leader = metrics.current_leader;
                let node = leader.and_then(|id| stored.membership().get_node(&id));
                let leader = leader.zip(node.cloned());
                Err(ChangeError::NotLeader {
                    leader: leader.map(|(id, node)| (NodeId(id), node)),
                })
            }
        }
    }

    fn expect(&self, expected: Option<MembershipStamp>) -> Result<Current, ChangeError> {
        let current = self.current()?;
        match expected {
            Some(expected) if expected != current.stamp => {
                let why = format!("it is that of {}, not of {expected}", current.stamp);
                Err(ChangeError::Conflict(why))
            }
            _ => Ok(current),
        }
    }

    /// Has `change` made on top of the membership `stamp`; returns the new one's.
    async fn change(
        &self,
        change: Change,
        stamp: MembershipStamp,
        deadline: Instant,
    ) -> Result<MembershipStamp, ChangeError> {
        let deadline = time::Instant::from_std(deadline);
        let raft = self.inner.raft.clone();
        let drive = drive(raft, change, stamp, deadline);
        let stamp = match time::timeout_at(deadline, self.on_own_runtime(drive)).await {
            Err(_) => return Err(ChangeError::Timeout),
            Ok(None) => return Err(ChangeError::Stopped),
            Ok(Some(Ok(stamp))) => stamp,
            Ok(Some(Err(refusal))) => return Err(self.change_error(refusal, stamp)),
        };
        // What is reported lags what is done by a moment; the caller's next decision must not.
        let mut standing = self.watch_metrics();
        let is_reported = standing.wait_for(|standing| {
            let is_newest = standing.membership >= Some(stamp) && standing.is_settled;
            is_newest || standing.role != Role::Leader
        });
        drop(time::timeout_at(deadline, is_reported).await);
        Ok(stamp)
    }

    async fn on_own_runtime<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        self.inner.spawner.spawn(work).await.ok()
    }

    fn change_error(&self, refusal: Refusal, stamp: MembershipStamp) -> ChangeError {
        let refused = match refusal {
            RaftError::Fatal(fatal) => return self.ended(&fatal).into(),
            RaftError::APIError(refused) => refused,
        };
        // The first of two entries may be in: then this is no plain refusal.
        let now = self
            .inner
            .raft
            .metrics()
            .borrow_watched()
            .membership_config
            .clone();
        let is_begun = MembershipStamp::of(&now) != Some(stamp);
        match refused {
            ClientWriteError::ForwardToLeader(_) if is_begun => ChangeError::LeaderChanged,
            ClientWriteError::ForwardToLeader(forward) => ChangeError::NotLeader {
                leader: leader_of(forward),
            },
            ClientWriteError::LogEntryDiscarded(_) => ChangeError::LeaderChanged,
            ClientWriteError::PreconditionFailed(failed) => {
                ChangeError::Conflict(failed.to_string())
            }
            ClientWriteError::ChangeMembershipError(ChangeMembershipError::InProgress(_)) => {
                under_way()
            }
            ClientWriteError::ChangeMembershipError(other) => {
                ChangeError::Conflict(other.to_string())
            }
        }
    }
}

fn under_way() -> ChangeError {
    ChangeError::Conflict("another change is under way".into())
}

/// Makes the change, however many entries that takes. A leader that waits for its quorum's first
/// answer is asked again until the deadline.
async fn drive<M: Machine>(
    raft: Raft<Types, StateMachine<M>>,
    change: Change,
    stamp: MembershipStamp,
    deadline: time::Instant,
) -> Result<MembershipStamp, Refusal> {
    loop {
        let guard = Precondition::LastMembershipLogId {
            last_membership_log_id: Some(stamp.0),
        };
        let changed = raft
            .change_membership_if(change.clone(), true, [guard])
            .await;
        match changed {
            Ok(written) => return Ok(MembershipStamp(written.log_id)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(ForwardToLeader {
                reason: ForwardReason::LeaseExpired,
                ..
            }))) if time::Instant::now() + LEASE_RETRY < deadline => {
                time::sleep(LEASE_RETRY).await;
            }
            Err(refusal) => return Err(refusal),
        }
    }
}
