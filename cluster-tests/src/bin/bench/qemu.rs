//! What QEMU alone takes from its start to its first answer: the command line of a running
//! capsule's QEMU, started again without shim, daemon or jail.
//!
//! The same as there: every argument, an overlay of the same template, memory in a memfd, a tap in
//! a network namespace, sockets handed over as descriptors, the handshake of our own client. Not
//! the same: the guest is not let run (`-S`), so it takes no processor from its own QEMU, and
//! the tap is made by QEMU in a fresh namespace rather than attached to. The first makes QEMU
//! look faster than it is in a create, and so our share larger; the second costs it well below
//! a millisecond.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use node::vmm::qemu::qmp::Qmp;
use tempfile::TempDir;

use crate::{Outcome, process};

/// Longest QEMU may take to answer; far above what it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How the arguments name an inherited socket and the inherited memory.
const SOCKET: &str = ",fd=";
const MEMORY: &str = "/proc/self/fd/";
/// The root disk's name in a sandbox's directory.
const OVERLAY: &str = "root.qcow2";

/// A QEMU command line that can be started again and again.
#[derive(Debug)]
pub(crate) struct Alone {
    program: String,
    arguments: Vec<String>,
    memory_mib: i64,
    /// Where the sandbox's files lay, as the arguments name it.
    sandbox: String,
    /// Holds an overlay; each start has a copy of its own, since QEMU locks it.
    dir: TempDir,
}

impl Alone {
    /// Takes the command line of the QEMU `pid`, whose sandbox's files lie in `sandbox`.
    pub(crate) fn like(pid: u32, sandbox: &Path, memory_mib: u32) -> Outcome<Self> {
        let dir = temp_dir()?;
        fs::copy(sandbox.join(OVERLAY), dir.path().join(OVERLAY))?;
        let said = process::arguments(pid)?;
        let (program, arguments) = said.split_first().ok_or("QEMU has no arguments")?;
        let mut arguments = arguments.to_vec();
        arguments.push("-S".into());
        Ok(Self {
            program: program.clone(),
            arguments,
            memory_mib: memory_mib.into(),
            sandbox: sandbox.to_string_lossy().into_owned(),
            dir,
        })
    }

    /// Starts it and waits for its answer, then ends it.
    pub(crate) fn time(&self) -> Outcome<Duration> {
        // A thread of its own: only it enters the new namespace, which goes with it.
        let timed = thread::scope(|scope| {
            let timing = scope.spawn(|| self.time_here().map_err(|err| err.to_string()));
            timing.join()
        });
        Ok(timed.map_err(|_| "the timing broke")??)
    }

    fn time_here(&self) -> Outcome<Duration> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let dir = temp_dir()?;
        fs::copy(self.dir.path().join(OVERLAY), dir.path().join(OVERLAY))?;
        let place = dir.path().to_string_lossy();
        // Made without close-on-exec: QEMU inherits it.
        let memory = memfd_create(c"bench", MFdFlags::empty())?;
        ftruncate(&memory, self.memory_mib << 20)?;
        let (qmp, qmp_theirs) = inheritable_pair()?;
        let (_console, console_theirs) = inheritable_pair()?;
        let arguments = self.arguments.iter();
        let arguments = arguments.map(|argument| argument.replace(&self.sandbox, &place));
        let arguments: Vec<_> = arguments.collect();
        let arguments = with_numbers(&arguments, &qmp_theirs, &console_theirs, &memory);
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let start = Instant::now();
        let child = Ended::of(command.spawn()?);
        drop((qmp_theirs, console_theirs));
        Qmp::connect(qmp, start + PATIENCE)?;
        let took = start.elapsed();
        drop(child);
        Ok(took)
    }
}

fn temp_dir() -> std::io::Result<TempDir> {
    tempfile::Builder::new().prefix("wrenn-bench-").tempdir()
}

/// A child that does not outlive its measurement.
pub(crate) struct Ended(Child);

impl Ended {
    /// Ends `child` when it is dropped.
    pub(crate) fn of(child: Child) -> Self {
        Self(child)
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself; what matters is that it is reaped.
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Two ends of a stream; the second one is inherited.
pub(crate) fn inheritable_pair() -> Outcome<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok((ours, theirs.into()))
}

/// QEMU's arguments with the descriptors they inherit this time.
pub(crate) fn with_numbers(
    arguments: &[String],
    qmp: &OwnedFd,
    console: &OwnedFd,
    memory: &OwnedFd,
) -> Vec<String> {
    let numbered = arguments.iter().map(|argument| {
        let socket = if argument.contains("id=qmp") {
            qmp
        } else {
            console
        };
        with_number(&with_number(argument, SOCKET, socket), MEMORY, memory)
    });
    numbered.collect()
}

/// `argument` with the number behind `before` replaced by that of `fd`.
fn with_number(argument: &str, before: &str, fd: &OwnedFd) -> String {
    let Some((head, tail)) = argument.split_once(before) else {
        return argument.to_owned();
    };
    let rest = tail.trim_start_matches(|c: char| c.is_ascii_digit());
    format!("{head}{before}{}{rest}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_descriptor_of_an_argument_changes() {
        let fd: OwnedFd = memfd_create(c"test", MFdFlags::empty()).unwrap();
        let number = fd.as_raw_fd();
        let changed = with_number("socket,id=qmp,fd=171", SOCKET, &fd);
        assert_eq!(changed, format!("socket,id=qmp,fd={number}"));
        let changed = with_number("size=9M,mem-path=/proc/self/fd/17,share=on", MEMORY, &fd);
        assert_eq!(
            changed,
            format!("size=9M,mem-path=/proc/self/fd/{number},share=on")
        );
        assert_eq!(with_number("-nodefaults", SOCKET, &fd), "-nodefaults");
    }
}
