//! How many requests a second one key may make at this node.
//!
//! Each node counts by itself: a client that goes to all of them has the limit of all together. What
//! goes on over an open stream is not counted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use proto::ids::KeyId;
use proto::units::Stamp;
use raft::state::Settings;

/// From this many keys on, those that may have their whole burst again are forgotten: they are as if they
/// had never come.
const FORGET_FROM: usize = 1024;
const MICROS_IN_SECOND: u64 = 1_000_000;
const MICROS_IN_MILLI: u64 = 1000;

/// The buckets of all keys, as the instant at which each is full again.
#[derive(Clone, Debug, Default)]
pub(super) struct Rates(Arc<Mutex<HashMap<KeyId, u64>>>);

/// A request too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this API key may make {rate} requests a second at this node: try again in {retry_after_s} s"
)]
pub(super) struct TooMany {
    /// How many a second may come.
    pub(super) rate: u32,
    /// Seconds until the next one may, at least 1.
    pub(super) retry_after_s: u64,
}

impl Rates {
    /// Takes one request of `key` out of its bucket.
    pub(super) fn take(&self, key: KeyId, settings: &Settings, now: Stamp) -> Result<(), TooMany> {
        let rate = settings.key_rate;
        if rate == 0 {
            return Ok(());
        }
        let each_us = MICROS_IN_SECOND.div_ceil(rate.into());
        let burst_us = each_us.saturating_mul(settings.key_burst.max(1).into());
        let now_us = now.0.saturating_mul(MICROS_IN_MILLI);
        let mut full_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = full_at.get(&key).copied().unwrap_or(0);
        // A wall clock that was put back must not lock anybody out, nor fill a bucket twice.
        let known = known.clamp(now_us, now_us.saturating_add(burst_us));
        let then = known.saturating_add(each_us);
        let beyond = then.saturating_sub(now_us.saturating_add(burst_us));
        if beyond > 0 {
            full_at.insert(key, known);
            let retry_after_s = beyond.div_ceil(MICROS_IN_SECOND).max(1);
            return Err(TooMany {
                rate,
                retry_after_s,
            });
        }
        if full_at.len() >= FORGET_FROM {
            full_at.retain(|_, at| *at > now_us);
        }
        full_at.insert(key, then);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: KeyId = KeyId([1; 16]);
    const START: u64 = 1_700_000_000_000;

    fn settings(key_rate: u32, key_burst: u32) -> Settings {
        Settings {
            key_rate,
            key_burst,
            ..Settings::default()
        }
    }

    /// How many of `tries` get through at one instant.
    fn passed(rates: &Rates, settings: &Settings, at_ms: u64, tries: usize) -> usize {
        let ask = || rates.take(KEY, settings, Stamp(START + at_ms));
        (0..tries).filter(|_| ask().is_ok()).count()
    }

    #[test]
    fn a_burst_passes_at_once_and_then_as_many_as_the_rate_says() {
        let (rates, limit) = (Rates::default(), settings(10, 20));
        assert_eq!(passed(&rates, &limit, 0, 50), 20);
        assert_eq!(passed(&rates, &limit, 99, 5), 0);
        assert_eq!(passed(&rates, &limit, 100, 5), 1);
        assert_eq!(passed(&rates, &limit, 1100, 50), 10);
        assert_eq!(
            passed(&rates, &limit, 1_000_000, 50),
            20,
            "no more than a burst"
        );
    }

    #[test]
    fn who_is_refused_is_told_when_to_come_again() {
        let (rates, limit) = (Rates::default(), settings(1, 1));
        let ask = |ms| rates.take(KEY, &limit, Stamp(START + ms));
        assert_eq!(ask(0), Ok(()));
        let again = TooMany {
            rate: 1,
            retry_after_s: 1,
        };
        assert_eq!(ask(10), Err(again));
        assert_eq!(ask(1000), Ok(()));
    }

    #[test]
    fn keys_have_buckets_of_their_own_and_zero_is_no_limit() {
        let (rates, limit) = (Rates::default(), settings(1, 1));
        assert_eq!(passed(&rates, &limit, 0, 2), 1);
        let other = rates.take(KeyId([2; 16]), &limit, Stamp(START));
        assert_eq!(other, Ok(()));
        assert_eq!(passed(&rates, &settings(0, 0), 0, 1000), 1000);
    }

    #[test]
    fn a_clock_that_is_put_back_locks_nobody_out_for_longer_than_a_burst_takes() {
        let (rates, limit) = (Rates::default(), settings(10, 10));
        assert_eq!(passed(&rates, &limit, 3_600_000, 10), 10);
        assert_eq!(passed(&rates, &limit, 0, 1), 0);
        assert_eq!(passed(&rates, &limit, 1000, 10), 10);
    }

    #[test]
    fn keys_that_stay_away_are_forgotten() {
        let (rates, limit) = (Rates::default(), settings(10, 1));
        for n in 0..3000_u32 {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_le_bytes());
            let at = Stamp(START + u64::from(n) * 1000);
            assert_eq!(rates.take(KeyId(id), &limit, at), Ok(()));
        }
        assert!(rates.0.lock().expect("a lock").len() <= FORGET_FROM);
    }
}
