//! A host as clients see it: a node, or a join token that nobody has joined by yet.
//!
//! A node's host id is its number, a token's the token's own, so both are known at every node and neither needs a
//! row. The id of a token leads to its node once one has joined, as long as the token is remembered.

use jiff::Timestamp;
use proto::ids::{HostId, ParseIdError, TeamId};
use raft::state::{Node, State, Token};
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::node_shape::Nodes;
use super::nodes::{is_visible, named};
use super::wire::timestamp;

/// The tag that says who provides a host.
pub(super) const PROVIDER_TAG: &str = "provider";
/// The tag that says what fails together with it.
pub(super) const ZONE_TAG: &str = "zone";
/// The value of a tag that has none.
pub(super) const PLAIN_TAG: &str = "true";

/// A host as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HostShape {
    #[schema(example = "host-0000000000000000000000001")]
    id: String,
    /// `byoc` for a host of one team, else `regular`.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    kind: &'static str,
    /// The only team it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    team_id: Option<String>,
    /// That team's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    team_name: Option<String>,
    /// Its tag `provider`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) provider: Option<String>,
    /// Its tag `zone`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) availability_zone: Option<String>,
    /// Processors it offers.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_cores: Option<u32>,
    /// Memory it offers.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_mb: Option<u32>,
    /// Disk it offers.
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_gb: Option<u32>,
    /// Where other nodes reach it.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    /// `pending` until it joins; then `online`, `draining`, or `unreachable` once its lease has run out.
    #[schema(value_type = String)]
    status: &'static str,
    /// When it was last heard.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    last_heartbeat_at: Option<Timestamp>,
    /// The API key that asked for it, as long as its token is remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    created_by: Option<String>,
    /// When it joined; of a pending one, when it was asked for.
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
    /// When something new was known of it.
    #[schema(value_type = Option<String>, format = DateTime)]
    updated_at: Option<Timestamp>,
    /// The node it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
}

/// What a host is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Host<'a> {
    Node(&'a Node),
    /// A token that somebody may still join by, or could before it expired.
    Pending(&'a Token),
}

impl<'a> Host<'a> {
    /// All that `caller` may see, the nodes first.
    pub(super) fn all(state: &'a State, caller: &Caller) -> Vec<Self> {
        let nodes = state.nodes().filter(|node| is_visible(node, caller));
        let pending = state.tokens().filter(|token| is_pending(token));
        let pending = pending.filter(|token| may_see(token, caller));
        let nodes = nodes.map(Self::Node);
        nodes.chain(pending.map(Self::Pending)).collect()
    }

    /// The one of this id, or the node of this id or name.
    pub(super) fn find(state: &'a State, caller: &Caller, name: &str) -> Result<Self, ApiError> {
        let found = if name.starts_with("host-") {
            let id = name.parse().map_err(|err: ParseIdError| {
                // What is no id names nothing, whoever asks.
                ApiError::invalid(err.to_string())
            })?;
            Self::of_id(state, id)
        } else {
            named(state, name).map(Self::Node)
        };
        let found = found.filter(|host| match host {
            Self::Node(node) => is_visible(node, caller),
            Self::Pending(token) => may_see(token, caller),
        });
        found.ok_or_else(|| no_host(name))
    }

    fn of_id(state: &'a State, id: HostId) -> Option<Self> {
        if let Some(node) = id.node() {
            return state.node(node).map(Self::Node);
        }
        let token = state.token(id.token())?;
        match token.redeemed.first() {
            Some((_, node)) => state.node(*node).map(Self::Node),
            None => is_pending(token).then_some(Self::Pending(token)),
        }
    }

    /// As clients see it.
    pub(super) fn shape(self, nodes: &Nodes<'_>, state: &State) -> HostShape {
        match self {
            Self::Node(node) => of_node(nodes, state, node),
            Self::Pending(token) => of_token(state, token),
        }
    }
}

/// Whether it stands for a host that is to join: one use of those of many has no host of its own.
fn is_pending(token: &Token) -> bool {
    !token.revoked && token.uses_left > 0 && token.redeemed.is_empty()
}

fn may_see(token: &Token, caller: &Caller) -> bool {
    token.team == Some(caller.team) || caller.is_platform()
}

fn no_host(name: &str) -> ApiError {
    let shown: String = name.chars().take(64).collect();
    ApiError::new(Code::NotFound, format!("no host {shown:?}"))
}

fn of_node(nodes: &Nodes<'_>, state: &State, node: &Node) -> HostShape {
    let heard = nodes.last_seen(node.id);
    let joined = timestamp(node.admitted_at);
    let joined_by = |token: &&Token| token.redeemed.iter().any(|(_, id)| *id == node.id);
    let token = state.tokens().find(joined_by);
    HostShape {
        provider: node.tags.get(PROVIDER_TAG).cloned(),
        availability_zone: node.tags.get(ZONE_TAG).cloned(),
        cpu_cores: Some(node.capacity.vcpus),
        memory_mb: Some(node.capacity.memory.0),
        disk_gb: Some(node.capacity.disk.0 / 1024),
        address: Some(node.cluster_address.clone()),
        status: match (node.liveness.is_alive(), node.draining) {
            (false, _) => "unreachable",
            (true, true) => "draining",
            (true, false) => "online",
        },
        last_heartbeat_at: heard,
        created_by: token.map(|token| token.created_by.clone()),
        created_at: joined,
        updated_at: heard
            .max(node.liveness.since().and_then(timestamp))
            .or(joined),
        node: Some(node.id.to_string()),
        ..bare(state, node.id.into(), node.team)
    }
}

fn of_token(state: &State, token: &Token) -> HostShape {
    let created_at = timestamp(token.created_at);
    HostShape {
        created_by: Some(token.created_by.clone()),
        created_at,
        updated_at: created_at,
        ..bare(state, token.id.into(), token.team)
    }
}

/// What a host is that nothing is known of yet.
fn bare(state: &State, id: HostId, team: Option<TeamId>) -> HostShape {
    let named = team.and_then(|team| state.team(team));
    HostShape {
        id: id.to_string(),
        kind: match team {
            None => "regular",
            Some(_) => "byoc",
        },
        team_id: team.map(|team| team.to_string()),
        team_name: named.map(|team| team.name.clone()),
        provider: None,
        availability_zone: None,
        cpu_cores: None,
        memory_mb: None,
        disk_gb: None,
        address: None,
        status: "pending",
        last_heartbeat_at: None,
        created_by: None,
        created_at: None,
        updated_at: None,
        node: None,
    }
}
