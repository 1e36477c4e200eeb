//! The listening socket and its connections.
//!
//! One task accepts; each connection is a task that speaks HTTP/1.1 or HTTP/2 without TLS, as the
//! client begins, and obeys its fate in the table of [`crate::connections`]. Stopping accepts no
//! more, tells open connections to finish what they answer, and waits [`STOP_TIMEOUT`] at most:
//! process streams would last for ever.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::response::Response;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulConnection;
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connections::{Admitted, ConnectionId, Connections, Fate};
use crate::log;
use crate::log::chain;

/// How long a connection may idle between requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(640);
/// How long unacknowledged data keeps a connection: a client that vanished without a word must not
/// hold back the process whose output it was reading.
const VANISHED_TIMEOUT_MS: u32 = 60_000;
/// How long open connections may take to finish when the agent stops.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause after a failed accept (out of descriptors, as a rule), so that it is not tried in a spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What is received of a request's head before anything answers: many times what any client sends.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// The answer to a peer with too many connections.
const TOO_MANY: &str = "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\n\
    content-length: 47\r\nconnection: close\r\n\r\n{\"code\":429,\"message\":\"too many connections\"}\r\n";

/// Serves `router` on `listener` until `stop` fires.
pub async fn run(listener: TcpListener, router: Router, stop: CancellationToken) {
    run_known(listener, router, Arc::default(), stop).await;
}

/// As [`run`], with every connection entered in `connections`.
pub async fn run_known(
    listener: TcpListener,
    router: Router,
    connections: Arc<Connections>,
    stop: CancellationToken,
) {
    let tasks = TaskTracker::new();
    let builder = builder();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(err) => {
                log!("accept a connection: {err}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        if let Err(err) = tune(&stream) {
            log!("set up a connection: {err}");
        }
        let Some(admitted) = connections.admit(peer.ip()) else {
            // As far as it fits without waiting, which is all of it.
            let _ = stream.try_write(TOO_MANY.as_bytes());
            continue;
        };
        let cut = Arc::new(AtomicBool::new(false));
        let socket = Socket {
            stream,
            cut: cut.clone(),
        };
        let service = Tagged {
            router: TowerToHyperService::new(router.clone()),
            id: admitted.id,
            served: admitted.served.clone(),
        };
        let connection = builder.serve_connection(TokioIo::new(socket), service);
        tasks.spawn(drive(connection.into_owned(), admitted, cut));
    }
    drop(listener);
    connections.finish_all();
    tasks.close();
    if timeout(STOP_TIMEOUT, tasks.wait()).await.is_err() {
        log!("connections still open after {STOP_TIMEOUT:?} were cut");
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .max_buf_size(MAX_HEAD_BYTES)
        .header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(IDLE_TIMEOUT));
    builder
}

/// Sees one connection to its end.
async fn drive(connection: impl GracefulConnection, mut admitted: Admitted, cut: Arc<AtomicBool>) {
    let mut connection = pin!(connection);
    loop {
        tokio::select! {
            // Its fate first: one that is cut must not get to answer what it was asked.
            biased;
            // The table holds the sender for as long as `admitted` lives.
            _ = admitted.fate.changed() => {}
            // A connection that breaks is its client's affair; handlers report their own errors.
            _ = connection.as_mut() => return,
        }
        match *admitted.fate.borrow_and_update() {
            Fate::Serve => {}
            Fate::Finish => connection.as_mut().graceful_shutdown(),
            Fate::Cut => return cut.store(true, Ordering::Release),
        }
    }
}

/// The router, with the connection's number put into each request.
#[derive(Clone)]
struct Tagged {
    router: TowerToHyperService<Router>,
    id: ConnectionId,
    served: Arc<AtomicBool>,
}

impl hyper::service::Service<http::Request<Incoming>> for Tagged {
    type Response = Response;
    type Error = std::convert::Infallible;
    type Future =
        <TowerToHyperService<Router> as hyper::service::Service<http::Request<Incoming>>>::Future;

    fn call(&self, mut request: http::Request<Incoming>) -> Self::Future {
        self.served.store(true, Ordering::Release);
        request.extensions_mut().insert(self.id);
        self.router.call(request)
    }
}

/// A connection's socket. One that is cut says so to its peer by a reset and is gone at once;
/// otherwise its kernel half would linger until the peer of a past life answers.
struct Socket {
    stream: TcpStream,
    cut: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.cut.load(Ordering::Acquire) {
            let at_once = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            // It is closed either way.
            let _ = setsockopt(&self.stream, sockopt::Linger, &at_once);
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Small answers leave at once, and a peer that is gone is noticed.
///
/// # Errors
/// What the kernel said.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &VANISHED_TIMEOUT_MS)?;
    Ok(())
}

/// Opens the listening socket.
///
/// # Errors
/// What the kernel said.
pub async fn listen(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .inspect_err(|err| log!("listen on {address}: {}", chain(err)))
}
