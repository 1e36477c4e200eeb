//! One dial at a time to the same node at the same address, and a short rest after a failure.
//!
//! Raft, calls and relays all ask for a connection when they need one, often at the same instant.
//! The first dials; the others wait for it, each as long as it likes, and share what came of it. A
//! caller that gives up half way hands the dial to the next one.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use proto::ids::NodeKey;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout_at};

use super::error::DialError;
use crate::endpoint::Lane;

/// What is dialled.
type Target = (NodeKey, Lane, SocketAddr);

/// A dial that failed.
struct Failed {
    at: Instant,
    err: DialError,
}

/// The dials of one node.
#[derive(Default)]
pub(super) struct Dials {
    slots: std::sync::Mutex<HashMap<Target, Arc<Mutex<Option<Failed>>>>>,
}

/// The right to dial one target.
pub(super) struct Turn {
    last: OwnedMutexGuard<Option<Failed>>,
    begun: Instant,
}

impl Dials {
    /// Waits for the turn to dial `target`. Failures older than `rest` are forgotten.
    pub(super) async fn turn(
        &self,
        target: Target,
        rest: Duration,
        deadline: Instant,
    ) -> Result<Turn, DialError> {
        let slot = self.slot(target, rest);
        let last = timeout_at(deadline, slot.lock_owned()).await;
        let last = last.map_err(|_| DialError::Deadline { address: target.2 })?;
        Ok(Turn {
            last,
            begun: Instant::now(),
        })
    }

    fn slot(&self, target: Target, rest: Duration) -> Arc<Mutex<Option<Failed>>> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever holds or waits for one has a handle of its own.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot
                    .try_lock()
                    .is_ok_and(|last| last.as_ref().is_some_and(|last| last.is_recent(rest)))
        });
        Arc::clone(slots.entry(target).or_default())
    }
}

impl Turn {
    /// How the last dial failed, if that was less than `rest` ago.
    pub(super) fn recent_failure(&self, rest: Duration) -> Option<DialError> {
        let last = self.last.as_ref()?;
        last.is_recent(rest).then(|| last.err.clone())
    }

    /// Notes what came of the dial.
    pub(super) fn done<T>(mut self, outcome: &Result<T, DialError>, rest: Duration) {
        *self.last = match outcome {
            // The caller's patience says nothing about the peer.
            Err(DialError::Deadline { .. }) => None,
            Err(DialError::Unreachable { .. }) if self.begun.elapsed() < rest => None,
            Err(err) => Some(Failed {
                at: Instant::now(),
                err: err.clone(),
            }),
            Ok(_) => None,
        };
    }
}

impl Failed {
    fn is_recent(&self, rest: Duration) -> bool {
        self.at.elapsed() < rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Duration = Duration::from_millis(200);

    fn target() -> Target {
        let address = "127.0.0.1:1".parse().expect("an address");
        (NodeKey([1; 32]), Lane::Control, address)
    }

    fn refused() -> Result<(), DialError> {
        Err(DialError::KeyRefused {
            address: target().2,
        })
    }

    async fn turn(dials: &Dials) -> Turn {
        let deadline = Instant::now() + REST;
        dials
            .turn(target(), REST, deadline)
            .await
            .expect("nobody dials")
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_repeated_for_the_rest_and_then_forgotten() {
        let dials = Dials::default();
        turn(&dials).await.done(&refused(), REST);
        tokio::time::advance(REST - Duration::from_millis(1)).await;
        assert!(turn(&dials).await.recent_failure(REST).is_some());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(turn(&dials).await.recent_failure(REST).is_none());
        assert_eq!(dials.slots.lock().expect("whole").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_longer_than_it_likes_gives_up_and_the_next_one_dials() {
        let dials = Dials::default();
        let first = turn(&dials).await;
        let late = dials.turn(target(), REST, Instant::now() + REST).await;
        assert!(matches!(late, Err(DialError::Deadline { .. })));
        // The first gives up without an outcome.
        drop(first);
        assert!(turn(&dials).await.recent_failure(REST).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_impatient_caller_s_failure_is_not_held_against_the_peer() {
        let dials = Dials::default();
        let address = target().2;
        for impatient in [
            DialError::Deadline { address },
            DialError::Unreachable { address },
        ] {
            turn(&dials).await.done::<()>(&Err(impatient), REST);
            assert!(turn(&dials).await.recent_failure(REST).is_none());
        }
        let waited = turn(&dials).await;
        tokio::time::advance(REST).await;
        waited.done::<()>(&Err(DialError::Unreachable { address }), REST);
        assert!(turn(&dials).await.recent_failure(REST).is_some());
    }
}
