//! How long a lease lasts, and what must hold between the numbers.

use std::time::Duration;

use raft::state::Settings;

/// How long a granted renewal is good for, from when it was sent. Long enough for a leader change
/// (below one second) and two lost renewals, short enough that a dead host is noticed in seconds.
pub const TTL: Duration = Duration::from_secs(10);
/// How often a node renews.
pub const RENEW_EVERY: Duration = Duration::from_secs(2);
/// How long before the end of its lease a node freezes its guests: the watchdog may stall for a
/// second and the freeze itself may take half of one.
pub const FREEZE_AHEAD: Duration = Duration::from_secs(2);
/// How much longer than the holder the leader counts: it covers clocks whose rates differ by up to
/// [`RATE_ERROR_PERCENT`] and a stall of up to [`STALL`] before a guest is stopped.
pub const MARGIN: Duration = Duration::from_secs(2);
/// How long guests stay frozen, and a node `Missing`, before the guests are killed and the node is
/// `Lost`. A switch that reboots takes about this long, and frozen guests survive it.
pub const GRACE: Duration = Duration::from_secs(60);

/// How far the rates of two machines' clocks may differ. Real ones are below 0.05 %.
const RATE_ERROR_PERCENT: u32 = 1;
/// Longest time a watchdog may be late.
const STALL: Duration = Duration::from_secs(1);
/// The other times as a share of the time to live, where that one is changed.
const SHARE: u32 = 5;
/// Below this a busy machine would lose leases it deserves.
const SHORTEST_TTL: Duration = Duration::from_secs(1);

// Two renewals may be lost and the third still comes before the freeze.
const _: () = assert!(
    3 * RENEW_EVERY.as_millis() + FREEZE_AHEAD.as_millis() <= TTL.as_millis(),
    "three renewals fit before the freeze"
);
const _: () = assert!(
    (TTL.as_millis() + GRACE.as_millis()) * RATE_ERROR_PERCENT as u128 / 100 + STALL.as_millis()
        <= MARGIN.as_millis(),
    "the margin covers drift and stall over the longest wait"
);
const _: () = assert!(
    TTL.as_millis() == SHARE as u128 * RENEW_EVERY.as_millis()
        && TTL.as_millis() == SHARE as u128 * FREEZE_AHEAD.as_millis()
        && TTL.as_millis() == SHARE as u128 * MARGIN.as_millis(),
    "the defaults have the shares that changed times get"
);

/// The times of all leases of a cluster. Every node must have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseTimes {
    pub(super) ttl: Duration,
    pub(super) grace: Duration,
    pub(super) freeze_ahead: Duration,
    pub(super) margin: Duration,
}

/// Why times will not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTimes {
    /// The time to live is too short for any machine to keep.
    #[error("lease time to live is {ttl:?}, must be at least {SHORTEST_TTL:?}")]
    TtlTooShort {
        /// As asked for.
        ttl: Duration,
    },
}

impl Default for LeaseTimes {
    fn default() -> Self {
        Self {
            ttl: TTL,
            grace: GRACE,
            freeze_ahead: FREEZE_AHEAD,
            margin: MARGIN,
        }
    }
}

impl From<&Settings> for LeaseTimes {
    /// The replicated settings were checked when they were proposed.
    fn from(settings: &Settings) -> Self {
        Self::of(settings.lease_ttl.max(SHORTEST_TTL), settings.lease_grace)
    }
}

impl LeaseTimes {
    /// Other times than the defaults; renewal and freeze keep their shares, and the margin covers
    /// drift and stall over the longest wait.
    ///
    /// # Errors
    /// [`BadTimes`] says which of them no machine could keep.
    pub fn new(ttl: Duration, grace: Duration) -> Result<Self, BadTimes> {
        if ttl < SHORTEST_TTL {
            return Err(BadTimes::TtlTooShort { ttl });
        }
        Ok(Self::of(ttl, grace))
    }

    fn of(ttl: Duration, grace: Duration) -> Self {
        let drift = ttl.saturating_add(grace) / 100 * RATE_ERROR_PERCENT;
        Self {
            ttl,
            grace,
            freeze_ahead: ttl / SHARE,
            margin: STALL.saturating_add(drift).max(ttl / SHARE),
        }
    }

    /// How long a granted renewal is good for.
    #[must_use]
    pub const fn ttl(&self) -> Duration {
        self.ttl
    }

    /// How long after the end of its lease a node's guests are killed.
    #[must_use]
    pub const fn grace(&self) -> Duration {
        self.grace
    }

    /// How often to renew.
    #[must_use]
    pub fn renew_every(&self) -> Duration {
        self.ttl / SHARE
    }

    /// After how long without a renewal the leader calls a node `Missing`.
    #[must_use]
    pub const fn missing_after(&self) -> Duration {
        self.ttl.saturating_add(self.margin)
    }

    /// After how long without a renewal the leader calls a node `Lost`.
    #[must_use]
    pub const fn lost_after(&self) -> Duration {
        self.missing_after().saturating_add(self.grace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_pass_their_own_validation() {
        assert_eq!(LeaseTimes::new(TTL, GRACE), Ok(LeaseTimes::default()));
        assert_eq!(LeaseTimes::default().renew_every(), RENEW_EVERY);
        assert_eq!(
            LeaseTimes::from(&Settings::default()),
            LeaseTimes::default()
        );
    }

    #[test]
    fn a_lease_no_machine_could_keep_is_refused_by_name() {
        let short = LeaseTimes::new(Duration::from_millis(999), Duration::ZERO);
        assert!(matches!(short, Err(BadTimes::TtlTooShort { .. })));
    }

    #[test]
    fn a_long_grace_gets_a_margin_that_covers_its_drift() {
        let times = LeaseTimes::new(Duration::from_secs(10), Duration::from_secs(990));
        let margin = times.map(|times| times.margin);
        assert_eq!(margin, Ok(Duration::from_secs(11)));
    }
}
