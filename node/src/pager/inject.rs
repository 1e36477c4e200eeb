//! Making a userfaultfd inside another process, from outside.
//!
//! A userfaultfd serves the address space of the process that makes it, and no VMM we start makes
//! one for us. So one of the VMM's threads is stopped with ptrace, made to run the system call, and
//! put back as it was: registers, signal mask, and the system call it may have been waiting in,
//! which the kernel starts again. Nothing of the process's code or data is changed; the call is
//! made from a `syscall` instruction that it has anyway (its vDSO's).
//!
//! ```text
//! seize > interrupt > stopped > [ save > mask signals > call, once or thrice > restore ] > let go
//! ```
//!
//! The plain call needs `CAP_SYS_PTRACE` in the *caller*, which a jailed VMM no longer has. The
//! kernel's other door is `/dev/userfaultfd`, guarded by its file mode: open, one ioctl, close. The
//! name is written below the thread's stack, where any signal would write as well.
//!
//! A tracer that is killed lets go of the thread (we ask for no `EXITKILL`). Outside the brackets
//! that leaves the VMM as it was. Inside them, for some tenth of a millisecond, it leaves a thread
//! with foreign registers and every signal blocked, which must not run on: whoever started the
//! injection is told before the brackets open ([`userfaultfd`]'s `about_to_change`), and kills a
//! VMM whose injector died within. At that time no guest has run in it, so nothing is lost.

use std::fs::{self, File};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

/// How long a stop is waited for before the first nap, and between naps. A thread that waits in a
/// system call stops within some 20 µs.
const NAP: Duration = Duration::from_micros(50);
/// How long past its deadline a thread that runs a call of ours is still waited for: letting go of
/// it then would tear it.
const GRACE: Duration = Duration::from_secs(5);
/// The kernel's other door.
const DEVICE: &[u8] = b"/dev/userfaultfd\0";
/// Where the name of the door is written: below the stack pointer and the 128 bytes under it that
/// compiled code may use.
const BELOW_STACK: u64 = 1024;
/// The largest piece of code that is searched for a system call instruction.
const MAX_CODE_BYTES: u64 = 4 << 20;
/// `syscall`.
const INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// Why no userfaultfd could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// The process has ended.
    #[error("the VMM has ended")]
    Gone,
    /// It cannot be looked into.
    #[error("read the VMM's {what}")]
    Read {
        /// What of it.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It has no system call instruction where we look.
    #[error("find a system call instruction in the VMM")]
    NoInstruction,
    /// The kernel did not let us trace it.
    #[error("{doing} the VMM's thread")]
    Trace {
        /// Which step.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It did not stop. It goes on as it was.
    #[error("the VMM's thread did not stop in time")]
    Stalled,
    /// It may not make one. It goes on as it was.
    #[error("run {call} in the VMM")]
    Refused {
        /// Which call.
        call: &'static str,
        /// What the kernel said to it.
        source: io::Error,
    },
    /// It could not be put back: it must be killed.
    #[error("the VMM's thread was lost in the middle of a call")]
    Torn,
    /// Nobody has written this for the processor.
    #[error("injection is not there for this processor")]
    Unsupported,
}

fn of(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno as i32)
}

