//! Teams and who is calling. The members are in [`members`](super::members).
//!
//! A cluster has no accounts and nobody's password: whoever calls has a key, and a key belongs to a team.
//! Administrators of the cluster, who have a key of the platform itself, make and remove teams and see all
//! of them; everybody else sees one.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use proto::ids::{ParseIdError, TeamId};
use raft::command::Command;
use raft::state::{Member, Scope, State as Replicated, Team};
use serde::{Deserialize, Serialize};
use tracing::info;
use utoipa::ToSchema;

use super::auth::{Admin, Caller};
use super::error::{ApiError, Code};
use super::extract::{JsonBody, PathName};
use super::members::MemberShape;
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::wire::timestamp;

/// Longest name of a team, a key or a person.
const MAX_TITLE_CHARS: usize = 64;
/// What the platform itself is called.
const PLATFORM: &str = "platform";

/// A team.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TeamShape {
    /// Its id for life.
    #[schema(example = "team-0000000000000000000000001")]
    id: String,
    /// What people call it.
    name: String,
    /// Two times six hexadecimal digits, for life.
    slug: String,
    /// Whether it has hosts of its own.
    is_byoc: bool,
    /// When it was made; absent for the platform itself, and for teams of earlier releases.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<Timestamp>,
}

/// A team, and what the caller is in it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TeamWithRole {
    #[serde(flatten)]
    team: TeamShape,
    /// `owner`, `admin` or `member`.
    #[schema(value_type = String)]
    role: &'static str,
}

/// A team and its people.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TeamDetail {
    team: TeamShape,
    members: Vec<MemberShape>,
}

/// What a team is called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct NameTeam {
    name: String,
}

/// Who calls.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Me {
    /// The member who holds the key; absent where none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// That member's name, or the key's.
    name: String,
    /// That member's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    email: Option<String>,
    /// What the caller is in the team.
    #[schema(value_type = String)]
    role: &'static str,
    /// The caller's team.
    team: TeamShape,
    /// The key that was sent.
    key_id: String,
    /// What it may do.
    #[schema(value_type = String)]
    scope: &'static str,
    /// Whether the caller administers the cluster.
    is_admin: bool,
}

/// Lists the caller's team; all teams, to administrators of the cluster.
#[utoipa::path(
    get, path = "/v1/teams", tag = "teams", params(ReadQuery),
    responses((status = 200, body = Vec<TeamWithRole>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
) -> Answered<Json<Vec<TeamWithRole>>> {
    reading.answer(Json(visible(&api.view.state(), &caller)))
}

/// Lists all teams.
#[utoipa::path(
    get, path = "/v1/admin/teams", tag = "teams", params(ReadQuery),
    responses((status = 200, body = Vec<TeamWithRole>))
)]
pub(super) async fn list_all(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    reading: Reading,
) -> Answered<Json<Vec<TeamWithRole>>> {
    reading.answer(Json(visible(&api.view.state(), &caller)))
}

/// Makes a team, which begins without keys.
#[utoipa::path(
    post, path = "/v1/teams", tag = "teams", request_body = NameTeam,
    responses((status = 201, body = TeamWithRole))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    JsonBody(request): JsonBody<NameTeam>,
) -> Result<(StatusCode, Json<TeamWithRole>), ApiError> {
    let name = request.name.trim().to_owned();
    check_title("name", &name)?;
    let id = TeamId(rand::random());
    let team = Team {
        id,
        name,
        slug: slug(id),
        created_at: api.clock.now(),
    };
    api.propose(&caller, Command::PutTeam(team)).await?;
    info!(team = %id, "a team was made");
    let shape = TeamWithRole::new(&api.view.state(), &caller, id);
    Ok((StatusCode::CREATED, Json(shape)))
}

/// Shows a team and its members.
#[utoipa::path(
    get, path = "/v1/teams/{id}", tag = "teams", params(("id" = String, Path), ReadQuery),
    responses((status = 200, body = TeamDetail))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
    reading: Reading,
) -> Result<Answered<Json<TeamDetail>>, ApiError> {
    let detail = api.found(|state| {
        let team = team_of(&state, &caller, Some(&id))?;
        let members = state.members_of(team).map(MemberShape::from).collect();
        let team = TeamShape::new(&state, team);
        Ok(TeamDetail { team, members })
    });
    Ok(reading.answer(Json(detail.await?)))
}

