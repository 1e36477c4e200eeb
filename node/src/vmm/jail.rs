//! The child's side of starting a process: what happens between `fork` and `exec`.
//!
//! Order matters. The control group is joined and namespaces are entered first (both need rights),
//! then limits and rights are taken away, then the user is changed, and the death signal comes last,
//! because changes of credentials clear it. Only async-signal-safe calls are made, on values that
//! were prepared before the fork.
//!
//! A VMM with a user of its own ([`super::confinement`]) keeps no capability, and sees the
//! files of its own root directory only ([`super::root`]). One without has root's user id and keeps
//! one capability, that of reading files and entering directories: images may lie below a
//! directory that only a person, not root, may enter. Either may gain no rights, writes no core files
//! (they would hold the guest's memory) and holds only the descriptors named. What it may write and
//! run can be cut down to a few files ([`FileRules`], by Landlock).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Gid, Pid, Uid, getppid, setgroups, setresgid, setresuid};

use crate::vmm::cgroup::{CgroupError, Group, Limits};
use crate::vmm::root::{Root, RootError, RootPlan};

/// Descriptors a VMM may have open: its own few dozen, with room for threads and block jobs.
const MAX_OPEN_FILES: u64 = 512;
/// `CAP_DAC_READ_SEARCH`: see the head of this file.
const KEPT_CAPABILITY: libc::c_ulong = 2;
/// Past the last capability of any kernel; the loop ends at the first that does not exist.
const CAPABILITY_END: libc::c_ulong = 64;

/// Why a child's surroundings could not be made.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// It has no control group.
    #[error("make the VMM's control group")]
    Group(#[from] CgroupError),
    /// It has no root directory of its own.
    #[error("make the VMM's root directory")]
    Root(#[from] RootError),
    /// It has no rules for its files.
    #[error("make rules for the VMM's files")]
    Rules(#[source] io::Error),
}

/// The surroundings a child is put into before it runs.
#[derive(Debug)]
pub struct Jail {
    netns: Option<OwnedFd>,
    inherit: Vec<RawFd>,
    rules: Option<FileRules>,
    group: Option<Arc<Group>>,
    own: Option<Own>,
}

/// What is a child's own, where root would be the host's.
#[derive(Debug)]
struct Own {
    user: u32,
    mounts: OwnedFd,
    tasks: u64,
}

impl Jail {
    /// A jail in `netns` (or the caller's own namespace) with the descriptors `inherit` left open
    /// under the numbers they have now. They must stay open until the child was started.
    #[must_use]
    pub fn new(netns: Option<OwnedFd>, inherit: &[BorrowedFd<'_>]) -> Self {
        Self {
            netns,
            inherit: inherit.iter().map(AsRawFd::as_raw_fd).collect(),
            rules: None,
            group: None,
            own: None,
        }
    }

    /// As it is, and writing and running only what `rules` allow; all of it, where the kernel has
    /// no such rules.
    #[must_use]
    pub fn with_rules(mut self, rules: Option<FileRules>) -> Self {
        self.rules = rules;
        self
    }

    /// As it is, and under the rules that allow `allowed`, by names in the root directory that it
    /// has.
    ///
    /// # Errors
    /// [`JailError::Rules`].
    pub fn under(self, allowed: Option<&[(PathBuf, Allowed)]>) -> Result<Self, JailError> {
        let rules = allowed.map(FileRules::allowing).transpose();
        let rules = rules.map_err(JailError::Rules)?;
        Ok(self.with_rules(rules.flatten()))
    }

    /// As it is, and in a control group of its own at `dir`.
    ///
    /// # Errors
    /// [`JailError::Group`].
    pub fn in_group(mut self, dir: &Path, limits: Limits) -> Result<Self, JailError> {
        self.group = Some(Arc::new(Group::create(dir, limits)?));
        Ok(self)
    }

    /// As it is, with the user and in the root directory of `plan`, under its rules, and with at most
    /// `tasks` threads.
    ///
    /// # Errors
    /// [`JailError::Root`].
    pub fn in_root(mut self, plan: &RootPlan, tasks: u32) -> Result<Self, JailError> {
        let Root { namespace, rules } = plan.build()?;
        self.rules = rules;
        self.own = Some(Own {
            user: plan.owner,
            mounts: namespace,
            tasks: tasks.into(),
        });
        Ok(self)
    }

    /// Starts `command` inside this jail, bound to the life of the calling thread. One in a root of
    /// its own is the first process of a namespace of its own too. The group, if it has one, is to be
    /// kept for as long as the child lives.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn start(self, command: &mut Command) -> io::Result<(Child, Option<Arc<Group>>)> {
        let group = self.group.clone();
        if self.own.is_none() {
            self.confine(command);
            return Ok((command.spawn()?, group));
        }
        let parent = Parent::Watched(pidfd_open(std::process::id())?);
        self.confine_under(parent, command);
        Ok((first_of_its_kind(command)?, group))
    }

    /// Makes `command` start inside this jail, bound to the life of the calling thread, and among
    /// the caller's processes.
    pub fn confine(self, command: &mut Command) {
        self.confine_under(Parent::Numbered(Pid::this()), command);
    }

    fn confine_under(self, parent: Parent, command: &mut Command) {
        let enter = move || self.enter(&parent).map_err(io::Error::from);
        // SAFETY: `enter` runs in the forked child and makes only system calls: it neither
        // allocates nor takes a lock that another thread of the parent may have held.
        unsafe { command.pre_exec(enter) };
    }

    fn enter(&self, parent: &Parent) -> Result<(), Errno> {
        if let Some(group) = &self.group {
            group.join()?;
        }
        if let Some(netns) = &self.netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES)?;
        if let Some(own) = &self.own {
            own.enter()?;
        } else {
            drop_capabilities(Some(KEPT_CAPABILITY))?;
        }
        prctl::set_no_new_privs()?;
        if let Some(rules) = &self.rules {
            rules.restrict()?;
        }
        close_on_exec_from(3)?;
        for &fd in &self.inherit {
            // SAFETY: the parent keeps these descriptors open until the child was started.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the signal was set; then nobody would send it.
        if parent.lives()? {
            Ok(())
        } else {
            Err(Errno::ESRCH)
        }
    }
}

/// How a child knows whether its parent still lives.
#[derive(Debug)]
enum Parent {
    /// By its number.
    Numbered(Pid),
    /// By a descriptor: its number says nothing in the child's namespace.
    Watched(OwnedFd),
}

impl Parent {
    /// Makes one system call.
    fn lives(&self) -> Result<bool, Errno> {
        match self {
            Self::Numbered(number) => Ok(getppid() == *number),
            Self::Watched(pidfd) => {
                let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                Ok(poll(&mut ended, PollTimeout::ZERO)? == 0)
            }
        }
    }
}

/// Starts `command` as the first process of a namespace. What the calling thread starts later is
/// not in there: the namespace ends with its first process, and nothing starts in it any more.
fn first_of_its_kind(command: &mut Command) -> io::Result<Child> {
    let ours = File::open("/proc/thread-self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let started = command.spawn();
    if let Err(errno) = setns(&ours, CloneFlags::CLONE_NEWPID) {
        if let Ok(mut child) = started {
            let _gone = child.kill().and_then(|()| child.wait());
        }
        return Err(errno.into());
    }
    started
}

impl Own {
    /// Nothing of this can be taken back: the user has no capability, and `exec` gives none.
    fn enter(&self) -> Result<(), Errno> {
        setns(&self.mounts, CloneFlags::CLONE_NEWNS)?;
        unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
        // Of this user, which nobody else has: without control groups it is what bounds them.
        setrlimit(Resource::RLIMIT_NPROC, self.tasks, self.tasks)?;
        drop_capabilities(None)?;
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.user));
        setgroups(&[])?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)
    }
}

