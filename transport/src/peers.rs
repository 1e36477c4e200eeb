//! The member list and the live connections, under one lock.
//!
//! They belong together: a connection is let in and a member is removed under the same lock, so
//! no connection can slip in between the removal and the closing of what the removed node had.
//! Only connections whose hello succeeded are here. The lock is never held across an await.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::NodeKey;
use quinn::{Connection, ConnectionError};
use tokio::time::Instant;
use tracing::info;

use crate::BoxFuture;
use crate::alpn::Alpn;
use crate::close::CloseCode;
use crate::endpoint::Lane;
use crate::gate::{self, Arrival, Membership, Standing, Verdict};
use crate::limits::MAX_CONNECTIONS_PER_LANE;

/// Tells whether an unknown key is a member's all the same.
pub(crate) type Voucher = Arc<dyn Fn(NodeKey) -> BoxFuture<'static, bool> + Send + Sync>;

/// What is known of a live connection.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// The key it has proven.
    pub key: NodeKey,
    /// The endpoint it uses.
    pub lane: Lane,
    /// Where its packets come from.
    pub address: SocketAddr,
    /// Whether this node dialled it.
    pub dialled: bool,
    /// The protocol version settled in the hello.
    pub protocol: u32,
    /// The product version the peer runs.
    pub product: String,
    /// The log index of the peer's member list at its hello.
    pub membership_index: u64,
    /// A number of the peer's start; 0 where it gave none.
    pub run: u64,
    /// The round trip as of now, smoothed.
    pub rtt: Duration,
}

/// One connection in the table.
struct Live {
    info: PeerInfo,
    connection: Connection,
}

#[derive(Default)]
struct State {
    membership: Arc<Membership>,
    /// Keys that an earlier list had; 32 bytes for each node removed since this one started.
    removed: HashSet<NodeKey>,
    /// Keys that the list lacks and a peer vouched for, and until when. As many as a newer list
    /// has and this one has not.
    vouched: HashMap<NodeKey, Instant>,
    voucher: Option<Voucher>,
    /// Oldest first; never an empty list.
    live: HashMap<(NodeKey, Lane), Vec<Live>>,
}

impl State {
    fn standing(&self, key: NodeKey) -> Standing {
        let vouched = self.vouched.get(&key);
        if self.membership.members.contains(&key) {
            Standing::Member
        } else if self.removed.contains(&key) {
            Standing::Stranger
        } else if vouched.is_some_and(|until| *until > Instant::now()) {
            Standing::Member
        } else if self.voucher.is_some() {
            Standing::Vouchable
        } else {
            Standing::Stranger
        }
    }

    /// Closes what a peer had before it started as `run`: it will never answer there, and whoever
    /// waits for that would wait until silence has lasted long enough.
    fn bury_earlier_runs(&mut self, key: NodeKey, run: u64) {
        for lane in [Lane::Control, Lane::Bulk] {
            let Some(slot) = self.live.get_mut(&(key, lane)) else {
                continue;
            };
            let is_earlier = |live: &Live| run != 0 && live.info.run != 0 && live.info.run != run;
            let (earlier, now): (Vec<_>, Vec<_>) = slot.drain(..).partition(is_earlier);
            close_all(&earlier, CloseCode::Silent);
            *slot = now;
            if slot.is_empty() {
                self.live.remove(&(key, lane));
            }
        }
    }

    /// Swaps the list. Whoever was vouched for stays: a list that is catching up passes through
    /// many states that lack it.
    fn replace(&mut self, membership: Membership) {
        let old = std::mem::replace(&mut self.membership, Arc::new(membership));
        let new = &self.membership.members;
        self.removed.extend(old.members.difference(new));
        self.removed.retain(|key| !new.contains(key));
        let gone = &self.removed;
        self.vouched
            .retain(|key, _| !new.contains(key) && !gone.contains(key));
        let vouched = &self.vouched;
        self.live.retain(|(key, _), connections| {
            let stays = new.contains(key) || vouched.contains_key(key);
            if !stays {
                info!(peer = %key, "closing connections of a removed node");
                close_all(connections, CloseCode::Removed);
            }
            stays
        });
    }
}

/// The member list and the live connections of one node.
pub(crate) struct Peers {
    own: NodeKey,
    state: Mutex<State>,
}

impl Peers {
    /// A node that knows of nobody.
    pub(crate) fn new(own: NodeKey) -> Self {
        Self {
            own,
            state: Mutex::default(),
        }
    }

    /// Replaces the member list and closes what removed nodes still have. Returns false, and does
    /// nothing, for a list older than the present one.
    pub(crate) fn set_membership(&self, membership: Membership) -> bool {
        let mut state = self.lock();
        if membership.index < state.membership.index {
            return false;
        }
        state.replace(membership);
        true
    }

    /// Lets `voucher` answer for unknown keys from now on.
    pub(crate) fn set_voucher(&self, voucher: Voucher) {
        self.lock().voucher = Some(voucher);
    }

