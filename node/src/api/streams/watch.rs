//! The events of a process as frames for its client.

use serde::Serialize;

use super::super::error::{ApiError, Code};
use super::super::run::Run;
use super::session::{Down, Gone};
use super::text::Decoder;
use crate::guest::{EventStream, ProcessEvent};

/// What a client is told of a process.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Told {
    Start { pid: u32 },
    Stdout { data: String },
    Stderr { data: String },
    Exit { exit_code: i32 },
}

/// Why the watching of a process ended.
pub(super) enum Unwatched {
    /// It ended, and the client was told.
    Exited,
    /// The client does not read any more.
    Gone,
    /// Its events broke off.
    Broken(ApiError),
}

impl From<Gone> for Unwatched {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<ApiError> for Unwatched {
    fn from(err: ApiError) -> Self {
        Self::Broken(err)
    }
}

/// Waits for the first event of a process, its start.
pub(super) async fn started(guest: &Run, events: &mut EventStream) -> Result<u32, ApiError> {
    while let Some(event) = guest.told(events.next().await).await? {
        match event {
            ProcessEvent::Start { pid } => return Ok(pid),
            ProcessEvent::KeepAlive => {}
            other => return Err(unexpected(&format!("{other:?} before the start"))),
        }
    }
    Err(unexpected("no start"))
}

fn unexpected(what: &str) -> ApiError {
    let message = format!("the guest agent streamed {what}");
    ApiError::new(Code::AgentError, message)
}

/// Tells the client what becomes of process `pid` of `guest`, until it ends.
pub(super) async fn watch(
    guest: &Run,
    pid: u32,
    events: &mut EventStream,
    down: &mut Down,
) -> Unwatched {
    match follow(guest, pid, events, down).await {
        Ok(()) => Unwatched::Exited,
        Err(why) => why,
    }
}

async fn follow(
    guest: &Run,
    pid: u32,
    events: &mut EventStream,
    down: &mut Down,
) -> Result<(), Unwatched> {
    down.send(&Told::Start { pid }).await?;
    let (mut stdout, mut stderr) = (Decoder::default(), Decoder::default());
    while let Some(event) = guest.told(events.next().await).await? {
        match event {
            ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes) => {
                tell_stdout(stdout.push(&bytes), down).await?;
            }
            ProcessEvent::Stderr(bytes) => tell_stderr(stderr.push(&bytes), down).await?,
            ProcessEvent::End { exit_code } => {
                tell_stdout(stdout.finish(), down).await?;
                tell_stderr(stderr.finish(), down).await?;
                down.send(&Told::Exit { exit_code }).await?;
                return Ok(());
            }
            ProcessEvent::Start { .. } | ProcessEvent::KeepAlive => {}
        }
    }
    Err(unexpected("no end").into())
}

async fn tell_stdout(data: String, down: &mut Down) -> Result<(), Gone> {
    if data.is_empty() {
        return Ok(());
    }
    down.send(&Told::Stdout { data }).await
}

async fn tell_stderr(data: String, down: &mut Down) -> Result<(), Gone> {
    if data.is_empty() {
        return Ok(());
    }
    down.send(&Told::Stderr { data }).await
}
