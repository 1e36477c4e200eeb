//! What a pager has done so far, in numbers: counted without locks, told on request.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Steps within a doubling of time: figures are right to an eighth.
const STEPS: u32 = 8;
/// Doublings of a nanosecond that are told apart, up to some nine minutes.
const DOUBLINGS: u32 = 40;
const BUCKETS: usize = (DOUBLINGS * STEPS) as usize;

/// How often something took how long.
#[derive(Debug)]
pub struct Histogram {
    counts: Box<[AtomicU64]>,
    longest_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            longest_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts one.
    pub fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.longest_ns.fetch_max(ns, Ordering::Relaxed);
    }

    /// The time that a `share` (of 1000) of them did not exceed; zero if there were none.
    #[must_use]
    pub fn permille(&self, share: u64) -> Duration {
        let counts: Vec<u64> = self
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        let total: u64 = counts.iter().sum();
        let wanted = (total * share).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= wanted {
                return Duration::from_nanos(upper_edge(bucket)).min(self.longest());
            }
        }
        Duration::ZERO
    }

    /// The longest.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest_ns.load(Ordering::Relaxed))
    }
}

/// The bucket of a time: which doubling it is in, and which eighth of it.
fn bucket(ns: u64) -> usize {
    let ns = ns.max(u64::from(STEPS));
    let doubling = ns.ilog2();
    let step = (ns >> (doubling - STEPS.ilog2())) - u64::from(STEPS);
    let number = u64::from((doubling - STEPS.ilog2()) * STEPS) + step;
    usize::try_from(number).map_or(BUCKETS - 1, |number| number.min(BUCKETS - 1))
}

/// The longest time that falls into a bucket.
fn upper_edge(bucket: usize) -> u64 {
    let bucket = u64::try_from(bucket).unwrap_or(u64::MAX);
    let (doubling, step) = (bucket / u64::from(STEPS), bucket % u64::from(STEPS));
    ((u64::from(STEPS) + step + 1) << doubling) - 1
}

/// The counters of one pager.
#[derive(Debug, Default)]
pub struct Counters {
    /// Faults that were read.
    pub faults: AtomicU64,
    /// Of them, for windows that are zero in the image.
    pub hole_faults: AtomicU64,
    /// Of them, for windows that had to be asked for.
    pub peer_faults: AtomicU64,
    /// Of them, for pages that the guest had given back.
    pub discard_faults: AtomicU64,
    /// Windows that were pushed ahead.
    pub pushed_windows: AtomicU64,
    /// Bytes put into the guest from this node's packs.
    pub local_bytes: AtomicU64,
    /// Bytes put into the guest that came from another node.
    pub peer_bytes: AtomicU64,
    /// Zeroes put into the guest.
    pub zero_bytes: AtomicU64,
    /// From reading a fault to waking who waits for it.
    pub latency: Histogram,
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// The counters at one instant, as they are told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Faults that were read.
    pub faults: u64,
    /// Of them, for windows that are zero in the image.
    pub hole_faults: u64,
    /// Of them, for windows that had to be asked for.
    pub peer_faults: u64,
    /// Of them, for pages that the guest had given back.
    pub discard_faults: u64,
    /// Windows that were pushed ahead.
    pub pushed_windows: u64,
    /// Bytes from this node's packs.
    pub local_bytes: u64,
    /// Bytes that came from another node.
    pub peer_bytes: u64,
    /// Zeroes.
    pub zero_bytes: u64,
    /// Half of all faults were served within this many nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100 were.
    pub p99_ns: u64,
    /// All were.
    pub max_ns: u64,
    /// Questions to the daemon that have waited longer than they should.
    pub stalled_questions: u64,
    /// All that was to be pushed ahead has been.
    pub pushing_done: bool,
    /// How often a pager was started for this guest after the first.
    pub takeovers: u64,
}

impl Counters {
    /// Them, now.
    #[must_use]
    pub fn tell(&self) -> Stats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Stats {
            faults: read(&self.faults),
            hole_faults: read(&self.hole_faults),
            peer_faults: read(&self.peer_faults),
            discard_faults: read(&self.discard_faults),
            pushed_windows: read(&self.pushed_windows),
            local_bytes: read(&self.local_bytes),
            peer_bytes: read(&self.peer_bytes),
            zero_bytes: read(&self.zero_bytes),
            p50_ns: ns(self.latency.permille(500)),
            p99_ns: ns(self.latency.permille(990)),
            max_ns: ns(self.latency.longest()),
            ..Stats::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_fault_has_no_latency() {
        assert_eq!(Counters::default().tell(), Stats::default());
    }

    #[test]
    fn a_rare_long_fault_shows_in_the_maximum_and_not_in_the_median() {
        let histogram = Histogram::default();
        for _ in 0..995 {
            histogram.record(Duration::from_micros(20));
        }
        for _ in 0..5 {
            histogram.record(Duration::from_millis(3));
        }
        let near = |told: Duration, meant: Duration| told >= meant && told <= meant * 9 / 8;
        assert!(near(histogram.permille(500), Duration::from_micros(20)));
        assert!(near(histogram.permille(990), Duration::from_micros(20)));
        assert_eq!(histogram.permille(1000), Duration::from_millis(3));
    }

    proptest! {
        #[test]
        fn every_time_falls_into_a_bucket_that_is_an_eighth_wide(ns: u64) {
            let edge = upper_edge(bucket(ns));
            let tellable = ns < 1 << (DOUBLINGS + 2);
            prop_assert!(!tellable || edge >= ns);
            prop_assert!(ns < 8 || edge <= ns.saturating_add(ns / 8));
        }
    }
}
