//! Routes of the client surface that this version does not have. They answer 501 and say what does
//! the same here, or what they wait for: a client can tell "not here" from "no such capsule".
//! `node/tests/api/surface.rs` walks that surface: nothing of it is a silent 404.

use axum::Router;
use axum::routing::{MethodFilter, MethodRouter, any, on, post};

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::state::ApiState;

const PEOPLE: &str = "accounts, since people are members of a team and hold API keys: see \
                      /v1/teams/{id}/members and /v1/api-keys";
const OPERATORS: &str = "the routes of operators: an administrator's key does the same by /v1/nodes, \
                         /v1/tokens, /v1/cluster and /v1/capsules";
const HOST_SIDE: &str = "routes that hosts call: a host joins by `wrenn node start --join TOKEN` with the token \
                         that POST /v1/hosts answers, proves itself by its own key from then on, and \
                         tells the cluster over its own connections how it is";

/// Everything at and below these paths, and what is said there to whoever has a key.
const AREAS: [(&str, &str); 2] = [("/v1/auth", PEOPLE), ("/v1/admin", OPERATORS)];

/// What hosts post, where hosts speak this interface.
const BY_HOSTS: [&str; 4] = [
    "/v1/hosts/register",
    "/v1/hosts/auth/refresh",
    "/v1/hosts/sandbox-events",
    "/v1/hosts/{id}/heartbeat",
];

/// The same outside the interface proper, said to anybody.
const PAGES: [(&str, &str); 3] = [
    ("/auth/{*rest}", PEOPLE),
    (
        "/docs",
        "pages about the interface: GET /openapi.json describes it",
    ),
    (
        "/openapi.yaml",
        "a description in YAML: GET /openapi.json is one",
    ),
];

/// All of them.
pub(super) fn routes() -> Router<ApiState> {
    let mut router = Router::new();
    for (area, wanted) in AREAS {
        let answer = || -> MethodRouter<ApiState> { any(move |_: Caller| not_here(wanted)) };
        router = router
            .route(area, answer())
            .route(&format!("{area}/{{*rest}}"), answer());
    }
    let about_me = |_: Caller| not_here(PEOPLE);
    let changes = MethodFilter::PATCH.or(MethodFilter::DELETE);
    router = router
        .route("/v1/me", on(changes, about_me))
        .route("/v1/me/{*rest}", any(about_me));
    for path in BY_HOSTS {
        router = router.route(path, post(|_: Caller| not_here(HOST_SIDE)));
    }
    for (path, wanted) in PAGES {
        router = router.route(path, any(move || not_here(wanted)));
    }
    router
}

async fn not_here(wanted: &'static str) -> ApiError {
    ApiError::new(
        Code::NotImplemented,
        format!("this version does not have {wanted}"),
    )
}
