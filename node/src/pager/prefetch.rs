//! Pushing windows into a guest before it asks for them.
//!
//! First the working set, in the order in which it was recorded, and by default nothing more: a
//! guest that is filled whole holds twice the memory. With [`Fill`] the rest follows at a bounded
//! rate, without its holes: they would cost memory for nothing. Both make way for faults.
//!
//! What lies on this node and what has to come from another one are pushed apart, each in its order:
//! one is bound by the processor and takes two threads, the other by round trips and takes many, that
//! are started only where there is something for them. Faults have threads, connections and streams
//! of their own, so they do not wait behind either.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::pager::region::{WINDOW_BYTES, WindowIndex};
use crate::pager::serve::{ServeError, Server, new_scratch};
use crate::pager::source::Whereabouts;
use crate::pager::working_set::WorkingSet;

/// Threads that push what lies on this node. One decodes while the kernel makes pages for the other.
const PUSHERS: usize = 2;
/// Threads that push what has to come from another node: each waits a round trip for each window, so
/// at 20 ms so many bring 50 MiB/s and two would bring 6. With the threads that faults wait on they
/// stay far below the 64 chunks of a snapshot that a daemon asks for at once, so that a fault finds
/// room there. Each takes some 300 KiB while it pushes.
const FAR_PUSHERS: usize = 16;
/// One nap while a fault is being served.
const NAP: Duration = Duration::from_micros(100);
/// The most naps in a row: a guest that faults without end must not stop its own working set.
const MAX_NAPS: u32 = 20;

/// How much of an image is put into the guest unasked, after its working set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// Nothing.
    #[default]
    Nothing,
    /// All of it, at most so many bytes a second.
    Everything {
        /// How many. Zero means no bound.
        bytes_per_second: u64,
    },
}

/// What is left to push, shared by the threads that do.
struct Work {
    /// What lies on this node, or nowhere: it is zero.
    near: Queue,
    /// What has to come from another one, wholly or in part.
    far: Queue,
    bytes_per_second: u64,
    /// Threads that are not done yet, or not started.
    pushing: AtomicUsize,
}

/// Windows in the order in which they are pushed.
#[derive(Default)]
struct Queue {
    turns: Vec<Turn>,
    next: AtomicUsize,
}

/// A window that is to be pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Turn {
    window: WindowIndex,
    /// How many others go before it of those that know a bound, near and far ones together. Zero for
    /// one that knows none.
    after: usize,
}

/// Starts pushing `set`, and the rest if `fill` says so. Ends by itself.
///
/// # Errors
/// A thread cannot be started.
pub fn start(server: &Arc<Server>, set: &WorkingSet, fill: Fill) -> Result<(), ServeError> {
    let work = Arc::new(plan(server, set, fill));
    if work.pushing() == 0 {
        server.finish_pushing();
        return Ok(());
    }
    for _ in 0..work.near.threads(PUSHERS) {
        let work = Arc::clone(&work);
        server.spawn("push", move |server| push_all(server, &work, &work.near))?;
    }
    for _ in 0..work.far.threads(FAR_PUSHERS) {
        let work = Arc::clone(&work);
        server.spawn("push-far", move |server| push_all(server, &work, &work.far))?;
    }
    Ok(())
}

fn plan(server: &Server, set: &WorkingSet, fill: Fill) -> Work {
    let whereabouts = |window: WindowIndex| server.source().whereabouts(window);
    let exists = |window: &WindowIndex| window.0 < server.windows();
    let filled = |window: &WindowIndex| whereabouts(*window) != Whereabouts::Nowhere;
    let mut windows: Vec<_> = set.windows().iter().copied().filter(exists).collect();
    let unpaced = windows.len();
    let bytes_per_second = match fill {
        Fill::Nothing => 0,
        Fill::Everything { bytes_per_second } => {
            // Those of the working set come again and are found present.
            windows.extend((0..server.windows()).map(WindowIndex).filter(filled));
            bytes_per_second
        }
    };
    Work::new(&windows, unpaced, bytes_per_second, whereabouts)
}

impl Work {
    /// These windows, of which the first `unpaced` know no bound.
    fn new(
        windows: &[WindowIndex],
        unpaced: usize,
        bytes_per_second: u64,
        whereabouts: impl Fn(WindowIndex) -> Whereabouts,
    ) -> Self {
        let (mut near, mut far) = (Queue::default(), Queue::default());
        for (turn, &window) in windows.iter().enumerate() {
            let queue = match whereabouts(window) {
                Whereabouts::Nowhere | Whereabouts::Here => &mut near,
                Whereabouts::Elsewhere => &mut far,
            };
            let after = turn.saturating_sub(unpaced);
            queue.turns.push(Turn { window, after });
        }
        let threads = near.threads(PUSHERS) + far.threads(FAR_PUSHERS);
        Self {
            near,
            far,
            bytes_per_second,
            pushing: AtomicUsize::new(threads),
        }
    }

