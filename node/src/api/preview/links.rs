//! Links to a port for those who have no key.

use std::net::IpAddr;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::request::Parts;
use jiff::Timestamp;
use proto::units::Stamp;
use raft::command::Command;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::auth::Caller;
use super::super::error::{ApiError, Code};
use super::super::extract::{CapsuleId, JsonBody};
use super::super::state::ApiState;
use super::super::wire::timestamp;
use super::address::{Address, host};
use super::pass::{LINK, sign};

/// How long a link holds for which nothing is said.
const DEFAULT_LIFE: Duration = Duration::from_secs(3600);
/// Longest a link may hold. Whoever wants more opens the port.
const MAX_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A link to make.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(in crate::api) struct Link {
    /// The port in the guest.
    port: u16,
    /// Seconds for which it holds, a week at most; 3600 where absent.
    expires_in_sec: Option<u64>,
}

/// A link.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::api) struct Made {
    /// What to give to the visitor; absent where this node is known by an address of digits, under which a capsule
    /// can have no name.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    /// The same word for the header `Wrenn-Link`.
    token: String,
    /// When it ends.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
}

/// Makes a link to a port that holds for a while. Revoking the key that asked ends it.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/links", tag = "previews",
    params(("id" = String, Path)), request_body = Link,
    responses((status = 201, description = "The link.", body = Made))
)]
pub(in crate::api) async fn link(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    parts: Parts,
    JsonBody(request): JsonBody<Link>,
) -> Result<(StatusCode, Json<Made>), ApiError> {
    api.sandbox_to_change(&caller, id, |_| true).await?;
    let life = request
        .expires_in_sec
        .map_or(DEFAULT_LIFE, Duration::from_secs);
    if request.port == 0 || life.is_zero() || life > MAX_LIFE {
        let most = MAX_LIFE.as_secs();
        let words = format!("a link has a port of 1 to 65535 and an expires_in_sec of 1 to {most}");
        return Err(ApiError::invalid(words));
    }
    let state = api.view.state();
    let key = state.key(caller.key);
    let key = key.ok_or_else(|| ApiError::new(Code::Unauthorized, "the key was just revoked"))?;
    let life_ms = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
    let until = Stamp(api.clock.now().0.saturating_add(life_ms));
    let port = request.port;
    let token = sign(key.id, &key.hash, Address { id, port }, until);
    // Whoever has the word comes in, so nobody has it before the audit log says who gave it out.
    let given_out = Command::LinkSandbox { id, port, until };
    api.propose(&caller, given_out).await?;
    let domain = host(&parts).and_then(domain);
    let made = Made {
        url: domain.map(|domain| format!("http://{port}-{id}.{domain}/?{LINK}={token}")),
        token,
        expires_at: timestamp(until),
    };
    Ok((StatusCode::CREATED, Json(made)))
}

/// The name under which this node's capsules are found, as the client reached it.
fn domain(host: &str) -> Option<String> {
    let parsed: axum::http::uri::Authority = host.parse().ok()?;
    let name = parsed.host().trim_matches(['[', ']']);
    let port = parsed
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    match name.parse::<IpAddr>() {
        // Names below it lead back here on every system.
        Ok(ip) if ip.is_loopback() => Some(format!("localhost{port}")),
        Ok(_) => None,
        Err(_) => Some(format!("{name}{port}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capsules_have_names_below_the_nodes_own_and_below_no_address() {
        for (host, named) in [
            ("example.com", Some("example.com")),
            ("example.com:8080", Some("example.com:8080")),
            ("127.0.0.1:8080", Some("localhost:8080")),
            ("[::1]:8080", Some("localhost:8080")),
            ("10.0.0.1:8080", None),
            ("[fd00::1]", None),
            ("", None),
        ] {
            assert_eq!(domain(host).as_deref(), named, "{host}");
        }
    }
}
