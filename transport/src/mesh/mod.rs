//! The assembled transport of one node: two endpoints, the table of peers, every task.
//!
//! Starting binds both sockets. From then on an accept loop per lane lets connections in
//! (handshake > gate > hello > table), and every connection in the table, dialled or accepted, has
//! one task that answers the peer's calls.
//!
//! Stopping is an ordered list: accept nobody and no new call > let calls under way finish, up to
//! the deadline > close every connection by name > wait until the packets saying so are out > join
//! the tasks.

mod dials;
mod error;
mod shared;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::ids::NodeKey;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info_span};

use crate::BoxFuture;
use crate::alpn::Alpn;
use crate::bulk::Pace;
use crate::bulk::pace::Paces;
use crate::close::CloseCode;
use crate::complaints::Complaints;
use crate::datagram::{self, DatagramError};
use crate::endpoint::{self, Lane, Path};
use crate::gate::Membership;
use crate::identity::Identity;
use crate::join::JoinChannel;
use crate::limits::{JOIN_ANSWER_BYTES, Limits};
use crate::peers::{PeerInfo, Peers};
use crate::rpc::{self, Handler, Method, Router, RpcError, Server, Service};
use crate::sim::Faults;
use crate::streams::{BiStream, StreamHandler};
use crate::tls;

use error::join_refusal;
pub use error::{DialError, StartError};
use shared::{Shared, close};

/// How a node's transport is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the control endpoint listens; port 0 lets the system choose.
    pub control: SocketAddr,
    /// Where the bulk endpoint listens.
    pub bulk: SocketAddr,
    /// The bounds.
    pub limits: Limits,
    /// What the path between nodes needs.
    pub path: Path,
    /// How fast this node sends to each peer on the bulk lane.
    pub pace: Pace,
    /// A bad network between this node and the others, for tests.
    pub faults: Option<Faults>,
}

impl Config {
    /// The defaults, listening at the given addresses.
    #[must_use]
    pub fn at(control: SocketAddr, bulk: SocketAddr) -> Self {
        Self {
            control,
            bulk,
            limits: Limits::default(),
            path: Path::default(),
            pace: Pace::default(),
            faults: None,
        }
    }
}

/// One node's transport. Dropping it without [`Transport::stop`] cuts everything off.
pub struct Transport {
    shared: Arc<Shared>,
}

