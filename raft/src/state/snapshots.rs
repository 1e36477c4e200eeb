//! Snapshots: sandboxes sealed at one instant, and which nodes hold them.
//!
//! The record says what a node must be to resume one and who has its bytes; the bytes themselves, and
//! the manifest that names them, lie in the nodes' stores. A sandbox rests on one snapshot from its
//! first pause on, and keeps it while it runs: its pages may still come from there, and it is what is
//! left if its host is lost. The record goes when the sandbox is sealed anew or ends.

use std::collections::BTreeSet;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::Node;
use super::rows::BadRow;
use crate::wire::{array, some};

/// A snapshot as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What its sealer says of it.
    pub sealed: Sealed,
    /// Whose it is.
    pub team: TeamId,
    /// Of which sandbox.
    pub sandbox: SandboxId,
    /// Under which ownership it was sealed.
    pub epoch: Epoch,
    /// Where.
    pub sealed_by: NodeId,
    /// When that was known.
    pub sealed_at: Stamp,
    /// Every node that has all of it.
    pub holders: BTreeSet<NodeId>,
}

/// A snapshot as the node that sealed it reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Chosen by the sealer.
    pub id: SnapshotId,
    /// BLAKE3 of its manifest, which names everything in it.
    pub digest: [u8; 32],
    /// Guest memory, holes left out.
    pub memory_bytes: u64,
    /// The disk's changes, holes left out.
    pub disk_bytes: u64,
    /// What the sealer had to store anew for it.
    pub new_bytes: u64,
    /// What resumes it.
    pub needs: Needs,
    /// The pause it was made for: [`super::Sandbox::pause`] as the sealer saw it.
    pub pause: u64,
    /// How long it took.
    pub took: SealTimes,
}

/// How long the steps of a seal took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SealTimes {
    /// Bringing the guest to a stop.
    pub quiesce_ms: u32,
    /// Saving the state of its devices.
    pub save_ms: u32,
    /// Storing it all, durably.
    pub store_ms: u32,
}

/// What a node must offer to resume a snapshot: a guest's devices are those of its machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The driver, e.g. `qemu`.
    pub vmm: String,
    /// The machine it showed the guest. Its name never changes its meaning.
    pub machine: String,
    /// The processor.
    pub cpu: String,
    /// Digest of the image below its disk, which is not part of the snapshot.
    pub base: [u8; 32],
}

impl Needs {
    /// Whether `node` runs just that.
    #[must_use]
    pub fn are_met_by(&self, node: &Node) -> bool {
        (&self.vmm, &self.machine, &self.cpu) == (&node.vmm, &node.machine, &node.cpu)
    }

    /// Whether `node` has the image below the disk, under whatever name.
    #[must_use]
    pub fn has_base(&self, node: &Node) -> bool {
        node.templates.values().any(|digest| *digest == self.base)
    }
}

impl From<&Sealed> for pb::Sealed {
    fn from(sealed: &Sealed) -> Self {
        Self {
            id: sealed.id.0.to_vec(),
            digest: sealed.digest.to_vec(),
            memory_bytes: sealed.memory_bytes,
            disk_bytes: sealed.disk_bytes,
            new_bytes: sealed.new_bytes,
            vmm: sealed.needs.vmm.clone(),
            machine: sealed.needs.machine.clone(),
            cpu: sealed.needs.cpu.clone(),
            base: sealed.needs.base.to_vec(),
            pause: sealed.pause,
            quiesce_ms: sealed.took.quiesce_ms,
            save_ms: sealed.took.save_ms,
            store_ms: sealed.took.store_ms,
        }
    }
}

impl TryFrom<pb::Sealed> for Sealed {
    type Error = BadRow;

    fn try_from(row: pb::Sealed) -> Result<Self, BadRow> {
        Ok(Self {
            id: SnapshotId(array("snapshot id", &row.id)?),
            digest: array("snapshot digest", &row.digest)?,
            memory_bytes: row.memory_bytes,
            disk_bytes: row.disk_bytes,
            new_bytes: row.new_bytes,
            needs: Needs {
                vmm: row.vmm,
                machine: row.machine,
                cpu: row.cpu,
                base: array("image digest", &row.base)?,
            },
            pause: row.pause,
            took: SealTimes {
                quiesce_ms: row.quiesce_ms,
                save_ms: row.save_ms,
                store_ms: row.store_ms,
            },
        })
    }
}

impl From<&Snapshot> for pb::SnapshotRow {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            sealed: Some((&snapshot.sealed).into()),
            team: snapshot.team.0.to_vec(),
            sandbox: snapshot.sandbox.0.to_vec(),
            epoch: snapshot.epoch.0,
            sealed_by: snapshot.sealed_by.0,
            sealed_at_ms: snapshot.sealed_at.0,
            holders: snapshot.holders.iter().map(|node| node.0).collect(),
        }
    }
}

impl TryFrom<pb::SnapshotRow> for Snapshot {
    type Error = BadRow;

    fn try_from(row: pb::SnapshotRow) -> Result<Self, BadRow> {
        Ok(Self {
            sealed: some("sealed snapshot", row.sealed)?.try_into()?,
            team: TeamId(array("team id", &row.team)?),
            sandbox: SandboxId(array("sandbox id", &row.sandbox)?),
            epoch: Epoch(row.epoch),
            sealed_by: NodeId(row.sealed_by),
            sealed_at: Stamp(row.sealed_at_ms),
            holders: row.holders.into_iter().map(NodeId).collect(),
        })
    }
}
