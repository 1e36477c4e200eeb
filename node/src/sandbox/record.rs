//! What is written beside a sandbox, so that another daemon finds what this one acquired.
//!
//! Written durably before the first effect and again after each one that later needs undoing by
//! more than the directory's name: `slot` before the slot is used, `ready` after the guest was
//! set up. A resource is thus either named here or unused, and unused ones are swept.

use std::io;
use std::path::Path;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use serde::{Deserialize, Serialize};

use crate::net::Slot;
use crate::store::durable;

/// The layout of the record.
const VERSION: u32 = 1;
/// Its file's name in the sandbox's directory.
const FILE: &str = "sandbox.json";
/// Bytes of randomness in an access token.
const TOKEN_BYTES: usize = 16;

/// A sandbox's record on its host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// Its id, as clients spell it.
    pub(super) id: String,
    epoch: u64,
    /// Name of its template.
    pub(super) template: String,
    /// What the guest agent requires of callers.
    pub(super) token: String,
    /// Its network, once taken.
    pub(super) slot: Option<Slot>,
    /// Its hypervisor and agent, once the guest was set up.
    pub(super) ready: Option<ReadyFacts>,
}

/// What is known of a guest that was set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReadyFacts {
    /// The hypervisor and its version.
    pub(super) vmm: String,
    /// The agent's version.
    pub(super) agent: String,
}

impl Record {
    /// The record of a sandbox that holds nothing yet, with a fresh token.
    pub(super) fn new(id: SandboxId, epoch: Epoch, template: &str) -> Self {
        let token: [u8; TOKEN_BYTES] = rand::random();
        Self {
            version: VERSION,
            id: id.to_string(),
            epoch: epoch.0,
            template: template.to_owned(),
            token: token.iter().map(|byte| format!("{byte:02x}")).collect(),
            slot: None,
            ready: None,
        }
    }

    /// The ownership it was started under.
    pub(super) const fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    /// Writes the record; when this returns it survives a power cut.
    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        durable::write(&dir.join(FILE), &bytes)
    }

    /// Reads the record of the sandbox `id` in `dir`.
    ///
    /// # Errors
    /// `NotFound` where none was written yet; `InvalidData` for anything but our own record.
    pub(super) fn load(dir: &Path, id: SandboxId) -> io::Result<Self> {
        let bytes = std::fs::read(dir.join(FILE))?;
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let record: Self = serde_json::from_slice(&bytes).map_err(|err| bad(err.to_string()))?;
        if record.version != VERSION {
            return Err(bad(format!("record version {} is unknown", record.version)));
        }
        if record.id != id.to_string() {
            return Err(bad(format!("the record is of {}", record.id)));
        }
        Ok(record)
    }
}
