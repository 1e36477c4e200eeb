//! How the cluster stands, for a node that is outside raft's configuration.
//!
//! Such a node hears nothing of elections and votes; the member that answers its pulls says how it
//! sees them. Nothing is decided by it: it is for people who ask this node, and for choosing whom to
//! pull from. It is never passed on, so that two such nodes cannot keep a rumour alive.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::NodeId;
use proto::wire::mesh as wire;
use raft::group::Metrics;
use tokio::time::Instant;

/// How long it is believed: a pull is answered within five seconds, and one or two may fail.
const GOOD_FOR: Duration = Duration::from_secs(15);

/// What a member said last. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Hearsay {
    told: Arc<Mutex<Option<(Instant, Told)>>>,
}

/// What a member says of raft's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Who leads.
    pub(super) leader: Option<NodeId>,
    /// Since which election.
    pub(super) term: u64,
    /// Who votes.
    pub(super) voters: BTreeSet<NodeId>,
    /// Who receives the log without a vote.
    pub(super) learners: BTreeSet<NodeId>,
}

impl Told {
    /// What `here` can say: nothing, if it is no member itself.
    pub(super) fn by(here: NodeId, metrics: &Metrics) -> Self {
        if !metrics.members.contains_key(&here) {
            return Self::default();
        }
        let of = |voter: bool| {
            let members = metrics.members.iter();
            let members = members.filter(|(_, member)| member.voter == voter);
            members.map(|(id, _)| *id).collect()
        };
        Self {
            leader: metrics.leader,
            term: metrics.term,
            voters: of(true),
            learners: of(false),
        }
    }

    /// Writes it into an answer.
    pub(super) fn write(&self, answer: &mut wire::PullAnswer) {
        let ids = |ids: &BTreeSet<NodeId>| ids.iter().map(|id| id.0).collect();
        answer.leader = self.leader.map_or(0, |leader| leader.0);
        answer.term = self.term;
        answer.voters = ids(&self.voters);
        answer.learners = ids(&self.learners);
    }

    fn read(answer: &wire::PullAnswer) -> Self {
        let ids = |ids: &[u64]| ids.iter().map(|id| NodeId(*id)).collect();
        Self {
            leader: Some(NodeId(answer.leader)).filter(|leader| leader.0 > 0),
            term: answer.term,
            voters: ids(&answer.voters),
            learners: ids(&answer.learners),
        }
    }
}

impl Hearsay {
    /// Notes what an answer says, if whoever gave it is in a position to say.
    pub(super) fn heard(&self, answer: &wire::PullAnswer) {
        let told = Told::read(answer);
        if !told.voters.is_empty() {
            *self.lock() = Some((Instant::now(), told));
        }
    }

    /// What was heard lately.
    pub(super) fn newest(&self) -> Option<Told> {
        let told = self.lock();
        let fresh = told.as_ref().filter(|(at, _)| at.elapsed() <= GOOD_FOR);
        fresh.map(|(_, told)| told.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Told)>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Told {
        Told {
            leader: Some(NodeId(2)),
            term: 7,
            voters: [1, 2, 3].map(NodeId).into(),
            learners: [4].map(NodeId).into(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_member_says_is_believed_for_a_while() {
        let hearsay = Hearsay::default();
        let mut answer = wire::PullAnswer::default();
        told().write(&mut answer);
        hearsay.heard(&answer);
        assert_eq!(hearsay.newest(), Some(told()));
        tokio::time::advance(GOOD_FOR + Duration::from_secs(1)).await;
        assert_eq!(hearsay.newest(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_no_member_says_nothing_and_takes_nothing_back() {
        let hearsay = Hearsay::default();
        let mut answer = wire::PullAnswer::default();
        told().write(&mut answer);
        hearsay.heard(&answer);
        let mut silent = wire::PullAnswer::default();
        Told::default().write(&mut silent);
        hearsay.heard(&silent);
        assert_eq!(hearsay.newest(), Some(told()));
    }
}
