//! Reading the replicated state: always this node's own applied copy.

use raft::state::State;
use tokio::sync::watch;
use tokio::time::{self, Instant};

/// The state after some log entry.
pub type Seen = raft::store::View<State>;

/// A read-only, watchable window on the replicated state. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    seen: watch::Receiver<Seen>,
}

impl View {
    /// A view of what `seen` publishes.
    #[must_use]
    pub const fn new(seen: watch::Receiver<Seen>) -> Self {
        Self { seen }
    }

    /// The state as of now.
    #[must_use]
    pub fn state(&self) -> State {
        self.seen.borrow().state.clone()
    }

    /// The state as of now, after which [`Self::changed`] waits for the next one.
    #[must_use]
    pub fn latest(&mut self) -> State {
        self.seen.borrow_and_update().state.clone()
    }

    /// The last applied log index.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.seen.borrow().applied.unwrap_or(0)
    }

    /// Waits for the next change; `false` once nothing will change any more.
    pub async fn changed(&mut self) -> bool {
        self.seen.changed().await.is_ok()
    }

    /// Waits until `look` finds something in the state, or `deadline` passes.
    pub async fn wait_for<T>(
        &self,
        deadline: Instant,
        mut look: impl FnMut(&State) -> Option<T>,
    ) -> Option<T> {
        let mut seen = self.seen.clone();
        let search = async {
            loop {
                if let Some(found) = look(&seen.borrow_and_update().state) {
                    return Some(found);
                }
                if seen.changed().await.is_err() {
                    return None;
                }
            }
        };
        time::timeout_at(deadline, search).await.ok().flatten()
    }
}
