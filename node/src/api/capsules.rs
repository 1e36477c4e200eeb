//! Creating, showing and destroying capsules.
//!
//! Handlers parse, propose and answer: the proposal goes through the log, the owner's reconciler
//! acts, and the handler only watches the view for what came of it. A client that goes away
//! changes nothing.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use proto::ids::SandboxId;
use raft::command::{Command, Refusal, StopCause};
use raft::placement::LoadHint;
use raft::state::{Phase, Sandbox, SandboxSpec};
use serde::Deserialize;
use tokio::time::{self, Instant};
use tracing::{info, warn};
use utoipa::IntoParams;

use super::auth::Caller;
use super::create::{ChangeCapsule, CreateCapsule, Ports};
use super::error::{ApiError, Code};
use super::extract::{CapsuleId, JsonBody, QueryOf};
use super::pausing::wrong_state;
use super::reading::{Answered, ReadQuery, Reading};
use super::retry::{Ids, RetryKey, used_otherwise};
use super::state::{ApiState, owned};
use super::wire::Capsule;
use crate::cluster::liveness::Hint;
use crate::cluster::{LogError, ProposeError};

/// Longest the client of a create without an answer waits for its taking back.
const DISOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of console log in one answer.
const LOG_BYTES: usize = 1 << 20;

/// How to answer a create.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default)]
pub(super) struct CreateQuery {
    /// `false` answers as soon as the capsule has its host; its guest starts meanwhile.
    wait: bool,
}

impl Default for CreateQuery {
    fn default() -> Self {
        Self { wait: true }
    }
}

/// Creates a capsule and waits until it runs.
#[utoipa::path(
    post, path = "/v1/capsules", tag = "capsules", request_body = CreateCapsule,
    params(CreateQuery, ("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 201, description = "It runs.", body = Capsule),
        (status = 202, description = "It is still starting.", body = Capsule),
    )
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    caller: Caller,
    retry: RetryKey,
    QueryOf(query): QueryOf<CreateQuery>,
    JsonBody(request): JsonBody<CreateCapsule>,
) -> Result<(StatusCode, Json<Capsule>), ApiError> {
    let patience = if query.wait {
        api.create_wait
    } else {
        Duration::ZERO
    };
    let deadline = Instant::now() + patience;
    let spec = api
        .found(|state| request.to_spec(&state, caller.team))
        .await?;
    let ids = retry.ids(&caller, &["capsule"]);
    let id = ids.sandbox(0);
    place(&api, &caller, spec, &ids).await?;
    info!(sandbox = %id, "create accepted");
    let settled = settle(&api, id, deadline, |phase| {
        matches!(phase, Phase::Running | Phase::Stopped | Phase::Error)
    });
    let state = settled.await;
    let sandbox = owned(&state, &caller, id)?;
    let status = match sandbox.phase {
        Phase::Running => StatusCode::CREATED,
        Phase::Starting => StatusCode::ACCEPTED,
        // Somebody who listed it has paused it already: it did run.
        Phase::Pausing | Phase::Paused | Phase::Resuming | Phase::Snapshotting => {
            StatusCode::CREATED
        }
        // It did as well, when this was asked for the first time.
        _ if ids.may_come_again() && sandbox.started_at.is_some() => StatusCode::CREATED,
        Phase::Stopping | Phase::Stopped | Phase::Error => return Err(not_started(sandbox)),
    };
    // Its guest came up a moment ago: nobody has used it, and its host need not be asked.
    Ok((status, Json(Capsule::of(&state, sandbox, None))))
}

