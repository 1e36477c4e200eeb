//! Sizes and instants with the unit in the type.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes in one MiB.
pub const MIB_BYTES: u64 = 1 << 20;

/// An amount of memory or disk in MiB, the unit that people configure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mib(pub u32);

impl Mib {
    /// The same amount in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        // Widening: a u32 always fits.
        self.0 as u64 * MIB_BYTES
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// A wall-clock instant as carried inside commands: milliseconds since the Unix epoch.
///
/// The proposer reads its clock once; the state machine never does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub u64);

impl Stamp {
    /// The stamp of `time`; instants before 1970 become the epoch itself.
    #[must_use]
    pub fn from_system(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// The time that has passed from `earlier` to `self`, zero if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}
