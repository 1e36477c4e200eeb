//! When the guest's wall clock follows the host's word, and the step itself.

use jiff::{SignedDuration, Timestamp};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// A guest further behind than this is corrected; less is within the delay of the message itself.
const BEHIND_LIMIT: SignedDuration = SignedDuration::from_millis(50);
/// A guest further ahead than this is corrected. Larger, because the message is always late.
const AHEAD_LIMIT: SignedDuration = SignedDuration::from_secs(5);

/// Whether a clock that shows `guest` must be stepped to `host`. Pure.
#[must_use]
pub fn must_step(guest: Timestamp, host: Timestamp) -> bool {
    let behind = host.duration_since(guest);
    behind > BEHIND_LIMIT || -behind > AHEAD_LIMIT
}

/// Steps the wall clock to `host` if it is off by more than the limits.
///
/// # Errors
/// What the kernel said.
pub fn follow(host: Timestamp) -> nix::Result<()> {
    if must_step(Timestamp::now(), host) {
        set(host)?;
    }
    Ok(())
}

/// Steps the wall clock to `now`.
///
/// # Errors
/// What the kernel said.
pub fn set(now: Timestamp) -> nix::Result<()> {
    let nanoseconds = i64::from(now.subsec_nanosecond());
    clock_settime(
        ClockId::CLOCK_REALTIME,
        TimeSpec::new(now.as_second(), nanoseconds),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_is_stepped_only_past_the_limits() {
        let guest = Timestamp::from_second(1_000).expect("valid");
        for (host_ms, stepped) in [
            (0, false),
            (50, false),
            (51, true),
            (-5_000, false),
            (-5_001, true),
        ] {
            let host = guest + SignedDuration::from_millis(host_ms);
            assert_eq!(must_step(guest, host), stepped, "host at {host_ms} ms");
        }
    }
}
