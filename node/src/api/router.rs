//! The table of routes, and what surrounds every one of them.
//!
//! From the outside in: answers are counted; a panic becomes a 500; at most [`MAX_REQUESTS`] run
//! at once; what is meant for a port of a capsule goes there ([`preview`]); the body of a refused
//! request is read to its end; then the route. Every route under
//! `/v1` answers under `/api/v1` too, since clients keep the path of their base URL.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures::FutureExt as _;
use http_body_util::BodyExt as _;
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::description::describe;
use super::error::{ApiError, Code, ErrorBody};
use super::linger::linger;
use super::state::ApiState;
use super::{
    audit, builds, capsules, channels, cluster, events, exec, files, fork, hosts, keys, later,
    members, metrics, migrating, nodes, pausing, preview, samples, scopes, service, snapshots,
    stats, streams, teams, templates, tokens, upload, usage,
};

/// Requests under way at once, streams included. Each may hold a megabyte of JSON or a few pieces
/// of a file; past this a node had better say so.
const MAX_REQUESTS: usize = 1024;

#[derive(OpenApi)]
#[openapi(
    info(title = "Wrenn", description = "Sandboxes on microVMs."),
    components(schemas(ErrorBody))
)]
struct Description;

/// The whole interface of a node.
pub fn router(api: ApiState) -> Router {
    router_with_pages(api, Router::new())
}

/// The same with further pages, such as the dashboard, which need no API key by themselves.
pub fn router_with_pages(api: ApiState, pages: Router) -> Router {
    let (v1, mut description) = v1_routes().split_for_parts();
    let v1 = v1
        .merge(builds::admin_routes())
        .merge(later::routes())
        .layer(middleware::from_fn_with_state(
            api.clone(),
            scopes::authorize,
        ));
    let (service, service_description) = service_routes().split_for_parts();
    description.merge(service_description);
    let description = describe(description);
    Router::new()
        .nest("/api", v1.clone())
        .merge(v1)
        .merge(service)
        .route(
            "/openapi.json",
            get(move || answer_json(description.clone())),
        )
        .with_state(api.clone())
        .merge(pages)
        .fallback(no_such_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn(linger))
        .layer(middleware::from_fn_with_state(
            Arc::new(Semaphore::new(MAX_REQUESTS)),
            bound,
        ))
        .layer(middleware::from_fn_with_state(api.clone(), preview::divert))
        .layer(middleware::from_fn(catch_panic))
        .layer(middleware::from_fn_with_state(api, count))
}

/// The description of the interface, as JSON.
#[must_use]
pub fn openapi() -> String {
    let (_, mut description) = v1_routes().split_for_parts();
    description.merge(service_routes().split_for_parts().1);
    String::from_utf8_lossy(&describe(description)).into_owned()
}

fn v1_routes() -> OpenApiRouter<ApiState> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(capsules::create, capsules::list))
        .routes(routes!(capsules::get, capsules::change, capsules::destroy))
        .routes(routes!(capsules::ping))
        .routes(routes!(pausing::pause))
        .routes(routes!(pausing::resume))
        .routes(routes!(migrating::migrate))
        .routes(routes!(capsules::logs))
        .routes(routes!(samples::metrics))
        .routes(routes!(stats::stats))
        .routes(routes!(usage::usage))
        .routes(routes!(events::list))
        .routes(routes!(events::stream))
        .routes(routes!(channels::create, channels::list))
        .routes(routes!(channels::test))
        .routes(routes!(channels::get, channels::change, channels::remove))
        .routes(routes!(channels::configure))
        .routes(routes!(exec::exec))
        .routes(routes!(exec::processes))
        .routes(routes!(exec::kill))
        .routes(routes!(streams::exec_stream))
        .routes(routes!(streams::process_stream))
        .routes(routes!(streams::pty))
        .routes(routes!(preview::link))
        .routes(routes!(files::read))
        .routes(routes!(files::stream_read))
        .routes(routes!(files::list))
        .routes(routes!(files::mkdir))
        .routes(routes!(files::remove))
        .routes(routes!(upload::write))
        .routes(routes!(upload::stream_write))
        .routes(routes!(templates::list, snapshots::create))
        .routes(routes!(snapshots::remove))
        .routes(routes!(builds::create, builds::list))
        .routes(routes!(builds::get))
        .routes(routes!(builds::cancel))
        .routes(routes!(builds::logs))
        .routes(routes!(builds::stream))
        .routes(routes!(fork::fork))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::get, nodes::remove))
        .routes(routes!(nodes::cordon))
        .routes(routes!(nodes::uncordon))
        .routes(routes!(nodes::drain))
        .routes(routes!(nodes::tag))
        .routes(routes!(hosts::create, hosts::list))
        .routes(routes!(hosts::get, hosts::remove))
        .routes(routes!(hosts::preview))
        .routes(routes!(hosts::renew))
        .routes(routes!(hosts::tags, hosts::tag))
        .routes(routes!(hosts::untag))
        .routes(routes!(tokens::create, tokens::list))
        .routes(routes!(tokens::revoke))
        .routes(routes!(cluster::get, cluster::change))
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::revoke))
        .routes(routes!(teams::list, teams::create))
        .routes(routes!(teams::get, teams::rename, teams::remove))
        .routes(routes!(members::list, members::add))
        .routes(routes!(members::change, members::remove))
        .routes(routes!(members::leave))
        .routes(routes!(members::search))
        .routes(routes!(teams::me))
        .routes(routes!(teams::list_all))
        .routes(routes!(audit::list))
        .routes(routes!(audit::list_all))
}

