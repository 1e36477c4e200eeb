//! `GET /v1/capsules/{id}/pty`: a terminal.
//!
//! Output comes as binary frames, input goes as binary frames (or base64 in text, as older clients send it).
//! What is typed waits in a short queue of its own, so that a program that does not read holds up neither its output
//! nor a `kill`. Past the queue the client is held up instead, and nothing is lost. Where a piece could not be typed
//! within its time, some of it may have been: nobody knows what the program has read, so the session ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::close_code;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use proto::ids::SandboxId;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{self, MissedTickBehavior};

use super::super::auth::{Caller, Presented};
use super::super::error::ApiError;
use super::super::exec::checked;
use super::super::extract::CapsuleId;
use super::super::run::Run;
use super::super::state::ApiState;
use super::session::{Down, ErrorFrame, Frame, Gone, MESSAGE_BYTES, Session, Up, Upgrade};
use super::watch::{Unwatched, started, unexpected};
use crate::guest::{
    EventStream, GuestCode, GuestError, ProcessCommand, ProcessEvent, Selector, Signal,
    TerminalSize,
};

/// The program of a terminal for which none is named.
const DEFAULT_PROGRAM: &str = "/bin/bash";
/// The size of a terminal for which none is named, as of the first video terminals.
const DEFAULT_SIZE: TerminalSize = TerminalSize { cols: 80, rows: 24 };
/// How often a client is asked for a sign of life; proxies cut what is silent for a minute.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Frames of input that may wait for the guest: as many keys as anybody hits before they look up.
const TYPED_AHEAD: usize = 64;
/// Bytes of input that may wait for the guest, in all frames together: a paste of a megabyte is one
/// frame, the largest there is.
const TYPED_AHEAD_BYTES: usize = MESSAGE_BYTES;
/// Complaints that may wait for the client.
const COMPLAINTS: usize = 16;

/// What a client says first.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum First {
    Start(Start),
    Connect { tag: String },
}

/// A terminal to start. Everything may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Start {
    cmd: String,
    args: Option<Vec<String>>,
    cols: u16,
    rows: u16,
    envs: Option<BTreeMap<String, String>>,
    cwd: Option<String>,
    user: Option<String>,
}

/// What a client says later, beside bytes it types.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Said {
    Input { data: String },
    Resize { cols: u16, rows: u16 },
    Kill,
    Pong,
}

/// What a client is told, beside bytes the terminal shows.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Told<'a> {
    Started { tag: &'a str, pid: u32 },
    Exit { exit_code: i32 },
    Ping,
}

/// A terminal that runs.
struct Terminal {
    guest: Run,
    tag: String,
    pid: u32,
}

/// Opens a terminal, or finds one again by its tag, over WebSocket.
///
/// The client sends `{"type":"start","cmd","args","cols","rows","envs","cwd","user"}` or `{"type":"connect","tag"}`
/// first, then binary frames of input and `resize`, `kill` and `pong`. It is sent `started` with `tag` and `pid`,
/// binary frames of output, `ping`, then `exit` with `exit_code`, or `error`. Closing leaves the terminal alone.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/pty", tag = "processes",
    params(("id" = String, Path)),
    responses((status = 101, description = "The WebSocket is open."))
)]
pub(in crate::api) async fn pty(
    State(api): State<ApiState>,
    presented: Presented,
    CapsuleId(id): CapsuleId,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let run = {
        let api = api.clone();
        async move |caller: Caller, mut session: Session| match begin(
            &api,
            &caller,
            id,
            &mut session,
        )
        .await
        {
            Ok((terminal, events)) => api.busy(id, stream(&terminal, events, session)).await,
            Err(err) => session.refuse(&err).await,
        }
    };
    upgrade.open(&api, presented, run)
}

async fn begin(
    api: &ApiState,
    caller: &Caller,
    id: SandboxId,
    session: &mut Session,
) -> Result<(Terminal, EventStream), ApiError> {
    let first = serde_json::from_str(&session.first().await?).map_err(|err| {
        ApiError::invalid(format!("the first frame must be start or connect: {err}"))
    })?;
    let guest = api.guest(caller, id).await?;
    let (tag, opened) = match first {
        First::Connect { tag } => {
            let found = guest.attach(Selector::Tag(tag.clone())).await;
            (tag, found)
        }
        First::Start(start) => {
            let tag = format!("pty-{:08x}", rand::random::<u32>());
            let (command, size) = start.checked(tag.clone())?;
            (tag, guest.start_terminal(command, size).await)
        }
    };
    let mut events = guest.told(opened).await?;
    let pid = guest.told(started(&mut events).await).await?;
    Ok((Terminal { guest, tag, pid }, events))
}

