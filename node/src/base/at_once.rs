//! Work that may block, for somebody who stands still until it is done.
//!
//! A look into an index or the page cache takes some microseconds, and waking a thread for it and
//! being woken by that one ten times as long. So it is done on the very thread that asks, as long as
//! that is safe: a disk that hangs must not stop the runtime, which carries heartbeats. One worker
//! may be at such work at a time, of two or more; and once it took long, nobody for a while. All
//! others go the long way.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task;

/// Work that took as long as this had to wait for a disk.
const LONG: Duration = Duration::from_millis(5);
/// How long everybody goes the long way then.
const REST: Duration = Duration::from_secs(10);

/// The turns of this process.
static TURNS: Turns = Turns::new();
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Does work that may block and hardly ever does.
///
/// # Errors
/// The runtime is ending.
pub async fn at_once<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, task::JoinError> {
    in_turn(&TURNS, work).await
}

async fn in_turn<T: Send + 'static>(
    turns: &Turns,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, task::JoinError> {
    match turns.take() {
        Some(_turn) => Ok(work()),
        None => task::spawn_blocking(work).await,
    }
}

/// Who may block a worker.
struct Turns {
    taken: AtomicBool,
    /// Until when nobody takes one, in milliseconds from [`BEGAN`].
    rest_until: AtomicU64,
}

/// The right to block this thread, until it is dropped.
struct Turn<'a> {
    of: &'a Turns,
    since: Instant,
}

impl Turns {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            rest_until: AtomicU64::new(0),
        }
    }

    fn take(&self) -> Option<Turn<'_>> {
        let since = Instant::now();
        let rests = since_began(since) < self.rest_until.load(Ordering::Relaxed);
        let free = !rests && has_others() && !self.taken.swap(true, Ordering::Acquire);
        // Made only where it is taken: dropping one gives the turn back.
        match free {
            true => Some(Turn { of: self, since }),
            false => None,
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.since.elapsed() >= LONG {
            let until = since_began(Instant::now() + REST);
            self.of.rest_until.store(until, Ordering::Relaxed);
        }
        self.of.taken.store(false, Ordering::Release);
    }
}

/// Whether the runtime goes on while one of its workers stands still.
fn has_others() -> bool {
    Handle::try_current().is_ok_and(|handle| handle.metrics().num_workers() > 1)
}

fn since_began(at: Instant) -> u64 {
    let since = at.saturating_duration_since(*BEGAN);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    /// Whether work is done on the thread that asks.
    async fn inside(turns: &'static Turns) -> bool {
        let asked = thread::current().id();
        let done = in_turn(turns, || thread::current().id()).await;
        done.expect("the runtime goes on") == asked
    }

    fn runtime(workers: usize) -> Runtime {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(workers).build().expect("a runtime")
    }

    fn look(runtime: &Runtime, turns: &'static Turns) -> bool {
        let looked = runtime.spawn(inside(turns));
        runtime.block_on(looked).expect("joined")
    }

    #[test]
    fn the_only_worker_never_stands_still() {
        static OWN: Turns = Turns::new();
        assert!(!look(&runtime(1), &OWN));
        assert!(look(&runtime(2), &OWN));
    }

    #[test]
    fn one_worker_of_several_may_stand_still_and_none_after_it_took_long() {
        static OWN: Turns = Turns::new();
        let several = runtime(2);
        let (entered, enters) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let hangs = several.spawn(in_turn(&OWN, move || {
            entered.send(()).expect("waited for");
            released.recv()
        }));
        enters.recv().expect("it begins");
        assert!(!look(&several, &OWN), "one stands still already");
        // The disk's time, which is no clock's of ours.
        thread::sleep(LONG);
        release.send(()).expect("waited for");
        let over = several.block_on(hangs).expect("joined").expect("done");
        over.expect("released");
        assert!(!look(&several, &OWN), "the disk is slow");
        OWN.rest_until.store(0, Ordering::Relaxed);
        assert!(look(&several, &OWN));
    }
}
