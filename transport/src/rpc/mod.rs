//! Calls between peers: one bidirectional stream each.
//!
//! ```text
//! caller    open stream > one request frame > FIN            ... < one reply frame < FIN
//! callee    read within a deadline > handler within the caller's patience > reply
//! ```
//!
//! Either end of a connection may call. Whatever goes wrong on a stream resets that stream with a
//! [`CloseCode`] and leaves the connection alone: one bad call must not cost a heartbeat. A caller
//! that drops its future resets the stream, and the handler's future is dropped in turn; work that
//! must be finished once begun belongs in a task of the handler's own.
//!
//! [`frame`] cuts the stream into messages, [`wire`](self) has the messages, [`hello`] is the
//! first call on every connection, [`server`](self) and [`client`](self) are the two ends.

mod client;
pub mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod hello;
mod router;
mod server;
pub(crate) mod stream;
pub(crate) mod wire;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use proto::ids::NodeKey;

use crate::close::CloseCode;
use crate::join::JoinChannel;
use crate::limits::REASON_BYTES;

pub(crate) use client::{call, open, write_failed};
pub use frame::FrameError;
pub(crate) use router::Router;
pub(crate) use server::{Server, serve, serve_join};

/// A group of methods with one handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Service(pub u16);

impl Service {
    /// This crate's own: hello and ping.
    pub const TRANSPORT: Self = Self(0);
    /// Raft's network.
    pub const RAFT: Self = Self(1);
    /// The one call a stranger may make.
    pub const JOIN: Self = Self(2);
    /// Proposals and reads sent on to the leader.
    pub const CLUSTER: Self = Self(3);
    /// Guest connections relayed to the sandbox's owner, as byte streams.
    pub const RELAY: Self = Self(4);
    /// Raft snapshots, as byte streams.
    pub const SNAPSHOT: Self = Self(5);
    /// Applied entries for nodes that mirror the log.
    pub const PULL: Self = Self(6);
    /// Snapshots of sandboxes, as byte streams.
    pub const STORE: Self = Self(7);

    /// Which of several waiting streams of a connection is sent first.
    const fn priority(self) -> i32 {
        match self {
            Self::TRANSPORT | Self::RAFT => 20,
            _ => 10,
        }
    }

    /// The method of this service with that number.
    #[must_use]
    pub const fn method(self, number: u16) -> Method {
        Method {
            service: self,
            number,
        }
    }
}

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Method {
    /// Whose handler answers.
    pub service: Service,
    /// Which of its methods.
    pub number: u16,
}

impl Method {
    /// The first call on every connection.
    pub(crate) const HELLO: Self = Service::TRANSPORT.method(1);
    /// Sends its body back.
    pub(crate) const PING: Self = Service::TRANSPORT.method(2);
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "method {}.{}", self.service.0, self.number)
    }
}

/// A call as its handler sees it.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who calls. A member on the mesh; anybody at all in the join service.
    pub peer: NodeKey,
    /// What is called; always of the service the handler is registered for.
    pub method: Method,
    /// The caller's message.
    pub body: Bytes,
    /// How much longer the caller waits.
    pub patience: Duration,
    /// For a call of [`Service::JOIN`]: what ties a proof to the very connection it came on.
    pub channel: Option<JoinChannel>,
}

/// Answers the calls of one service.
pub trait Handler: Send + Sync + 'static {
    /// Answers `call`. The future is dropped when the caller's patience ends or the caller hangs
    /// up.
    fn call(&self, call: Call) -> impl Future<Output = Result<Bytes, RpcError>> + Send;
}

/// Why a call brought no answer.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// There is no live connection to the peer.
    #[error("not connected to node {peer}")]
    NotConnected {
        /// Who was to be called.
        peer: NodeKey,
    },
    /// The peer has no handler for this, or not yet.
    #[error("peer does not serve {method}")]
    NotServed {
        /// What was called.
        method: Method,
    },
    /// The handler said no.
    #[error("peer refused: {reason}")]
    Rejected {
        /// In its own words.
        reason: String,
    },
    /// The peer has no room for this now.
    #[error("peer is busy")]
    Busy,
    /// The handler began and could not finish.
    #[error("peer failed: {reason}")]
    Failed {
        /// In its own words.
        reason: String,
    },
    /// No answer came in time.
    #[error("no answer before the deadline")]
    Deadline,
    /// The request or the answer exceeds the frame limit.
    #[error("message exceeds the frame limit")]
    TooLarge,
    /// The answer could not be read.
    #[error("read the answer")]
    BadAnswer {
        /// What was wrong with it.
        source: FrameError,
    },
    /// The peer closed the stream or the connection, and said why.
    #[error("peer closed: {code}")]
    Closed {
        /// Its reason.
        code: CloseCode,
    },
    /// The connection broke.
    #[error("lose the connection")]
    Lost {
        /// How.
        source: quinn::ConnectionError,
    },
}

impl RpcError {
    /// A handler's refusal.
    #[must_use]
    pub fn rejected(reason: impl Into<String>) -> Self {
        Self::Rejected {
            reason: reason.into(),
        }
    }

    /// A handler's failure half way.
    #[must_use]
    pub fn failed(reason: impl Into<String>) -> Self {
        Self::Failed {
            reason: reason.into(),
        }
    }

    /// Whether the peer may have acted on the call all the same. Only where this is false may a
    /// call that is not idempotent be repeated. There is no `_` arm: a new variant takes a side.
    #[must_use]
    pub fn may_have_acted(&self) -> bool {
        match self {
            Self::NotConnected { .. }
            | Self::NotServed { .. }
            | Self::Rejected { .. }
            | Self::Busy => false,
            Self::Closed { code } => !matches!(
                code,
                CloseCode::NotMember
                    | CloseCode::NoJoinOpen
                    | CloseCode::FrameTooLarge
                    | CloseCode::FrameTruncated
                    | CloseCode::FrameGarbage
            ),
            Self::Failed { .. }
            | Self::Deadline
            | Self::TooLarge
            | Self::BadAnswer { .. }
            | Self::Lost { .. } => true,
        }
    }
}

impl From<quinn::ConnectionError> for RpcError {
    fn from(source: quinn::ConnectionError) -> Self {
        match source {
            quinn::ConnectionError::ApplicationClosed(close) => Self::Closed {
                code: close.error_code.into(),
            },
            source => Self::Lost { source },
        }
    }
}

/// The first [`REASON_BYTES`] of a text, cut between characters.
fn short(mut text: String) -> String {
    let mut end = text.len().min(REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
