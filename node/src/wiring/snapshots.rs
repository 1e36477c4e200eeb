//! Joins the store to the mesh: who has a snapshot, and who may have it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use proto::ids::{NodeId, NodeKey};
use raft::state::{Snapshot, State};
use tokio::sync::Semaphore;
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
use crate::store::serve::{Asked, Wants};
use crate::store::{DataPaths, Limits, SnapshotDigest, Store};

/// Streams on which snapshots are handed out at once; who comes later asks again. Each takes three
/// manifests and 1 MiB.
const STREAMS: usize = 24;
/// Streams on which guests' single chunks are handed out at once: most of them are silent, and each
/// takes a chunk while it is not.
const URGENT_STREAMS: usize = 512;
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
        streams: Semaphore::new(STREAMS),
        urgent: Semaphore::new(URGENT_STREAMS),
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
    streams: Semaphore,
    urgent: Semaphore,
}

impl StreamHandler for StoreStreams {
    async fn open(&self, inbound: Inbound) {
        let Some(asked) = Asked::read(&inbound.header) else {
            inbound
                .refuse("this release does not understand the request")
                .await;
            return;
        };
        let digest = asked.digest;
        if !self.may_have(&inbound.peer, digest).await {
            inbound.refuse(format!("no snapshot {digest}")).await;
            return;
        }
        let is_urgent = asked.wants == Wants::Urgent;
        let streams = if is_urgent {
            &self.urgent
        } else {
            &self.streams
        };
        let Ok(_one) = streams.try_acquire() else {
            return inbound.refuse_busy().await;
        };
        let peer = inbound.peer;
        let served = async {
            let mut stream = inbound.accept().await.map_err(io::Error::other)?;
            if is_urgent {
                stream.go_first();
            }
            self.store.serve(asked, &mut stream).await
        };
        if let Err(err) = served.await {
            // The fetcher knows, and says so where it matters.
            debug!(%peer, %digest, err = chain(&err), "a snapshot was not handed out to its end");
        }
    }
}

impl StoreStreams {
    /// A host of one team sees that team's snapshots, and every other node all. Who asks may have
    /// applied the entry that names the snapshot before the node that sealed it has.
    async fn may_have(&self, peer: &NodeKey, digest: SnapshotDigest) -> bool {
        let deadline = Instant::now() + LAG;
        let of_team =
            |state: &State| by_digest(state, digest).map(|it| (it.team, it.warm.is_some()));
        let Some((team, is_warm)) = self.view.wait_for(deadline, of_team).await else {
            return false;
        };
        let state = self.view.state();
        let node = state.node_by_key(peer);
        // What is kept warm is made for members alone.
        let is_its = |only| only == team && !is_warm;
        node.is_some_and(|node| node.team.is_none_or(is_its))
    }
}

fn by_digest(state: &State, digest: SnapshotDigest) -> Option<&Snapshot> {
    let mut all = state.snapshots();
    all.find(|snapshot| snapshot.sealed.digest == digest.0)
}
