//! Starting children and reaping them.
//!
//! Between fork and exec a child touches no heap and takes no lock, since another thread of the agent
//! may have held either at the fork: everything it needs is made before ([`ChildPlan`]).

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use super::{check, check_long};

/// Exit code of a command whose file exists but cannot be executed, as shells report it.
const EXIT_NOT_EXECUTABLE: i32 = 126;
/// Exit code of a command that was not found, as shells report it.
const EXIT_NOT_FOUND: i32 = 127;
/// What a child writes to its own `oom_score_adj`: the kernel kills workload before the agent.
const CHILD_OOM_SCORE: &[u8] = b"100";
/// `ioprio_set` target "this thread" and the best-effort class at level 4 (the kernel's default).
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_BEST_EFFORT_4: libc::c_int = (2 << 13) | 4;

/// Strings in the form `execve` wants them: the list and, beside it, the array of pointers into it.
struct CStrings {
    _owned: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

// SAFETY: the pointers lead into heap buffers that `_owned` keeps alive and nobody changes.
unsafe impl Send for CStrings {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for CStrings {}

impl CStrings {
    fn new(owned: Vec<CString>) -> Self {
        let mut pointers: Vec<_> = owned.iter().map(|text| text.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Self {
            _owned: owned,
            pointers,
        }
    }
}

/// Everything a child needs between fork and exec, prepared before the fork so that the child
/// neither allocates nor locks.
pub struct ChildPlan {
    candidates: Vec<(CString, CStrings)>,
    argv: CStrings,
    envp: CStrings,
    cwd: CString,
    uid: libc::uid_t,
    gid: libc::gid_t,
    groups: Vec<libc::gid_t>,
    cgroup_procs: Option<CString>,
    takes_terminal: bool,
    complaint_not_found: Vec<u8>,
    complaint_not_executable: Vec<u8>,
}

/// What a [`ChildPlan`] is made from.
pub struct ChildSpec<'a> {
    /// Files to try in turn, the first that can be executed wins.
    pub candidates: Vec<OsString>,
    /// The command line, name of the command first.
    pub argv: Vec<String>,
    /// The whole environment as `NAME=value`.
    pub envp: Vec<String>,
    /// Working directory, entered after the change of user.
    pub cwd: &'a Path,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The `cgroup.procs` file the child writes itself into.
    pub cgroup_procs: Option<&'a Path>,
    /// Whether standard input becomes the controlling terminal.
    pub takes_terminal: bool,
}

impl ChildPlan {
    /// Turns a specification into what the child can use.
    ///
    /// # Errors
    /// `InvalidInput` when a string holds a zero byte.
    pub fn new(spec: ChildSpec<'_>) -> io::Result<Self> {
        let name = spec.argv.first().cloned().unwrap_or_default();
        let argv = to_c_strings(&spec.argv)?;
        let mut candidates = Vec::new();
        for file in spec.candidates {
            let file = CString::new(file.into_vec())?;
            // A text file without an interpreter line is run by the shell, as a shell would.
            let mut script = vec![CString::from(c"sh"), file.clone()];
            script.extend(argv.iter().skip(1).cloned());
            candidates.push((file, CStrings::new(script)));
        }
        let cgroup_procs = spec
            .cgroup_procs
            .map(|path| CString::new(path.as_os_str().as_bytes()));
        Ok(Self {
            candidates,
            argv: CStrings::new(argv),
            envp: CStrings::new(to_c_strings(&spec.envp)?),
            cwd: CString::new(spec.cwd.as_os_str().as_bytes())?,
            uid: spec.uid,
            gid: spec.gid,
            groups: spec.groups,
            cgroup_procs: cgroup_procs.transpose()?,
            takes_terminal: spec.takes_terminal,
            complaint_not_found: format!("{name}: command not found\n").into_bytes(),
            complaint_not_executable: format!("{name}: cannot execute\n").into_bytes(),
        })
    }

    /// Starts the child with the standard streams of `command`, whose program is never looked at.
    ///
    /// # Errors
    /// Whatever the kernel said to fork, to the change of user or to the change of directory.
    pub fn spawn(self, mut command: Command) -> io::Result<Child> {
        // SAFETY: the closure runs in the child between fork and exec; it makes only
        // async-signal-safe calls on memory prepared before the fork.
        unsafe { command.pre_exec(move || self.become_child()) };
        command.spawn()
    }

    /// Runs in the child. Comes back only with an error that happened before exec.
    fn become_child(&self) -> io::Result<()> {
        self.detach()?;
        Self::keep_descriptors_to_ourselves();
        self.lower_priority();
        self.drop_privileges()?;
        // SAFETY: `cwd` is a valid C string.
        check(unsafe { libc::chdir(self.cwd.as_ptr()) })?;
        self.exec()
    }

