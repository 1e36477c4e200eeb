//! A VMM without a process, for tests of what surrounds one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::vmm::error::{MoveStateError, TalkError};
use crate::vmm::qemu::machine;
use crate::vmm::qemu::qmp::QmpError;
use crate::vmm::{Accelerator, Hardware, Vmm, VmmError, VmmExit};

/// What a [`FakeVmm`] writes as its device state, and takes in.
pub const STATE: &[u8] = b"the device state of a fake";

/// A VMM that does as told and notes it. Its guest answers the power button if asked to.
#[derive(Debug)]
pub struct FakeVmm {
    obedient: bool,
    frozen: bool,
    hardware: Hardware,
    state: Mutex<State>,
    ended: Condvar,
}

impl Default for FakeVmm {
    fn default() -> Self {
        Self {
            obedient: false,
            frozen: false,
            hardware: machine::of_new_guests(Accelerator::Tcg),
            state: Mutex::default(),
            ended: Condvar::new(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    told: Vec<&'static str>,
    exit: Option<VmmExit>,
    /// What it will not do.
    refuses: Vec<&'static str>,
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

    /// Makes it refuse `what` (`save`, `resume`) from now on, and nothing else.
    pub fn refuse(&self, what: &[&'static str]) {
        self.lock().refuses = what.to_vec();
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

    /// Notes `what`, and refuses it if it was made to.
    fn hear(&self, what: &'static str) -> Result<(), QmpError> {
        let mut state = self.lock();
        state.told.push(what);
        if state.refuses.contains(&what) {
            return Err(QmpError::Refused {
                command: what,
                reason: "it was made to".into(),
            });
        }
        Ok(())
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

    fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    fn pause(&self, _: Instant) -> Result<(), VmmError> {
        self.note("pause");
        Ok(())
    }

    fn resume(&self, _: Instant) -> Result<(), VmmError> {
        let verb = "resume";
        self.hear(verb).map_err(|source| VmmError::Told {
            verb,
            source: source.into(),
        })
    }

    fn save_state(&self, file: BorrowedFd<'_>, _: Instant) -> Result<(), VmmError> {
        self.hear("save")
            .map_err(|err| VmmError::Save(err.into()))?;
        let written = clone(file).and_then(|mut file| file.write_all(STATE));
        written.map_err(|err| VmmError::Save(gave_up(&err)))
    }

    fn load_state(&self, file: BorrowedFd<'_>, _: Instant) -> Result<(), VmmError> {
        self.hear("load")
            .map_err(|err| VmmError::Load(err.into()))?;
        let mut state = Vec::new();
        let read = clone(file).and_then(|mut file| file.read_to_end(&mut state));
        match read {
            Ok(_) if state == STATE => Ok(()),
            Ok(_) => Err(VmmError::Load(MoveStateError::GaveUp {
                reason: "it is not the state of a fake".into(),
            })),
            Err(err) => Err(VmmError::Load(gave_up(&err))),
        }
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
                source: TalkError::Qmp(QmpError::TimedOut {
                    command: "quit",
                    waited: Duration::ZERO,
                }),
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

fn clone(file: BorrowedFd<'_>) -> std::io::Result<File> {
    Ok(File::from(file.try_clone_to_owned()?))
}

fn gave_up(err: &std::io::Error) -> MoveStateError {
    MoveStateError::GaveUp {
        reason: err.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_fake_takes_in_what_a_fake_has_written_and_nothing_else() {
        let mut file = tempfile::tempfile().expect("tempfile");
        let (vmm, now) = (FakeVmm::stubborn(), Instant::now());
        vmm.save_state(file.as_fd(), now).expect("saved");
        file.rewind().expect("rewound");
        FakeVmm::stubborn()
            .load_state(file.as_fd(), now)
            .expect("loaded");
        // At its end by now: nothing is left to read.
        let refused = FakeVmm::stubborn().load_state(file.as_fd(), now);
        assert!(matches!(refused, Err(VmmError::Load(_))), "{refused:?}");
        vmm.refuse(&["save"]);
        assert!(vmm.save_state(file.as_fd(), now).is_err());
        assert_eq!(vmm.told(), ["save", "save"]);
    }
}
