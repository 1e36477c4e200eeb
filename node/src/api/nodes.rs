//! The nodes of the cluster.

use axum::Json;
use axum::extract::State;
use raft::state::{Node, Resources};
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::Caller;
use super::state::ApiState;

/// A node as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NodeShape {
    /// Given out by the cluster, never reused.
    id: String,
    /// What people call it.
    name: String,
    /// Where its API answers.
    url: String,
    /// Its part in the cluster's decisions: `voter`.
    #[schema(value_type = String)]
    role: &'static str,
    /// Whether it leads them.
    leader: bool,
    /// Whether it is known to be up.
    alive: bool,
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
    /// Capsules that hold some of it.
    capsules: u32,
}

/// Amounts of what capsules need.
#[derive(Debug, Serialize, ToSchema)]
struct ResourcesShape {
    vcpus: u32,
    memory_mb: u32,
    disk_mb: u32,
    capsules: u32,
}

/// Lists the nodes.
#[utoipa::path(
    get, path = "/v1/nodes", tag = "cluster",
    responses((status = 200, body = Vec<NodeShape>))
)]
pub(super) async fn list(State(api): State<ApiState>, _: Caller) -> Json<Vec<NodeShape>> {
    let state = api.view.state();
    let shape = |node: &Node| NodeShape::new(&api, node, state.reserved(node.id));
    Json(state.nodes().map(shape).collect())
}

impl NodeShape {
    fn new(api: &ApiState, node: &Node, reserved: Resources) -> Self {
        // A cluster of one: this node votes, leads and answers. More need membership and liveness.
        let is_here = node.id == api.facts.id;
        Self {
            id: node.id.to_string(),
            name: node.name.clone(),
            url: node.api_url.clone(),
            role: "voter",
            leader: is_here,
            alive: is_here,
            version: node.version.clone(),
            vmm: node.vmm.clone(),
            vmm_version: node.vmm_version.clone(),
            accelerator: node.accelerator.clone(),
            capacity: node.capacity.into(),
            capsules: reserved.sandboxes,
            reserved: reserved.into(),
        }
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
