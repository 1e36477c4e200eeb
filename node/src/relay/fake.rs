//! Nodes of one process as peers, for tests of logic: streams are pipes in memory that keep to the
//! contract of [`Peers`], and a node can be taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use proto::ids::NodeId;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::peers::{PeerError, Peers};
use super::serve::Server;
use crate::guest::GuestStream;

/// Bytes that a pipe holds in each direction.
const PIPE_BYTES: usize = 64 << 10;

/// The nodes that one node sees.
#[derive(Clone, Debug, Default)]
pub struct InProcessPeers {
    from: NodeId,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    servers: Mutex<BTreeMap<NodeId, Server>>,
    cut: Mutex<BTreeSet<NodeId>>,
    opened: AtomicUsize,
    asked: AtomicUsize,
}

impl InProcessPeers {
    /// What node `from` sees of the same nodes.
    #[must_use]
    pub fn seen_from(&self, from: NodeId) -> Self {
        let shared = Arc::clone(&self.shared);
        Self { from, shared }
    }

    /// Adds a node.
    pub fn add(&self, id: NodeId, server: Server) {
        lock(&self.shared.servers).insert(id, server);
    }

    /// Makes a node unreachable for what comes.
    pub fn cut(&self, id: NodeId) {
        lock(&self.shared.cut).insert(id);
    }

    /// How many streams were opened so far.
    #[must_use]
    pub fn opened(&self) -> usize {
        self.shared.opened.load(Ordering::Relaxed)
    }

    /// How many questions were asked so far.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::Relaxed)
    }

    fn server(&self, of: NodeId) -> Result<Server, PeerError> {
        let server = lock(&self.shared.servers).get(&of).cloned();
        let server = server.filter(|_| !lock(&self.shared.cut).contains(&of));
        server.ok_or_else(|| PeerError::Unreachable(format!("{of} is cut off")))
    }
}

impl Peers for InProcessPeers {
    fn open(
        &self,
        to: NodeId,
        header: Bytes,
    ) -> BoxFuture<'static, Result<GuestStream, PeerError>> {
        self.shared.opened.fetch_add(1, Ordering::Relaxed);
        let (server, from) = (self.server(to), self.from);
        Box::pin(async move {
            let server = server?;
            let (near, far) = pipe();
            let gone = far.other_gone.clone();
            let far = GuestStream::new(far);
            tokio::spawn(async move {
                server
                    .serve(from, header, far, gone.cancelled_owned())
                    .await;
            });
            Ok(GuestStream::new(near))
        })
    }

    fn ask(&self, to: NodeId, question: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        self.shared.asked.fetch_add(1, Ordering::Relaxed);
        let (server, from) = (self.server(to), self.from);
        Box::pin(async move { Ok(server?.answer(from, question).await) })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is a single call: a panic leaves the value whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One end of a pipe that tells an end from a break.
struct PipeEnd {
    inner: DuplexStream,
    /// Whether this end was shut down.
    ended: Arc<AtomicBool>,
    other_ended: Arc<AtomicBool>,
    other_gone: CancellationToken,
    _gone: DropGuard,
}

fn pipe() -> (PipeEnd, PipeEnd) {
    let (one, two) = tokio::io::duplex(PIPE_BYTES);
    let (one_ended, two_ended) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let (one_gone, two_gone) = (CancellationToken::new(), CancellationToken::new());
    let one_end = PipeEnd {
        inner: one,
        ended: Arc::clone(&one_ended),
        other_ended: Arc::clone(&two_ended),
        other_gone: two_gone.clone(),
        _gone: one_gone.clone().drop_guard(),
    };
    let two_end = PipeEnd {
        inner: two,
        ended: two_ended,
        other_ended: one_ended,
        other_gone: one_gone,
        _gone: two_gone.drop_guard(),
    };
    (one_end, two_end)
}

impl AsyncRead for PipeEnd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let at_end = matches!(polled, Poll::Ready(Ok(()))) && buf.filled().len() == before;
        if at_end && buf.remaining() > 0 && !self.other_ended.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        polled
    }
}

impl AsyncWrite for PipeEnd {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ended.store(true, Ordering::Release);
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
