//! The QEMU driver: its arguments ([`args`]), the hardware they build ([`machine`]), its
//! management protocol ([`qmp`]), its start ([`spawn`]), its device state ([`state`]), and the
//! running process as a [`Vmm`].

pub mod args;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod machine;
mod migrate;
pub mod qmp;
pub mod spawn;
pub mod state;

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::vmm::process::VmmProcess;
use crate::vmm::qemu::qmp::{Qmp, QmpError};
use crate::vmm::{Hardware, Vmm, VmmError, VmmExit};

/// How long a dead QEMU's last events are looked for; they are in the socket already.
const LAST_EVENTS: Duration = Duration::from_millis(100);
/// How long a living QEMU's events are looked for: what has come is in the socket already.
const GLANCE: Duration = Duration::from_millis(2);

/// One running QEMU.
#[derive(Debug)]
pub struct Qemu {
    process: VmmProcess,
    qmp: Qmp,
    hardware: Hardware,
}

impl Qemu {
    fn tell(
        &self,
        verb: &'static str,
        command: &'static str,
        deadline: Instant,
    ) -> Result<(), VmmError> {
        self.qmp
            .execute(command, json!({}), deadline)
            .map(drop)
            .map_err(|source| told(verb, source))
    }
}

fn told(verb: &'static str, source: QmpError) -> VmmError {
    VmmError::Told {
        verb,
        source: source.into(),
    }
}

impl Vmm for Qemu {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn version(&self) -> &str {
        self.qmp.version()
    }

    fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    fn pause(&self, deadline: Instant) -> Result<(), VmmError> {
        self.tell("pause", "stop", deadline)
    }

    fn resume(&self, deadline: Instant) -> Result<(), VmmError> {
        let verb = "resume";
        migrate::settle(&self.qmp, deadline).map_err(|source| told(verb, source))?;
        self.tell(verb, "cont", deadline)
    }

    fn save_state(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), VmmError> {
        migrate::save(&self.qmp, file, deadline).map_err(VmmError::Save)
    }

    fn load_state(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), VmmError> {
        migrate::load(&self.qmp, file, deadline).map_err(VmmError::Load)
    }

    fn shutdown(&self, deadline: Instant) -> Result<(), VmmError> {
        self.tell("press the power button", "system_powerdown", deadline)
    }

    fn quit(&self, deadline: Instant) -> Result<(), VmmError> {
        match self.tell("quit", "quit", deadline) {
            // It may be gone before its answer has left.
            Err(VmmError::Told { source, .. }) if source.is_end() => Ok(()),
            told => told,
        }
    }

    fn freeze(&self) -> Result<(), VmmError> {
        self.process.freeze()
    }

    fn thaw(&self) -> Result<(), VmmError> {
        self.process.thaw()
    }

    fn kill(&self) -> Result<(), VmmError> {
        self.process.kill()
    }

    fn wait(&self, deadline: Instant) -> Result<Option<VmmExit>, VmmError> {
        let Some(mut exit) = self.process.wait(deadline)? else {
            // Events that nobody reads would pile up in QEMU's memory, and guests cause some.
            self.qmp.drain(Instant::now() + GLANCE);
            return Ok(None);
        };
        if exit.reason.is_empty() {
            exit.reason = self.last_words();
        }
        Ok(Some(exit))
    }
}

impl Qemu {
    /// Why QEMU says it ended: the reason in its SHUTDOWN event, kept by the event queue.
    fn last_words(&self) -> String {
        self.qmp.drain(Instant::now() + LAST_EVENTS);
        self.qmp
            .events()
            .iter()
            .rev()
            .find(|event| event.name == "SHUTDOWN")
            .and_then(|event| event.data.get("reason")?.as_str())
            .unwrap_or_default()
            .to_owned()
    }
}
