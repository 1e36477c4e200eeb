//! The events of a process as frames for its client.

use serde::Serialize;

use super::session::{Down, Gone};
use super::text::Decoder;
use crate::guest::{EventStream, GuestError, ProcessEvent};

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
    Broken(GuestError),
}

impl From<Gone> for Unwatched {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<GuestError> for Unwatched {
    fn from(err: GuestError) -> Self {
        Self::Broken(err)
    }
}

/// Waits for the first event of a process, its start.
pub(super) async fn started(events: &mut EventStream) -> Result<u32, GuestError> {
    while let Some(event) = events.next().await? {
        match event {
            ProcessEvent::Start { pid } => return Ok(pid),
            ProcessEvent::KeepAlive => {}
            other => return Err(unexpected(&format!("{other:?} before the start"))),
        }
    }
    Err(unexpected("no start"))
}

/// The error of events that make no sense.
pub(super) fn unexpected(what: &str) -> GuestError {
    GuestError::Nonsense(format!("it streamed {what}"))
}

/// Tells the client what becomes of process `pid`, until it ends.
pub(super) async fn watch(pid: u32, events: &mut EventStream, down: &mut Down) -> Unwatched {
    match follow(pid, events, down).await {
        Ok(()) => Unwatched::Exited,
        Err(why) => why,
    }
}

async fn follow(pid: u32, events: &mut EventStream, down: &mut Down) -> Result<(), Unwatched> {
    down.send(&Told::Start { pid }).await?;
    let (mut stdout, mut stderr) = (Decoder::default(), Decoder::default());
    while let Some(event) = events.next().await? {
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
