//! Listening: connections in, bounded in number and in patience, and an orderly end.
//!
//! HTTP/1.1 and, for clients that begin with it, HTTP/2 without TLS, on the same port. A connection of either
//! without a request is closed after [`HEADER_TIMEOUT`]; one of HTTP/2 is told so first. A client that does not read its
//! answer loses it ([`unread`](super::unread)).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{future, io};

use axum::Router;
use axum::http::StatusCode;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::opening::{Version, opened};
use super::preview::Peer;
use super::router::held;
use super::unread::{Patient, UNREAD_TIMEOUT, Unread};

/// Open connections at once: each may hold a read buffer, so this bounds memory to some 400 MiB
/// in the worst case and keeps well below common limits of descriptors.
const MAX_CONNECTIONS: usize = 4096;
/// Longest a request's head may take, and an idle connection may stay.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// Largest head of a request that is kept while it arrives.
const HEAD_BYTES: usize = 64 << 10;
/// The same for a head of HTTP/2.
const HEAD_LIST_BYTES: u32 = 64 << 10;
/// Requests under way at once on one connection of HTTP/2.
const MAX_STREAMS: u32 = 128;
/// What one request of HTTP/2 may send ahead of its reader: as much as 20 ms need at 100 Mbit/s.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// The same of all requests of a connection: what it can make us hold.
const CONNECTION_WINDOW_BYTES: u32 = 512 << 10;
/// What is kept of one answer of HTTP/2 for a client that reads slowly.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// How long an idle client of HTTP/2 has to hear that its connection ends.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed accept. Running out of descriptors fails at once, again and again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Silence after which a client is asked whether it still exists: terminals and streams may be silent for hours, and a
/// host that lost its power says nothing.
const KEEPALIVE_IDLE_S: u32 = 60;
/// Between one such question and the next.
const KEEPALIVE_INTERVAL_S: u32 = 15;
/// Questions without an answer after which the client is taken for gone.
const KEEPALIVE_PROBES: u32 = 4;
/// Longest that requests under way are waited for at the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

/// Serves `router` on `listener` until `stop` fires; then accepts no more, lets requests under way
/// finish for a while, and returns.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    serve_for(UNREAD_TIMEOUT, listener, router, stop).await;
}

/// The same, waiting for a client that does not read for `unread`.
async fn serve_for(
    unread: Duration,
    listener: TcpListener,
    router: Router,
    stop: CancellationToken,
) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    let accept = async {
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let (router, stop) = (router.clone(), stop.clone());
                    let served = connection(stream, from, unread, router, stop);
                    tasks.spawn(async move {
                        let _permit = permit;
                        served.await;
                    });
                }
                Err(err) => {
                    warn!(%err, "could not accept a connection");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    let _stopped = stop.run_until_cancelled(accept).await;
    drop(listener);
    tasks.close();
    if time::timeout(STOP_TIMEOUT, tasks.wait()).await.is_err() {
        warn!(waited = ?STOP_TIMEOUT, "left requests behind that did not finish");
    }
}

/// Serves one connection to its end, in whichever version of HTTP its client begins.
async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    unread: Duration,
    router: Router,
    stop: CancellationToken,
) {
    if let Err(err) = prepare(&stream) {
        debug!(%err, "a connection was gone at once");
        return;
    }
    let opening = time::timeout(HEADER_TIMEOUT, opened(stream));
    let (version, stream) = match stop.run_until_cancelled(opening).await {
        Some(Ok(Ok(opened))) => opened,
        Some(Ok(Err(err))) => return debug!(%err, "a connection broke before its first request"),
        // Nobody has asked for anything.
        Some(Err(_)) | None => return,
    };
    let under_way = watch::Sender::new(0);
    let mut uses = under_way.subscribe();
    // One of HTTP/2 has its answers looked after one by one.
    let exempt = Arc::new(AtomicBool::new(version == Version::Http2));
    let stream = Patient::new(stream, unread, exempt.clone());
    let answers = Unread::new(unread);
    let watched = answers.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(Peer(from));
        let use_of = Use::new(under_way.clone());
        let answering = router.clone().oneshot(request);
        let (exempt, watched) = (exempt.clone(), watched.clone());
        async move {
            let answer = held(answering.await?, use_of);
            if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
                exempt.store(true, Ordering::Relaxed);
            }
            Ok::<_, Infallible>(match version {
                Version::Http1 => answer,
                Version::Http2 => watched.watched(answer),
            })
        }
    });
    let builder = builder(version);
    let served = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut served = pin!(served);
    let idle = async {
        match version {
            // Its own reading has a limit.
            Version::Http1 => future::pending().await,
            Version::Http2 => tokio::select! {
                () = rest(&mut uses) => {}
                () = answers.watch() => {}
            },
        }
    };
    let outcome = tokio::select! {
        outcome = served.as_mut() => outcome,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
        () = idle => {
            served.as_mut().graceful_shutdown();
            match time::timeout(GOODBYE_TIMEOUT, served).await {
                Ok(outcome) => outcome,
                Err(_) => return debug!("an idle connection was closed without a goodbye"),
            }
        }
    };
    if let Err(err) = outcome {
        debug!(%err, "a connection broke");
    }
}

