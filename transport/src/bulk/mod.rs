//! The bulk lane: large things between members.
//!
//! A bulk connection goes through the same handshake, gate and hello as a control connection, and
//! then serves byte streams ([`crate::streams`]) and a ping, but no calls. [`pace`] bounds what this node
//! sends to each peer.

pub(crate) mod pace;

pub use pace::Pace;

use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig};

use crate::endpoint::{End, MAX_MTU};
use crate::limits::{
    BULK_ACK_DELAY, BULK_ACK_EVERY, BULK_IDLE, BULK_KEEP_ALIVE, BULK_SEND_WINDOW_BYTES,
    BULK_STREAM_WINDOW_BYTES, BULK_STREAMS, BULK_WINDOW_BYTES,
};

/// The QUIC parameters that are the lane's own.
pub(crate) fn transport_config(end: End) -> TransportConfig {
    let mut config = TransportConfig::default();
    let (mut mtu, mut acks) = (MtuDiscoveryConfig::default(), AckFrequencyConfig::default());
    mtu.upper_bound(MAX_MTU);
    acks.ack_eliciting_threshold(BULK_ACK_EVERY.into())
        .max_ack_delay(Some(BULK_ACK_DELAY));
    config
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .max_idle_timeout(IdleTimeout::try_from(BULK_IDLE).ok())
        .keep_alive_interval((end == End::Dialler).then_some(BULK_KEEP_ALIVE))
        .max_concurrent_bidi_streams(BULK_STREAMS.into())
        .stream_receive_window(BULK_STREAM_WINDOW_BYTES.into())
        .receive_window(BULK_WINDOW_BYTES.into())
        .send_window(BULK_SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None);
    config
}
