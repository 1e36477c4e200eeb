//! What is written beside a sandbox, so that another daemon finds what this one acquired.
//!
//! Written durably before the first effect and again after each one that later needs undoing by
//! more than the directory's name: `slot` before the slot is used, `ready` after the guest was
//! set up. A resource is thus either named here or unused, and unused ones are swept.

use std::fmt;
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
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// Its id, as clients spell it.
    pub(super) id: String,
    epoch: u64,
    /// Name of its template.
    pub(super) template: String,
    /// Digest of the image below its disk. Absent in records of a release that could not seal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base: Option<String>,
    /// The disk from which its guest boots, where that was sealed, by the digest of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) disk: Option<String>,
    /// What it was resumed from, by the digest: what its memory is a change of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    /// The memory that it was last sealed with where it went on, by the digest of the image: what it
    /// writes from then on is a change of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) last_seal: Option<String>,
    /// What the guest agent requires of callers.
    pub(super) token: String,
    /// Its network, once taken.
    pub(super) slot: Option<Slot>,
    /// Its hypervisor and agent, once the guest was set up.
    pub(super) ready: Option<ReadyFacts>,
}

impl fmt::Debug for Record {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("id", &self.id)
            .field("epoch", &self.epoch)
            .field("slot", &self.slot)
            .field("ready", &self.ready)
            .finish_non_exhaustive()
    }
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
            base: None,
            disk: None,
            parent: None,
            last_seal: None,
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_token_is_private_on_disk_and_never_shown() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = SandboxId([7; 16]);
        let record = Record::new(id, Epoch(3), "minimal");
        record.save(dir.path()).expect("saved");
        let file = std::fs::metadata(dir.path().join(FILE)).expect("there");
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        let loaded = Record::load(dir.path(), id).expect("loaded");
        assert_eq!(loaded.token, record.token);
        assert!(!format!("{record:?}").contains(&record.token));
    }

    #[test]
    fn the_record_of_another_sandbox_is_not_taken_for_this_ones() {
        let dir = tempfile::tempdir().expect("a directory");
        let record = Record::new(SandboxId([7; 16]), Epoch(3), "minimal");
        record.save(dir.path()).expect("saved");
        let refused = Record::load(dir.path(), SandboxId([8; 16])).expect_err("another id");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    }
}