/// What a child may still do to files: reading is not touched, everything that changes or runs one
/// is refused unless it is allowed here. Its open descriptors are not affected, and neither are
/// memfds.
#[derive(Debug)]
pub struct FileRules {
    ruleset: OwnedFd,
    truncation: bool,
}

/// What may be done to a file, or to all below a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Being run, as a program or as its loader.
    Run,
    /// Being written and cut short.
    Write,
    /// Having sockets made in it.
    MakeSockets,
}

/// `LANDLOCK_ACCESS_FS_EXECUTE`, and so on; see `landlock(7)`.
const LANDLOCK_EXECUTE: u64 = 1;
const LANDLOCK_WRITE_FILE: u64 = 1 << 1;
const LANDLOCK_MAKE_SOCK: u64 = 1 << 9;
const LANDLOCK_TRUNCATE: u64 = 1 << 14;
/// Removing and making files and directories of all kinds.
const LANDLOCK_CHANGES: u64 = 0b1_1111_1111 << 4;
/// From this version of the interface on, cutting a file short is a right of its own.
const LANDLOCK_WITH_TRUNCATE: libc::c_long = 3;
/// `LANDLOCK_CREATE_RULESET_VERSION`.
const LANDLOCK_TELL_VERSION: libc::c_uint = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const LANDLOCK_BENEATH: libc::c_int = 1;

