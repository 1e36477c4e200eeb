//! Browsers may call from anywhere: the token protects, not the origin.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Methods a browser may use.
const METHODS: HeaderValue = HeaderValue::from_static("HEAD, GET, POST, PUT, PATCH, DELETE");
/// Seconds a browser may remember a preflight.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");
/// Response headers a script may read.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "Location, Cache-Control, X-Content-Type-Options, Connect-Content-Encoding, \
     Connect-Accept-Encoding, Connect-Protocol-Version, Connect-Timeout-Ms, Grpc-Status, \
     Grpc-Message, Grpc-Status-Details-Bin, Content-Disposition, Content-Encoding",
);
const ANY: HeaderValue = HeaderValue::from_static("*");

/// Answers preflights and marks every other answer as readable.
pub async fn layer(request: Request, next: Next) -> Response {
    if request.method() == Method::OPTIONS {
        return preflight(request.headers());
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, ANY);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    response
}

fn preflight(asked: &HeaderMap) -> Response {
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, ANY);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    // The wildcard would not cover Authorization, so what was asked for is repeated.
    let allowed = asked
        .get(header::ACCESS_CONTROL_REQUEST_HEADERS)
        .cloned()
        .unwrap_or(ANY);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    (StatusCode::NO_CONTENT, headers).into_response()
}
