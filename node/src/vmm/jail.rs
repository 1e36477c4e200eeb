//! The child's side of starting a process: what happens between `fork` and `exec`.
//!
//! Order matters. The namespace is entered first (it needs rights), then limits and rights are
//! taken away, and the death signal comes last, because changes of credentials clear it. Only
//! async-signal-safe calls are made, on values that were prepared before the fork.
//!
//! A VMM keeps one capability, that of reading files and entering directories: images may lie
//! below a directory that only a person, not root, may enter. It loses all others, may gain none,
//! writes no core files (they would hold the guest's memory) and holds only the descriptors
//! named. It still has root's user id, so it may write what belongs to root; handing it its files
//! as descriptors and an id of its own is the next step.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, Pid, getppid};

/// Descriptors a VMM may have open: its own few dozen, with room for threads and block jobs.
const MAX_OPEN_FILES: u64 = 512;
/// `CAP_DAC_READ_SEARCH`: see the head of this file.
const KEPT_CAPABILITY: libc::c_ulong = 2;
/// Past the last capability of any kernel; the loop ends at the first that does not exist.
const CAPABILITY_END: libc::c_ulong = 64;

/// The surroundings a child is put into before it runs.
#[derive(Debug)]
pub struct Jail {
    netns: Option<OwnedFd>,
    inherit: Vec<RawFd>,
}

impl Jail {
    /// A jail in `netns` (or the caller's own namespace) with the descriptors `inherit` left open
    /// under the numbers they have now. They must stay open until the child was started.
    #[must_use]
    pub fn new(netns: Option<OwnedFd>, inherit: &[BorrowedFd<'_>]) -> Self {
        Self {
            netns,
            inherit: inherit.iter().map(AsRawFd::as_raw_fd).collect(),
        }
    }

    /// Makes `command` start inside this jail, bound to the life of the calling thread.
    pub fn confine(self, command: &mut Command) {
        let parent = Pid::this();
        let enter = move || self.enter(parent).map_err(io::Error::from);
        // SAFETY: `enter` runs in the forked child and makes only system calls: it neither
        // allocates nor takes a lock that another thread of the parent may have held.
        unsafe { command.pre_exec(enter) };
    }

    fn enter(&self, parent: Pid) -> Result<(), Errno> {
        if let Some(netns) = &self.netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES)?;
        drop_capabilities()?;
        prctl::set_no_new_privs()?;
        close_on_exec_from(3)?;
        for &fd in &self.inherit {
            // SAFETY: the parent keeps these descriptors open until the child was started.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the signal was set; then nobody would send it.
        if getppid() == parent {
            Ok(())
        } else {
            Err(Errno::ESRCH)
        }
    }
}

/// Which side of a [`fork`] the caller finds itself on.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// The process that called; the new one is its child.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Splits the process in two.
///
/// # Errors
/// The kernel has no room for another process, or this one already has threads.
pub fn fork() -> io::Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other("the process already has threads"));
    }
    // SAFETY: there is exactly one thread, so the child inherits no lock held by another.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Side::Parent(child)),
        ForkResult::Child => Ok(Side::Child),
    }
}

/// A descriptor for process `pid` that becomes readable when it ends, and never means another.
///
/// # Errors
/// There is no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just handed us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process behind `pidfd`. A process that has ended already is no error.
///
/// # Errors
/// The kernel refused the signal.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    pidfd_signal(pidfd, Signal::SIGKILL)
}

/// Sends `signal` to the process behind `pidfd`. A process that has ended already is no error.
///
/// # Errors
/// The kernel refused the signal.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    // SAFETY: the third argument may be null, and the others are integers.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    match Errno::result(sent) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives the calling thread the lowest real-time priority, before all ordinary threads of the
/// host. Processes that it starts do not inherit it.
///
/// # Errors
/// The caller lacks the right.
pub fn raise_priority() -> io::Result<()> {
    let lowest = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 means the calling thread, and `lowest` lives through the call.
    let set = unsafe { libc::sched_setscheduler(0, policy, &raw const lowest) };
    Errno::result(set).map(drop).map_err(io::Error::from)
}

/// Takes all but [`KEPT_CAPABILITY`] out of the bounding set, so `exec` cannot give them back.
fn drop_capabilities() -> Result<(), Errno> {
    for capability in 0..CAPABILITY_END {
        if capability == KEPT_CAPABILITY {
            continue;
        }
        // SAFETY: the arguments of this prctl are integers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(dropped) {
            Ok(_) => {}
            // Past the last capability; or a caller without rights, who has none to pass on.
            Err(Errno::EINVAL | Errno::EPERM) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Marks every descriptor from `first` on to be closed by `exec`. They stay open until then: the
/// standard library reports a failing `exec` through one of them.
fn close_on_exec_from(first: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: takes integers only, and merely sets flags on descriptors.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Errno::result(marked).map(drop)
}
