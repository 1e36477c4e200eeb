//! Tests of the whole crate over real sockets on loopback.
//!
//! Nothing here sleeps: every wait is for an event, with [`deadline`] behind it. Limits that a
//! test has to run into are made short for the node that enforces them.

mod datagrams;
mod hostile;
mod joining;
mod lifecycle;
mod members;
mod network;
mod streams;
mod vouching;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::ids::NodeKey;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint};
use tokio::time::{Instant, timeout};

use crate::alpn::Alpn;
use crate::endpoint::{End, Path, transport_config};
use crate::rpc::hello::{self, Own};
use crate::{
    Call, CloseCode, Config, Handler, Identity, Lane, Limits, Membership, Method, RpcError,
    Service, Transport, tls,
};

/// Far longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A service for tests.
const SERVICE: Service = Service(900);
const ECHO: Method = SERVICE.method(1);

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits for `event`, and fails the test if it does not come.
async fn soon<T>(event: impl Future<Output = T>) -> T {
    timeout(PATIENCE, event).await.expect("happens in time")
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

fn start(identity: &Identity, limits: Limits) -> Transport {
    let config = Config {
        limits,
        ..Config::at(loopback(), loopback())
    };
    Transport::start(identity, config).expect("starts")
}

fn identity() -> Identity {
    Identity::ephemeral().expect("randomness")
}

fn members(index: u64, keys: &[NodeKey]) -> Membership {
    Membership {
        index,
        members: keys.iter().copied().collect::<HashSet<_>>(),
        join_open: false,
    }
}

fn address(node: &Transport, lane: Lane) -> SocketAddr {
    node.local_addr(lane).expect("bound")
}

/// Two members that know each other and are not connected.
fn two(limits: Limits) -> (Transport, Transport) {
    let (a, b) = (start(&identity(), limits), start(&identity(), limits));
    for node in [&a, &b] {
        node.set_membership(members(1, &[a.key(), b.key()]));
    }
    (a, b)
}

/// Connects `from` to `to` on the control lane.
async fn connect(from: &Transport, to: &Transport) {
    let lane = Lane::Control;
    from.connect(lane, address(to, lane), to.key(), deadline())
        .await
        .expect("members connect");
}

async fn stop(nodes: impl IntoIterator<Item = Transport>) {
    for node in nodes {
        soon(node.stop(deadline())).await;
    }
}

/// Why the other end closed a connection.
async fn close_code(connection: &Connection) -> CloseCode {
    match soon(connection.closed()).await {
        ConnectionError::ApplicationClosed(close) => close.error_code.into(),
        other => panic!("not closed by name: {other}"),
    }
}

/// Sends each call's body back.
struct Echo;

impl Handler for Echo {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        Ok(call.body)
    }
}

/// A node with a token outstanding, whose join service echoes.
fn open_to_joiners() -> Transport {
    let node = start(&identity(), Limits::default());
    node.register(Service::JOIN, Echo);
    node.register(SERVICE, Echo);
    node.set_membership(Membership {
        join_open: true,
        ..members(1, &[node.key()])
    });
    node
}

/// A peer with a proper key and no manners: it opens streams by hand.
struct Rough {
    connection: Connection,
    _endpoint: Endpoint,
}

impl Rough {
    /// Gets through the handshake with `node`, and no further.
    async fn handshake(identity: &Identity, node: &Transport, lane: Lane, alpn: Alpn) -> Self {
        let config = tls::raw_client_config(identity, node.key(), alpn).expect("TLS");
        Self::with_tls(config, node, lane)
            .await
            .expect("shakes hands")
    }

    /// The same with TLS of its own making.
    async fn with_tls(
        config: rustls::ClientConfig,
        node: &Transport,
        lane: Lane,
    ) -> Result<Self, ConnectionError> {
        let crypto = QuicClientConfig::try_from(config).expect("QUIC");
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport_config(lane, End::Dialler, Path::default()));
        let endpoint = Endpoint::client(loopback()).expect("a socket");
        let connecting = endpoint.connect_with(config, address(node, lane), "x");
        Ok(Self {
            connection: soon(connecting.expect("begins")).await?,
            _endpoint: endpoint,
        })
    }

    /// A member of `node`'s cluster that has said hello.
    async fn member(node: &Transport) -> Self {
        Self::member_on(node, Lane::Control).await
    }

    /// The same on `lane`.
    async fn member_on(node: &Transport, lane: Lane) -> Self {
        let identity = identity();
        node.set_membership(members(2, &[node.key(), identity.key()]));
        let peer = Self::handshake(&identity, node, lane, Alpn::Mesh).await;
        peer.hello().await.expect("is a member");
        peer
    }

    async fn hello(&self) -> Result<hello::Settled, RpcError> {
        let own = Own {
            product: "rough".into(),
            membership_index: 0,
            run: 7,
        };
        hello::say(&self.connection, own, deadline(), &Limits::default()).await
    }

    /// Sends `bytes` on a stream of its own, ends it if `fin`, and tells how the node reacts.
    async fn send(&self, bytes: &[u8], fin: bool) -> CloseCode {
        let (mut send, mut recv) = soon(self.connection.open_bi()).await.expect("opens");
        // The node may refuse before it has read all; the answer tells.
        let _refused = soon(send.write_all(bytes)).await;
        if fin {
            let _ended = send.finish();
        }
        match soon(recv.read_to_end(1 << 20)).await {
            Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(code))) => code.into(),
            other => panic!("the stream was not reset: {other:?}"),
        }
    }

    /// Whether the node still answers on this connection.
    async fn is_answered(&self) -> bool {
        let body = Bytes::from_static(b"still there?");
        let max = Limits::default().frame_bytes;
        let answer = crate::rpc::call(
            &self.connection,
            Method::PING,
            body.clone(),
            deadline(),
            max,
        );
        answer.await.is_ok_and(|back| back == body)
    }
}
