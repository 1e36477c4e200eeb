//! `POST /init`: the host tells the guest who it is.
//!
//! Order: parse → token table → ignore what is older than the last word → apply → let a sealed guest
//! go on: to hosts that know no other word, this one says that a resume is done. One at a time; a
//! second caller waits [`TURN_TIMEOUT`] and is then told to come back. Everything is optional, in
//! every spelling that existing hosts use; unknown fields are ignored.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Extension, FromRequest, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::IntoResponse;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::time::timeout;

use super::NO_STORE;
use super::error::ApiError;
use crate::agent::Agent;
use crate::auth::{Token, TokenChange, decide_init};
use crate::boot::{identity, name, trust};
use crate::clock;
use crate::connections::ConnectionId;
use crate::environment::Identity;
use crate::log;
use crate::log::chain;
use crate::snapshot::identity::give_machine_id;
use crate::sys::{self, MAX_ENTROPY_BYTES};

/// How long a caller waits for another's `/init` to be applied.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest body: some hundred variables and a bundle of certificates.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Tells the host which agent it has set up.
const VERSION_HEADER: HeaderName = HeaderName::from_static("x-envd-version");
/// Longest host name Linux accepts.
const MAX_HOSTNAME_BYTES: usize = 64;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Body {
    #[serde(alias = "accessToken")]
    access_token: Option<String>,
    #[serde(alias = "envVars")]
    env_vars: Option<BTreeMap<String, String>>,
    timestamp: Option<Timestamp>,
    #[serde(alias = "defaultUser")]
    default_user: Option<String>,
    #[serde(alias = "defaultWorkdir")]
    default_workdir: Option<String>,
    #[serde(alias = "sandboxID", alias = "sandboxId")]
    sandbox_id: Option<String>,
    #[serde(alias = "templateID", alias = "templateId")]
    template_id: Option<String>,
    #[serde(alias = "hyperloopIP", alias = "hyperloopIp")]
    hyperloop_ip: Option<IpAddr>,
    #[serde(alias = "caBundle")]
    ca_bundle: Option<String>,
    #[serde(alias = "volumeMounts")]
    volume_mounts: Option<Vec<serde_json::Value>>,
    /// Our extension: base64 of fresh random bytes for the kernel's pool.
    entropy: Option<String>,
    /// Our extension: the name the guest goes by from now on.
    hostname: Option<String>,
}

impl Body {
    fn parse(text: &[u8]) -> Result<Self, ApiError> {
        if text.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let body: Self = serde_json::from_slice(text)
            .map_err(|err| ApiError::bad_request(format!("parse the body: {err}")))?;
        if body
            .hostname
            .as_deref()
            .is_some_and(|name| !is_hostname(name))
        {
            return Err(ApiError::bad_request("hostname is not a host name"));
        }
        body.check_extras()?;
        Ok(body)
    }

    fn check_extras(&self) -> Result<(), ApiError> {
        if self.volume_mounts.as_ref().is_some_and(|it| !it.is_empty()) {
            // Better than a guest whose volumes are empty directories.
            let words = "network volumes are not supported";
            return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, words));
        }
        let bundle = self.ca_bundle.as_deref().filter(|it| !it.is_empty());
        if bundle.is_some_and(|bundle| !trust::is_bundle(bundle)) {
            return Err(ApiError::bad_request("caBundle is not certificates in PEM"));
        }
        Ok(())
    }

    fn seed(&self) -> Result<Option<Vec<u8>>, ApiError> {
        let Some(entropy) = &self.entropy else {
            return Ok(None);
        };
        let seed = STANDARD
            .decode(entropy)
            .ok()
            .filter(|seed| seed.len() <= MAX_ENTROPY_BYTES);
        let words = || format!("entropy is not base64 of at most {MAX_ENTROPY_BYTES} bytes");
        seed.map(Some).ok_or_else(|| ApiError::bad_request(words()))
    }
}

/// Letters, digits and inner hyphens, in labels joined by dots.
pub(super) fn is_hostname(name: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.len() <= MAX_HOSTNAME_BYTES && name.split('.').all(is_label)
}

/// Handles `POST /init`.
///
/// # Errors
/// 400 for a malformed body, 401 by the token table, 503 while another caller's is being applied.
pub async fn init(
    State(agent): State<Arc<Agent>>,
    connection: Option<Extension<ConnectionId>>,
    request: Request,
) -> Result<impl IntoResponse, ApiError> {
    let text = read_body(request).await?;
    let body = Body::parse(&text)?;
    let seed = body.seed()?;
    let busy = |_| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "another /init is in progress",
        )
    };
    let mut last = timeout(TURN_TIMEOUT, agent.init.lock())
        .await
        .map_err(busy)?;

    let change = decide_token(&agent, body.access_token.clone())?;
    let stale = matches!((body.timestamp, *last), (Some(new), Some(last)) if new <= last);
    agent.snapshots.before_init();
    if !stale {
        if let TokenChange::Become(token) = change {
            agent.settings_mut().token = token;
        }
        if body.timestamp.is_some() {
            *last = body.timestamp;
        }
        apply_settings(&agent, &body);
        if agent.surroundings.in_guest {
            apply_to_guest(&body, seed.as_deref());
        }
    }
    let own = connection.map_or(ConnectionId::NEVER_PAST, |Extension(id)| id);
    agent.snapshots.after_init(own);
    let version = HeaderValue::from_static(proto::version::ENVD);
    Ok((
        StatusCode::NO_CONTENT,
        [NO_STORE, (VERSION_HEADER, version)],
    ))
}

