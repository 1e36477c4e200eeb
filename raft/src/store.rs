//! The state: what is read, and what becomes of it on disk.
//!
//! [`Store`] holds the machine in memory and is the only one to change it, an apply batch at a
//! time. After each batch it publishes a [`View`] (an O(1) clone), hands the changed rows to the
//! derived copy, and only then are proposers answered: whoever has its answer finds its change in
//! the view.
//!
//! **Order of trust at start**
//! 1. The newest snapshot file that is whole.
//! 2. The derived copy, if it opens, checks out, is not older than the snapshot and does not
//!    contradict the log. Else it is moved aside and filled again from 1.
//! 3. Nothing: the empty state, if the log still has its first entry.
//!
//! Then openraft replays the log from there. If the log does not reach back that far the state is
//! lost on this node, and it says so instead of starting with a hole. If the copy is ahead of the
//! log (a leader applies what two followers made durable), or the log was purged further than the
//! snapshot that is left, a snapshot is written before anything else: from then on the log may
//! begin after it.

use std::path::Path;
use std::sync::Arc;

use openraft::EntryPayload;
use tokio::sync::watch;

use crate::derived::{self, Derived, Position};
use crate::fault::{Fault, FaultCell};
use crate::log::Log;
use crate::machine::{Change, Machine, Row};
use crate::snapshot::{self, SnapshotFile, Snapshots};
use crate::types::{AnswerBytes, Entry, LogId, SnapshotMeta, StoredMembership};

/// The state at one position of the log.
#[derive(Clone, Debug)]
pub struct View<M> {
    /// The state. Cheap to clone, never changes.
    pub state: M,
    /// Index of the last entry applied to it; `None` before the first.
    pub applied: Option<u64>,
}

/// Why there is no state to start from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenStoreError {
    /// The log begins after the newest state there is. An operator must remove this member and
    /// let it join anew.
    #[error("the state is lost: the log begins after entry {purged}, the newest state is {state}")]
    StateLost {
        /// The last entry the log no longer has.
        purged: u64,
        /// What the newest state covers, in words.
        state: String,
    },
    /// The snapshot was written by a newer version.
    #[error("read the newest snapshot")]
    Unreadable(#[source] crate::machine::Unreadable),
    /// The disk refused.
    #[error("open the state")]
    Disk(#[source] Fault),
}

/// The state and its keepers.
pub(crate) struct Store<M> {
    machine: M,
    position: Position,
    view: watch::Sender<View<M>>,
    pub(crate) files: Files,
}

/// What a snapshot builder needs besides a clone of the machine; clones share everything.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) derived: Arc<Derived>,
    pub(crate) log: Arc<Log>,
    pub(crate) fault: FaultCell,
}

/// A state that was found on disk.
struct Found<M> {
    machine: M,
    position: Position,
}

impl<M: Machine> Store<M> {
    /// Finds the state to start from, see above. Blocks.
    pub(crate) fn open(
        (snapshots, newest): (Snapshots, Option<snapshot::Loaded>),
        state_dir: &Path,
        log: Arc<Log>,
        fault: FaultCell,
    ) -> Result<Self, OpenStoreError> {
        let from_snapshot = newest.map(from_snapshot::<M>).transpose()?;
        let (derived, copied) = open_derived::<M>(state_dir, from_snapshot.as_ref(), &log)
            .map_err(|source| {
                OpenStoreError::Disk(Fault::disk("open state folder", state_dir, source))
            })?;
        let is_copied = copied.is_some();
        let found = copied.or(from_snapshot).unwrap_or_else(|| Found {
            machine: M::empty(),
            position: Position::default(),
        });
        if !is_copied {
            derived.replace(found.machine.rows(), found.position.clone());
        }
        let files = Files {
            snapshots: Arc::new(snapshots),
            derived: Arc::new(derived),
            log,
            fault,
        };
        let store = Self::new(found, files);
        store.check_reach()?;
        store.snapshot_if_needed().map_err(OpenStoreError::Disk)?;
        Ok(store)
    }

