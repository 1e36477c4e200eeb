//! The bulk lane: large things between members.
//!
//! A bulk connection goes through the same handshake, gate and hello as a control connection, and
//! then serves byte streams ([`crate::streams`]) and a ping, but no calls. [`pace`] bounds what this node
//! sends to each peer.

pub(crate) mod pace;

pub use pace::Pace;

use quinn::{IdleTimeout, TransportConfig};

use crate::limits::{
    BULK_IDLE, BULK_SEND_WINDOW_BYTES, BULK_STREAM_WINDOW_BYTES, BULK_STREAMS, BULK_WINDOW_BYTES,
};

/// The QUIC parameters that are the lane's own. Nobody keeps an unused bulk connection alive.
pub(crate) fn transport_config() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(IdleTimeout::try_from(BULK_IDLE).ok())
        .max_concurrent_bidi_streams(BULK_STREAMS.into())
        .stream_receive_window(BULK_STREAM_WINDOW_BYTES.into())
        .receive_window(BULK_WINDOW_BYTES.into())
        .send_window(BULK_SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None);
    config
}
