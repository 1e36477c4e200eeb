//! Starting QEMU: sockets, the jail around the child, and the handshake that shows it lives.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::vmm::child::{not_up, open_netns, take_stderr};
use crate::vmm::jail::Jail;
use crate::vmm::process::VmmProcess;
use crate::vmm::qemu::Qemu;
use crate::vmm::qemu::args::{Inherited, Origin, arguments};
use crate::vmm::qemu::machine;
use crate::vmm::qemu::qmp::Qmp;
use crate::vmm::{Hardware, SpawnVmmError, Started, VmmSpec};

/// Starts QEMU for `spec` and shakes hands: to boot its kernel, or to wait for the state of a
/// guest that was saved on `saved_on`. See [`crate::vmm::spawn`] and
/// [`crate::vmm::spawn_incoming`].
///
/// # Errors
/// See [`SpawnVmmError`]. Nothing is left running.
pub fn spawn(
    spec: &VmmSpec,
    saved_on: Option<&Hardware>,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    let start_failed = |source: io::Error| SpawnVmmError::Start {
        program: spec.program.clone(),
        source,
    };
    let (qmp, qmp_theirs) = UnixStream::pair().map_err(start_failed)?;
    let (console, console_theirs) = UnixStream::pair().map_err(start_failed)?;
    let fds = Inherited {
        ram: ram.as_raw_fd(),
        qmp: qmp_theirs.as_raw_fd(),
        console: console_theirs.as_raw_fd(),
    };
    let origin = saved_on.map_or(Origin::Boot, Origin::Saved);
    let args = arguments(spec, origin, name, fds).map_err(SpawnVmmError::Spec)?;
    let hardware = saved_on.cloned();
    let hardware = hardware.unwrap_or_else(|| machine::of_new_guests(spec.accelerator));
    let jail = Jail::new(
        open_netns(spec)?,
        &[ram, qmp_theirs.as_fd(), console_theirs.as_fd()],
    );
    let jail = spec.confinement.apply(jail, spec, None, None)?;
    let mut command = Command::new(&spec.program);
    command
        .args(args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let spawned = Instant::now();
    let (mut child, group) = jail.start(&mut command).map_err(start_failed)?;
    // From here on QEMU alone holds its ends: when it dies, ours see the end of the stream.
    drop((qmp_theirs, console_theirs));
    let stderr = take_stderr(&mut child).map_err(start_failed)?;
    let process = VmmProcess::new(child, group).map_err(start_failed)?;
    match Qmp::connect(qmp, deadline) {
        Ok(qmp) => Ok(Started {
            vmm: Box::new(Qemu {
                process,
                qmp,
                hardware,
            }),
            console,
            stderr,
            took: spawned.elapsed(),
        }),
        Err(source) => Err(not_up(spec, &process, stderr, source.into())),
    }
}
