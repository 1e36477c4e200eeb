//! What a connection goes through: accepted or dialled, proven, entered, served, forgotten.
//!
//! One task owns each connection from its first packet to its end, and everything it waits for on
//! the way into the table has the handshake's deadline behind it.

use std::collections::HashMap;
use std::future::pending;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use proto::ids::NodeKey;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{Instrument, debug, info_span};

use super::dials::Dials;
use super::error::{self, DialError, refusal};
use crate::alpn::Alpn;
use crate::close::CloseCode;
use crate::complaints::Subject;
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
    /// Tells this start from earlier ones.
    run: u64,
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
            // Seeded by the system; never 0, which stands for none.
            run: RandomState::new().build_hasher().finish() | 1,
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
        let until = Instant::now() + self.server.limits.handshake;
        let stop = self.server.stop.clone();
        let handshake = timeout_at(until, async { incoming.accept()?.await });
        let connection = match stop.run_until_cancelled(handshake).await {
            Some(Ok(Ok(connection))) => connection,
            Some(Ok(Err(err))) => return debug!(%err, "handshake failed"),
            Some(Err(_)) => return debug!("handshake took too long"),
            None => return,
        };
        let Some(key) = tls::peer_key(&connection) else {
            return close(&connection, CloseCode::NotMember);
        };
        let alpn = tls::peer_alpn(&connection);
        let verdict = self.peers.decide(lane, alpn, key, unproven.seen);
        if verdict == Verdict::Join {
            drop(slot);
            return self.serve_joiner(key, &connection).await;
        }
        let entering = self.enter(lane, key, &connection, verdict, until);
        let entered = stop.run_until_cancelled(entering).await;
        match entered.unwrap_or(Err(CloseCode::Stopping)) {
            Ok(()) => {
                drop((slot, unproven));
                self.serve_accepted(lane, key, &connection).await;
            }
            Err(code) => self.turn_away(lane, key, &connection, code),
        }
    }

    /// Lets a member in once it has said hello.
    async fn enter(
        &self,
        lane: Lane,
        key: NodeKey,
        connection: &Connection,
        verdict: Verdict,
        until: Instant,
    ) -> Result<(), CloseCode> {
        match verdict {
            Verdict::Close(code) => return Err(code),
            Verdict::Vouch => self.vouch(key, until).await?,
            Verdict::Mesh | Verdict::Join => {}
        }
        let welcome = self.welcome(lane, key, connection);
        let welcomed = timeout_at(until, welcome).await;
        welcomed.unwrap_or(Err(CloseCode::HelloExpected))
    }

    /// Closes by name what did not get in, and says so in the log.
    fn turn_away(&self, lane: Lane, key: NodeKey, connection: &Connection, code: CloseCode) {
        // A dialler that gave up did nothing wrong.
        if code != CloseCode::Stopping && connection.close_reason().is_none() {
            let who = if self.peers.membership().members.contains(&key) {
                Subject::Peer(key)
            } else {
                Subject::Address(connection.remote_address().ip())
            };
            self.server.complaints.about(who, code);
        }
        close(connection, code);
        self.peers.forget(key, lane, connection);
    }

    async fn serve_joiner(&self, key: NodeKey, connection: &Connection) {
        let join = rpc::serve_join(&self.server, key, connection);
        let stop = &self.server.stop;
        if stop.run_until_cancelled(join).await.is_none() {
            close(connection, CloseCode::Stopping);
        }
    }

    /// Asks the voucher about an unknown key, and lets it in for a while if it is a member's.
    async fn vouch(&self, key: NodeKey, until: Instant) -> Result<(), CloseCode> {
        let Ok(_place) = self.vouching.try_acquire() else {
            return Err(CloseCode::Crowded);
        };
        let vouch = self.peers.vouch(key, self.server.limits.vouched);
        let vouched = timeout_at(until, vouch).await;
        vouched.unwrap_or(Err(CloseCode::NotMember))
    }

    /// Answers a peer that this node did not dial. As long as it is not on this node's own list, it
    /// is asked about again now and then.
    async fn serve_accepted(&self, lane: Lane, key: NodeKey, connection: &Connection) {
        tokio::select! {
            () = self.serve(lane, key, connection) => {}
            code = self.doubt(key) => self.turn_away(lane, key, connection, code),
        }
    }

    /// Why a peer must go that was vouched for and did not get onto the list.
    async fn doubt(&self, key: NodeKey) -> CloseCode {
        let limits = self.server.limits;
        while !self.peers.membership().members.contains(&key) {
            sleep(limits.vouched).await;
            if self.peers.membership().members.contains(&key) {
                break;
            }
            let until = Instant::now() + limits.handshake;
            match self.vouch(key, until).await {
                // Too many others are being asked about just now.
                Ok(()) | Err(CloseCode::Crowded) => {}
                Err(code) => return code,
            }
        }
        // From here on the list decides.
        pending().await
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
            run: settled.run,
            rtt: connection.rtt(),
        };
        self.peers.admit(info, connection.clone())
    }

    fn own(&self) -> Own {
        Own {
            product: proto::version::PRODUCT.to_owned(),
            membership_index: self.peers.membership().index,
            run: self.run,
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
