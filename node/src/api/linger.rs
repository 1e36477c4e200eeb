//! Reading on after a refusal, so that the client gets to see it.
//!
//! A server that answers 413 in the middle of an upload and closes makes the kernel reset the
//! connection, and the client loses the answer that lay in its buffer. So the body of a refused
//! request is read to its end and thrown away, within bounds, before the answer is given back.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::time;

/// Most bytes thrown away for one refused request: a full upload of the limited route and more.
const LINGER_BYTES: u64 = 256 << 20;
/// Longest a refused sender is listened to.
const LINGER_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers `request`, and after a refusal reads what is left of its body.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let asks_first = parts.headers.contains_key(EXPECT);
    let shared = Arc::new(Shared {
        body: Mutex::new(body),
        was_read: AtomicBool::new(false),
    });
    let tap = Tap(Arc::clone(&shared));
    let response = next.run(Request::from_parts(parts, Body::new(tap))).await;
    let refused = response.status().as_u16() >= StatusCode::BAD_REQUEST.as_u16();
    // Whoever asks before sending has sent nothing yet, and will not after a refusal.
    let sends = shared.was_read.load(Ordering::Relaxed) || !asks_first;
    if refused && sends {
        let _gave_up = time::timeout(LINGER_TIMEOUT, discard(Body::new(Tap(shared)))).await;
    }
    response
}

async fn discard(mut body: Body) {
    let mut read = 0;
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, |data| data.len() as u64);
        if read > LINGER_BYTES {
            return;
        }
    }
}

/// A body that two readers take in turns: the handler, then [`discard`].
struct Shared {
    body: Mutex<Body>,
    was_read: AtomicBool,
}

struct Tap(Arc<Shared>);

impl Tap {
    fn with<T>(&self, look: impl FnOnce(&mut Body) -> T) -> T {
        // Never contended, and a reader that panicked left a usable body behind.
        let mut body = self.0.body.lock().unwrap_or_else(PoisonError::into_inner);
        look(&mut body)
    }
}

impl HttpBody for Tap {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.0.was_read.store(true, Ordering::Relaxed);
        self.with(|body| Pin::new(body).poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.with(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.with(|body| body.size_hint())
    }
}