impl Start {
    fn checked(self, tag: String) -> Result<(ProcessCommand, TerminalSize), ApiError> {
        let or = |asked: u16, default| if asked == 0 { default } else { asked };
        let size = TerminalSize {
            cols: or(self.cols, DEFAULT_SIZE.cols),
            rows: or(self.rows, DEFAULT_SIZE.rows),
        };
        let program = Some(self.cmd).filter(|cmd| !cmd.is_empty());
        let command = checked(ProcessCommand {
            cmd: program.unwrap_or_else(|| DEFAULT_PROGRAM.into()),
            args: self.args.unwrap_or_default(),
            envs: self.envs.unwrap_or_default(),
            cwd: self.cwd.filter(|cwd| !cwd.is_empty()),
            tag: Some(tag),
            user: self.user.filter(|user| !user.is_empty()),
        })?;
        Ok((command, size))
    }
}

/// Input on its way to the guest, and its share of the bytes that may wait.
struct Piece {
    bytes: Bytes,
    _share: OwnedSemaphorePermit,
}

/// Where input waits for the guest.
struct Typed {
    queue: mpsc::Sender<Piece>,
    room: Arc<Semaphore>,
}

impl Typed {
    fn new() -> (Self, mpsc::Receiver<Piece>) {
        let (queue, to_type) = mpsc::channel(TYPED_AHEAD);
        let room = Arc::new(Semaphore::new(TYPED_AHEAD_BYTES));
        (Self { queue, room }, to_type)
    }

    /// Queues a piece, once there is room for it.
    async fn push(&self, bytes: Bytes) -> Result<(), String> {
        let ending = || "the session is ending".to_owned();
        // No frame is larger than the queue; one that were would have it to itself.
        let share = u32::try_from(bytes.len().min(TYPED_AHEAD_BYTES)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(share);
        let piece = Piece {
            bytes,
            _share: room.await.map_err(|_| ending())?,
        };
        self.queue.send(piece).await.map_err(|_| ending())
    }
}

async fn stream(terminal: &Terminal, events: EventStream, mut session: Session) {
    let (typed, to_type) = Typed::new();
    let (complain, complaints) = mpsc::channel(COMPLAINTS);
    let (up, down) = (&mut session.up, &mut session.down);
    let outcome = tokio::select! {
        outcome = show(terminal, events, complaints, down) => outcome,
        () = listen(terminal, up, typed, complain.clone()) => Unwatched::Gone,
        failed = type_all(terminal, to_type, complain) => {
            return session.refuse(&half_typed(terminal.guest.explained(failed).await)).await;
        }
        () = session.stop.cancelled() => {
            return session.close(close_code::AWAY, "this node stops; connect again by tag").await;
        }
    };
    match outcome {
        Unwatched::Broken(err) => session.refuse(&terminal.guest.explained(err).await).await,
        Unwatched::Exited | Unwatched::Gone => session.close(close_code::NORMAL, "").await,
    }
}

/// Shows the client what the terminal shows, until its program ends.
async fn show(
    terminal: &Terminal,
    mut events: EventStream,
    mut complaints: mpsc::Receiver<String>,
    down: &mut Down,
) -> Unwatched {
    let mut pings = time::interval(PING_INTERVAL);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings.reset();
    let (tag, pid) = (terminal.tag.as_str(), terminal.pid);
    if let Err(gone) = down.send(&Told::Started { tag, pid }).await {
        return gone.into();
    }
    loop {
        let sent = tokio::select! {
            event = events.next() => match event {
                Ok(Some(ProcessEvent::End { exit_code })) => {
                    return match down.send(&Told::Exit { exit_code }).await {
                        Ok(()) => Unwatched::Exited,
                        Err(gone) => gone.into(),
                    };
                }
                Ok(Some(event)) => show_one(event, down).await,
                Ok(None) => return unexpected("no end").into(),
                Err(err) => return err.into(),
            },
            Some(data) = complaints.recv() => {
                down.send(&ErrorFrame { data, fatal: false }).await
            }
            _ = pings.tick() => down.send(&Told::Ping).await,
        };
        if let Err(gone) = sent {
            return gone.into();
        }
    }
}

async fn show_one(event: ProcessEvent, down: &mut Down) -> Result<(), Gone> {
    match event {
        ProcessEvent::Pty(bytes) | ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes) => {
            down.send_bytes(bytes).await
        }
        ProcessEvent::Start { .. } | ProcessEvent::End { .. } | ProcessEvent::KeepAlive => Ok(()),
    }
}

/// Does what the client says until it is gone.
async fn listen(terminal: &Terminal, up: &mut Up, typed: Typed, complain: mpsc::Sender<String>) {
    while let Some(frame) = up.next().await {
        let done = match frame {
            Frame::Binary(bytes) => typed.push(bytes).await,
            Frame::Text(text) => obey(terminal, &text, &typed).await,
        };
        if let Err(complaint) = done {
            // A client that does not read its complaints needs no more of them.
            let _unread = complain.try_send(complaint);
        }
    }
}

