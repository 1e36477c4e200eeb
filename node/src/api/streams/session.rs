//! One WebSocket: who may open it, what goes through it, and how it ends.
//!
//! An upgrade is refused with a status only where it is malformed, its key is unknown or this node has too many
//! sessions. All else is told in an `error` frame, since browsers show nobody the status of a refused upgrade.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::request::Parts;
use axum::response::Response;
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_tungstenite::tungstenite;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::super::auth::{Caller, Presented};
use super::super::error::{ApiError, Code};
use super::super::grants::Grant;
use super::super::preview::Peer;
use super::super::scopes;
use super::super::state::ApiState;

/// Sessions open at once. Each holds a connection to its guest and some buffers, 200 KiB at most.
const MAX_SESSIONS: usize = 1024;
/// Sockets open at once whose clients have not shown a key yet: as many browsers as may come within
/// [`AUTH_TIMEOUT`]. They are counted apart, so that nobody without a key keeps those out who have one.
const MAX_STRANGERS: usize = 64;
/// Largest message from a client, and largest frame of one: the start of a long script, as for a JSON
/// body.
pub(super) const MESSAGE_BYTES: usize = 1 << 20;
/// Longest a client without a key in its upgrade may take to send one.
const AUTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a client may take to say what it wants.
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest a client is waited for to close its side. A socket that is closed with unread input is reset, and
/// the last frames are lost with it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a session ends whose key has.
const KEY_OVER: &str = "the API key was revoked, or has expired";

/// The sessions of this node.
#[derive(Clone, Debug)]
pub(in crate::api) struct Sessions {
    slots: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    stop: CancellationToken,
    open: TaskTracker,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            slots: Arc::new(Semaphore::new(MAX_SESSIONS)),
            strangers: Arc::new(Semaphore::new(MAX_STRANGERS)),
            stop: CancellationToken::new(),
            open: TaskTracker::new(),
        }
    }
}

impl Sessions {
    /// Runs `work` as a session of its own, which is dropped when the sessions end.
    pub(in crate::api) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.open.spawn(async move {
            stop.run_until_cancelled(work).await;
        });
    }

    /// Resolves once they are to end.
    pub(in crate::api) fn ending(&self) -> impl Future<Output = ()> + Send + use<> {
        self.stop.clone().cancelled_owned()
    }

    /// Fires when the sessions end.
    pub(in crate::api) fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// A place among the sessions of clients whose key is known.
    fn slot(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        place(&self.slots, || {
            format!("this node serves {MAX_SESSIONS} WebSockets already")
        })
    }

    /// A place among the sockets whose clients have not said who they are.
    fn stranger(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        place(&self.strangers, || {
            format!("{MAX_STRANGERS} WebSockets wait for a key already; send it with the upgrade")
        })
    }

    /// Ends all sessions and returns once they are closed.
    pub(in crate::api) async fn end(&self) {
        self.stop.cancel();
        self.open.close();
        self.open.wait().await;
    }
}

/// One of `places`, unless all are taken.
fn place(
    places: &Arc<Semaphore>,
    why: impl FnOnce() -> String,
) -> Result<OwnedSemaphorePermit, ApiError> {
    let place = Arc::clone(places).try_acquire_owned();
    place.map_err(|_| ApiError::new(Code::Overloaded, why()))
}

/// A request for a WebSocket.
pub(in crate::api) struct Upgrade(WebSocketUpgrade, Option<IpAddr>);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let from = parts.extensions.get::<Peer>().map(|peer| peer.0.ip());
        let upgrade = WebSocketUpgrade::from_request_parts(parts, state).await;
        upgrade
            .map(|upgrade| Self(upgrade, from))
            .map_err(|err| ApiError::invalid(format!("this route speaks WebSocket: {err}")))
    }
}

impl Upgrade {
    /// Opens a session and gives it to `run`, with whoever asks.
    pub(super) fn open<F>(
        self,
        api: &ApiState,
        Presented(presented): Presented,
        run: impl FnOnce(Caller, Session) -> F + Send + 'static,
    ) -> Result<Response, ApiError>
    where
        F: Future<Output = ()> + Send,
    {
        let sessions = &api.sessions;
        let held = match presented {
            Some(_) => sessions.slot()?,
            None => sessions.stranger()?,
        };
        // Its key may end it as well, and then it alone.
        let (stop, open) = (sessions.stop.child_token(), sessions.open.token());
        let from = self.1;
        let api = api.clone();
        // A frame is kept until all of it is there, and has a limit of its own.
        let sized = self.0.max_message_size(MESSAGE_BYTES);
        let sized = sized.max_frame_size(MESSAGE_BYTES);
        Ok(sized.on_upgrade(async move |socket| {
            let _open = open;
            let (sink, stream) = socket.split();
            let mut session = Session {
                up: Up {
                    stream,
                    is_oversized: false,
                },
                down: Down { sink },
                stop: stop.clone(),
                grant: None,
            };
            let mut held = held;
            let admitted = match presented {
                Some(caller) => Ok(caller),
                None => session.introduced(&api, from, &mut held).await,
            };
            match admitted {
                Ok(caller) => {
                    let grant = api.grants.hold(caller.key, &api.view, api.clock.as_ref());
                    session.grant = Some(grant.clone());
                    stop_with(&grant, &stop, run(caller, session)).await;
                }
                Err(err) => session.refuse(&err).await,
            }
        }))
    }
}

/// Runs a session, and has it stop once its key is over.
async fn stop_with(grant: &Grant, stop: &CancellationToken, run: impl Future<Output = ()>) {
    let over = async {
        grant.ended().await;
        stop.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = run => {}
        () = over => {}
    }
}