    fn new(found: Found<M>, files: Files) -> Self {
        let view = watch::Sender::new(View {
            state: found.machine.clone(),
            applied: found.position.applied.map(|id| id.index),
        });
        Self {
            machine: found.machine,
            position: found.position,
            view,
            files,
        }
    }

    /// The log must begin where the state ends, or earlier.
    fn check_reach(&self) -> Result<(), OpenStoreError> {
        let purged = self.files.log.purged().map(|id| id.index);
        let applied = self.position.applied.map(|id| id.index);
        match purged {
            Some(purged) if applied < Some(purged) => Err(OpenStoreError::StateLost {
                purged,
                state: applied.map_or_else(|| "none".into(), |at| format!("that of entry {at}")),
            }),
            _ => Ok(()),
        }
    }

    /// Writes a snapshot if the log depends on one that is not there.
    fn snapshot_if_needed(&self) -> Result<(), Fault> {
        let index = |id: Option<LogId>| id.map(|id| id.index);
        let covered = self.files.snapshots.newest();
        let covered = covered.and_then(|(meta, _)| index(meta.last_log_id));
        let applied = index(self.position.applied);
        let ahead = applied > index(self.files.log.last());
        if covered < index(self.files.log.purged()) || (ahead && covered < applied) {
            self.builder().build()?;
        } else if let Some(covered) = covered {
            self.files.log.covered_by_snapshot(covered);
        }
        Ok(())
    }

    /// Watches the state.
    pub(crate) fn subscribe(&self) -> watch::Receiver<View<M>> {
        self.view.subscribe()
    }

    pub(crate) const fn position(&self) -> &Position {
        &self.position
    }

    /// Applies entries in order, publishes the outcome and returns the answers.
    pub(crate) fn apply(&mut self, entries: Vec<Entry>) -> Result<Vec<AnswerBytes>, Fault> {
        let mut answers = Vec::with_capacity(entries.len());
        let mut changes: Vec<Change> = Vec::new();
        for entry in entries {
            let index = entry.log_id.index;
            let mut answer = AnswerBytes::default();
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(proposal) => {
                    let applied = self.machine.apply(index, &proposal.0);
                    let applied = applied.map_err(|source| Fault::Unreadable { index, source })?;
                    changes.extend(applied.rows);
                    answer = AnswerBytes(applied.answer);
                }
                EntryPayload::Membership(membership) => {
                    self.position.membership =
                        StoredMembership::new(Some(entry.log_id), membership);
                }
            }
            self.position.applied = Some(entry.log_id);
            answers.push(answer);
        }
        self.publish();
        self.files.derived.put(changes, self.position.clone());
        Ok(answers)
    }

    fn publish(&self) {
        self.view.send_replace(View {
            state: self.machine.clone(),
            applied: self.position.applied.map(|id| id.index),
        });
    }

    /// A snapshot of the state as it is now, still to be written.
    pub(crate) fn builder(&self) -> Builder<M> {
        Builder {
            machine: self.machine.clone(),
            meta: SnapshotMeta {
                last_log_id: self.position.applied,
                last_membership: self.position.membership.clone(),
            },
            files: self.files.clone(),
        }
    }

    /// Takes over a snapshot that was read from the leader, once it is durable here.
    pub(crate) fn install(&mut self, machine: M, meta: SnapshotMeta) {
        self.machine = machine;
        self.position = Position {
            applied: meta.last_log_id,
            membership: meta.last_membership,
        };
        self.publish();
        let rows = self.machine.rows();
        self.files.derived.replace(rows, self.position.clone());
    }
}

/// Writes one snapshot, from a clone of the state, while the state moves on.
pub(crate) struct Builder<M> {
    machine: M,
    meta: SnapshotMeta,
    files: Files,
}

