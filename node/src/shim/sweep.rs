//! Killing what a crash left running for one sandbox directory.
//!
//! No pid is remembered: processes are found in `/proc` by their command line, which names the
//! directory (`wrenn shim --dir D`, `wrenn pager --dir D`, a QEMU with `-name D`, or a Cloud
//! Hypervisor whose first word ends with it). Each is killed through a pidfd that
//! was opened *before* its command line was read once more, so a number that has passed to another
//! process in between is never hit. The shim goes first: it could not start anything afterwards. The
//! pager goes last: the VMM, which may wait for a page, does not need it to die.
//!
//! A process has no command line for a moment in the middle of its `exec`, and again while it ends.
//! Such a one is looked at until it has a name or is gone: it may be the VMM that a shim was just
//! starting, with the sandbox's disk and tap open.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::pager::main as pager;
use crate::shim::error::SweepError;
use crate::shim::main::{COMMAND, DIR_OPTION};
use crate::shim::spec::ShimSpec;
use crate::vmm::cgroup;
use crate::vmm::cloud_hypervisor::spawn::NAME_PREFIX;
use crate::vmm::jail::{pidfd_kill, pidfd_open};
use crate::vmm::process::poll_timeout;

/// Longest wait for a killed process: freeing a large guest's memory takes a while.
const GONE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for a process without a command line. An `exec` takes a millisecond; a program may
/// also have erased its own, and is then no business of ours.
const NAMELESS_TIMEOUT: Duration = Duration::from_millis(250);
/// How long between two looks at such a process.
const NAMELESS_INTERVAL: Duration = Duration::from_millis(1);
/// `PF_KTHREAD`, among the flags of a process: it belongs to the kernel, and never has a command line.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// What a process is to the directory that is swept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Shim,
    Vmm,
    Pager,
}

/// What a look at a process says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Ours(Role),
    /// It is in the middle of its `exec`, or of its end.
    Nameless,
    /// Somebody else's, or gone.
    NotOurs,
}

/// Kills the shim, the VMM and the pager of `dir`, whether or not they answer, waits until they are
/// gone, and removes the VMM's control group. Returns the pids that were killed. Blocks: call it off
/// the runtime's threads.
///
/// # Errors
/// See [`SweepError`].
pub fn kill_leftovers(dir: &Path) -> Result<Vec<u32>, SweepError> {
    let dir = dir.canonicalize().map_err(|source| SweepError::Directory {
        dir: dir.to_owned(),
        source,
    })?;
    let mut killed = Vec::new();
    // Once more after the first round, for a process that its shim was just starting.
    loop {
        let found = processes_of(&dir).map_err(|source| SweepError::List { source })?;
        let Found { mut ours, nameless } = found;
        if ours.is_empty() {
            ours = named_at_last(&dir, &nameless);
        }
        ours.sort();
        let mut any = false;
        for (role, pid) in ours {
            any |= kill_if_still(&dir, role, pid)?
                .then(|| killed.push(pid))
                .is_some();
        }
        if !any {
            remove_group(&dir)?;
            return Ok(killed);
        }
    }
}

/// Removes the control group that the spec of `dir` names, which a shim that was killed has left.
fn remove_group(dir: &Path) -> Result<(), SweepError> {
    // A directory without a spec that can be read has never had a VMM.
    let spec = ShimSpec::read(dir).ok();
    let group = spec.and_then(|spec| spec.vmm.confinement.group);
    match group.map(|group| cgroup::remove(&group)) {
        Some(Err(source)) => Err(SweepError::Group { source }),
        _ => Ok(()),
    }
}

fn kill_if_still(dir: &Path, role: Role, pid: u32) -> Result<bool, SweepError> {
    // From here on the descriptor means one process only, whatever becomes of the number.
    let Ok(pidfd) = pidfd_open(pid) else {
        return Ok(false);
    };
    if look_at(dir, pid) != Seen::Ours(role) {
        return Ok(false);
    }
    pidfd_kill(pidfd.as_fd()).map_err(|source| SweepError::Kill { pid, source })?;
    wait_gone(&pidfd, pid)?;
    Ok(true)
}

fn wait_gone(pidfd: &OwnedFd, pid: u32) -> Result<(), SweepError> {
    let until = Instant::now() + GONE_TIMEOUT;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ended, poll_timeout(left)) {
            Ok(0) => {
                return Err(SweepError::Lingers {
                    pid,
                    waited: GONE_TIMEOUT,
                });
            }
            Ok(_) => return Ok(()),
            // A signal to this process, such as that of the end of a child of its own.
            Err(Errno::EINTR) => {}
            Err(errno) => {
                let source = errno.into();
                return Err(SweepError::Wait { pid, source });
            }
        }
    }
}

/// The processes that matter to a sweep.
#[derive(Default)]
struct Found {
    /// Those of the directory.
    ours: Vec<(Role, u32)>,
    /// Those of which nobody can tell yet.
    nameless: Vec<u32>,
}

fn processes_of(dir: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match look_at(dir, pid) {
            Seen::Ours(role) => found.ours.push((role, pid)),
            Seen::Nameless => found.nameless.push(pid),
            Seen::NotOurs => {}
        }
    }
    Ok(found)
}

