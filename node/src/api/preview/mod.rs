//! Previews: the ports of a capsule, at every node, as `{port}-{id}.{domain}` or by two headers.
//!
//! A request whose host name, or whose headers, name a port goes to the program that listens there, wherever the
//! capsule runs, and never to the interface; all else never comes here. Visitors speak HTTP/1.1 or HTTP/2. Bodies
//! stream both ways, and an upgrade (WebSocket) becomes a pipe. What goes wrong before is told in plain text, since a browser shows it.
//!
//! | file | what it does |
//! |---|---|
//! | `address` | which port of which capsule |
//! | `pass` | who may visit |
//! | `forward` | the request there and the answer back |
//! | `links` | links for those who have no key |

mod address;
mod forward;
mod links;
mod pass;

use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE, LOCATION, RETRY_AFTER, SET_COOKIE};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use proto::ids::SandboxId;
use raft::state::{Phase, Sandbox};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::address::{Address, address};
pub(super) use self::forward::Kept;
use self::forward::Speech;
pub(super) use self::links::{__path_link, link};
use self::pass::Pass;
use super::error::{ApiError, Code};
use super::grants::{Grant, until_ended};
use super::pausing::wake;
use super::rates::{Limit, OF_VISITS, Rates, TooMany};
use super::state::ApiState;
use crate::base::chain::chain;
use crate::guest::Guest;
use crate::relay::RelayError;

/// Visits under way at once, beside the requests to the interface. Each holds two connections and their buffers.
const MAX_VISITS: usize = 2048;

/// Seconds after which a visitor of a busy or missing host may come again.
const BUSY_RETRY_S: u64 = 2;

/// Why a visit breaks off whose key has come to its end.
const KEY_OVER: &str = "the key, or the link's key, was revoked or has expired";

/// Where a connection comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// What all visits share.
#[derive(Clone, Debug)]
pub(super) struct Previews {
    kept: Arc<Kept>,
    slots: Arc<Semaphore>,
    rates: Rates<SandboxId>,
    limit: Limit,
}

impl Previews {
    /// The same, with this limit for the visits to each capsule.
    pub(super) fn limited_to(self, limit: Limit) -> Self {
        Self { limit, ..self }
    }
}

impl Default for Previews {
    fn default() -> Self {
        Self {
            kept: Arc::default(),
            slots: Arc::new(Semaphore::new(MAX_VISITS)),
            rates: Rates::default(),
            limit: OF_VISITS,
        }
    }
}

/// Sends what is meant for a port there, and all else on to the interface.
pub(super) async fn divert(State(api): State<ApiState>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    match address(&parts) {
        None => next.run(Request::from_parts(parts, body)).await,
        Some(Ok(to)) => match visit(&api, to, Request::from_parts(parts, body)).await {
            Ok(answer) => answer,
            Err(refusal) => refusal.answer(),
        },
        Some(Err(words)) => Refusal::new(StatusCode::BAD_REQUEST, words).answer(),
    }
}

/// Why a visit comes to nothing, in plain text.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    words: String,
    /// Seconds after which it may be worth another try.
    retry_after_s: Option<u64>,
}

impl Refusal {
    fn new(status: StatusCode, words: impl Into<String>) -> Self {
        let is_busy = status == StatusCode::SERVICE_UNAVAILABLE;
        Self {
            status,
            words: words.into(),
            retry_after_s: is_busy.then_some(BUSY_RETRY_S),
        }
    }

    fn answer(self) -> Response {
        let text = (CONTENT_TYPE, "text/plain; charset=utf-8");
        let mut answer = (self.status, [text], self.words + "\n").into_response();
        if let Some(seconds) = self.retry_after_s {
            answer.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        answer
    }
}

impl From<TooMany> for Refusal {
    fn from(too_many: TooMany) -> Self {
        let (status, _) = Code::RateLimited.wire();
        Self {
            status,
            words: too_many.words("the visitors of a capsule"),
            retry_after_s: Some(too_many.retry_after_s),
        }
    }
}

impl From<ApiError> for Refusal {
    fn from(err: ApiError) -> Self {
        let (status, _) = err.code.wire();
        Self::new(status, err.message)
    }
}

async fn visit(api: &ApiState, to: Address, request: Request) -> Result<Response, Refusal> {
    let Ok(slot) = api.previews.slots.clone().try_acquire_owned() else {
        let words = format!("this node serves {MAX_VISITS} visits already");
        return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, words));
    };
    let (parts, body) = request.into_parts();
    if parts.method == Method::CONNECT {
        let words = "a port is visited, not tunnelled to: CONNECT is not passed on";
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, words));
    }
    let (sandbox, pass) = admitted(api, to, &parts).await?;
    // Those who may not come in cannot use up what is for those who may.
    let Previews { rates, limit, .. } = &api.previews;
    rates.take(to.id, *limit, api.boot_clock.now())?;
    if let Some(answer) = keep_link(&parts) {
        return Ok(answer);
    }
    let from = parts.extensions.get::<Peer>().map(|peer| peer.0.ip());
    let (sandbox, guest) = guest(api, sandbox).await?;
    let speech = Speech::of(&parts);
    // What flows there is use until its last byte, as a stream may outlast the capsule's timeout.
    let dial = api.relay.port(&sandbox, &guest, to.port);
    let kept = &api.previews.kept;
    let program = kept.client(to, sandbox.epoch, &dial, speech);
    let request = Request::from_parts(parts, body);
    let grant = grant(api, pass);
    let visited = forward::forward(&program, from, (&api.sessions, grant.clone()), request);
    let answered = match &grant {
        None => visited.await,
        Some(grant) => tokio::select! {
            answered = visited => answered,
            () = grant.ended() => return Err(Refusal::new(StatusCode::UNAUTHORIZED, KEY_OVER)),
        },
    };
    let answer = answered.map_err(|err| unanswered(to, &err))?;
    let answer = match grant {
        None => answer,
        Some(grant) => answer.map(|body| Body::new(until_ended(body, grant))),
    };
    // It is under way until its last byte.
    Ok(super::router::held(answer, slot))
}

