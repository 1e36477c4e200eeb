//! Routes of the interface that this version does not have yet. They answer 501 and say what they
//! wait for, so that a client can tell "not yet" from "no such capsule".

use axum::Router;
use axum::routing::{MethodFilter, MethodRouter, any, on};

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::state::ApiState;

const USAGE: &str = "usage records";
const TEAMS: &str = "teams and accounts";

/// Method, path and what the route waits for.
const ROUTES: [(MethodFilter, &str, &str); 4] = [
    (MethodFilter::GET, "/v1/capsules/{id}/metrics", USAGE),
    (MethodFilter::GET, "/v1/capsules/stats", USAGE),
    (MethodFilter::GET, "/v1/capsules/usage", USAGE),
    (MethodFilter::GET, "/v1/events/stream", "the event stream"),
];

/// Everything below these waits for teams and accounts.
const AREAS: [&str; 8] = [
    "hosts",
    "teams",
    "api-keys",
    "me",
    "channels",
    "audit-logs",
    "admin",
    "auth",
];

/// All of them.
pub(super) fn routes() -> Router<ApiState> {
    let mut router = Router::new();
    for (method, path, wanted) in ROUTES {
        router = router.route(path, on(method, move |_: Caller| not_yet(wanted)));
    }
    for area in AREAS {
        let answer = || -> MethodRouter<ApiState> { any(|_: Caller| not_yet(TEAMS)) };
        router = router
            .route(&format!("/v1/{area}"), answer())
            .route(&format!("/v1/{area}/{{*rest}}"), answer());
    }
    router
}

async fn not_yet(wanted: &'static str) -> ApiError {
    let message = format!("this version does not have {wanted} yet");
    ApiError::new(Code::NotImplemented, message)
}
