//! The chunks that a guest waits for and nobody gives: since when, of whom, and until when. Pure.
//!
//! A guest whose memory cannot be had stands still. It does so visibly, and not for ever: what one
//! chunk of it has been waited for is told, and after [`LONGEST`] it counts as lost. What is asked
//! for no more is no wait; whoever asks does so every second or so. A daemon that is started again
//! counts anew.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::base::fault;
use crate::store::ChunkId;

/// Longest that a guest stands still for what it cannot have now. A host that has crashed reboots,
/// checks its disks and is back within it; past it somebody had better be told, and decide.
const LONGEST: Duration = Duration::from_secs(5 * 60);
/// The name of that wait, for tests.
const LONGEST_NAME: &str = "holder-away";
/// What was asked for last so long ago is not waited for any more. Longer than one question takes.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(40);
/// What has been waited for no longer than this is not worth telling.
const SHOWN_AFTER: Duration = Duration::from_secs(2);

/// Why a chunk cannot be had now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NotNow {
    /// For people.
    pub why: String,
    /// What people call the nodes that are said to have it and could not be asked, where that is the
    /// reason.
    pub away: Vec<String>,
}

/// What a guest waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Why it cannot be had.
    pub reason: NotNow,
    /// For how long it has.
    pub waited: Duration,
    /// How much longer it does at most.
    pub left: Duration,
}

/// The waits of one guest.
#[derive(Debug, Default)]
pub(super) struct Waits(HashMap<ChunkId, Wait>);

#[derive(Debug)]
struct Wait {
    since: Instant,
    asked: Instant,
    reason: NotNow,
}

/// Longest that anything is waited for.
pub(super) fn longest() -> Duration {
    fault::shortened(LONGEST_NAME, LONGEST)
}

impl Waits {
    /// Notes that a chunk could not be had now; true where that has been so for too long.
    pub(super) fn note(&mut self, chunk: ChunkId, reason: NotNow) -> bool {
        let now = Instant::now();
        self.forget_old(now);
        let wait = self.0.entry(chunk).or_insert_with(|| Wait {
            since: now,
            asked: now,
            reason: NotNow::default(),
        });
        (wait.asked, wait.reason) = (now, reason);
        now - wait.since >= longest()
    }

    /// Notes that a chunk is here, or never will be.
    pub(super) fn over(&mut self, chunk: ChunkId) {
        self.0.remove(&chunk);
    }

    /// What has been waited for the longest, if that is long.
    pub(super) fn shown(&mut self) -> Option<Waiting> {
        let now = Instant::now();
        self.forget_old(now);
        let wait = self.0.values().min_by_key(|wait| wait.since)?;
        let waited = now - wait.since;
        (waited >= SHOWN_AFTER).then(|| Waiting {
            reason: wait.reason.clone(),
            waited,
            left: longest().saturating_sub(waited),
        })
    }

    fn forget_old(&mut self, now: Instant) {
        self.0.retain(|_, wait| now - wait.asked < FORGOTTEN_AFTER);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const CHUNK: ChunkId = ChunkId([1; 32]);
    const OTHER: ChunkId = ChunkId([2; 32]);
    const ASKS: Duration = Duration::from_secs(20);

    fn away(node: &str) -> NotNow {
        NotNow {
            why: "it is away".into(),
            away: vec![node.to_owned()],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_for_again_and_again_is_lost_after_the_longest_wait_and_not_before() {
        let mut waits = Waits::default();
        let mut waited = Duration::ZERO;
        while waited < LONGEST {
            assert!(!waits.note(CHUNK, away("b")), "{waited:?}");
            advance(ASKS).await;
            waited += ASKS;
        }
        assert!(waits.note(CHUNK, away("b")));
        assert!(!waits.note(OTHER, away("b")), "each has its own wait");
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_asks_for_is_no_wait() {
        let mut waits = Waits::default();
        waits.note(CHUNK, away("b"));
        advance(LONGEST).await;
        assert_eq!(waits.shown(), None);
        assert!(!waits.note(CHUNK, away("b")), "that is another wait");
        waits.over(CHUNK);
        assert_eq!(waits.0.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_wait_is_told_with_whom_it_is_for_once_it_is_one() {
        let mut waits = Waits::default();
        waits.note(CHUNK, away("b"));
        assert_eq!(waits.shown(), None);
        advance(ASKS).await;
        waits.note(OTHER, away("c"));
        waits.note(CHUNK, away("b"));
        let told = Waiting {
            reason: away("b"),
            waited: ASKS,
            left: LONGEST - ASKS,
        };
        assert_eq!(waits.shown(), Some(told));
    }
}
