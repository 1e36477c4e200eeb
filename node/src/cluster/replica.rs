//! The applied state of this node, wherever it comes from.
//!
//! A member of raft's configuration gets it from raft; a mirror pulls it from a member. Whichever
//! is newer is published, so that a node may become the one or the other and nobody above notices.

use std::sync::Arc;

use raft::state::State;
use tokio::sync::watch;
use tokio::time::{self, Instant};

use super::feed::Feed;
use super::view::Seen;

/// The newest applied state that this node has. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Replica {
    seen: Arc<watch::Sender<Seen>>,
    feed: Feed,
}

impl Replica {
    /// A replica that begins with `seen`.
    #[must_use]
    pub fn new(seen: Seen) -> Self {
        Self {
            seen: Arc::new(watch::Sender::new(seen)),
            feed: Feed::default(),
        }
    }

    /// Whether raft keeps it up to date.
    pub(super) const fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Publishes `seen` if it is newer than what is there.
    pub fn publish(&self, seen: &Seen) {
        self.seen.send_if_modified(|known| {
            let newer = seen.applied > known.applied;
            if newer {
                known.clone_from(seen);
            }
            newer
        });
    }

    /// The state as of now, with the entry it is from.
    #[must_use]
    pub fn now(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// The state as of now.
    #[must_use]
    pub fn state(&self) -> State {
        self.seen.borrow().state.clone()
    }

    /// The last applied entry.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.seen.borrow().applied.unwrap_or(0)
    }

    /// Watches the state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Seen> {
        self.seen.subscribe()
    }

    /// Waits until the entry `index` is applied here; false where `deadline` passes first.
    pub async fn wait_applied(&self, index: u64, deadline: Instant) -> bool {
        let mut seen = self.seen.subscribe();
        let reached = seen.wait_for(|seen| seen.applied >= Some(index));
        matches!(time::timeout_at(deadline, reached).await, Ok(Ok(_)))
    }

    /// Publishes everything that `source` shows, until it ends.
    pub async fn follow(self, mut source: watch::Receiver<Seen>) {
        loop {
            let newest = source.borrow_and_update().clone();
            self.publish(&newest);
            if source.changed().await.is_err() {
                return;
            }
        }
    }
}
