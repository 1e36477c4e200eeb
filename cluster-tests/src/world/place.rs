//! Where worlds may be on this machine: ports and network slots, a few of each at a time.

use std::sync::{Condvar, Mutex, PoisonError};

/// Network slots that one place has.
pub(super) const SLOTS: u16 = 16;
/// Worlds at once. Emulated guests want a core each, and some worlds mostly wait.
const PLACES: usize = 3;

/// Which places are taken.
static TAKEN: Mutex<[bool; PLACES]> = Mutex::new([false; PLACES]);
/// Tells that one has become free.
static FREED: Condvar = Condvar::new();

/// What a daemon has for itself on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// What it is called.
    pub(crate) name: String,
    /// Of its API (TCP).
    pub(crate) port: u16,
    /// Of its cluster (UDP); the one after it is for bulk transfers.
    pub(crate) cluster_port: u16,
    /// Index of its first network slot.
    pub(crate) slot_base: u16,
}

/// The right to use certain ports and network slots.
#[derive(Debug)]
pub(super) struct Place(usize);

impl Place {
    pub(super) fn take() -> Self {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(free) = taken.iter().position(|taken| !taken) {
                taken[free] = true;
                return Self(free);
            }
            taken = FREED.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn number(&self) -> u16 {
        u16::try_from(self.0).expect("there are few places")
    }

    /// Ports below those that the kernel gives to clients, and slots above what a quickstart on the
    /// same machine uses. Other test programs on this machine are avoided by taking the process id
    /// into account.
    pub(super) fn site(&self) -> Site {
        let process = std::process::id();
        let row = |rows: u32| u16::try_from(process % rows).expect("few rows");
        let port = 20_000 + row(1500) * 8 + self.number() * 2;
        Site {
            name: "test".into(),
            port,
            cluster_port: port,
            slot_base: 8192 + row(512) * 64 + self.number() * SLOTS,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[self.0] = false;
        FREED.notify_one();
    }
}