    /// How many threads push, or will.
    fn pushing(&self) -> usize {
        self.pushing.load(Ordering::Acquire)
    }
}

impl Queue {
    /// How many threads it takes, of `most`: none has nothing to do.
    fn threads(&self, most: usize) -> usize {
        self.turns.len().min(most)
    }

    /// The next window, once.
    fn pop(&self) -> Option<Turn> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        self.turns.get(at).copied()
    }
}

fn push_all(server: &Server, work: &Work, queue: &Queue) -> Result<(), ServeError> {
    let mut scratch = new_scratch()?;
    let started = Instant::now();
    while let Some(turn) = queue.pop() {
        let due = due(turn.after, work.bytes_per_second);
        thread::sleep(due.saturating_sub(started.elapsed()));
        make_way(server);
        server.push(turn.window, &mut scratch)?;
    }
    if work.pushing.fetch_sub(1, Ordering::AcqRel) == 1 {
        server.finish_pushing();
    }
    Ok(())
}

/// When the window after `windows` others may go in, counted from the start.
fn due(windows: usize, bytes_per_second: u64) -> Duration {
    if bytes_per_second == 0 {
        return Duration::ZERO;
    }
    let bytes = (windows as u64).saturating_mul(WINDOW_BYTES);
    let micros = u128::from(bytes) * 1_000_000 / u128::from(bytes_per_second);
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}

fn make_way(server: &Server) {
    for _ in 0..MAX_NAPS {
        if !server.is_busy() {
            return;
        }
        thread::sleep(NAP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(windows: u64, unpaced: usize, whereabouts: impl Fn(u64) -> Whereabouts) -> Work {
        let windows: Vec<_> = (0..windows).map(WindowIndex).collect();
        Work::new(&windows, unpaced, 1, |window| whereabouts(window.0))
    }

    #[test]
    fn what_lies_on_this_node_starts_no_thread_that_waits_for_another() {
        let here = |window| match window % 2 {
            0 => Whereabouts::Here,
            _ => Whereabouts::Nowhere,
        };
        let all_here = work(1000, 1000, here);
        assert_eq!(all_here.far.threads(FAR_PUSHERS), 0);
        assert_eq!(all_here.pushing(), PUSHERS);
        assert_eq!(work(0, 0, here).pushing(), 0);
    }

    #[test]
    fn what_is_elsewhere_has_many_threads_and_never_one_without_a_window() {
        let elsewhere = |_| Whereabouts::Elsewhere;
        assert_eq!(work(1000, 1000, elsewhere).pushing(), FAR_PUSHERS);
        assert_eq!(work(3, 3, elsewhere).pushing(), 3);
        let one_far = |window| match window {
            7 => Whereabouts::Elsewhere,
            _ => Whereabouts::Here,
        };
        assert_eq!(work(1000, 1000, one_far).pushing(), PUSHERS + 1);
    }

    #[test]
    fn every_window_is_pushed_once_in_its_order_and_the_bound_counts_near_and_far_ones() {
        let unpaced = 4;
        let every_third = |window| match window % 3 {
            0 => Whereabouts::Elsewhere,
            _ => Whereabouts::Here,
        };
        let work = work(20, unpaced, every_third);
        let all = |queue: &Queue| -> Vec<Turn> { std::iter::from_fn(|| queue.pop()).collect() };
        let (near, far) = (all(&work.near), all(&work.far));
        assert!(near.is_sorted_by_key(|turn| turn.window));
        assert!(far.is_sorted_by_key(|turn| turn.window));
        let mut both = [near, far].concat();
        both.sort_by_key(|turn| turn.window);
        let expected = (0..20).map(|at| Turn {
            window: WindowIndex(at as u64),
            after: usize::saturating_sub(at, unpaced),
        });
        assert_eq!(both, expected.collect::<Vec<_>>());
    }

    #[test]
    fn a_bounded_fill_takes_as_long_as_its_bound_says() {
        let mib = 1 << 20;
        assert_eq!(due(0, mib), Duration::ZERO);
        assert_eq!(due(16, mib), Duration::from_secs(1));
        assert_eq!(due(usize::MAX, 0), Duration::ZERO);
        assert!(due(usize::MAX, 1) > Duration::from_secs(1 << 30));
    }
}