impl<M: Machine> Builder<M> {
    /// Writes the file and lets the log be purged up to it. Blocks.
    pub(crate) fn build(&self) -> Result<(SnapshotMeta, SnapshotFile), Fault> {
        let file = self.files.keep(&self.meta, self.machine.rows())?;
        Ok((self.meta.clone(), file))
    }
}

impl Files {
    /// Writes a snapshot file. The purge that may follow must not find the derived copy older than
    /// the log's new beginning, so that is flushed too.
    fn keep(
        &self,
        meta: &SnapshotMeta,
        rows: impl Iterator<Item = Row>,
    ) -> Result<SnapshotFile, Fault> {
        let file = self.snapshots.write(meta, rows)?;
        self.derived.flush();
        if let Some(id) = meta.last_log_id {
            self.log.covered_by_snapshot(id.index);
        }
        Ok(file)
    }

    /// Reads a snapshot received from the leader and makes it this node's own. Blocks.
    pub(crate) fn take_over<M: Machine>(
        &self,
        received: &Path,
    ) -> Result<(M, SnapshotMeta), Fault> {
        let loaded = snapshot::read(received).map_err(|err| match err {
            snapshot::ReadSnapshotError::Io(source) => Fault::disk("read", received, source),
            err => Fault::Core(format!("the leader's snapshot is unusable: {err}")),
        })?;
        let index = loaded.meta.last_log_id.map_or(0, |id| id.index);
        let machine = M::from_rows(loaded.rows);
        let machine = machine.map_err(|source| Fault::Unreadable { index, source })?;
        self.keep(&loaded.meta, machine.rows())?;
        Ok((machine, loaded.meta))
    }
}

fn from_snapshot<M: Machine>(loaded: snapshot::Loaded) -> Result<Found<M>, OpenStoreError> {
    let machine = M::from_rows(loaded.rows).map_err(OpenStoreError::Unreadable)?;
    Ok(Found {
        machine,
        position: Position {
            applied: loaded.meta.last_log_id,
            membership: loaded.meta.last_membership,
        },
    })
}

/// Opens the derived copy; its content only if it can be trusted.
fn open_derived<M: Machine>(
    dir: &Path,
    snapshot: Option<&Found<M>>,
    log: &Log,
) -> std::io::Result<(Derived, Option<Found<M>>)> {
    match load_derived(dir, snapshot, log) {
        Ok((derived, found)) => return Ok((derived, found)),
        Err(doubt) => {
            let err = &doubt as &dyn std::error::Error;
            tracing::warn!(dir = %dir.display(), err, "rebuilding the derived state");
        }
    }
    derived::move_aside(dir)?;
    match derived::load(dir) {
        Ok(empty) => {
            let (derived, _, _) = Derived::start(dir, empty)?;
            Ok((derived, None))
        }
        Err(doubt) => {
            let err = &doubt as &dyn std::error::Error;
            tracing::warn!(dir = %dir.display(), err, "running without a derived state");
            Ok((Derived::none(), None))
        }
    }
}

fn load_derived<M: Machine>(
    dir: &Path,
    snapshot: Option<&Found<M>>,
    log: &Log,
) -> Result<(Derived, Option<Found<M>>), derived::Doubt> {
    use derived::Doubt;
    let loaded = derived::load(dir)?;
    let covered = snapshot.and_then(|found| found.position.applied);
    if loaded.position.applied < covered {
        return Err(Doubt::Wrong("it is older than the newest snapshot"));
    }
    let applied = loaded.position.applied;
    let in_log = applied.and_then(|applied| log.id_at(applied.index));
    if in_log.is_some() && in_log != applied {
        return Err(Doubt::Wrong("it contradicts the log"));
    }
    let (derived, position, rows) = Derived::start(dir, loaded).map_err(Doubt::Thread)?;
    if position.applied.is_none() {
        return Ok((derived, None));
    }
    let machine = M::from_rows(rows).map_err(|_| Doubt::Wrong("a row of another version"))?;
    Ok((derived, Some(Found { machine, position })))
}
