//! Every system call that safe Rust cannot make for us, and nothing else.
//!
//! This is the only module of the crate in which `unsafe` may stand. Each function takes and returns
//! owned, checked values, so that callers cannot hold it wrong. Starting and reaping children, a
//! network interface, and extended attributes have files of their own; here are the rest: terminals
//! and descriptors, the random pool, file systems, kernel modules.

#![allow(unsafe_code)]

mod attributes;
mod child;
mod interface;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

pub use self::attributes::{get_attribute, list_attributes, remove_attribute, set_attribute};
pub use self::child::{ChildPlan, ChildSpec, Reap, has_children, reap};
pub use self::interface::Interface;

/// The raw ioctls, each with the number the kernel's headers give it.
mod ioctl {
    #![allow(missing_docs, unreachable_pub)] // the macros write public functions without a word

    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_write_ptr_bad!(add_random, 0x4008_5203, super::RandPoolInfo);
    nix::ioctl_none_bad!(reseed_random, 0x5207);
    nix::ioctl_none_bad!(freeze_file_system, 0xC004_5877);
    nix::ioctl_none_bad!(thaw_file_system, 0xC004_5878);
}

/// Sets a terminal's size.
///
/// # Errors
/// What the kernel said.
pub fn resize_terminal(terminal: BorrowedFd<'_>, size: &libc::winsize) -> io::Result<()> {
    // SAFETY: the descriptor is open and the kernel only reads `size`.
    unsafe { ioctl::set_window_size(terminal.as_raw_fd(), size) }?;
    Ok(())
}

/// Watches a descriptor for readiness.
///
/// # Errors
/// What the kernel said.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the value owns its descriptor, which stays open and the same until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Most bytes that one call hands to the kernel's random pool.
pub const MAX_ENTROPY_BYTES: usize = 512;

/// The kernel's `struct rand_pool_info` with room for [`MAX_ENTROPY_BYTES`].
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY_BYTES],
}

/// Credits `seed` to the kernel's random pool and makes it reseed at once, so that two guests
/// resumed from one snapshot do not draw the same numbers.
///
/// # Errors
/// `InvalidInput` for a seed that is too long; else what opening or the ioctl said.
pub fn add_entropy(seed: &[u8]) -> io::Result<()> {
    let length = i32::try_from(seed.len()).unwrap_or(i32::MAX);
    let mut info = RandPoolInfo {
        entropy_count: length.saturating_mul(8),
        buf_size: length,
        buf: [0; 512],
    };
    let room = info
        .buf
        .get_mut(..seed.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    room.copy_from_slice(seed);
    let random = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")?;
    // SAFETY: `info` is laid out as the kernel expects and says how much of it is filled.
    unsafe {
        ioctl::add_random(random.as_raw_fd(), &raw const info)?;
        ioctl::reseed_random(random.as_raw_fd())?;
    }
    Ok(())
}

/// Stops all writing to the file system that `place` lies on, once everything is on its disk.
///
/// # Errors
/// What the kernel said; a file system that is frozen already is no error.
pub fn freeze_file_system(place: &std::fs::File) -> io::Result<()> {
    // SAFETY: the descriptor is open; the kernel looks at no argument.
    match unsafe { ioctl::freeze_file_system(place.as_raw_fd()) } {
        Ok(_) | Err(nix::Error::EBUSY) => Ok(()),
        Err(err) => Err(err.into()),
    }
}

/// Lets a file system be written again.
///
/// # Errors
/// What the kernel said; a file system that is not frozen is no error.
pub fn thaw_file_system(place: &std::fs::File) -> io::Result<()> {
    // SAFETY: as above.
    match unsafe { ioctl::thaw_file_system(place.as_raw_fd()) } {
        Ok(_) | Err(nix::Error::EINVAL) => Ok(()),
        Err(err) => Err(err.into()),
    }
}

/// Loads a kernel module from an open file.
///
/// # Errors
/// What the kernel said; a module that is already there is no error.
pub fn load_module(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: the descriptor is open, the parameter string is empty, flags are zero.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match check_long(result) {
        Err(err) if err.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Makes `console` the standard streams of this process.
///
/// # Errors
/// What `dup2` said.
pub fn take_console(console: &std::fs::File) -> io::Result<()> {
    for stream in 0..=2 {
        // SAFETY: `console` is open; replacing 0 to 2 is the purpose and nobody else owns them.
        check(unsafe { libc::dup2(console.as_raw_fd(), stream) })?;
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn check_long(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
