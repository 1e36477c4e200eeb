//! The relay over the transport: streams on the bulk lane, questions as calls on the control lane.
//!
//! [`QuicPeers`] is the asking side and [`QuicRelay`] the owner's, both beside a [`Ways`], which
//! knows where nodes are and joins in wiring. A stream is accepted by the transport at once and
//! judged by the relay, whose verdict travels right behind: one round trip, and refusals keep
//! their names.
//!
//! A broken stream is one of two things, and here is where they are told apart: the other end
//! dropped it (the guest, or its client, is gone), or the connection under it is lost (the node
//! is).

use std::fmt;
use std::future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use proto::ids::{NodeId, NodeKey};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use transport::streams::close_code_of;
use transport::{
    BiStream, Call, CloseCode, Handler, Inbound, Lane, Method, RpcError, Service, StreamHandler,
    Transport,
};

use super::peers::{PeerError, Peers};
use super::serve::Server;
use crate::base::chain::chain;
use crate::guest::GuestStream;

/// Where streams to guests go: not between heartbeats.
const STREAM_LANE: Lane = Lane::Bulk;
/// The one method of the relay's service.
const ASK: Method = Service::RELAY.method(1);
/// Longest from wanting a stream to the other node's acceptance, dialling it included. The relay's
/// own deadline for the verdict is longer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a question may take; the relay's own deadlines are shorter.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// Where nodes are, and who a key is.
pub trait Ways: fmt::Debug + Send + Sync + 'static {
    /// Makes sure that there is a live connection to `to` on `lane`, and returns its key.
    fn connect(
        &self,
        to: NodeId,
        lane: Lane,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<NodeKey, PeerError>>;

    /// The node with this key.
    fn node_of(&self, key: NodeKey) -> Option<NodeId>;
}

/// The nodes of the cluster over the transport.
#[derive(Clone)]
pub struct QuicPeers {
    transport: Arc<Transport>,
    ways: Arc<dyn Ways>,
}

impl fmt::Debug for QuicPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuicPeers")
            .field("ways", &self.ways)
            .finish_non_exhaustive()
    }
}

impl QuicPeers {
    /// Peers that are reached through `transport`, where `ways` leads to them.
    #[must_use]
    pub fn new(transport: Arc<Transport>, ways: Arc<dyn Ways>) -> Self {
        Self { transport, ways }
    }
}

impl Peers for QuicPeers {
    fn open(
        &self,
        to: NodeId,
        header: Bytes,
    ) -> BoxFuture<'static, Result<GuestStream, PeerError>> {
        let (deadline, this) = (Instant::now() + OPEN_TIMEOUT, self.clone());
        Box::pin(async move {
            let key = this.ways.connect(to, STREAM_LANE, deadline).await?;
            let service = Service::RELAY;
            let opened = this
                .transport
                .open_stream(STREAM_LANE, key, service, header, deadline);
            Ok(GuestStream::new(QuicStream(opened.await?)))
        })
    }

    fn ask(&self, to: NodeId, question: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (deadline, this) = (Instant::now() + ASK_TIMEOUT, self.clone());
        Box::pin(async move {
            let key = this.ways.connect(to, Lane::Control, deadline).await?;
            Ok(this.transport.call(key, ASK, question, deadline).await?)
        })
    }
}

impl From<RpcError> for PeerError {
    fn from(err: RpcError) -> Self {
        match err {
            RpcError::NotConnected { .. } => Self::Unreachable(err.to_string()),
            RpcError::Rejected { reason } => Self::Refused(reason),
            RpcError::NotServed { .. } | RpcError::Busy => Self::Refused(err.to_string()),
            RpcError::Deadline => Self::TimedOut,
            _ => Self::Broken(chain(&err)),
        }
    }
}

/// What peers open to, and ask of, the relay of this node.
#[derive(Clone, Debug)]
pub struct QuicRelay {
    server: Server,
    ways: Arc<dyn Ways>,
}

impl QuicRelay {
    /// Serves peers of `transport` by `server` from now on.
    pub fn register(transport: &Transport, server: Server, ways: Arc<dyn Ways>) {
        let relay = Self { server, ways };
        transport.register(Service::RELAY, relay.clone());
        transport.register_streams(Service::RELAY, STREAM_LANE, relay);
    }
}

/// For a member that this node's log does not know yet, or any more.
const UNKNOWN_NODE: &str = "this node does not know yours";

impl StreamHandler for QuicRelay {
    async fn open(&self, mut inbound: Inbound) {
        let Some(from) = self.ways.node_of(inbound.peer) else {
            return inbound.refuse(UNKNOWN_NODE).await;
        };
        let header = std::mem::take(&mut inbound.header);
        // Whoever gave up meanwhile needs no answer.
        let Ok(stream) = inbound.accept().await else {
            return;
        };
        let stream = GuestStream::new(QuicStream(stream));
        // An opener that drops its stream resets it, which reading shows.
        let gone = future::pending();
        self.server.serve(from, header, stream, gone).await;
    }
}

impl Handler for QuicRelay {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        if call.method != ASK {
            let method = call.method;
            return Err(RpcError::NotServed { method });
        }
        let from = self.ways.node_of(call.peer);
        let from = from.ok_or_else(|| RpcError::rejected(UNKNOWN_NODE))?;
        Ok(self.server.answer(from, call.body).await)
    }
}

/// A stream of the transport that keeps to the contract of [`Peers::open`].
struct QuicStream(BiStream);

/// Names the loss of the connection, which the transport reports as the reset of each stream.
fn named(err: io::Error) -> io::Error {
    let is_lost = match close_code_of(&err) {
        Some(
            CloseCode::Abandoned
            | CloseCode::Cancelled
            | CloseCode::HandlerFailed
            | CloseCode::Stalled,
        ) => false,
        Some(_) => true,
        None => err.kind() == io::ErrorKind::ConnectionAborted,
    };
    if is_lost {
        return io::Error::new(io::ErrorKind::NotConnected, err);
    }
    err
}

impl AsyncRead for QuicStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf).map_err(named)
    }
}

impl AsyncWrite for QuicStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf).map_err(named)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx).map_err(named)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx).map_err(named)
    }
}

#[cfg(test)]
mod tests {
    use transport::streams::StreamReset;

    use super::*;

    #[test]
    fn a_dropped_stream_is_told_from_a_lost_node() {
        let reset = |code| io::Error::new(io::ErrorKind::ConnectionReset, StreamReset { code });
        let kind = |err| named(err).kind();
        assert_eq!(
            kind(reset(CloseCode::Abandoned)),
            io::ErrorKind::ConnectionReset
        );
        assert_eq!(
            kind(reset(CloseCode::Stopping)),
            io::ErrorKind::NotConnected
        );
        assert_eq!(kind(reset(CloseCode::Removed)), io::ErrorKind::NotConnected);
        let aborted = io::ErrorKind::ConnectionAborted.into();
        assert_eq!(kind(aborted), io::ErrorKind::NotConnected);
        let timed_out = io::ErrorKind::TimedOut.into();
        assert_eq!(kind(timed_out), io::ErrorKind::TimedOut);
    }
}
