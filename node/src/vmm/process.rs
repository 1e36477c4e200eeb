//! One child process: awaited with a deadline from any thread, and killed without ever hitting a
//! stranger.
//!
//! The process id stays ours until the child is reaped, and reaping and killing exclude each
//! other, so a signal can only reach the child. Dropping kills and reaps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::vmm::cgroup::Group;
use crate::vmm::jail::{pidfd_open, pidfd_signal};
use crate::vmm::{VmmError, VmmExit};

/// Longest between two looks at a VMM that is at work: what a guest that stands still may wait for nothing.
const LONGEST_PAUSE: Duration = Duration::from_millis(16);

/// The reason of a VMM that the kernel has ended because its control group was full.
pub const OUT_OF_MEMORY: &str = "out-of-memory";

/// A running or ended child.
#[derive(Debug)]
pub struct VmmProcess {
    pid: u32,
    pidfd: OwnedFd,
    child: Mutex<Child>,
    /// Removed once the child is gone.
    group: Option<Arc<Group>>,
    /// Whether it ended for want of memory, once it has.
    starved: OnceLock<bool>,
}

impl VmmProcess {
    /// Takes charge of `child`, and of the control group that it is in.
    ///
    /// # Errors
    /// The kernel has no descriptor to give; the child is killed.
    pub fn new(mut child: Child, group: Option<Arc<Group>>) -> io::Result<Self> {
        let pid = child.id();
        match pidfd_open(pid) {
            Ok(pidfd) => Ok(Self {
                pid,
                pidfd,
                child: Mutex::new(child),
                group,
                starved: OnceLock::new(),
            }),
            Err(err) => {
                let _gone = child.kill().and_then(|()| child.wait());
                Err(err)
            }
        }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes readable when the child has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills the child; one that has ended already is left in peace.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn kill(&self) -> Result<(), VmmError> {
        // The standard library sends nothing to a child it has reaped.
        self.child().kill().map_err(|source| VmmError::Kill {
            pid: self.pid,
            source,
        })
    }

    /// Stops the child; one that has ended already is left in peace.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn freeze(&self) -> Result<(), VmmError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets a stopped child go on.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn thaw(&self) -> Result<(), VmmError> {
        self.signal(Signal::SIGCONT)
    }

    /// Through the descriptor, which never means another process: no lock is needed.
    fn signal(&self, signal: Signal) -> Result<(), VmmError> {
        pidfd_signal(self.pidfd.as_fd(), signal).map_err(|source| VmmError::Signal {
            signal,
            pid: self.pid,
            source,
        })
    }

    /// Waits for the end and reaps; `None` when `deadline` came first. May be called again.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wait(&self, deadline: Instant) -> Result<Option<VmmExit>, VmmError> {
        let failed = |source: io::Error| VmmError::Wait {
            pid: self.pid,
            source,
        };
        loop {
            if let Some(status) = self.child().try_wait().map_err(failed)? {
                return Ok(Some(self.exit_of(status)));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ended, poll_timeout(left)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }

    fn exit_of(&self, status: ExitStatus) -> VmmExit {
        let starved = *self.starved.get_or_init(|| self.leave_group());
        let reason = if starved { OUT_OF_MEMORY } else { "" };
        VmmExit {
            code: status.code(),
            signal: status.signal(),
            reason: reason.to_owned(),
        }
    }

    /// Removes the group of a child that was reaped. Tells whether it had ended for want of memory.
    fn leave_group(&self) -> bool {
        let Some(group) = &self.group else {
            return false;
        };
        let starved = group.out_of_memory() > 0;
        // One that stays goes with the sandbox's directory, whose spec names it.
        let _tried = group.remove();
        starved
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        let mut child = self.child();
        if let Ok(None) = child.try_wait() {
            let _gone = child.kill().and_then(|()| child.wait());
        }
        drop(child);
        self.starved.get_or_init(|| self.leave_group());
    }
}

/// `left` for `poll`, rounded up so that a loop around it does not spin through the last
/// millisecond, and cut to what `poll` can express.
pub(crate) fn poll_timeout(left: std::time::Duration) -> PollTimeout {
    let millis = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

/// Pauses between two looks at a VMM, each time longer; `false` when `deadline` has come.
pub(super) fn rest(pause: &mut Duration, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return false;
    }
    thread::sleep(left.min(*pause));
    *pause = (*pause * 2).min(LONGEST_PAUSE);
    true
}
