//! A stream that a peer wants to open, until the handler has said yes or no.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto::ids::NodeKey;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::pipe::BiStream;
use crate::bulk::pace::Pacer;
use crate::close::CloseCode;
use crate::endpoint::Lane;
use crate::rpc::stream::Stream;
use crate::rpc::{RpcError, Service, frame, wire};

/// Takes the streams of one service on one lane.
pub trait StreamHandler: Send + Sync + 'static {
    /// Serves `inbound` to its end. The future is dropped when the connection ends, and when the
    /// opener gives up before it was accepted; after that the stream's own errors tell.
    fn open(&self, inbound: Inbound) -> impl Future<Output = ()> + Send;
}

/// A stream that a member wants to open. Dropped without a word, it is reset with
/// [`CloseCode::HandlerFailed`].
#[derive(Debug)]
pub struct Inbound {
    /// Who opens it.
    pub peer: NodeKey,
    /// Of which service.
    pub service: Service,
    /// On which lane.
    pub lane: Lane,
    /// What the opener says it is for; at most [`crate::limits::STREAM_HEADER_BYTES`].
    pub header: Bytes,
    /// How much longer the opener waits for an answer.
    pub patience: Duration,
    pub(crate) opening: Opening,
}

/// What answering takes.
pub(crate) struct Opening {
    pub(crate) stream: Stream,
    /// The header's share of the connection's budget, given back with the answer.
    pub(crate) held: Option<OwnedSemaphorePermit>,
    /// Set once an answer is being sent.
    pub(crate) answered: Arc<AtomicBool>,
    /// Longest wait for room to write the answer.
    pub(crate) write: Duration,
    /// Longest wait for the opener to read, once it is accepted.
    pub(crate) stall: Duration,
    /// What the accepted stream has to keep to.
    pub(crate) pacer: Option<Arc<Pacer>>,
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opening({})", self.stream.send.id())
    }
}

impl Inbound {
    /// Opens the stream.
    ///
    /// # Errors
    /// [`RpcError::Closed`], [`RpcError::Lost`] or [`RpcError::Deadline`]: the opener has gone, or
    /// reads nothing.
    pub async fn accept(self) -> Result<BiStream, RpcError> {
        let (pacer, stall) = (self.opening.pacer.clone(), self.opening.stall);
        let stream = self.opening.answer(Ok(Bytes::new())).await?;
        Ok(BiStream::new(stream, pacer, stall))
    }

    /// Says no, in words for the opener ([`RpcError::Rejected`] there).
    pub async fn refuse(self, reason: impl Into<String>) {
        self.opening.refuse(RpcError::rejected(reason)).await;
    }

    /// Says that there is no room for it now ([`RpcError::Busy`] there).
    pub async fn refuse_busy(self) {
        self.opening.refuse(RpcError::Busy).await;
    }
}

impl Opening {
    /// Ends the stream with an answer that says no.
    pub(crate) async fn refuse(self, err: RpcError) {
        if let Ok(mut stream) = self.answer(Err(err)).await {
            let _ended = stream.send.finish();
            let _ended = stream.recv.stop(CloseCode::Abandoned.varint());
            stream.done();
        }
    }

    async fn answer(self, outcome: Result<Bytes, RpcError>) -> Result<Stream, RpcError> {
        let Self {
            mut stream,
            held,
            answered,
            write,
            stall: _,
            pacer: _,
        } = self;
        answered.store(true, Ordering::Release);
        drop(held);
        let reply = wire::Reply::of(outcome);
        let frame = frame::encode(&reply, crate::limits::STREAM_ANSWER_BYTES)
            .map_err(|_| RpcError::TooLarge)?;
        match timeout(write, stream.send.write_chunk(frame)).await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(err)) => Err(crate::rpc::write_failed(err)),
            Err(_) => {
                stream.refuse(CloseCode::Stalled);
                Err(RpcError::Deadline)
            }
        }
    }
}
