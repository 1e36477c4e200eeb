//! Notification channels: where a team is told of its events without asking.
//!
//! A channel is a URL that gets a signed POST for each event (`post.rs`), from whichever node leads
//! (`deliver.rs`), and only where it may go (`target.rs`). The secret is shown once, when it is made.

mod deliver;
mod post;
mod target;

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use jiff::Timestamp;
use proto::ids::ChannelId;
use raft::command::Command;
use raft::state::{self, Channel};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use self::target::{Target, TargetError};
use super::auth::Caller;
use super::error::{ApiError, Code};
use super::events::{KINDS, Message};
use super::extract::{JsonBody, PathName};
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::wire::timestamp;
use crate::base::chain::chain;

/// The only kind of receiver there is; the others of the client surface wait.
const WEBHOOK: &str = "webhook";
/// What a client may ask for beside that, and is told to put a webhook in front of.
const OTHER_PROVIDERS: [&str; 6] = [
    "discord",
    "slack",
    "teams",
    "googlechat",
    "telegram",
    "matrix",
];
/// Longest name.
const MAX_NAME_CHARS: usize = 64;
/// Shortest and longest secret of a client's own.
const SECRET_CHARS: std::ops::RangeInclusive<usize> = 16..=128;
/// Bytes of randomness in a secret of ours.
const SECRET_BYTES: usize = 32;

/// A channel to make.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateChannel {
    /// What people call it.
    name: String,
    /// `webhook`, where absent.
    provider: Option<String>,
    config: ChannelConfig,
    /// The kinds of events that are sent, such as `capsule.create`; all where absent or empty.
    events: Option<BTreeSet<String>>,
    /// Whether anything is sent; it is where absent.
    enabled: Option<bool>,
}

/// Where and how events are sent.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChannelConfig {
    /// `https://` or `http://`, to a public address.
    url: String,
    /// What deliveries are signed with, 16 to 128 characters; made where absent.
    secret: Option<String>,
}

/// What may be changed of a channel; what is absent stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ChangeChannel {
    name: Option<String>,
    events: Option<BTreeSet<String>>,
    enabled: Option<bool>,
}

/// What to try.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TestChannel {
    /// The channel.
    id: String,
}

/// What came of a try.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Tested {
    delivered: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// A channel as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChannelShape {
    #[schema(example = "ch-0000000000000000000000001")]
    id: String,
    name: String,
    /// `webhook`.
    #[schema(value_type = String)]
    provider: &'static str,
    config: ShownConfig,
    /// The kinds of events that are sent; all where it is empty.
    events: BTreeSet<String>,
    enabled: bool,
    /// Events that were delivered.
    delivered: u64,
    /// Events that were given up after a day.
    given_up: u64,
    /// Why the last try failed; left out where it did not.
    #[serde(skip_serializing_if = "String::is_empty")]
    last_error: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    updated_at: Option<Timestamp>,
}

/// Where events are sent.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ShownConfig {
    url: String,
    /// Shown once, when it was just made.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

/// The channel that a path names.
pub(super) struct InPath(ChannelId);

impl<S: Send + Sync> FromRequestParts<S> for InPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let PathName(text) = PathName::from_request_parts(parts, state).await?;
        id_of(&text).map(Self)
    }
}

/// Makes a channel. It is told of what happens from now on.
#[utoipa::path(
    post, path = "/v1/channels", tag = "channels", request_body = CreateChannel,
    responses((status = 201, description = "With its secret.", body = ChannelShape))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    caller: Caller,
    JsonBody(request): JsonBody<CreateChannel>,
) -> Result<(StatusCode, Json<ChannelShape>), ApiError> {
    check_provider(request.provider.as_deref())?;
    check_name(&request.name)?;
    let kinds = request.events.unwrap_or_default();
    check_kinds(&kinds)?;
    let (url, secret) = checked(&api, request.config).await?;
    let secret = secret.unwrap_or_else(new_secret);
    let id = ChannelId(rand::random());
    let channel = Channel {
        id,
        team: caller.team,
        name: request.name,
        url,
        secret: secret.clone(),
        kinds,
        enabled: request.enabled.unwrap_or(true),
        ..Channel::default()
    };
    api.propose(&caller, Command::PutChannel(channel)).await?;
    let mut shape = shown(&api, &caller, id)?;
    shape.config.secret = Some(secret);
    Ok((StatusCode::CREATED, Json(shape)))
}

