//! Snapshots go from store to store: all of one arrives byte for byte, or the next holder is asked
//! for what is still missing.
//!
//! A peer here is a real store behind a pipe, and somebody in between who spoils one of the parts
//! that it sends. Time is moved by hand.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId};
use proto::units::{Mib, Stamp};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use store_support::{LIMITS, content, file_with};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::Instant;
use transport::Identity;
use wrenn_node::store::fetch::{FetchError, Holders, NoHolders, Wire};
use wrenn_node::store::serve::{ServeError, asked_for, header_for};
use wrenn_node::store::snapshot::{GuestFacts, MachineFacts};
use wrenn_node::store::{
    CHUNK_BYTES, ChunkId, ImageDigest, SignedSnapshot, SnapshotDigest, SnapshotManifest, Store,
};

/// Bytes of the memory image: more chunks than one request names, with a hole in the middle.
const MEMORY_MIB: u32 = 7;
/// Chunks that one request names at most.
const AT_ONCE: usize = 64;
/// Parts that a holder sends before the first chunk: the snapshot and three manifests.
const PREFACE: usize = 4;
/// A chunk in the second request: all of the first has been stored when it comes.
const LATE: usize = AT_ONCE + 6;
/// Longer than any peer may keep silent, and far shorter than for ever.
const LONG: Duration = Duration::from_secs(60);
/// Room in a pipe: less than a chunk, so that both ends wait for each other.
const PIPE_BYTES: usize = 10_000;

const BAD: NodeId = NodeId(8);
const GOOD: NodeId = NodeId(9);

/// A snapshot that one store has.
struct Sealed {
    store: Store,
    signed: SignedSnapshot,
    images: [Vec<u8>; 3],
    _dir: TempDir,
}

impl Sealed {
    fn new(seed: u64, identity: &Identity) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), LIMITS).unwrap();
        let images = [memory(seed), content(seed), content(seed + 1)];
        let seal = store.begin();
        let [memory, disk, device_state] = [0, 1, 2].map(|at| {
            let file = file_with(&dir.path().join("image"), &images[at]);
            seal.image(&file, images[at].len() as u64).unwrap().image
        });
        let manifest = SnapshotManifest {
            sandbox: SandboxId([3; 16]),
            epoch: Epoch(seed),
            created_at: Stamp(1_700_000_000_000),
            parent: None,
            memory,
            disk,
            device_state,
            working_set: None,
            base: ImageDigest([6; 32]),
            machine: machine(),
            guest: guest(),
        };
        let signed = SignedSnapshot::sign(manifest, identity).unwrap();
        drop(seal.finish(Some(&signed)).unwrap());
        Self {
            store,
            signed,
            images,
            _dir: dir,
        }
    }

    fn digest(&self) -> SnapshotDigest {
        self.signed.digest()
    }

    /// How many different chunks it has.
    fn chunks(&self) -> usize {
        usize::try_from(self.store.stats().unwrap().chunks).unwrap()
    }
}

fn machine() -> MachineFacts {
    MachineFacts {
        driver: "qemu".into(),
        driver_version: "7.2.19".into(),
        machine_type: "microvm-7.2".into(),
        cpu_model: "max".into(),
        accelerator: "tcg".into(),
        vcpus: 2,
        memory: Mib(MEMORY_MIB),
    }
}

fn guest() -> GuestFacts {
    GuestFacts {
        kernel: "6.1.0".into(),
        initramfs: "0.6.7".into(),
        agent: "0.6.7".into(),
        mac: [2, 0, 0xa9, 0xfe, 0, 0x15],
        address: Ipv4Addr::new(169, 254, 0, 21),
        prefix: 30,
        gateway: Ipv4Addr::new(169, 254, 0, 22),
        token: "secret".into(),
    }
}

/// Memory of which all but a stretch in the middle is random.
fn memory(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; (MEMORY_MIB as usize) << 20];
    let (first, rest) = bytes.split_at_mut(50 * CHUNK_BYTES);
    let mut random = StdRng::seed_from_u64(seed ^ 0x5eed);
    random.fill_bytes(first);
    random.fill_bytes(&mut rest[4 * CHUNK_BYTES..]);
    bytes
}

