//! What the cluster believes of a node's copies is what the node has: after a start, after damage,
//! and once it is mended.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{ClusterId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Receipt, Report, StopCause};
use raft::state::{GuestVersions, Node, Resources, SandboxSpec, Sealed as Told, Template, Token};
use store_support::peers::{Peer, Peers, World};
use tokio::time::Instant;
use wrenn_node::base::clock::SystemClock;
use wrenn_node::base::stop::Tasks;
use wrenn_node::cluster::{MemoryLog, Proposer};
use wrenn_node::reconcile::copies::Copies;
use wrenn_node::store::ChunkId;

const HERE: NodeId = NodeId(1);
/// Nodes are named by the entry that let them in.
const OTHER: NodeId = NodeId(3);
const SNAPSHOT: SnapshotId = SnapshotId([9; 16]);
/// Far longer than anything that is waited for takes.
const LONG: Duration = Duration::from_secs(600);

/// A node with a store, another one that has sealed a snapshot, and what the cluster says of it.
struct Pair {
    world: World,
    proposer: Proposer,
    peers: Peers,
    away: Arc<AtomicBool>,
    tasks: Tasks,
}

impl Pair {
    async fn new() -> Self {
        let world = World::new();
        let (peer, away) = Peer::away(&world.sealed);
        away.store(false, Ordering::Relaxed);
        let peers = world.peers([(OTHER, peer)]);
        let proposer = Proposer::new(Arc::new(MemoryLog::default()), Arc::new(SystemClock));
        let pair = Self {
            world,
            proposer,
            peers,
            away,
            tasks: Tasks::new(),
        };
        pair.pause().await;
        pair
    }

    async fn act(&self, command: Command) -> Receipt {
        self.proposer.propose(command).await.unwrap()
    }

    /// Every node but the first comes by a token.
    async fn let_in(&self, node: Node) {
        let id = TokenId([5; 16]);
        self.act(Command::PutToken(Token {
            id,
            public_key: [5; 32],
            team: None,
            expires_at: Stamp(u64::MAX),
            uses_left: 1,
            created_at: Stamp(0),
            created_by: "a person".into(),
            revoked: false,
            redeemed: Vec::new(),
        }))
        .await;
        let node = Node {
            id: NodeId(0),
            ..node
        };
        let admitted = self.act(Command::RedeemToken { token: id, node }).await;
        assert_eq!(admitted, Receipt::Admitted(OTHER));
    }

    /// Has a sandbox of the other node paused as the snapshot.
    async fn pause(&self) {
        for (id, sandboxes) in [(HERE, 0), (OTHER, 8)] {
            let node = Node {
                id,
                name: id.to_string(),
                key: NodeKey([u8::try_from(id.0).unwrap(); 32]),
                capacity: Resources {
                    vcpus: 8,
                    memory: Mib(4096),
                    disk: Mib(9000),
                    sandboxes,
                },
                templates: [("minimal".into(), [0; 32])].into(),
                ..Node::default()
            };
            if id == OTHER {
                self.let_in(node.clone()).await;
            }
            self.act(Command::AdmitNode(node)).await;
        }
        self.act(Command::PutTemplate(Template {
            name: "minimal".into(),
            digest: [0; 32],
            disk: Mib(1),
            size_bytes: 1,
            created_at: Stamp(0),
        }))
        .await;
        let id = SandboxId([7; 16]);
        let spec = SandboxSpec {
            template: "minimal".into(),
            vcpus: 1,
            memory: Mib(256),
            disk: Mib(1),
            ..SandboxSpec::default()
        };
        let team = TeamId::default();
        let hints = Vec::new();
        let create = Command::CreateSandbox {
            id,
            team,
            spec,
            hints,
        };
        let Receipt::Placed { node, epoch } = self.act(create).await else {
            panic!("not placed");
        };
        assert_eq!(node, OTHER);
        self.seal(id, epoch).await;
    }

    async fn seal(&self, id: SandboxId, epoch: Epoch) {
        let report = |report| Command::ReportSandbox {
            id,
            epoch,
            node: OTHER,
            report,
        };
        self.act(report(Report::Running(GuestVersions::default())))
            .await;
        self.act(Command::PauseSandbox {
            id,
            epoch,
            cause: StopCause::Asked,
            then_on: None,
        })
        .await;
        let state = self.proposer.view().state();
        let pause = state.sandbox(id).unwrap().pause;
        self.act(report(Report::Sealed(Told {
            id: SNAPSHOT,
            digest: self.world.sealed.digest().0,
            pause,
            ..Told::default()
        })))
        .await;
        assert_eq!(self.holders(), [OTHER].into());
    }