/// What a visit by a key, or a link of it, goes on under.
fn grant(api: &ApiState, pass: Pass) -> Option<Arc<Grant>> {
    let Pass::Key(key) = pass else {
        return None;
    };
    api.uses.note(key, api.clock.now());
    api.keep_watch();
    Some(api.grants.hold(key, &api.view, api.clock.as_ref()))
}

/// The sandbox, if the visitor may go there. Capsule, key and resume may be of another node's making and a moment old:
/// this node catches up before it refuses.
async fn admitted(api: &ApiState, to: Address, parts: &Parts) -> Result<(Sandbox, Pass), Refusal> {
    let known = known_to_admit(api, to, parts);
    let is_open = |(sandbox, _): &(Sandbox, Pass)| sandbox.phase == Phase::Running;
    if known.as_ref().is_ok_and(is_open) || !api.catch_up_for_stranger().await {
        return known;
    }
    known_to_admit(api, to, parts)
}

/// The same by what this node has heard so far.
fn known_to_admit(api: &ApiState, to: Address, parts: &Parts) -> Result<(Sandbox, Pass), Refusal> {
    let state = api.view.state();
    let known = state.sandbox(to.id).filter(|it| !it.phase.is_ended());
    let sandbox = known.ok_or_else(|| {
        let words = format!("capsule {} was not found", to.id);
        Refusal::new(StatusCode::NOT_FOUND, words)
    })?;
    let Some(pass) = pass::pass(&state, sandbox, to.port, parts, api.clock.now()) else {
        let words = format!(
            "port {} of capsule {} is private: send a key of its team in X-API-Key, or use a link \
             (POST /v1/capsules/{{id}}/links)",
            to.port, to.id
        );
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, words));
    };
    Ok((sandbox.clone(), pass))
}

/// A browser that comes by a link is given its word as a cookie, so that what the page asks for next comes in too,
/// and goes on without the word in its address.
fn keep_link(parts: &Parts) -> Option<Response> {
    let accepts = parts.headers.get(ACCEPT).and_then(|it| it.to_str().ok());
    let browses = parts.method == Method::GET && accepts.is_some_and(|it| it.contains("text/html"));
    let word = pass::in_query(parts).filter(|_| browses)?;
    let query = parts
        .uri
        .query()
        .map(forward::without_link)
        .filter(|it| !it.is_empty());
    let query = query.map(|it| format!("?{it}")).unwrap_or_default();
    // A path of two slashes would lead to another host.
    let path = format!("/{}", parts.uri.path().trim_start_matches('/'));
    let cookie = format!("{}={word}; Path=/; HttpOnly; SameSite=Lax", pass::LINK);
    let cookie = HeaderValue::from_str(&cookie).ok()?;
    let there = HeaderValue::from_str(&format!("{path}{query}")).ok()?;
    Some((StatusCode::FOUND, [(SET_COOKIE, cookie), (LOCATION, there)]).into_response())
}

/// The guest of a sandbox, which is resumed for its visitor if its team wants that.
async fn guest(api: &ApiState, sandbox: Sandbox) -> Result<(Sandbox, Guest), Refusal> {
    let rests = matches!(
        sandbox.phase,
        Phase::Paused | Phase::Resuming | Phase::Pausing
    );
    let sandbox = if rests && sandbox.spec.wakes {
        let deadline = Instant::now() + api.pause_wait;
        wake(api, sandbox.id, deadline).await?
    } else {
        sandbox
    };
    let guest = api.relay.guest(sandbox.id).await.map_err(ApiError::from)?;
    Ok((sandbox, guest))
}

/// What became of a request that has no answer.
fn unanswered(to: Address, err: &hyper_util::client::legacy::Error) -> Refusal {
    let Address { id, port } = to;
    let relay = err.source().and_then(RelayError::among_causes);
    if let Some(host) = relay.filter(|it| !matches!(it, RelayError::Guest { .. })) {
        return ApiError::from(host.clone()).into();
    }
    let words = if err.is_connect() {
        format!("port {port} of capsule {id} is not open: nothing listens there")
    } else {
        format!("port {port} of capsule {id} broke off: {}", chain(err))
    };
    let (status, _) = Code::AgentError.wire();
    Refusal::new(status, words)
}
