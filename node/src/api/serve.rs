//! Listening: connections in, bounded in number and in patience, and an orderly end.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tracing::{debug, warn};

use super::preview::Peer;

/// Open connections at once: each may hold a read buffer, so this bounds memory to some 400 MiB
/// in the worst case and keeps well below common limits of descriptors.
const MAX_CONNECTIONS: usize = 4096;
/// Longest a request's head may take, and an idle connection may stay.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// Largest head of a request that is kept while it arrives.
const HEAD_BYTES: usize = 64 << 10;
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
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let accept = async {
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, from)) => start(stream, from, permit, &router, &graceful),
                Err(err) => {
                    warn!(%err, "could not accept a connection");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    let _stopped = stop.run_until_cancelled(accept).await;
    drop(listener);
    if time::timeout(STOP_TIMEOUT, graceful.shutdown())
        .await
        .is_err()
    {
        warn!(waited = ?STOP_TIMEOUT, "left requests behind that did not finish");
    }
}

/// Serves one connection in a task of its own, which ends with the connection.
fn start(
    stream: TcpStream,
    from: SocketAddr,
    permit: OwnedSemaphorePermit,
    router: &Router,
    graceful: &GracefulShutdown,
) {
    if let Err(err) = prepare(&stream) {
        debug!(%err, "a connection was gone at once");
        return;
    }
    // Version 1.1 only, as clients of the interface speak it: with a choice, a connection that
    // sends nothing would be waited for without a limit.
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES);
    let service = ServiceBuilder::new()
        .map_request(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(Peer(from));
            request
        })
        .service(router.clone());
    let service = TowerToHyperService::new(service);
    let served = builder
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .into_owned();
    let watched = graceful.watch(served);
    tokio::spawn(async move {
        let _permit = permit;
        if let Err(err) = watched.await {
            debug!(%err, "a connection broke");
        }
    });
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
