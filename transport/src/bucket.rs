//! A token bucket, told the time.

use std::time::Duration;

use tokio::time::Instant;

/// Nanoseconds of a second.
const SECOND_NS: u128 = 1_000_000_000;

/// An allowance that fills at a steady rate up to a burst.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    /// Units a second; at least 1.
    rate: u64,
    burst: u64,
    level: u64,
    /// Up to when the level counts.
    filled: Instant,
}

impl Bucket {
    /// A full bucket.
    pub(crate) fn new(rate: u64, burst: u64, now: Instant) -> Self {
        Self {
            rate: rate.max(1),
            burst: burst.max(1),
            level: burst.max(1),
            filled: now,
        }
    }

    /// Changes the rate from `now` on.
    pub(crate) fn set_rate(&mut self, rate: u64, now: Instant) {
        self.fill(now);
        self.rate = rate.max(1);
    }

    /// Takes up to `want` units and tells how many there were.
    pub(crate) fn take(&mut self, want: u64, now: Instant) -> u64 {
        self.fill(now);
        let taken = want.min(self.level);
        self.level -= taken;
        taken
    }

    /// Puts back what was taken and not used.
    pub(crate) fn put_back(&mut self, units: u64) {
        self.level = self.level.saturating_add(units).min(self.burst);
    }

    /// How long until there are `want` units, or as many as there can be.
    pub(crate) fn wait_for(&mut self, want: u64, now: Instant) -> Duration {
        self.fill(now);
        let missing = want.min(self.burst).saturating_sub(self.level);
        let nanos = (u128::from(missing) * SECOND_NS).div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let units = elapsed.as_nanos() * u128::from(self.rate) / SECOND_NS;
        let Ok(units) = u64::try_from(units) else {
            self.level = self.burst;
            self.filled = now;
            return;
        };
        // Less than a unit stays on the clock.
        if units > 0 {
            self.level = self.level.saturating_add(units).min(self.burst);
            let counted = u128::from(units) * SECOND_NS / u128::from(self.rate);
            self.filled += Duration::from_nanos(u64::try_from(counted).unwrap_or(u64::MAX));
            if self.level == self.burst {
                self.filled = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(100, 10, begun);
        assert_eq!(bucket.take(25, begun), 10);
        assert_eq!(bucket.take(1, begun), 0);
        assert_eq!(bucket.wait_for(5, begun), Duration::from_millis(50));
        assert_eq!(bucket.take(25, begun + Duration::from_millis(50)), 5);
        // It never holds more than its burst, however long nobody asks.
        assert_eq!(bucket.take(100, begun + Duration::from_secs(9999)), 10);
    }

    #[test]
    fn asking_often_gains_nothing() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(3, 1, begun);
        bucket.take(1, begun);
        let taken: u64 = (1..=10_000)
            .map(|ms| bucket.take(1, begun + Duration::from_millis(ms)))
            .sum();
        assert!((29..=30).contains(&taken), "{taken}");
    }

    #[test]
    fn a_new_rate_counts_from_when_it_was_set() {
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        let mut bucket = Bucket::new(10, 1000, begun);
        bucket.take(1000, begun);
        bucket.set_rate(100, begun + second);
        assert_eq!(bucket.take(1000, begun + 2 * second), 110);
    }
}
