//! The lease that lets a node run guests, as two pure state machines.
//!
//! The [`Holder`] is the node's half: it counts its right from the instant at which it *sent* the
//! renewal that was granted. The [`Book`] is the leader's half: it counts from the instant at which
//! it *received* the last renewal it granted, which is never earlier. So on exact clocks the node's
//! right ends first, and [`MARGIN`] covers clocks that are not exact.
//!
//! ```text
//! node    sent ---- freeze ------ valid-until ----------------- kill
//!           |  ttl - 2 s    2 s               grace              |
//! leader     received ------------ ttl + 2 s: Missing ------------ + grace: Lost
//! ```
//!
//! Both halves must go by a clock that counts the time a machine is suspended (`CLOCK_BOOTTIME`),
//! each by its own: no instant of one machine is ever compared with one of another. What the
//! caller owes is said at each method; what happens without it is shown in this room's `model`.
//! Every rule of safety here holds only for guests that are lease-bound, and it stands on a third
//! party, the shim, which freezes and kills at the [`Limits`] though nobody tells it to.

mod book;
mod holder;
#[cfg(test)]
mod model;
mod times;

use std::time::Duration;

use crate::base::clock::BootInstant;

pub use book::{Book, Listed, Liveness, Refused, Verdict};
pub use holder::{Granted, Holder, Limits, Renewal};
pub use times::{BadTimes, FREEZE_AHEAD, GRACE, LeaseTimes, MARGIN, RENEW_EVERY, TTL};

/// An instant on one machine's suspend-aware clock: the time since that clock's own zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub Duration);

impl Tick {
    /// Later than every instant there will be.
    pub const NEVER: Self = Self(Duration::MAX);

    /// The instant `wait` later; [`Self::NEVER`] where that is past all counting.
    #[must_use]
    pub const fn plus(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(wait))
    }

    /// The instant `ahead` earlier, the clock's zero at the earliest.
    #[must_use]
    pub const fn less(self, ahead: Duration) -> Self {
        Self(self.0.saturating_sub(ahead))
    }

    /// The time that has passed from `earlier` to `self`, zero if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl From<BootInstant> for Tick {
    fn from(at: BootInstant) -> Self {
        Self(Duration::from_nanos(at.as_nanos()))
    }
}

impl From<Tick> for BootInstant {
    fn from(tick: Tick) -> Self {
        u64::try_from(tick.0.as_nanos()).map_or(Self::MAX, Self::from_nanos)
    }
}