/// An open WebSocket: what the client sends, what it is sent, and when this node stops.
pub(super) struct Session {
    pub(super) up: Up,
    pub(super) down: Down,
    pub(super) stop: CancellationToken,
    /// The key's word, once the client said who it is.
    grant: Option<Arc<Grant>>,
}

/// Frames of a client.
pub(super) struct Up {
    stream: SplitStream<WebSocket>,
    /// Whether they ended with one that is too large.
    is_oversized: bool,
}

/// Frames to a client.
pub(super) struct Down {
    sink: SplitSink<WebSocket, Message>,
}

/// A frame of a client, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Text(String),
    Binary(Bytes),
}

/// The client does not read any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone;

/// What a browser sends first, which can set no header.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Introduction {
    Auth { token: String },
}

/// What every session may be told. `fatal` matters to terminals: the session ends with it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "error")]
pub(super) struct ErrorFrame {
    pub(super) data: String,
    pub(super) fatal: bool,
}

impl Session {
    /// Who the client says it is. The place that it has `held` so far becomes one among the sessions.
    async fn introduced(
        &mut self,
        api: &ApiState,
        from: Option<IpAddr>,
        held: &mut OwnedSemaphorePermit,
    ) -> Result<Caller, ApiError> {
        let caller = self.caller(api, from).await?;
        *held = api.sessions.slot()?;
        Ok(caller)
    }

    /// Who the client says it is, in its first frame.
    async fn caller(&mut self, api: &ApiState, from: Option<IpAddr>) -> Result<Caller, ApiError> {
        let wanted = r#"the first frame must be {"type":"auth","token":...}"#;
        let refused = || ApiError::new(Code::Unauthorized, wanted);
        let first = time::timeout(AUTH_TIMEOUT, self.up.next()).await;
        let Ok(Some(Frame::Text(text))) = first else {
            return Err(refused());
        };
        let Ok(Introduction::Auth { token }) = serde_json::from_str(&text) else {
            return Err(refused());
        };
        scopes::introduced(api, &token, from).await
    }

    /// The frame that says what the client wants.
    pub(super) async fn first(&mut self) -> Result<String, ApiError> {
        match time::timeout(FIRST_FRAME_TIMEOUT, self.up.next()).await {
            Ok(Some(Frame::Text(text))) => Ok(text),
            Ok(Some(Frame::Binary(_))) => Err(ApiError::invalid("the first frame must be text")),
            Ok(None) if self.up.is_oversized => {
                let message = format!("a frame may have {MESSAGE_BYTES} bytes at most");
                Err(ApiError::new(Code::TooLarge, message))
            }
            Ok(None) => Err(ApiError::invalid("the client left without a word")),
            Err(_) => Err(ApiError::invalid(format!(
                "no frame came within {FIRST_FRAME_TIMEOUT:?}"
            ))),
        }
    }

    /// Says why nothing comes of this session, and ends it.
    pub(super) async fn refuse(mut self, err: &ApiError) {
        let frame = ErrorFrame {
            data: err.message.clone(),
            fatal: true,
        };
        if self.down.send(&frame).await.is_ok() {
            self.close(close_code::NORMAL, "").await;
        }
    }

    /// Whether the session has to stop because its key has come to its end.
    pub(super) fn is_over(&self) -> bool {
        self.grant.as_ref().is_some_and(|grant| grant.is_over())
    }

    /// Ends the session: all that was sent arrives, unless the client does not read.
    pub(super) async fn close(mut self, code: u16, reason: &'static str) {
        let (code, reason) = if self.is_over() {
            (close_code::POLICY, KEY_OVER)
        } else {
            (code, reason)
        };
        let frame = CloseFrame {
            code,
            reason: reason.into(),
        };
        let parting = async {
            if self
                .down
                .sink
                .send(Message::Close(Some(frame)))
                .await
                .is_ok()
            {
                while self.up.next().await.is_some() {}
            }
        };
        let _unread = time::timeout(CLOSE_TIMEOUT, parting).await;
    }
}

impl Up {
    /// The next frame; `None` once the client has closed or is gone.
    pub(super) async fn next(&mut self) -> Option<Frame> {
        loop {
            let message = match self.stream.next().await? {
                Ok(message) => message,
                Err(err) => {
                    self.is_oversized = is_oversized(err);
                    return None;
                }
            };
            match message {
                Message::Text(text) => return Some(Frame::Text(text.as_str().to_owned())),
                Message::Binary(bytes) => return Some(Frame::Binary(bytes)),
                Message::Close(_) => return None,
                // The library answers pings by itself.
                Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    }
}

/// Whether a client's frames broke off because one of them, or a message, is too large.
fn is_oversized(err: axum::Error) -> bool {
    let cause = err.into_inner().downcast::<tungstenite::Error>();
    cause.is_ok_and(|cause| matches!(*cause, tungstenite::Error::Capacity(_)))
}

impl Down {
    /// Sends one JSON frame. Waits as long as the client takes to read what came before.
    pub(super) async fn send(&mut self, frame: &(impl Serialize + Sync)) -> Result<(), Gone> {
        // These shapes have no map and no fallible part.
        let json = serde_json::to_string(frame).map_err(|_| Gone)?;
        let sent = self.sink.send(Message::Text(json.into())).await;
        sent.map_err(|_| Gone)
    }

    /// Sends bytes as they are.
    pub(super) async fn send_bytes(&mut self, bytes: Bytes) -> Result<(), Gone> {
        let sent = self.sink.send(Message::Binary(bytes)).await;
        sent.map_err(|_| Gone)
    }
}
