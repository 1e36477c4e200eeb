//! Snapshots with a name: a capsule as it is at this instant, for others to start from.
//!
//! A running capsule is sealed and goes on; one that is paused stays so, and what it rests as gets the
//! name. A name belongs to the caller's team. The names of the platform's templates are nobody's.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use proto::ids::{ParseIdError, SandboxId, SnapshotId};
use raft::command::{CheckpointSandbox, Command, DropNamed};
use raft::state::{Checkpoint, Phase, Purpose, SnapshotKind, State as Replicated};
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::capsules::hints;
use super::create::{DEFAULT_TEMPLATE, check_labels, check_name};
use super::error::{ApiError, Code};
use super::extract::{JsonBody, PathName, QueryOf};
use super::pausing::{failed, wrong_state};
use super::retry::{Ids, RetryKey};
use super::state::{ApiState, owned};
use super::wire::TemplateShape;

/// Names of templates that the specification promises to everybody, present or not.
const PROTECTED: [&str; 5] = [
    DEFAULT_TEMPLATE,
    "minimal-ubuntu",
    "minimal-alpine",
    "minimal-arch",
    "minimal-fedora",
];

/// What to make a snapshot of.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct CreateSnapshot {
    /// The capsule.
    sandbox_id: String,
    /// Its name; `template-` and eight digits where absent.
    name: Option<String>,
    /// Labels.
    metadata: Option<BTreeMap<String, String>>,
}

/// Whether a name may be taken over.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct SnapshotQuery {
    /// Replaces the team's snapshot of that name, if there is one.
    #[serde(default)]
    overwrite: bool,
}

/// Seals a capsule under a name. One that runs goes on; one that is paused stays paused.
#[utoipa::path(
    post, path = "/v1/snapshots", tag = "templates", request_body = CreateSnapshot,
    params(SnapshotQuery, ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, description = "It is there, durably.", body = TemplateShape))
)]
pub(super) async fn create(
    State(api): State<ApiState>,
    caller: Caller,
    retry: RetryKey,
    QueryOf(query): QueryOf<SnapshotQuery>,
    JsonBody(request): JsonBody<CreateSnapshot>,
) -> Result<(StatusCode, Json<TemplateShape>), ApiError> {
    let deadline = Instant::now() + api.checkpoint_wait;
    let id = request.sandbox_id.parse();
    let id: SandboxId = id.map_err(|err: ParseIdError| ApiError::invalid(err.to_string()))?;
    let asked = ["snapshot", &request.sandbox_id];
    let asked = asked.into_iter().chain(request.name.as_deref());
    let ids = retry.ids(&caller, &asked.collect::<Vec<_>>());
    let name = request.name.unwrap_or_else(|| any_name(&ids));
    check_name("name", &name)?;
    let metadata = request.metadata.unwrap_or_default();
    check_labels(&metadata)?;
    refuse_platforms(&api.view.state(), &name)?;
    let purpose = Purpose::Name {
        name: name.clone(),
        kind: SnapshotKind::Snapshot,
        overwrite: query.overwrite,
        metadata,
    };
    let ask = ids.ask();
    checkpoint(&api, &caller, id, Checkpoint { ask, purpose }).await?;
    let state = taken(&api, id, ask, deadline).await;
    let made = state.named(caller.team, &name).filter(|it| it.ask == ask);
    if let Some(named) = made {
        return Ok((StatusCode::CREATED, Json(named.into())));
    }
    Err(not_taken(&state, &caller, id, "/v1/snapshots"))
}

/// Takes a name off a snapshot. What was started from it goes on.
#[utoipa::path(
    delete, path = "/v1/snapshots/{name}", tag = "templates",
    params(("name" = String, Path)),
    responses((status = 204, description = "It is gone."))
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    caller: Caller,
    PathName(name): PathName,
) -> Result<StatusCode, ApiError> {
    check_name("name", &name)?;
    let snapshot = api.found(|state| {
        if let Some(named) = state.named(caller.team, &name) {
            return Ok(named.snapshot);
        }
        refuse_platforms(&state, &name)?;
        let why = format!("no snapshot {name:?}");
        Err(ApiError::new(Code::NotFound, why))
    });
    let snapshot = snapshot.await?;
    let drop = DropNamed {
        team: caller.team,
        name,
        snapshot,
    };
    api.propose(&caller, Command::DropNamed(drop)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Asks for a checkpoint of the caller's capsule. One that was asked for before, and is under way or has
/// come about, is not asked for again, whatever became of the capsule.
pub(super) async fn checkpoint(
    api: &ApiState,
    caller: &Caller,
    id: SandboxId,
    checkpoint: Checkpoint,
) -> Result<(), ApiError> {
    if api
        .view
        .state()
        .knows_checkpoint(caller.team, id, &checkpoint)
    {
        return Ok(());
    }
    let fits = |phase| matches!(phase, Phase::Running | Phase::Paused);
    let known = api.sandbox_to_change(caller, id, fits).await?;
    if !fits(known.phase) {
        let needed = "running or paused";
        return Err(wrong_state(id, known.phase, "sealed", needed));
    }
    let command = CheckpointSandbox {
        id,
        epoch: known.epoch,
        checkpoint,
        hints: hints(api),
    };
    api.propose(caller, Command::CheckpointSandbox(command))
        .await?;
    Ok(())
}

/// Waits until a checkpoint is no longer under way, and returns the state it was seen in; at the
/// deadline, the state as it is.
async fn taken(api: &ApiState, id: SandboxId, ask: SnapshotId, deadline: Instant) -> Replicated {
    let seen = api.view.wait_for(deadline, |state| {
        (!is_under_way(state, id, ask)).then(|| state.clone())
    });
    seen.await.unwrap_or_else(|| api.view.state())
}

/// Whether a checkpoint is being taken, or its guest is about to go on.
pub(super) fn is_under_way(state: &Replicated, id: SandboxId, ask: SnapshotId) -> bool {
    let known = state
        .sandbox(id)
        .filter(|it| it.phase == Phase::Snapshotting);
    let is_it = |of: &Checkpoint| of.ask == ask;
    known.is_some_and(|it| it.checkpoint.as_ref().is_none_or(is_it))
}

/// Why a checkpoint has come to nothing, or not yet; `look` is where its outcome shows.
pub(super) fn not_taken(
    state: &Replicated,
    caller: &Caller,
    id: SandboxId,
    look: &str,
) -> ApiError {
    let sandbox = match owned(state, caller, id) {
        Ok(sandbox) => sandbox,
        Err(err) => return err,
    };
    match sandbox.phase {
        Phase::Snapshotting => ApiError::new(
            Code::HostUnavailable,
            format!(
                "the snapshot of capsule {id} is still being taken; {look} shows it once it is"
            ),
        ),
        Phase::Running => failed(sandbox, "could not be sealed and runs on"),
        phase => wrong_state(id, phase, "sealed", "running or paused"),
    }
}

/// Refuses a name that is the platform's, whether it has a template of that name or not.
pub(super) fn refuse_platforms(state: &Replicated, name: &str) -> Result<(), ApiError> {
    if PROTECTED.contains(&name) || state.template(name).is_some() {
        let why = format!("the template {name:?} is the platform's");
        return Err(ApiError::new(Code::Forbidden, why));
    }
    Ok(())
}

/// A name for a snapshot whose client gave none.
fn any_name(ids: &Ids) -> String {
    format!("template-{:08x}", ids.number())
}
