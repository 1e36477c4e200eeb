//! The nodes of the cluster and what they can hold.

use proto::ids::{NodeId, NodeKey};
use proto::units::{Mib, Stamp};
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::{array, some};

/// A node as every other node knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Given out by the log, never reused.
    pub id: NodeId,
    /// What people call it.
    pub name: String,
    /// The key its peers pin.
    pub key: NodeKey,
    /// Where its API answers.
    pub api_url: String,
    /// Where its peers dial it.
    pub cluster_address: String,
    /// What it offers to sandboxes in all.
    pub capacity: Resources,
    /// The driver that runs its guests, e.g. `qemu`.
    pub vmm: String,
    /// That driver's version.
    pub vmm_version: String,
    /// What executes guest code, e.g. `kvm` or `tcg`.
    pub accelerator: String,
    /// The version of Wrenn it runs.
    pub version: String,
    /// When it was first admitted.
    pub admitted_at: Stamp,
}

/// An amount of everything that placement counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Mib,
    /// Root disks at their full size.
    pub disk: Mib,
    /// Sandboxes, each of which takes one network slot.
    pub sandboxes: u32,
}

impl Resources {
    /// The sum; saturates.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory: Mib(self.memory.0.saturating_add(other.memory.0)),
            disk: Mib(self.disk.0.saturating_add(other.disk.0)),
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
        }
    }

    /// What is left after `other`; nothing falls below zero.
    #[must_use]
    pub const fn less(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory: Mib(self.memory.0.saturating_sub(other.memory.0)),
            disk: Mib(self.disk.0.saturating_sub(other.disk.0)),
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
        }
    }
}

impl From<&Node> for pb::NodeRow {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id.0,
            name: node.name.clone(),
            key: node.key.0.to_vec(),
            api_url: node.api_url.clone(),
            cluster_address: node.cluster_address.clone(),
            capacity: Some(node.capacity.into()),
            vmm: node.vmm.clone(),
            vmm_version: node.vmm_version.clone(),
            accelerator: node.accelerator.clone(),
            version: node.version.clone(),
            admitted_at_ms: node.admitted_at.0,
        }
    }
}

impl TryFrom<pb::NodeRow> for Node {
    type Error = BadRow;

    fn try_from(row: pb::NodeRow) -> Result<Self, BadRow> {
        Ok(Self {
            id: NodeId(row.id),
            name: row.name,
            key: NodeKey(array("node key", &row.key)?),
            api_url: row.api_url,
            cluster_address: row.cluster_address,
            capacity: some("capacity", row.capacity)?.into(),
            vmm: row.vmm,
            vmm_version: row.vmm_version,
            accelerator: row.accelerator,
            version: row.version,
            admitted_at: Stamp(row.admitted_at_ms),
        })
    }
}

impl From<Resources> for pb::Resources {
    fn from(all: Resources) -> Self {
        Self {
            vcpus: all.vcpus,
            memory_mib: all.memory.0,
            disk_mib: all.disk.0,
            sandboxes: all.sandboxes,
        }
    }
}

impl From<pb::Resources> for Resources {
    fn from(row: pb::Resources) -> Self {
        Self {
            vcpus: row.vcpus,
            memory: Mib(row.memory_mib),
            disk: Mib(row.disk_mib),
            sandboxes: row.sandboxes,
        }
    }
}
