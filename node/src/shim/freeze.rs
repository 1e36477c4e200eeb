//! Whether a shim's guest is frozen, and telling those who want to know when that changes.
//!
//! The watchdog sets it, clients wait for it. A waiter brings the descriptor that wakes it, so
//! that a change needs nothing that the kernel could refuse.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Whether a guest is frozen.
#[derive(Debug, Default)]
pub struct Frozen(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    frozen: bool,
    /// Of those who still wait, what wakes them.
    waiters: Vec<Weak<EventFd>>,
}

/// Becomes readable when the state changes.
#[derive(Debug)]
pub struct Change(Arc<EventFd>);

impl AsFd for Change {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Frozen {
    /// Whether it is, now.
    pub fn get(&self) -> bool {
        self.lock().frozen
    }

    /// Notes that it is, or no longer is, and wakes everybody who waits for that.
    pub fn set(&self, frozen: bool) {
        let mut state = self.lock();
        if state.frozen == frozen {
            return;
        }
        state.frozen = frozen;
        for waiter in state.waiters.drain(..).filter_map(|it| it.upgrade()) {
            // Fails only past 2^64 - 2 changes.
            let _woken = waiter.write(1);
        }
    }

    /// What tells of the next change; `None` if it came about already, seen from `known`.
    ///
    /// # Errors
    /// The kernel has no descriptor to give.
    pub fn change_from(&self, known: bool) -> nix::Result<Option<Change>> {
        let waker = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let mut state = self.lock();
        if state.frozen != known {
            return Ok(None);
        }
        state.waiters.retain(|waiter| waiter.strong_count() > 0);
        state.waiters.push(Arc::downgrade(&waker));
        Ok(Some(Change(waker)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn told(change: &Change) -> bool {
        let mut woken = [PollFd::new(change.as_fd(), PollFlags::POLLIN)];
        poll(&mut woken, PollTimeout::ZERO).expect("polled") == 1
    }

    #[test]
    fn a_change_wakes_all_who_wait_and_those_who_come_late() {
        let frozen = Frozen::default();
        let waiting: Vec<Change> = (0..3)
            .map(|_| frozen.change_from(false).expect("fds").expect("none yet"))
            .collect();
        frozen.set(false);
        assert!(!waiting.iter().any(told), "nothing has changed");
        frozen.set(true);
        assert!(waiting.iter().all(told));
        assert!(frozen.change_from(false).expect("fds").is_none());
        assert!(frozen.change_from(true).expect("fds").is_some());
    }

    #[test]
    fn those_who_gave_up_waiting_are_forgotten() {
        let frozen = Frozen::default();
        for _ in 0..100 {
            drop(frozen.change_from(false).expect("fds"));
        }
        assert!(frozen.lock().waiters.len() <= 1);
    }
}