/// Lists the team's channels.
#[utoipa::path(
    get, path = "/v1/channels", tag = "channels", params(ReadQuery),
    responses((status = 200, body = Vec<ChannelShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
) -> Answered<Json<Vec<ChannelShape>>> {
    let state = api.view.state();
    let of_team = state.channels().filter(|it| it.team == caller.team);
    reading.answer(Json(of_team.map(ChannelShape::of).collect()))
}

/// Shows a channel.
#[utoipa::path(
    get, path = "/v1/channels/{id}", tag = "channels",
    params(("id" = String, Path), ReadQuery), responses((status = 200, body = ChannelShape))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    caller: Caller,
    InPath(id): InPath,
    reading: Reading,
) -> Result<Answered<Json<ChannelShape>>, ApiError> {
    let channel = known(&api, &caller, id).await?;
    Ok(reading.answer(Json(ChannelShape::of(&channel))))
}

/// Changes a channel.
#[utoipa::path(
    patch, path = "/v1/channels/{id}", tag = "channels", params(("id" = String, Path)),
    request_body = ChangeChannel, responses((status = 200, body = ChannelShape))
)]
pub(super) async fn change(
    State(api): State<ApiState>,
    caller: Caller,
    InPath(id): InPath,
    JsonBody(request): JsonBody<ChangeChannel>,
) -> Result<Json<ChannelShape>, ApiError> {
    let known = known(&api, &caller, id).await?;
    let next = Channel {
        name: request.name.unwrap_or_else(|| known.name.clone()),
        kinds: request.events.unwrap_or_else(|| known.kinds.clone()),
        enabled: request.enabled.unwrap_or(known.enabled),
        ..known
    };
    check_name(&next.name)?;
    check_kinds(&next.kinds)?;
    api.propose(&caller, Command::PutChannel(next)).await?;
    Ok(Json(shown(&api, &caller, id)?))
}

/// Sends a channel's events elsewhere.
#[utoipa::path(
    put, path = "/v1/channels/{id}/config", tag = "channels", params(("id" = String, Path)),
    request_body = ChannelConfig,
    responses((status = 200, description = "With its secret, if that is new.", body = ChannelShape))
)]
pub(super) async fn configure(
    State(api): State<ApiState>,
    caller: Caller,
    InPath(id): InPath,
    JsonBody(request): JsonBody<ChannelConfig>,
) -> Result<Json<ChannelShape>, ApiError> {
    let known = known(&api, &caller, id).await?;
    let (url, secret) = checked(&api, request).await?;
    let next = Channel {
        url,
        secret: secret.clone().unwrap_or_else(|| known.secret.clone()),
        ..known
    };
    api.propose(&caller, Command::PutChannel(next)).await?;
    let mut shape = shown(&api, &caller, id)?;
    shape.config.secret = secret;
    Ok(Json(shape))
}

/// Takes a channel away; doing so again succeeds.
#[utoipa::path(
    delete, path = "/v1/channels/{id}", tag = "channels", params(("id" = String, Path)),
    responses((status = 204))
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    caller: Caller,
    InPath(id): InPath,
) -> Result<StatusCode, ApiError> {
    let team = caller.team;
    api.propose(&caller, Command::DropChannel { team, id })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sends a channel a message of no event, once, and tells what came of it.
#[utoipa::path(
    post, path = "/v1/channels/test", tag = "channels", request_body = TestChannel,
    responses((status = 200, body = Tested))
)]
pub(super) async fn test(
    State(api): State<ApiState>,
    caller: Caller,
    JsonBody(request): JsonBody<TestChannel>,
) -> Result<Json<Tested>, ApiError> {
    let channel = known(&api, &caller, id_of(&request.id)?).await?;
    let message = Message::connected(api.clock.now(), false);
    let id = format!("test-{:016x}", rand::random::<u64>());
    let sent = deliver::send(&api, &channel, &message, &id).await;
    let error = sent.err().map(|err| chain(&err).to_string());
    let delivered = error.is_none();
    Ok(Json(Tested { delivered, error }))
}

