//! Which route needs which scope: the one table, and the layer that enforces it.
//!
//! Every route under `/v1` is in [`TABLE`]. The layer looks the route up, asks who calls, refuses who may
//! not, and leaves the caller in the request for the handler. A route that nobody entered has no caller,
//! so its handler refuses everybody. A handler goes on only as long as the caller's key does:
//!
//! ```text
//! route > table > key known, not revoked, not expired > team > scope > rate > handler > body
//!                                                                      '--- cut off with the key ---'
//! ```

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::http::header::RETRY_AFTER;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http_body::Body as _;
use raft::state::Scope;
use tokio::time;

use super::auth::{Caller, presented};
use super::error::{ApiError, Code};
use super::grants::until_ended;
use super::preview::Peer;
use super::rates::{Limit, TooMany};
use super::state::ApiState;

/// What a caller must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// A key with this scope, of whichever team.
    Key(Scope),
    /// A key with this scope, of the team that is the platform itself.
    Platform(Scope),
    /// As [`Self::Key`]; a browser may say who it is in its first frame instead.
    Socket(Scope),
}

use Needs::{Key, Platform, Socket};
use Scope::{Admin, Read, Run};

/// How long a request may still take once its key is over.
const LAST_WORD: Duration = Duration::from_millis(500);
/// Any method, where a whole area is answered alike.
pub(super) const ANY: &str = "*";