async fn obey(terminal: &Terminal, text: &str, typed: &Typed) -> Result<(), String> {
    let said = serde_json::from_str(text).map_err(|err| format!("this frame is unknown: {err}"))?;
    let process = Selector::Pid(terminal.pid);
    let done = match said {
        Said::Pong => return Ok(()),
        Said::Input { data } => {
            let bytes = STANDARD.decode(data);
            let bytes = bytes.map_err(|err| format!("input must be base64: {err}"))?;
            return typed.push(bytes.into()).await;
        }
        Said::Resize { cols, rows } if cols > 0 && rows > 0 => {
            let size = TerminalSize { cols, rows };
            terminal.guest.resize(process, size).await
        }
        Said::Resize { .. } => return Err("a terminal has a column and a row at least".into()),
        Said::Kill => terminal.guest.signal(process, Signal::Kill).await,
    };
    done.or_else(unless_over).map_err(|err| err.message)
}

/// Types what the client sent, in order, until the session ends. Returns where it is not known how
/// much of a piece the program was given: what follows would be taken for the rest of it.
async fn type_all(
    terminal: &Terminal,
    mut to_type: mpsc::Receiver<Piece>,
    complain: mpsc::Sender<String>,
) -> GuestError {
    while let Some(piece) = to_type.recv().await {
        let process = Selector::Pid(terminal.pid);
        match terminal.guest.type_into(process, piece.bytes.clone()).await {
            Ok(()) => {}
            Err(err) if is_unsure(&err) => return err,
            Err(err) => {
                if let Err(err) = unless_over(err) {
                    let _unread = complain.try_send(err.message);
                }
            }
        }
    }
    // The listener ends first, and the session with it.
    std::future::pending().await
}

/// Whether a piece may have been typed in part when the call for it failed.
const fn is_unsure(err: &GuestError) -> bool {
    match err {
        GuestError::TimedOut { .. } | GuestError::Unreachable { .. } => true,
        // The agent writes before it answers, and refuses before it writes.
        GuestError::Refused { .. } | GuestError::Nonsense(_) => false,
    }
}

/// What ends a session whose last piece may have been typed in part.
fn half_typed(err: ApiError) -> ApiError {
    let message = format!(
        "what was typed last may have arrived in part: {}; connect again by tag",
        err.message
    );
    ApiError { message, ..err }
}

/// A process that is over cannot be told anything, and the client is just being told so.
fn unless_over(err: GuestError) -> Result<(), ApiError> {
    match err {
        GuestError::Refused {
            code: GuestCode::NotFound,
            ..
        } => Ok(()),
        other => Err(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn start(json: &str) -> Result<(ProcessCommand, TerminalSize), ApiError> {
        match serde_json::from_str(json).expect("a first frame") {
            First::Start(start) => start.checked("pty-1".into()),
            First::Connect { tag } => panic!("connects to {tag}"),
        }
    }

    #[test]
    fn a_terminal_for_which_nothing_is_named_is_bash_of_80_by_24() {
        let (command, size) = start(r#"{"type":"start","cols":0}"#).expect("a terminal");
        assert_eq!(command.cmd, DEFAULT_PROGRAM);
        assert_eq!(size, DEFAULT_SIZE);
        assert_eq!(command.tag.as_deref(), Some("pty-1"));
    }

    #[tokio::test]
    async fn input_that_waits_is_bounded_in_bytes_and_given_back_once_typed() {
        let (typed, mut to_type) = Typed::new();
        let paste = Bytes::from(vec![b'x'; TYPED_AHEAD_BYTES]);
        let key = Bytes::from_static(b"y");
        typed.push(paste).await.expect("room for a paste");
        assert_eq!(typed.push(key.clone()).now_or_never(), None, "held up");
        drop(to_type.recv().await.expect("a piece"));
        assert_eq!(typed.push(key).now_or_never(), Some(Ok(())));
    }

    #[test]
    fn only_a_piece_that_may_be_half_typed_ends_the_session() {
        let waited = Duration::from_secs(120);
        let late = GuestError::TimedOut { waited };
        assert!(is_unsure(&late));
        let refused = GuestError::Refused {
            code: GuestCode::NotFound,
            message: "no such process".into(),
        };
        assert!(!is_unsure(&refused));
        let told = half_typed(late.into());
        assert!(told.message.contains("in part"), "{}", told.message);
    }

    #[test]
    fn words_that_no_program_can_be_given_are_refused() {
        for json in [
            r#"{"type":"start","cmd":"a\u0000"}"#,
            r#"{"type":"start","cwd":"/\u0000"}"#,
            r#"{"type":"start","user":"a:b"}"#,
            r#"{"type":"start","envs":{"":"x"}}"#,
        ] {
            assert!(start(json).is_err(), "{json} was accepted");
        }
    }
}
