//! Hosts as other servers of this interface have them: nodes and join tokens by another name.
//!
//! | here | there |
//! |---|---|
//! | a host that has joined | a node |
//! | a host that is `pending` | a join token that nobody has joined by |
//! | `registration_token` | the token's secret, for `wrenn node start --join` |
//! | a tag `key=value` | a node's tag; `key` alone stands for `key=true` |
//!
//! What hosts call themselves there, to register and to say that they live, they do here over their own
//! connections: [`later`](super::later) says so.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use proto::ids::{NodeId, SandboxId};
use raft::command::Command;
use raft::state::{self, Node};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::auth::{Admin, Caller};
use super::create::check_tags;
use super::error::{ApiError, Code, ErrorBody};
use super::extract::{JsonBody, PathName, PathPair, QueryOf};
use super::host_shape::{Host, HostShape, PLAIN_TAG, PROVIDER_TAG, ZONE_TAG};
use super::node_shape::Nodes;
use super::nodes::{DRAIN_WAIT, change, stop_all, take_out};
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::tokens::{self, CreateToken};

/// A host that is to join.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct CreateHost {
    /// `regular`, where absent, or `byoc` for a host of one team.
    #[serde(rename = "type")]
    #[schema(value_type = Option<String>)]
    kind: Option<Kind>,
    /// The team that a `byoc` host serves.
    team_id: Option<String>,
    /// Becomes its tag `provider`, by way of the join command.
    provider: Option<String>,
    /// Becomes its tag `zone`, by way of the join command.
    availability_zone: Option<String>,
}

/// Whom a host serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    #[default]
    Regular,
    Byoc,
}

/// A host, and how it joins.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NewHost {
    host: HostShape,
    /// The whole join token. Whoever has it may join within the hour; it is not shown again.
    registration_token: String,
    /// What to run on the host.
    join_command: String,
}

/// What a host's end would end.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Preview {
    host: HostShape,
    /// The capsules it runs, and those at rest of which nobody else has a copy.
    capsule_ids: Vec<String>,
    /// The same by the name that earlier clients know.
    sandbox_ids: Vec<String>,
}

/// Why a host stays.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HasSandboxes {
    #[serde(flatten)]
    error: ErrorBody,
    /// The capsules it has.
    capsule_ids: Vec<String>,
    /// The same by the name that earlier clients know.
    sandbox_ids: Vec<String>,
}

/// A tag of a host.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AddTag {
    /// `key=value`, or `key` alone.
    tag: String,
}

/// How to take a host out.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default)]
pub(super) struct RemoveHostQuery {
    /// Stops its capsules first, and ends those at rest of which nobody else has a copy. A host that
    /// cannot be reached is declared dead.
    force: bool,
}

/// Asks for a host: the answer has the token by which it joins.
#[utoipa::path(
    post, path = "/v1/hosts", tag = "hosts", request_body = CreateHost,
    responses((status = 201, body = NewHost))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    JsonBody(request): JsonBody<CreateHost>,
) -> Result<(StatusCode, Json<NewHost>), ApiError> {
    match (request.kind.unwrap_or_default(), &request.team_id) {
        (Kind::Regular, None) | (Kind::Byoc, Some(_)) => {}
        (Kind::Regular, Some(_)) => {
            return Err(ApiError::invalid(
                "a regular host serves every team: type must be byoc",
            ));
        }
        (Kind::Byoc, None) => {
            return Err(ApiError::invalid(
                "a byoc host serves one team: team_id must be given",
            ));
        }
    }
    let wanted = [
        (PROVIDER_TAG, request.provider),
        (ZONE_TAG, request.availability_zone),
    ];
    let tags = wanted
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)));
    invite(&api, &caller, request.team_id, tags.collect()).await
}

/// Lists the hosts: the nodes, and those that are to join. A host of one team is shown to that team and to
/// administrators.
#[utoipa::path(
    get, path = "/v1/hosts", tag = "hosts", params(ReadQuery),
    responses((status = 200, body = Vec<HostShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
) -> Answered<Json<Vec<HostShape>>> {
    let state = api.view.state();
    let nodes = Nodes::new(&api, &state);
    let hosts = Host::all(&state, &caller).into_iter();
    reading.answer(Json(hosts.map(|host| host.shape(&nodes, &state)).collect()))
}

/// Shows one host, by its id, or by its node's id or name.
#[utoipa::path(
    get, path = "/v1/hosts/{id}", tag = "hosts", params(("id" = String, Path), ReadQuery),
    responses((status = 200, body = HostShape))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(name): PathName,
    reading: Reading,
) -> Result<Answered<Json<HostShape>>, ApiError> {
    let shape = api.found(|state| {
        let host = Host::find(&state, &caller, &name)?;
        Ok(host.shape(&Nodes::new(&api, &state), &state))
    });
    Ok(reading.answer(Json(shape.await?)))
}

