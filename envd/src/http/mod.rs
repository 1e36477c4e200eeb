//! Routes and what every request passes through first.
//!
//! ```text
//! request ── cors (answers OPTIONS) ── drain ── gate ── token
//!               ├ health, init, metrics, envs, files, poweroff, root/adopt, snapshot/{prepare,undo,restore}
//!               └ process.Process, filesystem.Filesystem
//! ```
//!
//! Plain endpoints answer errors as `{"code": status, "message": text}` ([`error`]); the services
//! answer in Connect's form. No layer compresses: a stream must leave message by message.

pub mod adopt;
pub mod cors;
pub mod drain;
pub mod error;
pub mod init;
pub mod snapshot;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use connectrpc::{ConnectRpcService, Limits};
use serde_json::json;

use crate::agent::Agent;
use crate::files::service::FilesystemService;
use crate::files::{compose, download, upload};
use crate::process::service::ProcessService;
use crate::snapshot::gate;
use error::ApiError;

/// The header that carries the access token.
pub const TOKEN_HEADER: &str = "x-access-token";
/// Largest message of a call: one piece of standard input, in the main.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// All routes over `agent`.
pub fn router(agent: Arc<Agent>) -> Router {
    let services = connectrpc::Router::new()
        .add_service(Arc::new(ProcessService::new(agent.clone())))
        .add_service(Arc::new(FilesystemService::new(agent.clone())));
    let limits = Limits::default()
        .with_max_message_size(MAX_MESSAGE_BYTES)
        .with_max_request_body_size(MAX_MESSAGE_BYTES);
    let rpc = ConnectRpcService::new(services).with_limits(limits);
    Router::new()
        .route("/health", get(health))
        .route("/init", post(init::init))
        .route("/metrics", get(metrics))
        .route("/envs", get(envs))
        .route("/files", get(download::download).post(upload::upload))
        .route("/files/compose", post(compose::compose))
        .route("/snapshot/reclaim", post(snapshot::reclaim))
        .route("/snapshot/prepare", post(snapshot::prepare))
        .route("/snapshot/undo", post(snapshot::undo))
        .route("/snapshot/restore", post(snapshot::restore))
        .route("/root/adopt", post(adopt::adopt))
        .route("/poweroff", post(power_off))
        .route_service("/process.Process/{method}", rpc.clone())
        .route_service("/filesystem.Filesystem/{method}", rpc)
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "no such endpoint"))
        .method_not_allowed_fallback(async || {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
        })
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(agent.clone(), require_token))
        .layer(middleware::from_fn_with_state(agent.clone(), gate::layer))
        .layer(middleware::from_fn(drain::layer))
        .layer(middleware::from_fn(cors::layer))
        .with_state(agent)
}

/// Refuses callers without the token, except where other rules apply.
async fn require_token(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    if has_own_rules(request.uri().path()) || admits(&agent, request.headers()) {
        return next.run(request).await;
    }
    ApiError::new(
        StatusCode::UNAUTHORIZED,
        "access token is missing or does not match",
    )
    .into_response()
}

/// Health is open; files accept a signature; `/init` has its own table; a restore that is told
/// again may have changed the token itself.
fn has_own_rules(path: &str) -> bool {
    matches!(path, "/health" | "/files" | "/init" | "/snapshot/restore")
}

fn admits(agent: &Agent, headers: &axum::http::HeaderMap) -> bool {
    let settings = agent.settings();
    let Some(token) = &settings.token else {
        return true;
    };
    let presented = headers
        .get(TOKEN_HEADER)
        .and_then(|value| value.to_str().ok());
    presented.is_some_and(|presented| token.admits(presented))
}

const NO_STORE: (header::HeaderName, HeaderValue) =
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store"));

async fn health() -> impl IntoResponse {
    ([NO_STORE], Json(json!({ "version": proto::version::ENVD })))
}

async fn metrics(State(agent): State<Arc<Agent>>) -> impl IntoResponse {
    ([NO_STORE], Json(agent.meter.latest()))
}

async fn envs(State(agent): State<Arc<Agent>>) -> impl IntoResponse {
    let all = agent.settings().global.all();
    ([NO_STORE], Json(all))
}

/// Our extension: an orderly end of the guest. The answer comes before the deed.
async fn power_off(State(agent): State<Arc<Agent>>) -> Result<StatusCode, ApiError> {
    let Some(power) = &agent.surroundings.power else {
        let words = "only the guest's first process can power it off";
        return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, words));
    };
    // A full queue means that it was asked for already.
    let _ = power.try_send(());
    Ok(StatusCode::NO_CONTENT)
}