/// Makes a userfaultfd in process `pid` and returns its number there. It does not block, and is
/// closed by `exec`. `about_to_change` is called once, right before the first register is changed.
///
/// # Errors
/// See [`InjectError`]. Unless it says otherwise the process goes on as before.
#[cfg(target_arch = "x86_64")]
pub fn userfaultfd(
    pid: u32,
    about_to_change: impl FnOnce() + Send,
    deadline: Instant,
) -> Result<RawFd, InjectError> {
    // On a thread of its own: whatever goes wrong, its end lets go of what it traces.
    thread::scope(|scope| {
        thread::Builder::new()
            .name("inject".to_owned())
            .spawn_scoped(scope, || on_this_thread(pid, about_to_change, deadline))
            .map_err(|source| InjectError::Trace {
                doing: "start a thread to trace",
                source,
            })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(target_arch = "x86_64")]
fn on_this_thread(
    pid: u32,
    about_to_change: impl FnOnce(),
    deadline: Instant,
) -> Result<RawFd, InjectError> {
    let instruction = find_instruction(pid)?;
    let thread = Seized::seize(pid)?;
    thread.interrupt(deadline)?;
    let registers = thread.registers()?;
    let mask = thread.signal_mask()?;
    about_to_change();
    let borrowed = Borrowed {
        thread: &thread,
        registers,
        mask,
        instruction,
        deadline,
    };
    let made = borrowed
        .mask_signals()
        .and_then(|()| borrowed.make_userfaultfd());
    borrowed.give_back()?;
    thread.let_go()?;
    made
}

/// As on x86-64, where it is written.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn userfaultfd(
    _pid: u32,
    _about_to_change: impl FnOnce() + Send,
    _deadline: Instant,
) -> Result<RawFd, InjectError> {
    Err(InjectError::Unsupported)
}

/// The address of a `syscall` instruction in executable memory of `pid`: the vDSO has one, and so
/// has whatever C library the process runs on.
fn find_instruction(pid: u32) -> Result<u64, InjectError> {
    let read = |what| {
        move |source: io::Error| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => InjectError::Gone,
            _ => InjectError::Read { what, source },
        }
    };
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(read("mappings"))?;
    if maps.is_empty() {
        // It has ended, and nobody has asked yet how.
        return Err(InjectError::Gone);
    }
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(read("memory"))?;
    let mut code: Vec<(bool, u64, u64)> = maps.lines().filter_map(executable).collect();
    code.sort_by_key(|&(vdso, ..)| !vdso);
    code.iter()
        .find_map(|&(_, start, bytes)| {
            let length = usize::try_from(bytes.min(MAX_CODE_BYTES)).ok()?;
            let mut text = vec![0; length];
            memory.read_exact_at(&mut text, start).ok()?;
            let at = text
                .windows(INSTRUCTION.len())
                .position(|pair| pair == INSTRUCTION)?;
            Some(start + at as u64)
        })
        .ok_or(InjectError::NoInstruction)
}

/// Whether it is the vDSO, where it begins and how long it is, if `line` is of executable memory.
fn executable(line: &str) -> Option<(bool, u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let runs = words.next()?.contains('x') && !line.ends_with("[vsyscall]");
    runs.then_some((line.ends_with("[vdso]"), start, end.checked_sub(start)?))
}

/// What a thread has stopped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Because we asked, or with its whole process.
    Asked,
    /// On its way into a system call, or out of one.
    Call,
    /// Before a signal is delivered to it.
    Signal(i32),
}

/// A thread that we trace.
#[cfg(target_arch = "x86_64")]
struct Seized {
    tid: nix::unistd::Pid,
}

#[cfg(target_arch = "x86_64")]
impl Seized {
    fn seize(pid: u32) -> Result<Self, InjectError> {
        let tid = i32::try_from(pid).map_err(|_| InjectError::Gone)?;
        let tid = nix::unistd::Pid::from_raw(tid);
        let options = nix::sys::ptrace::Options::PTRACE_O_TRACESYSGOOD;
        nix::sys::ptrace::seize(tid, options).map_err(tracing("seize"))?;
        Ok(Self { tid })
    }

    /// Stops it at a place from which the kernel restarts an interrupted system call.
    fn interrupt(&self, deadline: Instant) -> Result<(), InjectError> {
        nix::sys::ptrace::interrupt(self.tid).map_err(tracing("interrupt"))?;
        loop {
            match self.wait(deadline)? {
                Stop::Asked => return Ok(()),
                Stop::Call => self.go_on(libc::PTRACE_CONT, 0)?,
                // Its own business: it is stopped again before it runs on.
                Stop::Signal(number) => self.go_on(libc::PTRACE_CONT, number)?,
            }
        }
    }

    /// Waits until it stops. It is not our child: nothing tells us but asking.
    fn wait(&self, deadline: Instant) -> Result<Stop, InjectError> {
        loop {
            let mut status = 0;
            // SAFETY: `status` is ours for the call. Only this thread is asked about.
            let seen = unsafe {
                let flags = libc::WNOHANG | libc::__WALL;
                libc::waitpid(self.tid.as_raw(), &raw mut status, flags)
            };
            match Errno::result(seen) {
                Ok(0) if Instant::now() >= deadline => return Err(InjectError::Stalled),
                Ok(0) => thread::sleep(NAP),
                Ok(_) if !libc::WIFSTOPPED(status) => return Err(InjectError::Gone),
                Ok(_) => return Ok(stop_of(status)),
                Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return Err(InjectError::Gone),
                Err(errno) => return Err(tracing("wait for")(errno)),
            }
        }
    }

    fn go_on(&self, how: libc::c_uint, signal: i32) -> Result<(), InjectError> {
        self.request(how, 0, signal.unsigned_abs() as usize as *mut libc::c_void)
            .map_err(tracing("continue"))
    }