/// What would end with a host that went now. Nothing changes.
#[utoipa::path(
    get, path = "/v1/hosts/{id}/delete-preview", tag = "hosts",
    params(("id" = String, Path), ReadQuery), responses((status = 200, body = Preview))
)]
pub(super) async fn preview(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
    reading: Reading,
) -> Result<Answered<Json<Preview>>, ApiError> {
    let preview = api.found(|state| {
        let host = Host::find(&state, &caller, &name)?;
        let concerned = match host {
            Host::Node(node) => in_words(&state.lost_with(node.id)),
            Host::Pending(_) => Vec::new(),
        };
        Ok(Preview {
            host: host.shape(&Nodes::new(&api, &state), &state),
            sandbox_ids: concerned.clone(),
            capsule_ids: concerned,
        })
    });
    Ok(reading.answer(Json(preview.await?)))
}

/// Takes a host out; one that has not joined cannot do so any more. What it has it keeps, and stays, unless
/// `force` is given; then its capsules are stopped first, and if some do not end in time it stays and drains.
#[utoipa::path(
    delete, path = "/v1/hosts/{id}", tag = "hosts", params(("id" = String, Path), RemoveHostQuery),
    responses(
        (status = 204),
        (status = 409, description = "It has capsules, or is needed.", body = HasSandboxes),
    )
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
    QueryOf(query): QueryOf<RemoveHostQuery>,
) -> Result<StatusCode, Stays> {
    let state = holding(&api, &caller, &name).await?;
    match Host::find(&state, &caller, &name)? {
        Host::Pending(token) => {
            let revoked = api.propose(&caller, Command::RevokeToken(token.id));
            revoked.await.map_err(ApiError::from)?;
        }
        Host::Node(node) => {
            let has = state.lost_with(node.id);
            if !query.force && !has.is_empty() {
                return Err(Stays::Has(node.name.clone(), has));
            }
            if query.force {
                empty(&api, &caller, node).await?;
            }
            let is_dead = query.force && !node.liveness.is_alive();
            take_out(&api, &caller, (node.id, &node.name), is_dead).await?;
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a host that has not joined yet a new token. The old one is withdrawn, and since such a host is
/// known by its token, its id is new too.
#[utoipa::path(
    post, path = "/v1/hosts/{id}/token", tag = "hosts", params(("id" = String, Path)),
    responses((status = 201, body = NewHost), (status = 409, description = "It has joined."))
)]
pub(super) async fn renew(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
) -> Result<(StatusCode, Json<NewHost>), ApiError> {
    let state = holding(&api, &caller, &name).await?;
    let token = match Host::find(&state, &caller, &name)? {
        Host::Pending(token) => token,
        Host::Node(node) => {
            let why = format!(
                "{} has joined, and proves itself by its own key; a machine that takes its place is \
                 a new host: POST /v1/hosts",
                node.name
            );
            return Err(ApiError::new(Code::InvalidState, why));
        }
    };
    let team = token.team.map(|team| team.to_string());
    let invited = invite(&api, &caller, team, BTreeMap::new()).await?;
    api.propose(&caller, Command::RevokeToken(token.id)).await?;
    Ok(invited)
}

/// Lists a host's tags.
#[utoipa::path(
    get, path = "/v1/hosts/{id}/tags", tag = "hosts", params(("id" = String, Path), ReadQuery),
    responses((status = 200, body = Vec<String>))
)]
pub(super) async fn tags(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(name): PathName,
    reading: Reading,
) -> Result<Answered<Json<Vec<String>>>, ApiError> {
    let tags = api.found(|state| {
        Ok(match Host::find(&state, &caller, &name)? {
            Host::Node(node) => node.tags.iter().map(spelled).collect(),
            Host::Pending(_) => Vec::new(),
        })
    });
    Ok(reading.answer(Json(tags.await?)))
}

