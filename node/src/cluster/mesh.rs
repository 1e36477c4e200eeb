//! The other members, by id: dialled when needed, called, streamed to.
//!
//! Whoever calls a node names its id; the [`Roster`] says under which key and at which addresses.
//! A connection counts as that node only under that key, so an address that changed hands reaches
//! nobody. Connections are kept by the transport and dialled again by whoever needs them next.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use proto::ids::{NodeId, NodeKey};
use tokio::time::Instant;
use tracing::{info, warn};
use transport::streams::BiStream;
use transport::{CloseCode, DialError, Lane, Membership, Method, RpcError, Service, Transport};

use super::roster::{Contact, Roster};
use crate::base::chain::chain;

/// Longest one dial may take where the caller's own deadline is later: on a LAN it takes
/// milliseconds, and a caller has other nodes to turn to.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a node must not have been reached before that is said: a daemon that restarts, and a
/// caller without patience, are no news.
const GONE_AFTER: Duration = Duration::from_secs(2);

/// Why another node did not do what it was asked.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// No member has that id.
    #[error("{0} is no member of this cluster")]
    NoSuchNode(NodeId),
    /// It cannot be reached.
    #[error("reach {node}")]
    Dial {
        /// Who was to be reached.
        node: NodeId,
        /// What stands in the way.
        source: DialError,
    },
    /// It was reached and brought no answer.
    #[error("call {node}")]
    Call {
        /// Who was called.
        node: NodeId,
        /// What went wrong.
        source: RpcError,
    },
}

impl MeshError {
    /// Whether the node may have acted all the same.
    #[must_use]
    pub fn may_have_acted(&self) -> bool {
        match self {
            Self::NoSuchNode(_) | Self::Dial { .. } => false,
            Self::Call { source, .. } => source.may_have_acted(),
        }
    }
}

/// The way to every other member. Cheap to clone.
#[derive(Clone)]
pub struct Mesh {
    transport: Arc<Transport>,
    here: NodeId,
    roster: Arc<RwLock<Arc<Roster>>>,
    refusals: Arc<Mutex<Refusals>>,
    unreached: Arc<Mutex<Unreached>>,
}

/// Who could not be reached lately, and whether that was said. Everybody who needs a dead node
/// fails to dial it, many times a second; the log gets one line when it goes and one when it is
/// back.
#[derive(Debug, Default)]
struct Unreached {
    since: BTreeMap<NodeId, Silence>,
}

#[derive(Debug)]
struct Silence {
    begun: Instant,
    is_told: bool,
}

/// What there is to say about a node.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// It cannot be reached any more.
    Gone,
    /// It is reached again, after so long.
    Back(Duration),
}

impl Unreached {
    fn note(&mut self, node: NodeId, is_reached: bool, now: Instant) -> Option<News> {
        if is_reached {
            let over = self.since.remove(&node).filter(|silence| silence.is_told)?;
            return Some(News::Back(now - over.begun));
        }
        let silence = self.since.entry(node).or_insert(Silence {
            begun: now,
            is_told: false,
        });
        let is_news = !silence.is_told && now - silence.begun >= GONE_AFTER;
        silence.is_told |= is_news;
        is_news.then_some(News::Gone)
    }
}

/// Who refuses this node's key, and since when, as long as nobody takes it.
#[derive(Debug, Default)]
struct Refusals {
    since: BTreeMap<NodeId, Instant>,
}

impl Refusals {
    /// Since when more than half of `peers` refuse. One alone may have slept through this node's
    /// joining, while those who could tell it are down.
    fn by_most_of(&self, peers: &[NodeId]) -> Option<Instant> {
        let refusing = peers.iter().filter_map(|node| self.since.get(node));
        let mut since: Vec<Instant> = refusing.copied().collect();
        since.sort_unstable();
        since.get(peers.len() / 2).copied()
    }
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mesh")
            .field("here", &self.here)
            .finish_non_exhaustive()
    }
}

