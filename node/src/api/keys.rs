//! API keys. The secret is in the answer that makes one and nowhere else.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use proto::ids::{KeyId, ParseIdError, TeamId, UserId};
use proto::units::Stamp;
use raft::command::Command;
use raft::state::{Key, Scope, State as Replicated};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::{Caller, KEY_PREFIX, hash_of};
use super::error::{ApiError, Code};
use super::extract::{JsonBody, PathName, QueryOf};
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::teams::{check_title, known_team};
use super::wire::timestamp;

/// Characters of a key that are shown afterwards.
const SHOWN_CHARS: usize = 10;
/// What a key is called for which nothing is said.
const DEFAULT_NAME: &str = "API key";
/// Longest a key may last that ends by itself; who wants more wants one that does not.
const MAX_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A key to make.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateKey {
    /// What people call it.
    name: Option<String>,
    /// What it may do: `read`, `run` (where absent) or `admin`. Each includes those before it.
    #[schema(value_type = Option<String>)]
    scope: Option<ScopeWord>,
    /// Seconds until it ends by itself; absent for never.
    expires_in_sec: Option<u64>,
    /// Whose it is; the caller's team where absent. Another one takes an administrator of the cluster.
    team_id: Option<String>,
    /// The member who holds it, whose role limits it and with whom it goes.
    user_id: Option<String>,
}

/// A scope as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ScopeWord {
    Read,
    Run,
    Admin,
}

impl From<ScopeWord> for Scope {
    fn from(word: ScopeWord) -> Self {
        match word {
            ScopeWord::Read => Self::Read,
            ScopeWord::Run => Self::Run,
            ScopeWord::Admin => Self::Admin,
        }
    }
}

/// A key without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyShape {
    /// Its name for revoking it.
    #[schema(example = "key-0000000000000000000000001")]
    id: String,
    /// Whose it is.
    team_id: String,
    /// What people call it.
    name: String,
    /// Its first characters.
    key_prefix: String,
    /// What it may do: `read`, `run` or `admin`.
    #[schema(value_type = String)]
    scope: &'static str,
    /// The key that made it; empty for the first one.
    created_by: String,
    /// The member who holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    /// That member's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    creator_email: Option<String>,
    /// When it was made.
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
    /// When it ends by itself.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    /// Whether it has.
    expired: bool,
    /// When it was used last; at another node than this one, some minutes late.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    last_used: Option<Timestamp>,
}

/// A key that was made just now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NewKey {
    #[serde(flatten)]
    shape: KeyShape,
    /// The whole key. It is not shown again.
    key: String,
}

/// Whose keys.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default)]
pub(super) struct KeysQuery {
    /// Those of this team, for administrators of the cluster.
    team_id: Option<String>,
}

/// Makes an API key.
#[utoipa::path(
    post, path = "/v1/api-keys", tag = "teams", request_body = CreateKey,
    responses((status = 201, body = NewKey))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    caller: Caller,
    JsonBody(request): JsonBody<CreateKey>,
) -> Result<(StatusCode, Json<NewKey>), ApiError> {
    let name = request.name.as_deref().unwrap_or(DEFAULT_NAME).trim();
    check_title("name", name)?;
    let team = known_team(&api, &caller, request.team_id.as_deref()).await?;
    let state = api.view.state();
    let now = api.clock.now();
    let secret = secret();
    let key = Key {
        id: KeyId(rand::random()),
        team,
        name: name.to_owned(),
        hash: hash_of(&secret),
        shown: secret.chars().take(SHOWN_CHARS).collect(),
        created_at: now,
        scope: request.scope.map_or(Scope::Run, Scope::from),
        expires_at: request.ends_at(now)?,
        created_by: caller.key.to_string(),
        holder: request.holder()?,
        ..Key::default()
    };
    // A key is no way to get more than one has.
    caller.check(key.scope)?;
    let shape = KeyShape::new(&api, &state, &key);
    api.propose(&caller, Command::PutKey(key)).await?;
    let answer = NewKey { shape, key: secret };
    Ok((StatusCode::CREATED, Json(answer)))
}

