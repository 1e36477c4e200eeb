//! Pushing windows into a guest before it asks for them.
//!
//! First the working set, in the order in which it was recorded, and by default nothing more: a
//! guest that is filled whole holds twice the memory. With [`Fill`] the rest follows at a bounded
//! rate, without its holes: they would cost memory for nothing. Both make way for faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::pager::region::{WINDOW_BYTES, WindowIndex};
use crate::pager::serve::{ServeError, Server, new_scratch};
use crate::pager::source::Whereabouts;
use crate::pager::working_set::WorkingSet;

/// Threads that push. One decodes while the kernel makes pages for the other.
const PUSHERS: usize = 2;
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
    windows: Vec<WindowIndex>,
    /// How many of them, from the start, know no bound.
    unpaced: usize,
    bytes_per_second: u64,
    next: AtomicUsize,
    pushing: AtomicUsize,
}

/// Starts pushing `set`, and the rest if `fill` says so. Ends by itself.
///
/// # Errors
/// A thread cannot be started.
pub fn start(server: &Arc<Server>, set: &WorkingSet, fill: Fill) -> Result<(), ServeError> {
    let work = Arc::new(plan(server, set, fill));
    if work.windows.is_empty() {
        server.finish_pushing();
        return Ok(());
    }
    for _ in 0..PUSHERS {
        let work = Arc::clone(&work);
        server.spawn("push", move |server| push_all(server, &work))?;
    }
    Ok(())
}

fn plan(server: &Server, set: &WorkingSet, fill: Fill) -> Work {
    let exists = |window: &WindowIndex| window.0 < server.windows();
    let filled =
        |window: &WindowIndex| server.source().whereabouts(*window) != Whereabouts::Nowhere;
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
    Work {
        windows,
        unpaced,
        bytes_per_second,
        next: AtomicUsize::new(0),
        pushing: AtomicUsize::new(PUSHERS),
    }
}

fn push_all(server: &Server, work: &Work) -> Result<(), ServeError> {
    let mut scratch = new_scratch()?;
    let started = Instant::now();
    loop {
        let turn = work.next.fetch_add(1, Ordering::Relaxed);
        let Some(&window) = work.windows.get(turn) else {
            break;
        };
        let due = due(turn.saturating_sub(work.unpaced), work.bytes_per_second);
        thread::sleep(due.saturating_sub(started.elapsed()));
        make_way(server);
        server.push(window, &mut scratch)?;
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

    #[test]
    fn a_bounded_fill_takes_as_long_as_its_bound_says() {
        let mib = 1 << 20;
        assert_eq!(due(0, mib), Duration::ZERO);
        assert_eq!(due(16, mib), Duration::from_secs(1));
        assert_eq!(due(usize::MAX, 0), Duration::ZERO);
        assert!(due(usize::MAX, 1) > Duration::from_secs(1 << 30));
    }
}