impl Mesh {
    /// A mesh around node `here` that knows nobody yet.
    #[must_use]
    pub fn new(transport: Arc<Transport>, here: NodeId) -> Self {
        Self {
            transport,
            here,
            roster: Arc::default(),
            refusals: Arc::default(),
            unreached: Arc::default(),
        }
    }

    /// This node.
    #[must_use]
    pub const fn here(&self) -> NodeId {
        self.here
    }

    /// The transport underneath.
    #[must_use]
    pub const fn transport(&self) -> &Arc<Transport> {
        &self.transport
    }

    /// Who belongs to the cluster.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.roster.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the roster, and with it whom the transport lets in; who is no longer on it is cut
    /// off at once.
    pub fn set_roster(&self, roster: Roster, join_open: bool) {
        let own = self.transport.key();
        let keys = roster.nodes.values().map(|contact| contact.key);
        self.transport.set_membership(Membership {
            index: roster.index,
            members: keys.chain([own]).collect(),
            join_open,
        });
        let is_member = |node: &NodeId, _: &mut Silence| roster.nodes.contains_key(node);
        self.lock_unreached().since.retain(is_member);
        *self.roster.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(roster);
    }

    /// The member behind a proven key.
    #[must_use]
    pub fn node_of(&self, key: &NodeKey) -> Option<NodeId> {
        if *key == self.transport.key() {
            return Some(self.here);
        }
        self.roster().by_key(key).map(|contact| contact.id)
    }

    /// How a member is reached.
    ///
    /// # Errors
    /// [`MeshError::NoSuchNode`].
    pub fn contact(&self, node: NodeId) -> Result<Contact, MeshError> {
        let found = self.roster().nodes.get(&node).copied();
        found.ok_or(MeshError::NoSuchNode(node))
    }

