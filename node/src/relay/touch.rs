//! Telling owners that their sandboxes are used, without keeping anybody waiting.
//!
//! What is used within [`GATHER`] goes to its owner in one question. So a sandbox costs its owner
//! at most one each [`GATHER`], however busy it is, and none is lost, only late by that much. One
//! that does not arrive is not repeated: the next use tells again, and bytes that flow are counted
//! by the owner itself.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::{NodeId, SandboxId};
use proto::wire::relay as pb;
use proto::wire::relay::question::Ask;
use tokio::time;
use tracing::debug;

use super::peers::Peers;
use super::wire::{self, IDS_PER_QUESTION};

/// How long uses are gathered: far below the shortest inactivity timeout, a minute.
const GATHER: Duration = Duration::from_secs(2);
/// Longest an owner may take to hear of them.
const TELL_TIMEOUT: Duration = Duration::from_secs(5);

/// The uses that owners have not been told of.
#[derive(Clone, Debug)]
pub(super) struct Touches {
    peers: Arc<dyn Peers>,
    pending: Arc<Mutex<HashMap<NodeId, BTreeSet<SandboxId>>>>,
}

impl Touches {
    pub(super) fn new(peers: Arc<dyn Peers>) -> Self {
        let pending = Arc::default();
        Self { peers, pending }
    }

    /// Notes that a sandbox of `owner` is used. Must be called within a runtime.
    pub(super) fn note(&self, owner: NodeId, id: SandboxId) {
        let mut pending = self.pending();
        match pending.entry(owner) {
            Entry::Occupied(mut gathered) => {
                let gathered = gathered.get_mut();
                // A sandbox beyond the bound is told of at its next use.
                if gathered.len() < IDS_PER_QUESTION {
                    gathered.insert(id);
                }
            }
            Entry::Vacant(none) => {
                none.insert(BTreeSet::from([id]));
                // Ends by itself within two deadlines, and holds nothing that must be released.
                tokio::spawn(self.clone().tell_soon(owner));
            }
        }
    }

    async fn tell_soon(self, owner: NodeId) {
        time::sleep(GATHER).await;
        let gathered = self.pending().remove(&owner).unwrap_or_default();
        let sandboxes = gathered.iter().map(|id| id.0.to_vec()).collect();
        let question = wire::ask(Ask::Touch(pb::Touch { sandboxes }));
        let told = time::timeout(TELL_TIMEOUT, self.peers.ask(owner, question)).await;
        match told {
            Ok(Ok(_)) => {}
            Ok(Err(err)) => debug!(%owner, %err, "could not tell of uses"),
            Err(_) => debug!(%owner, "telling of uses timed out"),
        }
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<NodeId, BTreeSet<SandboxId>>> {
        // Every change is a single call: a panic leaves the table whole.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::InProcessPeers;

    #[tokio::test(start_paused = true)]
    async fn uses_are_told_in_one_question_an_owner_and_never_lost() {
        let peers = InProcessPeers::default();
        let touches = Touches::new(Arc::new(peers.clone()));
        let (one, two) = (NodeId(1), NodeId(2));
        for number in 0..100 {
            touches.note(one, SandboxId([number; 16]));
            touches.note(one, SandboxId([0; 16]));
        }
        touches.note(two, SandboxId([0; 16]));
        assert_eq!(peers.asked(), 0, "nobody waits for it");
        time::sleep(2 * GATHER).await;
        assert_eq!(peers.asked(), 2);
        assert!(touches.pending().is_empty());
        touches.note(one, SandboxId([0; 16]));
        time::sleep(2 * GATHER).await;
        assert_eq!(peers.asked(), 3, "a later use is told anew");
    }
}
