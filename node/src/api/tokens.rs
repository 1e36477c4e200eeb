//! Join tokens. The secret is in the answer that makes one and nowhere else.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use proto::ids::{NodeId, TeamId, TokenId};
use proto::units::Stamp;
use raft::command::Command;
use raft::state::Token;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::{Admin, Caller};
use super::cluster_info::{Minted, TokenTerms};
use super::error::{ApiError, Code};
use super::extract::{JsonBody, PathName};
use super::reading::{Answered, Reading};
use super::state::ApiState;
use super::wire::timestamp;

/// How long a token is good for where nobody says.
const DEFAULT_TTL: Duration = Duration::from_secs(3600);
/// Longest a token may be good for: a secret that lies around for longer should be made anew.
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most nodes that may join by one token, which remembers each of them.
const MAX_USES: u32 = 1000;

/// What a token is to be good for.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateToken {
    /// `member`, where absent, or `host` for a host of one team.
    #[schema(value_type = Option<String>)]
    role: Option<TokenRole>,
    /// The team whose host joins.
    team: Option<String>,
    /// Seconds until it ends; 3600 where absent.
    ttl_sec: Option<u64>,
    /// How many nodes may join by it; 1 where absent.
    uses: Option<u32>,
}

/// What a node becomes that joins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum TokenRole {
    /// A full member.
    #[default]
    Member,
    /// A host of one team.
    Host,
}

/// A token without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TokenShape {
    /// Its name for revoking it.
    #[schema(example = "tok-0000000000000000000000001")]
    id: String,
    /// `member` or `host`.
    #[schema(value_type = String)]
    role: TokenRole,
    /// The team whose host joins.
    #[serde(skip_serializing_if = "Option::is_none")]
    team: Option<String>,
    /// `open`, `used`, `expired` or `revoked`.
    #[schema(value_type = String)]
    state: &'static str,
    /// How many nodes may still join by it.
    uses_left: u32,
    /// When it ends.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    /// When it was made.
    #[schema(value_type = Option<String>, format = DateTime)]
    created_at: Option<Timestamp>,
    /// The API key that made it.
    created_by: String,
    /// Nodes that have joined by it.
    nodes: Vec<String>,
}

/// A token that was made just now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NewToken {
    #[serde(flatten)]
    shape: TokenShape,
    /// The whole token. Whoever has it may join; it is not shown again.
    token: String,
    /// What to run on the new host.
    join_command: String,
}

/// Makes a join token.
#[utoipa::path(
    post, path = "/v1/tokens", tag = "cluster", request_body = CreateToken,
    responses((status = 201, body = NewToken))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    JsonBody(request): JsonBody<CreateToken>,
) -> Result<(StatusCode, Json<NewToken>), ApiError> {
    let now = api.clock.now();
    let (token, minted) = make(&api, &caller, &request).await?;
    let answer = NewToken {
        shape: TokenShape::new(&token, now),
        join_command: join_command(&minted),
        token: minted.text,
    };
    Ok((StatusCode::CREATED, Json(answer)))
}

/// Makes a token of these terms, which only its secret opens.
pub(super) async fn make(
    api: &ApiState,
    caller: &Caller,
    request: &CreateToken,
) -> Result<(Token, Minted), ApiError> {
    let now = api.clock.now();
    let terms = TokenTerms {
        id: TokenId(rand::random()),
        team: request.team()?,
        expires_at: request.expires_at(now)?,
    };
    let uses_left = request.uses()?;
    let minted = api
        .cluster
        .mint(&terms)
        .map_err(|why| ApiError::new(Code::NotImplemented, why))?;
    let token = Token {
        id: terms.id,
        public_key: minted.public_key,
        team: terms.team,
        expires_at: terms.expires_at,
        uses_left,
        created_at: now,
        created_by: caller.key.to_string(),
        revoked: false,
        redeemed: Vec::new(),
    };
    api.propose(caller, Command::PutToken(token.clone()))
        .await?;
    Ok((token, minted))
}

