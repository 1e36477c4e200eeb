//! The listening socket and its connections.
//!
//! One task accepts; each connection is a task that speaks HTTP/1.1 or HTTP/2 without TLS, as the
//! client begins. Stopping accepts no more, tells open connections to finish what they answer, and
//! waits [`STOP_TIMEOUT`] at most: process streams would last for ever.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

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

/// Serves `router` on `listener` until `stop` fires.
pub async fn run(listener: TcpListener, router: Router, stop: CancellationToken) {
    let graceful = GracefulShutdown::new();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(IDLE_TIMEOUT));
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let stream = match accepted {
            Ok((stream, _peer)) => stream,
            Err(err) => {
                log!("accept a connection: {err}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        if let Err(err) = tune(&stream) {
            log!("set up a connection: {err}");
        }
        let service = TowerToHyperService::new(router.clone());
        let connection = builder
            .serve_connection(TokioIo::new(stream), service)
            .into_owned();
        let connection = graceful.watch(connection);
        // A connection that breaks is its client's affair; handlers report their own errors.
        tokio::spawn(async move { drop(connection.await) });
    }
    drop(listener);
    if timeout(STOP_TIMEOUT, graceful.shutdown()).await.is_err() {
        log!("connections still open after {STOP_TIMEOUT:?} were cut");
    }
}

/// Small answers leave at once, and a peer that is gone is noticed.
fn tune(stream: &TcpStream) -> io::Result<()> {
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
