//! Reading the wall clock, behind a trait so that tests move it by hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use proto::units::Stamp;

/// A source of wall-clock stamps for commands and records.
pub trait Clock: Send + Sync + 'static {
    /// The present instant.
    fn now(&self) -> Stamp;
}

/// The machine's own clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Stamp {
        Stamp::from_system(SystemTime::now())
    }
}

/// A clock that stands still until a test moves it.
#[derive(Clone, Debug, Default)]
pub struct HandClock(Arc<AtomicU64>);

impl HandClock {
    /// A clock that shows `start`.
    #[must_use]
    pub fn at(start: Stamp) -> Self {
        Self(Arc::new(AtomicU64::new(start.0)))
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.0.fetch_add(by_ms, Ordering::Relaxed);
    }
}

impl Clock for HandClock {
    fn now(&self) -> Stamp {
        Stamp(self.0.load(Ordering::Relaxed))
    }
}
