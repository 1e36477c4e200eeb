//! Reading the clocks, behind traits so that tests move them by hand.
//!
//! Two clocks, two types: a [`Stamp`] is of the wall clock, for people and records, and may step;
//! a [`BootInstant`] is of `CLOCK_BOOTTIME`, for leases: nobody can set it, and unlike
//! [`std::time::Instant`] it goes on while the host is suspended. It starts anew at each boot and
//! means nothing on another host.

use std::ops::{Add, Sub};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
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

    /// Sets the clock, also back, as an administrator or a time service does.
    pub fn set(&self, to: Stamp) {
        self.0.store(to.0, Ordering::Relaxed);
    }
}

impl Clock for HandClock {
    fn now(&self) -> Stamp {
        Stamp(self.0.load(Ordering::Relaxed))
    }
}

/// Nanoseconds in a second.
const NANOS: u64 = 1_000_000_000;

/// An instant of this boot of this host, on `CLOCK_BOOTTIME`. Arithmetic saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootInstant(u64);

impl BootInstant {
    /// Later than any instant a host lives to see.
    pub const MAX: Self = Self(u64::MAX);

    /// The instant `nanos` nanoseconds after the boot.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the boot.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The present instant, on the machine's own clock.
    #[must_use]
    pub fn now() -> Self {
        SystemBootClock.now()
    }

    /// How long after `earlier` this is; zero if it is not.
    #[must_use]
    pub const fn saturating_duration_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, later_by: Duration) -> Self {
        Self(self.0.saturating_add(nanos(later_by)))
    }
}

impl Sub<Duration> for BootInstant {
    type Output = Self;

    fn sub(self, earlier_by: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(earlier_by)))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A source of instants that no one can set and no suspend stops.
pub trait BootClock: Send + Sync + 'static {
    /// The present instant.
    fn now(&self) -> BootInstant;
}

/// The machine's own `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemBootClock;

impl SystemBootClock {
    /// Blocks this thread until `deadline`. Also ends at once when the host wakes up after it
    /// from a suspend. May end early: ask the clock.
    pub fn sleep_until(self, deadline: BootInstant) {
        let absolute = ClockNanosleepFlags::TIMER_ABSTIME;
        let slept = clock_nanosleep(ClockId::CLOCK_BOOTTIME, absolute, &timespec(deadline));
        if !matches!(slept, Ok(_) | Err(nix::errno::Errno::EINTR)) {
            // Nothing here can refuse an absolute sleep. A caller's loop must not spin all the same.
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl BootClock for SystemBootClock {
    fn now(&self) -> BootInstant {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has it since 2.6.39");
        BootInstant(nanos(Duration::from(now)))
    }
}

/// `instant` as the kernel takes it, cut to what it can express.
fn timespec(instant: BootInstant) -> TimeSpec {
    let whole = i64::try_from(instant.0 / NANOS).unwrap_or(i64::MAX);
    let rest = i64::try_from(instant.0 % NANOS).unwrap_or(0);
    TimeSpec::new(whole, rest)
}

/// A boot clock that stands still until a test moves it.
#[derive(Clone, Debug, Default)]
pub struct HandBootClock(Arc<AtomicU64>);

impl HandBootClock {
    /// A clock that shows `start`.
    #[must_use]
    pub fn at(start: BootInstant) -> Self {
        Self(Arc::new(AtomicU64::new(start.0)))
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(nanos(by), Ordering::Relaxed);
    }
}

impl BootClock for HandBootClock {
    fn now(&self) -> BootInstant {
        BootInstant(self.0.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_on_boot_instants_saturates() {
        let second = Duration::from_secs(1);
        let early = BootInstant::from_nanos(5);
        assert_eq!(early - second, BootInstant::default());
        assert_eq!(early + Duration::MAX, BootInstant::MAX);
        assert_eq!((early + second) - second, early);
        assert_eq!((early + second).saturating_duration_since(early), second);
        assert_eq!(
            early.saturating_duration_since(early + second),
            Duration::ZERO
        );
    }

    #[test]
    fn a_sleep_ends_at_its_instant_and_not_before() {
        let before = BootInstant::now();
        let deadline = before + Duration::from_millis(5);
        SystemBootClock.sleep_until(deadline);
        assert!(BootInstant::now() >= deadline);
        // One that has passed is none.
        SystemBootClock.sleep_until(before);
    }

    #[test]
    fn a_hand_moved_boot_clock_stands_until_it_is_moved() {
        let clock = HandBootClock::at(BootInstant::from_nanos(7));
        assert_eq!(clock.now(), BootInstant::from_nanos(7));
        clock.clone().advance(Duration::from_nanos(3));
        assert_eq!(clock.now(), BootInstant::from_nanos(10));
    }
}
