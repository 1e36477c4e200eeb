//! What the group needs from a network.
//!
//! Requests and answers are opaque bytes: one side's `Group` makes them, the other side's
//! [`Group::serve`](crate::group::Group::serve) reads them. The network's part is to be sure whom
//! it reached (the key in [`Node`] is the name, not the address), to keep deadlines, and to say
//! plainly when nobody was reached.

use std::future::Future;
use std::time::Duration;

use proto::ids::NodeId;

use crate::peer;
use crate::snapshot::SnapshotFile;
use crate::types::Node;

/// Why no answer came.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Nobody is there; wait before the next attempt.
    #[error("{0} cannot be reached")]
    Unreachable(NodeId),
    /// The request may have arrived; no answer did.
    #[error("{0} did not answer in time")]
    TimedOut(NodeId),
    /// The connection broke; the next attempt may be made at once.
    #[error("the connection to {0} broke")]
    Broken(NodeId),
}

/// Who says to have made `request`, for the receiving side to compare with whom it authenticated:
/// a member must not speak in another one's name. `None` for bytes that are no request.
#[must_use]
pub fn sender(request: &[u8]) -> Option<NodeId> {
    let envelope = peer::read_envelope(request).ok()?;
    Some(NodeId(envelope.sender))
}

/// The network to other members.
pub trait Link: Send + Sync + 'static {
    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// [`LinkError`]; the caller retries by itself.
    fn call(
        &self,
        to: NodeId,
        node: &Node,
        request: Vec<u8>,
        within: Duration,
    ) -> impl Future<Output = Result<Vec<u8>, LinkError>> + Send;

    /// Sends `request` followed by the bytes of `file`, on the bulk path, and waits for the
    /// answer. The receiver stores the bytes in a file and calls
    /// [`Group::serve_snapshot`](crate::group::Group::serve_snapshot).
    ///
    /// # Errors
    /// [`LinkError`]; the caller retries by itself.
    fn send_snapshot(
        &self,
        to: NodeId,
        node: &Node,
        request: Vec<u8>,
        file: SnapshotFile,
    ) -> impl Future<Output = Result<Vec<u8>, LinkError>> + Send;
}

/// The network of a cluster of one.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPeers;

impl Link for NoPeers {
    async fn call(
        &self,
        to: NodeId,
        _node: &Node,
        _request: Vec<u8>,
        _within: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        Err(LinkError::Unreachable(to))
    }

    async fn send_snapshot(
        &self,
        to: NodeId,
        _node: &Node,
        _request: Vec<u8>,
        _file: SnapshotFile,
    ) -> Result<Vec<u8>, LinkError> {
        Err(LinkError::Unreachable(to))
    }
}