    fn detach(&self) -> io::Result<()> {
        // SAFETY: no memory is passed.
        check(unsafe { libc::setsid() })?;
        if self.takes_terminal {
            // SAFETY: descriptor 0 is the terminal's slave side; the argument is a plain number.
            check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        }
        Ok(())
    }

    /// Best effort on purpose: a missing cgroup or a read-only /proc must not stop a command.
    fn lower_priority(&self) {
        if let Some(procs) = &self.cgroup_procs {
            write_file(procs, b"0");
        }
        write_file(c"/proc/self/oom_score_adj", CHILD_OOM_SCORE);
        // SAFETY: only numbers are passed.
        unsafe {
            libc::setpriority(libc::PRIO_PROCESS, 0, 0);
            libc::syscall(
                libc::SYS_ioprio_set,
                IOPRIO_WHO_PROCESS,
                0,
                IOPRIO_BEST_EFFORT_4,
            );
        }
    }

    /// Nothing but the standard streams reaches the command, whatever the agent inherited itself.
    fn keep_descriptors_to_ourselves() {
        let (first, last, flags) = (3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        // SAFETY: only numbers are passed; descriptors stay open until exec.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    }

    /// Raw system calls: glibc's wrappers would signal threads that do not exist in the child.
    fn drop_privileges(&self) -> io::Result<()> {
        // SAFETY: the kernel reads `groups.len()` ids from the vector; the rest are numbers.
        unsafe {
            let groups =
                libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr());
            // Only root may set groups; outside a VM the agent may run as somebody else.
            if groups != 0 && libc::geteuid() == 0 {
                return Err(io::Error::last_os_error());
            }
            check_long(libc::syscall(
                libc::SYS_setresgid,
                self.gid,
                self.gid,
                self.gid,
            ))?;
            check_long(libc::syscall(
                libc::SYS_setresuid,
                self.uid,
                self.uid,
                self.uid,
            ))
        }
    }

    fn exec(&self) -> io::Result<()> {
        let mut denied = false;
        for (file, script) in &self.candidates {
            let (argv, envp) = (self.argv.pointers.as_ptr(), self.envp.pointers.as_ptr());
            // SAFETY: both arrays end in a null pointer and live in `self`.
            unsafe { libc::execve(file.as_ptr(), argv, envp) };
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                Some(libc::ENOEXEC) => {
                    let shell = c"/bin/sh";
                    // SAFETY: as above.
                    unsafe { libc::execve(shell.as_ptr(), script.pointers.as_ptr(), envp) };
                    denied = true;
                }
                _ => denied = true,
            }
        }
        let (complaint, code) = if denied {
            (&self.complaint_not_executable, EXIT_NOT_EXECUTABLE)
        } else {
            (&self.complaint_not_found, EXIT_NOT_FOUND)
        };
        // SAFETY: the buffer is valid for its length; `_exit` runs no destructors of the parent.
        unsafe {
            libc::write(2, complaint.as_ptr().cast(), complaint.len());
            libc::_exit(code)
        }
    }
}

fn to_c_strings(texts: &[String]) -> io::Result<Vec<CString>> {
    texts
        .iter()
        .map(|text| CString::new(text.as_str()).map_err(io::Error::from))
        .collect()
}

/// Writes a small file from a forked child; failure is ignored by design of the callers.
fn write_file(path: &std::ffi::CStr, text: &[u8]) {
    // SAFETY: `path` is a C string, `text` is valid for its length, the descriptor is our own.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, text.as_ptr().cast(), text.len());
            libc::close(fd);
        }
    }
}

/// Which child to reap.
#[derive(Clone, Copy, Debug)]
pub enum Reap {
    /// Whichever has died.
    Any,
    /// This one.
    One(i32),
}

/// Reaps a dead child without waiting: `None` when nobody (else) has died.
///
/// nix's wrapper loses the status of a child killed by a real-time signal, so it is not used.
#[must_use]
pub fn reap(which: Reap) -> Option<(i32, ExitStatus)> {
    let target = match which {
        Reap::Any => -1,
        Reap::One(pid) => pid,
    };
    let mut status = 0;
    // SAFETY: `status` is a valid place for the answer.
    let pid = unsafe { libc::waitpid(target, &raw mut status, libc::WNOHANG) };
    (pid > 0).then(|| (pid, ExitStatus::from_raw(status)))
}

/// Whether this process has any child, dead or alive. For process 1 this is the question whether
/// anything at all still runs.
#[must_use]
pub fn has_children() -> bool {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: all zeroes is a valid `siginfo_t`, and the kernel only writes into it.
    let result = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_ALL, 0, &raw mut info, flags)
    };
    result == 0
}
