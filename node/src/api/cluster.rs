//! The cluster as a whole: who orders its log, and what operators set for all nodes.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use proto::ids::NodeId;
use raft::command::Command;
use raft::state::Settings;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::{Admin, Caller};
use super::error::ApiError;
use super::extract::JsonBody;
use super::reading::{Answered, Reading};
use super::state::ApiState;
use super::wire::timestamp;

/// The cluster as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ClusterShape {
    /// Made when it was founded.
    id: Option<String>,
    /// When that was.
    #[schema(value_type = Option<String>, format = DateTime)]
    founded_at: Option<Timestamp>,
    /// The node that leads, as far as this one knows.
    leader: Option<String>,
    /// Since which election.
    term: u64,
    /// The last entry of the log that this node has applied.
    applied_index: u64,
    /// Nodes whose votes count.
    voters: Vec<String>,
    /// Nodes that receive the log without a vote.
    learners: Vec<String>,
    /// Whether a change of these is under way; then `voters` names those of before and after.
    changing: bool,
    /// How many nodes there are, mirrors included.
    nodes: usize,
    /// Whether most voters are in touch, as far as this node can tell. Without, nothing changes.
    quorum: bool,
    /// What operators set for all nodes.
    settings: SettingsShape,
}

/// What operators set for all nodes.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
struct SettingsShape {
    /// Most voters: 1, 3, 5 or 7.
    max_voters: u32,
    /// Most nodes that receive the log without a vote; further ones are mirrors.
    max_learners: u32,
    /// Seconds that a node's lease runs after it was asked for.
    lease_ttl_sec: u64,
    /// Seconds that guests stay frozen after their lease before they are killed.
    lease_grace_sec: u64,
    /// On how many nodes each snapshot shall lie.
    replicas: u32,
    /// Requests a second that each node takes of one API key; 0 is the default of 1000, and 5000 at once.
    key_rate: u32,
    /// How many of those may come at once.
    key_burst: u32,
}

/// Settings to change; what is left out stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeSettings {
    /// Most voters: 1, 3, 5 or 7.
    max_voters: Option<u32>,
    /// Most nodes that receive the log without a vote.
    max_learners: Option<u32>,
    /// Seconds that a node's lease runs.
    lease_ttl_sec: Option<u64>,
    /// Seconds that guests stay frozen after their lease.
    lease_grace_sec: Option<u64>,
    /// On how many nodes each snapshot shall lie: 1 to 7.
    replicas: Option<u32>,
    /// Requests a second that each node takes of one API key; 0 is the default of 1000, and 5000 at once.
    key_rate: Option<u32>,
    /// How many of those may come at once; twice `key_rate` where only that is given.
    key_burst: Option<u32>,
}

/// Shows the cluster.
#[utoipa::path(
    get, path = "/v1/cluster", tag = "cluster", params(super::reading::ReadQuery),
    responses((status = 200, body = ClusterShape))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    _: Caller,
    reading: Reading,
) -> Answered<Json<ClusterShape>> {
    reading.answer(Json(ClusterShape::new(&api)))
}

/// Changes settings of the cluster.
#[utoipa::path(
    patch, path = "/v1/cluster", tag = "cluster", request_body = ChangeSettings,
    responses((status = 200, body = ClusterShape))
)]
pub(super) async fn change(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    JsonBody(request): JsonBody<ChangeSettings>,
) -> Result<Json<ClusterShape>, ApiError> {
    // What is left out must stay as it is now, not as this node last heard.
    api.cluster.linearize().await?;
    let settings = request.over(api.view.state().settings());
    settings.check().map_err(ApiError::invalid)?;
    api.propose(&caller, Command::PutSettings(settings)).await?;
    Ok(Json(ClusterShape::new(&api)))
}

impl ChangeSettings {
    fn over(&self, known: Settings) -> Settings {
        let seconds = |asked: Option<u64>, known| asked.map_or(known, Duration::from_secs);
        Settings {
            max_voters: self.max_voters.unwrap_or(known.max_voters),
            max_learners: self.max_learners.unwrap_or(known.max_learners),
            lease_ttl: seconds(self.lease_ttl_sec, known.lease_ttl),
            lease_grace: seconds(self.lease_grace_sec, known.lease_grace),
            replicas: self.replicas.unwrap_or(known.replicas),
            key_rate: self.key_rate.unwrap_or(known.key_rate),
            key_burst: self.burst_over(known),
        }
    }

    fn burst_over(&self, known: Settings) -> u32 {
        match (self.key_burst, self.key_rate) {
            (Some(burst), _) => burst,
            (None, Some(rate)) => rate.saturating_mul(2),
            (None, None) => known.key_burst,
        }
    }
}

impl ClusterShape {
    fn new(api: &ApiState) -> Self {
        let applied_index = api.view.applied();
        let state = api.view.state();
        let standing = api.cluster.standing();
        let cluster = state.cluster();
        let name = |id: &NodeId| id.to_string();
        Self {
            id: cluster.map(|cluster| cluster.id.to_string()),
            founded_at: cluster.and_then(|cluster| timestamp(cluster.founded_at)),
            leader: standing.leader.as_ref().map(name),
            term: standing.term,
            applied_index,
            voters: standing.voters.iter().map(name).collect(),
            learners: standing.learners.iter().map(name).collect(),
            changing: standing.is_changing,
            nodes: state.nodes().count(),
            quorum: standing.has_quorum,
            settings: state.settings().into(),
        }
    }
}

impl From<Settings> for SettingsShape {
    fn from(settings: Settings) -> Self {
        Self {
            max_voters: settings.max_voters,
            max_learners: settings.max_learners,
            lease_ttl_sec: settings.lease_ttl.as_secs(),
            lease_grace_sec: settings.lease_grace.as_secs(),
            replicas: settings.replicas,
            key_rate: settings.key_rate,
            key_burst: settings.key_burst,
        }
    }
}
