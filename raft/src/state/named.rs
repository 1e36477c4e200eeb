//! Checkpoints, and snapshots that a team has given a name: templates of its own.
//!
//! A name belongs to one team, so that no team learns of another's names or can take them away. What
//! stands behind it is a snapshot like any other; whoever starts from it becomes another sandbox.

use std::collections::BTreeMap;

use proto::ids::{SandboxId, SnapshotId, TeamId};
use proto::units::{Mib, Stamp};
use proto::wire::raft as pb;

use super::rows::BadRow;
use super::{SandboxSpec, SnapshotKind};
use crate::wire::{array, some};

/// A name of a team's, and the snapshot it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Whose.
    pub team: TeamId,
    /// Unique in the team.
    pub name: String,
    /// What it stands for.
    pub snapshot: SnapshotId,
    /// Of which kind that is.
    pub kind: SnapshotKind,
    /// The checkpoint by which it got its name.
    pub ask: SnapshotId,
    /// Name of the template of the sandbox that was sealed.
    pub template: String,
    /// Virtual processors of whatever goes on from it; of a base, only what it was made with.
    pub vcpus: u32,
    /// Its memory, likewise.
    pub memory: Mib,
    /// Its root disk.
    pub disk: Mib,
    /// Bytes of data in it, holes left out.
    pub size_bytes: u64,
    /// When it got its name.
    pub created_at: Stamp,
    /// The client's own labels.
    pub metadata: BTreeMap<String, String>,
}

impl Named {
    /// Whether `spec` asks for what its guest has: a guest's shape cannot change. One that boots is given
    /// what is asked for, but for its disk.
    #[must_use]
    pub fn fits(&self, spec: &SandboxSpec) -> bool {
        let same_guest = (self.vcpus, self.memory) == (spec.vcpus, spec.memory);
        self.disk == spec.disk && (self.kind == SnapshotKind::Base || same_guest)
    }
}

/// What a sandbox is sealed for, where that is not its own rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Names the ask: asked for again, it is known.
    pub ask: SnapshotId,
    /// What the snapshot is for.
    pub purpose: Purpose,
}

/// What a checkpoint is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It becomes a template of the team's.
    Name {
        /// Its name.
        name: String,
        /// What of it is kept.
        kind: SnapshotKind,
        /// Whether it may take the name of another.
        overwrite: bool,
        /// The client's own labels.
        metadata: BTreeMap<String, String>,
    },
    /// Further sandboxes start from it, each as another one.
    Fork {
        /// Chosen by the proposer.
        ids: Vec<SandboxId>,
    },
}

impl Purpose {
    /// What of the sandbox is to be sealed for it.
    #[must_use]
    pub const fn kind(&self) -> SnapshotKind {
        match self {
            Self::Name { kind, .. } => *kind,
            // Forks go on with what they had in memory.
            Self::Fork { .. } => SnapshotKind::Snapshot,
        }
    }
}

impl From<&Named> for pb::NamedRow {
    fn from(named: &Named) -> Self {
        Self {
            team: named.team.0.to_vec(),
            name: named.name.clone(),
            snapshot: named.snapshot.0.to_vec(),
            ask: named.ask.0.to_vec(),
            template: named.template.clone(),
            vcpus: named.vcpus,
            memory_mib: named.memory.0,
            disk_mib: named.disk.0,
            size_bytes: named.size_bytes,
            created_at_ms: named.created_at.0,
            metadata: named.metadata.clone(),
            disk_alone: named.kind.is_disk_alone(),
        }
    }
}

impl TryFrom<pb::NamedRow> for Named {
    type Error = BadRow;

    fn try_from(row: pb::NamedRow) -> Result<Self, BadRow> {
        Ok(Self {
            team: TeamId(array("team id", &row.team)?),
            name: row.name,
            snapshot: SnapshotId(array("snapshot id", &row.snapshot)?),
            kind: SnapshotKind::of(row.disk_alone),
            ask: SnapshotId(array("checkpoint id", &row.ask)?),
            template: row.template,
            vcpus: row.vcpus,
            memory: Mib(row.memory_mib),
            disk: Mib(row.disk_mib),
            size_bytes: row.size_bytes,
            created_at: Stamp(row.created_at_ms),
            metadata: row.metadata,
        })
    }
}

impl From<&Checkpoint> for pb::Checkpoint {
    fn from(checkpoint: &Checkpoint) -> Self {
        use pb::checkpoint::Purpose as Wire;
        let purpose = match &checkpoint.purpose {
            Purpose::Name {
                name,
                kind,
                overwrite,
                metadata,
            } => Wire::Name(pb::Naming {
                name: name.clone(),
                overwrite: *overwrite,
                metadata: metadata.clone(),
                disk_alone: kind.is_disk_alone(),
            }),
            Purpose::Fork { ids } => Wire::Fork(pb::Forking {
                ids: ids.iter().map(|id| id.0.to_vec()).collect(),
            }),
        };
        Self {
            ask: checkpoint.ask.0.to_vec(),
            purpose: Some(purpose),
        }
    }
}

impl TryFrom<pb::Checkpoint> for Checkpoint {
    type Error = BadRow;

    fn try_from(row: pb::Checkpoint) -> Result<Self, BadRow> {
        use pb::checkpoint::Purpose as Wire;
        let purpose = match some("purpose of a checkpoint", row.purpose)? {
            Wire::Name(naming) => Purpose::Name {
                name: naming.name,
                kind: SnapshotKind::of(naming.disk_alone),
                overwrite: naming.overwrite,
                metadata: naming.metadata,
            },
            Wire::Fork(forking) => {
                let ids = forking.ids.iter();
                let ids = ids.map(|id| array("sandbox id", id).map(SandboxId));
                Purpose::Fork {
                    ids: ids.collect::<Result<_, _>>()?,
                }
            }
        };
        Ok(Self {
            ask: SnapshotId(array("checkpoint id", &row.ask)?),
            purpose,
        })
    }
}
