//! Datagrams on the control lane: load and liveness, best effort.
//!
//! Only from members, and only what nobody misses: they are dropped by the network, by a full
//! buffer ([`crate::limits::DATAGRAM_BUFFER_BYTES`], the oldest first) and past
//! [`crate::limits::DATAGRAM_RATE`].

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use proto::ids::NodeKey;
use quinn::{Connection, SendDatagramError};
use tokio::time::Instant;

use crate::bucket::Bucket;
use crate::close::CloseCode;
use crate::complaints::{Complaints, Subject};
use crate::limits::{DATAGRAM_BURST, DATAGRAM_RATE};

/// Why a datagram was not sent.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatagramError {
    /// There is no live connection to the peer.
    #[error("not connected to node {peer}")]
    NotConnected {
        /// Who was to hear it.
        peer: NodeKey,
    },
    /// It does not fit into one packet on the way to this peer.
    #[error("datagram of {bytes} bytes exceeds the {max} that fit into a packet")]
    TooLarge {
        /// How many it has.
        bytes: usize,
        /// How many would fit now.
        max: usize,
    },
}

type Listener = Arc<dyn Fn(NodeKey, Bytes) + Send + Sync>;

/// Who hears the datagrams of this node's peers.
#[derive(Default)]
pub(crate) struct Datagrams {
    listener: RwLock<Option<Listener>>,
}

impl Datagrams {
    /// Hands every datagram to `listener` from now on.
    pub(crate) fn listen(&self, listener: impl Fn(NodeKey, Bytes) + Send + Sync + 'static) {
        *self
            .listener
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(listener));
    }

    /// Hands on what `peer` sends until the connection ends.
    pub(crate) async fn hear(
        &self,
        peer: NodeKey,
        connection: &Connection,
        complaints: &Complaints,
    ) {
        let mut allowance = Bucket::new(DATAGRAM_RATE, DATAGRAM_BURST, Instant::now());
        while let Ok(bytes) = connection.read_datagram().await {
            if allowance.take(1, Instant::now()) == 0 {
                complaints.about(Subject::Peer(peer), CloseCode::Flood);
                continue;
            }
            let listener = self
                .listener
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(listener) = listener {
                listener(peer, bytes);
            }
        }
    }
}

/// Sends `bytes` to `peer`, or to nobody.
pub(crate) fn send(
    connection: &Connection,
    peer: NodeKey,
    bytes: Bytes,
) -> Result<(), DatagramError> {
    let length = bytes.len();
    connection.send_datagram(bytes).map_err(|err| match err {
        SendDatagramError::TooLarge => DatagramError::TooLarge {
            bytes: length,
            max: connection.max_datagram_size().unwrap_or(0),
        },
        SendDatagramError::ConnectionLost(_)
        | SendDatagramError::UnsupportedByPeer
        | SendDatagramError::Disabled => DatagramError::NotConnected { peer },
    })
}
