//! `GET /v1/capsules/{id}/exec/stream`: a command whose output streams while it runs.
//!
//! The command belongs to its client: a client that says `stop`, or goes away, ends it.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::extract::ws::close_code;
use axum::response::Response;
use proto::ids::SandboxId;
use serde::Deserialize;
use tracing::debug;

use super::super::auth::{Caller, Presented};
use super::super::error::ApiError;
use super::super::exec::checked;
use super::super::extract::CapsuleId;
use super::super::run::Run;
use super::super::state::ApiState;
use super::session::{Frame, Session, Up, Upgrade};
use super::watch::{Unwatched, started, watch};
use crate::guest::{EventStream, ProcessCommand, Selector};

/// What a client says.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Said {
    Start(Start),
    Stop,
}

/// What to run. Beyond program and arguments everything may be left out.
#[derive(Deserialize)]
struct Start {
    cmd: String,
    args: Option<Vec<String>>,
    envs: Option<BTreeMap<String, String>>,
    cwd: Option<String>,
}

/// Runs a command and streams what it writes, over WebSocket.
///
/// The client sends `{"type":"start","cmd","args"}` first, and may send `{"type":"stop"}`, which kills the
/// command, as does closing. It is sent `start` with the `pid`, `stdout` and `stderr` with `data`, then `exit`
/// with `exit_code`, or `error` with `data`.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/exec/stream", tag = "processes",
    params(("id" = String, Path)),
    responses((status = 101, description = "The WebSocket is open."))
)]
pub(in crate::api) async fn exec_stream(
    State(api): State<ApiState>,
    presented: Presented,
    CapsuleId(id): CapsuleId,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let run = {
        let api = api.clone();
        async move |caller: Caller, session: Session| run(&api, &caller, id, session).await
    };
    upgrade.open(&api, presented, run)
}

async fn run(api: &ApiState, caller: &Caller, id: SandboxId, mut session: Session) {
    match begin(api, caller, id, &mut session).await {
        Ok((guest, pid, events)) => {
            let streamed = stream(guest, pid, events, session);
            api.busy(id, streamed).await;
        }
        Err(err) => session.refuse(&err).await,
    }
}

async fn begin(
    api: &ApiState,
    caller: &Caller,
    id: SandboxId,
    session: &mut Session,
) -> Result<(Run, u32, EventStream), ApiError> {
    let command = command(&session.first().await?)?;
    let guest = api.guest(caller, id).await?;
    let mut events = guest.told(guest.start(command, None).await).await?;
    let pid = guest.told(started(&mut events).await).await?;
    Ok((guest, pid, events))
}

fn command(text: &str) -> Result<ProcessCommand, ApiError> {
    let start = match serde_json::from_str(text) {
        Ok(Said::Start(start)) if !start.cmd.is_empty() => start,
        Ok(Said::Start(_)) => return Err(ApiError::invalid("cmd is missing or empty")),
        Ok(Said::Stop) => return Err(ApiError::invalid("there is nothing to stop yet")),
        Err(err) => {
            return Err(ApiError::invalid(format!(
                "the first frame must be a start: {err}"
            )));
        }
    };
    checked(ProcessCommand {
        cmd: start.cmd,
        args: start.args.unwrap_or_default(),
        envs: start.envs.unwrap_or_default(),
        cwd: start.cwd.filter(|cwd| !cwd.is_empty()),
        tag: None,
        user: None,
    })
}

async fn stream(guest: Run, pid: u32, mut events: EventStream, mut session: Session) {
    let outcome = tokio::select! {
        outcome = watch(pid, &mut events, &mut session.down) => outcome,
        () = stopped(&mut session.up) => Unwatched::Gone,
        () = session.stop.cancelled() => {
            // A stopping node leaves it alone; a key that is over takes along what was its own.
            if session.is_over() {
                kill(&guest, pid).await;
            }
            return session.close(close_code::AWAY, "this node stops; attach again by pid").await;
        }
    };
    match outcome {
        Unwatched::Exited => session.close(close_code::NORMAL, "").await,
        Unwatched::Broken(err) => session.refuse(&guest.explained(err).await).await,
        Unwatched::Gone => {
            kill(&guest, pid).await;
            // One that said stop reads on: it is told how the command ended.
            match watch(pid, &mut events, &mut session.down).await {
                Unwatched::Broken(err) => session.refuse(&guest.explained(err).await).await,
                Unwatched::Exited | Unwatched::Gone => session.close(close_code::NORMAL, "").await,
            }
        }
    }
}

/// Ends the command and all that it started: mostly it is a shell, whose children would live on in
/// no list.
async fn kill(guest: &Run, pid: u32) {
    if let Err(err) = guest.kill_tree(Selector::Pid(pid)).await {
        debug!(%err, pid, "a command whose client left was gone already");
    }
}

/// Waits until the client says `stop` or is gone. Other frames mean nothing here.
async fn stopped(up: &mut Up) {
    while let Some(frame) = up.next().await {
        let Frame::Text(text) = frame else { continue };
        if matches!(serde_json::from_str(&text), Ok(Said::Stop)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_frame_that_is_no_start_is_refused_in_words() {
        for text in [
            "",
            "{",
            "[]",
            r#"{"type":"stop"}"#,
            r#"{"type":"start"}"#,
            r#"{"type":"start","cmd":""}"#,
            r#"{"type":"start","cmd":7}"#,
            r#"{"type":"start","cmd":"a\u0000"}"#,
            r#"{"type":"start","cmd":"a","envs":{"=":""}}"#,
        ] {
            let refused = command(text).expect_err(text);
            assert!(!refused.message.is_empty());
        }
        let plain = command(r#"{"type":"start","cmd":"/bin/sh","args":["-c","true"]}"#);
        assert_eq!(plain.expect("a command").args, ["-c", "true"]);
    }
}
