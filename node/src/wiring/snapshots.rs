//! Joins the store to the mesh: who has a snapshot, and who may have it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use proto::ids::{NodeId, NodeKey};
use raft::state::{Snapshot, State};
use tokio::task;
use tokio::time::Instant;
use tracing::debug;
use transport::streams::{Inbound, StreamHandler};
use transport::{Identity, Lane, Service};

use super::{RunError, disk, scrub, upkeep};
use crate::base::chain::chain;
use crate::base::clock::SystemClock;
use crate::base::stop::Tasks;
use crate::cluster::{Cluster, Mesh, Proposer, View};
use crate::reconcile::copies::Copies;
use crate::sandbox::Keeping;
use crate::store::fetch::{Holders, Wire};
use crate::store::serve::{Asked, NamedChunks, Wants};
use crate::store::{DataPaths, Limits, SnapshotDigest, Store};

/// Streams on which snapshots are handed out at once; who comes later asks again. Each takes three
/// manifests and 1 MiB. A fetch takes two of each holder, so one member may have a dozen fetches under
/// way here, as a node does that wakes many guests, and the others still get some. A host of one team
/// runs few guests and holds no copies for the cluster: four fetches do for it. All hosts together,
/// whoever they belong to, leave half to members, on whose copies the cluster depends.
const BULK: Room = Room {
    whole: 32,
    hosts: 16,
    one_member: 24,
    one_host: 8,
};
/// Streams on which guests' single chunks are handed out at once: most of them are silent, and each
/// takes a chunk while it is not. The memory of one snapshot takes 64 at most, of one guest 20 while
/// its working set is pushed, and 4 while nobody asks: that is two snapshots at their most or six
/// guests at once for a host of one team, and three times that for a member.
const URGENT: Room = Room {
    whole: 512,
    hosts: 256,
    one_member: 384,
    one_host: 128,
};
const _: () = assert!(BULK.is_fair() && URGENT.is_fair());
/// Longest a peer may take to open a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the store; after a crash that reads the newest part of it.
pub(super) async fn keeping(
    paths: &DataPaths,
    cluster: &Cluster,
    identity: Arc<Identity>,
) -> Result<Keeping, RunError> {
    let dir = paths.store();
    let opened = task::spawn_blocking(move || Store::open(&dir, Limits::default())).await;
    let opened = opened.map_err(|err| disk("open the store of snapshots")(io::Error::other(err)));
    Ok(Keeping {
        store: opened??,
        holders: Arc::new(MeshHolders {
            mesh: cluster.mesh().clone(),
            proposer: cluster.proposer().clone(),
        }),
        identity,
    })
}

/// Answers `wrenn store` from now on, and looks for damage by itself.
pub(super) fn keep_up(
    keeping: &Keeping,
    cluster: &Cluster,
    paths: &DataPaths,
    tasks: &Tasks,
) -> Result<(), RunError> {
    scrub::spawn(keeping.store.clone(), Arc::new(SystemClock), tasks);
    let (store, proposer) = (keeping.store.clone(), cluster.proposer().clone());
    let served = upkeep::serve(store, proposer, &paths.store_socket(), tasks);
    served.map_err(disk("listen for questions about the store"))
}

/// Hands snapshots out from now on, and copies those of others.
pub(super) fn share(keeping: Keeping, cluster: &Cluster, tasks: &Tasks) {
    let (proposer, mesh) = (cluster.proposer().clone(), cluster.mesh());
    let streams = StoreStreams {
        store: keeping.store.clone(),
        view: proposer.view(),
        bulk: Slots::new(BULK),
        urgent: Slots::new(URGENT),
        named: NamedChunks::default(),
    };
    let transport = mesh.transport();
    transport.register_streams(Service::STORE, Lane::Bulk, streams);
    let copies = Copies {
        here: mesh.here(),
        view: proposer.view(),
        proposer,
        store: keeping.store,
        holders: keeping.holders,
    };
    copies.spawn(tasks);
}

/// The cluster's word on who has what.
#[derive(Clone, Debug)]
struct MeshHolders {
    mesh: Mesh,
    proposer: Proposer,
}

impl Holders for MeshHolders {
    fn holders(&self, digest: SnapshotDigest) -> Vec<NodeId> {
        let state = self.proposer.view().state();
        let holders = by_digest(&state, digest).map(|it| it.holders.clone());
        let mut holders: Vec<NodeId> = holders.unwrap_or_default().into_iter().collect();
        holders.retain(|node| *node != self.mesh.here());
        let is_away = |id: &NodeId| state.node(*id).is_none_or(|node| !node.liveness.is_alive());
        holders.sort_by_key(is_away);
        holders
    }

