//! What makes a guest obey its node's lease when nobody else can: the daemon may be dead, stopped
//! or cut off, the disk may hang, the host may have slept.
//!
//! Two threads, one decision ([`decide`]), taken under one lock:
//!
//! - `lease-reader` reads the file every [`LOOK_INTERVAL`], and then looks;
//! - `lease-timer` touches no file, sleeps on `CLOCK_BOOTTIME` to the instant it knows, and looks.
//!   A disk that hangs can stop the reader; it cannot stop this one.
//!
//! The guest is frozen by SIGSTOP to its VMM and thawed by SIGCONT, so nothing depends on the
//! VMM's cooperation. While the lease is bad every look stops the VMM once more, in case somebody
//! let it go on by hand. A kill is for good, whatever the file says afterwards: past it the
//! cluster may have given the sandbox to another node.
//!
//! After a suspend of the host both threads find that their sleep is over and look before they
//! sleep again; a guest that was frozen stays so until a look has seen a lease that holds. If one
//! of the two threads panics, it takes the guest with it: no guest runs unwatched.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::base::chain::chain;
use crate::base::clock::{BootClock, BootInstant, SystemBootClock};
use crate::shim::console::BoundedLog;
use crate::shim::error::RunShimError;
use crate::shim::files;
use crate::shim::freeze::Frozen;
use crate::shim::lease::{Decision, GuestState, LeaseReader, LeaseTimes, ReadLeaseError, decide};
use crate::vmm::{Vmm, jail};

/// The longest between two looks. Bounds how long a renewed lease goes unnoticed, and costs four
/// wake-ups a second.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Stack of the two threads: a record, a path and a few calls.
const STACK_BYTES: usize = 64 * 1024;

/// A lease that held when its shim started.
#[derive(Debug)]
pub struct Lease {
    reader: LeaseReader,
    times: LeaseTimes,
}

impl Lease {
    /// Reads the lease in `path`.
    ///
    /// # Errors
    /// There is none, or it has ended: no guest may be started.
    pub fn read(path: &Path) -> Result<Self, RunShimError> {
        let reader = LeaseReader::new(path).map_err(|source| RunShimError::System {
            doing: "learn which boot of this host this is",
            source,
        })?;
        let times = reader.read()?;
        match decide(BootInstant::now(), times, GuestState::Running) {
            Decision::Wait { .. } => Ok(Self { reader, times }),
            Decision::Freeze | Decision::Thaw | Decision::Kill => Err(RunShimError::LeaseEnded),
        }
    }
}

/// The watch over one guest.
pub struct Watchdog {
    vmm: Arc<dyn Vmm>,
    frozen: Arc<Frozen>,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    times: LeaseTimes,
    /// When `times` last got new ones.
    renewed_at: BootInstant,
    /// Once the guest was killed: how long its node had had no new lease.
    lost_for: Option<Duration>,
}

impl Watchdog {
    /// The watch over `vmm`, which runs, under `times`.
    #[must_use]
    pub fn new(
        vmm: Arc<dyn Vmm>,
        frozen: Arc<Frozen>,
        times: LeaseTimes,
        now: BootInstant,
    ) -> Self {
        let seen = Seen {
            times,
            renewed_at: now,
            lost_for: None,
        };
        Self {
            vmm,
            frozen,
            seen: Mutex::new(seen),
        }
    }

    /// Looks for the first time, and starts the threads that go on looking until the process
    /// ends. What they do is noted in the log of `dir`.
    ///
    /// # Errors
    /// The kernel has no thread to give.
    pub fn start(
        vmm: Arc<dyn Vmm>,
        frozen: Arc<Frozen>,
        lease: Lease,
        dir: &Path,
    ) -> io::Result<Arc<Self>> {
        let clock = SystemBootClock;
        let Lease { reader, times } = lease;
        let watchdog = Arc::new(Self::new(vmm, frozen, times, clock.now()));
        watchdog.look(clock.now());
        let timed = Arc::clone(&watchdog);
        spawn("lease-timer", move || timed.keep_time(clock))?;
        let (read, log) = (Arc::clone(&watchdog), BoundedLog::new(dir, files::LOG));
        spawn("lease-reader", move || {
            read.keep_reading(clock, &reader, log);
        })?;
        stay_in_memory();
        Ok(watchdog)
    }

    /// How long the node had had no new lease when the guest was killed for it; `None` if it was
    /// not.
    #[must_use]
    pub fn lost_for(&self) -> Option<Duration> {
        self.lock().lost_for
    }

    fn keep_time(&self, clock: SystemBootClock) {
        let _guard = NeverUnwatched(&*self.vmm);
        raise_priority();
        loop {
            let now = clock.now();
            let next = self.look(now).unwrap_or(BootInstant::MAX);
            clock.sleep_until(next.min(now + LOOK_INTERVAL));
        }
    }