/// Method, path and what it needs.
pub(super) const TABLE: &[(&str, &str, Needs)] = &[
    ("POST", "/v1/capsules", Key(Run)),
    ("GET", "/v1/capsules", Key(Read)),
    ("GET", "/v1/capsules/{id}", Key(Read)),
    ("PATCH", "/v1/capsules/{id}", Key(Run)),
    ("DELETE", "/v1/capsules/{id}", Key(Run)),
    ("POST", "/v1/capsules/{id}/ping", Key(Run)),
    ("POST", "/v1/capsules/{id}/pause", Key(Run)),
    ("POST", "/v1/capsules/{id}/resume", Key(Run)),
    ("POST", "/v1/capsules/{id}/migrate", Key(Run)),
    ("POST", "/v1/capsules/{id}/fork", Key(Run)),
    ("POST", "/v1/capsules/{id}/links", Key(Run)),
    ("GET", "/v1/capsules/{id}/logs", Key(Read)),
    ("GET", "/v1/capsules/{id}/metrics", Key(Read)),
    ("GET", "/v1/capsules/stats", Key(Read)),
    ("GET", "/v1/capsules/usage", Key(Read)),
    // What runs and lies in a guest may be secret, so looking at it takes what changing it takes.
    ("POST", "/v1/capsules/{id}/exec", Key(Run)),
    ("GET", "/v1/capsules/{id}/exec/stream", Socket(Run)),
    ("GET", "/v1/capsules/{id}/processes", Key(Run)),
    ("DELETE", "/v1/capsules/{id}/processes/{selector}", Key(Run)),
    (
        "GET",
        "/v1/capsules/{id}/processes/{selector}/stream",
        Socket(Run),
    ),
    ("GET", "/v1/capsules/{id}/pty", Socket(Run)),
    ("POST", "/v1/capsules/{id}/files/read", Key(Run)),
    ("POST", "/v1/capsules/{id}/files/write", Key(Run)),
    ("POST", "/v1/capsules/{id}/files/list", Key(Run)),
    ("POST", "/v1/capsules/{id}/files/mkdir", Key(Run)),
    ("POST", "/v1/capsules/{id}/files/remove", Key(Run)),
    ("POST", "/v1/capsules/{id}/files/stream/read", Key(Run)),
    ("POST", "/v1/capsules/{id}/files/stream/write", Key(Run)),
    ("POST", "/v1/snapshots", Key(Run)),
    ("GET", "/v1/snapshots", Key(Read)),
    ("DELETE", "/v1/snapshots/{name}", Key(Run)),
    ("GET", "/v1/events", Key(Read)),
    ("GET", "/v1/events/stream", Key(Read)),
    ("POST", "/v1/builds", Key(Run)),
    ("GET", "/v1/builds", Key(Read)),
    ("GET", "/v1/builds/{id}", Key(Read)),
    ("GET", "/v1/builds/{id}/logs", Key(Read)),
    ("GET", "/v1/builds/{id}/stream", Key(Read)),
    ("POST", "/v1/builds/{id}/cancel", Key(Run)),
    ("GET", "/v1/nodes", Key(Read)),
    ("GET", "/v1/nodes/{node}", Key(Read)),
    ("DELETE", "/v1/nodes/{node}", Platform(Admin)),
    ("POST", "/v1/nodes/{node}/cordon", Platform(Admin)),
    ("POST", "/v1/nodes/{node}/uncordon", Platform(Admin)),
    ("POST", "/v1/nodes/{node}/drain", Platform(Admin)),
    ("PUT", "/v1/nodes/{node}/tags", Platform(Admin)),
    ("POST", "/v1/tokens", Platform(Admin)),
    ("GET", "/v1/tokens", Platform(Admin)),
    ("DELETE", "/v1/tokens/{id}", Platform(Admin)),
    ("GET", "/v1/cluster", Key(Read)),
    ("PATCH", "/v1/cluster", Platform(Admin)),
    ("POST", "/v1/api-keys", Key(Admin)),
    ("GET", "/v1/api-keys", Key(Admin)),
    ("DELETE", "/v1/api-keys/{id}", Key(Admin)),
    ("GET", "/v1/teams", Key(Read)),
    ("POST", "/v1/teams", Platform(Admin)),
    ("GET", "/v1/teams/{id}", Key(Read)),
    ("PATCH", "/v1/teams/{id}", Key(Admin)),
    ("DELETE", "/v1/teams/{id}", Platform(Admin)),
    ("GET", "/v1/teams/{id}/members", Key(Read)),
    ("POST", "/v1/teams/{id}/members", Key(Admin)),
    ("PATCH", "/v1/teams/{id}/members/{user}", Key(Admin)),
    ("DELETE", "/v1/teams/{id}/members/{user}", Key(Admin)),
    ("POST", "/v1/teams/{id}/leave", Key(Read)),
    ("GET", "/v1/users/search", Key(Admin)),
    ("GET", "/v1/me", Key(Read)),
    ("PATCH", "/v1/me", Key(Run)),
    ("DELETE", "/v1/me", Key(Run)),
    ("GET", "/v1/audit-logs", Key(Admin)),
    ("GET", "/v1/admin/audit-logs", Platform(Admin)),
    ("GET", "/v1/admin/teams", Platform(Admin)),
    ("POST", "/v1/hosts", Platform(Admin)),
    ("GET", "/v1/hosts", Key(Read)),
    ("GET", "/v1/hosts/{id}", Key(Read)),
    ("DELETE", "/v1/hosts/{id}", Platform(Admin)),
    ("GET", "/v1/hosts/{id}/delete-preview", Platform(Admin)),
    ("POST", "/v1/hosts/{id}/token", Platform(Admin)),
    ("GET", "/v1/hosts/{id}/tags", Key(Read)),
    ("POST", "/v1/hosts/{id}/tags", Platform(Admin)),
    ("DELETE", "/v1/hosts/{id}/tags/{tag}", Platform(Admin)),
    ("POST", "/v1/channels", Key(Admin)),
    ("GET", "/v1/channels", Key(Admin)),
    ("POST", "/v1/channels/test", Key(Admin)),
    ("GET", "/v1/channels/{id}", Key(Admin)),
    ("PATCH", "/v1/channels/{id}", Key(Admin)),
    ("DELETE", "/v1/channels/{id}", Key(Admin)),
    ("PUT", "/v1/channels/{id}/config", Key(Admin)),
    ("POST", "/v1/admin/builds", Platform(Admin)),
    ("GET", "/v1/admin/builds", Platform(Admin)),
    ("GET", "/v1/admin/builds/{id}", Platform(Admin)),
    ("POST", "/v1/admin/builds/{id}/cancel", Platform(Admin)),
    // Areas that answer only what takes their place.
    (ANY, "/v1/hosts/register", Key(Read)),
    (ANY, "/v1/hosts/auth/refresh", Key(Read)),
    (ANY, "/v1/hosts/sandbox-events", Key(Read)),
    (ANY, "/v1/hosts/{id}/heartbeat", Key(Read)),
    (ANY, "/v1/admin", Key(Read)),
    (ANY, "/v1/admin/{*rest}", Key(Read)),
    (ANY, "/v1/auth", Key(Read)),
    (ANY, "/v1/auth/{*rest}", Key(Read)),
    (ANY, "/v1/me/{*rest}", Key(Read)),
];

static BY_ROUTE: LazyLock<HashMap<(&str, &str), Needs>> = LazyLock::new(|| {
    let entries = TABLE.iter();
    entries
        .map(|(method, path, needs)| ((*method, *path), *needs))
        .collect()
});

/// What the route `path`, as it is written in the table, needs.
pub(super) fn needs(method: &Method, path: &str) -> Option<Needs> {
    let path = path.strip_prefix("/api").unwrap_or(path);
    // Every GET answers HEAD too.
    let method = match method.as_str() {
        "HEAD" => "GET",
        method => method,
    };
    let known = BY_ROUTE.get(&(method, path));
    known.or_else(|| BY_ROUTE.get(&(ANY, path))).copied()
}

impl Needs {
    /// Which scope.
    pub(super) fn scope(self) -> Scope {
        match self {
            Key(scope) | Platform(scope) | Socket(scope) => scope,
        }
    }

    /// Refuses a caller who has too little.
    pub(super) fn check(self, caller: &Caller) -> Result<(), ApiError> {
        if matches!(self, Platform(_)) && !caller.is_platform() {
            let why =
                "only an administrator's API key may do this, such as the cluster's first key";
            return Err(ApiError::new(Code::Forbidden, why));
        }
        caller.check(self.scope())
    }
}

