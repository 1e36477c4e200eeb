//! The members of a team: people who hold its keys.
//!
//! A member has no password. Who is to work in a team is added, gets a key that names them (`user_id`), and
//! loses it by being removed. An address is the same person in every team.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use proto::ids::{ParseIdError, UserId};
use raft::command::Command;
use raft::state::{Member, Role};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::extract::{JsonBody, PathName, PathPair, QueryOf};
use super::reading::{Answered, ReadQuery, Reading};
use super::state::ApiState;
use super::teams::{check_title, known_team, member_of, team_of};
use super::wire::timestamp;

/// Longest address that mail systems take.
const MAX_EMAIL_CHARS: usize = 254;
/// Most people in one answer of a search.
const MAX_FOUND: usize = 50;
/// Keeps these hashes apart from all others.
const CONTEXT: &str = "wrenn 2026-11-22 ids of people by address";

/// A member.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MemberShape {
    /// The same person in every team.
    #[schema(example = "usr-0000000000000000000000001")]
    user_id: String,
    /// What people call them.
    name: String,
    /// By which they are known.
    email: String,
    /// `owner`, `admin` or `member`.
    #[schema(value_type = String)]
    role: &'static str,
    /// Since when.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    joined_at: Option<Timestamp>,
}

/// A member to add.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct AddMember {
    /// By which they are known.
    email: String,
    /// What people call them; the address where absent.
    name: Option<String>,
    /// `owner`, `admin` or `member`, where absent. The first member of a team becomes its owner.
    #[schema(value_type = Option<String>)]
    role: Option<RoleWord>,
}

/// What a member becomes.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct ChangeMember {
    /// `owner`, `admin` or `member`.
    #[schema(value_type = String)]
    role: RoleWord,
}

/// A role as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RoleWord {
    Owner,
    Admin,
    Member,
}

impl From<RoleWord> for Role {
    fn from(word: RoleWord) -> Self {
        match word {
            RoleWord::Owner => Self::Owner,
            RoleWord::Admin => Self::Admin,
            RoleWord::Member => Self::Member,
        }
    }
}

/// Somebody who was found.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Found {
    user_id: String,
    email: String,
}

/// Whom to look for.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct SearchQuery {
    /// What the address begins with; three characters at least.
    email: String,
}

/// Lists the members of a team.
#[utoipa::path(
    get, path = "/v1/teams/{id}/members", tag = "teams",
    params(("id" = String, Path), ReadQuery), responses((status = 200, body = Vec<MemberShape>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
    reading: Reading,
) -> Result<Answered<Json<Vec<MemberShape>>>, ApiError> {
    let team = known_team(&api, &caller, Some(&id)).await?;
    let state = api.view.state();
    let members = state.members_of(team).map(MemberShape::from).collect();
    Ok(reading.answer(Json(members)))
}

/// Adds somebody to a team. They work with a key that names them: `POST /v1/api-keys` with `user_id`.
#[utoipa::path(
    post, path = "/v1/teams/{id}/members", tag = "teams", params(("id" = String, Path)),
    request_body = AddMember,
    responses((status = 201, body = MemberShape), (status = 409, description = "They are one."))
)]
pub(super) async fn add(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
    JsonBody(request): JsonBody<AddMember>,
) -> Result<(StatusCode, Json<MemberShape>), ApiError> {
    let email = address(&request.email)?;
    let name = request.name.as_deref().map_or(email.as_str(), str::trim);
    if request.name.is_some() {
        check_title("name", name)?;
    }
    let team = known_team(&api, &caller, Some(&id)).await?;
    let state = api.view.state();
    let user = user_of(&email);
    if state.member(team, user).is_some() {
        let why = format!("{email} is a member already");
        return Err(ApiError::new(Code::Conflict, why));
    }
    let first = state.members_of(team).next().is_none();
    let default = if first { Role::Owner } else { Role::Member };
    let member = Member {
        team,
        user,
        name: name.to_owned(),
        email,
        role: request.role.map_or(default, Role::from),
        joined_at: api.clock.now(),
    };
    let shape = MemberShape::from(&member);
    api.propose(&caller, Command::PutMember(member)).await?;
    Ok((StatusCode::CREATED, Json(shape)))
}

