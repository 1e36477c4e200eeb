//! What the cluster believes of a node's copies is what the node has: after a start, after damage,
//! and once it is mended. What it forgets is not copied any further.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::{ClusterId, NodeId, NodeKey, SandboxId, SnapshotId, TeamId, TokenId};
use proto::units::{Mib, Stamp};
use raft::command::{Command, Receipt, Report, StopCause};
use raft::state::{GuestVersions, Node, Resources, SandboxSpec, Sealed as Told, Template, Token};
use store_support::peers::{Peer, Peers, Sealed, Sent, World};
use tokio::time::Instant;
use wrenn_node::base::clock::SystemClock;
use wrenn_node::base::stop::Tasks;
use wrenn_node::cluster::{MemoryLog, Proposer};
use wrenn_node::reconcile::copies::Copies;
use wrenn_node::store::fetch::{Holders, Wire};
use wrenn_node::store::serve::Asked;
use wrenn_node::store::{CHUNK_BYTES, ChunkId, SnapshotDigest};

const HERE: NodeId = NodeId(1);
/// Nodes are named by the entry that let them in.
const OTHER: NodeId = NodeId(3);
const SNAPSHOT: SnapshotId = SnapshotId([9; 16]);
/// Comes before it in every list.
const FIRST: SnapshotId = SnapshotId([1; 16]);
/// Comes between the two.
const SECOND: SnapshotId = SnapshotId([2; 16]);
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
        pair.let_all_in().await;
        let digest = pair.world.sealed.digest();
        pair.pause(SandboxId([7; 16]), SNAPSHOT, digest).await;
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

    async fn let_all_in(&self) {
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
    }

    /// Has a sandbox of the other node paused as that snapshot.
    async fn pause(&self, id: SandboxId, snapshot: SnapshotId, digest: SnapshotDigest) {
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
        self.seal(id, epoch, (snapshot, digest)).await;
        assert_eq!(self.holders_of(snapshot), [OTHER].into());
    }

    async fn seal(
        &self,
        id: SandboxId,
        epoch: Epoch,
        (snapshot, digest): (SnapshotId, SnapshotDigest),
    ) {
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
            id: snapshot,
            digest: digest.0,
            pause,
            ..Told::default()
        })))
        .await;
    }

    fn holders(&self) -> BTreeSet<NodeId> {
        self.holders_of(SNAPSHOT)
    }

    fn holders_of(&self, snapshot: SnapshotId) -> BTreeSet<NodeId> {
        let state = self.proposer.view().state();
        state.snapshot(snapshot).unwrap().holders.clone()
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
        self.start_with(self.peers.clone());
    }

    fn start_with(&self, holders: impl Holders) {
        let copies = Copies {
            here: HERE,
            view: self.proposer.view(),
            proposer: self.proposer.clone(),
            store: self.world.store.clone(),
            holders: Arc::new(holders),
        };
        copies.spawn(&self.tasks);
    }

    async fn wait_for_holders(&self, holders: impl Into<BTreeSet<NodeId>>) {
        self.wait_for_holders_of(SNAPSHOT, holders).await;
    }

    async fn wait_for_holders_of(
        &self,
        snapshot: SnapshotId,
        holders: impl Into<BTreeSet<NodeId>>,
    ) {
        let holders = holders.into();
        let is_so = |state: &raft::state::State| {
            let snapshot = state.snapshot(snapshot)?;
            (snapshot.holders == holders).then_some(())
        };
        let deadline = Instant::now() + LONG;
        let found = self.proposer.view().wait_for(deadline, is_so).await;
        assert!(found.is_some(), "held by {:?}", self.holders_of(snapshot));
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

/// Snapshots that are not all with the same nodes.
#[derive(Debug)]
struct Apart(Vec<(SnapshotDigest, Peers)>);

impl Apart {
    fn of(&self, digest: SnapshotDigest) -> &Peers {
        let found = self.0.iter().find(|(of, _)| *of == digest);
        &found.expect("somebody has it").1
    }
}

impl Holders for Apart {
    fn holders(&self, digest: SnapshotDigest) -> Vec<NodeId> {
        self.of(digest).holders(digest)
    }

    fn open(&self, node: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let asked = Asked::read(&header).expect("the header is understood");
        self.of(asked.digest).open(node, header)
    }

    fn may_seal(&self, key: &NodeKey) -> bool {
        self.0.iter().all(|(_, peers)| peers.may_seal(key))
    }
}

/// Looks again and again by the clock of the test.
async fn wait_until(within: Duration, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + within;
    while !is_so() {
        assert!(Instant::now() < deadline, "it did not come about");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Another snapshot of the other node, which comes first.
struct Stalled {
    first: Sealed,
    peer: Peer,
    /// Whether nothing comes of it.
    stalls: Arc<AtomicBool>,
}

async fn with_one_that_stalls(pair: &Pair) -> (Apart, Stalled) {
    let first = Sealed::new(2, &pair.world.identity);
    pair.pause(SandboxId([8; 16]), FIRST, first.digest()).await;
    let stalls = Arc::new(AtomicBool::new(true));
    let is_stalled = Arc::clone(&stalls);
    let peer = Peer::spoiled(&first, move |_, bytes| {
        match is_stalled.load(Ordering::Relaxed) {
            true => Sent::Hangs(Vec::new()),
            false => Sent::Bytes(bytes),
        }
    });
    let peers = pair.world.peers([(OTHER, peer.clone())]);
    let sound = (pair.world.sealed.digest(), pair.peers.clone());
    let holders = Apart(vec![(first.digest(), peers), sound]);
    let stalled = Stalled {
        first,
        peer,
        stalls,
    };
    (holders, stalled)
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_stalls_holds_up_no_other_copy() {
    let pair = Pair::new().await;
    let (holders, stalled) = with_one_that_stalls(&pair).await;
    let began = Instant::now();
    pair.start_with(holders);
    pair.wait_for_holders([HERE, OTHER]).await;
    // It is given up for the first time after 20 s.
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(stalled.peer.opened(), 1, "it was begun before");
    assert_eq!(pair.holders_of(FIRST), [OTHER].into());
    stalled.stalls.store(false, Ordering::Relaxed);
    pair.wait_for_holders_of(FIRST, [HERE, OTHER]).await;
    pair.tasks.stop_and_join().await;
    let (store, dir) = (&pair.world.store, pair.world.dir.path());
    stalled.first.assert_whole_in(store, dir);
    pair.world.assert_whole_after_restart();
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_copy_that_stalls() {
    let pair = Pair::new().await;
    let (holders, stalled) = with_one_that_stalls(&pair).await;
    pair.start_with(holders);
    pair.wait_for_holders([HERE, OTHER]).await;
    assert_eq!(stalled.peer.opened(), 1);
    let began = Instant::now();
    pair.tasks.stop_and_join().await;
    assert_eq!(began.elapsed(), Duration::ZERO);
}

/// Destroyed before its second copy is there, as short-lived capsules are.
#[tokio::test(start_paused = true)]
async fn a_copy_whose_snapshot_is_forgotten_meanwhile_ends_at_once_and_leaves_its_room_to_another()
{
    let pair = Pair::new().await;
    let store = &pair.world.store;
    let slowly = |sealed| {
        let peer = Peer::slow(sealed, Duration::from_secs(3));
        pair.world.peers([(OTHER, peer)])
    };
    let (doomed, wanted) = (SandboxId([8; 16]), SandboxId([6; 16]));
    let [first, second] = [2, 4].map(|seed| Sealed::new(seed, &pair.world.identity));
    pair.pause(doomed, FIRST, first.digest()).await;
    pair.pause(wanted, SECOND, second.digest()).await;
    let last = pair.world.sealed.digest();
    pair.start_with(Apart(vec![
        (first.digest(), slowly(&first)),
        (second.digest(), slowly(&second)),
        (last, pair.peers.clone()),
    ]));
    // As many as one holder may give at once.
    let under_way = |of: &Sealed| store.transfer(of.digest()).map_or(0, |it| it.bytes_done);
    wait_until(LONG, || under_way(&first) > 0 && under_way(&second) > 0).await;
    assert_eq!(
        (store.transfer(last), pair.peers.asked_of(OTHER)),
        (None, 0)
    );

    let cause = StopCause::Asked;
    pair.act(Command::StopSandbox { id: doomed, cause }).await;
    assert_eq!(pair.proposer.view().state().snapshot(FIRST), None);
    let began = Instant::now();
    wait_until(LONG, || store.transfer(first.digest()).is_none()).await;
    pair.wait_for_holders([HERE, OTHER]).await;
    // Sooner than one more chunk of it would have come.
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(pair.holders_of(SECOND), [OTHER].into(), "still on its way");
    pair.wait_for_holders_of(SECOND, [HERE, OTHER]).await;
    pair.tasks.stop_and_join().await;
    second.assert_whole_in(store, pair.world.dir.path());
    pair.world.assert_whole_after_restart();
}

/// What it has brought is named by nothing that is durable yet.
#[tokio::test(start_paused = true)]
async fn a_collection_goes_on_beside_a_copy_that_takes_long_and_spares_what_it_has_brought() {
    let pair = Pair::new().await;
    let store = &pair.world.store;
    let seal = store.begin();
    let rubbish: Vec<ChunkId> = (1..=64)
        .map(|n| {
            let mut bytes = vec![0; CHUNK_BYTES];
            let (word, _) = bytes.split_at_mut(1);
            word[0] = n;
            seal.put(&bytes).unwrap().unwrap()
        })
        .collect();
    drop(seal);
    let slow = Peer::slow(&pair.world.sealed, Duration::from_secs(3));
    let peers = pair.world.peers([(OTHER, slow)]);
    let began = Instant::now();
    pair.start_with(peers.clone());
    while rubbish.iter().any(|id| store.has(id)) {
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "it was not collected"
        );
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let memory = pair.world.sealed.memory_chunks();
    let brought = memory.iter().filter(|id| store.has(id)).count();
    assert!(0 < brought && brought < memory.len(), "{brought}");
    assert_eq!(pair.holders(), [OTHER].into());
    pair.wait_for_holders([HERE, OTHER]).await;
    let asked = peers.asked();
    let once: BTreeSet<_> = asked.iter().collect();
    assert_eq!(once.len(), asked.len(), "something was collected");
    pair.tasks.stop_and_join().await;
    pair.world.assert_whole_after_restart();
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
    wait_until(LONG, || pair.world.store.has(&chunk)).await;
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
