//! Warnings of what a peer can cause as often as it likes: one a minute, with how many were left out.
//!
//! The transport does the same for what it refuses itself; this is for what a member is let in with
//! and then spoils.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// Shortest time between two of a kind: the file of a node under attack grows by lines, not by
/// megabytes, and whoever looks at it sees that it goes on.
const PAUSE: Duration = Duration::from_secs(60);

/// One kind of warning.
#[derive(Debug, Default)]
pub(super) struct Seldom {
    said: Mutex<Option<Said>>,
}

#[derive(Debug)]
struct Said {
    at: Instant,
    left_out: u64,
}

impl Seldom {
    /// Whether to say it now, and how many were left out since the last one that was said.
    pub(super) fn is_due(&self) -> Option<u64> {
        let now = Instant::now();
        let mut said = self.said.lock().expect("nothing panics while it is held");
        if let Some(last) = said.as_mut()
            && now.duration_since(last.at) < PAUSE
        {
            last.left_out += 1;
            return None;
        }
        let last = said.replace(Said {
            at: now,
            left_out: 0,
        });
        Some(last.map_or(0, |last| last.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_is_said_at_once_and_the_next_a_minute_later_with_what_was_left_out() {
        let kind = Seldom::default();
        assert_eq!(kind.is_due(), Some(0));
        for _ in 0..3 {
            assert_eq!(kind.is_due(), None);
        }
        tokio::time::advance(PAUSE).await;
        assert_eq!(kind.is_due(), Some(3));
        assert_eq!(kind.is_due(), None);
    }
}
