//! The seam to other nodes: a relay opens streams and asks questions, and need not know how.
//!
//! Joined in wiring over the transport; in tests of logic over pipes in memory.

use std::fmt;

use bytes::Bytes;
use futures::future::BoxFuture;
use proto::ids::NodeId;

use crate::guest::GuestStream;

/// The other nodes, as far as a relay needs them.
pub trait Peers: fmt::Debug + Send + Sync + 'static {
    /// Opens a stream to the relay of `to`, which is given `header`.
    ///
    /// Shutting the stream down ends it cleanly in that direction. Dropping it without, or a
    /// failure at the other end, breaks it: the other end's read fails instead of ending. A read
    /// that fails because the *node* is gone says [`std::io::ErrorKind::NotConnected`] or
    /// [`std::io::ErrorKind::TimedOut`]; one that fails because the other end broke the stream
    /// says [`std::io::ErrorKind::ConnectionReset`].
    fn open(&self, to: NodeId, header: Bytes)
    -> BoxFuture<'static, Result<GuestStream, PeerError>>;

    /// Asks the relay of `to` a question. Dropping the future gives it up.
    fn ask(&self, to: NodeId, question: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>>;
}

/// Why another node did not do what it was asked.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// There is no way to it.
    #[error("there is no way to it: {0}")]
    Unreachable(String),
    /// It answered, and will not serve this node.
    #[error("it refused: {0}")]
    Refused(String),
    /// No answer in time; it may have acted all the same.
    #[error("it did not answer in time")]
    TimedOut,
    /// The connection broke on the way; it may have acted all the same.
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// A cluster of one: there is nobody else.
#[derive(Clone, Copy, Debug)]
pub struct NoPeers;

impl Peers for NoPeers {
    fn open(&self, to: NodeId, _: Bytes) -> BoxFuture<'static, Result<GuestStream, PeerError>> {
        Box::pin(async move { Err(nobody(to)) })
    }

    fn ask(&self, to: NodeId, _: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        Box::pin(async move { Err(nobody(to)) })
    }
}

fn nobody(to: NodeId) -> PeerError {
    PeerError::Unreachable(format!("this node knows no way to {to}"))
}
