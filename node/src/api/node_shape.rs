//! A node as clients see it: its replicated record, its part in the log, and what was heard of it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use proto::ids::NodeId;
use proto::units::Stamp;
use raft::state::{Liveness, Node, Resources, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::cluster_info::Standing;
use super::state::ApiState;
use super::wire::timestamp;
use crate::cluster::liveness::Hint;

/// A node as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NodeShape {
    /// Given out by the cluster, never reused.
    id: String,
    /// What people call it.
    name: String,
    /// Where its API answers.
    url: String,
    /// Where other nodes reach it.
    address: String,
    /// Its part in the cluster's decisions: `voter`, `learner`, `mirror`, or `host` of one team.
    #[schema(value_type = String)]
    role: &'static str,
    /// Whether it leads them.
    leader: bool,
    /// `alive`, `suspect` (not heard for some seconds), `missing` (its lease has run out) or `lost`
    /// (for so long that nothing that was bound to the lease runs there any more).
    #[schema(value_type = String)]
    state: &'static str,
    /// Since when it has been missing.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
    /// Whether it is known to be up.
    alive: bool,
    /// Whether it takes no new capsules.
    cordoned: bool,
    /// Whether it is being emptied.
    draining: bool,
    /// When it was last heard.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_seen: Option<Timestamp>,
    /// What capsules may ask for.
    tags: BTreeMap<String, String>,
    /// The only team it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    team: Option<String>,
    /// The version of Wrenn it runs.
    version: String,
    /// The driver of its guests.
    vmm: String,
    /// That driver's version.
    vmm_version: String,
    /// What executes guest code: `kvm` or `tcg`.
    accelerator: String,
    /// What it offers.
    capacity: ResourcesShape,
    /// What is taken of it.
    reserved: ResourcesShape,
    /// What it last said of itself.
    load: Option<LoadShape>,
    /// Capsules that hold some of it.
    capsules: u32,
    /// When it was let in.
    #[schema(value_type = Option<String>, format = DateTime)]
    joined_at: Option<Timestamp>,
}

/// Amounts of what capsules need.
#[derive(Debug, Serialize, ToSchema)]
struct ResourcesShape {
    vcpus: u32,
    memory_mb: u32,
    disk_mb: u32,
    capsules: u32,
}

/// What a node last said of itself.
#[derive(Debug, Serialize, ToSchema)]
struct LoadShape {
    /// What no capsule holds.
    free: ResourcesShape,
    /// Guests that run.
    running: u32,
    /// The last entry of the log it has applied.
    applied_index: u64,
    /// Milliseconds that 95 of 100 of the guests there took to start at most; 0 where none was
    /// started since the node's daemon was.
    create_p95_ms: u64,
}

/// Everything that nodes are described by, looked up once.
pub(super) struct Nodes<'a> {
    state: &'a State,
    standing: Standing,
    heard: BTreeMap<NodeId, Hint>,
    here: NodeId,
    now: Stamp,
}

impl<'a> Nodes<'a> {
    /// What `api` knows of the nodes in `state`.
    pub(super) fn new(api: &ApiState, state: &'a State) -> Self {
        let heard = api.cluster.loads().into_iter();
        Self {
            state,
            standing: api.cluster.standing(),
            heard: heard.map(|hint| (hint.report.node, hint)).collect(),
            here: api.facts.id,
            now: api.clock.now(),
        }
    }

    /// One of them as clients see it.
    pub(super) fn shape(&self, node: &Node) -> NodeShape {
        let state = self.state_of(node);
        let reserved = self.state.reserved(node.id);
        let load = self.heard.get(&node.id);
        NodeShape {
            id: node.id.to_string(),
            name: node.name.clone(),
            url: node.api_url.clone(),
            address: node.cluster_address.clone(),
            role: self.role_of(node),
            leader: self.standing.leader == Some(node.id),
            state,
            since: node.liveness.since().and_then(timestamp),
            alive: state == "alive",
            cordoned: node.cordoned,
            draining: node.draining,
            last_seen: self.last_seen(node.id),
            tags: node.tags.clone(),
            team: node.team.map(|team| team.to_string()),
            version: node.version.clone(),
            vmm: node.vmm.clone(),
            vmm_version: node.vmm_version.clone(),
            accelerator: node.accelerator.clone(),
            capacity: node.capacity.into(),
            capsules: reserved.sandboxes,
            reserved: reserved.into(),
            load: load.map(LoadShape::from),
            joined_at: timestamp(node.admitted_at),
        }
    }

    fn role_of(&self, node: &Node) -> &'static str {
        if node.team.is_some() {
            "host"
        } else if self.standing.voters.contains(&node.id) {
            "voter"
        } else if self.standing.learners.contains(&node.id) {
            "learner"
        } else {
            "mirror"
        }
    }

    /// What the log says wins; between two of its verdicts, what was heard.
    fn state_of(&self, node: &Node) -> &'static str {
        let is_silent = self.heard.get(&node.id).is_some_and(Hint::is_suspect);
        match node.liveness {
            Liveness::Missing { .. } => "missing",
            Liveness::Lost { .. } => "lost",
            Liveness::Alive if is_silent && node.id != self.here => "suspect",
            Liveness::Alive => "alive",
        }
    }

    /// When a node was last heard.
    pub(super) fn last_seen(&self, node: NodeId) -> Option<Timestamp> {
        if node == self.here {
            return timestamp(self.now);
        }
        let age_ms = self.heard.get(&node)?.age.as_millis();
        let age_ms = u64::try_from(age_ms).unwrap_or(u64::MAX);
        timestamp(Stamp(self.now.0.saturating_sub(age_ms)))
    }
}

impl From<Resources> for ResourcesShape {
    fn from(all: Resources) -> Self {
        Self {
            vcpus: all.vcpus,
            memory_mb: all.memory.0,
            disk_mb: all.disk.0,
            capsules: all.sandboxes,
        }
    }
}

impl From<&Hint> for LoadShape {
    fn from(hint: &Hint) -> Self {
        let report = &hint.report;
        Self {
            free: report.free.into(),
            running: report.running,
            applied_index: report.applied,
            create_p95_ms: u64::try_from(report.create_p95.as_millis()).unwrap_or(u64::MAX),
        }
    }
}