/// Tags a host; a tag of the same key is replaced. Of two who change one host's tags at the same moment, the
/// later wins.
#[utoipa::path(
    post, path = "/v1/hosts/{id}/tags", tag = "hosts", params(("id" = String, Path)),
    request_body = AddTag, responses((status = 204))
)]
pub(super) async fn tag(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(name): PathName,
    JsonBody(request): JsonBody<AddTag>,
) -> Result<StatusCode, ApiError> {
    let (node, mut tags) = tagged(&api, &caller, &name).await?;
    let (key, value) = parsed(&request.tag);
    tags.insert(key.to_owned(), value.unwrap_or(PLAIN_TAG).to_owned());
    check_tags("tag", &tags)?;
    let _shape = change(&api, &caller, node, (None, None), Some(tags)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a tag off a host, by `key=value` or by `key`; doing so again succeeds.
#[utoipa::path(
    delete, path = "/v1/hosts/{id}/tags/{tag}", tag = "hosts",
    params(("id" = String, Path), ("tag" = String, Path)), responses((status = 204))
)]
pub(super) async fn untag(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathPair(name, tag): PathPair,
) -> Result<StatusCode, ApiError> {
    let (node, mut tags) = tagged(&api, &caller, &name).await?;
    let (key, value) = parsed(&tag);
    let known = tags.get(key);
    if known.is_some_and(|known| value.is_none_or(|value| known == value)) {
        tags.remove(key);
        let _shape = change(&api, &caller, node, (None, None), Some(tags)).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Why a host is not taken out.
#[derive(Debug)]
pub(super) enum Stays {
    /// It has these, and its name.
    Has(String, Vec<SandboxId>),
    Other(ApiError),
}

impl From<ApiError> for Stays {
    fn from(err: ApiError) -> Self {
        Self::Other(err)
    }
}

impl IntoResponse for Stays {
    fn into_response(self) -> Response {
        let (name, has) = match self {
            Self::Other(err) => return err.into_response(),
            Self::Has(name, has) => (name, in_words(&has)),
        };
        let why = format!(
            "host {name} has {} of which nobody else has a copy, or which run there; ?force=true ends them",
            match has.len() {
                1 => "1 capsule".to_owned(),
                count => format!("{count} capsules"),
            }
        );
        let (status, _) = Code::HostHasSandboxes.wire();
        let body = HasSandboxes {
            error: ApiError::new(Code::HostHasSandboxes, why).body(),
            sandbox_ids: has.clone(),
            capsule_ids: has,
        };
        (status, Json(body)).into_response()
    }
}

/// Makes the token by which a host joins.
async fn invite(
    api: &ApiState,
    caller: &Caller,
    team: Option<String>,
    tags: BTreeMap<String, String>,
) -> Result<(StatusCode, Json<NewHost>), ApiError> {
    check_tags("the host's tags", &tags)?;
    let (token, minted) = tokens::make(api, caller, &CreateToken::of(team)).await?;
    let mut join_command = tokens::join_command(&minted);
    for (key, value) in &tags {
        join_command.push_str(&format!(" --tag {key}={value}"));
    }
    let state = api.view.state();
    let mut host = Host::Pending(&token).shape(&Nodes::new(api, &state), &state);
    host.provider = tags.get(PROVIDER_TAG).cloned();
    host.availability_zone = tags.get(ZONE_TAG).cloned();
    let answer = NewHost {
        host,
        registration_token: minted.text,
        join_command,
    };
    Ok((StatusCode::CREATED, Json(answer)))
}

/// Ends what would be lost with a node, and waits until that is done where it can be.
async fn empty(api: &ApiState, caller: &Caller, node: &Node) -> Result<(), Stays> {
    let state = api.view.state();
    let mut others = state.nodes().filter(|other| other.id != node.id);
    if node.team.is_none() && !others.any(|other| other.team.is_none()) {
        // Known before anything is stopped for it.
        let why = format!("{} is the last node of the cluster", node.name);
        return Err(ApiError::new(Code::InvalidState, why).into());
    }
    let deadline = Instant::now() + DRAIN_WAIT;
    let _shape = change(api, caller, node.id, (Some(true), Some(true)), None).await?;
    stop_all(api, caller, api.view.state().lost_with(node.id)).await?;
    if !node.liveness.is_alive() {
        // Nobody is there who could end them; they are given up with the node, and none starts again.
        return Ok(());
    }
    let gone = |state: &state::State| state.lost_with(node.id).is_empty().then_some(());
    let _timed_out = api.view.wait_for(deadline, gone).await;
    let left = api.view.state().lost_with(node.id);
    if left.is_empty() {
        Ok(())
    } else {
        Err(Stays::Has(node.name.clone(), left))
    }
}

/// A node's tags, of which all are written together.
async fn tagged(
    api: &ApiState,
    caller: &Caller,
    name: &str,
) -> Result<(NodeId, BTreeMap<String, String>), ApiError> {
    let tagged = api.found(|state| match Host::find(&state, caller, name)? {
        Host::Node(node) => Ok((node.id, node.tags.clone())),
        Host::Pending(_) => Err(ApiError::new(
            Code::InvalidState,
            "the host has not joined yet: it can be tagged once it has, or by --tag of its join command",
        )),
    });
    tagged.await
}

/// The state, which knows the host of this name.
async fn holding(api: &ApiState, caller: &Caller, name: &str) -> Result<state::State, ApiError> {
    let holds = |state| {
        Host::find(&state, caller, name)?;
        Ok(state)
    };
    api.found(holds).await
}

/// A tag in two.
fn parsed(tag: &str) -> (&str, Option<&str>) {
    tag.split_once('=')
        .map_or((tag, None), |(key, value)| (key, Some(value)))
}

fn spelled((key, value): (&String, &String)) -> String {
    if value == PLAIN_TAG {
        key.clone()
    } else {
        format!("{key}={value}")
    }
}

fn in_words(ids: &[SandboxId]) -> Vec<String> {
    ids.iter().map(SandboxId::to_string).collect()
}