/// Has a capsule placed, under the first of `ids`.
async fn place(
    api: &ApiState,
    caller: &Caller,
    spec: SandboxSpec,
    ids: &Ids,
) -> Result<(), ApiError> {
    let id = ids.sandbox(0);
    let command = Command::CreateSandbox {
        id,
        team: caller.team,
        spec,
        hints: hints(api),
    };
    let Err(err) = api.propose(caller, command).await else {
        return Ok(());
    };
    if matches!(err, ProposeError::Refused(Refusal::IdTaken(_))) && ids.may_come_again() {
        return Err(used_otherwise());
    }
    // No answer is not a no: the command may have been applied all the same.
    if api.view.state().sandbox(id).is_some() {
        return Ok(());
    }
    // Whoever may ask again finds what came of it.
    let is_unknown = matches!(err, ProposeError::Log(LogError::Unknown { .. }));
    if is_unknown && !ids.may_come_again() {
        disown(api, caller, id).await;
    }
    Err(err.into())
}

/// What placement should know of load: reservations are replicated, so all that is left to say is
/// who was not heard of late. A busy node only loses against equals.
pub(super) fn hints(api: &ApiState) -> Vec<LoadHint> {
    const BUSY_PERMILLE: u32 = 1000;
    let silent = api.cluster.loads().into_iter().filter(Hint::is_suspect);
    silent
        .map(|hint| LoadHint {
            node: hint.report.node,
            busy_permille: BUSY_PERMILLE,
        })
        .collect()
}

/// Asks for the end of a capsule that may still come up although its client was told of a failure:
/// in the log, the stop comes after the create that is under way. A refusal says that none came.
async fn disown(api: &ApiState, caller: &Caller, id: SandboxId) {
    let cause = StopCause::Asked;
    let stop = api.propose(caller, Command::StopSandbox { id, cause });
    if time::timeout(DISOWN_TIMEOUT, stop).await.is_err() {
        warn!(sandbox = %id, "a create that may still happen could not be taken back");
    }
}

/// Lists the team's capsules, newest first, without those that ended.
#[utoipa::path(
    get, path = "/v1/capsules", tag = "capsules", params(ReadQuery),
    responses((status = 200, body = Vec<Capsule>))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    reading: Reading,
) -> Answered<Json<Vec<Capsule>>> {
    let state = api.view.state();
    let mut live: Vec<&Sandbox> = state
        .sandboxes()
        .filter(|sandbox| sandbox.team == caller.team && !sandbox.phase.is_ended())
        .collect();
    // Two creates may share a millisecond; the log's order decides then.
    live.sort_by_key(|sandbox| std::cmp::Reverse((sandbox.created_at, sandbox.epoch)));
    let active = api.relay.last_active(&state, &live).await;
    let shape = |it: &Sandbox| Capsule::of(&state, it, active.get(&it.id).copied());
    reading.answer(Json(live.into_iter().map(shape).collect()))
}

/// Shows one capsule; one that ended is shown as long as its record is kept.
#[utoipa::path(
    get, path = "/v1/capsules/{id}", tag = "capsules",
    params(("id" = String, Path), ReadQuery), responses((status = 200, body = Capsule))
)]
pub(super) async fn get(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    reading: Reading,
) -> Result<Answered<Json<Capsule>>, ApiError> {
    let known = |state| {
        owned(&state, &caller, id)?;
        Ok(state)
    };
    let state = api.found(known).await?;
    let sandbox = owned(&state, &caller, id)?;
    let facts = api.relay.facts(id).await;
    let shape = Capsule::in_detail(&state, sandbox, facts);
    Ok(reading.answer(Json(shape)))
}

/// Destroys a capsule; doing so again succeeds.
#[utoipa::path(
    delete, path = "/v1/capsules/{id}", tag = "capsules",
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "It is gone."),
        (status = 202, description = "It is still being stopped."),
    )
)]
pub(super) async fn destroy(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
) -> Result<StatusCode, ApiError> {
    let deadline = Instant::now() + api.destroy_wait;
    api.sandbox_to_change(&caller, id, |_| true).await?;
    let cause = StopCause::Asked;
    api.propose(&caller, Command::StopSandbox { id, cause })
        .await?;
    let state = settle(&api, id, deadline, Phase::is_ended).await;
    // A record that was pruned meanwhile is gone as well.
    let gone = state
        .sandbox(id)
        .is_none_or(|sandbox| sandbox.phase.is_ended());
    Ok(if gone {
        StatusCode::NO_CONTENT
    } else {
        StatusCode::ACCEPTED
    })
}

