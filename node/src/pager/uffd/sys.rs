//! What the standard library and nix do not wrap: the ioctls of userfaultfd and of page maps,
//! descriptors of other processes, and memory that is shared with one.
//!
//! One of the two files of this room with `unsafe` in it (the other is [`crate::pager::inject`]).
//! Everything it offers is safe to call: the kernel checks every address it is given against the
//! ranges that are registered, and fills only pages that are missing there.
//!
//! The `userfaultfd` crate is not used: it makes its own descriptor and keeps the handshake for
//! itself, while ours was made inside another process; it cannot fill a page write-protected; and
//! it needs libclang to build. Numbers are checked against their encoding by the compiler.

use std::io::{self, IoSliceMut};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// The only version of the interface there has ever been.
pub(in crate::pager) const UFFD_API: u64 = 0xAA;
/// Write faults on protected pages exist.
pub(in crate::pager) const FEATURE_WP: u64 = 1 << 0;
/// Missing pages of memfds can be served.
pub(in crate::pager) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Pages of memfds can be write-protected.
pub(in crate::pager) const FEATURE_WP_SHMEM: u64 = 1 << 12;
/// A page that is not there yet can be write-protected.
pub(in crate::pager) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel notes a write to a protected page by itself and asks nobody.
pub(in crate::pager) const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// What the kernel adds to the features of a descriptor whose handshake is over.
pub(in crate::pager) const FEATURE_INITIALIZED: u64 = 1 << 31;

/// Faults on missing pages.
pub(in crate::pager) const REGISTER_MISSING: u64 = 1 << 0;
/// Writes to protected pages.
pub(in crate::pager) const REGISTER_WP: u64 = 1 << 1;

const MODE_DONTWAKE: u64 = 1 << 0;
const COPY_MODE_WP: u64 = 1 << 1;
/// The one event there is without asking for others.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of one event.
const MESSAGE_BYTES: usize = 32;
/// Where in it the address is.
const ADDRESS_AT: usize = 16;

/// Only pages that were written since they were last protected.
pub(in crate::pager) const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Protect again what is reported, in the same step.
pub(in crate::pager) const SCAN_PROTECT: u64 = 1 << 0;
/// Refuse a range whose writes the kernel does not note by itself.
pub(in crate::pager) const SCAN_CHECK_ASYNC: u64 = 1 << 1;

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeroed: i64,
}

/// A run of pages in the answer of a scan.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::pager) struct ScannedRun {
    pub(in crate::pager) start: u64,
    pub(in crate::pager) end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The raw calls, and their numbers as `<linux/userfaultfd.h>` and `<linux/fs.h>` give them.
mod call {
    use super::{ScanArg, UffdioApi, UffdioCopy, UffdioRange, UffdioRegister, UffdioZeropage};

    const UFFDIO: u8 = 0xAA;

    nix::ioctl_readwrite!(api, UFFDIO, 0x3F, UffdioApi);
    nix::ioctl_readwrite!(register, UFFDIO, 0x00, UffdioRegister);
    // Declared the wrong way round in the kernel, for good.
    nix::ioctl_read!(wake, UFFDIO, 0x02, UffdioRange);
    nix::ioctl_readwrite!(copy, UFFDIO, 0x03, UffdioCopy);
    nix::ioctl_readwrite!(zeropage, UFFDIO, 0x04, UffdioZeropage);
    nix::ioctl_readwrite!(scan, b'f', 16, ScanArg);

    const fn both(group: u8, number: u8, size: usize) -> u64 {
        nix::request_code_readwrite!(group, number, size)
    }

    const _: () = assert!(both(UFFDIO, 0x3F, size_of::<UffdioApi>()) == 0xc018_aa3f);
    const _: () = assert!(both(UFFDIO, 0x00, size_of::<UffdioRegister>()) == 0xc020_aa00);
    const _: () = assert!(both(UFFDIO, 0x03, size_of::<UffdioCopy>()) == 0xc028_aa03);
    const _: () = assert!(both(UFFDIO, 0x04, size_of::<UffdioZeropage>()) == 0xc020_aa04);
    const _: () =
        assert!(nix::request_code_read!(UFFDIO, 0x02, size_of::<UffdioRange>()) == 0x8010_aa02);
    const _: () = assert!(both(b'f', 16, size_of::<ScanArg>()) == 0xc060_6610);
}

