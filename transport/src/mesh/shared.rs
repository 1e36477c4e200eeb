//! What a connection goes through: accepted or dialled, proven, entered, served, forgotten.
//!
//! One task owns each connection from its first packet to its end, and everything it waits for on
//! the way into the table has the handshake's deadline behind it.

use std::collections::HashMap;
use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use proto::ids::NodeKey;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{Instrument, debug, info_span};

use super::dials::Dials;
use super::error::{self, DialError, refusal};
use crate::alpn::Alpn;
use crate::close::CloseCode;
use crate::datagram::Datagrams;
use crate::endpoint::{self, End, Lane, Path};
use crate::gate::Verdict;
use crate::identity::Identity;
use crate::limits::{MAX_ARRIVING_PER_ADDRESS, MAX_HANDSHAKES, MAX_VOUCHING};
use crate::peers::{PeerInfo, Peers};
use crate::rpc::hello::{self, Own, Settled};
use crate::rpc::{self, Server};
use crate::tls;

/// What a dialler puts where QUIC wants a server's name; it is neither sent nor looked at.
const SERVER_NAME: &str = "wrenn";

/// What the tasks share.
pub(super) struct Shared {
    pub(super) identity: Identity,
    pub(super) peers: Arc<Peers>,
    pub(super) server: Server,
    pub(super) datagrams: Datagrams,
    pub(super) dials: Dials,
    path: Path,
    control: Endpoint,
    bulk: Endpoint,
    handshakes: Arc<Semaphore>,
    vouching: Semaphore,
    unproven: Mutex<HashMap<IpAddr, usize>>,
}