/// Parses a body; for the fuzz targets.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(text: &[u8]) {
    if let Ok(body) = Body::parse(text) {
        let _refused = body.seed();
        assert!(body.hostname.as_deref().is_none_or(is_hostname));
    }
}

pub(crate) async fn read_body(request: Request) -> Result<Bytes, ApiError> {
    let (parts, body) = request.into_parts();
    let limited = http_body_util::Limited::new(body, MAX_BODY_BYTES);
    let request = Request::from_parts(parts, axum::body::Body::new(limited));
    let read = Bytes::from_request(request, &()).await;
    read.map_err(|err| {
        if err.status() == StatusCode::PAYLOAD_TOO_LARGE {
            let words = format!("the body is larger than {MAX_BODY_BYTES} bytes");
            return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, words);
        }
        ApiError::bad_request(format!("read the body: {err}"))
    })
}

fn decide_token(agent: &Agent, given: Option<String>) -> Result<TokenChange, ApiError> {
    let given = given.and_then(Token::new);
    let published = agent.published.as_ref().and_then(|source| source.hash());
    let decided = decide_init(
        given.as_ref(),
        agent.settings().token.as_ref(),
        published.as_deref(),
    );
    decided.ok_or_else(|| ApiError::unauthorized("access token does not match"))
}

fn apply_settings(agent: &Agent, body: &Body) {
    let mut settings = agent.settings_mut();
    if let Some(variables) = &body.env_vars {
        settings.global.replace_user(variables.clone());
    }
    settings.global.identify(&body.identity());
    if let Some(address) = body.hyperloop_ip {
        settings.global.set_events(address);
    }
    if let Some(user) = body.default_user.as_ref().filter(|user| !user.is_empty()) {
        settings.default_user.clone_from(user);
    }
    if let Some(workdir) = &body.default_workdir {
        settings.default_workdir = Some(workdir.into()).filter(|_| !workdir.is_empty());
    }
}

impl Body {
    fn identity(&self) -> Identity {
        Identity {
            sandbox_id: self.sandbox_id.clone(),
            template_id: self.template_id.clone(),
        }
    }
}

/// What changes the guest itself. Each part is independent; a failing one is logged and the rest
/// still happens, because a guest with a wrong clock is better reached than not.
fn apply_to_guest(body: &Body, seed: Option<&[u8]>) {
    if let Some(seed) = seed
        && let Err(err) = sys::add_entropy(seed)
    {
        log!("add entropy: {err}");
    }
    if let Some(host) = body.timestamp
        && let Err(err) = clock::follow(host)
    {
        log!("set the clock: {err}");
    }
    if let Some(hostname) = &body.hostname
        && let Err(err) = name::set(hostname)
    {
        log!("{}", chain(&err));
    }
    let published = identity::publish(&body.identity());
    // After the seed: before it, a young guest may draw what its twin draws.
    let events = body.hyperloop_ip.map_or(Ok(()), name::set_events);
    let bundle = body.ca_bundle.as_deref().filter(|it| !it.is_empty());
    let trusted = bundle.map_or(Ok(()), |bundle| trust::install(Path::new("/"), bundle));
    for done in [published, events, trusted, give_machine_id(Path::new("/"))] {
        if let Err(err) = done {
            log!("{}", chain(&err));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_and_unknown_fields_are_accepted() {
        let camel = br#"{"accessToken":"t","envVars":{"A":"1"},"defaultUser":"u","new":[1]}"#;
        let snake = br#"{"access_token":"t","env_vars":{"A":"1"},"default_user":"u"}"#;
        for text in [&camel[..], &snake[..]] {
            let body = Body::parse(text).expect("valid");
            assert_eq!(body.access_token.as_deref(), Some("t"));
            assert_eq!(body.env_vars.expect("given")["A"], "1");
            assert_eq!(body.default_user.as_deref(), Some("u"));
        }
        assert!(Body::parse(b" \n").is_ok());
    }

    #[test]
    fn malformed_bodies_are_refused() {
        for text in [
            "{",
            "[]x",
            "\"a\"",
            r#"{"envVars":{"A":1}}"#,
            r#"{"timestamp":"soon"}"#,
        ] {
            assert!(Body::parse(text.as_bytes()).is_err(), "{text}");
        }
        for name in ["", "a b", "-a", "a..b", "a\\nb", &"a".repeat(65)] {
            let text = format!(r#"{{"hostname":"{name}"}}"#);
            assert!(Body::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_and_not_passed_over() {
        let parse = |text: &str| {
            Body::parse(text.as_bytes())
                .map(drop)
                .map_err(|e| e.to_string())
        };
        assert!(parse(r#"{"volumeMounts":[],"lifecycleID":"x","caBundle":""}"#).is_ok());
        assert!(parse(r#"{"hyperloopIP":"10.0.0.1"}"#).is_ok());
        for text in [
            r#"{"volumeMounts":[{"nfs_target":"h:/p","path":"/p"}]}"#,
            r#"{"caBundle":"x"}"#,
            r#"{"hyperloop_ip":"here"}"#,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn seed_is_bounded_base64() {
        let body = |entropy: String| Body {
            entropy: Some(entropy),
            ..Body::default()
        };
        assert!(
            matches!(body(STANDARD.encode([7; 512])).seed(), Ok(Some(seed)) if seed.len() == 512)
        );
        assert!(body(STANDARD.encode([7; 513])).seed().is_err());
        assert!(body("%%%".into()).seed().is_err());
    }
}
