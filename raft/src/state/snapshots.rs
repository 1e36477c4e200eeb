//! Snapshots: sandboxes sealed at one instant, and which nodes hold them.
//!
//! The record says what a node must be to resume one and who has its bytes; the bytes themselves, and
//! the manifest that names them, lie in the nodes' stores. A sandbox rests on one snapshot from its
//! first pause on, and keeps it while it runs: its pages may still come from there, and it is what is
//! left if its host is lost. The record goes when nobody needs it any more: no sandbox rests on it or
//! was made from it, no name stands for it, and it is not kept warm.

use std::collections::BTreeSet;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::{Mib, Stamp};
use proto::wire::raft as pb;

use super::rows::BadRow;
use super::{Node, SandboxSpec};
use crate::wire::{array, some};

/// What a snapshot consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotKind {
    /// Memory, devices and disk: guests go on from it.
    #[default]
    Snapshot,
    /// A disk alone: guests boot from it.
    Base,
}

impl SnapshotKind {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Base => "base",
        }
    }

    pub(super) const fn is_disk_alone(self) -> bool {
        matches!(self, Self::Base)
    }

    pub(super) const fn of(disk_alone: bool) -> Self {
        match disk_alone {
            true => Self::Base,
            false => Self::Snapshot,
        }
    }
}

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
    /// Set where its guest had just booted, for others to start from.
    pub warm: Option<Warm>,
}

/// What a guest that had just booted was given, beside what [`Needs`] says: a sandbox that asks for
/// the same may start as another one of it, and skip the boot. It was sealed before it was told who
/// it is, so it holds nothing of anybody's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warm {
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Mib,
    /// Root disk.
    pub disk: Mib,
    /// Release of the node that made it.
    pub version: String,
    /// Guest kernel and agent, as that node calls them.
    pub guest: String,
    /// Nobody starts from it any more; it stays as long as those that did need it.
    pub retired: bool,
}

impl Warm {
    /// Whether `spec` asks for just that.
    #[must_use]
    pub fn fits(&self, spec: &SandboxSpec) -> bool {
        (self.vcpus, self.memory, self.disk) == (spec.vcpus, spec.memory, spec.disk)
    }
}

impl Snapshot {
    /// Whether `node` may start others from it: it runs what is needed, and has the image below.
    #[must_use]
    pub fn is_warm_for(&self, node: &Node) -> bool {
        let needs = &self.sealed.needs;
        // A host of one team is sent nothing of others', and no warm snapshot is its team's.
        let may = node.team.is_none() && needs.are_met_by(node) && needs.has_base(node);
        let made_by = |warm: &Warm| !warm.retired && warm.version == node.version;
        may && self.warm.as_ref().is_some_and(made_by)
    }
}

/// A snapshot as the node that sealed it reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Chosen by the sealer.
    pub id: SnapshotId,
    /// BLAKE3 of its manifest, which names everything in it.
    pub digest: [u8; 32],
    /// What it consists of.
    pub kind: SnapshotKind,
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

impl Sealed {
    /// Whether a guest can go on, or boot, from it on `node`.
    #[must_use]
    pub fn can_start_on(&self, node: &Node) -> bool {
        self.runs_on(node) && self.needs.has_base(node)
    }

    /// Whether `node` has the machine for it: a guest that boots takes any.
    #[must_use]
    pub fn runs_on(&self, node: &Node) -> bool {
        self.kind == SnapshotKind::Base || self.needs.are_met_by(node)
    }
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
            disk_alone: sealed.kind.is_disk_alone(),
        }
    }
}

impl TryFrom<pb::Sealed> for Sealed {
    type Error = BadRow;

    fn try_from(row: pb::Sealed) -> Result<Self, BadRow> {
        Ok(Self {
            id: SnapshotId(array("snapshot id", &row.id)?),
            digest: array("snapshot digest", &row.digest)?,
            kind: SnapshotKind::of(row.disk_alone),
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
            warm: snapshot.warm.as_ref().map(Into::into),
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
            warm: row.warm.map(Into::into),
        })
    }
}

impl From<&Warm> for pb::Warm {
    fn from(warm: &Warm) -> Self {
        Self {
            vcpus: warm.vcpus,
            memory_mib: warm.memory.0,
            disk_mib: warm.disk.0,
            version: warm.version.clone(),
            guest: warm.guest.clone(),
            retired: warm.retired,
        }
    }
}

impl From<pb::Warm> for Warm {
    fn from(row: pb::Warm) -> Self {
        Self {
            vcpus: row.vcpus,
            memory: Mib(row.memory_mib),
            disk: Mib(row.disk_mib),
            version: row.version,
            guest: row.guest,
            retired: row.retired,
        }
    }
}
