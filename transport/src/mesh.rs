//! The assembled transport of one node: two endpoints, the table of peers, every task.
//!
//! Starting binds both sockets. From then on an accept loop per lane lets connections in
//! (handshake > gate > hello > table), and every connection in the table, dialled or accepted, has
//! one task that answers the peer's calls.
//!
//! Stopping is an ordered list: accept nobody and no new call > let calls under way finish, up to
//! the deadline > close every connection by name > wait until the packets saying so are out > join
//! the tasks.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::ids::NodeKey;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, info, info_span};

use crate::alpn::Alpn;
use crate::close::CloseCode;
use crate::endpoint::{self, End, Lane, Path};
use crate::gate::{Arrival, Membership, Verdict};
use crate::identity::Identity;
use crate::limits::{Limits, MAX_HANDSHAKES};
use crate::peers::{PeerInfo, Peers};
use crate::rpc::hello::{self, Own, Settled};
use crate::rpc::{self, Handler, Method, Router, RpcError, Server, Service};
use crate::tls::{self, TlsError};

/// What a dialler puts where QUIC wants a server's name; it is neither sent nor looked at.
const SERVER_NAME: &str = "wrenn";

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
        }
    }
}

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

/// One node's transport. Dropping it without [`Transport::stop`] cuts everything off.
pub struct Transport {
    shared: Arc<Shared>,
}