    fn keep_reading(&self, clock: SystemBootClock, reader: &LeaseReader, log: BoundedLog) {
        let _guard = NeverUnwatched(&*self.vmm);
        raise_priority();
        let mut diary = Diary {
            log,
            last: String::new(),
        };
        loop {
            let next = clock.now() + LOOK_INTERVAL;
            let read = reader.read();
            let why = read.as_ref().err().map(|err| chain(err));
            self.hear(read, clock.now());
            self.look(clock.now());
            // Last, because the disk may hang.
            diary.note(self.words(why));
            clock.sleep_until(next);
        }
    }

    /// Takes in what the file says.
    fn hear(&self, read: Result<LeaseTimes, ReadLeaseError>, now: BootInstant) {
        let mut seen = self.lock();
        match read {
            Ok(times) if times == seen.times && times != LeaseTimes::Unlimited => {}
            Ok(times) => {
                seen.times = times;
                seen.renewed_at = now;
            }
            Err(_) => seen.times = seen.times.withdrawn(now),
        }
    }

    /// Does what the lease asks for now. Returns when to look again at the latest; `None` where
    /// only another lease can change anything.
    fn look(&self, now: BootInstant) -> Option<BootInstant> {
        let mut seen = self.lock();
        let frozen = self.frozen.get();
        let state = if frozen {
            GuestState::Frozen
        } else {
            GuestState::Running
        };
        let decision = match seen.lost_for {
            // For good, whatever the file says by now.
            Some(_) => Decision::Kill,
            None => decide(now, seen.times, state),
        };
        let after = match decision {
            Decision::Freeze => self.freeze(),
            Decision::Thaw => self.thaw(),
            Decision::Kill => {
                let lost_for = now.saturating_duration_since(seen.renewed_at);
                seen.lost_for.get_or_insert(lost_for);
                // One that is refused is tried again by the next look.
                let _tried = self.vmm.kill();
                return Some(now + LOOK_INTERVAL);
            }
            // Somebody may have let it go on by hand.
            Decision::Wait { .. } if frozen => self.freeze(),
            Decision::Wait { until } => return until,
        };
        match decide(now, seen.times, after) {
            Decision::Wait { until } => until,
            // The kernel refused; at once would spin.
            _ => Some(now + LOOK_INTERVAL),
        }
    }

    fn freeze(&self) -> GuestState {
        if self.vmm.freeze().is_err() {
            // Whatever the reason: a guest that cannot be frozen must not run.
            let _tried = self.vmm.kill();
        }
        self.frozen.set(true);
        GuestState::Frozen
    }

    fn thaw(&self) -> GuestState {
        if self.vmm.thaw().is_err() {
            return GuestState::Frozen;
        }
        self.frozen.set(false);
        GuestState::Running
    }

