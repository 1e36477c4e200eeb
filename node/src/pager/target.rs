//! The VMM as a pager finds it: its mappings of guest memory, and the userfaultfd in it.
//!
//! A first pager makes the descriptor; one that takes over finds it open in the VMM. Both go the
//! same way: look at every userfaultfd the VMM has, take the one that holds the guest's memory or
//! none at all yet, and make one only if there is none. An injector that was killed after its call
//! had returned thus leaves nothing but a descriptor that its successor uses.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{fstat, major, minor};

use crate::pager::inject::{self, InjectError};
use crate::pager::layout::{FileId, Layout, LayoutError};
use crate::pager::region::Region;
use crate::pager::uffd::sys::{FEATURE_INITIALIZED, pidfd_getfd};
use crate::pager::uffd::{Tracking, Uffd};

/// What `/proc/<pid>/fd` shows in a userfaultfd's place.
const UFFD_LINK: &str = "anon_inode:[userfaultfd]";

/// Why a pager could not get hold of a VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// It has ended.
    #[error("the VMM has ended")]
    Ended,
    /// It cannot be looked into.
    #[error("{doing} of the VMM")]
    Look {
        /// Which step.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It has mapped the guest's memory in no way that makes sense.
    #[error("find the guest's memory in the VMM")]
    Layout(#[from] LayoutError),
    /// No userfaultfd could be made in it.
    #[error("make a userfaultfd in the VMM")]
    Inject(#[from] InjectError),
    /// The kernel has no userfaultfd that serves memfds.
    #[error("agree with the kernel on page faults")]
    Handshake {
        /// What it said.
        source: io::Error,
    },
    /// The memory cannot be registered.
    #[error("register the guest's memory")]
    Register {
        /// What the kernel said.
        source: io::Error,
    },
}

/// A running VMM.
#[derive(Debug)]
pub struct Target {
    pid: u32,
    pidfd: OwnedFd,
}

impl Target {
    /// The process behind `pidfd`, whose number is `pid`.
    #[must_use]
    pub fn new(pid: u32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd }
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable once it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// True if it has ended. What was read in `/proc` before an answer of false was its own.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut ended, PollTimeout::ZERO), Ok(0))
    }

    /// Where it has mapped `memory`.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn layout(&self, memory: BorrowedFd<'_>, region: Region) -> Result<Layout, AttachError> {
        let look = |source| AttachError::Look {
            doing: "read the mappings",
            source,
        };
        let stat = fstat(memory).map_err(|errno| look(errno.into()))?;
        let file = FileId {
            device: (major(stat.st_dev), minor(stat.st_dev)),
            inode: stat.st_ino,
        };
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).map_err(look)?;
        self.still_there()?;
        Ok(Layout::from_maps(&maps, file, region)?)
    }

    /// A userfaultfd with all of `layout` registered, and whether one was found rather than made.
    /// `about_to_change` is called before the VMM's registers are; a caller that dies between then
    /// and the return leaves a VMM that must be killed.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(
        &self,
        layout: &Layout,
        wanted: Tracking,
        about_to_change: impl FnOnce() + Send,
        deadline: Instant,
    ) -> Result<(Uffd, bool), AttachError> {
        for (number, features) in self.userfaultfds()? {
            let fd = match self.fetch(number) {
                Ok(fd) => fd,
                // Closed since: it was none of ours.
                Err(AttachError::Look { .. }) => continue,
                Err(err) => return Err(err),
            };
            let found = features & FEATURE_INITIALIZED != 0;
            let uffd = if found {
                Uffd::adopt(fd, features)
            } else {
                shake_hands(fd, wanted)?
            };
            match register(&uffd, layout) {
                Ok(()) => return Ok((uffd, found)),
                // Another one has the memory, which is then the one to be found.
                Err(AttachError::Register { source })
                    if source.raw_os_error() == Some(Errno::EBUSY as i32) => {}
                Err(err) => return Err(err),
            }
        }
        let number = self.inject(about_to_change, deadline)?;
        let uffd = shake_hands(self.fetch(number)?, wanted)?;
        register(&uffd, layout)?;
        Ok((uffd, false))
    }

    /// Whether there is a userfaultfd in it.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn has_userfaultfd(&self) -> Result<bool, AttachError> {
        Ok(!self.userfaultfds()?.is_empty())
    }

    /// Makes a userfaultfd in it, to see whether that can be done; it is left there. Returns how
    /// writes would be known, at best as `wanted`.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub(super) fn try_on(
        &self,
        wanted: Tracking,
        deadline: Instant,
    ) -> Result<Tracking, AttachError> {
        let number = self.inject(|| (), deadline)?;
        Ok(shake_hands(self.fetch(number)?, wanted)?.tracking())
    }

    /// Has it make a userfaultfd. Where it ended meanwhile, that is the reason for any failure.
    fn inject(
        &self,
        about_to_change: impl FnOnce() + Send,
        deadline: Instant,
    ) -> Result<RawFd, AttachError> {
        let made = inject::userfaultfd(self.pid, about_to_change, deadline);
        made.map_err(|err| match self.has_ended() {
            true => AttachError::Ended,
            false => err.into(),
        })
    }

    /// The userfaultfds it has open, with what was agreed on for each.
    fn userfaultfds(&self) -> Result<Vec<(RawFd, u64)>, AttachError> {
        let look = |source| AttachError::Look {
            doing: "list the descriptors",
            source,
        };
        let mut found = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid)).map_err(look)? {
            let entry = entry.map_err(look)?;
            let is_one =
                fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == UFFD_LINK);
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let (true, Some(number)) = (is_one, number) {
                let info = fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.pid));
                found.push((
                    number,
                    info.ok().and_then(|info| features_in(&info)).unwrap_or(0),
                ));
            }
        }
        self.still_there()?;
        Ok(found)
    }

    fn fetch(&self, number: RawFd) -> Result<OwnedFd, AttachError> {
        pidfd_getfd(self.pidfd.as_fd(), number).map_err(|errno| match errno {
            Errno::ESRCH => AttachError::Ended,
            errno => AttachError::Look {
                doing: "fetch a descriptor",
                source: errno.into(),
            },
        })
    }

    fn still_there(&self) -> Result<(), AttachError> {
        if self.has_ended() {
            return Err(AttachError::Ended);
        }
        Ok(())
    }
}