/// What becomes of a part on its way.
enum Sent {
    Part(Vec<u8>),
    /// The length alone.
    Claim(u32),
    /// The length, half of the part, and then the connection is gone.
    Half(Vec<u8>),
    /// The part, and then the connection is gone.
    Last(Vec<u8>),
    Nothing,
    Silence,
}

/// Spoils the parts of a holder, by their number.
type Spoil = Arc<dyn Fn(usize, Vec<u8>) -> Sent + Send + Sync>;

/// One node that says it has a snapshot.
#[derive(Clone)]
struct Peer {
    store: Store,
    /// What it hands out, whatever it is asked for.
    gives: SnapshotDigest,
    spoil: Spoil,
    refuses: bool,
}

impl Peer {
    fn honest(sealed: &Sealed) -> Self {
        Self::spoiled(sealed, |_, part| Sent::Part(part))
    }

    fn spoiled(
        sealed: &Sealed,
        spoil: impl Fn(usize, Vec<u8>) -> Sent + Send + Sync + 'static,
    ) -> Self {
        Self {
            store: sealed.store.clone(),
            gives: sealed.digest(),
            spoil: Arc::new(spoil),
            refuses: false,
        }
    }

    /// Spoils one part and no other.
    fn spoiled_at(
        sealed: &Sealed,
        at: usize,
        spoil: impl Fn(Vec<u8>) -> Sent + Send + Sync + 'static,
    ) -> Self {
        Self::spoiled(sealed, move |number, part| {
            if number == at {
                spoil(part)
            } else {
                Sent::Part(part)
            }
        })
    }

    /// Connects to it; what it is asked for is counted in `asked`.
    fn connect(&self, node: NodeId, asked: &Asked) -> DuplexStream {
        let (mut server, near) = tokio::io::duplex(PIPE_BYTES);
        let (far, fetcher) = tokio::io::duplex(PIPE_BYTES);
        let (store, gives) = (self.store.clone(), self.gives);
        tokio::spawn(async move { store.serve(gives, &mut server).await });
        let (answers, requests) = tokio::io::split(near);
        let (from_fetcher, to_fetcher) = tokio::io::split(far);
        let parts = pass_parts(answers, to_fetcher, Arc::clone(&self.spoil));
        let names = pass_names(from_fetcher, requests, node, asked.clone());
        tokio::spawn(async move {
            // A node that dies takes both directions with it.
            tokio::select! {
                _ended = parts => {}
                _gone = names => {}
            }
        });
        fetcher
    }
}

/// Passes on what a holder sends, spoiled. Ends with the connection, as a node that dies does.
async fn pass_parts(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    spoil: Spoil,
) -> io::Result<()> {
    for number in 0.. {
        let Ok(length) = from.read_u32().await else {
            break;
        };
        let mut part = vec![0; length as usize];
        from.read_exact(&mut part).await?;
        match spoil(number, part) {
            Sent::Part(part) => send(&mut to, &part, part.len()).await?,
            Sent::Claim(length) => to.write_u32(length).await?,
            Sent::Half(part) => {
                send(&mut to, &part, part.len() / 2).await?;
                break;
            }
            Sent::Last(part) => {
                send(&mut to, &part, part.len()).await?;
                break;
            }
            Sent::Nothing => break,
            Sent::Silence => std::future::pending().await,
        }
    }
    to.shutdown().await
}

/// Sends the length of a part, and as many bytes of it.
async fn send(to: &mut WriteHalf<DuplexStream>, part: &[u8], bytes: usize) -> io::Result<()> {
    to.write_u32(u32::try_from(part.len()).unwrap()).await?;
    to.write_all(&part[..bytes]).await
}

/// Passes on what a fetcher asks for, and counts it.
async fn pass_names(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    node: NodeId,
    asked: Asked,
) -> io::Result<()> {
    loop {
        let count = from.read_u16().await?;
        let mut names = vec![0; usize::from(count) * 32];
        from.read_exact(&mut names).await?;
        let ids = names
            .chunks(32)
            .map(|name| ChunkId(name.try_into().unwrap()));
        asked.lock().unwrap().entry(node).or_default().extend(ids);
        to.write_u16(count).await?;
        to.write_all(&names).await?;
    }
}