/// What the tasks share.
struct Shared {
    identity: Identity,
    peers: Arc<Peers>,
    server: Server,
    path: Path,
    control: Endpoint,
    bulk: Endpoint,
    handshakes: Arc<Semaphore>,
    unproven: Mutex<HashMap<IpAddr, usize>>,
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
            endpoint::bind(lane, address, crypto, config.path).map_err(|source| StartError::Bind {
                lane,
                address,
                source,
            })
        };
        let shared = Arc::new(Shared {
            control: bind(Lane::Control, config.control)?,
            bulk: bind(Lane::Bulk, config.bulk)?,
            identity: identity.clone(),
            server: Server {
                router: Arc::new(Router::default()),
                limits: config.limits,
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
            },
            path: config.path,
            handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
            unproven: Mutex::default(),
            peers,
        });
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

    /// Lets `handler` answer calls to `service` on the control lane from now on.
    pub fn register(&self, service: Service, handler: impl Handler) {
        self.shared.server.router.register(service, handler);
    }

    /// Makes sure there is a live, proven connection to the member `key`, dialling `address` if
    /// there is none.
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
        let dial = Arc::clone(&self.shared).dial_mesh(lane, address, key, deadline);
        timeout_at(deadline, dial)
            .await
            .unwrap_or(Err(DialError::Deadline { address }))
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
    ///
    /// # Errors
    /// All of [`DialError`]; what the call itself met is in [`DialError::Hello`].
    pub async fn call_join(
        &self,
        address: SocketAddr,
        key: NodeKey,
        method: Method,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, DialError> {
        let one_call = async {
            let connection = self
                .shared
                .dial(Lane::Control, address, key, Alpn::Join)
                .await?;
            let frame_bytes = crate::limits::JOIN_FRAME_BYTES;
            let outcome = rpc::call(&connection, method, body, deadline, frame_bytes).await;
            close(&connection, CloseCode::JoinDone);
            outcome.map_err(|err| refusal(address, err))
        };
        timeout_at(deadline, one_call)
            .await
            .unwrap_or(Err(DialError::Deadline { address }))
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

impl Shared {
    /// Lets connections in until the node stops.
    async fn accept(self: Arc<Self>, lane: Lane) {
        let stop = self.server.stop.clone();
        let endpoint = self.endpoint(lane).clone();
        while let Some(Some(incoming)) = stop.run_until_cancelled(endpoint.accept()).await {
            // An address that was not seen to answer gets a token and nothing else.
            if !incoming.remote_address_validated() && incoming.may_retry() {
                let _gone = incoming.retry();
                continue;
            }
            let Ok(slot) = Arc::clone(&self.handshakes).try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            let span = info_span!("transport-peer", address = %incoming.remote_address());
            let arrive = Arc::clone(&self).arrive(lane, incoming, slot);
            self.server.tasks.spawn(arrive.instrument(span));
        }
    }

    /// One accepted connection, from its first packet to its end.
    async fn arrive(self: Arc<Self>, lane: Lane, incoming: Incoming, slot: OwnedSemaphorePermit) {
        let unproven = Unproven::count(Arc::clone(&self), incoming.remote_address().ip());
        let limits = self.server.limits;
        let begun = Instant::now();
        let handshake = async { incoming.accept()?.await };
        let connection = match timeout(limits.handshake, handshake).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(err)) => return debug!(%err, "handshake failed"),
            Err(_) => return debug!("handshake took too long"),
        };
        let Some(key) = tls::peer_key(&connection) else {
            return close(&connection, CloseCode::NotMember);
        };
        let verdict = self.peers.decide(Arrival {
            lane,
            alpn: tls::peer_alpn(&connection),
            key,
            unproven: unproven.seen,
        });
        let stop = self.server.stop.clone();
        match verdict {
            Verdict::Close(code) => {
                info!(peer = %key, %code, "refusing a connection");
                close(&connection, code);
            }
            Verdict::Join => {
                drop(slot);
                let join = rpc::serve_join(&self.server, key, &connection);
                if stop.run_until_cancelled(join).await.is_none() {
                    close(&connection, CloseCode::Stopping);
                }
            }
            Verdict::Mesh => {
                let welcome = self.welcome(lane, key, &connection);
                match timeout_at(begun + limits.handshake, welcome).await {
                    Ok(Ok(())) => {
                        drop((slot, unproven));
                        self.serve(lane, key, &connection).await;
                    }
                    Ok(Err(code)) => close(&connection, code),
                    Err(_) => close(&connection, CloseCode::HelloExpected),
                }
            }
        }
    }

    /// Hears the hello, enters the connection in the table, then answers: once the dialler knows
    /// that it is in, this node can call it.
    async fn welcome(
        &self,
        lane: Lane,
        key: NodeKey,
        connection: &Connection,
    ) -> Result<(), CloseCode> {
        let heard = hello::hear(connection, &self.server.limits).await?;
        self.admit(lane, key, connection, heard.settled.clone(), false)?;
        let answered = heard.answer(self.own(), &self.server.limits).await;
        answered.inspect_err(|_| self.peers.forget(key, lane, connection))
    }

    /// Answers a peer's calls until the connection ends, then forgets it.
    async fn serve(&self, lane: Lane, key: NodeKey, connection: &Connection) {
        match lane {
            Lane::Control => rpc::serve(&self.server, key, connection).await,
            Lane::Bulk => {
                let bare = Server {
                    router: Arc::new(Router::default()),
                    ..self.server.clone()
                };
                rpc::serve(&bare, key, connection).await;
            }
        }
        self.peers.forget(key, lane, connection);
    }

    /// Dials a member and proves it.
    async fn dial_mesh(
        self: Arc<Self>,
        lane: Lane,
        address: SocketAddr,
        key: NodeKey,
        deadline: Instant,
    ) -> Result<(), DialError> {
        let connection = self.dial(lane, address, key, Alpn::Mesh).await?;
        let limits = self.server.limits;
        let settled = match hello::say(&connection, self.own(), deadline, &limits).await {
            Ok(settled) => settled,
            Err(err) => {
                close(&connection, CloseCode::Cancelled);
                return Err(refusal(address, err));
            }
        };
        if let Err(code) = self.admit(lane, key, &connection, settled, true) {
            close(&connection, code);
            return Err(DialError::NotMember { key });
        }
        let shared = Arc::clone(&self);
        let span = info_span!("transport-peer", %address);
        let serve = async move { shared.serve(lane, key, &connection).await };
        self.server.tasks.spawn(serve.instrument(span));
        Ok(())
    }

    /// The handshake of a dialled connection, with exactly `key` at the other end.
    async fn dial(
        &self,
        lane: Lane,
        address: SocketAddr,
        key: NodeKey,
        alpn: Alpn,
    ) -> Result<Connection, DialError> {
        let crypto = tls::client_config(&self.identity, key, alpn)
            .map_err(|source| DialError::Tls { address, source })?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(endpoint::transport_config(lane, End::Dialler, self.path));
        let connecting = self
            .endpoint(lane)
            .connect_with(config, address, SERVER_NAME)
            .map_err(|source| DialError::Begin { address, source })?;
        connecting.await.map_err(|err| match err {
            ConnectionError::TransportError(err) if tls::is_key_refusal(err.code) => {
                DialError::WrongKey {
                    address,
                    expected: key,
                }
            }
            err => refusal(address, err.into()),
        })
    }

    fn admit(
        &self,
        lane: Lane,
        key: NodeKey,
        connection: &Connection,
        settled: Settled,
        dialled: bool,
    ) -> Result<(), CloseCode> {
        let info = PeerInfo {
            key,
            lane,
            address: connection.remote_address(),
            dialled,
            protocol: settled.protocol,
            product: settled.product,
            membership_index: settled.membership_index,
        };
        self.peers.admit(info, connection.clone())
    }

    fn own(&self) -> Own {
        Own {
            product: proto::version::PRODUCT.to_owned(),
            membership_index: self.peers.membership().index,
        }
    }

    fn endpoint(&self, lane: Lane) -> &Endpoint {
        match lane {
            Lane::Control => &self.control,
            Lane::Bulk => &self.bulk,
        }
    }

    fn endpoints(&self) -> [&Endpoint; 2] {
        [&self.control, &self.bulk]
    }

    /// Closes every connection by name.
    fn cut_off(&self) {
        let code = CloseCode::Stopping;
        for endpoint in self.endpoints() {
            endpoint.close(code.varint(), code.text().as_bytes());
        }
    }
}

/// Counts a connection of an address among those that have not said hello yet.
struct Unproven {
    shared: Arc<Shared>,
    address: IpAddr,
    /// How many there were when this one came, itself included.
    seen: usize,
}

impl Unproven {
    fn count(shared: Arc<Shared>, address: IpAddr) -> Self {
        let seen = {
            let mut counts = shared
                .unproven
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(address).or_default();
            *count += 1;
            *count
        };
        Self {
            shared,
            address,
            seen,
        }
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        let mut counts = self
            .shared
            .unproven
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

fn close(connection: &Connection, code: CloseCode) {
    connection.close(code.varint(), code.text().as_bytes());
}

/// Sorts what a dialler met by who said no.
fn refusal(address: SocketAddr, err: RpcError) -> DialError {
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
