//! The nodes of the cluster and what they can hold.

use std::collections::BTreeMap;

use proto::ids::{NodeId, NodeKey, TeamId};
use proto::units::{Mib, Stamp};
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::{array, optional, some};

/// A node as every other node knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// Where they dial it for bulk transfers.
    pub bulk_address: String,
    /// The identity of the disk that holds its log.
    pub disk: [u8; 16],
    /// What it offers to sandboxes in all.
    pub capacity: Resources,
    /// The driver that runs its guests, e.g. `qemu`.
    pub vmm: String,
    /// That driver's version.
    pub vmm_version: String,
    /// What executes guest code, e.g. `kvm` or `tcg`.
    pub accelerator: String,
    /// The machine its guests get, in the driver's word; empty from a release that has none.
    pub machine: String,
    /// The processor they get.
    pub cpu: String,
    /// The version of Wrenn it runs.
    pub version: String,
    /// When it was first admitted.
    pub admitted_at: Stamp,
    /// The operator's labels; placement can ask for them, `zone` names a failure zone.
    pub tags: BTreeMap<String, String>,
    /// Whether it takes no new sandboxes.
    pub cordoned: bool,
    /// Whether it is being emptied; a draining node is cordoned as well.
    pub draining: bool,
    /// The entry by which it last announced itself; every start of its daemon makes one. Leases are
    /// renewed under it, and a verdict about an earlier one changes nothing.
    pub incarnation: u64,
    /// Whether its lease runs.
    pub liveness: Liveness,
    /// Digests of the templates it holds, by name.
    pub templates: BTreeMap<String, [u8; 32]>,
    /// The only team it serves, where it is a host of one team.
    pub team: Option<TeamId>,
    /// Whether it asks before a guest of its executes anything ([`Sandbox::not_begun`]); releases
    /// before did not.
    ///
    /// [`Sandbox::not_begun`]: super::Sandbox::not_begun
    pub asks_first: bool,
    /// Whether it reads changes that name who asked for them, and teams, members and keys with scopes.
    /// Nodes of earlier releases stop at those.
    pub reads_actors: bool,
    /// Whether it reads snapshots of a disk alone, and boots guests from them.
    pub boots_disks: bool,
}

/// What the cluster knows of a node's lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Liveness {
    /// It is renewed.
    #[default]
    Alive,
    /// It has run out: the node freezes what is bound to it. Nothing is given out again yet.
    Missing {
        /// Since when.
        since: Stamp,
    },
    /// It ran out so long ago that the node has killed what was bound to it.
    Lost {
        /// Since when it has been missing.
        since: Stamp,
    },
}

impl Liveness {
    /// Whether the node's lease runs.
    #[must_use]
    pub const fn is_alive(self) -> bool {
        matches!(self, Self::Alive)
    }

    /// Since when the node has not been heard of.
    #[must_use]
    pub const fn since(self) -> Option<Stamp> {
        match self {
            Self::Alive => None,
            Self::Missing { since } | Self::Lost { since } => Some(since),
        }
    }

    pub(crate) fn to_wire(self) -> (pb::Liveness, u64) {
        match self {
            Self::Alive => (pb::Liveness::Alive, 0),
            Self::Missing { since } => (pb::Liveness::Missing, since.0),
            Self::Lost { since } => (pb::Liveness::Lost, since.0),
        }
    }
}

/// What is remembered of a node that was removed: its key never comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// The key it had.
    pub key: NodeKey,
    /// The id it had.
    pub node: NodeId,
    /// What it was called.
    pub name: String,
    /// When.
    pub at: Stamp,
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

    /// Whether there is enough of everything for `other`.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.vcpus >= other.vcpus
            && self.memory.0 >= other.memory.0
            && self.disk.0 >= other.disk.0
            && self.sandboxes >= other.sandboxes
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
            bulk_address: node.bulk_address.clone(),
            disk: node.disk.to_vec(),
            tags: node.tags.clone(),
            cordoned: node.cordoned,
            draining: node.draining,
            incarnation: node.incarnation,
            liveness: node.liveness.to_wire().0.into(),
            since_ms: node.liveness.to_wire().1,
            templates: node
                .templates
                .iter()
                .map(|(name, digest)| (name.clone(), digest.to_vec()))
                .collect(),
            team: node.team.map(|team| team.0.to_vec()).unwrap_or_default(),
            capacity: Some(node.capacity.into()),
            vmm: node.vmm.clone(),
            vmm_version: node.vmm_version.clone(),
            accelerator: node.accelerator.clone(),
            machine: node.machine.clone(),
            cpu: node.cpu.clone(),
            asks_first: node.asks_first,
            reads_actors: node.reads_actors,
            boots_disks: node.boots_disks,
            version: node.version.clone(),
            admitted_at_ms: node.admitted_at.0,
        }
    }
}

impl TryFrom<pb::NodeRow> for Node {
    type Error = BadRow;

    fn try_from(row: pb::NodeRow) -> Result<Self, BadRow> {
        let since = Stamp(row.since_ms);
        // Zero is a value of its own, so a newer version's value must not become it.
        let liveness = match pb::Liveness::try_from(row.liveness) {
            Ok(pb::Liveness::Alive) => Liveness::Alive,
            Ok(pb::Liveness::Missing) => Liveness::Missing { since },
            Ok(pb::Liveness::Lost) => Liveness::Lost { since },
            Err(_) => return Err(BadRow::Unknown("liveness")),
        };
        let templates = row
            .templates
            .into_iter()
            .map(|(name, digest)| Ok((name, array("template digest", &digest)?)))
            .collect::<Result<_, BadRow>>()?;
        Ok(Self {
            bulk_address: row.bulk_address,
            // Rows of the first version have none; the node's next start fills it in.
            disk: optional("disk id", &row.disk)?.unwrap_or_default(),
            tags: row.tags,
            cordoned: row.cordoned,
            draining: row.draining,
            incarnation: row.incarnation,
            liveness,
            templates,
            team: optional("team id", &row.team)?.map(TeamId),
            id: NodeId(row.id),
            name: row.name,
            key: NodeKey(array("node key", &row.key)?),
            api_url: row.api_url,
            cluster_address: row.cluster_address,
            capacity: some("capacity", row.capacity)?.into(),
            vmm: row.vmm,
            vmm_version: row.vmm_version,
            accelerator: row.accelerator,
            machine: row.machine,
            cpu: row.cpu,
            asks_first: row.asks_first,
            reads_actors: row.reads_actors,
            boots_disks: row.boots_disks,
            version: row.version,
            admitted_at: Stamp(row.admitted_at_ms),
        })
    }
}

impl From<&Removed> for pb::RemovedRow {
    fn from(removed: &Removed) -> Self {
        Self {
            key: removed.key.0.to_vec(),
            node: removed.node.0,
            name: removed.name.clone(),
            at_ms: removed.at.0,
        }
    }
}

impl TryFrom<pb::RemovedRow> for Removed {
    type Error = BadRow;

    fn try_from(row: pb::RemovedRow) -> Result<Self, BadRow> {
        Ok(Self {
            key: NodeKey(array("node key", &row.key)?),
            node: NodeId(row.node),
            name: row.name,
            at: Stamp(row.at_ms),
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