/// The chunks that each node was asked for.
type Asked = Arc<Mutex<BTreeMap<NodeId, Vec<ChunkId>>>>;

/// Nodes to ask, in this order, and who may seal.
#[derive(Default)]
struct Peers {
    peers: Vec<(NodeId, Peer)>,
    sealer: Option<NodeKey>,
    asked: Asked,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Peers")
    }
}

impl Peers {
    fn asked_of(&self, node: NodeId) -> Option<usize> {
        self.asked.lock().unwrap().get(&node).map(Vec::len)
    }
}

impl Holders for Peers {
    fn holders(&self, _: SnapshotDigest) -> Vec<NodeId> {
        self.peers.iter().map(|(node, _)| *node).collect()
    }

    fn open(&self, node: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        assert!(asked_for(&header).is_some(), "the header is understood");
        let (_, peer) = self.peers.iter().find(|(id, _)| *id == node).unwrap();
        let opened: io::Result<Box<dyn Wire>> = if peer.refuses {
            Err(io::ErrorKind::ConnectionRefused.into())
        } else {
            Ok(Box::new(peer.connect(node, &self.asked)))
        };
        Box::pin(async { opened })
    }

    fn may_seal(&self, key: &NodeKey) -> bool {
        self.sealer == Some(*key)
    }
}

/// A store with nothing in it, a snapshot elsewhere, and who has sealed it.
struct World {
    dir: TempDir,
    store: Store,
    sealed: Sealed,
    identity: Identity,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::ephemeral().unwrap();
        Self {
            store: Store::open(&dir.path().join("store"), LIMITS).unwrap(),
            sealed: Sealed::new(1, &identity),
            dir,
            identity,
        }
    }

    fn peers(&self, peers: impl IntoIterator<Item = (NodeId, Peer)>) -> Peers {
        Peers {
            peers: peers.into_iter().collect(),
            sealer: Some(self.identity.key()),
            ..Peers::default()
        }
    }

    /// Fetches the snapshot, and sees that all of it is here and survives a restart.
    async fn fetch_whole(self, peers: &Peers) {
        let kept = self.store.fetch(self.sealed.digest(), peers).await.unwrap();
        drop(kept);
        drop(self.store);
        let store = Store::open(&self.dir.path().join("store"), LIMITS).unwrap();
        let signed = store.snapshot(&self.sealed.digest()).unwrap();
        assert_eq!(signed, self.sealed.signed);
        let path = self.dir.path().join("out");
        for (image, bytes) in signed.manifest().images().iter().zip(&self.sealed.images) {
            let manifest = store.image(&image.digest).unwrap();
            store.assemble(&manifest, image.len_bytes, &path).unwrap();
            assert!(fs::read(&path).unwrap() == *bytes, "other bytes arrived");
        }
    }

    /// What is said where nobody gives all of it, of which then nothing counts.
    async fn refused(&self, peers: &Peers) -> String {
        let failed = self.store.fetch(self.sealed.digest(), peers).await;
        let Err(err @ FetchError::NoHolder { .. }) = failed else {
            panic!("{failed:?}");
        };
        assert!(self.store.snapshot(&self.sealed.digest()).is_err());
        assert!(self.store.manifests().unwrap().is_empty());
        err.to_string()
    }
}