/// Changes a member's role, and with it what their keys may do.
#[utoipa::path(
    patch, path = "/v1/teams/{id}/members/{user}", tag = "teams",
    params(("id" = String, Path), ("user" = String, Path)), request_body = ChangeMember,
    responses((status = 204), (status = 409, description = "It is the last owner."))
)]
pub(super) async fn change(
    State(api): State<ApiState>,
    caller: Caller,
    PathPair(id, user): PathPair,
    JsonBody(request): JsonBody<ChangeMember>,
) -> Result<StatusCode, ApiError> {
    let user = user_in(&user)?;
    let known = api.found(|state| {
        let team = team_of(&state, &caller, Some(&id))?;
        let known = state.member(team, user).cloned();
        known.ok_or_else(|| no_member(user))
    });
    let member = Member {
        role: request.role.into(),
        ..known.await?
    };
    api.propose(&caller, Command::PutMember(member)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes somebody out of a team and revokes the keys they hold.
#[utoipa::path(
    delete, path = "/v1/teams/{id}/members/{user}", tag = "teams",
    params(("id" = String, Path), ("user" = String, Path)),
    responses((status = 204), (status = 409, description = "It is the last owner."))
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    caller: Caller,
    PathPair(id, user): PathPair,
) -> Result<StatusCode, ApiError> {
    let user = user_in(&user)?;
    let team = known_team(&api, &caller, Some(&id)).await?;
    api.propose(&caller, Command::DropMember { team, user })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes the caller out of the team, and revokes the keys they hold, the one that was sent too.
#[utoipa::path(
    post, path = "/v1/teams/{id}/leave", tag = "teams", params(("id" = String, Path)),
    responses((status = 204), (status = 409, description = "Nobody holds this key."))
)]
pub(super) async fn leave(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(id): PathName,
) -> Result<StatusCode, ApiError> {
    let leaving = api.found(|state| {
        let team = team_of(&state, &caller, Some(&id))?;
        let member = member_of(&state, &caller).filter(|member| member.team == team);
        let user = member.map(|member| member.user);
        let why =
            "no member of this team holds the API key that was sent, so nobody can leave by it";
        let user = user.ok_or_else(|| ApiError::new(Code::InvalidState, why))?;
        Ok((team, user))
    });
    let (team, user) = leaving.await?;
    api.propose(&caller, Command::DropMember { team, user })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Finds members by the beginning of their address, among those the caller may see.
#[utoipa::path(
    get, path = "/v1/users/search", tag = "teams", params(SearchQuery),
    responses((status = 200, body = Vec<Found>))
)]
pub(super) async fn search(
    State(api): State<ApiState>,
    caller: Caller,
    QueryOf(query): QueryOf<SearchQuery>,
) -> Result<Json<Vec<Found>>, ApiError> {
    let begin = query.email.trim().to_lowercase();
    if begin.chars().count() < 3 {
        return Err(ApiError::invalid("email must have 3 characters at least"));
    }
    let state = api.view.state();
    let seen = |it: &&Member| it.team == caller.team || caller.is_platform();
    let fits = state.members().filter(seen);
    let fits = fits.filter(|it| it.email.starts_with(&begin));
    let found: std::collections::BTreeMap<_, _> = fits.map(|it| (&it.email, it.user)).collect();
    let shapes = found
        .into_iter()
        .take(MAX_FOUND)
        .map(|(email, user)| Found {
            user_id: user.to_string(),
            email: email.clone(),
        });
    Ok(Json(shapes.collect()))
}

/// The user that a path names.
fn user_in(path: &str) -> Result<UserId, ApiError> {
    path.parse()
        .map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))
}

fn no_member(user: UserId) -> ApiError {
    ApiError::new(Code::NotFound, format!("no member {user}"))
}

/// An address as it is compared.
fn address(text: &str) -> Result<String, ApiError> {
    let address = text.trim().to_lowercase();
    let parts = address.split_once('@');
    let sound = parts.is_some_and(|(who, at)| !who.is_empty() && at.contains('.'));
    let plain = |it: char| !it.is_whitespace() && !it.is_control();
    if sound && address.chars().all(plain) && address.chars().count() <= MAX_EMAIL_CHARS {
        return Ok(address);
    }
    Err(ApiError::invalid(
        "email must be an address like ann@example.com",
    ))
}

/// Out of the address: nobody has to be known before.
fn user_of(email: &str) -> UserId {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(email.as_bytes());
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    UserId(id)
}

impl From<&Member> for MemberShape {
    fn from(member: &Member) -> Self {
        Self {
            user_id: member.user.to_string(),
            name: member.name.clone(),
            email: member.email.clone(),
            role: member.role.word(),
            joined_at: timestamp(member.joined_at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_one_person_however_it_is_written() {
        let known = address(" Ann@Example.com ").expect("an address");
        assert_eq!(known, "ann@example.com");
        assert_eq!(user_of(&known), user_of("ann@example.com"));
        assert_ne!(user_of(&known), user_of("bob@example.com"));
        for bad in [
            "",
            "ann",
            "@example.com",
            "ann@",
            "a b@example.com",
            "a@b\n.com",
        ] {
            assert!(address(bad).is_err(), "{bad:?}");
        }
    }
}
