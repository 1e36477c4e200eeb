//! Sockets and QUIC endpoints: one of each per lane.
//!
//! Two endpoints because a second socket with a task of its own kept the heartbeat's median at
//! 0.21 ms under full bulk load, against 0.65 ms on one connection; priorities alone did not help.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::congestion::{ControllerFactory, CubicConfig};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, Endpoint, EndpointConfig, IdleTimeout, Runtime, ServerConfig, TokioRuntime,
    TransportConfig,
};
use tracing::warn;

use crate::alpn::Alpn;
use crate::bulk;
use crate::congestion::PatientConfig;
use crate::limits::{
    BULK_STREAMS, BULK_WINDOW_BYTES, CONTROL_IDLE, CONTROL_KEEP_ALIVE, CONTROL_STREAM_WINDOW_BYTES,
    CONTROL_STREAMS, CONTROL_WINDOW_BYTES, DATAGRAM_BUFFER_BYTES, INCOMING_BUFFER_BYTES,
    INCOMING_BUFFER_TOTAL_BYTES, MAX_INCOMING, SOCKET_BUFFER_BYTES, UNPROVEN_STREAMS,
    UNPROVEN_WINDOW_BYTES,
};
use crate::sim::{self, Faults};

/// Which of a node's two endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Calls, raft and datagrams: small and urgent.
    Control,
    /// Relayed guest connections, chunks, images and raft snapshots: large and patient.
    Bulk,
}

impl Lane {
    /// The protocols served on this lane.
    #[must_use]
    pub const fn alpns(self) -> &'static [Alpn] {
        match self {
            Self::Control => &[Alpn::Mesh, Alpn::Join],
            Self::Bulk => &[Alpn::Mesh],
        }
    }
}

/// Which end of a connection a transport configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The one that dials; it also keeps the connection alive.
    Dialler,
    /// The one that accepts.
    Acceptor,
}

/// What the path between nodes needs; the defaults suit a plain Ethernet.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// Whether the kernel may cut large sends into packets. Worth a factor of three; some network
    /// cards and VPNs break it.
    pub segmentation_offload: bool,
    /// Size of the first packets, where it is known that larger ones pass. Kept between 1,200 and
    /// [`MAX_MTU`].
    pub initial_mtu: u16,
}

/// Largest useful packet: ten of them must fit into one 64 KB send, or it stalls for ever.
pub const MAX_MTU: u16 = 6000;
/// Smallest packet every QUIC path must carry.
const MIN_MTU: u16 = 1200;

impl Default for Path {
    fn default() -> Self {
        Self {
            segmentation_offload: true,
            initial_mtu: MIN_MTU,
        }
    }
}

/// Binds the socket of `lane` and starts its endpoint.
pub(crate) fn bind(
    lane: Lane,
    address: SocketAddr,
    crypto: QuicServerConfig,
    path: Path,
    faults: Option<Faults>,
) -> io::Result<Endpoint> {
    let socket = UdpSocket::bind(address)?;
    widen_buffers(&socket, lane)?;
    let mut server = ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(transport_config(lane, End::Acceptor, path))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL_BYTES);
    let socket = TokioRuntime.wrap_udp_socket(socket)?;
    let socket = match faults {
        Some(faults) => sim::wrap(socket, faults),
        None => socket,
    };
    let (mut config, runtime) = (EndpointConfig::default(), Arc::new(TokioRuntime));
    if lane == Lane::Bulk {
        // Where larger packets pass (jumbo frames, loopback), the bulk lane finds out and uses them.
        let taken = config.max_udp_payload_size(MAX_MTU);
        taken.map_err(io::Error::other)?;
    }
    Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)
}

/// The QUIC parameters of one end of a connection on `lane`.
pub(crate) fn transport_config(lane: Lane, end: End, path: Path) -> Arc<TransportConfig> {
    let (mut config, congestion): (_, Arc<dyn ControllerFactory + Send + Sync>) = match lane {
        Lane::Control => (control_config(end), Arc::new(CubicConfig::default())),
        Lane::Bulk => (
            bulk::transport_config(end),
            Arc::new(PatientConfig::default()),
        ),
    };
    config
        .max_concurrent_uni_streams(0_u32.into())
        .send_fairness(true)
        .initial_mtu(path.initial_mtu.clamp(MIN_MTU, MAX_MTU))
        .enable_segmentation_offload(path.segmentation_offload)
        .congestion_controller_factory(congestion);
    if end == End::Acceptor {
        config
            .max_concurrent_bidi_streams(UNPROVEN_STREAMS.into())
            .receive_window(UNPROVEN_WINDOW_BYTES.into());
    }
    Arc::new(config)
}

/// Gives an accepted connection what a member may have, once it has proven to be one's.
pub(crate) fn widen(lane: Lane, connection: &Connection) {
    let (streams, window_bytes) = match lane {
        Lane::Control => (CONTROL_STREAMS, CONTROL_WINDOW_BYTES),
        Lane::Bulk => (BULK_STREAMS, BULK_WINDOW_BYTES),
    };
    connection.set_receive_window(window_bytes.into());
    connection.set_max_concurrent_bi_streams(streams.into());
}

fn control_config(end: End) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(IdleTimeout::try_from(CONTROL_IDLE).ok())
        .keep_alive_interval((end == End::Dialler).then_some(CONTROL_KEEP_ALIVE))
        .max_concurrent_bidi_streams(CONTROL_STREAMS.into())
        .stream_receive_window(CONTROL_STREAM_WINDOW_BYTES.into())
        .receive_window(CONTROL_WINDOW_BYTES.into())
        .send_window(CONTROL_WINDOW_BYTES.into())
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES);
    config
}

/// Asks for [`SOCKET_BUFFER_BYTES`] each way: past the system's cap if we may, up to it if not.
fn widen_buffers(socket: &UdpSocket, lane: Lane) -> io::Result<()> {
    let want = SOCKET_BUFFER_BYTES;
    if setsockopt(socket, sockopt::RcvBufForce, &want).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &want)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &want).is_err() {
        setsockopt(socket, sockopt::SndBuf, &want)?;
    }
    // The kernel reports twice what it grants, for its own book-keeping.
    let granted_bytes =
        getsockopt(socket, sockopt::RcvBuf)?.min(getsockopt(socket, sockopt::SndBuf)?) / 2;
    if granted_bytes < want {
        warn!(
            ?lane,
            granted_bytes,
            want,
            "socket buffers are small, expect lost packets: raise net.core.rmem_max and wmem_max"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_gets_its_buffers_when_the_node_is_privileged() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        widen_buffers(&socket, Lane::Control).expect("buffers can be asked for");
        if nix::unistd::geteuid().is_root() {
            let granted = getsockopt(&socket, sockopt::RcvBuf).expect("readable") / 2;
            assert!(granted >= SOCKET_BUFFER_BYTES, "{granted}");
        }
    }
}
