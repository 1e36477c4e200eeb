//! The nodes of the cluster: showing them, and what operators do with them. Which role a node has
//! is nobody's to say: the leader decides.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use proto::ids::{NodeId, SandboxId};
use raft::command::{Command, StopCause};
use raft::state::{self, Node};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::info;
use utoipa::{IntoParams, ToSchema};

use super::auth::{Admin, Caller};
use super::create::check_tags;
use super::error::{ApiError, Code};
use super::extract::{JsonBody, OptionalJson, PathName, QueryOf};
use super::node_shape::{NodeShape, Nodes};
use super::reading::{Answered, Reading};
use super::state::ApiState;

/// How long a drain waits where nobody says: client libraries give up on a request after 30 s.
pub(super) const DRAIN_WAIT: Duration = Duration::from_secs(20);
/// Longest a drain may be asked to wait.
const MAX_DRAIN_WAIT: Duration = Duration::from_secs(600);

/// Lists the nodes. A host of one team is shown to that team and to administrators.
#[utoipa::path(
    get, path = "/v1/nodes", tag = "cluster", params(super::reading::ReadQuery),
    responses((status = 200, body = Vec<NodeShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
) -> Answered<Json<Vec<NodeShape>>> {
    let state = api.view.state();
    let nodes = Nodes::new(&api, &state);
    let visible = state.nodes().filter(|node| is_visible(node, &caller));
    reading.answer(Json(visible.map(|node| nodes.shape(node)).collect()))
}

/// Shows one node, by id or name.
#[utoipa::path(
    get, path = "/v1/nodes/{node}", tag = "cluster",
    params(("node" = String, Path), super::reading::ReadQuery),
    responses((status = 200, body = NodeShape))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(name): PathName,
    reading: Reading,
) -> Result<Answered<Json<NodeShape>>, ApiError> {
    let shape = api.found(|state| {
        let node = named(&state, &name).filter(|node| is_visible(node, &caller));
        let node = node.ok_or_else(|| no_node(&name))?;
        Ok(Nodes::new(&api, &state).shape(node))
    });
    Ok(reading.answer(Json(shape.await?)))
}

/// Lets a node take no new capsules.
#[utoipa::path(
    post, path = "/v1/nodes/{node}/cordon", tag = "cluster", params(("node" = String, Path)),
    responses((status = 200, body = NodeShape))
)]
pub(super) async fn cordon(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
) -> Result<Json<NodeShape>, ApiError> {
    let id = id_of(&api, &name).await?;
    change(&api, &caller, id, (Some(true), None), None).await
}

/// Lets a node take capsules again; a drain ends.
#[utoipa::path(
    post, path = "/v1/nodes/{node}/uncordon", tag = "cluster", params(("node" = String, Path)),
    responses((status = 200, body = NodeShape))
)]
pub(super) async fn uncordon(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
) -> Result<Json<NodeShape>, ApiError> {
    let id = id_of(&api, &name).await?;
    change(&api, &caller, id, (Some(false), Some(false)), None).await
}

/// Replaces a node's tags.
#[utoipa::path(
    put, path = "/v1/nodes/{node}/tags", tag = "cluster", params(("node" = String, Path)),
    request_body = BTreeMap<String, String>, responses((status = 200, body = NodeShape))
)]
pub(super) async fn tag(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
    JsonBody(tags): JsonBody<BTreeMap<String, String>>,
) -> Result<Json<NodeShape>, ApiError> {
    check_tags("tags", &tags)?;
    let id = id_of(&api, &name).await?;
    change(&api, &caller, id, (None, None), Some(tags)).await
}

/// How to empty a node.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Drain {
    /// Stop its capsules instead of waiting until they end.
    stop_capsules: bool,
    /// Seconds to wait until it is empty; 20 where absent, 600 at most.
    timeout_sec: Option<u64>,
}

/// How far a drain got.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Drained {
    /// Whether nothing is left.
    drained: bool,
    /// Capsules that are left.
    capsules: Vec<String>,
    node: NodeShape,
}