impl Shared {
    /// Puts the parts together; `endpoints` are control and bulk.
    pub(super) fn new(
        identity: Identity,
        peers: Arc<Peers>,
        server: Server,
        path: Path,
        [control, bulk]: [Endpoint; 2],
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            peers,
            server,
            datagrams: Datagrams::default(),
            dials: Dials::default(),
            path,
            control,
            bulk,
            handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
            vouching: Semaphore::new(MAX_VOUCHING),
            unproven: Mutex::default(),
        })
    }

    /// Lets connections in until the node stops.
    pub(super) async fn accept(self: Arc<Self>, lane: Lane) {
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
            let unproven = Unproven::count(Arc::clone(&self), incoming.remote_address().ip());
            if unproven.seen > MAX_ARRIVING_PER_ADDRESS {
                incoming.refuse();
                continue;
            }
            let span = info_span!("transport-peer", address = %incoming.remote_address());
            let arrive = Arc::clone(&self).arrive(lane, incoming, slot, unproven);
            self.server.tasks.spawn(arrive.instrument(span));
        }
    }

    /// One accepted connection, from its first packet to its end.
    async fn arrive(
        self: Arc<Self>,
        lane: Lane,
        incoming: Incoming,
        slot: OwnedSemaphorePermit,
        unproven: Unproven,
    ) {
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
        let verdict = self
            .peers
            .decide(lane, tls::peer_alpn(&connection), key, unproven.seen);
        let until = begun + limits.handshake;
        match verdict {
            Verdict::Close(code) => {
                self.server.complaints.about(key, code);
                close(&connection, code);
            }
            Verdict::Join => {
                drop(slot);
                let join = rpc::serve_join(&self.server, key, &connection);
                let stop = &self.server.stop;
                if stop.run_until_cancelled(join).await.is_none() {
                    close(&connection, CloseCode::Stopping);
                }
            }
            Verdict::Mesh => {
                if self.enter(lane, key, &connection, until).await {
                    drop((slot, unproven));
                    self.serve(lane, key, &connection).await;
                }
            }
            Verdict::Vouch => {
                let code = timeout_at(until, self.vouch(key)).await;
                if let Err(code) = code.unwrap_or(Err(CloseCode::NotMember)) {
                    self.server.complaints.about(key, code);
                    return close(&connection, code);
                }
                if self.enter(lane, key, &connection, until).await {
                    drop((slot, unproven));
                    self.serve_vouched(lane, key, &connection).await;
                }
            }
        }
    }

    /// Asks the voucher about an unknown key, and lets it in for a while if it is a member's.
    async fn vouch(&self, key: NodeKey) -> Result<(), CloseCode> {
        let Ok(_place) = self.vouching.try_acquire() else {
            return Err(CloseCode::Crowded);
        };
        self.peers.vouch(key, self.server.limits.vouched).await
    }

    /// Answers a peer that is not on this node's own list, and asks about it again now and then
    /// until it is.
    async fn serve_vouched(&self, lane: Lane, key: NodeKey, connection: &Connection) {
        let doubt = async {
            loop {
                sleep(self.server.limits.vouched).await;
                if self.peers.membership().members.contains(&key) {
                    return pending().await;
                }
                if let Err(code) = self.vouch(key).await {
                    return code;
                }
            }
        };
        tokio::select! {
            () = self.serve(lane, key, connection) => {}
            code = doubt => {
                close(connection, code);
                self.peers.forget(key, lane, connection);
            }
        }
    }

    /// Lets a member in once it has said hello; if it has not, the connection is closed by name.
    async fn enter(
        &self,
        lane: Lane,
        key: NodeKey,
        connection: &Connection,
        until: Instant,
    ) -> bool {
        let welcome = self.welcome(lane, key, connection);
        let outcome = timeout_at(until, welcome).await;
        let Err(code) = outcome.unwrap_or(Err(CloseCode::HelloExpected)) else {
            return true;
        };
        self.server.complaints.about(key, code);
        close(connection, code);
        false
    }

    /// Hears the hello, enters the connection in the table, then answers: once the dialler knows
    /// that it is in, this node can call it.
    async fn welcome(
        &self,
        lane: Lane,
        key: NodeKey,
        connection: &Connection,
    ) -> Result<(), CloseCode> {
        let heard = hello::hear(connection).await?;
        self.admit(lane, key, connection, heard.settled.clone(), false)?;
        endpoint::widen(lane, connection);
        let answered = heard.answer(self.own(), &self.server.limits).await;
        answered.inspect_err(|_| self.peers.forget(key, lane, connection))
    }

    /// Answers a peer until the connection ends, then forgets it.
    async fn serve(&self, lane: Lane, key: NodeKey, connection: &Connection) {
        let streams = rpc::serve(&self.server, lane, key, connection);
        match lane {
            Lane::Control => {
                let hear = self
                    .datagrams
                    .hear(key, connection, &self.server.complaints);
                tokio::select! {
                    () = streams => {}
                    () = hear => {}
                }
            }
            Lane::Bulk => streams.await,
        }
        // When the node stops, the connection stays in the table so that the goodbye reaches it.
        if connection.close_reason().is_some() {
            self.peers.forget(key, lane, connection);
        }
    }

    /// Dials a member and proves it.
    pub(super) async fn dial_mesh(
        self: Arc<Self>,
        lane: Lane,
        address: SocketAddr,
        key: NodeKey,
        deadline: Instant,
    ) -> Result<(), DialError> {
        let connection = self.dial(lane, address, key, Alpn::Mesh, deadline).await?;
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
    pub(super) async fn dial(
        &self,
        lane: Lane,
        address: SocketAddr,
        key: NodeKey,
        alpn: Alpn,
        deadline: Instant,
    ) -> Result<Connection, DialError> {
        let crypto = tls::client_config(&self.identity, key, alpn)
            .map_err(|source| DialError::Tls { address, source })?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(endpoint::transport_config(lane, End::Dialler, self.path));
        let mut connecting = self
            .endpoint(lane)
            .connect_with(config, address, SERVER_NAME)
            .map_err(|source| DialError::Begin { address, source })?;
        let failed = |err| error::handshake(address, key, err);
        // The first word of the handshake tells silence from slowness.
        match timeout_at(deadline, connecting.handshake_data()).await {
            Ok(Ok(_begun)) => {}
            Ok(Err(ConnectionError::TimedOut)) | Err(_) => {
                return Err(DialError::Unreachable { address });
            }
            Ok(Err(err)) => return Err(failed(err)),
        }
        let established = timeout_at(deadline, connecting).await;
        established
            .map_err(|_| DialError::Deadline { address })?
            .map_err(failed)
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
            rtt: connection.rtt(),
        };
        self.peers.admit(info, connection.clone())
    }

    fn own(&self) -> Own {
        Own {
            product: proto::version::PRODUCT.to_owned(),
            membership_index: self.peers.membership().index,
        }
    }

    pub(super) fn endpoint(&self, lane: Lane) -> &Endpoint {
        match lane {
            Lane::Control => &self.control,
            Lane::Bulk => &self.bulk,
        }
    }

    pub(super) fn endpoints(&self) -> [&Endpoint; 2] {
        [&self.control, &self.bulk]
    }

    /// Closes every connection by name.
    pub(super) fn cut_off(&self) {
        let code = CloseCode::Stopping;
        self.peers.close(code);
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

pub(super) fn close(connection: &Connection, code: CloseCode) {
    connection.close(code.varint(), code.text().as_bytes());
}
