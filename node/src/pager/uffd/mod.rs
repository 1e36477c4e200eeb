//! A userfaultfd that belongs to another process's address space, and what one can ask of it.
//!
//! The descriptor is made by [`super::inject`] inside the VMM and stays open there; this process
//! holds a copy. Both mean one thing in the kernel, so whoever takes over from a pager that died
//! finds registrations and waiting faults as they were.

pub mod sys;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::pager::layout::{Hva, Mapping};
use sys::{
    FEATURE_MISSING_SHMEM, FEATURE_WP, FEATURE_WP_ASYNC, FEATURE_WP_SHMEM, FEATURE_WP_UNPOPULATED,
    REGISTER_MISSING, REGISTER_WP,
};

/// How it is known which pages the guest has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tracking {
    /// The kernel notes the first write to each page (Linux 6.7 and newer).
    WriteProtect,
    /// Nobody notes anything: pages are compared with the parent image.
    Compare,
}

impl Tracking {
    const fn features(self) -> u64 {
        match self {
            Self::Compare => FEATURE_MISSING_SHMEM,
            Self::WriteProtect => {
                FEATURE_MISSING_SHMEM
                    | FEATURE_WP
                    | FEATURE_WP_SHMEM
                    | FEATURE_WP_UNPOPULATED
                    | FEATURE_WP_ASYNC
            }
        }
    }

    const fn register_mode(self) -> u64 {
        match self {
            Self::Compare => REGISTER_MISSING,
            Self::WriteProtect => REGISTER_MISSING | REGISTER_WP,
        }
    }

    /// What a descriptor with these features, agreed on earlier, can do.
    #[must_use]
    pub const fn of_features(features: u64) -> Self {
        let all = Self::WriteProtect.features();
        if features & all == all {
            Self::WriteProtect
        } else {
            Self::Compare
        }
    }
}

/// Why a page did not appear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// It is there already.
    Exists,
    /// The VMM has ended.
    Ended,
    /// The VMM has taken the mapping away.
    Unmapped,
    /// There is no memory left for it, of the host or of a limit.
    NoMemory,
    /// Anything else the kernel may say.
    Other(Errno),
}

impl Obstacle {
    fn of(errno: Errno) -> Self {
        match errno {
            Errno::EEXIST => Self::Exists,
            Errno::ESRCH => Self::Ended,
            Errno::ENOENT => Self::Unmapped,
            Errno::ENOMEM | Errno::ENOSPC => Self::NoMemory,
            other => Self::Other(other),
        }
    }
}

/// How far a fill got, and what stopped it short of the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Bytes of pages that were made.
    pub bytes: u64,
    /// Why not more.
    pub obstacle: Option<Obstacle>,
}

impl Filled {
    fn of(progress: sys::Progress) -> Self {
        Self {
            bytes: progress.done,
            obstacle: progress.stopped.map(Obstacle::of),
        }
    }
}

/// A userfaultfd after its handshake.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    tracking: Tracking,
}

impl Uffd {
    /// Shakes hands with a new descriptor, asking for `wanted`.
    ///
    /// # Errors
    /// The kernel does not know the features (`EINVAL`), or hands were shaken before (the same).
    /// The descriptor is handed back.
    pub fn handshake(fd: OwnedFd, wanted: Tracking) -> Result<Self, (OwnedFd, Errno)> {
        match sys::api(fd.as_fd(), wanted.features()) {
            Ok(()) => Ok(Self {
                fd,
                tracking: wanted,
            }),
            Err(errno) => Err((fd, errno)),
        }
    }

    /// A descriptor whose handshake somebody else has done, with these `features`.
    #[must_use]
    pub fn adopt(fd: OwnedFd, features: u64) -> Self {
        Self {
            fd,
            tracking: Tracking::of_features(features),
        }
    }

    /// How writes are known with it.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        self.tracking
    }

    /// Has the kernel ask us for the missing pages of `mapping`. Twice is as good as once.
    ///
    /// # Errors
    /// `EBUSY` if another descriptor has it; `ESRCH` if the VMM has ended.
    pub fn register(&self, mapping: &Mapping) -> Result<(), Errno> {
        let mode = self.tracking.register_mode();
        sys::register(self.fd.as_fd(), mapping.hva.0, mapping.bytes, mode)
    }

    /// Makes missing pages from `bytes` on, as pages that were not written. Wakes nobody.
    #[must_use]
    pub fn fill(&self, from: Hva, bytes: &[u8]) -> Filled {
        let protect = self.tracking == Tracking::WriteProtect;
        Filled::of(sys::copy(self.fd.as_fd(), from.0, bytes, protect))
    }

    /// Makes missing pages of zeroes, as pages that *were* written, and wakes who waits for them.
    #[must_use]
    pub fn zero(&self, from: Hva, bytes: u64) -> Filled {
        Filled::of(sys::zero(self.fd.as_fd(), from.0, bytes))
    }

    /// Wakes whoever waits for a page of the range. Faults that are still missing come again.
    ///
    /// # Errors
    /// The range is not one, which is a mistake of ours.
    pub fn wake(&self, from: Hva, bytes: u64) -> Result<(), Errno> {
        sys::wake(self.fd.as_fd(), from.0, bytes)
    }

    /// Waits until a fault is there to be read.
    ///
    /// # Errors
    /// The kernel refused to wait.
    pub fn wait(&self) -> Result<(), Errno> {
        let mut readable = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut readable, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Takes the addresses of waiting faults; none if there are none now.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn read(&self, found: &mut [u64]) -> Result<usize, Errno> {
        sys::read_faults(self.fd.as_fd(), found)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
