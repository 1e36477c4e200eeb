//! Every system call that safe Rust cannot make for us, and nothing else.
//!
//! This is the only file of the crate in which `unsafe` may stand. Each function takes and returns
//! owned, checked values, so that callers cannot hold it wrong. Three groups live here: starting
//! and reaping children (fork without touching the heap in the child), ioctls of devices, networks
//! and file systems, and extended attributes.

#![allow(unsafe_code)]

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use tokio::io::unix::AsyncFd;

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

/// `SIOCDARP`, which the libc crate does not name.
const FORGET_NEIGHBOUR: libc::Ioctl = 0x8953;

/// Calls for one network interface, by ioctl on a datagram socket.
pub struct Interface {
    socket: std::net::UdpSocket,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Interface {
    /// Prepares calls for the interface called `name`.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is too long; else what opening a socket said.
    pub fn new(name: &str) -> io::Result<Self> {
        let mut buffer = [0; libc::IFNAMSIZ];
        if name.len() >= buffer.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, byte) in buffer.iter_mut().zip(name.bytes()) {
            *place = libc::c_char::from_ne_bytes([byte]);
        }
        Ok(Self {
            socket: std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?,
            name: buffer,
        })
    }

    /// Gives the interface its address and network mask.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_address(&self, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        self.call(
            libc::SIOCSIFADDR,
            libc::__c_anonymous_ifr_ifru {
                ifru_addr: inet(address),
            },
        )?;
        self.call(
            libc::SIOCSIFNETMASK,
            libc::__c_anonymous_ifr_ifru {
                ifru_netmask: inet(mask),
            },
        )
    }

    /// Switches the interface on.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn bring_up(&self) -> io::Result<()> {
        #[allow(clippy::cast_possible_truncation)] // IFF_UP and IFF_RUNNING are 1 and 64
        let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        self.call(
            libc::SIOCSIFFLAGS,
            libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
        )
    }

    /// Sends everything without a better route to `gateway`.
    ///
    /// # Errors
    /// What the kernel said; a route that is already there is no error.
    pub fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `rtentry`.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = inet(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = inet(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = inet(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: `route` outlives the call and is laid out as the kernel expects.
        match check(unsafe {
            libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &raw mut route)
        }) {
            Err(err) if err.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Forgets the hardware address of `neighbour`; it is asked for again when next needed.
    ///
    /// # Errors
    /// What the kernel said; a neighbour that is not known is no error.
    pub fn forget_neighbour(&self, neighbour: Ipv4Addr) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `arpreq`.
        let mut entry: libc::arpreq = unsafe { std::mem::zeroed() };
        entry.arp_pa = inet(neighbour);
        entry.arp_dev = self.name;
        // SAFETY: `entry` outlives the call and is laid out as the kernel expects.
        match check(unsafe {
            libc::ioctl(self.socket.as_raw_fd(), FORGET_NEIGHBOUR, &raw mut entry)
        }) {
            Err(err) if err.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            other => other,
        }
    }

    fn call(&self, request: libc::Ioctl, argument: libc::__c_anonymous_ifr_ifru) -> io::Result<()> {
        let mut packet = libc::ifreq {
            ifr_name: self.name,
            ifr_ifru: argument,
        };
        // SAFETY: `packet` outlives the call and is laid out as the kernel expects.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), request, &raw mut packet) })
    }
}

/// An IPv4 address in the form of the socket calls.
fn inet(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data[2..6].iter_mut().zip(address.octets()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // AF_INET is 2
    let family = libc::AF_INET as libc::sa_family_t;
    libc::sockaddr {
        sa_family: family,
        sa_data: data,
    }
}

/// Names of the extended attributes of an open file.
///
/// # Errors
/// What the kernel said, `Unsupported` on a file system without attributes.
pub fn list_attributes(file: impl AsFd) -> io::Result<Vec<OsString>> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the buffer is valid for the length that is passed with it.
    let names = read_growing(|buffer, room| unsafe { libc::flistxattr(fd, buffer.cast(), room) })?;
    let names = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    Ok(names
        .map(|name| OsStr::from_bytes(name).to_owned())
        .collect())
}

/// The value of one extended attribute of an open file.
///
/// # Errors
/// What the kernel said.
pub fn get_attribute(file: impl AsFd, name: &OsStr) -> io::Result<Vec<u8>> {
    let (fd, name) = (file.as_fd().as_raw_fd(), CString::new(name.as_bytes())?);
    // SAFETY: `name` is a C string; the buffer is valid for the length passed with it.
    read_growing(|buffer, room| unsafe { libc::fgetxattr(fd, name.as_ptr(), buffer.cast(), room) })
}

/// Sets one extended attribute of an open file.
///
/// # Errors
/// What the kernel said.
pub fn set_attribute(file: impl AsFd, name: &OsStr, value: &[u8]) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: `name` is a C string, `value` is valid for its length.
    check(unsafe {
        libc::fsetxattr(
            file.as_fd().as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
}

/// Removes one extended attribute of an open file.
///
/// # Errors
/// What the kernel said.
pub fn remove_attribute(file: impl AsFd, name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: `name` is a C string.
    check(unsafe { libc::fremovexattr(file.as_fd().as_raw_fd(), name.as_ptr()) })
}

/// Asks a call for its size, then for its content, until both agree.
fn read_growing(call: impl Fn(*mut u8, usize) -> isize) -> io::Result<Vec<u8>> {
    loop {
        let size = call(std::ptr::null_mut(), 0);
        let size = usize::try_from(size).map_err(|_| io::Error::last_os_error())?;
        let mut buffer = vec![0; size];
        let filled = call(buffer.as_mut_ptr(), size);
        match usize::try_from(filled) {
            Ok(filled) => {
                buffer.truncate(filled);
                return Ok(buffer);
            }
            // It grew between the two calls.
            Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::ERANGE) => {}
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
}