impl FileRules {
    /// Rules that allow nothing; `None` where the kernel has none.
    ///
    /// # Errors
    /// The kernel has no descriptor to give.
    pub fn nothing() -> io::Result<Option<Self>> {
        let (none, tell) = (std::ptr::null::<u64>(), LANDLOCK_TELL_VERSION);
        // SAFETY: asked for the version alone, with no attributes to read.
        let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, tell) };
        if version < 1 {
            return Ok(None);
        }
        let truncation = version >= LANDLOCK_WITH_TRUNCATE;
        let mut handled = LANDLOCK_EXECUTE | LANDLOCK_WRITE_FILE | LANDLOCK_CHANGES;
        if truncation {
            handled |= LANDLOCK_TRUNCATE;
        }
        let (attributes, length) = (&raw const handled, size_of_val(&handled));
        // SAFETY: the attributes are one integer, which lives through the call.
        let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, attributes, length, 0) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| io::ErrorKind::InvalidData)?;
        // SAFETY: the kernel has just handed us this descriptor, and nobody else knows it.
        let ruleset = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Some(Self {
            ruleset,
            truncation,
        }))
    }

    /// Rules that allow `allowed` and nothing else; `None` where the kernel has none.
    ///
    /// # Errors
    /// As [`Self::nothing`] and [`Self::allow`].
    pub fn allowing(allowed: &[(PathBuf, Allowed)]) -> io::Result<Option<Self>> {
        let rules = Self::nothing()?;
        if let Some(rules) = &rules {
            for (path, allowed) in allowed {
                rules.allow(path, *allowed)?;
            }
        }
        Ok(rules)
    }

    /// Allows something at `path`, and below it if it is a directory. One that is not there needs
    /// no rule.
    ///
    /// # Errors
    /// The kernel refused, or the path cannot be opened.
    pub fn allow(&self, path: &Path, allowed: Allowed) -> io::Result<()> {
        #[repr(C, packed)]
        struct Beneath {
            allowed: u64,
            parent: i32,
        }
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let place = match open(path, flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(()),
            opened => opened?,
        };
        let rule = Beneath {
            allowed: match allowed {
                Allowed::Run => LANDLOCK_EXECUTE,
                Allowed::Write if self.truncation => LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE,
                Allowed::Write => LANDLOCK_WRITE_FILE,
                Allowed::MakeSockets => LANDLOCK_MAKE_SOCK,
            },
            parent: place.as_raw_fd(),
        };
        let (fd, kind) = (self.ruleset.as_raw_fd(), LANDLOCK_BENEATH);
        // SAFETY: `rule` is laid out as the kernel wants it, and lives through the call, as does
        // the descriptor in it.
        let added =
            unsafe { libc::syscall(libc::SYS_landlock_add_rule, fd, kind, &raw const rule, 0) };
        Ok(Errno::result(added).map(drop)?)
    }

    /// Puts the calling thread under these rules, and whatever it runs.
    fn restrict(&self) -> Result<(), Errno> {
        let fd = self.ruleset.as_raw_fd();
        // SAFETY: takes two integers and touches no memory of ours.
        let restricted = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd, 0) };
        Errno::result(restricted).map(drop)
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

/// Takes all but `kept` out of the bounding set, so `exec` cannot give them back.
fn drop_capabilities(kept: Option<libc::c_ulong>) -> Result<(), Errno> {
    for capability in 0..CAPABILITY_END {
        if Some(capability) == kept {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `script` in a shell under `rules`; whether it succeeded.
    fn runs(script: &str, rules: Option<FileRules>) -> bool {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        command.stderr(std::process::Stdio::null());
        Jail::new(None, &[]).with_rules(rules).confine(&mut command);
        command.status().is_ok_and(|status| status.success())
    }

    fn rules(allowed: &[(&Path, Allowed)]) -> Option<FileRules> {
        let rules = FileRules::nothing().expect("a ruleset");
        if let Some(rules) = &rules {
            for shell in ["/bin/sh", "/lib", "/lib64", "/usr/lib"] {
                rules.allow(Path::new(shell), Allowed::Run).expect("added");
            }
            for (path, allowed) in allowed {
                rules.allow(path, *allowed).expect("added");
            }
        }
        rules
    }

    #[test]
    fn what_is_not_allowed_is_neither_written_nor_made_nor_run() {
        let home = tempfile::tempdir().expect("tempdir");
        let file = home.path().join("file");
        std::fs::write(&file, "old").expect("written");
        let name = file.display();
        let overwrite = format!("echo new > {name}");
        let (make, remove) = (format!("echo > {name}2"), format!("rm {name}"));
        if rules(&[]).is_none() {
            return;
        }
        assert!(runs(
            &format!("read x < {name}; [ \"$x\" ]; true"),
            rules(&[])
        ));
        for refused in [&overwrite, &make, &remove, "/usr/bin/env true"] {
            assert!(!runs(refused, rules(&[])), "{refused}");
        }
        assert!(runs(&overwrite, rules(&[(&file, Allowed::Write)])));
        assert!(!runs(&make, rules(&[(&file, Allowed::Write)])));
        assert_eq!(std::fs::read(&file).expect("there"), b"new\n");
    }

    #[test]
    fn a_path_that_is_not_there_needs_no_rule() {
        let Some(rules) = rules(&[]) else { return };
        let nowhere = Path::new("/nonexistent/place");
        rules.allow(nowhere, Allowed::Write).expect("nothing to do");
    }
}
