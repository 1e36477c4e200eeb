//! Moving a running capsule to another node.
//!
//! It is one entry of the log: a pause that says where the capsule goes on. Whoever asked may go away,
//! and the node that was asked may die: the entry that makes it paused gives it out again.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use raft::command::{Command, StopCause};
use raft::state::Phase;
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::auth::Caller;
use super::capsules::settle;
use super::error::ApiError;
use super::extract::{CapsuleId, JsonBody};
use super::nodes::id_of;
use super::pausing::{failed, wrong_state};
use super::state::{ApiState, owned};
use super::wire::Capsule;

/// Where a capsule shall go.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct Migrate {
    /// The node that shall run it: its id or name.
    node: String,
}

/// Pauses a running capsule and resumes it on another node.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/migrate", tag = "capsules",
    params(("id" = String, Path)), request_body = Migrate,
    responses(
        (status = 200, description = "It runs there.", body = Capsule),
        (status = 202, description = "It is still on its way.", body = Capsule),
    )
)]
pub(super) async fn migrate(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(request): JsonBody<Migrate>,
) -> Result<(StatusCode, Json<Capsule>), ApiError> {
    let deadline = Instant::now() + api.pause_wait;
    let fits = |phase| matches!(phase, Phase::Running | Phase::Resuming | Phase::Pausing);
    let known = api.sandbox_to_change(&caller, id, fits).await?;
    let to = id_of(&api, &request.node).await?;
    let is_there = known.owner == to;
    match known.phase {
        // Asked for again: nothing is left to do, or it is on its way.
        Phase::Running | Phase::Resuming if is_there => {}
        Phase::Pausing if known.bound_for == Some(to) => {}
        Phase::Running => {
            let (epoch, cause) = (known.epoch, StopCause::Asked);
            let then_on = Some(to);
            let asked = Command::PauseSandbox {
                id,
                epoch,
                cause,
                then_on,
            };
            api.propose(&caller, asked).await?;
        }
        phase => return Err(wrong_state(id, phase, "migrated", "running")),
    }
    let on_its_way = |phase| matches!(phase, Phase::Pausing | Phase::Resuming);
    let state = settle(&api, id, deadline, |phase| !on_its_way(phase)).await;
    let sandbox = owned(&state, &caller, id)?;
    let status = match sandbox.phase {
        phase if on_its_way(phase) => StatusCode::ACCEPTED,
        Phase::Running if sandbox.owner == to => StatusCode::OK,
        Phase::Running => return Err(failed(sandbox, "was not moved and runs on")),
        Phase::Paused => return Err(failed(sandbox, "did not go on there and is paused")),
        phase => return Err(wrong_state(id, phase, "migrated", "running")),
    };
    Ok((status, Json(Capsule::of(&state, sandbox, None))))
}