/// The layer around every route under `/v1`.
pub(super) async fn authorize(
    State(api): State<ApiState>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.extensions().get::<MatchedPath>();
    let known = path.and_then(|path| needs(request.method(), path.as_str()));
    let Some(needs) = known else {
        // A method that is not served, which is said without asking who wants to know; or a route that
        // nobody entered, whose handler finds no caller.
        return next.run(request).await;
    };
    let key = presented(request.headers());
    if key.is_none() && matches!(needs, Socket(_)) {
        return next.run(request).await;
    }
    let from = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    match admit(&api, key, from, needs).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            run(&api, &caller, request, next).await
        }
        Err(Refused::NotAllowed(err)) => err.into_response(),
        Err(Refused::TooMany(too_many)) => slow_down(too_many),
    }
}

/// The caller who said who it is in the first frame of a WebSocket.
pub(super) async fn introduced(
    api: &ApiState,
    key: &str,
    from: Option<IpAddr>,
) -> Result<Caller, ApiError> {
    let caller = Caller::presenting(api, Some(key), from).await?;
    Socket(Run).check(&caller)?;
    let limit = Limit::of_key(&api.view.state().settings());
    let taken = api.rates.take(caller.key, limit, api.boot_clock.now());
    taken.map_err(rate_limited)?;
    api.uses.note(caller.key, api.clock.now());
    api.keep_watch();
    Ok(caller)
}

/// Why a request does not come to its handler.
enum Refused {
    NotAllowed(ApiError),
    TooMany(TooMany),
}

impl From<ApiError> for Refused {
    fn from(err: ApiError) -> Self {
        Self::NotAllowed(err)
    }
}

impl From<TooMany> for Refused {
    fn from(too_many: TooMany) -> Self {
        Self::TooMany(too_many)
    }
}

async fn admit(
    api: &ApiState,
    key: Option<&str>,
    from: Option<IpAddr>,
    needs: Needs,
) -> Result<Caller, Refused> {
    let caller = Caller::presenting(api, key, from).await?;
    needs.check(&caller)?;
    let limit = Limit::of_key(&api.view.state().settings());
    api.rates.take(caller.key, limit, api.boot_clock.now())?;
    api.uses.note(caller.key, api.clock.now());
    api.keep_watch();
    Ok(caller)
}

/// Runs the handler as long as the key is good, and its answer's body too.
async fn run(api: &ApiState, caller: &Caller, request: Request, next: Next) -> Response {
    let grant = api.grants.hold(caller.key, &api.view, api.clock.as_ref());
    let late = async {
        grant.ended().await;
        // A caller who revokes the very key of the request is answered.
        time::sleep(LAST_WORD).await;
    };
    let response = tokio::select! {
        response = next.run(request) => response,
        () = late => return ended().into_response(),
    };
    if response.body().size_hint().exact().is_some() {
        return response;
    }
    response.map(|body| Body::new(until_ended(body, grant)))
}

fn ended() -> ApiError {
    let why = "the API key was revoked, or has expired, while this went on";
    ApiError::new(Code::Unauthorized, why)
}

fn rate_limited(too_many: TooMany) -> ApiError {
    ApiError::new(Code::RateLimited, too_many.words("this API key"))
}

fn slow_down(too_many: TooMany) -> Response {
    let mut response = rate_limited(too_many).into_response();
    let headers = response.headers_mut();
    headers.insert(RETRY_AFTER, too_many.retry_after_s.into());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_route_is_in_the_table_twice() {
        assert_eq!(BY_ROUTE.len(), TABLE.len());
    }

    #[test]
    fn every_route_of_the_description_is_in_the_table() {
        let description = super::super::openapi();
        let description: serde_json::Value = serde_json::from_str(&description).expect("JSON");
        let paths = description["paths"].as_object().expect("paths");
        for (path, methods) in paths.iter().filter(|(path, _)| path.starts_with("/v1/")) {
            for name in methods.as_object().expect("methods").keys() {
                let method = name.to_uppercase().parse().expect("a method");
                let exact = BY_ROUTE.contains_key(&(name.to_uppercase().as_str(), path.as_str()));
                assert!(
                    exact && needs(&method, path).is_some(),
                    "{name} {path} has no scope"
                );
            }
        }
    }

    #[test]
    fn what_changes_something_takes_more_than_looking() {
        for (method, path, needs) in TABLE {
            let changes = !matches!(*method, "GET" | ANY);
            // Whoever may only look may still go.
            let exempt = *path == "/v1/teams/{id}/leave";
            assert!(
                !changes || exempt || needs.scope() > Read,
                "{method} {path} needs no more than {needs:?}"
            );
        }
    }

    #[test]
    fn a_base_path_and_a_head_request_need_what_the_route_needs() {
        let get = needs(&Method::GET, "/v1/capsules");
        assert_eq!(get, Some(Key(Read)));
        assert_eq!(needs(&Method::HEAD, "/api/v1/capsules"), get);
        assert_eq!(needs(&Method::PUT, "/v1/capsules"), None);
        assert_eq!(needs(&Method::PUT, "/v1/auth/{*rest}"), Some(Key(Read)));
    }
}
