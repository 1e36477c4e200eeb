//! `GET /v1/capsules/{id}/processes/{selector}/stream`: watches a process that lives on without its watcher.

use axum::extract::State;
use axum::extract::ws::close_code;
use axum::response::Response;
use proto::ids::SandboxId;

use super::super::auth::{Caller, Presented};
use super::super::error::ApiError;
use super::super::extract::{CapsuleId, ProcessSelector};
use super::super::run::Run;
use super::super::state::ApiState;
use super::session::{Session, Up, Upgrade};
use super::watch::{Unwatched, started, watch};
use crate::guest::{EventStream, Selector};

/// Streams what a process writes from now on, over WebSocket.
///
/// The frames are those of `exec/stream`; the client sends nothing. Closing leaves the process alone.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/processes/{selector}/stream", tag = "processes",
    params(("id" = String, Path), ("selector" = String, Path)),
    responses((status = 101, description = "The WebSocket is open."))
)]
pub(in crate::api) async fn process_stream(
    State(api): State<ApiState>,
    presented: Presented,
    CapsuleId(id): CapsuleId,
    ProcessSelector(selector): ProcessSelector,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let process = Selector::parse(&selector);
    let run = {
        let api = api.clone();
        async move |caller: Caller, session: Session| match attach(&api, &caller, id, process).await
        {
            Ok((guest, pid, events)) => {
                api.busy(id, stream(&guest, pid, events, session)).await;
            }
            Err(err) => session.refuse(&err).await,
        }
    };
    upgrade.open(&api, presented, run)
}

async fn attach(
    api: &ApiState,
    caller: &Caller,
    id: SandboxId,
    process: Selector,
) -> Result<(Run, u32, EventStream), ApiError> {
    let guest = api.guest(caller, id).await?;
    let mut events = guest.told(guest.attach(process).await).await?;
    let pid = guest.told(started(&mut events).await).await?;
    Ok((guest, pid, events))
}

async fn stream(guest: &Run, pid: u32, mut events: EventStream, mut session: Session) {
    let outcome = tokio::select! {
        outcome = watch(pid, &mut events, &mut session.down) => outcome,
        () = left(&mut session.up) => Unwatched::Gone,
        () = session.stop.cancelled() => {
            return session.close(close_code::AWAY, "this node stops; attach again").await;
        }
    };
    match outcome {
        Unwatched::Broken(err) => session.refuse(&guest.explained(err).await).await,
        Unwatched::Exited | Unwatched::Gone => session.close(close_code::NORMAL, "").await,
    }
}

/// Waits until the client is gone, whatever it says.
async fn left(up: &mut Up) {
    while up.next().await.is_some() {}
}