    fn registers(&self) -> Result<libc::user_regs_struct, InjectError> {
        nix::sys::ptrace::getregs(self.tid).map_err(tracing("read the registers of"))
    }

    fn set_registers(&self, registers: libc::user_regs_struct) -> Result<(), InjectError> {
        nix::sys::ptrace::setregs(self.tid, registers).map_err(tracing("set the registers of"))
    }

    fn signal_mask(&self) -> Result<u64, InjectError> {
        let mut mask = 0_u64;
        let into = (&raw mut mask).cast();
        self.request(libc::PTRACE_GETSIGMASK, size_of::<u64>(), into)
            .map_err(tracing("read the signal mask of"))?;
        Ok(mask)
    }

    fn set_signal_mask(&self, mut mask: u64) -> Result<(), InjectError> {
        let from = (&raw mut mask).cast();
        self.request(libc::PTRACE_SETSIGMASK, size_of::<u64>(), from)
            .map_err(tracing("set the signal mask of"))
    }

    fn let_go(&self) -> Result<(), InjectError> {
        nix::sys::ptrace::detach(self.tid, None).map_err(tracing("let go of"))
    }

    fn request(
        &self,
        what: libc::c_uint,
        size: usize,
        data: *mut libc::c_void,
    ) -> Result<(), Errno> {
        let size = size as *mut libc::c_void;
        // SAFETY: for the requests used here the kernel takes `data` as a number, or reads or
        // writes eight bytes at it, which the caller owns; `size` is a number.
        let done = unsafe { libc::ptrace(what, self.tid.as_raw(), size, data) };
        Errno::result(done).map(drop)
    }
}

fn tracing(doing: &'static str) -> impl Fn(Errno) -> InjectError {
    move |errno| match errno {
        Errno::ESRCH => InjectError::Gone,
        errno => InjectError::Trace {
            doing,
            source: of(errno),
        },
    }
}

/// What the status of a stopped thread means.
fn stop_of(status: i32) -> Stop {
    let event = status >> 16;
    let signal = libc::WSTOPSIG(status);
    match (event, signal) {
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Call,
        (0, signal) => Stop::Signal(signal),
        _ => Stop::Asked,
    }
}

/// A stopped thread whose registers are ours until they are given back.
#[cfg(target_arch = "x86_64")]
struct Borrowed<'a> {
    thread: &'a Seized,
    registers: libc::user_regs_struct,
    mask: u64,
    instruction: u64,
    deadline: Instant,
}

