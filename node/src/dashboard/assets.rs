//! The embedded files of the dashboard and the headers they are served with.
//!
//! Nothing is loaded from elsewhere and no script or style stands inside the page, so the content
//! policy can forbid all that: text of a guest or a user that somehow became markup would still
//! not run. Browsers revalidate by the hash of a file's content, so an upgraded node is never met
//! with yesterday's script.

use axum::Router;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// One embedded file.
struct Asset {
    path: &'static str,
    content_type: &'static str,
    body: &'static str,
}

/// All there are; paths beside the page's own carry its name, to stay clear of the API's.
const ASSETS: [Asset; 4] = [
    Asset {
        path: "/",
        content_type: "text/html; charset=utf-8",
        body: include_str!("ui/index.html"),
    },
    Asset {
        path: "/dashboard.css",
        content_type: "text/css; charset=utf-8",
        body: include_str!("ui/dashboard.css"),
    },
    Asset {
        path: "/dashboard.js",
        content_type: "text/javascript; charset=utf-8",
        body: include_str!("ui/dashboard.js"),
    },
    Asset {
        path: "/dashboard.svg",
        content_type: "image/svg+xml",
        body: include_str!("ui/dashboard.svg"),
    },
];

/// What the page may load and do: its own files, calls to its own node, nothing else.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";
/// Keep a copy, but ask before using it.
const CACHE_POLICY: &str = "no-cache";
/// Bytes of the content's hash in an entity tag: enough to tell versions apart.
const TAG_BYTES: usize = 8;

/// The dashboard's routes, for a router with any state.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    ASSETS.iter().fold(Router::new(), |router, asset| {
        let tag = tag(asset.body);
        let serve = move |headers: HeaderMap| async move { answer(asset, &tag, &headers) };
        router.route(asset.path, get(serve))
    })
}

fn answer(asset: &'static Asset, tag: &str, request: &HeaderMap) -> Response {
    let known = request.get(header::IF_NONE_MATCH);
    let mut response = if known.is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        asset.body.into_response()
    };
    let headers = response.headers_mut();
    for (name, value) in fixed_headers(asset) {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if let Ok(tag) = HeaderValue::from_str(tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}

fn fixed_headers(asset: &'static Asset) -> [(HeaderName, &'static str); 6] {
    [
        (header::CONTENT_TYPE, asset.content_type),
        (header::CONTENT_SECURITY_POLICY, CONTENT_POLICY),
        (header::CACHE_CONTROL, CACHE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ]
}

fn tag(body: &str) -> String {
    let hash = blake3::hash(body.as_bytes());
    let hex = hash.to_hex();
    format!("\"{}\"", &hex[..2 * TAG_BYTES])
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn fetch(request: Request<Body>) -> Response {
        let answered = routes::<()>().oneshot(request).await;
        answered.expect("the router never fails")
    }

    fn plain(path: &str) -> Request<Body> {
        Request::get(path).body(Body::empty()).expect("a request")
    }

    #[tokio::test]
    async fn every_file_is_served_whole_with_its_type_and_the_protective_headers() {
        for asset in &ASSETS {
            let response = fetch(plain(asset.path)).await;
            assert_eq!(response.status(), StatusCode::OK, "{}", asset.path);
            let headers = response.headers().clone();
            for (name, value) in fixed_headers(asset) {
                assert_eq!(
                    headers.get(&name).expect("present"),
                    value,
                    "{}",
                    asset.path
                );
            }
            let body = response
                .into_body()
                .collect()
                .await
                .expect("a body")
                .to_bytes();
            assert_eq!(body, asset.body);
        }
    }

    #[tokio::test]
    async fn a_browser_that_has_the_file_is_told_to_keep_it() {
        for asset in &ASSETS {
            let first = fetch(plain(asset.path)).await;
            let tag = first.headers().get(header::ETAG).expect("tagged").clone();
            let mut again = plain(asset.path);
            again.headers_mut().insert(header::IF_NONE_MATCH, tag);
            assert_eq!(fetch(again).await.status(), StatusCode::NOT_MODIFIED);
        }
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_not_the_dashboard_s() {
        assert_eq!(
            fetch(plain("/index.html")).await.status(),
            StatusCode::NOT_FOUND
        );
        let post = Request::post("/").body(Body::empty()).expect("a request");
        assert_eq!(fetch(post).await.status(), StatusCode::METHOD_NOT_ALLOWED);
    }

    /// The content policy would break a page that carries code or styles of its own, and the script
    /// must never turn text into markup.
    #[test]
    fn the_page_has_no_inline_code_and_the_script_writes_text_only() {
        let [page, style, script, _icon] = ASSETS.map(|asset| asset.body);
        for inline in [
            "<style",
            "style=",
            " onclick=",
            " onload=",
            " onsubmit=",
            "javascript:",
        ] {
            assert!(!page.contains(inline), "{inline} in the page");
        }
        assert_eq!(
            page.matches("<script").count(),
            page.matches("<script src=").count()
        );
        for markup in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!script.contains(markup), "{markup} in the script");
        }
        for text in [page, style, script] {
            for elsewhere in ["http:", "https:", "@import", "//cdn"] {
                assert!(!text.contains(elsewhere), "{elsewhere}");
            }
        }
    }

    #[test]
    fn the_page_refers_to_every_other_file() {
        let page = ASSETS[0].body;
        for asset in &ASSETS[1..] {
            assert!(
                page.contains(&format!("\"{}\"", &asset.path[1..])),
                "{}",
                asset.path
            );
        }
    }
}