fn service_routes() -> OpenApiRouter<ApiState> {
    OpenApiRouter::new()
        .routes(routes!(service::healthz))
        .routes(routes!(service::health))
        .routes(routes!(metrics::metrics))
}

async fn answer_json(json: Bytes) -> Response {
    ([(CONTENT_TYPE, "application/json")], json).into_response()
}

async fn no_such_route(request: Request) -> ApiError {
    let path = request.uri().path();
    ApiError::new(Code::NotFound, format!("there is no route {path}"))
}

async fn wrong_method(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    ApiError::new(
        Code::MethodNotAllowed,
        format!("route {path} does not answer {method}"),
    )
}

async fn count(State(api): State<ApiState>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    api.counters.count(response.status());
    response
}

async fn catch_panic(request: Request, next: Next) -> Response {
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        // The panic hook has told the log where; the client is told that it was us.
        Err(_) => ApiError::new(Code::InternalError, "this request hit a bug").into_response(),
    }
}

async fn bound(State(slots): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    // Signs of life must come through exactly when a node is busy.
    if matches!(request.uri().path(), "/healthz" | "/health" | "/metrics") {
        return next.run(request).await;
    }
    let Ok(permit) = slots.try_acquire_owned() else {
        let message = format!("this node serves {MAX_REQUESTS} requests already");
        return ApiError::new(Code::Overloaded, message).into_response();
    };
    let response = next.run(request).await;
    held(response, permit)
}

/// A download is under way until its last byte, so the body carries what it takes: a permit, mostly.
pub(super) fn held(response: Response, taken: impl Send + 'static) -> Response {
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _held = &taken;
            frame
        }))
    })
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use tower::Service as _;

    use super::*;

    async fn status(router: &mut Router) -> StatusCode {
        let request = Request::get("/").body(Body::empty()).expect("a request");
        let Ok(response) = router.call(request).await;
        response.status()
    }

    #[tokio::test]
    async fn a_panic_in_a_handler_is_answered_as_our_failure() {
        let broken = async || -> StatusCode { panic!("a bug, for the test") };
        let mut router = Router::new()
            .route("/", get(broken))
            .layer(middleware::from_fn(catch_panic));
        assert_eq!(status(&mut router).await, StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[tokio::test]
    async fn a_request_counts_until_its_answer_was_read() {
        let slots = Arc::new(Semaphore::new(1));
        let mut router = Router::new()
            .route("/", get(async || "body"))
            .layer(middleware::from_fn_with_state(slots, bound));
        let request = Request::get("/").body(Body::empty()).expect("a request");
        let Ok(unread) = router.call(request).await;
        assert_eq!(status(&mut router).await, StatusCode::SERVICE_UNAVAILABLE);
        drop(unread);
        assert_eq!(status(&mut router).await, StatusCode::OK);
    }
}
