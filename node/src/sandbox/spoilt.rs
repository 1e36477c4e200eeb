//! Warm snapshots that a start from failed here, and kinds of guests of which that happened again and
//! again. Pure.
//!
//! One failure is enough to leave a snapshot alone: each further try would cost a capsule seconds, and
//! boots in the end. Another is made in its place, at once the first time. If that fails as well, the
//! fault may be this host's and not the snapshot's, so each further one is made later.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::warm::Kind;
use crate::store::SnapshotDigest;

/// For how long a snapshot is left alone. By then the cluster has given it up, or its holder, which
/// could not be reached, is back.
const LEFT_ALONE: Duration = Duration::from_secs(10 * 60);
/// Pause before a third of a kind is made: far more than what making one costs its capsule.
const MADE_AGAIN: Duration = Duration::from_secs(60);
/// Longest such a pause: a host that was put right starts warm again within this time.
const MADE_AGAIN_MOST: Duration = Duration::from_secs(3600);

/// What is known of failed warm starts on this node.
#[derive(Debug, Default)]
pub(super) struct Spoilt {
    /// Until when each snapshot is left alone.
    alone: BTreeMap<SnapshotDigest, Instant>,
    /// How often starts from one of a kind have failed in a row, and when the next may be made.
    failed: BTreeMap<Kind, (u32, Instant)>,
}

impl Spoilt {
    /// Leaves a snapshot alone from now on.
    pub(super) fn leave_alone(&mut self, snapshot: SnapshotDigest, now: Instant) {
        self.alone.retain(|_, until| *until > now);
        self.alone.insert(snapshot, now + LEFT_ALONE);
    }

    /// Whether a snapshot of this kind is left alone. So is one that another host has made, where this
    /// host may be to blame: it would give up one after the other.
    pub(super) fn is_left_alone(
        &self,
        snapshot: &SnapshotDigest,
        kind: &Kind,
        now: Instant,
    ) -> bool {
        let is_it = self.alone.get(snapshot).is_some_and(|until| *until > now);
        is_it || !self.may_be_made(kind, now)
    }

    /// Notes that a start of this kind failed by its snapshot.
    pub(super) fn failed(&mut self, kind: Kind, now: Instant) {
        let times = self.failed.get(&kind).map_or(0, |(times, _)| *times);
        let pause = match times {
            0 => Duration::ZERO,
            more => MADE_AGAIN.saturating_mul(1 << (more - 1).min(16)),
        };
        let at = now + pause.min(MADE_AGAIN_MOST);
        self.failed.insert(kind, (times.saturating_add(1), at));
    }

    /// Notes that a start of this kind went well.
    pub(super) fn went_well(&mut self, kind: &Kind) {
        self.failed.remove(kind);
    }

    /// Whether one of this kind may be made.
    pub(super) fn may_be_made(&self, kind: &Kind, now: Instant) -> bool {
        self.failed.get(kind).is_none_or(|(_, at)| *at <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ImageDigest;

    const SNAPSHOT: SnapshotDigest = SnapshotDigest([7; 32]);
    const OTHER: SnapshotDigest = SnapshotDigest([8; 32]);

    fn kind(vcpus: u8) -> Kind {
        (ImageDigest([1; 32]), vcpus, 512, 5120)
    }

    #[test]
    fn what_a_start_failed_from_is_left_alone_for_a_while() {
        let mut spoilt = Spoilt::default();
        let now = Instant::now();
        let is_left = |spoilt: &Spoilt, it, now| spoilt.is_left_alone(&it, &kind(1), now);
        assert!(!is_left(&spoilt, SNAPSHOT, now));
        spoilt.leave_alone(SNAPSHOT, now);
        assert!(is_left(&spoilt, SNAPSHOT, now + LEFT_ALONE / 2));
        assert!(!is_left(&spoilt, OTHER, now));
        assert!(!is_left(&spoilt, SNAPSHOT, now + LEFT_ALONE));
    }

    #[test]
    fn the_second_of_a_kind_is_made_at_once_and_each_further_one_later() {
        let mut spoilt = Spoilt::default();
        let now = Instant::now();
        spoilt.failed(kind(1), now);
        assert!(spoilt.may_be_made(&kind(1), now));
        spoilt.failed(kind(1), now);
        assert!(!spoilt.may_be_made(&kind(1), now));
        assert!(spoilt.is_left_alone(&OTHER, &kind(1), now), "another's");
        assert!(spoilt.may_be_made(&kind(2), now), "another kind");
        assert!(spoilt.may_be_made(&kind(1), now + MADE_AGAIN));
        for _ in 0..100 {
            spoilt.failed(kind(1), now);
        }
        assert!(!spoilt.may_be_made(&kind(1), now + MADE_AGAIN));
        assert!(spoilt.may_be_made(&kind(1), now + MADE_AGAIN_MOST));
        spoilt.went_well(&kind(1));
        assert!(spoilt.may_be_made(&kind(1), now));
    }
}
