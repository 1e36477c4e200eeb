//! Why a transport did not start and why a peer was not reached.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use proto::ids::NodeKey;
use quinn::ConnectionError;

use crate::close::CloseCode;
use crate::endpoint::Lane;
use crate::rpc::RpcError;
use crate::tls::{self, TlsError};

/// Why the transport could not start.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken, or not this machine's.
    #[error("bind the {lane:?} endpoint to {address}")]
    Bind {
        /// Which endpoint.
        lane: Lane,
        /// Where it was to listen.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// TLS could not be set up.
    #[error("prepare the node's TLS")]
    Tls {
        /// Why.
        source: TlsError,
    },
}

/// Why a peer could not be connected.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// This node's own member list lacks the key.
    #[error("node {key} is not on the member list")]
    NotMember {
        /// Who was to be reached.
        key: NodeKey,
    },
    /// Nothing came back, not even the beginning of a handshake.
    #[error("no node answers at {address}: is it running, and does UDP reach that port from here?")]
    Unreachable {
        /// Where nobody is.
        address: SocketAddr,
    },
    /// Somebody else answered at this address.
    #[error("the node at {address} has another key than the expected {expected}")]
    WrongKey {
        /// Who answered.
        address: SocketAddr,
        /// Whom we wanted.
        expected: NodeKey,
    },
    /// A stranger tried to join, and the peer hears none now.
    #[error("the node at {address} refuses strangers: no join token is outstanding there")]
    JoinClosed {
        /// Who refused.
        address: SocketAddr,
    },
    /// The peer's member list lacks this node's key.
    #[error("the node at {address} does not know this node as a member")]
    KeyRefused {
        /// Who refused.
        address: SocketAddr,
    },
    /// Both ends are nodes and have no protocol version in common.
    #[error("the node at {address} speaks another protocol version: update the older of the two")]
    VersionMismatch {
        /// Who.
        address: SocketAddr,
    },
    /// The peer's gate, or its hello, said no.
    #[error("the node at {address} refused: {code}")]
    Refused {
        /// Who refused.
        address: SocketAddr,
        /// Why.
        code: CloseCode,
    },
    /// Nothing came back in time.
    #[error("the node at {address} did not answer before the deadline")]
    Deadline {
        /// Who was silent.
        address: SocketAddr,
    },
    /// The connection broke while it was being set up.
    #[error("connect to {address}")]
    Broken {
        /// To whom.
        address: SocketAddr,
        /// How.
        source: ConnectionError,
    },
    /// The handshake worked; the hello, or a joiner's one call, did not.
    #[error("talk to the node at {address}")]
    Hello {
        /// To whom.
        address: SocketAddr,
        /// What went wrong.
        source: Arc<RpcError>,
    },
    /// The connection could not even be begun.
    #[error("begin to connect to {address}")]
    Begin {
        /// To whom.
        address: SocketAddr,
        /// Why not.
        source: quinn::ConnectError,
    },
    /// TLS could not be set up.
    #[error("prepare TLS for {address}")]
    Tls {
        /// For whom.
        address: SocketAddr,
        /// Why.
        source: TlsError,
    },
}

impl DialError {
    /// The peer's own words, where its handler refused.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Hello { source, .. } => match &**source {
                RpcError::Rejected { reason } => Some(reason),
                _ => None,
            },
            _ => None,
        }
    }

    /// The same as a joiner sees it, to whom a refused key says that nobody may join.
    pub(super) fn of_joiner(self) -> Self {
        match self {
            Self::KeyRefused { address } => Self::JoinClosed { address },
            other => other,
        }
    }
}

/// Sorts what a dialler met by who said no.
pub(super) fn refusal(address: SocketAddr, err: RpcError) -> DialError {
    match err {
        RpcError::Closed { code } => by_code(address, code),
        RpcError::Deadline => DialError::Deadline { address },
        RpcError::Lost { source } => broken(address, source),
        source => DialError::Hello {
            address,
            source: Arc::new(source),
        },
    }
}

/// The same for the one call of a joiner.
pub(super) fn join_refusal(address: SocketAddr, err: RpcError) -> DialError {
    refusal(address, err).of_joiner()
}

/// Sorts what ended a dialler's handshake with the node that should have the key `expected`.
pub(super) fn handshake(address: SocketAddr, expected: NodeKey, err: ConnectionError) -> DialError {
    match err {
        ConnectionError::TransportError(err) if tls::is_key_refusal(err.code) => {
            DialError::WrongKey { address, expected }
        }
        err => refusal(address, err.into()),
    }
}

fn by_code(address: SocketAddr, code: CloseCode) -> DialError {
    match code {
        CloseCode::NotMember | CloseCode::Removed => DialError::KeyRefused { address },
        CloseCode::NoJoinOpen => DialError::JoinClosed { address },
        CloseCode::VersionMismatch | CloseCode::UnknownProtocol => {
            DialError::VersionMismatch { address }
        }
        code => DialError::Refused { address, code },
    }
}

fn broken(address: SocketAddr, source: ConnectionError) -> DialError {
    match source {
        ConnectionError::ConnectionClosed(close) if tls::is_key_refusal(close.error_code) => {
            DialError::KeyRefused { address }
        }
        ConnectionError::ConnectionClosed(close) if tls::is_alpn_refusal(close.error_code) => {
            DialError::VersionMismatch { address }
        }
        source => DialError::Broken { address, source },
    }
}

#[cfg(test)]
mod tests {
    use quinn::{ConnectionClose, TransportErrorCode};

    use super::*;

    fn address() -> SocketAddr {
        ([127, 0, 0, 1], 1).into()
    }

    fn told(code: CloseCode) -> DialError {
        refusal(address(), RpcError::Closed { code })
    }

    fn alert(code: u8) -> DialError {
        let close = ConnectionClose {
            error_code: TransportErrorCode::crypto(code),
            frame_type: None,
            reason: bytes::Bytes::new(),
        };
        handshake(
            address(),
            NodeKey([1; 32]),
            ConnectionError::ConnectionClosed(close),
        )
    }

    #[test]
    fn every_way_to_be_turned_away_has_its_words() {
        let cases = [
            (told(CloseCode::NotMember), "does not know this node"),
            (told(CloseCode::Removed), "does not know this node"),
            (alert(49), "does not know this node"),
            (told(CloseCode::NoJoinOpen), "no join token"),
            (told(CloseCode::VersionMismatch), "another protocol version"),
            (alert(120), "another protocol version"),
            (told(CloseCode::Stopping), "node is stopping"),
        ];
        for (err, words) in cases {
            assert!(err.to_string().contains(words), "{err}");
        }
    }

    #[test]
    fn a_joiner_s_refused_key_means_that_nobody_may_join() {
        let code = CloseCode::NotMember;
        let err = join_refusal(address(), RpcError::Closed { code });
        assert!(matches!(err, DialError::JoinClosed { .. }), "{err}");
        let err = join_refusal(address(), RpcError::rejected("token is used up"));
        assert_eq!(err.refusal(), Some("token is used up"));
    }
}
