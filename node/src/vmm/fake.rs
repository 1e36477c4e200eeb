//! A VMM without a process, for tests of what surrounds one.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::vmm::qemu::qmp::QmpError;
use crate::vmm::{Vmm, VmmError, VmmExit};

/// A VMM that does as told and notes it. Its guest answers the power button if asked to.
#[derive(Debug, Default)]
pub struct FakeVmm {
    obedient: bool,
    frozen: bool,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    told: Vec<&'static str>,
    exit: Option<VmmExit>,
}

impl FakeVmm {
    /// A guest that powers off when its button is pressed.
    #[must_use]
    pub fn obedient() -> Self {
        Self {
            obedient: true,
            ..Self::default()
        }
    }

    /// A guest that ignores its power button.
    #[must_use]
    pub fn stubborn() -> Self {
        Self::default()
    }

    /// A VMM that only a kill can end.
    #[must_use]
    pub fn frozen() -> Self {
        Self {
            frozen: true,
            ..Self::default()
        }
    }

    /// What it was told so far, in order.
    #[must_use]
    pub fn told(&self) -> Vec<&'static str> {
        self.lock().told.clone()
    }

    /// Makes it end by itself.
    pub fn end(&self, exit: VmmExit) {
        self.lock().exit.get_or_insert(exit);
        self.ended.notify_all();
    }

    fn note(&self, what: &'static str) {
        self.lock().told.push(what);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vmm for FakeVmm {
    fn pid(&self) -> u32 {
        4_000_000
    }

    fn version(&self) -> &'static str {
        "fake"
    }

    fn pause(&self, _: Instant) -> Result<(), VmmError> {
        self.note("pause");
        Ok(())
    }

    fn resume(&self, _: Instant) -> Result<(), VmmError> {
        self.note("resume");
        Ok(())
    }

    fn shutdown(&self, _: Instant) -> Result<(), VmmError> {
        self.note("shutdown");
        if self.obedient {
            self.end(VmmExit {
                code: Some(0),
                signal: None,
                reason: "guest-shutdown".into(),
            });
        }
        Ok(())
    }

    fn quit(&self, _: Instant) -> Result<(), VmmError> {
        self.note("quit");
        if self.frozen {
            return Err(VmmError::Told {
                verb: "quit",
                source: QmpError::TimedOut {
                    command: "quit",
                    waited: Duration::ZERO,
                },
            });
        }
        self.end(VmmExit {
            code: Some(0),
            signal: None,
            reason: "host-qmp-quit".into(),
        });
        Ok(())
    }

    fn freeze(&self) -> Result<(), VmmError> {
        self.note("freeze");
        Ok(())
    }

    fn thaw(&self) -> Result<(), VmmError> {
        self.note("thaw");
        Ok(())
    }

    fn kill(&self) -> Result<(), VmmError> {
        self.note("kill");
        self.end(VmmExit {
            code: None,
            signal: Some(9),
            reason: String::new(),
        });
        Ok(())
    }

    fn wait(&self, deadline: Instant) -> Result<Option<VmmExit>, VmmError> {
        let mut state = self.lock();
        while state.exit.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.exit.clone())
    }
}