impl ApiState {
    /// Delivers events to channels while this node leads, until `stop`.
    pub async fn deliver(self, leads: watch::Receiver<bool>, stop: CancellationToken) {
        deliver::run(self, leads, stop).await;
    }
}

impl ChannelShape {
    fn of(channel: &Channel) -> Self {
        Self {
            id: channel.id.to_string(),
            name: channel.name.clone(),
            provider: WEBHOOK,
            config: ShownConfig {
                url: channel.url.clone(),
                secret: None,
            },
            events: channel.kinds.clone(),
            enabled: channel.enabled,
            delivered: channel.delivered,
            given_up: channel.given_up,
            last_error: channel.failure.clone(),
            created_at: timestamp(channel.created_at),
            updated_at: timestamp(channel.updated_at),
        }
    }
}

fn id_of(text: &str) -> Result<ChannelId, ApiError> {
    text.parse()
        .map_err(|err: proto::ids::ParseIdError| ApiError::invalid(err.to_string()))
}

/// The caller's channel, wherever it was made.
async fn known(api: &ApiState, caller: &Caller, id: ChannelId) -> Result<Channel, ApiError> {
    api.found(|state| owned(&state, caller, id)).await
}

fn owned(state: &state::State, caller: &Caller, id: ChannelId) -> Result<Channel, ApiError> {
    let known = state.channel(id).filter(|it| it.team == caller.team);
    known
        .cloned()
        .ok_or_else(|| ApiError::new(Code::NotFound, format!("no channel {id}")))
}

fn shown(api: &ApiState, caller: &Caller, id: ChannelId) -> Result<ChannelShape, ApiError> {
    owned(&api.view.state(), caller, id).map(|it| ChannelShape::of(&it))
}

fn check_provider(provider: Option<&str>) -> Result<(), ApiError> {
    match provider {
        None | Some(WEBHOOK) => Ok(()),
        Some(other) if OTHER_PROVIDERS.contains(&other) => {
            let why =
                format!("this version has no channels to {other}: a webhook reaches anything");
            Err(ApiError::new(Code::NotImplemented, why))
        }
        Some(_) => Err(ApiError::invalid("provider must be webhook")),
    }
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let chars = name.chars().count();
    if (1..=MAX_NAME_CHARS).contains(&chars) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::invalid(format!(
        "name must have 1 to {MAX_NAME_CHARS} characters"
    )))
}

fn check_kinds(kinds: &BTreeSet<String>) -> Result<(), ApiError> {
    let unknown = kinds.iter().find(|kind| !KINDS.contains(&kind.as_str()));
    unknown.map_or(Ok(()), |_| {
        Err(ApiError::invalid(format!(
            "events may be {}",
            KINDS.join(", ")
        )))
    })
}

/// Where and how, if events may be sent there as things are now.
async fn checked(
    api: &ApiState,
    config: ChannelConfig,
) -> Result<(String, Option<String>), ApiError> {
    let target = Target::parse(&config.url).map_err(|err| ApiError::invalid(err.to_string()))?;
    match target.resolve(&api.webhook_allow).await {
        // A name that means nothing today may mean something tomorrow.
        Ok(_) | Err(TargetError::Unknown { .. }) => {}
        Err(err) => return Err(ApiError::invalid(err.to_string())),
    }
    let fits =
        |it: &str| SECRET_CHARS.contains(&it.len()) && it.bytes().all(|c| c.is_ascii_graphic());
    if config.secret.as_deref().is_some_and(|it| !fits(it)) {
        let why = "secret must have 16 to 128 characters of ASCII without spaces";
        return Err(ApiError::invalid(why));
    }
    Ok((config.url, config.secret))
}

fn new_secret() -> String {
    let bytes: [u8; SECRET_BYTES] = rand::random();
    let hex: String = bytes.iter().map(|it| format!("{it:02x}")).collect();
    format!("whsec_{hex}")
}
