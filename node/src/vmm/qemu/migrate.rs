//! Writing and taking in a device state: QEMU's migration, to and from a file that we open.
//!
//! ```text
//! save   stop > capability > getfd > migrate          > completed | failed | cancelled
//! load          capability > getfd > migrate-incoming > completed | (QEMU ends)
//! ```
//!
//! The capability `x-ignore-shared` leaves the guest's memory out: it is a shared mapping of
//! somebody else's memfd. What remains is a few hundred KiB, written in milliseconds.
//!
//! `stop` drains and flushes the disk without saying whether that worked; the end of `migrate`
//! flushes once more and fails if it cannot. A completed save has also *inactivated* the disk:
//! QEMU has written back every cache, given up its lock on the file, and does not write to it
//! until `cont` activates it again, which reads the image's tables anew.
//!
//! A migration that was begun and given up must not be left behind: it would stop the guest again
//! in the middle of its next run. So a failed save is called off ([`settle`]), and so is, before
//! any `cont`, whatever an earlier save that could not be called off has left.
//!
//! QEMU reports an incoming state that it cannot read on its standard error, and exits.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::vmm::error::MoveStateError;
use crate::vmm::process::rest;
use crate::vmm::qemu::qmp::{Qmp, QmpError};

/// What leaves the guest's memory out of the state.
const DEVICES_ONLY: &str = "x-ignore-shared";
/// The name under which QEMU keeps the file for us.
const FD_NAME: &str = "state";
/// Pause between two looks at a migration, at first. Most are over in 20 ms.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// How long a migration that is given up may take to end. Beyond its deadline, so that a save
/// that ran out of time is still called off.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a migration stands.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    /// None was begun, or it has been forgotten.
    None,
    UnderWay,
    Completed,
    /// Failed or cancelled, and why.
    Failed(String),
}

/// Stops the guest and writes its device state to `file`. See [`crate::vmm::Vmm::save_state`].
pub(super) fn save(
    qmp: &Qmp,
    file: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<(), MoveStateError> {
    qmp.execute("stop", json!({}), deadline)?;
    let sent = transfer(qmp, "migrate", file, deadline);
    if sent.is_err() {
        // One that cannot be called off now is called off before the guest goes on.
        let _tried = settle(qmp, Instant::now() + SETTLE_TIMEOUT);
    }
    sent
}

/// Takes in the device state in `file`. See [`crate::vmm::Vmm::load_state`].
pub(super) fn load(
    qmp: &Qmp,
    file: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<(), MoveStateError> {
    transfer(qmp, "migrate-incoming", file, deadline)
}

/// Makes sure that no migration is under way: calls off what is, and waits for its end.
pub(super) fn settle(qmp: &Qmp, deadline: Instant) -> Result<(), QmpError> {
    const COMMAND: &str = "migrate_cancel";
    let started = Instant::now();
    let mut told = false;
    let mut pause = FIRST_PAUSE;
    while standing(qmp, deadline)? == Standing::UnderWay {
        if !told {
            qmp.execute(COMMAND, json!({}), deadline)?;
            told = true;
        }
        if !rest(&mut pause, deadline) {
            return Err(QmpError::TimedOut {
                command: COMMAND,
                waited: started.elapsed(),
            });
        }
    }
    Ok(())
}

fn transfer(
    qmp: &Qmp,
    command: &'static str,
    file: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<(), MoveStateError> {
    let capability = json!({ "capability": DEVICES_ONLY, "state": true });
    let capabilities = json!({ "capabilities": [capability] });
    qmp.execute("migrate-set-capabilities", capabilities, deadline)?;
    qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), file, deadline)?;
    let uri = format!("fd:{FD_NAME}");
    qmp.execute(command, json!({ "uri": uri }), deadline)?;
    await_end(qmp, deadline)
}

fn await_end(qmp: &Qmp, deadline: Instant) -> Result<(), MoveStateError> {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        match standing(qmp, deadline)? {
            Standing::Completed => return Ok(()),
            Standing::Failed(reason) => return Err(MoveStateError::GaveUp { reason }),
            // An incoming one is begun a moment after the command has returned.
            Standing::None | Standing::UnderWay => {}
        }
        if !rest(&mut pause, deadline) {
            return Err(MoveStateError::TimedOut {
                waited: started.elapsed(),
            });
        }
    }
}

/// A migration says that it is over a moment before it has put the guest into the state in which it
/// leaves it; until then QEMU refuses `cont`.
fn standing(qmp: &Qmp, deadline: Instant) -> Result<Standing, QmpError> {
    let told = qmp.execute("query-migrate", json!({}), deadline)?;
    let standing = standing_in(&told);
    if matches!(standing, Standing::Completed | Standing::Failed(_)) {
        let told = qmp.execute("query-status", json!({}), deadline)?;
        if told["status"] == "finish-migrate" {
            return Ok(Standing::UnderWay);
        }
    }
    Ok(standing)
}

fn standing_in(told: &Value) -> Standing {
    match told["status"].as_str() {
        None | Some("none") => Standing::None,
        Some("completed") => Standing::Completed,
        Some(ended @ ("failed" | "cancelled")) => {
            let reason = told["error-desc"].as_str().unwrap_or(ended);
            Standing::Failed(reason.to_owned())
        }
        Some(_) => Standing::UnderWay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_that_is_not_an_end_is_under_way() {
        for status in ["setup", "active", "device", "cancelling", "pre-switchover"] {
            let told = json!({ "status": status });
            assert_eq!(standing_in(&told), Standing::UnderWay, "{status}");
        }
        assert_eq!(standing_in(&json!({})), Standing::None);
        let completed = json!({ "status": "completed" });
        assert_eq!(standing_in(&completed), Standing::Completed);
    }

    #[test]
    fn a_failure_comes_in_qemus_words_where_it_has_some() {
        let told = json!({ "status": "failed", "error-desc": "disk full" });
        assert_eq!(standing_in(&told), Standing::Failed("disk full".into()));
        let told = json!({ "status": "cancelled" });
        assert_eq!(standing_in(&told), Standing::Failed("cancelled".into()));
    }
}