/// Lists the team's keys that were not revoked, the newest first.
#[utoipa::path(
    get, path = "/v1/api-keys", tag = "teams", params(KeysQuery, ReadQuery),
    responses((status = 200, body = Vec<KeyShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
    QueryOf(query): QueryOf<KeysQuery>,
) -> Result<Answered<Json<Vec<KeyShape>>>, ApiError> {
    let team = known_team(&api, &caller, query.team_id.as_deref()).await?;
    let state = api.view.state();
    let theirs = state.keys().filter(|key| key.team == team && !key.revoked);
    let mut theirs: Vec<&Key> = theirs.collect();
    theirs.sort_by_key(|key| std::cmp::Reverse((key.created_at, key.id)));
    let shapes = theirs
        .into_iter()
        .map(|key| KeyShape::new(&api, &state, key));
    Ok(reading.answer(Json(shapes.collect())))
}

/// Makes a key useless at once, on every node, and ends what goes on under it; doing so again succeeds.
#[utoipa::path(
    delete, path = "/v1/api-keys/{id}", tag = "teams", params(("id" = String, Path)),
    responses((status = 204), (status = 409, description = "It is the last one of its kind."))
)]
pub(super) async fn revoke(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
) -> Result<StatusCode, ApiError> {
    let id: KeyId = id
        .parse()
        .map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))?;
    // Two of two administrators must not revoke each other.
    api.cluster.linearize().await?;
    let state = api.view.state();
    let seen = |key: &&Key| key.team == caller.team || caller.is_platform();
    let key = state.key(id).filter(seen);
    let key = key.ok_or_else(|| ApiError::new(Code::NotFound, format!("no API key {id}")))?;
    if is_last_of_all(&state, key) {
        let why = "this is the last key of an administrator of the cluster: make another one first";
        return Err(ApiError::new(Code::InvalidState, why));
    }
    api.propose(&caller, Command::RevokeKey(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether nobody could make keys any more without `key`.
fn is_last_of_all(state: &Replicated, key: &Key) -> bool {
    let governs = |it: &Key| {
        let lasts = it.expires_at.is_none() && it.holder.is_none();
        it.team == TeamId::default() && it.scope == Scope::Admin && !it.revoked && lasts
    };
    governs(key) && !state.keys().any(|it| it.id != key.id && governs(it))
}

impl CreateKey {
    fn ends_at(&self, now: Stamp) -> Result<Option<Stamp>, ApiError> {
        let Some(life) = self.expires_in_sec else {
            return Ok(None);
        };
        let most = MAX_LIFE.as_secs();
        if life == 0 || life > most {
            return Err(ApiError::invalid(format!(
                "expires_in_sec must be 1 to {most}"
            )));
        }
        Ok(Some(Stamp(now.0.saturating_add(life * 1000))))
    }

    fn holder(&self) -> Result<Option<UserId>, ApiError> {
        let holder = self.user_id.as_deref().map(str::parse).transpose();
        holder.map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))
    }
}

impl KeyShape {
    fn new(api: &ApiState, state: &Replicated, key: &Key) -> Self {
        let holder = key.holder.and_then(|user| state.member(key.team, user));
        let last_used = key.last_used.max(api.uses.of(key.id));
        Self {
            id: key.id.to_string(),
            team_id: key.team.to_string(),
            name: key.name.clone(),
            key_prefix: key.shown.clone(),
            scope: key.scope.word(),
            created_by: key.created_by.clone(),
            user_id: key.holder.map(|user| user.to_string()),
            creator_email: holder.map(|member| member.email.clone()),
            created_at: timestamp(key.created_at),
            expires_at: key.expires_at.and_then(timestamp),
            expired: key.has_expired(api.clock.now()),
            last_used: last_used.and_then(timestamp),
        }
    }
}

/// A new secret.
fn secret() -> String {
    let random: [u8; 16] = rand::random();
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{KEY_PREFIX}{digits}")
}