impl Transport {
    /// Binds both endpoints and starts accepting. Must be called within a tokio runtime. Nobody is
    /// let in before [`Transport::set_membership`].
    ///
    /// # Errors
    /// [`StartError::Bind`] and [`StartError::Tls`]; nothing is left running.
    pub fn start(identity: &Identity, config: Config) -> Result<Self, StartError> {
        let peers = Arc::new(Peers::new(identity.key()));
        let bind = |lane: Lane, address| {
            let crypto = tls::server_config(identity, Arc::clone(&peers), lane.alpns())
                .map_err(|source| StartError::Tls { source })?;
            endpoint::bind(lane, address, crypto, config.path, config.faults.clone()).map_err(
                |source| StartError::Bind {
                    lane,
                    address,
                    source,
                },
            )
        };
        let server = Server {
            own: identity.key(),
            router: Arc::new(Router::default()),
            complaints: Arc::new(Complaints::default()),
            paces: Arc::new(Paces::new(config.pace, &peers)),
            limits: config.limits,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        let control = bind(Lane::Control, config.control)?;
        let bulk = bind(Lane::Bulk, config.bulk)?;
        let shared = Shared::new(
            identity.clone(),
            peers,
            server,
            config.path,
            [control, bulk],
        );
        for lane in [Lane::Control, Lane::Bulk] {
            let accept = Arc::clone(&shared).accept(lane);
            let span = info_span!("transport-accept", ?lane);
            shared.server.tasks.spawn(accept.instrument(span));
        }
        Ok(Self { shared })
    }

    /// Replaces the member list, as of one entry of the log, and closes what nodes that are no
    /// longer on it still have. Returns false, and does nothing, for a list older than the present.
    pub fn set_membership(&self, membership: Membership) -> bool {
        self.shared.peers.set_membership(membership)
    }

    /// Lets `voucher` answer for keys that this node's own list lacks, which may be behind: an unknown
    /// key that asks for the mesh is held without a stream until it has answered, and let in on
    /// true. It should say so only on the word of a member whose list is newer than this node's.
    ///
    /// Keys that a list of this node had and a later one has not are refused without asking.
    pub fn set_voucher(
        &self,
        voucher: impl Fn(NodeKey) -> BoxFuture<'static, bool> + Send + Sync + 'static,
    ) {
        self.shared.peers.set_voucher(Arc::new(voucher));
    }

    /// Lets `handler` answer calls to `service` on the control lane from now on.
    pub fn register(&self, service: Service, handler: impl Handler) {
        self.shared.server.router.register(service, handler);
    }

    /// Lets `handler` take the byte streams of `service` that peers open on `lane` from now on.
    pub fn register_streams(&self, service: Service, lane: Lane, handler: impl StreamHandler) {
        let router = &self.shared.server.router;
        router.register_streams(service, lane, handler);
    }

    /// Hands every datagram that a member sends to `listener` from now on. It runs on the
    /// connection's task: what takes long, or waits, belongs elsewhere.
    pub fn on_datagram(&self, listener: impl Fn(NodeKey, Bytes) + Send + Sync + 'static) {
        self.shared.datagrams.listen(listener);
    }

    /// Makes sure there is a live, proven connection to the member `key`, dialling `address` if
    /// there is none. Callers that ask for the same at the same time share one dial, and one that
    /// asks within [`Limits::redial`] of a failure is told of that failure at once.
    ///
    /// # Errors
    /// All of [`DialError`]. None of them leaves a connection behind.
    pub async fn connect(
        &self,
        lane: Lane,
        address: SocketAddr,
        key: NodeKey,
        deadline: Instant,
    ) -> Result<(), DialError> {
        if self.shared.peers.newest(key, lane).is_some() {
            return Ok(());
        }
        if !self.shared.peers.membership().members.contains(&key) {
            return Err(DialError::NotMember { key });
        }
        let rest = self.shared.server.limits.redial;
        let dials = &self.shared.dials;
        let turn = dials.turn((key, lane, address), rest, deadline).await?;
        if self.is_connected(lane, key) {
            return Ok(());
        }
        if let Some(err) = turn.recent_failure(rest) {
            return Err(err);
        }
        let outcome = Arc::clone(&self.shared)
            .dial_mesh(lane, address, key, deadline)
            .await;
        turn.done(&outcome, rest);
        outcome
    }

    /// Calls `method` of the connected node `peer` on the control lane.
    ///
    /// `deadline` bounds everything and is cut to [`crate::limits::MAX_CALL`]; a retry is the
    /// caller's business, see [`RpcError::may_have_acted`]. Dropping the future gives the call up.
    ///
    /// # Errors
    /// All of [`RpcError`].
    pub async fn call(
        &self,
        peer: NodeKey,
        method: Method,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, RpcError> {
        self.call_on(Lane::Control, peer, method, body, deadline)
            .await
    }

    /// Opens a byte stream of `service` to the connected node `peer`, telling it in `header` what it
    /// is for. Resolves when the peer has accepted; see [`BiStream`] for how it ends.
    ///
    /// `deadline` bounds the opening, not the stream.
    ///
    /// # Errors
    /// [`RpcError::Rejected`] and [`RpcError::Busy`]: the peer's handler said no.
    /// [`RpcError::NotServed`]: nobody takes such streams there. The others as for a call.
    pub async fn open_stream(
        &self,
        lane: Lane,
        peer: NodeKey,
        service: Service,
        header: Bytes,
        deadline: Instant,
    ) -> Result<BiStream, RpcError> {
        let connection = self.shared.peers.newest(peer, lane);
        let connection = connection.ok_or(RpcError::NotConnected { peer })?;
        let pacer = self.shared.server.paces.of(lane, peer);
        let stall = self.shared.server.limits.stream_stall;
        rpc::open(&connection, service, header, deadline, pacer, stall).await
    }

    /// Sends `bytes` to the connected node `peer` on the control lane, without any promise that
    /// they arrive. About 1,100 bytes always fit.
    ///
    /// # Errors
    /// [`DatagramError::NotConnected`] and [`DatagramError::TooLarge`].
    pub fn send_datagram(&self, peer: NodeKey, bytes: Bytes) -> Result<(), DatagramError> {
        let connection = self.shared.peers.newest(peer, Lane::Control);
        let connection = connection.ok_or(DatagramError::NotConnected { peer })?;
        datagram::send(&connection, peer, bytes)
    }

    /// Closes every connection to `peer` on both lanes and tells it why. It may dial again.
    pub fn disconnect(&self, peer: NodeKey, code: CloseCode) {
        self.shared.peers.disconnect(peer, code);
    }

    /// Whether there is a live, proven connection to `peer` on `lane`.
    #[must_use]
    pub fn is_connected(&self, lane: Lane, peer: NodeKey) -> bool {
        self.shared.peers.newest(peer, lane).is_some()
    }

    /// The round trip of an empty call to the connected node `peer`.
    ///
    /// # Errors
    /// All of [`RpcError`].
    pub async fn ping(
        &self,
        lane: Lane,
        peer: NodeKey,
        deadline: Instant,
    ) -> Result<Duration, RpcError> {
        let begun = Instant::now();
        self.call_on(lane, peer, Method::PING, Bytes::new(), deadline)
            .await?;
        Ok(begun.elapsed())
    }

    /// Makes the one call that a node which is not a member has, to the node with the key `key`.
    /// `make` builds its message once the connection stands, so that it can be tied to it.
    ///
    /// # Errors
    /// All of [`DialError`]; what the call itself met is in [`DialError::Hello`].
    pub async fn call_join(
        &self,
        address: SocketAddr,
        key: NodeKey,
        method: Method,
        make: impl FnOnce(&JoinChannel) -> Bytes,
        deadline: Instant,
    ) -> Result<Bytes, DialError> {
        let dialled = self
            .shared
            .dial(Lane::Control, address, key, Alpn::Join, deadline)
            .await;
        let connection = dialled.map_err(DialError::of_joiner)?;
        let Some(channel) = JoinChannel::of(&connection, self.key(), key) else {
            // It has closed already; the call below says why.
            let source = connection.closed().await;
            return Err(join_refusal(address, source.into()));
        };
        let body = make(&channel);
        let outcome = rpc::call(&connection, method, body, deadline, JOIN_ANSWER_BYTES).await;
        close(&connection, CloseCode::JoinDone);
        outcome.map_err(|err| join_refusal(address, err))
    }

    /// Stops in order: no new calls, calls under way until `deadline`, goodbye, join.
    pub async fn stop(&self, deadline: Instant) {
        let Server { tasks, stop, .. } = &self.shared.server;
        for endpoint in self.shared.endpoints() {
            endpoint.set_server_config(None);
        }
        stop.cancel();
        tasks.close();
        // Past the deadline the goodbye cuts them off.
        let _late = timeout_at(deadline, tasks.wait()).await;
        self.shared.cut_off();
        for endpoint in self.shared.endpoints() {
            let _late = timeout_at(deadline, endpoint.wait_idle()).await;
        }
        tasks.wait().await;
    }

    /// This node's key.
    #[must_use]
    pub fn key(&self) -> NodeKey {
        self.shared.identity.key()
    }

    /// The present member list.
    #[must_use]
    pub fn membership(&self) -> Arc<Membership> {
        self.shared.peers.membership()
    }

    /// All live, proven connections.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerInfo> {
        self.shared.peers.list()
    }

    /// Where an endpoint really listens.
    ///
    /// # Errors
    /// The system cannot tell.
    pub fn local_addr(&self, lane: Lane) -> io::Result<SocketAddr> {
        self.shared.endpoint(lane).local_addr()
    }

    /// How many tasks of its own are running.
    #[cfg(test)]
    pub(crate) fn tasks(&self) -> usize {
        self.shared.server.tasks.len()
    }

    #[cfg(test)]
    pub(crate) fn connection(&self, lane: Lane, peer: NodeKey) -> Option<quinn::Connection> {
        self.shared.peers.newest(peer, lane)
    }

    async fn call_on(
        &self,
        lane: Lane,
        peer: NodeKey,
        method: Method,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, RpcError> {
        let connection = self.shared.peers.newest(peer, lane);
        let connection = connection.ok_or(RpcError::NotConnected { peer })?;
        let frame_bytes = self.shared.server.limits.frame_bytes;
        rpc::call(&connection, method, body, deadline, frame_bytes).await
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.shared.server.stop.cancel();
        self.shared.cut_off();
    }
}
