//! Undoes a quiesce that nobody else undoes, because the host died in the middle of it.
//!
//! The time that counts is the time the guest has run. While its vCPUs stand still its monotonic
//! clock mostly stands still too, yet there are clock sources that jump ahead by the whole gap when
//! it runs on; a plain deadline would then let the workload go before a restored guest has been
//! told who it is. So time is counted in short steps, and a step counts for little more than it was
//! meant to take, however long it took by the clock.
//!
//! It is a thread of its own: it must go off even if every worker of the runtime waits for a disk.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// One step. A guest that was quiesced and runs on is looked at this often.
const STEP: Duration = Duration::from_millis(100);
/// Most that one step counts for: a busy guest's steps take longer than they are meant to.
const MOST_PER_STEP: Duration = Duration::from_millis(200);
/// Its thread does next to nothing.
const STACK_BYTES: usize = 128 * 1024;

/// How long the guest has run.
#[derive(Debug, Default)]
struct RunTime(Duration);

impl RunTime {
    /// Counts a step that took `measured` by the clock.
    fn step(&mut self, measured: Duration) {
        self.0 += measured.min(MOST_PER_STEP);
    }
}

/// Counts until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    /// Calls `expired` once the guest has run for `limit`, unless this is dropped before.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(limit: Duration, expired: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (alive, dropped) = mpsc::channel::<()>();
        let count = move || {
            let mut ran = RunTime::default();
            let mut last = Instant::now();
            while ran.0 < limit {
                if dropped.recv_timeout(STEP) == Err(RecvTimeoutError::Disconnected) {
                    return;
                }
                let now = Instant::now();
                ran.step(now.duration_since(last));
                last = now;
            }
            expired();
        };
        thread::Builder::new()
            .name("watchdog".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(count)?;
        Ok(Self { _alive: alive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_clock_counts_as_one_step() {
        let mut ran = RunTime::default();
        ran.step(STEP);
        ran.step(Duration::from_secs(86_400));
        ran.step(STEP);
        assert_eq!(ran.0, 2 * STEP + MOST_PER_STEP);
    }

    #[test]
    fn it_goes_off_once_its_time_is_over() {
        let (sender, fired) = mpsc::channel();
        let _watchdog = Watchdog::start(Duration::ZERO, move || sender.send(()).expect("heard"));
        fired
            .recv_timeout(Duration::from_secs(10))
            .expect("it goes off");
    }

    #[test]
    fn dropped_it_never_goes_off() {
        let (sender, fired) = mpsc::channel::<()>();
        let limit = Duration::from_secs(3600);
        let watchdog = Watchdog::start(limit, move || sender.send(()).expect("heard"));
        drop(watchdog);
        // The thread ends and takes the sender along, unused.
        let heard = fired.recv_timeout(Duration::from_secs(10));
        assert_eq!(heard, Err(RecvTimeoutError::Disconnected));
    }
}