/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`; the argument is the flags of the new descriptor.
pub(in crate::pager) const DEVICE_NEW: u64 = nix::request_code_none!(0xAAu8, 0x00);
const _: () = assert!(DEVICE_NEW == 0xaa00);

/// Shakes hands: asks for `features`. A refusal leaves the descriptor as it was.
pub(in crate::pager) fn api(uffd: BorrowedFd<'_>, features: u64) -> Result<(), Errno> {
    let mut arg = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the descriptor is open for the call, and `arg` is a whole struct of our own.
    unsafe { call::api(uffd.as_raw_fd(), &raw mut arg) }.map(drop)
}

/// Registers `len` bytes from `start` of the address space the descriptor belongs to. Doing it
/// twice with one descriptor changes nothing; `EBUSY` if another one has the range.
pub(in crate::pager) fn register(
    uffd: BorrowedFd<'_>,
    start: u64,
    len: u64,
    mode: u64,
) -> Result<(), Errno> {
    let mut arg = UffdioRegister {
        range: UffdioRange { start, len },
        mode,
        ioctls: 0,
    };
    // SAFETY: as above. What changes is how the kernel treats missing pages of another process.
    unsafe { call::register(uffd.as_raw_fd(), &raw mut arg) }.map(drop)
}

/// Wakes whoever waits for a page in the range.
pub(in crate::pager) fn wake(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut arg = UffdioRange { start, len };
    // SAFETY: as above; nothing is written.
    unsafe { call::wake(uffd.as_raw_fd(), &raw mut arg) }.map(drop)
}

/// How far a fill got before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pager) struct Progress {
    /// Bytes that were filled.
    pub(in crate::pager) done: u64,
    /// Why it went no further; `None` if it merely has to be called again for the rest.
    pub(in crate::pager) stopped: Option<Errno>,
}

/// Makes missing pages from `bytes` on, and wakes nobody. Whole pages appear at once, never
/// halves. With `protect` each counts as not written.
pub(in crate::pager) fn copy(
    uffd: BorrowedFd<'_>,
    start: u64,
    bytes: &[u8],
    protect: bool,
) -> Progress {
    let mut arg = UffdioCopy {
        dst: start,
        src: bytes.as_ptr().addr() as u64,
        len: bytes.len() as u64,
        mode: MODE_DONTWAKE | if protect { COPY_MODE_WP } else { 0 },
        copied: 0,
    };
    // SAFETY: the kernel reads `len` bytes from `bytes`, which lives through the call, and writes
    // only into pages of registered ranges that did not exist before.
    let outcome = unsafe { call::copy(uffd.as_raw_fd(), &raw mut arg) };
    progress(outcome.err(), arg.copied)
}

/// Makes missing pages of zeroes and wakes whoever waits for them. They count as written: the
/// kernel knows no other way.
pub(in crate::pager) fn zero(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Progress {
    let mut arg = UffdioZeropage {
        range: UffdioRange { start, len },
        mode: 0,
        zeroed: 0,
    };
    // SAFETY: as for `copy`, and nothing is read.
    let outcome = unsafe { call::zeropage(uffd.as_raw_fd(), &raw mut arg) };
    progress(outcome.err(), arg.zeroed)
}

fn progress(refusal: Option<Errno>, moved: i64) -> Progress {
    match (refusal, u64::try_from(moved)) {
        // A part, or nothing because the address space was just changing: there may be more.
        (Some(Errno::EAGAIN) | None, Ok(done)) => Progress {
            done,
            stopped: None,
        },
        (Some(Errno::EAGAIN) | None, Err(_)) => Progress {
            done: 0,
            stopped: None,
        },
        (Some(errno), _) => Progress {
            done: 0,
            stopped: Some(errno),
        },
    }
}

/// Addresses of waiting faults, into `found`; returns how many. None if nobody waits now.
pub(in crate::pager) fn read_faults(
    uffd: BorrowedFd<'_>,
    found: &mut [u64],
) -> Result<usize, Errno> {
    const BATCH: usize = 16;
    let mut messages = [0_u8; BATCH * MESSAGE_BYTES];
    let room = found.len().min(BATCH) * MESSAGE_BYTES;
    let read = match nix::unistd::read(uffd, &mut messages[..room]) {
        Ok(read) => read,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
        Err(errno) => return Err(errno),
    };
    let mut count = 0;
    for message in messages[..read].chunks_exact(MESSAGE_BYTES) {
        let address = message[ADDRESS_AT..].first_chunk().copied();
        if let (EVENT_PAGEFAULT, Some(address)) = (message[0], address) {
            found[count] = u64::from_ne_bytes(address);
            count += 1;
        }
    }
    Ok(count)
}

/// Lists runs of pages in `[start, end)` that were written, into `runs`. Returns how many there
/// are and where the walk ended: short of `end` if `runs` was full.
pub(in crate::pager) fn scan_written(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    flags: u64,
    runs: &mut [ScannedRun],
) -> Result<(usize, u64), Errno> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags,
        start,
        end,
        vec: runs.as_mut_ptr().addr() as u64,
        vec_len: runs.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..ScanArg::default()
    };
    // SAFETY: the kernel writes at most `vec_len` runs into `runs`, which we hold exclusively.
    let count = unsafe { call::scan(pagemap.as_raw_fd(), &raw mut arg) }?;
    let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
    Ok((count.min(runs.len()), arg.walk_end))
}

/// A userfaultfd of this process itself, for the probe.
pub(in crate::pager) fn own_userfaultfd() -> Result<OwnedFd, Errno> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes an integer and returns a new descriptor.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    own(Errno::result(made)?)
}

/// A descriptor that means process `pid` and never another, readable once it has ended.
///
/// # Errors
/// There is no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: takes two integers and returns a new descriptor.
    let made = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    Ok(own(Errno::result(made)?)?)
}

/// A copy of descriptor `number` of the process behind `pidfd`.
pub(in crate::pager) fn pidfd_getfd(
    pidfd: BorrowedFd<'_>,
    number: RawFd,
) -> Result<OwnedFd, Errno> {
    // SAFETY: takes three integers and returns a new descriptor.
    let made = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    own(Errno::result(made)?)
}

fn own(number: libc::c_long) -> Result<OwnedFd, Errno> {
    let number = RawFd::try_from(number).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just handed us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes one packet and the descriptors that came with it. An empty packet without any is the
/// end of the stream.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    packet: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut parts = [IoSliceMut::new(packet)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            for number in numbers {
                // SAFETY: the kernel has just put this descriptor into our table for us.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    Ok((received.bytes, fds))
}

/// Gives up every capability of the calling thread but those in `kept`, for good.
pub(in crate::pager) fn keep_capabilities(kept: u64) -> Result<(), Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
    let sets = [half(kept), half(kept >> 32)].map(|bits| Sets {
        effective: bits,
        permitted: bits,
        inheritable: 0,
    });
    // SAFETY: both structs are as the kernel defines them for this version, and live through the
    // call, which only reads them.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(done).map(drop)
}

/// Bytes shared with other processes, as many as a file is long. The file must never shrink.
#[derive(Debug)]
pub struct SharedBytes {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only reached by atomics.
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    /// Maps the first `len` bytes of `file`, to read and to write.
    ///
    /// # Errors
    /// The kernel refused, or `len` is zero.
    pub fn map(file: impl AsFd, len: u64) -> io::Result<Self> {
        Self::map_part(file, 0, len)
    }

    /// Maps `len` bytes of `file` from `offset` on, to read and to write.
    ///
    /// # Errors
    /// The kernel refused, `len` is zero, or `offset` is no whole number of pages.
    pub fn map_part(file: impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let nonzero = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at a place the kernel chooses; nothing of ours is replaced.
        let start = unsafe { mmap(None, nonzero, access, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { start, len })
    }

    /// The bytes. Others may change them at any time.
    #[must_use]
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: `len` mapped bytes start here for as long as `self` lives, any bytes are valid,
        // and all access in this process goes through these atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<AtomicU8>(), self.len) }
    }

    /// Where the first byte lies in this process's memory.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Copies from `offset` on into `into`, byte by byte.
    ///
    /// # Panics
    /// Past the end.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = &self.bytes()[offset..offset + into.len()];
        for (to, from) in into.iter_mut().zip(from) {
            *to = from.load(Ordering::Relaxed);
        }
    }

    /// Copies `from` to `offset`, byte by byte.
    ///
    /// # Panics
    /// Past the end.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = &self.bytes()[offset..offset + from.len()];
        for (to, from) in to.iter().zip(from) {
            to.store(*from, Ordering::Relaxed);
        }
    }
}

impl Drop for SharedBytes {
    fn drop(&mut self) {
        // SAFETY: this is the mapping we made, and nothing borrows from it any more.
        let _unmapped = unsafe { munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_and_a_pause_ask_for_more_and_anything_else_is_told() {
        let more = |done| Progress {
            done,
            stopped: None,
        };
        assert_eq!(progress(None, 65536), more(65536));
        assert_eq!(progress(Some(Errno::EAGAIN), 4096), more(4096));
        let changing = -i64::from(Errno::EAGAIN as i32);
        assert_eq!(progress(Some(Errno::EAGAIN), changing), more(0));
        let there = Progress {
            done: 0,
            stopped: Some(Errno::EEXIST),
        };
        assert_eq!(progress(Some(Errno::EEXIST), -17), there);
    }
}
