//! `POST /snapshot/{reclaim,prepare,undo,restore}`: the orders of [`crate::snapshot`] on the wire.
//!
//! `prepare` without a body is the word of hosts that know nothing of the others: everything reaches
//! the disk and idle connections are closed, nothing is frozen, and there is nothing to undo.
//! Restoring has a token rule of its own. The caller shows the current token, as everywhere; but
//! where the answer was lost and the order is told again, the current one is already the one that
//! the order itself brings.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use proto::epoch::Epoch;
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::error::ApiError;
use super::init::{is_hostname, read_body};
use super::{NO_STORE, admits};
use crate::agent::Agent;
use crate::auth::Token;
use crate::connections::ConnectionId;
use crate::environment::Identity;
use crate::snapshot::hold::HoldError;
use crate::snapshot::identity::is_machine_id;
use crate::snapshot::lineage::Generation;
use crate::snapshot::quiesce::{self, DEFAULT_TIMEOUT, DEFAULT_UNDO_AFTER, QuiesceError};
use crate::snapshot::restore::{self, RestoreError};
use crate::sys::MAX_ENTROPY_BYTES;

/// Fewer fresh random bytes do not make a guest different from its twin for sure.
const MIN_ENTROPY_BYTES: usize = 32;

#[derive(Debug, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Prepare {
    epoch: Option<u64>,
    freeze_workload: bool,
    freeze_disk: bool,
    reclaim: bool,
    timeout_ms: Option<u64>,
    undo_after_ms: Option<u64>,
}

impl Default for Prepare {
    fn default() -> Self {
        Self {
            epoch: None,
            freeze_workload: true,
            freeze_disk: false,
            reclaim: false,
            timeout_ms: None,
            undo_after_ms: None,
        }
    }
}

impl Prepare {
    fn order(&self) -> quiesce::Order {
        let or = |given: Option<u64>, default| given.map_or(default, Duration::from_millis);
        quiesce::Order {
            epoch: self.epoch.map(Epoch),
            freeze_workload: self.freeze_workload,
            freeze_disk: self.freeze_disk,
            reclaim: self.reclaim,
            timeout: or(self.timeout_ms, DEFAULT_TIMEOUT),
            undo_after: or(self.undo_after_ms, DEFAULT_UNDO_AFTER),
        }
    }
}

/// Handles `POST /snapshot/reclaim`, some seconds before a prepare.
///
/// # Errors
/// 500 where the kernel refuses.
pub async fn reclaim(State(agent): State<Arc<Agent>>) -> Result<Response, ApiError> {
    let reclaimed = agent.snapshots.reclaim().await;
    let reclaimed = reclaimed.map_err(ApiError::internal)?;
    Ok(([NO_STORE], Json(json!({ "reclaimed": reclaimed }))).into_response())
}