    /// Asks the voucher about `key`. On a yes it counts as a member for twice `how_long`, so that
    /// asking again after `how_long` comes in time.
    pub(crate) async fn vouch(&self, key: NodeKey, how_long: Duration) -> Result<(), CloseCode> {
        let voucher = self.lock().voucher.clone();
        let voucher = voucher.ok_or(CloseCode::NotMember)?;
        let vouched = voucher(key).await;
        let mut state = self.lock();
        let now = Instant::now();
        state.vouched.retain(|_, until| *until > now);
        if state.removed.contains(&key) {
            return Err(CloseCode::Removed);
        }
        if !vouched {
            state.vouched.remove(&key);
            return Err(CloseCode::NotMember);
        }
        state.vouched.insert(key, now + 2 * how_long);
        Ok(())
    }

    /// Whether a handshake of `key` may complete at all.
    pub(crate) fn may_handshake(&self, key: NodeKey) -> bool {
        let state = self.lock();
        state
            .standing(key)
            .may_handshake(state.membership.join_open)
    }

    /// The present member list.
    pub(crate) fn membership(&self) -> Arc<Membership> {
        Arc::clone(&self.lock().membership)
    }

    /// The gate's verdict under the present member list.
    pub(crate) fn decide(
        &self,
        lane: Lane,
        alpn: Option<Alpn>,
        key: NodeKey,
        unproven: usize,
    ) -> Verdict {
        let arrival = {
            let state = self.lock();
            Arrival {
                lane,
                alpn,
                key,
                standing: state.standing(key),
                join_open: state.membership.join_open,
                unproven,
            }
        };
        gate::decide(self.own, arrival)
    }

    /// Enters a connection whose hello succeeded, unless its node was removed in the meantime. One to
    /// a peer that has started anew replaces all that is left of its earlier start.
    pub(crate) fn admit(&self, info: PeerInfo, connection: Connection) -> Result<(), CloseCode> {
        let mut state = self.lock();
        if state.standing(info.key) != Standing::Member {
            return Err(CloseCode::Removed);
        }
        state.bury_earlier_runs(info.key, info.run);
        let slot = state.live.entry((info.key, info.lane)).or_default();
        slot.push(Live { info, connection });
        if slot.len() > MAX_CONNECTIONS_PER_LANE {
            close_all(&slot[..1], CloseCode::Superseded);
            slot.remove(0);
        }
        Ok(())
    }

    /// Takes a connection that has ended out of the table. With the last control connection to a
    /// peer that fell silent go its bulk connections: they are given more time, and whoever waits
    /// on one for a dead peer need not.
    pub(crate) fn forget(&self, key: NodeKey, lane: Lane, connection: &Connection) {
        let mut state = self.lock();
        let Some(slot) = state.live.get_mut(&(key, lane)) else {
            return;
        };
        slot.retain(|live| live.connection.stable_id() != connection.stable_id());
        if !slot.is_empty() {
            return;
        }
        state.live.remove(&(key, lane));
        let fell_silent = matches!(
            connection.close_reason(),
            Some(ConnectionError::TimedOut | ConnectionError::Reset)
        );
        if lane == Lane::Control && fell_silent {
            let bulk = state.live.remove(&(key, Lane::Bulk));
            close_all(&bulk.unwrap_or_default(), CloseCode::Silent);
        }
    }

    /// Closes all connections by name and lets go of them: a connection's TLS session refers back
    /// to this table, so a node that stops must empty it. They are closed here, one by one, because
    /// the endpoint's own closing only sends each a message, and the last handle to go would be
    /// faster and say nothing.
    pub(crate) fn close(&self, code: CloseCode) {
        let mut state = self.lock();
        for connections in state.live.values() {
            close_all(connections, code);
        }
        state.live.clear();
        // It may well hold what this table is a part of.
        state.voucher = None;
    }

    /// Closes by name what `key` has on either lane.
    pub(crate) fn disconnect(&self, key: NodeKey, code: CloseCode) {
        let mut state = self.lock();
        for lane in [Lane::Control, Lane::Bulk] {
            if let Some(connections) = state.live.remove(&(key, lane)) {
                close_all(&connections, code);
            }
        }
    }

    /// The newest connection to `key` that has not ended.
    pub(crate) fn newest(&self, key: NodeKey, lane: Lane) -> Option<Connection> {
        let state = self.lock();
        let slot = state.live.get(&(key, lane))?;
        let mut alive = slot.iter().rev().map(|live| &live.connection);
        alive
            .find(|connection| connection.close_reason().is_none())
            .cloned()
    }

    /// All live connections.
    pub(crate) fn list(&self) -> Vec<PeerInfo> {
        let state = self.lock();
        state
            .live
            .values()
            .flatten()
            .map(|live| PeerInfo {
                rtt: live.connection.rtt(),
                ..live.info.clone()
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave it half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Peers(of {})", self.own)
    }
}

fn close_all(connections: &[Live], code: CloseCode) {
    for live in connections {
        live.connection.close(code.varint(), code.text().as_bytes());
    }
}