    fn open(&self, node: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let mesh = self.mesh.clone();
        Box::pin(async move {
            let deadline = Instant::now() + OPEN_TIMEOUT;
            let opened = mesh.open(node, Lane::Bulk, Service::STORE, header.into(), deadline);
            let stream = opened.await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as Box<dyn Wire>)
        })
    }

    fn may_seal(&self, key: &NodeKey) -> bool {
        let state = self.proposer.view().state();
        state.node_by_key(key).is_some() || state.removed_node(key).is_some()
    }

    fn renew(&self) -> BoxFuture<'_, bool> {
        Box::pin(async { self.proposer.linearize().await.is_ok() })
    }

    fn name(&self, node: NodeId) -> String {
        let state = self.proposer.view().state();
        let name = state.node(node).map(|known| known.name.clone());
        name.unwrap_or_else(|| node.to_string())
    }
}

/// Longest this node's copy of the state may lag behind that of a peer that asks, as for relayed
/// calls.
const LAG: Duration = Duration::from_secs(1);

/// Hands out this node's snapshots.
struct StoreStreams {
    store: Store,
    view: View,
    bulk: Slots,
    urgent: Slots,
    /// What hosts of one team are given no more than.
    named: NamedChunks,
}

impl StreamHandler for StoreStreams {
    async fn open(&self, inbound: Inbound) {
        let Some(asked) = Asked::read(&inbound.header) else {
            inbound
                .refuse("this release does not understand the request")
                .await;
            return;
        };
        let (peer, digest) = (inbound.peer, asked.digest);
        let Some(kind) = self.who_may_have(&peer, digest).await else {
            inbound.refuse(format!("no snapshot {digest}")).await;
            return;
        };
        let is_urgent = asked.wants == Wants::Urgent;
        let slots = if is_urgent { &self.urgent } else { &self.bulk };
        // Given back however this ends, also where the connection takes it down.
        let Some(_one) = slots.take(peer, kind) else {
            return inbound.refuse_busy().await;
        };
        let served = async {
            let mut stream = inbound.accept().await.map_err(io::Error::other)?;
            if is_urgent {
                stream.go_first();
            }
            match kind {
                Kind::Member => self.store.serve(asked, &mut stream).await,
                Kind::Host => {
                    let named = &self.named;
                    self.store.serve_named(asked, named, &mut stream).await
                }
            }
        };
        if let Err(err) = served.await {
            // The fetcher knows, and says so where it matters.
            debug!(%peer, %digest, err = chain(&err), "a snapshot was not handed out to its end");
        }
    }
}

impl StoreStreams {
    /// What the peer is, if it may have the snapshot: a host of one team sees that team's, and every
    /// other node all. Who asks may have applied the entry that names the snapshot before the node
    /// that sealed it has.
    async fn who_may_have(&self, peer: &NodeKey, digest: SnapshotDigest) -> Option<Kind> {
        let deadline = Instant::now() + LAG;
        let of_team =
            |state: &State| by_digest(state, digest).map(|it| (it.team, it.warm.is_some()));
        let (team, is_warm) = self.view.wait_for(deadline, of_team).await?;
        let state = self.view.state();
        let node = state.node_by_key(peer)?;
        match node.team {
            None => Some(Kind::Member),
            // What is kept warm is made for members alone.
            Some(only) => (only == team && !is_warm).then_some(Kind::Host),
        }
    }
}

/// What a peer is to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A node that sees all.
    Member,
    /// A host of one team, of which nothing is believed.
    Host,
}

/// How many streams of one sort there may be.
#[derive(Clone, Copy, Debug)]
struct Room {
    /// In all.
    whole: usize,
    /// Of all hosts of teams together.
    hosts: usize,
    /// Of one member.
    one_member: usize,
    /// Of one host of a team.
    one_host: usize,
}

impl Room {
    /// Whether nobody can take all of it alone, and no host all that hosts have.
    const fn is_fair(self) -> bool {
        self.one_host < self.hosts && self.hosts < self.whole && self.one_member < self.whole
    }
}

