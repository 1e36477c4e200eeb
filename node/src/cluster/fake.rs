//! A log in memory, for tests of logic: applies at once, loses everything at the end.

use std::sync::Mutex;
use std::time::Duration;

use raft::command::Proposal;
use raft::state::State;
use raft::wire;
use tokio::sync::watch;

use super::propose::{Log, LogError, LogFuture, ReadFuture};
use super::view::Seen;

/// An in-memory [`Log`] of a cluster of one.
#[derive(Debug)]
pub struct MemoryLog {
    seen: Mutex<watch::Sender<Seen>>,
}

impl Default for MemoryLog {
    fn default() -> Self {
        Self {
            seen: Mutex::new(watch::Sender::new(Seen {
                state: State::default(),
                applied: None,
            })),
        }
    }
}

impl Log for MemoryLog {
    fn propose(&self, proposal: Vec<u8>, _timeout: Duration) -> LogFuture {
        let answered = Proposal::decode(&proposal)
            .map_err(|err| LogError::Stopped(err.to_string()))
            .and_then(|proposal| {
                let seen = self
                    .seen
                    .lock()
                    .map_err(|err| LogError::Stopped(err.to_string()))?;
                let mut next = seen.borrow().clone();
                let index = next.applied.map_or(1, |last| last + 1);
                next.applied = Some(index);
                let applied = next.state.apply(index, proposal);
                seen.send_replace(next);
                Ok(wire::encode_answer(&applied.answer))
            });
        Box::pin(async move { answered })
    }

    fn read_index(&self, _timeout: Duration) -> ReadFuture {
        let applied = self.seen().borrow().applied.unwrap_or(0);
        Box::pin(async move { Ok(applied) })
    }

    fn seen(&self) -> watch::Receiver<Seen> {
        // A poisoned lock still guards a whole sender: nothing is left half changed.
        self.seen
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .subscribe()
    }
}