    /// Calls `method` of `node`.
    ///
    /// # Errors
    /// All of [`MeshError`].
    pub async fn call(
        &self,
        node: NodeId,
        method: Method,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, MeshError> {
        let contact = self.contact(node)?;
        self.call_contact(contact, method, body, deadline).await
    }

    /// Calls `method` of a node that the roster may not have yet.
    ///
    /// # Errors
    /// All of [`MeshError`].
    pub async fn call_contact(
        &self,
        contact: Contact,
        method: Method,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, MeshError> {
        self.reach(Lane::Control, contact, deadline).await?;
        let called = self.transport.call(contact.key, method, body, deadline);
        called.await.map_err(|source| MeshError::Call {
            node: contact.id,
            source,
        })
    }

    /// Makes sure that there is a live connection to `node`; returns its key.
    ///
    /// # Errors
    /// All of [`MeshError`].
    pub async fn connect(
        &self,
        node: NodeId,
        lane: Lane,
        deadline: Instant,
    ) -> Result<NodeKey, MeshError> {
        let contact = self.contact(node)?;
        self.reach(lane, contact, deadline).await?;
        Ok(contact.key)
    }

    /// Opens a byte stream of `service` to `node` on `lane`.
    ///
    /// # Errors
    /// All of [`MeshError`].
    pub async fn open(
        &self,
        node: NodeId,
        lane: Lane,
        service: Service,
        header: Bytes,
        deadline: Instant,
    ) -> Result<BiStream, MeshError> {
        let contact = self.contact(node)?;
        self.reach(lane, contact, deadline).await?;
        let opened = self
            .transport
            .open_stream(lane, contact.key, service, header, deadline);
        opened
            .await
            .map_err(|source| MeshError::Call { node, source })
    }

    /// Sends a datagram to `node` if it is connected; dials it otherwise, for the next one.
    pub async fn send_datagram(&self, node: NodeId, bytes: Bytes) {
        let Ok(contact) = self.contact(node) else {
            return;
        };
        let deadline = Instant::now() + DIAL_TIMEOUT;
        if self.reach(Lane::Control, contact, deadline).await.is_ok() {
            // Nothing depends on one report: the next follows within a second.
            let _best_effort = self.transport.send_datagram(contact.key, bytes);
        }
    }

    async fn reach(
        &self,
        lane: Lane,
        contact: Contact,
        deadline: Instant,
    ) -> Result<(), MeshError> {
        let address = match lane {
            Lane::Control => contact.control,
            Lane::Bulk => contact.bulk,
        };
        let deadline = deadline.min(Instant::now() + DIAL_TIMEOUT);
        let dialled = self.transport.connect(lane, address, contact.key, deadline);
        let dialled = dialled.await;
        self.note(contact.id, &dialled);
        if lane == Lane::Control {
            self.tell(contact, &dialled);
        }
        dialled.map_err(|source| MeshError::Dial {
            node: contact.id,
            source,
        })
    }

    /// For how long most of the other full members have refused this node's key, and nobody has
    /// taken it.
    #[must_use]
    pub fn refused_for(&self) -> Duration {
        let peers = self.roster().peers(self.here);
        let since = self.lock_refusals().by_most_of(&peers);
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn note(&self, node: NodeId, dialled: &Result<(), DialError>) {
        match dialled {
            Ok(()) => self.lock_refusals().since.clear(),
            Err(
                DialError::KeyRefused { .. }
                | DialError::Refused {
                    code: CloseCode::NotMember | CloseCode::Removed,
                    ..
                },
            ) => {
                let mut refusals = self.lock_refusals();
                refusals.since.entry(node).or_insert_with(Instant::now);
            }
            // Nobody was reached: that says nothing.
            Err(_) => {}
        }
    }

    fn tell(&self, contact: Contact, dialled: &Result<(), DialError>) {
        let (node, address) = (contact.id, contact.control);
        let news = self
            .lock_unreached()
            .note(node, dialled.is_ok(), Instant::now());
        match (news, dialled) {
            (Some(News::Gone), Err(err)) => {
                warn!(%node, %address, err = chain(err), "cannot reach a node any more");
            }
            (Some(News::Back(gone_for)), _) => info!(%node, ?gone_for, "reached a node again"),
            (Some(News::Gone) | None, _) => {}
        }
    }

    fn lock_unreached(&self) -> MutexGuard<'_, Unreached> {
        self.unreached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_refusals(&self) -> MutexGuard<'_, Refusals> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_node_is_said_once_when_it_goes_and_once_when_it_is_back() {
        let (mut unreached, node, begun) = (Unreached::default(), NodeId(2), Instant::now());
        let at = |secs| begun + Duration::from_secs(secs);
        assert_eq!(unreached.note(node, true, begun), None);
        assert_eq!(unreached.note(node, false, begun), None);
        assert_eq!(unreached.note(node, false, at(2)), Some(News::Gone));
        for secs in 3..100 {
            assert_eq!(unreached.note(node, false, at(secs)), None);
        }
        let back = News::Back(Duration::from_secs(100));
        assert_eq!(unreached.note(node, true, at(100)), Some(back));
        assert_eq!(unreached.note(node, true, at(101)), None);
    }

    #[test]
    fn one_peer_that_refuses_is_not_most_of_them() {
        let begun = Instant::now();
        let at = |secs| begun + Duration::from_secs(secs);
        let refusals = Refusals {
            since: [(NodeId(2), begun), (NodeId(3), at(4))].into(),
        };
        let most = |ids: &[u64]| {
            let peers: Vec<_> = ids.iter().copied().map(NodeId).collect();
            refusals.by_most_of(&peers)
        };
        assert_eq!(most(&[2]), Some(begun));
        assert_eq!(most(&[2, 4]), None, "the other one is down");
        assert_eq!(most(&[2, 3, 4]), Some(at(4)));
        assert_eq!(most(&[2, 3, 4, 5]), None);
        assert_eq!(most(&[]), None);
    }

    #[test]
    fn a_node_that_is_back_before_it_was_said_is_no_news() {
        let (mut unreached, node, begun) = (Unreached::default(), NodeId(2), Instant::now());
        assert_eq!(unreached.note(node, false, begun), None);
        assert_eq!(unreached.note(node, true, begun + GONE_AFTER), None);
        let again = begun + 2 * GONE_AFTER;
        assert_eq!(unreached.note(node, false, again), None, "counts anew");
    }
}