    fn holders(&self) -> BTreeSet<NodeId> {
        let state = self.proposer.view().state();
        state.snapshot(SNAPSHOT).unwrap().holders.clone()
    }

    async fn says_it_holds(&self) {
        let hold = Command::HoldSnapshot {
            id: SNAPSHOT,
            node: HERE,
            holds: true,
        };
        self.act(hold).await;
    }

    fn start(&self) {
        let copies = Copies {
            here: HERE,
            view: self.proposer.view(),
            proposer: self.proposer.clone(),
            store: self.world.store.clone(),
            holders: Arc::new(self.peers.clone()),
        };
        copies.spawn(&self.tasks);
    }

    async fn wait_for_holders(&self, holders: impl Into<BTreeSet<NodeId>>) {
        let holders = holders.into();
        let is_so = |state: &raft::state::State| {
            let snapshot = state.snapshot(SNAPSHOT)?;
            (snapshot.holders == holders).then_some(())
        };
        let deadline = Instant::now() + LONG;
        let found = self.proposer.view().wait_for(deadline, is_so).await;
        assert!(found.is_some(), "held by {:?}", self.holders());
    }

    /// Damages a chunk of the copy here, and has it read by somebody.
    fn damage(&self) -> ChunkId {
        let chunk = self.world.sealed.memory_chunks()[5];
        let place = self.world.store.locate(&chunk).unwrap();
        let pack = fs::OpenOptions::new().write(true).open(&place.pack);
        let pack = pack.unwrap();
        pack.write_all_at(b"????", place.offset_bytes + 9).unwrap();
        self.world.store.get(&chunk).unwrap_err();
        chunk
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_store_is_gone_is_no_holder_until_it_has_a_new_copy() {
    let pair = Pair::new().await;
    pair.says_it_holds().await;
    pair.away.store(true, Ordering::Relaxed);
    pair.start();
    pair.wait_for_holders([OTHER]).await;
    pair.away.store(false, Ordering::Relaxed);
    pair.wait_for_holders([HERE, OTHER]).await;
    pair.tasks.stop_and_join().await;
    pair.world.assert_whole_after_restart();
}

/// A guest was started from it here, and the rest came while it ran.
#[tokio::test(start_paused = true)]
async fn a_copy_that_came_piecemeal_is_told_once_it_is_whole() {
    let pair = Pair::new().await;
    let mut settings = pair.proposer.view().state().settings();
    settings.replicas = 1;
    // Nobody need copy it.
    let id = ClusterId([1; 16]);
    pair.act(Command::FoundCluster { id, settings }).await;
    pair.start();
    let digest = pair.world.sealed.digest();
    let peers = Arc::new(pair.peers.clone());
    let incoming = pair.world.store.fetch_lazily(digest, peers).await.unwrap();
    drop(incoming.complete().await.unwrap());
    pair.wait_for_holders([HERE, OTHER]).await;
    pair.tasks.stop_and_join().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_nobody_knows_of_is_told() {
    let pair = Pair::new().await;
    let digest = pair.world.sealed.digest();
    drop(pair.world.store.fetch(digest, &pair.peers).await.unwrap());
    pair.away.store(true, Ordering::Relaxed);
    pair.start();
    pair.wait_for_holders([HERE, OTHER]).await;
    pair.tasks.stop_and_join().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_with_a_damaged_chunk_is_mended_by_that_chunk_alone() {
    let pair = Pair::new().await;
    pair.start();
    pair.wait_for_holders([HERE, OTHER]).await;
    let asked = pair.peers.asked_of(OTHER);
    let chunk = pair.damage();
    let deadline = Instant::now() + LONG;
    while !pair.world.store.has(&chunk) {
        assert!(Instant::now() < deadline, "it was not mended");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(pair.peers.asked_of(OTHER), asked + 1);
    assert_eq!(pair.holders(), [HERE, OTHER].into());
    pair.tasks.stop_and_join().await;
    pair.world.assert_whole_after_restart();
}

#[tokio::test(start_paused = true)]
async fn a_damaged_copy_that_cannot_be_mended_is_none_until_it_can() {
    let pair = Pair::new().await;
    pair.start();
    pair.wait_for_holders([HERE, OTHER]).await;
    pair.away.store(true, Ordering::Relaxed);
    let asked = pair.peers.asked_of(OTHER);
    pair.damage();
    pair.wait_for_holders([OTHER]).await;
    pair.away.store(false, Ordering::Relaxed);
    pair.wait_for_holders([HERE, OTHER]).await;
    assert_eq!(pair.peers.asked_of(OTHER), asked + 1);
    pair.tasks.stop_and_join().await;
}