/// Handles `POST /snapshot/prepare`.
///
/// # Errors
/// 400 for a malformed body, 409 for an old epoch, 503 where it cannot be done now.
pub async fn prepare(
    State(agent): State<Arc<Agent>>,
    connection: Option<Extension<ConnectionId>>,
    request: Request,
) -> Result<Response, ApiError> {
    let text = read_body(request).await?;
    if text.trim_ascii().is_empty() {
        agent
            .snapshots
            .prepare()
            .await
            .map_err(ApiError::internal)?;
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let body: Prepare = parse(&text)?;
    let done = agent.snapshots.quiesce(body.order(), own(connection)).await;
    let done = done.map_err(quiesce_error)?;
    let answer = json!({
        "workload": done.workload,
        "diskFrozen": done.disk_frozen,
        "streams": done.streams,
        "unfinished": done.unfinished,
        "stillForUs": micros(done.still_for),
        "tookUs": micros(done.took),
    });
    Ok(([NO_STORE], Json(answer)).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Undo {
    epoch: Option<u64>,
    wall_clock_ns: Option<u64>,
}

/// Handles `POST /snapshot/undo`.
///
/// # Errors
/// 400 for a malformed body, 409 for an old epoch, 503 while another order is carried out.
pub async fn undo(State(agent): State<Arc<Agent>>, request: Request) -> Result<Response, ApiError> {
    let text = read_body(request).await?;
    let body: Undo = if text.trim_ascii().is_empty() {
        Undo::default()
    } else {
        parse(&text)?
    };
    let now = body.wall_clock_ns.map(timestamp).transpose()?;
    let undone = agent.snapshots.undo(body.epoch.map(Epoch), now).await;
    let undone = undone.map_err(quiesce_error)?;
    Ok(([NO_STORE], Json(json!({ "undone": undone }))).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Restore {
    epoch: Option<u64>,
    generation: String,
    entropy: String,
    wall_clock_ns: u64,
    access_token: Option<String>,
    env_vars: Option<BTreeMap<String, String>>,
    sandbox_id: Option<String>,
    template_id: Option<String>,
    hostname: Option<String>,
    machine_id: Option<String>,
    #[serde(default)]
    renew_ssh_host_keys: bool,
}

impl Restore {
    fn order(self, received: Instant) -> Result<restore::Order, ApiError> {
        let generation = Generation::from_str(&self.generation);
        let generation =
            generation.map_err(|err| ApiError::bad_request(format!("generation is {err}")))?;
        let named = |what: &str| ApiError::bad_request(format!("{what} is malformed"));
        if self.hostname.as_deref().is_some_and(|it| !is_hostname(it)) {
            return Err(named("hostname"));
        }
        if self
            .machine_id
            .as_deref()
            .is_some_and(|it| !is_machine_id(it))
        {
            return Err(named("machineId"));
        }
        Ok(restore::Order {
            epoch: self.epoch.map(Epoch),
            generation,
            seed: seed(&self.entropy)?,
            now: timestamp(self.wall_clock_ns)?,
            received,
            token: self.access_token.and_then(Token::new),
            env: self.env_vars,
            identity: Identity {
                sandbox_id: self.sandbox_id,
                template_id: self.template_id,
            },
            hostname: self.hostname,
            machine_id: self.machine_id,
            renew_ssh_host_keys: self.renew_ssh_host_keys,
        })
    }
}

/// Handles `POST /snapshot/restore`.
///
/// # Errors
/// 400 for a malformed body, 401 without the token, 409 for an old epoch, 503 while another order is
/// carried out, 500 where the guest could not be made right.
pub async fn restore(
    State(agent): State<Arc<Agent>>,
    connection: Option<Extension<ConnectionId>>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    let text = read_body(request).await?;
    // The clock was read when the body was sent, so its age counts from here.
    let received = Instant::now();
    let body: Restore = parse(&text)?;
    if !admits(&agent, &headers) && !brings_current_token(&agent, &body) {
        let words = "access token is missing or does not match";
        return Err(ApiError::unauthorized(words));
    }
    let order = body.order(received)?;
    let done = restore::restore(&agent, order, own(connection)).await;
    let done = done.map_err(restore_error)?;
    let answer = json!({
        "applied": done.applied,
        "held": done.held,
        "cut": done.cut,
        "warnings": done.warnings,
        "tookUs": micros(done.took),
    });
    Ok(([NO_STORE], Json(answer)).into_response())
}

fn brings_current_token(agent: &Agent, body: &Restore) -> bool {
    let settings = agent.settings();
    let (Some(current), Some(brought)) = (&settings.token, &body.access_token) else {
        return false;
    };
    current.admits(brought)
}

fn parse<T: for<'a> Deserialize<'a>>(text: &[u8]) -> Result<T, ApiError> {
    // An object, and not a list of its values, which serde would take as well.
    let object: serde_json::Result<serde_json::Map<_, _>> = serde_json::from_slice(text);
    let body = object.and_then(|object| serde_json::from_value(object.into()));
    body.map_err(|err| ApiError::bad_request(format!("parse the body: {err}")))
}

fn seed(base64: &str) -> Result<Vec<u8>, ApiError> {
    let bounds = MIN_ENTROPY_BYTES..=MAX_ENTROPY_BYTES;
    let seed = STANDARD.decode(base64).ok();
    let seed = seed.filter(|seed| bounds.contains(&seed.len()));
    seed.ok_or_else(|| {
        ApiError::bad_request(format!(
            "entropy is not base64 of {MIN_ENTROPY_BYTES} to {MAX_ENTROPY_BYTES} bytes"
        ))
    })
}

fn timestamp(nanoseconds: u64) -> Result<Timestamp, ApiError> {
    Timestamp::from_nanosecond(nanoseconds.into())
        .map_err(|_| ApiError::bad_request("wallClockNs is out of range"))
}

fn own(connection: Option<Extension<ConnectionId>>) -> ConnectionId {
    connection.map_or(ConnectionId::FIRST, |Extension(id)| id)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn quiesce_error(err: QuiesceError) -> ApiError {
    match err {
        QuiesceError::Stale(_) => ApiError::new(StatusCode::CONFLICT, err.to_string()),
        QuiesceError::Busy(_)
        | QuiesceError::Inside { .. }
        | QuiesceError::TimedOut { .. }
        | QuiesceError::Hold(HoldError::TurnOver(_)) => {
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, err.to_string())
        }
        QuiesceError::Hold(HoldError::Workload(_) | HoldError::Disk(_))
        | QuiesceError::Watchdog(_)
        | QuiesceError::Panicked(_) => ApiError::internal(err),
    }
}

fn restore_error(err: RestoreError) -> ApiError {
    match err {
        RestoreError::Stale(_) => ApiError::new(StatusCode::CONFLICT, err.to_string()),
        RestoreError::Busy(_) => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, err.to_string()),
        RestoreError::Clock(_)
        | RestoreError::Entropy(_)
        | RestoreError::Hostname(_)
        | RestoreError::Panicked(_) => ApiError::internal(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prepare_without_wishes_freezes_the_workload_alone() {
        let order = parse::<Prepare>(b"{}").expect("valid").order();
        assert!(order.freeze_workload && !order.freeze_disk && !order.reclaim);
        assert_eq!(order.timeout, DEFAULT_TIMEOUT);
        assert_eq!(order.undo_after, DEFAULT_UNDO_AFTER);
    }

    #[test]
    fn malformed_restores_are_refused() {
        let good = json!({
            "generation": "0123456789abcdef0123456789abcdef",
            "entropy": STANDARD.encode([7; 32]),
            "wallClockNs": 1_700_000_000_000_000_000_u64,
        });
        let order = |value: &serde_json::Value| {
            let body: Restore = parse(value.to_string().as_bytes())?;
            body.order(Instant::now())
        };
        assert!(order(&good).is_ok());
        for (field, bad) in [
            ("generation", json!("x")),
            ("generation", json!(null)),
            ("entropy", json!(STANDARD.encode([7; 31]))),
            ("entropy", json!(STANDARD.encode([7; 513]))),
            ("entropy", json!("%")),
            ("wallClockNs", json!(-1)),
            ("wallClockNs", json!("now")),
            ("hostname", json!("a b")),
            ("machineId", json!("../../etc")),
            ("envVars", json!({ "A": 1 })),
        ] {
            let mut body = good.clone();
            body[field] = bad;
            assert!(order(&body).is_err(), "{body}");
        }
        for field in ["generation", "entropy", "wallClockNs"] {
            let mut body = good.clone();
            body.as_object_mut().expect("an object").remove(field);
            assert!(order(&body).is_err(), "without {field}");
        }
    }
}