/// A holder that fails as `bad` does is named with what it did; the next one gives what is left,
/// which is all but the `arrived` chunks.
async fn gives_way(bad: impl Fn(&Sealed) -> Peer, said: &str, arrived: usize) {
    let world = World::new();
    let peers = world.peers([(BAD, bad(&world.sealed))]);
    let told = world.refused(&peers).await;
    assert!(told.contains(&format!("{BAD}: ")), "{told}");
    assert!(told.contains(said), "{told}");

    let world = World::new();
    let chunks = world.sealed.chunks();
    let peers = world.peers([
        (BAD, bad(&world.sealed)),
        (GOOD, Peer::honest(&world.sealed)),
    ]);
    world.fetch_whole(&peers).await;
    assert_eq!(peers.asked_of(GOOD), Some(chunks - arrived));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_arrives_whole_and_no_chunk_is_asked_for_twice() {
    let world = World::new();
    let chunks = world.sealed.chunks();
    assert!(chunks > AT_ONCE + 6, "it takes more than one request");
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    world.fetch_whole(&peers).await;
    assert_eq!(peers.asked_of(GOOD), Some(chunks));
}

#[tokio::test(start_paused = true)]
async fn what_is_here_already_is_asked_of_nobody() {
    let world = World::new();
    let kept = world.sealed.store.fetch(world.sealed.digest(), &NoHolders);
    kept.await.unwrap();

    // Another pause of the same guest: its memory is here, its disk is not.
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let seal = world.store.begin();
    let file = file_with(&world.dir.path().join("memory"), &world.sealed.images[0]);
    let memory = seal.image(&file, file.metadata().unwrap().len()).unwrap();
    let here = usize::try_from(seal.tally().new_chunks).unwrap();
    let _kept = seal.finish(None).unwrap();
    assert!(world.store.missing(&memory.manifest).is_empty());
    let missing = world.sealed.chunks() - here;
    world.fetch_whole(&peers).await;
    assert_eq!(peers.asked_of(GOOD), Some(missing));
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_lacks_a_chunk_gives_way() {
    let lacks =
        |sealed: &Sealed| Peer::spoiled_at(sealed, PREFACE + LATE, |_| Sent::Part(Vec::new()));
    gives_way(lacks, "it does not have chunk", AT_ONCE).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_wrong_bytes_gives_way() {
    let lies = |sealed: &Sealed| {
        Peer::spoiled_at(sealed, PREFACE + LATE, |mut chunk| {
            chunk[CHUNK_BYTES / 2] ^= 1;
            Sent::Part(chunk)
        })
    };
    // What came before the wrong one is good, and stays.
    gives_way(lies, "chunk", LATE).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_another_snapshot_gives_way() {
    let world = World::new();
    let other = Sealed::new(2, &world.identity);
    let peers = world.peers([(BAD, Peer::honest(&other))]);
    let told = world.refused(&peers).await;
    assert!(told.contains("it sent another snapshot"), "{told}");
    assert_eq!(peers.asked_of(BAD), None);
    let peers = world.peers([
        (BAD, Peer::honest(&other)),
        (GOOD, Peer::honest(&world.sealed)),
    ]);
    world.fetch_whole(&peers).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_the_manifest_of_another_image_gives_way() {
    let twice = |sealed: &Sealed| {
        let memory = sealed.signed.manifest().memory.digest;
        let memory = sealed.store.image(&memory).unwrap().encode();
        Peer::spoiled_at(sealed, 2, move |_| Sent::Part(memory.clone()))
    };
    gives_way(twice, "it sent another manifest", 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_nonsense_for_a_manifest_gives_way() {
    for at in 0..PREFACE {
        let nonsense =
            |sealed: &Sealed| Peer::spoiled_at(sealed, at, |part| Sent::Part(part[1..].to_vec()));
        gives_way(nonsense, "read ", 0).await;
    }
}

/// Nothing is set aside for what a peer only claims.
#[tokio::test(start_paused = true)]
async fn a_part_that_is_too_long_is_not_taken_in() {
    for at in [0, 1, PREFACE - 1, PREFACE + LATE] {
        let claims = |sealed: &Sealed| Peer::spoiled_at(sealed, at, |_| Sent::Claim(u32::MAX));
        let arrived = if at < PREFACE { 0 } else { AT_ONCE };
        gives_way(claims, "which is too long", arrived).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_breaks_off_gives_way() {
    for at in [0, 1, PREFACE + LATE] {
        let arrived = if at < PREFACE { 0 } else { AT_ONCE };
        let dies = |sealed: &Sealed| Peer::spoiled_at(sealed, at, |_| Sent::Nothing);
        gives_way(dies, "talk to it", arrived).await;
        let half = |sealed: &Sealed| Peer::spoiled_at(sealed, at, Sent::Half);
        gives_way(half, "talk to it", arrived).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_stalls_gives_way_in_bounded_time() {
    for at in [0, 1, PREFACE + LATE] {
        let arrived = if at < PREFACE { 0 } else { AT_ONCE };
        let began = Instant::now();
        let stalls = |sealed: &Sealed| Peer::spoiled_at(sealed, at, |_| Sent::Silence);
        gives_way(stalls, "it said nothing for", arrived).await;
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    }
}

/// All of it is here by then: whether the holder hears a goodbye is nothing to fail for.
#[tokio::test(start_paused = true)]
async fn a_holder_that_dies_after_the_last_chunk_has_given_all() {
    let world = World::new();
    let last = PREFACE + world.sealed.chunks() - 1;
    let peer = Peer::spoiled_at(&world.sealed, last, Sent::Last);
    let peers = world.peers([(BAD, peer)]);
    world.fetch_whole(&peers).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_cannot_be_reached_gives_way() {
    let away = |sealed: &Sealed| Peer {
        refuses: true,
        ..Peer::honest(sealed)
    };
    gives_way(away, "talk to it", 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_nobody_has_is_refused_by_name() {
    let world = World::new();
    let told = world.refused(&world.peers([])).await;
    assert!(told.contains("there is none"), "{told}");
    assert!(told.contains(&world.sealed.digest().to_string()), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_an_unknown_sealer_is_refused_from_whomever_it_comes() {
    let world = World::new();
    let holder = || Peer::honest(&world.sealed);
    let mut peers = world.peers([(BAD, holder()), (GOOD, holder())]);
    peers.sealer = Some(Identity::ephemeral().unwrap().key());
    let told = world.refused(&peers).await;
    let signer = world.identity.key().to_string();
    assert_eq!(told.matches(&signer).count(), 2, "{told}");
    assert_eq!((peers.asked_of(BAD), peers.asked_of(GOOD)), (None, None));
}

#[tokio::test(start_paused = true)]
async fn every_holder_that_failed_is_named_with_what_it_did() {
    let world = World::new();
    let stalls = Peer::spoiled_at(&world.sealed, 1, |_| Sent::Silence);
    let dies = Peer::spoiled_at(&world.sealed, 2, |_| Sent::Nothing);
    let told = world
        .refused(&world.peers([(BAD, stalls), (GOOD, dies)]))
        .await;
    let (first, second) = told.split_once("; ").unwrap();
    assert!(first.contains(&format!("{BAD}: it said nothing")), "{told}");
    assert!(second.contains(&format!("{GOOD}: talk to it")), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_fetcher_that_asks_for_too_much_or_goes_away_ends_only_its_own_stream() {
    let world = World::new();
    let digest = world.sealed.digest();
    for ask in [&[0xff_u8, 0xff][..], &[0], &[]] {
        let (mut server, mut fetcher) = tokio::io::duplex(1 << 20);
        fetcher.write_all(ask).await.unwrap();
        fetcher.shutdown().await.unwrap();
        let served = world.sealed.store.serve(digest, &mut server).await;
        assert!(matches!(served, Err(ServeError::Stream(_))), "{served:?}");
    }
    let (mut server, _fetcher) = tokio::io::duplex(1 << 20);
    let nobodys = SnapshotDigest([9; 32]);
    let served = world.sealed.store.serve(nobodys, &mut server).await;
    assert!(matches!(served, Err(ServeError::Read(_))), "{served:?}");
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    world.fetch_whole(&peers).await;
}

#[test]
fn a_header_names_its_snapshot_and_one_of_a_later_release_names_none() {
    let digest = SnapshotDigest([7; 32]);
    let header = header_for(digest);
    assert_eq!(asked_for(&header), Some(digest));
    for other in [&[2][..], &[], &header[..32], &[&header[..], &[0]].concat()] {
        assert_eq!(asked_for(other), None);
    }
}
