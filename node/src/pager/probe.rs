//! Whether a pager can serve on this host, found out by trying.
//!
//! A child that waits is given a userfaultfd as a VMM would be ([`super::inject`]): that needs the
//! right to trace a process, to make such a descriptor, and to fetch it, and a kernel that serves
//! memfds with it. Each of them may be missing in a container or under a security module.
//!
//! The child has as few rights as a VMM in its jail, so that it needs the same door of the kernel. One
//! with the daemon's would be given a descriptor where a VMM is refused, and every resume would fail.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::prctl;

use crate::pager::dirty;
use crate::pager::main::{COMMAND, PROBE_OPTION};
use crate::pager::target::{AttachError, Target};
use crate::pager::uffd::Tracking;
use crate::pager::uffd::sys::{keep_capabilities, pidfd_open};

/// Longest the child may take to stop.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What the child says once it waits.
const WAITS: &[u8] = b"w";

/// Why no pager can serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No process could be made to try it on.
    #[error("start a process to try on")]
    Child(#[source] io::Error),
    /// It was refused.
    #[error("take over a process's page faults")]
    Attach(#[from] AttachError),
}

/// Tries it with a child of `wrenn`, our own executable. Returns how writes will be known.
///
/// # Errors
/// See [`ProbeError`].
pub fn probe(wrenn: impl AsRef<OsStr>) -> Result<Tracking, ProbeError> {
    let mut child = Waiting::start(wrenn.as_ref()).map_err(ProbeError::Child)?;
    child.await_it().map_err(ProbeError::Child)?;
    let pid = child.0.id();
    let pidfd = pidfd_open(pid).map_err(ProbeError::Child)?;
    let wanted = dirty::probe();
    Ok(Target::new(pid, pidfd).try_on(wanted, Instant::now() + TIMEOUT)?)
}

/// A child that waits to be let go.
struct Waiting(Child);

impl Waiting {
    fn start(wrenn: &OsStr) -> io::Result<Self> {
        Command::new(Path::new(wrenn))
            .arg(COMMAND)
            .arg(PROBE_OPTION)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map(Self)
    }

    fn await_it(&mut self) -> io::Result<()> {
        let out = self.0.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        out.read_exact(&mut [0; WAITS.len()])
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // One that was just traced may be in any state.
        let _gone_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// The child's half: gives up every right, and waits until whoever tries is done. Whoever has more
/// rights may still trace it.
pub(super) fn wait() -> io::Result<()> {
    keep_capabilities(0)?;
    prctl::set_no_new_privs()?;
    io::stdout().write_all(WAITS)?;
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}
