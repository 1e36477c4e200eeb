//! What starting a VMM takes, whichever it is.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStderr};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::vmm::error::TalkError;
use crate::vmm::process::VmmProcess;
use crate::vmm::{SpawnVmmError, VmmSpec};

/// How much of a failed VMM's complaint is repeated in the error.
const COMPLAINT_BYTES: usize = 2048;

/// The namespace that `spec` wants its VMM in.
///
/// # Errors
/// [`SpawnVmmError::Netns`].
pub fn open_netns(spec: &VmmSpec) -> Result<Option<OwnedFd>, SpawnVmmError> {
    let Some(network) = &spec.network else {
        return Ok(None);
    };
    let opened = File::open(&network.netns).map_err(|source| SpawnVmmError::Netns {
        path: network.netns.clone(),
        source,
    })?;
    Ok(Some(opened.into()))
}

/// The standard error of `child`, which was piped.
///
/// # Errors
/// It was not.
pub fn take_stderr(child: &mut Child) -> io::Result<ChildStderr> {
    child
        .stderr
        .take()
        .ok_or_else(|| io::Error::other("the child has no standard error"))
}

/// Ends what is left of a VMM that did not come up, and asks it why.
pub fn not_up(
    spec: &VmmSpec,
    process: &VmmProcess,
    mut stderr: ChildStderr,
    source: TalkError,
) -> SpawnVmmError {
    // Its end is what matters; `process` reaps when dropped even if the signal fails.
    let _killed = process.kill();
    // Never waits: what a process wrote before it died is in the pipe already.
    let complaint = match fcntl(&stderr, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)) {
        Ok(_) => tail(&mut stderr),
        Err(_) => String::new(),
    };
    SpawnVmmError::NotUp {
        program: spec.program.clone(),
        complaint: if complaint.is_empty() {
            "it gave no reason".to_owned()
        } else {
            complaint
        },
        source,
    }
}

fn tail(stderr: &mut ChildStderr) -> String {
    let mut text = Vec::new();
    // Ends at the first read that would wait; what came before it is kept.
    let _would_block = stderr.read_to_end(&mut text);
    let from = text.len().saturating_sub(COMPLAINT_BYTES);
    String::from_utf8_lossy(&text[from..]).trim().to_owned()
}