/// Who has how many streams of one sort.
#[derive(Debug)]
struct Slots {
    room: Room,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    whole: usize,
    hosts: usize,
    /// Only those that have any.
    by_peer: HashMap<NodeKey, usize>,
}

/// The right to one stream, until it is dropped.
#[derive(Debug)]
struct Slot<'a> {
    of: &'a Slots,
    peer: NodeKey,
    /// What the peer was when it took this; it may become something else meanwhile.
    kind: Kind,
}

impl Slots {
    fn new(room: Room) -> Self {
        Self {
            room,
            taken: Mutex::default(),
        }
    }

    /// A slot for that peer; `None` where it has its share, or nothing is left.
    fn take(&self, peer: NodeKey, kind: Kind) -> Option<Slot<'_>> {
        let mut taken = self.taken();
        let has = taken.by_peer.get(&peer).copied().unwrap_or_default();
        let fits = match kind {
            Kind::Member => has < self.room.one_member,
            Kind::Host => has < self.room.one_host && taken.hosts < self.room.hosts,
        };
        if !fits || taken.whole >= self.room.whole {
            return None;
        }
        taken.whole += 1;
        taken.hosts += usize::from(kind == Kind::Host);
        taken.by_peer.insert(peer, has + 1);
        let of = self;
        Some(Slot { of, peer, kind })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut taken = self.of.taken();
        taken.whole -= 1;
        taken.hosts -= usize::from(self.kind == Kind::Host);
        if let Some(has) = taken.by_peer.get_mut(&self.peer) {
            *has -= 1;
            if *has == 0 {
                taken.by_peer.remove(&self.peer);
            }
        }
    }
}

fn by_digest(state: &State, digest: SnapshotDigest) -> Option<&Snapshot> {
    let mut all = state.snapshots();
    all.find(|snapshot| snapshot.sealed.digest == digest.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> NodeKey {
        NodeKey([u8::try_from(number).expect("few peers"); 32])
    }

    /// As many as that peer gets.
    fn all_of(slots: &Slots, peer: NodeKey, kind: Kind) -> Vec<Slot<'_>> {
        std::iter::from_fn(|| slots.take(peer, kind)).collect()
    }

    #[test]
    fn a_host_that_takes_all_it_gets_leaves_room_to_other_hosts_and_to_members() {
        for room in [BULK, URGENT] {
            let slots = Slots::new(room);
            let greedy = all_of(&slots, key(1), Kind::Host);
            assert_eq!(greedy.len(), room.one_host);
            assert!(slots.take(key(2), Kind::Host).is_some());
            assert!(slots.take(key(3), Kind::Member).is_some());
        }
    }

    #[test]
    fn all_hosts_together_leave_half_to_members() {
        for room in [BULK, URGENT] {
            let slots = Slots::new(room);
            let hosts = 1..=room.whole / room.one_host;
            let taken: Vec<_> = hosts
                .flat_map(|host| all_of(&slots, key(host), Kind::Host))
                .collect();
            assert_eq!(taken.len(), room.hosts);
            let member = all_of(&slots, key(200), Kind::Member);
            assert_eq!(member.len(), room.whole / 2);
        }
    }

    #[test]
    fn a_member_that_takes_all_it_gets_leaves_room_to_others() {
        for room in [BULK, URGENT] {
            let slots = Slots::new(room);
            let greedy = all_of(&slots, key(1), Kind::Member);
            assert_eq!(greedy.len(), room.one_member);
            assert!(slots.take(key(2), Kind::Member).is_some());
            assert!(slots.take(key(3), Kind::Host).is_some());
        }
    }

    #[test]
    fn a_slot_comes_back_however_its_stream_ends_and_nothing_is_kept_of_its_peer() {
        let slots = Slots::new(BULK);
        let mut taken = all_of(&slots, key(1), Kind::Host);
        taken.pop();
        assert!(slots.take(key(1), Kind::Host).is_some());
        taken.clear();
        // A stream whose connection ends is dropped in the middle.
        let mut served = Box::pin(async {
            let _one = slots.take(key(1), Kind::Host);
            std::future::pending::<()>().await;
        });
        let waker = std::task::Waker::noop();
        let polled = served
            .as_mut()
            .poll(&mut std::task::Context::from_waker(waker));
        assert!(polled.is_pending());
        assert_eq!(slots.taken().whole, 1);
        drop(served);
        let taken = slots.taken();
        assert_eq!((taken.whole, taken.hosts, taken.by_peer.len()), (0, 0, 0));
    }
}