fn builder(version: Version) -> auto::Builder<TokioExecutor> {
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut builder = match version {
        Version::Http1 => builder.http1_only(),
        Version::Http2 => builder.http2_only(),
    };
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEAD_LIST_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES);
    builder
}

/// A request, from its head to the last byte of its answer.
struct Use(watch::Sender<usize>);

impl Use {
    fn new(under_way: watch::Sender<usize>) -> Self {
        under_way.send_modify(|count| *count += 1);
        Self(under_way)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Waits until no request has been under way for [`HEADER_TIMEOUT`].
async fn rest(uses: &mut watch::Receiver<usize>) {
    loop {
        let none = uses.wait_for(|count| *count == 0).await.is_ok();
        let again = uses.changed();
        // The service that counts is as old as the connection.
        if !none || time::timeout(HEADER_TIMEOUT, again).await.is_err() {
            return;
        }
    }
}

/// Small frames go out at once, and a client that is gone without a word is noticed.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::routing::get;
    use bytes::Bytes;
    use futures::stream;
    use hyper::client::conn::http2;
    use tokio::io::AsyncWriteExt as _;
    use tokio::sync::Notify;
    use tokio_util::sync::DropGuard;

    use super::*;

    /// Longest the test waits for what must happen.
    const PATIENCE: Duration = Duration::from_secs(60);
    /// How long a client may leave its answer lie.
    const UNREAD: Duration = Duration::from_millis(100);

    /// What an answer holds: says so when it is let go of.
    struct Held(Arc<Notify>);

    impl Drop for Held {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }

    /// A server whose answers have no end, and what says that it has let go of one.
    async fn endless() -> (SocketAddr, Arc<Notify>, DropGuard) {
        let let_go = Arc::new(Notify::new());
        let says = let_go.clone();
        let answer = async move || {
            let held = Held(says.clone());
            Body::from_stream(stream::repeat_with(move || {
                let _held = &held;
                Ok::<_, Infallible>(Bytes::from_static(&[0; 64 << 10]))
            }))
        };
        let router = Router::new().route("/", get(answer));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let stop = CancellationToken::new();
        tokio::spawn(serve_for(UNREAD, listener, router, stop.clone()));
        (address, let_go, stop.drop_guard())
    }

    #[tokio::test]
    async fn a_client_of_http_1_that_does_not_read_loses_its_answer() {
        let (address, let_go, _serving) = endless().await;
        let mut client = TcpStream::connect(address).await.expect("a connection");
        let request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        client.write_all(request).await.expect("asked");
        let lost = time::timeout(PATIENCE, let_go.notified());
        lost.await.expect("in time");
    }

    #[tokio::test]
    async fn a_client_of_http_2_that_does_not_read_loses_its_answer() {
        let (address, let_go, _serving) = endless().await;
        let stream = TcpStream::connect(address).await.expect("a connection");
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut client, connection) = handshake.await.expect("HTTP/2");
        tokio::spawn(connection);
        let request = hyper::Request::get("http://x/").body(Body::empty());
        let answer = client.send_request(request.expect("a request")).await;
        let _unread = answer.expect("an answer");
        let lost = time::timeout(PATIENCE, let_go.notified());
        lost.await.expect("in time");
    }
}