/// What to run on the new host.
pub(super) fn join_command(minted: &Minted) -> String {
    format!("wrenn node start --join {}", minted.text)
}

/// Lists the join tokens, the newest first; ended ones for a day.
#[utoipa::path(
    get, path = "/v1/tokens", tag = "cluster", params(super::reading::ReadQuery),
    responses((status = 200, body = Vec<TokenShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    _: Admin,
    reading: Reading,
) -> Answered<Json<Vec<TokenShape>>> {
    let (state, now) = (api.view.state(), api.clock.now());
    let mut tokens: Vec<&Token> = state.tokens().collect();
    tokens.sort_by_key(|token| std::cmp::Reverse((token.created_at, token.id)));
    let shapes = tokens.into_iter().map(|token| TokenShape::new(token, now));
    reading.answer(Json(shapes.collect()))
}

/// Withdraws a join token; doing so again succeeds.
#[utoipa::path(
    delete, path = "/v1/tokens/{id}", tag = "cluster", params(("id" = String, Path)),
    responses((status = 204))
)]
pub(super) async fn revoke(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(id): PathName,
) -> Result<StatusCode, ApiError> {
    let id: TokenId = id
        .parse()
        .map_err(|err: proto::ids::ParseIdError| ApiError::invalid(err.to_string()))?;
    api.propose(&caller, Command::RevokeToken(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl CreateToken {
    /// The usual token of a host of this team, or of a full member.
    pub(super) fn of(team: Option<String>) -> Self {
        let role = match team {
            None => TokenRole::Member,
            Some(_) => TokenRole::Host,
        };
        Self {
            role: Some(role),
            team,
            ..Self::default()
        }
    }

    fn team(&self) -> Result<Option<TeamId>, ApiError> {
        match (self.role.unwrap_or_default(), &self.team) {
            (TokenRole::Member, None) => Ok(None),
            (TokenRole::Member, Some(_)) => Err(ApiError::invalid(
                "only a host serves one team: role must be host",
            )),
            (TokenRole::Host, None) => Err(ApiError::invalid(
                "a host serves one team: team must be given",
            )),
            (TokenRole::Host, Some(team)) => team
                .parse()
                .map(Some)
                .map_err(|err: proto::ids::ParseIdError| ApiError::invalid(err.to_string())),
        }
    }

    fn expires_at(&self, now: Stamp) -> Result<Stamp, ApiError> {
        let ttl = self.ttl_sec.map_or(DEFAULT_TTL, Duration::from_secs);
        if ttl.is_zero() || ttl > MAX_TTL {
            let most = MAX_TTL.as_secs();
            return Err(ApiError::invalid(format!("ttl_sec must be 1 to {most}")));
        }
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        Ok(Stamp(now.0.saturating_add(ttl_ms)))
    }

    fn uses(&self) -> Result<u32, ApiError> {
        let uses = self.uses.unwrap_or(1);
        if (1..=MAX_USES).contains(&uses) {
            return Ok(uses);
        }
        Err(ApiError::invalid(format!("uses must be 1 to {MAX_USES}")))
    }
}

impl TokenShape {
    fn new(token: &Token, now: Stamp) -> Self {
        let node = |(_, node): &(_, NodeId)| node.to_string();
        Self {
            id: token.id.to_string(),
            role: match token.team {
                None => TokenRole::Member,
                Some(_) => TokenRole::Host,
            },
            team: token.team.map(|team| team.to_string()),
            state: state(token, now),
            uses_left: token.uses_left,
            expires_at: timestamp(token.expires_at),
            created_at: timestamp(token.created_at),
            created_by: token.created_by.clone(),
            nodes: token.redeemed.iter().map(node).collect(),
        }
    }
}

/// The first reason why nobody can join by it any more.
fn state(token: &Token, now: Stamp) -> &'static str {
    if token.revoked {
        "revoked"
    } else if token.uses_left == 0 {
        "used"
    } else if token.is_open(now) {
        "open"
    } else {
        "expired"
    }
}