/// Gives a team another name.
#[utoipa::path(
    patch, path = "/v1/teams/{id}", tag = "teams", params(("id" = String, Path)),
    request_body = NameTeam, responses((status = 204))
)]
pub(super) async fn rename(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
    JsonBody(request): JsonBody<NameTeam>,
) -> Result<StatusCode, ApiError> {
    let name = request.name.trim().to_owned();
    check_title("name", &name)?;
    let id = known_team(&api, &caller, Some(&id)).await?;
    if id == TeamId::default() {
        let why = "the platform itself has no other name";
        return Err(ApiError::new(Code::Forbidden, why));
    }
    let team = Team {
        id,
        name,
        slug: slug(id),
        created_at: api.clock.now(),
    };
    api.propose(&caller, Command::PutTeam(team)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a team that has no capsules, snapshots and hosts any more, with its members and keys.
#[utoipa::path(
    delete, path = "/v1/teams/{id}", tag = "teams", params(("id" = String, Path)),
    responses((status = 204), (status = 409, description = "It still has something."))
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    Admin(caller): Admin,
    PathName(id): PathName,
) -> Result<StatusCode, ApiError> {
    let id = known_team(&api, &caller, Some(&id)).await?;
    api.propose(&caller, Command::DropTeam(id)).await?;
    info!(team = %id, "a team was removed");
    Ok(StatusCode::NO_CONTENT)
}

/// Shows who calls: key, team and role.
#[utoipa::path(get, path = "/v1/me", tag = "teams", responses((status = 200, body = Me)))]
pub(super) async fn me(State(api): State<ApiState>, caller: Caller) -> Json<Me> {
    let state = api.view.state();
    let key = state.key(caller.key);
    let member = member_of(&state, &caller);
    let name = member.map(|it| &it.name).or(key.map(|it| &it.name));
    Json(Me {
        id: member.map(|it| it.user.to_string()),
        name: name.cloned().unwrap_or_default(),
        email: member.map(|it| it.email.clone()),
        role: role_of(&state, &caller),
        team: TeamShape::new(&state, caller.team),
        key_id: caller.key.to_string(),
        scope: caller.scope.word(),
        is_admin: caller.is_platform() && caller.scope == Scope::Admin,
    })
}

/// As [`team_of`], but a team that was made through another node a moment ago is waited for.
pub(super) async fn known_team(
    api: &ApiState,
    caller: &Caller,
    asked: Option<&str>,
) -> Result<TeamId, ApiError> {
    api.found(|state| team_of(&state, caller, asked)).await
}

/// The team that a request means: the caller's own, or for administrators of the cluster any that there is.
/// For everybody else no other exists.
pub(super) fn team_of(
    state: &Replicated,
    caller: &Caller,
    asked: Option<&str>,
) -> Result<TeamId, ApiError> {
    let Some(asked) = asked else {
        return Ok(caller.team);
    };
    let id: TeamId = asked
        .parse()
        .map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))?;
    let governs = caller.is_platform() && caller.scope == Scope::Admin;
    if id == caller.team || (governs && is_there(state, id)) {
        return Ok(id);
    }
    Err(ApiError::new(Code::NotFound, format!("no team {id}")))
}

/// Whether there is such a team: it has a record, or, made by an earlier release, a key.
fn is_there(state: &Replicated, id: TeamId) -> bool {
    state.team(id).is_some() || state.keys().any(|key| key.team == id && !key.revoked)
}

/// Checks what people call something: anything that can be shown on a line.
pub(super) fn check_title(what: &str, title: &str) -> Result<(), ApiError> {
    let chars = title.chars().count();
    if (1..=MAX_TITLE_CHARS).contains(&chars) && !title.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::invalid(format!(
        "{what} must have 1 to {MAX_TITLE_CHARS} characters, and none that cannot be shown"
    )))
}

/// The member who holds the caller's key.
pub(super) fn member_of<'a>(state: &'a Replicated, caller: &Caller) -> Option<&'a Member> {
    let holder = state.key(caller.key)?.holder?;
    state.member(caller.team, holder)
}

fn role_of(state: &Replicated, caller: &Caller) -> &'static str {
    let by_scope = match caller.scope {
        Scope::Admin => "admin",
        Scope::Read | Scope::Run => "member",
    };
    member_of(state, caller).map_or(by_scope, |member| member.role.word())
}

fn visible(state: &Replicated, caller: &Caller) -> Vec<TeamWithRole> {
    let shape = |id| TeamWithRole::new(state, caller, id);
    if !caller.is_platform() {
        return vec![shape(caller.team)];
    }
    let recorded = state.teams().map(|team| team.id);
    let with_keys = state.keys().filter(|key| !key.revoked).map(|key| key.team);
    let all = [caller.team].into_iter().chain(recorded).chain(with_keys);
    let all: std::collections::BTreeSet<TeamId> = all.collect();
    all.into_iter().map(shape).collect()
}

/// Out of the id, so that it is for life.
fn slug(id: TeamId) -> String {
    let digits: String = id.0.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}", &digits[..6], &digits[6..12])
}

impl TeamShape {
    pub(super) fn new(state: &Replicated, id: TeamId) -> Self {
        let known = state.team(id);
        let unnamed = || match id {
            id if id == TeamId::default() => PLATFORM.to_owned(),
            id => id.to_string(),
        };
        Self {
            id: id.to_string(),
            name: known.map_or_else(unnamed, |team| team.name.clone()),
            slug: known.map_or_else(|| slug(id), |team| team.slug.clone()),
            is_byoc: state.nodes().any(|node| node.team == Some(id)),
            created_at: known.and_then(|team| timestamp(team.created_at)),
        }
    }
}

impl TeamWithRole {
    fn new(state: &Replicated, caller: &Caller, id: TeamId) -> Self {
        let role = if id == caller.team {
            role_of(state, caller)
        } else {
            // Whoever sees another team administers the cluster.
            "admin"
        };
        Self {
            team: TeamShape::new(state, id),
            role,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slug_is_two_times_six_digits() {
        assert_eq!(slug(TeamId::default()), "000000-000000");
        assert_eq!(slug(TeamId([0xab; 16])), "ababab-ababab");
    }

    #[test]
    fn a_title_is_one_line_of_some_length() {
        assert!(check_title("name", "Ann's team, 東京").is_ok());
        for bad in ["", "a\nb", "\u{7}", &"x".repeat(65)] {
            assert!(check_title("name", bad).is_err(), "{bad:?}");
        }
    }
}
