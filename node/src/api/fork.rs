//! Forks: further capsules that start where one is now, each as somebody else.
//!
//! All start from one checkpoint: of a running capsule, which goes on, or from what a paused one rests
//! as. Each succeeds or fails alone; those for which there is no room are shown in `error` with the
//! reason.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use proto::ids::SandboxId;
use raft::state::{Checkpoint, Phase, Purpose, Sandbox, State as Replicated};
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::extract::{CapsuleId, OptionalJson};
use super::retry::{RetryKey, used_otherwise};
use super::snapshots::{checkpoint, is_under_way, not_taken};
use super::state::ApiState;
use super::wire::Capsule;

/// Most forks of one call: one entry of the log places them all.
const MAX_FORKS: u32 = 16;

/// How many forks.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(super) struct Fork {
    /// 1 where absent, 16 at most.
    count: Option<i64>,
}

/// Starts further capsules from where one is now.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/fork", tag = "capsules",
    params(("id" = String, Path), ("Idempotency-Key" = Option<String>, Header)), request_body = Fork,
    responses(
        (status = 201, description = "Each runs, or is in `error`.", body = Vec<Capsule>),
        (status = 202, description = "Some are still starting.", body = Vec<Capsule>),
    )
)]
pub(super) async fn fork(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    retry: RetryKey,
    OptionalJson(request): OptionalJson<Fork>,
) -> Result<(StatusCode, Json<Vec<Capsule>>), ApiError> {
    let deadline = Instant::now() + api.checkpoint_wait;
    let count = count(request.count)?;
    let made_of = retry.ids(&caller, &["fork", &id.to_string()]);
    let ids: Vec<SandboxId> = (0..count).map(|number| made_of.sandbox(number)).collect();
    let purpose = Purpose::Fork { ids: ids.clone() };
    let ask = made_of.ask();
    checkpoint(&api, &caller, id, Checkpoint { ask, purpose }).await?;
    let seen = api.view.wait_for(deadline, |state| {
        let starts = |it: &Sandbox| it.phase == Phase::Starting;
        let is_over = !is_under_way(state, id, ask) && !forks(state, &ids).any(starts);
        is_over.then(|| state.clone())
    });
    let state = seen.await.unwrap_or_else(|| api.view.state());
    let made: Vec<&Sandbox> = forks(&state, &ids).collect();
    if made.is_empty() {
        return Err(not_taken(&state, &caller, id, "/v1/capsules"));
    }
    if made.len() != ids.len() || state.sandbox(made_of.sandbox(count)).is_some() {
        return Err(used_otherwise());
    }
    refuse_if_none(&made)?;
    let starting = made.iter().any(|it| it.phase == Phase::Starting);
    let status = if starting {
        StatusCode::ACCEPTED
    } else {
        StatusCode::CREATED
    };
    let shape = |it: &Sandbox| Capsule::of(&state, it, None);
    Ok((status, Json(made.into_iter().map(shape).collect())))
}

fn count(asked: Option<i64>) -> Result<u32, ApiError> {
    let asked = asked.unwrap_or(1);
    let fits = u32::try_from(asked).ok();
    fits.filter(|count| (1..=MAX_FORKS).contains(count))
        .ok_or_else(|| ApiError::invalid(format!("count must be 1 to {MAX_FORKS}, not {asked}")))
}

fn forks<'a>(state: &'a Replicated, ids: &'a [SandboxId]) -> impl Iterator<Item = &'a Sandbox> {
    ids.iter().filter_map(|id| state.sandbox(*id))
}

/// Where no fork found a host, the call has failed.
fn refuse_if_none(made: &[&Sandbox]) -> Result<(), ApiError> {
    // What ended with the entry that made it was never given out.
    let unplaced = |it: &&&Sandbox| it.phase == Phase::Error && it.created_at == it.updated_at;
    let nowhere = made.iter().filter(unplaced).count() == made.len();
    match made.first().filter(|_| nowhere) {
        Some(first) => Err(ApiError::new(Code::NoHostsAvailable, first.reason.clone())),
        None => Ok(()),
    }
}