    /// What a person who reads the log is told.
    fn words(&self, unreadable: Option<String>) -> String {
        if self.lost_for().is_some() {
            return "the lease has ended: the guest is killed".into();
        }
        match (self.frozen.get(), unreadable) {
            (true, Some(why)) => format!("there is no lease: the guest is frozen ({why})"),
            (true, None) => "the lease was not renewed: the guest is frozen".into(),
            (false, _) => "the lease holds: the guest runs".into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes what is new.
struct Diary {
    log: BoundedLog,
    last: String,
}

impl Diary {
    fn note(&mut self, words: String) {
        if words != self.last {
            self.log.append(format!("{words}\n").as_bytes());
            self.last = words;
        }
    }
}

/// Kills the guest of a watch that panics.
struct NeverUnwatched<'a>(&'a dyn Vmm);

impl Drop for NeverUnwatched<'_> {
    fn drop(&mut self) {
        let _tried = self.0.kill();
    }
}

/// Puts the calling thread before all ordinary ones: it works for microseconds, and a busy host
/// must not let it wait. Without the right to do so it waits its turn.
fn raise_priority() {
    let _as_far_as_allowed = jail::raise_priority();
}

/// Keeps what this process has touched in memory: on a host that swaps, the watch must not wait
/// for the disk. Only pages that are touched count, so the process grows by nothing. Without the
/// right to do so they are swapped like any others.
fn stay_in_memory() {
    let touched_later_too = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let _as_far_as_allowed = mlockall(MlockAllFlags::MCL_CURRENT | touched_later_too);
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.stack_size(STACK_BYTES).spawn(work).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::fake::FakeVmm;

    fn at(millis: u64) -> BootInstant {
        BootInstant::default() + Duration::from_millis(millis)
    }

    fn limited(freeze_ms: u64, kill_ms: u64) -> LeaseTimes {
        LeaseTimes::Limited {
            freeze_at: at(freeze_ms),
            kill_at: at(kill_ms),
        }
    }

    fn unreadable() -> Result<LeaseTimes, ReadLeaseError> {
        Err(ReadLeaseError::Garbled {
            path: "/data/lease".into(),
        })
    }

    fn watch(times: LeaseTimes) -> (Watchdog, Arc<FakeVmm>) {
        let vmm = Arc::new(FakeVmm::stubborn());
        let watchdog = Watchdog::new(vmm.clone(), Arc::default(), times, at(0));
        (watchdog, vmm)
    }

    #[test]
    fn a_lease_that_is_not_renewed_freezes_and_then_kills() {
        let (watchdog, vmm) = watch(limited(8_000, 70_000));
        assert_eq!(watchdog.look(at(7_999)), Some(at(8_000)));
        assert!(vmm.told().is_empty());
        assert_eq!(watchdog.look(at(8_000)), Some(at(70_000)));
        assert!(watchdog.frozen.get());
        assert_eq!(watchdog.lost_for(), None);
        watchdog.look(at(70_000));
        assert_eq!(vmm.told(), ["freeze", "kill"]);
        assert_eq!(watchdog.lost_for(), Some(Duration::from_secs(70)));
    }

    #[test]
    fn a_renewal_thaws_at_the_look_after_it_and_is_watched_exactly() {
        let (watchdog, vmm) = watch(limited(8_000, 70_000));
        watchdog.look(at(8_000));
        watchdog.hear(Ok(limited(19_000, 80_000)), at(11_000));
        assert_eq!(watchdog.look(at(11_000)), Some(at(19_000)));
        assert_eq!(vmm.told(), ["freeze", "thaw"]);
        assert!(!watchdog.frozen.get());
        watchdog.look(at(80_000));
        // Counted from the renewal, not from the start.
        assert_eq!(watchdog.lost_for(), Some(Duration::from_secs(69)));
    }

    #[test]
    fn a_killed_guest_stays_killed_whatever_the_file_says_later() {
        let (watchdog, vmm) = watch(limited(8_000, 70_000));
        watchdog.look(at(70_000));
        watchdog.hear(Ok(LeaseTimes::Unlimited), at(70_001));
        watchdog.look(at(70_001));
        assert_eq!(vmm.told(), ["kill", "kill"]);
    }

    #[test]
    fn a_frozen_guest_that_somebody_let_go_on_is_frozen_again() {
        let (watchdog, vmm) = watch(limited(8_000, 70_000));
        watchdog.look(at(8_000));
        watchdog.look(at(8_250));
        assert_eq!(vmm.told(), ["freeze", "freeze"]);
    }

    #[test]
    fn a_file_that_cannot_be_read_freezes_at_once_and_thaws_once_it_can() {
        let (watchdog, vmm) = watch(limited(8_000, 70_000));
        watchdog.hear(unreadable(), at(100));
        assert_eq!(watchdog.look(at(100)), Some(at(70_000)));
        watchdog.hear(Ok(limited(8_000, 70_000)), at(350));
        watchdog.look(at(350));
        assert_eq!(vmm.told(), ["freeze", "thaw"]);
    }

    #[test]
    fn an_unlimited_lease_that_cannot_be_read_any_more_kills_after_the_grace() {
        let (watchdog, vmm) = watch(LeaseTimes::Unlimited);
        assert_eq!(watchdog.look(at(1_000_000)), None);
        watchdog.hear(Ok(LeaseTimes::Unlimited), at(1_000_000));
        watchdog.hear(unreadable(), at(1_000_250));
        assert_eq!(watchdog.look(at(1_000_250)), Some(at(1_060_250)));
        watchdog.hear(unreadable(), at(1_060_250));
        watchdog.look(at(1_060_250));
        assert_eq!(vmm.told(), ["freeze", "kill"]);
        assert_eq!(watchdog.lost_for(), Some(Duration::from_millis(60_250)));
    }

    #[test]
    fn a_host_that_slept_past_the_freeze_freezes_at_its_first_look() {
        let (watchdog, vmm) = watch(limited(8_000, 70_000));
        watchdog.look(at(1_000));
        // `CLOCK_BOOTTIME` went on through the suspend.
        watchdog.look(at(60_000));
        assert_eq!(vmm.told(), ["freeze"]);
        // The renewal after it is heard only then.
        watchdog.hear(Ok(limited(68_000, 130_000)), at(60_000));
        watchdog.look(at(60_001));
        assert_eq!(vmm.told(), ["freeze", "thaw"]);
    }

    #[test]
    fn a_watch_that_panics_takes_its_guest_with_it() {
        let vmm = Arc::new(FakeVmm::stubborn());
        let watched = Arc::clone(&vmm);
        let thread = thread::spawn(move || {
            let _guard = NeverUnwatched(&*watched);
            std::panic::resume_unwind(Box::new("broken"));
        });
        assert!(thread.join().is_err());
        assert_eq!(vmm.told(), ["kill"]);
    }
}
