//! The messages on a call's stream. Field numbers are for ever.

use bytes::Bytes;

use super::RpcError;
use crate::limits::STREAM_HEADER_BYTES;

/// Largest frame that opens a byte stream: the header and the numbers around it.
pub(crate) const STREAM_FRAME_BYTES: usize = STREAM_HEADER_BYTES + 64;

/// The oldest protocol version this node still speaks.
pub(crate) const OLDEST: u32 = 1;
/// The newest protocol version this node speaks.
pub(crate) const NEWEST: u32 = 1;

/// The one frame from the caller.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Request {
    #[prost(uint32, tag = "1")]
    pub(crate) service: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) method: u32,
    /// How much longer the caller waits. A duration, because two nodes' clocks differ.
    #[prost(uint32, tag = "3")]
    pub(crate) patience_ms: u32,
    /// The caller's message, or what a byte stream is for.
    #[prost(bytes = "bytes", tag = "4")]
    pub(crate) body: Bytes,
    /// Whether this opens a byte stream: no FIN follows, and bytes do once it was accepted.
    #[prost(bool, tag = "5")]
    pub(crate) stream: bool,
}

/// The one frame back.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Reply {
    /// 0 is an answer; the others are in [`status`].
    #[prost(uint32, tag = "1")]
    pub(crate) status: u32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) body: Bytes,
    #[prost(string, tag = "3")]
    pub(crate) reason: String,
}

impl Reply {
    /// What a handler's outcome looks like on the wire.
    pub(crate) fn of(outcome: Result<Bytes, RpcError>) -> Self {
        let (status, reason) = match outcome {
            Ok(body) => {
                return Self {
                    status: status::OK,
                    body,
                    reason: String::new(),
                };
            }
            Err(RpcError::NotServed { .. }) => (status::NOT_SERVED, String::new()),
            Err(RpcError::Rejected { reason }) => (status::REJECTED, reason),
            Err(RpcError::Busy) => (status::BUSY, String::new()),
            Err(RpcError::Deadline) => (status::DEADLINE, String::new()),
            Err(RpcError::TooLarge) => (status::TOO_LARGE, String::new()),
            Err(RpcError::Failed { reason }) => (status::FAILED, reason),
            // A handler that called a third node reports what became of that.
            Err(other) => (status::FAILED, other.to_string()),
        };
        Self {
            status,
            body: Bytes::new(),
            reason: super::short(reason),
        }
    }
}

/// Values of [`Reply::status`].
pub(crate) mod status {
    pub(crate) const OK: u32 = 0;
    pub(crate) const NOT_SERVED: u32 = 1;
    pub(crate) const REJECTED: u32 = 2;
    pub(crate) const BUSY: u32 = 3;
    pub(crate) const FAILED: u32 = 4;
    pub(crate) const DEADLINE: u32 = 5;
    pub(crate) const TOO_LARGE: u32 = 6;
}

/// What the dialling side says of itself.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Hello {
    #[prost(uint32, tag = "1")]
    pub(crate) oldest: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) newest: u32,
    #[prost(string, tag = "3")]
    pub(crate) product: String,
    #[prost(uint64, tag = "4")]
    pub(crate) membership_index: u64,
    /// Of this start of the sender; absent from releases that say nothing of it.
    #[prost(uint64, tag = "5")]
    pub(crate) run: u64,
}

/// What the accepting side settles.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct HelloReply {
    #[prost(uint32, tag = "1")]
    pub(crate) protocol: u32,
    #[prost(string, tag = "2")]
    pub(crate) product: String,
    #[prost(uint64, tag = "3")]
    pub(crate) membership_index: u64,
    /// See [`Hello::run`].
    #[prost(uint64, tag = "4")]
    pub(crate) run: u64,
}