/// Empties a node: it takes nothing new, hands its leadership and its vote over, and its capsules
/// end by themselves or are stopped. Asking again goes on waiting.
#[utoipa::path(
    post, path = "/v1/nodes/{node}/drain", tag = "cluster", params(("node" = String, Path)),
    request_body = Drain,
    responses(
        (status = 200, description = "It is empty.", body = Drained),
        (status = 202, description = "Capsules are left.", body = Drained),
    )
)]
pub(super) async fn drain(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
    OptionalJson(request): OptionalJson<Drain>,
) -> Result<(StatusCode, Json<Drained>), ApiError> {
    let wait = request.timeout_sec.map_or(DRAIN_WAIT, Duration::from_secs);
    if wait > MAX_DRAIN_WAIT {
        let most = MAX_DRAIN_WAIT.as_secs();
        return Err(ApiError::invalid(format!("timeout_sec is {most} at most")));
    }
    let deadline = Instant::now() + wait;
    let id = id_of(&api, &name).await?;
    let _shape = change(&api, &caller, id, (Some(true), Some(true)), None).await?;
    info!(node = %id, stop = request.stop_capsules, "draining");
    if request.stop_capsules {
        stop_all(&api, &caller, held(&api.view.state(), id)).await?;
    }
    let empty = |state: &state::State| held(state, id).is_empty().then_some(());
    let _timed_out = api.view.wait_for(deadline, empty).await;
    let state = api.view.state();
    let capsules: Vec<String> = held(&state, id).iter().map(SandboxId::to_string).collect();
    let node = state.node(id).ok_or_else(|| no_node(&name))?;
    let (drained, node) = (capsules.is_empty(), Nodes::new(&api, &state).shape(node));
    let status = if drained {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((
        status,
        Json(Drained {
            drained,
            capsules,
            node,
        }),
    ))
}

/// How to take a node out.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default)]
pub(super) struct RemoveQuery {
    /// Declares the host dead for good: its capsules are given up, and those that may be are
    /// started on other nodes. If it is not dead, one of them may then run twice.
    force: bool,
}

/// Takes a node out of the cluster. Its connections close at once and its key is not taken again.
#[utoipa::path(
    delete, path = "/v1/nodes/{node}", tag = "cluster",
    params(("node" = String, Path), RemoveQuery),
    responses((status = 204), (status = 409, description = "It has capsules."))
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
    QueryOf(query): QueryOf<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    // An id is enough, also one that was removed before: doing so again succeeds.
    let node = match name.parse() {
        Ok(id) => id,
        Err(_) => id_of(&api, &name).await?,
    };
    take_out(&api, &caller, (node, &name), query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a node out, which the caller calls `name`.
pub(super) async fn take_out(
    api: &ApiState,
    caller: &Caller,
    (node, name): (NodeId, &str),
    declared_dead: bool,
) -> Result<(), ApiError> {
    if is_needed(api, node) {
        let why = format!(
            "{name} votes, and the others cannot decide without it: drain it, and wait until its \
             vote has gone over"
        );
        return Err(ApiError::new(Code::InvalidState, why));
    }
    let remove = Command::RemoveNode {
        node,
        declared_dead,
    };
    api.propose(caller, remove).await?;
    info!(%node, declared_dead, "removed");
    Ok(())
}

/// Whether the cluster could decide nothing once `node` is out, which closes its connections at once:
/// it votes, and the other voters that are there are no majority. What is away, has capsules or is the
/// last of all is judged when the command is applied.
fn is_needed(api: &ApiState, node: NodeId) -> bool {
    let voters = api.cluster.standing().voters;
    let state = api.view.state();
    let is_there = |id: NodeId| state.node(id).is_some_and(|it| it.liveness.is_alive());
    let others = voters.iter().filter(|id| **id != node && is_there(**id));
    let mut full_members = state.nodes().filter(|it| it.team.is_none());
    voters.contains(&node)
        && full_members.any(|it| it.id != node)
        && is_there(node)
        && state.reserved(node).sandboxes == 0
        && others.count() * 2 <= voters.len()
}

/// The node of this id or name.
pub(super) fn named<'a>(state: &'a state::State, name: &str) -> Option<&'a Node> {
    let by_id = name.parse().ok().and_then(|id: NodeId| state.node(id));
    by_id.or_else(|| state.nodes().find(|node| node.name == name))
}

/// What a client is told that names another node.
pub(super) fn no_node(name: &str) -> ApiError {
    let shown: String = name.chars().take(64).collect();
    ApiError::new(Code::NotFound, format!("no node {shown:?}"))
}

/// The id of the node of this id or name.
pub(super) async fn id_of(api: &ApiState, name: &str) -> Result<NodeId, ApiError> {
    let known = api.found(|state| {
        let node = named(&state, name).map(|node| node.id);
        node.ok_or_else(|| no_node(name))
    });
    known.await
}

/// Whether a node is shown to a caller.
pub(super) fn is_visible(node: &Node, caller: &Caller) -> bool {
    node.team.is_none_or(|team| team == caller.team) || caller.is_platform()
}

/// What an operator decides about a node: whether it is cordoned and draining, and its tags.
pub(super) async fn change(
    api: &ApiState,
    caller: &Caller,
    node: NodeId,
    (cordoned, draining): (Option<bool>, Option<bool>),
    tags: Option<BTreeMap<String, String>>,
) -> Result<Json<NodeShape>, ApiError> {
    let command = Command::ChangeNode {
        node,
        cordoned,
        draining,
        tags,
    };
    api.propose(caller, command).await?;
    let state = api.view.state();
    let known = state.node(node);
    let known = known.ok_or_else(|| no_node(&node.to_string()))?;
    Ok(Json(Nodes::new(api, &state).shape(known)))
}

/// Sandboxes that hold something of a node.
fn held(state: &state::State, node: NodeId) -> Vec<SandboxId> {
    let here = state.sandboxes().filter(|it| it.owner == node);
    here.filter(|it| it.phase.holds_resources())
        .map(|it| it.id)
        .collect()
}

/// Has these sandboxes stopped.
pub(super) async fn stop_all(
    api: &ApiState,
    caller: &Caller,
    sandboxes: Vec<SandboxId>,
) -> Result<(), ApiError> {
    for id in sandboxes {
        let cause = StopCause::Asked;
        api.propose(caller, Command::StopSandbox { id, cause })
            .await?;
    }
    Ok(())
}