#[cfg(target_arch = "x86_64")]
impl Borrowed<'_> {
    /// A handler that ran in between would run on our registers. What is sent waits; what cannot
    /// be masked (a stop, the end) touches no register.
    fn mask_signals(&self) -> Result<(), InjectError> {
        self.thread.set_signal_mask(u64::MAX)
    }

    fn make_userfaultfd(&self) -> Result<RawFd, InjectError> {
        let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs());
        let number = libc::SYS_userfaultfd;
        let made = match self.call("userfaultfd", number, [flags, 0, 0]) {
            Err(InjectError::Refused { source, .. })
                if source.raw_os_error() == Some(libc::EPERM) =>
            {
                self.through_device(flags)
            }
            other => other,
        }?;
        RawFd::try_from(made).map_err(|_| InjectError::Torn)
    }

    fn through_device(&self, flags: u64) -> Result<u64, InjectError> {
        let name_at = self.registers.rsp.wrapping_sub(BELOW_STACK) & !15;
        let write = |source| InjectError::Read {
            what: "stack",
            source,
        };
        let path = format!("/proc/{}/mem", self.thread.tid);
        let memory = File::options().write(true).open(path).map_err(write)?;
        memory.write_all_at(DEVICE, name_at).map_err(write)?;
        let here = u64::from(libc::AT_FDCWD.cast_unsigned());
        let access = u64::from((libc::O_RDWR | libc::O_CLOEXEC).unsigned_abs());
        let device = self.call(
            "openat /dev/userfaultfd",
            libc::SYS_openat,
            [here, name_at, access],
        )?;
        let new = crate::pager::uffd::sys::DEVICE_NEW;
        let made = self.call(
            "ioctl /dev/userfaultfd",
            libc::SYS_ioctl,
            [device, new, flags],
        );
        // Only a wrong number could make this fail.
        let _closed = self.call("close", libc::SYS_close, [device, 0, 0]);
        made
    }

    /// Runs one system call in the thread and leaves it stopped at the call's end.
    fn call(
        &self,
        name: &'static str,
        number: libc::c_long,
        args: [u64; 3],
    ) -> Result<u64, InjectError> {
        let number = u64::try_from(number).map_err(|_| InjectError::Unsupported)?;
        let mut registers = self.registers;
        registers.rip = self.instruction;
        registers.rax = number;
        // Not in a system call: nothing is to be restarted before ours.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = args;
        (registers.r10, registers.r8, registers.r9) = (0, 0, 0);
        self.thread.set_registers(registers)?;
        self.on_to_next_stop()?;
        let entered = self.thread.registers()?;
        if entered.orig_rax != number || entered.rip != self.instruction + 2 {
            return Err(InjectError::Torn);
        }
        self.on_to_next_stop()?;
        let returned = self.thread.registers()?.rax.cast_signed();
        u64::try_from(returned).map_err(|_| {
            let errno = i32::try_from(returned.unsigned_abs()).unwrap_or(libc::EINVAL);
            InjectError::Refused {
                call: name,
                source: io::Error::from_raw_os_error(errno),
            }
        })
    }

    fn on_to_next_stop(&self) -> Result<(), InjectError> {
        let mut pass_on = 0;
        loop {
            self.thread.go_on(libc::PTRACE_SYSCALL, pass_on)?;
            match self.thread.wait(self.deadline + GRACE) {
                Ok(Stop::Call) => return Ok(()),
                // A stop of the whole process is no end of the call. Any other signal that cannot
                // be masked is a filter's: without it the call fails like any other.
                Ok(Stop::Asked) => pass_on = 0,
                Ok(Stop::Signal(signal)) => pass_on = only_stop(signal),
                Err(InjectError::Stalled) => return Err(InjectError::Torn),
                Err(err) => return Err(err),
            }
        }
    }

    /// Puts back registers and signal mask, at a stop from which an interrupted call restarts.
    fn give_back(self) -> Result<(), InjectError> {
        let back = || {
            self.thread.interrupt_again(self.deadline + GRACE)?;
            self.thread.set_registers(self.registers)?;
            self.thread.set_signal_mask(self.mask)
        };
        back().map_err(|err| match err {
            InjectError::Gone => InjectError::Gone,
            _ => InjectError::Torn,
        })
    }
}

#[cfg(target_arch = "x86_64")]
impl Seized {
    /// From one stop to the next, with no instruction of the thread's own in between. A thread
    /// that stands at the end of a call would not have its earlier one restarted from there.
    fn interrupt_again(&self, deadline: Instant) -> Result<(), InjectError> {
        nix::sys::ptrace::interrupt(self.tid).map_err(tracing("interrupt"))?;
        self.go_on(libc::PTRACE_CONT, 0)?;
        loop {
            match self.wait(deadline)? {
                Stop::Asked => return Ok(()),
                Stop::Call => self.go_on(libc::PTRACE_CONT, 0)?,
                Stop::Signal(signal) => self.go_on(libc::PTRACE_CONT, only_stop(signal))?,
            }
        }
    }
}

/// The one signal that a thread on our registers may get: one that stops its process touches none.
fn only_stop(signal: i32) -> i32 {
    if signal == libc::SIGSTOP { signal } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_told_apart() {
        let stopped = |event: i32, signal: i32| event << 16 | signal << 8 | 0x7f;
        assert_eq!(stop_of(stopped(0, libc::SIGTRAP | 0x80)), Stop::Call);
        assert_eq!(
            stop_of(stopped(0, libc::SIGUSR1)),
            Stop::Signal(libc::SIGUSR1)
        );
        assert_eq!(stop_of(stopped(128, libc::SIGTRAP)), Stop::Asked);
        assert_eq!(stop_of(stopped(128, libc::SIGSTOP)), Stop::Asked);
    }

    #[test]
    fn only_executable_memory_is_searched_and_never_the_page_outside_of_it() {
        let code = "7fff1000-7fff3000 r-xp 00000000 00:00 0 [vdso]";
        assert_eq!(executable(code), Some((true, 0x7fff_1000, 0x2000)));
        assert_eq!(executable("1000-2000 rw-p 00000000 00:00 0 [heap]"), None);
        let vsyscall = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(executable(vsyscall), None);
        assert_eq!(executable("garbage"), None);
    }

    #[test]
    fn this_very_process_has_an_instruction() {
        let found = find_instruction(std::process::id()).expect("found");
        let memory = File::open("/proc/self/mem").expect("open");
        let mut pair = [0; 2];
        memory.read_exact_at(&mut pair, found).expect("readable");
        assert_eq!(pair, INSTRUCTION);
    }
}
