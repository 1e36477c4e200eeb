//! Pausing and resuming capsules.
//!
//! Both are asked of the cluster, carried out by the owner, and answered when that is done: a client
//! that only reads the answer finds `paused`, or `running`. One that takes too long for that gets the
//! capsule as it stands and 202, and sees the rest by looking.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use proto::ids::SandboxId;
use raft::command::{Command, StopCause};
use raft::state::{Phase, Sandbox};
use serde::Deserialize;
use tokio::time::Instant;

use super::auth::Caller;
use super::capsules::{hints, settle};
use super::error::{ApiError, Code};
use super::extract::{CapsuleId, QueryOf};
use super::nodes::id_of;
use super::state::{ApiState, owned};
use super::wire::{Capsule, status};

/// Freezes a capsule, keeps it as a snapshot and gives its room free.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/pause", tag = "capsules",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "It is paused, durably.", body = Capsule),
        (status = 202, description = "It is still being paused.", body = Capsule),
    )
)]
pub(super) async fn pause(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
) -> Result<(StatusCode, Json<Capsule>), ApiError> {
    let deadline = Instant::now() + api.pause_wait;
    let fits = |phase| matches!(phase, Phase::Running | Phase::Pausing);
    let known = api.sandbox_to_change(&caller, id, fits).await?;
    let epoch = match known.phase {
        phase if fits(phase) => known.epoch,
        phase => return Err(wrong_state(id, phase, "paused", "running")),
    };
    // Asked for again while it is under way, this changes nothing and waits along.
    let asked = Command::PauseSandbox {
        id,
        epoch,
        cause: StopCause::Asked,
        then_on: None,
    };
    api.propose(&caller, asked).await?;
    let state = settle(&api, id, deadline, |phase| phase != Phase::Pausing).await;
    let sandbox = owned(&state, &caller, id)?;
    let status = match sandbox.phase {
        Phase::Pausing => StatusCode::ACCEPTED,
        // Its guest is lost, and it rests as it did before.
        Phase::Paused if sandbox.snapshot == known.snapshot => {
            return Err(failed(sandbox, "was not paused anew"));
        }
        // Resumed by somebody else since, for all we know.
        Phase::Paused | Phase::Resuming => StatusCode::OK,
        Phase::Running if sandbox.epoch != epoch => StatusCode::OK,
        Phase::Running => return Err(failed(sandbox, "was not paused and runs on")),
        phase => return Err(wrong_state(id, phase, "paused", "running")),
    };
    Ok((status, Json(Capsule::of(&state, sandbox, None))))
}

/// Where a capsule shall go on.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ResumeQuery {
    /// Only on this node: its id or name.
    node: Option<String>,
}

/// Lets a paused capsule go on, on whichever host can.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/resume", tag = "capsules",
    params(("id" = String, Path), ResumeQuery),
    responses(
        (status = 200, description = "It runs.", body = Capsule),
        (status = 202, description = "It is still being resumed.", body = Capsule),
    )
)]
pub(super) async fn resume(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    QueryOf(query): QueryOf<ResumeQuery>,
) -> Result<(StatusCode, Json<Capsule>), ApiError> {
    let deadline = Instant::now() + api.pause_wait;
    let fits = |phase| matches!(phase, Phase::Paused | Phase::Resuming);
    let known = api.sandbox_to_change(&caller, id, fits).await?;
    let to = match query.node {
        Some(name) => Some(id_of(&api, &name).await?),
        None => None,
    };
    let snapshot = match (known.phase, known.snapshot) {
        (phase, Some(snapshot)) if fits(phase) => snapshot,
        (phase, _) => return Err(wrong_state(id, phase, "resumed", "paused")),
    };
    let asked = Command::ResumeSandbox {
        id,
        snapshot,
        to,
        hints: hints(&api),
    };
    api.propose(&caller, asked).await?;
    let state = settle(&api, id, deadline, |phase| phase != Phase::Resuming).await;
    let sandbox = owned(&state, &caller, id)?;
    let status = match sandbox.phase {
        Phase::Resuming => StatusCode::ACCEPTED,
        Phase::Running | Phase::Pausing => StatusCode::OK,
        // It ran, and somebody else paused it again.
        Phase::Paused if sandbox.snapshot != Some(snapshot) || sandbox.reason.is_empty() => {
            StatusCode::OK
        }
        Phase::Paused => return Err(failed(sandbox, "could not be resumed and stays paused")),
        phase => return Err(wrong_state(id, phase, "resumed", "paused")),
    };
    Ok((status, Json(Capsule::of(&state, sandbox, None))))
}

/// Brings a resting sandbox back for a visitor, whom the audit log does not know: its team said that visits do;
/// the sandbox as it runs, by `deadline`.
pub(super) async fn wake(
    api: &ApiState,
    id: SandboxId,
    deadline: Instant,
) -> Result<Sandbox, ApiError> {
    let settled = |phase| !matches!(phase, Phase::Pausing | Phase::Resuming);
    let state = settle(api, id, deadline, settled).await;
    let known = state.sandbox(id).map(|it| (it.phase, it.snapshot));
    if let Some((Phase::Paused, Some(snapshot))) = known {
        let asked = Command::ResumeSandbox {
            id,
            snapshot,
            to: None,
            hints: hints(api),
        };
        api.proposer.propose(asked).await?;
    }
    let state = settle(api, id, deadline, settled).await;
    let gone = || ApiError::new(Code::NotFound, format!("no capsule {id}"));
    let sandbox = state.sandbox(id).ok_or_else(gone)?;
    match sandbox.phase {
        Phase::Running => Ok(sandbox.clone()),
        Phase::Paused => Err(failed(sandbox, "could not be resumed and stays paused")),
        Phase::Resuming => {
            let message = format!("capsule {id} is still being resumed; try again");
            Err(ApiError::new(Code::HostUnavailable, message))
        }
        phase => Err(wrong_state(id, phase, "visited", "running or paused")),
    }
}

pub(super) fn wrong_state(id: SandboxId, phase: Phase, done: &str, needed: &str) -> ApiError {
    let is = status(phase);
    let message = format!("capsule {id} is {is}: only one that is {needed} can be {done}");
    ApiError::new(Code::InvalidState, message)
}

pub(super) fn failed(sandbox: &Sandbox, what: &str) -> ApiError {
    let (id, reason) = (sandbox.id, &sandbox.reason);
    ApiError::new(Code::AgentError, format!("capsule {id} {what}: {reason}"))
}