/// Those of `nameless` that turn out to be of `dir`, once each has a name or is gone.
fn named_at_last(dir: &Path, nameless: &[u32]) -> Vec<(Role, u32)> {
    let until = Instant::now() + NAMELESS_TIMEOUT;
    let mut ours = Vec::new();
    for &pid in nameless {
        let mut seen = look_at(dir, pid);
        while seen == Seen::Nameless && Instant::now() < until {
            thread::sleep(NAMELESS_INTERVAL);
            seen = look_at(dir, pid);
        }
        if let Seen::Ours(role) = seen {
            ours.push((role, pid));
        }
    }
    ours
}

/// What process `pid` is to `dir`, by its command line.
fn look_at(dir: &Path, pid: u32) -> Seen {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return Seen::NotOurs;
    };
    if line.is_empty() {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        let may_be_ours = stat.is_ok_and(|stat| runs_a_program(&stat));
        return if may_be_ours {
            Seen::Nameless
        } else {
            Seen::NotOurs
        };
    }
    role_in(&line, dir).map_or(Seen::NotOurs, Seen::Ours)
}

/// Whether the process of this `/proc/PID/stat` is neither a zombie nor a thread of the kernel.
fn runs_a_program(stat: &str) -> bool {
    // The name before the fields is in parentheses, and may have some of its own.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let mut fields = fields.split_ascii_whitespace();
    let (state, flags) = (fields.next(), fields.nth(5));
    let flags: Option<u64> = flags.and_then(|flags| flags.parse().ok());
    !matches!(state, Some("Z" | "X") | None)
        && flags.is_some_and(|flags| flags & KERNEL_THREAD == 0)
}

/// What the process with this command line is to `dir`. `line` has its arguments ended by zero bytes.
fn role_in(line: &[u8], dir: &Path) -> Option<Role> {
    let args: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
    let dir = dir.as_os_str().as_bytes();
    let rest = args.get(1..)?;
    let is_ours = |(ours, with, role): (&str, &str, Role)| match rest {
        [command, option, named, ..] => {
            (*command == ours.as_bytes() && *option == with.as_bytes() && *named == dir)
                .then_some(role)
        }
        _ => None,
    };
    let shim = is_ours((COMMAND, DIR_OPTION, Role::Shim));
    let ours = shim.or_else(|| is_ours((pager::COMMAND, pager::DIR_OPTION, Role::Pager)));
    if ours.is_some() {
        return ours;
    }
    // As `cloud_hypervisor::spawn` writes it.
    let first = args.first()?.strip_prefix(NAME_PREFIX.as_bytes());
    if first == Some(dir) {
        return Some(Role::Vmm);
    }
    // As `qemu::args` writes it: commas doubled.
    let escaped = String::from_utf8_lossy(dir).replace(',', ",,");
    rest.windows(2)
        .any(|pair| pair[0] == b"-name" && pair[1] == escaped.as_bytes())
        .then_some(Role::Vmm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(line: &str) -> Option<Role> {
        role_in(line.replace(' ', "\0").as_bytes(), Path::new("/d/cl-1,a"))
    }

    #[test]
    fn zombies_and_the_kernels_threads_have_no_name_to_wait_for() {
        let of = |state: &str, flags: u64| format!("7 (a) b) {state} 1 7 7 0 -1 {flags} 1 2 3");
        assert!(runs_a_program(&of("R", 0x40_0000)));
        assert!(!runs_a_program(&of("Z", 0x40_0000)));
        assert!(!runs_a_program(&of("S", 0x0020_8040)));
        assert!(!runs_a_program(""));
        let own = fs::read_to_string("/proc/self/stat").expect("read");
        assert!(runs_a_program(&own), "{own}");
    }

    #[test]
    fn only_processes_of_this_very_directory_are_meant() {
        assert_eq!(role("wrenn shim --dir /d/cl-1,a "), Some(Role::Shim));
        assert_eq!(
            role("qemu -nodefaults -name /d/cl-1,,a -m 1 "),
            Some(Role::Vmm)
        );
        assert_eq!(role("wrenn pager --dir /d/cl-1,a "), Some(Role::Pager));
        assert_eq!(
            role("cloud-hypervisor:/d/cl-1,a --seccomp true "),
            Some(Role::Vmm)
        );
        for other in [
            "cloud-hypervisor:/d/cl-1,a2 --seccomp true ",
            "cloud-hypervisor --seccomp /d/cl-1,a ",
            "wrenn pager --dir /d/cl-1,a2 ",
            "wrenn shim --dir /d/cl-1,a2 ",
            "wrenn node --dir /d/cl-1,a ",
            "qemu -name /d/cl-1,,a2 ",
            "vi /d/cl-1,a ",
            "shim --dir /d/cl-1,a ",
            "",
        ] {
            assert_eq!(role(other), None, "{other}");
        }
    }

    #[test]
    fn a_directory_without_processes_is_swept_at_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(kill_leftovers(dir.path()).expect("swept").is_empty());
    }
}
