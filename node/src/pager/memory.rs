//! The memfd that is a guest's memory.
//!
//! Whoever makes it owns it; the VMM only maps it. Its size is sealed, so that a VMM that was
//! taken over cannot shrink it under its owner (reading past the end would kill the reader).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;
use proto::units::Mib;

use crate::pager::region::Region;

/// The name under which `/proc/<pid>/maps` shows guest memory.
const NAME: &str = "wrenn-guest-memory";
/// What `fstat` counts in, whatever the file system's own blocks are.
const BLOCK_BYTES: u64 = 512;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make {size} of guest memory")]
pub struct CreateMemoryError {
    /// How much was wanted.
    size: Mib,
    /// What the kernel said.
    source: io::Error,
}

/// The memory of one guest. Pages appear as they are touched; dropping it gives them back once
/// the VMM has ended too.
#[derive(Debug)]
pub struct GuestMemory {
    fd: OwnedFd,
    region: Region,
}

impl GuestMemory {
    /// Makes `size` of empty memory; no page of it exists yet.
    ///
    /// # Errors
    /// The kernel has no descriptor to give, or refuses the size.
    pub fn create(size: Mib) -> Result<Self, CreateMemoryError> {
        let region = Region::new(size);
        let fd = sealed_memfd(NAME, region.bytes())
            .map_err(|source| CreateMemoryError { size, source })?;
        Ok(Self { fd, region })
    }

    /// Its extent.
    #[must_use]
    pub fn region(&self) -> Region {
        self.region
    }

    /// How much of it exists, swapped out or not.
    ///
    /// # Errors
    /// The kernel would not tell.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        let blocks = u64::try_from(fstat(&self.fd)?.st_blocks);
        Ok(blocks.map_err(io::Error::other)? * BLOCK_BYTES)
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A memfd of `bytes` that nobody can make longer or shorter.
pub(super) fn sealed_memfd(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let length = i64::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&fd, length)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_memory_has_its_size_and_no_pages() {
        let memory = GuestMemory::create(Mib(64)).expect("memfd");
        let stat = fstat(&memory).expect("fstat");
        assert_eq!(
            u64::try_from(stat.st_size).expect("positive"),
            memory.region().bytes()
        );
        assert_eq!(memory.resident_bytes().expect("told"), 0);
        nix::sys::uio::pwrite(&memory, b"x", 5000).expect("written");
        assert_eq!(memory.resident_bytes().expect("told"), 4096);
    }

    #[test]
    fn nobody_can_shrink_it() {
        let memory = GuestMemory::create(Mib(1)).expect("memfd");
        assert!(ftruncate(&memory, 4096).is_err());
    }
}
