//! How a VMM ended, as `exit.json`: written once by the shim, read by any later daemon.

use std::io;
use std::path::Path;
use std::time::Duration;

use proto::units::Stamp;
use proto::wire::shim as wire;
use serde::{Deserialize, Serialize};

use crate::shim::error::ReadFileError;
use crate::shim::files;
use crate::vmm::VmmExit;

/// The layout of `exit.json`.
const VERSION: u32 = 1;
/// The reason of a VMM that its shim killed because the node's lease had ended.
pub const LEASE_LOST: &str = "lease-lost";
/// The reason of a VMM that its shim killed because a part of its guest's memory was nowhere to be
/// had.
pub const MEMORY_LOST: &str = "memory-lost";
/// What the wire carries for "no exit code".
const NO_CODE: i32 = -1;

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// The exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether the daemon had asked for the end.
    pub asked: bool,
    /// The VMM's own word for why, such as `guest-shutdown`, or [`LEASE_LOST`], or [`MEMORY_LOST`];
    /// may be empty.
    pub reason: String,
    /// Why, in a sentence for people, where the shim itself ended the VMM; otherwise empty.
    pub explanation: String,
    /// The end of what it wrote to its standard error.
    pub stderr_tail: String,
    /// When.
    pub ended_at: Stamp,
}

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    code: Option<i32>,
    signal: Option<i32>,
    asked: bool,
    reason: String,
    stderr_tail: String,
    ended_at_ms: u64,
    /// Not there in files of earlier releases.
    #[serde(default)]
    explanation: String,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl ExitRecord {
    /// The record of `exit`.
    #[must_use]
    pub fn new(exit: VmmExit, asked: bool, stderr_tail: String, ended_at: Stamp) -> Self {
        Self {
            code: exit.code,
            signal: exit.signal,
            asked,
            reason: exit.reason,
            explanation: String::new(),
            stderr_tail,
            ended_at,
        }
    }

    /// The same end, which came about because the node had lost its lease `lost_for` before.
    #[must_use]
    pub fn lease_lost(self, lost_for: Duration) -> Self {
        // To the nearest.
        let seconds = (lost_for + Duration::from_millis(500)).as_secs();
        Self {
            reason: LEASE_LOST.into(),
            explanation: format!(
                "this host lost contact with the cluster for {seconds} s; \
                 the guest was stopped so that it cannot run twice"
            ),
            ..self
        }
    }

    /// The same end, which came about because a part of the guest's memory could not be had.
    #[must_use]
    pub fn memory_lost(self, why: &str) -> Self {
        Self {
            reason: MEMORY_LOST.into(),
            explanation: format!("the guest was stopped, because memory of it is lost: {why}"),
            ..self
        }
    }

    /// Writes it into `dir`, durably.
    ///
    /// # Errors
    /// The disk refused.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let written = Written {
            version: VERSION,
            code: self.code,
            signal: self.signal,
            asked: self.asked,
            reason: self.reason.clone(),
            explanation: self.explanation.clone(),
            stderr_tail: self.stderr_tail.clone(),
            ended_at_ms: self.ended_at.0,
        };
        files::write_durably(dir, files::EXIT, &serde_json::to_vec(&written)?)
    }

    /// Reads it from `dir`; `None` if there is none.
    ///
    /// # Errors
    /// It is there and cannot be used.
    pub fn read(dir: &Path) -> Result<Option<Self>, ReadFileError> {
        let name = files::EXIT;
        let content =
            files::read(dir, name).map_err(|source| ReadFileError::Disk { name, source })?;
        let Some(content) = content else {
            return Ok(None);
        };
        check_version(name, &content, VERSION)?;
        let written: Written = serde_json::from_slice(&content)
            .map_err(|source| ReadFileError::Malformed { name, source })?;
        Ok(Some(Self {
            code: written.code,
            signal: written.signal,
            asked: written.asked,
            reason: written.reason,
            explanation: written.explanation,
            stderr_tail: written.stderr_tail,
            ended_at: Stamp(written.ended_at_ms),
        }))
    }
}

/// Refuses a file of another version before its other fields are looked at.
pub(crate) fn check_version(
    name: &'static str,
    content: &[u8],
    known: u32,
) -> Result<(), ReadFileError> {
    let VersionOnly { version: found } = serde_json::from_slice(content)
        .map_err(|source| ReadFileError::Malformed { name, source })?;
    if found == known {
        Ok(())
    } else {
        Err(ReadFileError::UnknownVersion { name, found, known })
    }
}

impl From<&ExitRecord> for wire::Exit {
    fn from(record: &ExitRecord) -> Self {
        Self {
            code: record.code.unwrap_or(NO_CODE),
            signal: record
                .signal
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(0),
            asked: record.asked,
            detail: record.stderr_tail.clone(),
            reason: record.reason.clone(),
            explanation: record.explanation.clone(),
            ended_at_ms: record.ended_at.0,
        }
    }
}

impl From<wire::Exit> for ExitRecord {
    fn from(exit: wire::Exit) -> Self {
        Self {
            code: (exit.code != NO_CODE).then_some(exit.code),
            signal: i32::try_from(exit.signal)
                .ok()
                .filter(|&signal| signal != 0),
            asked: exit.asked,
            reason: exit.reason,
            explanation: exit.explanation,
            stderr_tail: exit.detail,
            ended_at: Stamp(exit.ended_at_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ExitRecord {
        ExitRecord {
            code: None,
            signal: Some(9),
            asked: true,
            reason: "guest-shutdown".into(),
            explanation: String::new(),
            stderr_tail: "qemu: \u{fffd}".into(),
            ended_at: Stamp(7),
        }
    }

    #[test]
    fn a_record_survives_the_file_and_the_wire() {
        let dir = tempfile::tempdir().expect("tempdir");
        let lost = record().memory_lost("no holder is left");
        for record in [record(), lost, record().lease_lost(Duration::from_secs(70))] {
            record.write(dir.path()).expect("written");
            let read = ExitRecord::read(dir.path()).expect("read");
            assert_eq!(read.as_ref(), Some(&record));
            assert_eq!(ExitRecord::from(wire::Exit::from(&record)), record);
        }
    }

    #[test]
    fn a_guest_that_lost_its_lease_leaves_a_sentence_for_people() {
        let lost = record().lease_lost(Duration::from_millis(70_400));
        assert_eq!(lost.reason, LEASE_LOST);
        assert_eq!(
            lost.explanation,
            "this host lost contact with the cluster for 70 s; the guest was stopped so that it \
             cannot run twice"
        );
    }

    #[test]
    fn no_file_means_no_exit() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(ExitRecord::read(dir.path()).expect("read"), None);
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        files::write_durably(dir.path(), files::EXIT, b"{\"version\":2,\"new\":1}").expect("put");
        let err = ExitRecord::read(dir.path()).expect_err("refused");
        assert!(
            matches!(err, ReadFileError::UnknownVersion { found: 2, .. }),
            "{err}"
        );
    }
}
