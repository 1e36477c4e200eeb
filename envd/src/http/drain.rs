//! Lets a client hear why it was refused.
//!
//! Most clients send their whole body before they read anything. If a refusal (a full disk, a wrong
//! token) closed the connection under the rest of the body, the client would see a reset in place
//! of the answer. So after a refusal the rest is read and dropped first, within bounds. A client
//! that asked before sending is answered at once.
//!
//! A body that breaks off is its sender's doing, also where the call that was reading it says that
//! something broke here. Whoever has only closed its sending half still hears so.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde_json::json;
use tokio::time::timeout;

/// How long the rest of a refused body is read.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How much of it: larger uploads are cut off, as any upload would be without this.
const DRAIN_BYTES: usize = 1 << 30;

/// Reads what a refused request still sends.
pub async fn layer(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let asked_first = request.headers().contains_key(header::EXPECT);
    let (parts, body) = request.into_parts();
    let shared = Shared::new(body);
    let request = Request::from_parts(parts, Body::from_stream(shared.clone()));
    let response = next.run(request).await;
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR && shared.broke_off() {
        let words = "the body of the request broke off";
        let body = Json(json!({ "code": "invalid_argument", "message": words }));
        return (StatusCode::BAD_REQUEST, body).into_response();
    }
    let refused = response.status().is_client_error() || response.status().is_server_error();
    if refused && (shared.was_read() || !asked_first) {
        // Past the time the client gets the answer or the reset, whichever is faster.
        let _ = timeout(DRAIN_TIMEOUT, shared.discard()).await;
    }
    response
}

/// A body that the handler reads and that can be read on when the handler has given up.
#[derive(Clone)]
struct Shared(Arc<Mutex<Inner>>);

struct Inner {
    body: BodyDataStream,
    was_read: bool,
    broke_off: bool,
    ended: bool,
}

impl Shared {
    fn new(body: Body) -> Self {
        let body = body.into_data_stream();
        Self(Arc::new(Mutex::new(Inner {
            body,
            was_read: false,
            broke_off: false,
            ended: false,
        })))
    }

    fn was_read(&self) -> bool {
        self.lock().was_read
    }

    fn broke_off(&self) -> bool {
        self.lock().broke_off
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn discard(mut self) {
        let mut left = DRAIN_BYTES;
        while let Some(Ok(piece)) = self.next().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                return;
            }
        }
    }
}

impl Stream for Shared {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // Handler and drain take turns, so nobody ever waits for the lock.
        let mut inner = self.lock();
        if inner.ended {
            return Poll::Ready(None);
        }
        inner.was_read = true;
        let polled = inner.body.poll_next_unpin(cx);
        inner.broke_off |= matches!(polled, Poll::Ready(Some(Err(_))));
        inner.ended = matches!(polled, Poll::Ready(None | Some(Err(_))));
        polled
    }
}