/// The features in a userfaultfd's fdinfo, whose last line is `API: aa:<features>:<ioctls>`.
fn features_in(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = line.trim().split(':').nth(1)?;
    u64::from_str_radix(features, 16).ok()
}

/// Agrees with the kernel on `wanted`, or on less if it is older than that.
fn shake_hands(fd: OwnedFd, wanted: Tracking) -> Result<Uffd, AttachError> {
    let refused = |(_, errno): (OwnedFd, Errno)| AttachError::Handshake {
        source: errno.into(),
    };
    match Uffd::handshake(fd, wanted) {
        Err((fd, Errno::EINVAL)) if wanted != Tracking::Compare => {
            Uffd::handshake(fd, Tracking::Compare).map_err(refused)
        }
        outcome => outcome.map_err(refused),
    }
}

fn register(uffd: &Uffd, layout: &Layout) -> Result<(), AttachError> {
    for mapping in layout.mappings() {
        uffd.register(mapping).map_err(|errno| match errno {
            Errno::ESRCH => AttachError::Ended,
            errno => AttachError::Register {
                source: errno.into(),
            },
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pager::uffd::sys::{FEATURE_MISSING_SHMEM, own_userfaultfd};

    #[test]
    fn the_features_of_a_descriptor_stand_in_its_info() {
        let info = "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:8000b021:8000000000000003\n";
        assert_eq!(features_in(info), Some(0x8000_b021));
        assert_eq!(features_in("pos:\t0\n"), None);
        assert_eq!(features_in("API:\taa:none:1\n"), None);
    }

    #[test]
    fn this_kernel_tells_the_features_of_a_real_one() {
        use std::os::fd::AsRawFd;

        let fd = own_userfaultfd().expect("allowed");
        let number = fd.as_raw_fd();
        let features = || {
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).expect("there");
            features_in(&info).expect("told")
        };
        assert_eq!(features() & FEATURE_INITIALIZED, 0);
        let uffd = Uffd::handshake(fd, Tracking::Compare).expect("known");
        assert_ne!(features() & FEATURE_INITIALIZED, 0);
        assert_ne!(features() & FEATURE_MISSING_SHMEM, 0);
        assert_eq!(Tracking::of_features(features()), Tracking::Compare);
        drop(uffd);
    }
}
