//! Whether this node belongs to raft's configuration.
//!
//! A learner that is dropped from it is not told: its own log goes on saying that it belongs, and who
//! led then. Only the silence of the leader shows it. A voter becomes a learner first, and is told so.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::ids::NodeId;
use raft::group::{Group, Member};
use raft::state::State;
use tokio::time::Instant;

/// A leader speaks to each member ten times a second, and a new one is elected within two.
const SILENCE: Duration = Duration::from_secs(3);

/// When the leader spoke to this node last. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Feed {
    heard: Arc<Mutex<Option<Instant>>>,
}

impl Feed {
    /// `sender` has spoken as a member of raft.
    pub(super) fn heard(&self, group: &Group<State>, sender: Option<NodeId>) {
        let leader = group.watch_metrics().borrow().leader;
        if leader.is_some() && leader == sender {
            *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }

    /// Whether `here` belongs to raft's configuration, so that its own log says how things are.
    pub(super) fn belongs(&self, here: NodeId, members: &BTreeMap<NodeId, Member>) -> bool {
        let own = members.get(&here);
        own.is_some_and(|member| member.voter || self.is_live())
    }

    fn is_live(&self) -> bool {
        let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.is_some_and(|at| at.elapsed() < SILENCE)
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::NodeKey;
    use raft::types::Node;

    use super::*;

    fn members(voter: bool) -> BTreeMap<NodeId, Member> {
        let node = Node::new(String::new(), NodeKey([7; 32]));
        BTreeMap::from([(NodeId(7), Member { node, voter })])
    }

    #[tokio::test(start_paused = true)]
    async fn a_learner_to_which_no_leader_speaks_has_been_dropped() {
        let feed = Feed::default();
        let belongs = |voter| feed.belongs(NodeId(7), &members(voter));
        assert!(!belongs(false), "not heard yet");
        *feed.heard.lock().expect("whole") = Some(Instant::now());
        assert!(belongs(false));
        tokio::time::advance(SILENCE).await;
        assert!(!belongs(false));
        assert!(belongs(true), "a voter would be told");
        assert!(!feed.belongs(NodeId(8), &members(true)), "a stranger");
    }
}