/// Moves the inactivity timer back to its start.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/ping", tag = "capsules",
    params(("id" = String, Path)), responses((status = 204))
)]
pub(super) async fn ping(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
) -> Result<StatusCode, ApiError> {
    let fits = |phase| phase == Phase::Running;
    api.sandbox_to_change(&caller, id, fits).await?;
    api.relay.ping(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Which part of a console log.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogQuery {
    /// Only this many lines from the end.
    tail: Option<usize>,
}

/// What the guest's console showed, the last MiB at most.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/logs", tag = "capsules",
    params(("id" = String, Path), LogQuery),
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub(super) async fn logs(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    QueryOf(query): QueryOf<LogQuery>,
) -> Result<Response, ApiError> {
    api.found(|state| owned(&state, &caller, id).map(drop))
        .await?;
    let log = api.relay.console_tail(id, LOG_BYTES).await?;
    let log = log
        .ok_or_else(|| ApiError::new(Code::NotFound, format!("no console log of {id} is kept")))?;
    let tail = last_lines(&log, query.tail.unwrap_or(usize::MAX)).to_vec();
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], tail).into_response())
}

/// Changes what may be changed of a capsule while it lives.
#[utoipa::path(
    patch, path = "/v1/capsules/{id}", tag = "capsules",
    params(("id" = String, Path)), request_body = ChangeCapsule,
    responses((status = 200, description = "As it is now.", body = Capsule))
)]
pub(super) async fn change(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(request): JsonBody<ChangeCapsule>,
) -> Result<Json<Capsule>, ApiError> {
    let known = api.sandbox_to_change(&caller, id, |_| true).await?;
    if known.phase.is_ended() {
        return Err(wrong_state(id, known.phase, "changed", "alive"));
    }
    let asked = Command::ChangeSandbox {
        id,
        ports_open: request.ports.map(|ports| ports == Ports::Public),
        wakes: request.auto_resume,
    };
    api.propose(&caller, asked).await?;
    let state = api.view.state();
    Ok(Json(Capsule::of(&state, owned(&state, &caller, id)?, None)))
}

/// Waits until the sandbox's phase is as wanted, and returns the state it was seen in; at the
/// deadline, the state as it is.
pub(super) async fn settle(
    api: &ApiState,
    id: SandboxId,
    deadline: Instant,
    wanted: impl Fn(Phase) -> bool,
) -> raft::state::State {
    let seen = api
        .view
        .wait_for(deadline, |state| match state.sandbox(id) {
            Some(sandbox) if !wanted(sandbox.phase) => None,
            Some(_) | None => Some(state.clone()),
        });
    match seen.await {
        Some(state) => state,
        None => api.view.state(),
    }
}

fn not_started(sandbox: &Sandbox) -> ApiError {
    let id = sandbox.id;
    let why = if sandbox.reason.is_empty() {
        "it was stopped while it started"
    } else {
        &sandbox.reason
    };
    ApiError::new(
        Code::AgentError,
        format!("capsule {id} did not start: {why}"),
    )
}

/// The last `count` lines of `log`.
fn last_lines(log: &[u8], count: usize) -> &[u8] {
    let body = log.strip_suffix(b"\n").unwrap_or(log);
    if count == 0 {
        return &[];
    }
    let breaks = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    let start = breaks.map(|(at, _)| at + 1).nth(count - 1).unwrap_or(0);
    &log[start..]
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn a_tail_counts_lines_from_the_end() {
        let log = b"one\ntwo\nthree\n";
        assert_eq!(last_lines(log, 0), b"");
        assert_eq!(last_lines(log, 1), b"three\n");
        assert_eq!(last_lines(log, 2), b"two\nthree\n");
        assert_eq!(last_lines(log, 9), log);
        assert_eq!(last_lines(b"no end", 1), b"no end");
        assert_eq!(last_lines(b"", 1), b"");
    }
}
