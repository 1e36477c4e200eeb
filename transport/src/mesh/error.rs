//! Why a transport did not start and why a peer was not reached.

use std::io;
use std::net::SocketAddr;

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
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// This node's own member list lacks the key.
    #[error("node {key} is not on the member list")]
    NotMember {
        /// Who was to be reached.
        key: NodeKey,
    },
    /// Somebody else answered at this address.
    #[error("the node at {address} does not have the key {expected}")]
    WrongKey {
        /// Who answered.
        address: SocketAddr,
        /// Whom we wanted.
        expected: NodeKey,
    },
    /// The peer does not know this node's key.
    #[error("the node at {address} does not accept this node's key")]
    KeyRefused {
        /// Who refused.
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
    /// The handshake worked and the hello did not.
    #[error("say hello to {address}")]
    Hello {
        /// To whom.
        address: SocketAddr,
        /// What went wrong.
        source: RpcError,
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

/// Sorts what a dialler met by who said no.
pub(super) fn refusal(address: SocketAddr, err: RpcError) -> DialError {
    match err {
        RpcError::Closed { code } => DialError::Refused { address, code },
        RpcError::Deadline => DialError::Deadline { address },
        RpcError::Lost { source } => match source {
            ConnectionError::ConnectionClosed(close) if tls::is_key_refusal(close.error_code) => {
                DialError::KeyRefused { address }
            }
            source => DialError::Broken { address, source },
        },
        source => DialError::Hello { address, source },
    }
}
