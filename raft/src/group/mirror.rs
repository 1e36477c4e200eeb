//! What a node that is no member is fed from: applied entries, and a snapshot to begin with.
//!
//! A mirror holds the same state as a member without being in the membership: it asks any member
//! for the entries behind what it has and applies them with the same code. Only applied entries are
//! handed out: those are committed and never taken back.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use openraft::EntryPayload;
use tokio::task::spawn_blocking;
use tokio::time;

use super::{EntriesError, Group, Role, SnapshotError};
use crate::fault::Fault;
use crate::machine::Machine;
use crate::snapshot::Snapshots;
use crate::types::Entry;

/// Most bytes of entries one answer takes from the log, whatever is asked for.
const ENTRIES_BYTES: usize = 4 * 1024 * 1024;
/// How long a mirror's request waits for a snapshot to be written: about 1 s for the largest state
/// we plan for, and room for a busy disk.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks whether it is there.
const SNAPSHOT_POLL: Duration = Duration::from_millis(10);

/// A run of applied entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entries {
    /// Index and proposal, without gaps; `None` for entries that change no state of the machine.
    pub entries: Vec<(u64, Option<Arc<[u8]>>)>,
    /// How far this member has applied: behind the last entry here, more is to be had.
    pub applied: Option<u64>,
}

/// A snapshot file to send.
#[derive(Debug)]
pub struct OfferedSnapshot {
    /// Open, so that it stays readable when a newer one replaces it.
    pub file: File,
    /// Its name, for messages.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// The last entry in it; [`Group::entries`] goes on behind it.
    pub index: u64,
}

impl<M: Machine> Group<M> {
    /// Applied entries from `from` on, about `max_bytes` of them and at least one where there is
    /// any. Empty where nothing is applied there yet.
    ///
    /// # Errors
    /// [`EntriesError::Purged`] where a snapshot is needed first.
    pub async fn entries(&self, from: u64, max_bytes: usize) -> Result<Entries, EntriesError> {
        if let Some(fault) = self.inner.files.fault.get() {
            return Err(EntriesError::Fatal(fault));
        }
        let applied = self.inner.view.borrow().applied;
        let log = &self.inner.files.log;
        let entries = match applied {
            Some(applied) if from <= applied => {
                let range = from..applied.saturating_add(1);
                let read = log.read_up_to(range, max_bytes.min(ENTRIES_BYTES)).await;
                read.map_err(|err| self.read_error(&err))?
            }
            _ => {
                let entries = Vec::new();
                return Ok(Entries { entries, applied });
            }
        };
        // Looked at after reading: the purge may have come in between.
        if entries
            .first()
            .is_none_or(|first| first.log_id.index != from)
        {
            let purged = log.purged().map_or(0, |id| id.index);
            let first = purged.max(from) + 1;
            return Err(EntriesError::Purged { first });
        }
        let entries = entries.into_iter().map(stripped).collect();
        Ok(Entries { entries, applied })
    }

    fn read_error(&self, err: &std::io::Error) -> EntriesError {
        match self.inner.files.fault.get() {
            Some(fault) => EntriesError::Fatal(fault),
            None if self.role() == Role::Stopped => EntriesError::Stopped,
            None => EntriesError::Fatal(Arc::new(Fault::Core(err.to_string()))),
        }
    }

    /// The newest snapshot; one is written if there is none yet. The log reaches back to it, so
    /// [`Self::entries`] goes on where it ends.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub async fn snapshot_file(&self) -> Result<OfferedSnapshot, SnapshotError> {
        let limit = time::Instant::now() + SNAPSHOT_PATIENCE;
        let mut is_asked = false;
        while time::Instant::now() < limit {
            if let Some(fault) = self.inner.files.fault.get() {
                return Err(SnapshotError::Fatal(fault));
            }
            if self.role() == Role::Stopped {
                return Err(SnapshotError::Stopped);
            }
            if let Some(offer) = self.newest_snapshot().await? {
                return Ok(offer);
            }
            if self.inner.view.borrow().applied.is_none() {
                return Err(SnapshotError::NotYet);
            }
            if !is_asked {
                let asked = self.inner.raft.trigger().snapshot().await;
                asked.map_err(|fatal| SnapshotError::from(self.ended(&fatal)))?;
                is_asked = true;
            }
            time::sleep(SNAPSHOT_POLL).await;
        }
        Err(SnapshotError::NotYet)
    }

    async fn newest_snapshot(&self) -> Result<Option<OfferedSnapshot>, SnapshotError> {
        let files = self.inner.files.clone();
        let opened = spawn_blocking(move || open_newest(&files.snapshots));
        match opened.await {
            Ok(opened) => opened.map_err(|err| SnapshotError::Disk(Arc::new(err))),
            Err(_) => Err(SnapshotError::Stopped),
        }
    }
}

/// Looks again where the file is gone and newer ones have taken its place.
fn open_newest(snapshots: &Snapshots) -> io::Result<Option<OfferedSnapshot>> {
    let mut gone = None;
    loop {
        let Some((meta, snapshot)) = snapshots.newest() else {
            return Ok(None);
        };
        let path = snapshot.path;
        let file = match File::open(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound && gone.as_ref() != Some(&path) => {
                gone = Some(path);
                continue;
            }
            opened => opened?,
        };
        return Ok(Some(OfferedSnapshot {
            bytes: file.metadata()?.len(),
            file,
            path,
            index: meta.last_log_id.map_or(0, |id| id.index),
        }));
    }
}

fn stripped(entry: Entry) -> (u64, Option<Arc<[u8]>>) {
    let proposal = match entry.payload {
        EntryPayload::Normal(proposal) => Some(proposal.0),
        EntryPayload::Blank | EntryPayload::Membership(_) => None,
    };
    (entry.log_id.index, proposal)
}
