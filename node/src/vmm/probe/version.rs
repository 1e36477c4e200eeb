//! Asking a hypervisor for its version, for a limited time: a node waits for it at its start, and a
//! program that hangs must not keep the node from saying so.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::vmm::jail::pidfd_open;
use crate::vmm::process::poll_timeout;

/// Longest a hypervisor may take to tell its version; some 50 ms are usual, and a busy host with cold
/// disks needs a second or two.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of what it says is kept. A version is one line, and QEMU adds one of copyright.
const MAX_VERSION_BYTES: usize = 4096;

/// Asks `program` for its version, for 10 s at most. Returns how it ended, and its first line.
///
/// # Errors
/// It cannot be started, or did not answer ([`io::ErrorKind::TimedOut`]) and was killed.
pub fn ask_version(program: &Path) -> io::Result<(ExitStatus, String)> {
    ask_version_within(program, VERSION_TIMEOUT)
}

fn ask_version_within(program: &Path, at_most: Duration) -> io::Result<(ExitStatus, String)> {
    let deadline = Instant::now() + at_most;
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // A script is killed with what it has started.
        .process_group(0)
        .spawn()?;
    let answered = hear(&mut child, deadline);
    if answered.is_err() {
        let group = i32::try_from(child.id()).map(Pid::from_raw);
        let _gone_already = group.map(|group| killpg(group, Signal::SIGKILL));
    }
    let status = child.wait()?;
    let text = answered.map_err(|err| match err.kind() {
        io::ErrorKind::TimedOut => {
            let reason = format!("it did not answer --version within {at_most:?}");
            io::Error::new(io::ErrorKind::TimedOut, reason)
        }
        _ => err,
    })?;
    let text = String::from_utf8_lossy(&text);
    Ok((status, text.lines().next().unwrap_or_default().to_owned()))
}

/// The beginning of what `child` says until it has ended.
fn hear(child: &mut Child, deadline: Instant) -> io::Result<Vec<u8>> {
    let ended = pidfd_open(child.id())?;
    let mut out = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut said = Vec::new();
    loop {
        await_readable(out.as_fd(), deadline)?;
        let mut bytes = [0; 1024];
        match out.read(&mut bytes)? {
            0 => break,
            count if said.len() < MAX_VERSION_BYTES => said.extend_from_slice(&bytes[..count]),
            _ => {}
        }
    }
    await_readable(ended.as_fd(), deadline)?;
    Ok(said)
}

fn await_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut ready, poll_timeout(left)) {
            Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    /// A program that does what `script` says. Another process writes it: what a thread of ours has
    /// open for writing cannot be run while a fork of another thread still has it.
    fn program(dir: &Path, script: &str) -> PathBuf {
        let (text, path) = (dir.join("text"), dir.join("program"));
        fs::write(&text, format!("#!/bin/sh\n{script}\n")).expect("written");
        let mut install = Command::new("install");
        install.args(["-m", "755"]).args([&text, &path]);
        assert!(install.status().expect("install runs").success());
        path
    }

    #[test]
    fn the_first_line_is_the_version_however_much_follows() {
        let dir = tempfile::tempdir().expect("tempdir");
        let script = "echo v53.0; head -c 200000 /dev/zero; exit 3";
        let (status, line) = ask_version(&program(dir.path(), script)).expect("it answers");
        assert_eq!((status.code(), line.as_str()), (Some(3), "v53.0"));
    }

    /// A node's start waits for it.
    #[test]
    fn a_program_that_does_not_tell_its_version_is_killed() {
        let dir = tempfile::tempdir().expect("tempdir");
        // One holds its output, one has closed it.
        for script in ["echo v53.0; sleep 1000", "exec >&-; sleep 1000"] {
            let began = Instant::now();
            let asked = ask_version_within(&program(dir.path(), script), Duration::from_millis(50));
            let err = asked.expect_err("it hangs");
            assert_eq!(err.kind(), io::ErrorKind::TimedOut);
            assert!(err.to_string().contains("did not answer"), "{err}");
            assert!(began.elapsed() < Duration::from_secs(10), "{script}");
        }
    }
}
