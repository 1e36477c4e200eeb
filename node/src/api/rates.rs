//! How many requests a second one key may make at this node, and the visitors of one capsule.
//!
//! Each node counts by itself: a client that goes to all of them has the limit of all together. What
//! goes on over an open stream is not counted. No wall clock is asked, whose steps would lock out everybody.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use raft::state::Settings;

use crate::base::clock::BootInstant;

/// Once there are this many buckets, and twice as many as were left the last time, those that are full again are
/// forgotten: they are as if nobody had ever come.
const FORGET_FROM: usize = 1024;
const MICROS_IN_SECOND: u32 = 1_000_000;

/// Of one key for which nothing is set. Clients that work in 200 capsules at once and ask each of them twice a second
/// make half of it, and all of their creates and commands at once are a fraction of the burst; a loop that has gone
/// wild does not take all that a node answers.
const OF_KEY: Limit = Limit {
    rate: 1000,
    burst: 5000,
};
/// Of the ports of one capsule. A page under development asks for up to two thousand files at once, and several people
/// may open it together; passing on as many in a second keeps less than a processor busy.
pub(super) const OF_VISITS: Limit = Limit {
    rate: 2000,
    burst: 10_000,
};

/// How many requests may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    /// How many a second, at least 1.
    rate: u32,
    /// How many at once after a pause, at least 1.
    burst: u32,
}

impl Limit {
    /// So many a second, and so many at once; one of each at least.
    pub(super) fn new(rate: u32, burst: u32) -> Self {
        Self {
            rate: rate.max(1),
            burst: burst.max(1),
        }
    }

    /// What a key may ask for.
    pub(super) fn of_key(settings: &Settings) -> Self {
        if settings.key_rate == 0 {
            return OF_KEY;
        }
        Self::new(settings.key_rate, settings.key_burst)
    }
}

/// The buckets of all who ask.
#[derive(Clone, Debug)]
pub(super) struct Rates<K>(Arc<Mutex<Buckets<K>>>);

#[derive(Debug)]
struct Buckets<K> {
    /// The instant at which each is full again.
    full_at: HashMap<K, BootInstant>,
    /// From how many on they are looked through.
    forget_from: usize,
}

impl<K> Default for Rates<K> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Buckets {
            full_at: HashMap::new(),
            forget_from: FORGET_FROM,
        })))
    }
}

/// A request too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMany {
    /// How many a second may come.
    pub(super) rate: u32,
    /// Seconds until the next one may, at least 1.
    pub(super) retry_after_s: u64,
}

impl TooMany {
    /// The refusal in words. `who` asks for too much.
    pub(super) fn words(self, who: &str) -> String {
        let Self {
            rate,
            retry_after_s,
        } = self;
        format!(
            "{who} may make {rate} requests a second at this node: try again in {retry_after_s} s"
        )
    }
}

impl<K: Eq + Hash> Rates<K> {
    /// Takes one request of `who` out of its bucket.
    pub(super) fn take(&self, who: K, limit: Limit, now: BootInstant) -> Result<(), TooMany> {
        let rate = limit.rate;
        let each = Duration::from_micros(MICROS_IN_SECOND.div_ceil(rate).into());
        let empty_until = now + each * limit.burst;
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets {
            full_at,
            forget_from,
        } = &mut *buckets;
        // It may have been emptied while more was allowed.
        let known = full_at.get(&who).copied().unwrap_or(now);
        let known = known.clamp(now, empty_until);
        let then = known + each;
        let beyond = then.saturating_duration_since(empty_until);
        if beyond > Duration::ZERO {
            full_at.insert(who, known);
            let retry_after_s = beyond.as_secs() + u64::from(beyond.subsec_nanos() > 0);
            return Err(TooMany {
                rate,
                retry_after_s,
            });
        }
        if full_at.len() >= *forget_from {
            full_at.retain(|_, at| *at > now);
            *forget_from = FORGET_FROM.max(2 * full_at.len());
        }
        full_at.insert(who, then);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::KeyId;

    use super::*;

    const KEY: KeyId = KeyId([1; 16]);

    /// So long after the first look.
    fn at(ms: u64) -> BootInstant {
        BootInstant::from_nanos(1) + Duration::from_millis(ms)
    }

    /// How many of `tries` get through at one instant.
    fn passed(rates: &Rates<KeyId>, limit: Limit, at_ms: u64, tries: usize) -> usize {
        let ask = || rates.take(KEY, limit, at(at_ms));
        (0..tries).filter(|_| ask().is_ok()).count()
    }

    #[test]
    fn a_burst_passes_at_once_and_then_as_many_as_the_rate_says() {
        let (rates, limit) = (Rates::default(), Limit::new(10, 20));
        assert_eq!(passed(&rates, limit, 0, 50), 20);
        assert_eq!(passed(&rates, limit, 99, 5), 0);
        assert_eq!(passed(&rates, limit, 100, 5), 1);
        assert_eq!(passed(&rates, limit, 1100, 50), 10);
        assert_eq!(
            passed(&rates, limit, 1_000_000, 50),
            20,
            "no more than a burst"
        );
    }

    #[test]
    fn who_is_refused_is_told_when_to_come_again() {
        let (rates, limit) = (Rates::default(), Limit::new(1, 1));
        let ask = |ms| rates.take(KEY, limit, at(ms));
        assert_eq!(ask(0), Ok(()));
        let again = TooMany {
            rate: 1,
            retry_after_s: 1,
        };
        assert_eq!(ask(10), Err(again));
        assert_eq!(ask(1000), Ok(()));
    }

    #[test]
    fn keys_have_buckets_of_their_own() {
        let (rates, limit) = (Rates::default(), Limit::new(1, 1));
        assert_eq!(passed(&rates, limit, 0, 2), 1);
        let other = rates.take(KeyId([2; 16]), limit, at(0));
        assert_eq!(other, Ok(()));
    }

    #[test]
    fn a_key_for_which_nothing_is_set_has_room_for_many_commands_at_once_and_no_end() {
        let nothing = Limit::of_key(&Settings::default());
        let rates = Rates::default();
        assert_eq!(passed(&rates, nothing, 0, 6000), 5000);
        assert_eq!(passed(&rates, nothing, 1000, 6000), 1000);
        let set = Settings {
            key_rate: 7,
            key_burst: 9,
            ..Settings::default()
        };
        assert_eq!(Limit::of_key(&set), Limit::new(7, 9));
    }

    #[test]
    fn who_may_have_less_than_before_waits_no_longer_than_that_takes() {
        let rates = Rates::default();
        assert_eq!(passed(&rates, Limit::new(1, 1000), 0, 1000), 1000);
        let less = Limit::new(10, 10);
        assert_eq!(passed(&rates, less, 0, 1), 0);
        assert_eq!(passed(&rates, less, 1000, 20), 10);
    }

    #[test]
    fn keys_that_stay_away_are_forgotten() {
        let (rates, limit) = (Rates::default(), Limit::new(10, 1));
        for n in 0..3000_u32 {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_le_bytes());
            let taken = rates.take(KeyId(id), limit, at(u64::from(n) * 1000));
            assert_eq!(taken, Ok(()));
        }
        assert!(rates.0.lock().expect("a lock").full_at.len() <= FORGET_FROM);
    }
}
