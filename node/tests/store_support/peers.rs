//! Nodes that have a snapshot: real stores behind pipes, with somebody in between who spoils what
//! they send. Time is moved by hand.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId};
use proto::units::{Mib, Stamp};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use transport::Identity;
use wrenn_node::store::fetch::{Holders, Wire};
use wrenn_node::store::serve::{Asked, Wants};
use wrenn_node::store::snapshot::{GuestFacts, MachineFacts, Running};
use wrenn_node::store::{
    CHUNK_BYTES, ChunkId, Content, ImageDigest, SignedSnapshot, SnapshotDigest, SnapshotManifest,
    Store,
};

use super::{LIMITS, content, file_with};

/// Bytes of the memory image: more chunks than a few requests name, with a hole in the middle.
pub(crate) const MEMORY_MIB: u32 = 6;
/// Room in a pipe: less than a chunk, so that both ends wait for each other.
const PIPE_BYTES: usize = 10_000;
/// Manifests that a holder sends: the snapshot and three images.
pub(crate) const MANIFESTS: usize = 4;

pub(crate) const BAD: NodeId = NodeId(8);
pub(crate) const GOOD: NodeId = NodeId(9);

/// A snapshot that one store has.
pub(crate) struct Sealed {
    pub(crate) store: Store,
    pub(crate) signed: SignedSnapshot,
    pub(crate) images: [Vec<u8>; 3],
    _dir: TempDir,
}

impl Sealed {
    pub(crate) fn new(seed: u64, identity: &Identity) -> Self {
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
            running: Some(Running {
                memory,
                device_state,
            }),
            disk,
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

    pub(crate) fn digest(&self) -> SnapshotDigest {
        self.signed.digest()
    }

    /// How many different chunks it has.
    pub(crate) fn chunks(&self) -> usize {
        usize::try_from(self.store.stats().unwrap().chunks).unwrap()
    }

    /// The chunks of its memory, in order.
    pub(crate) fn memory_chunks(&self) -> Vec<ChunkId> {
        let memory = self.signed.manifest().running.unwrap().memory.digest;
        let manifest = self.store.image(&memory).unwrap();
        let chunks = manifest.extents().iter();
        let chunks = chunks.filter_map(|extent| match extent.content {
            Content::Hole => None,
            Content::Chunk { id, .. } => Some(id),
        });
        chunks.collect()
    }

    /// Sees that all of it is in that store, byte for byte.
    pub(crate) fn assert_whole_in(&self, store: &Store, dir: &Path) {
        let signed = store.snapshot(&self.digest()).unwrap();
        assert_eq!(signed, self.signed);
        let path = dir.join("out");
        for (image, bytes) in signed.manifest().images().iter().zip(&self.images) {
            let manifest = store.image(&image.digest).unwrap();
            store.assemble(&manifest, image.len_bytes, &path).unwrap();
            assert!(fs::read(&path).unwrap() == *bytes, "other bytes arrived");
        }
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

/// Memory of which all but a stretch in the middle is random, or compresses.
fn memory(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; (MEMORY_MIB as usize) << 20];
    let mut random = StdRng::seed_from_u64(seed ^ 0x5eed);
    for (number, window) in bytes.chunks_mut(CHUNK_BYTES).enumerate() {
        match number {
            30..34 => {}
            number if number % 3 == 0 => {
                let word = random.next_u64().to_le_bytes();
                window
                    .chunks_mut(8)
                    .for_each(|part| part.copy_from_slice(&word));
            }
            _ => random.fill_bytes(window),
        }
    }
    bytes
}

/// Something on its way to a fetcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A manifest, by its number in its stream.
    Manifest(usize),
    /// The answer about a chunk, counted over all streams of its holder.
    Chunk(usize, ChunkId),
}

/// What becomes of it.
pub(crate) enum Sent {
    /// These bytes instead.
    Bytes(Vec<u8>),
    /// These, and then the connection is gone.
    Last(Vec<u8>),
    /// These, and nothing more.
    Hangs(Vec<u8>),
    /// These, a while later.
    Late(Duration, Vec<u8>),
    /// These one by one, with such a pause between them.
    Trickle(Duration, Vec<u8>),
}

/// Bytes that say that a chunk is not there.
pub(crate) const LACKS: &[u8] = &[0];
/// Bytes of an answer before those of the chunk.
pub(crate) const ANSWER_HEAD: usize = 9;

type Spoil = Arc<dyn Fn(Piece, Vec<u8>) -> Sent + Send + Sync>;

/// One node that says it has a snapshot.
#[derive(Clone)]
pub(crate) struct Peer {
    store: Store,
    /// What it hands out, whatever it is asked for.
    gives: SnapshotDigest,
    spoil: Spoil,
    away: Arc<AtomicBool>,
    sent: Arc<AtomicUsize>,
    opened: Arc<AtomicUsize>,
}

impl Peer {
    pub(crate) fn honest(sealed: &Sealed) -> Self {
        Self::spoiled(sealed, |_, bytes| Sent::Bytes(bytes))
    }

    pub(crate) fn spoiled(
        sealed: &Sealed,
        spoil: impl Fn(Piece, Vec<u8>) -> Sent + Send + Sync + 'static,
    ) -> Self {
        Self {
            store: sealed.store.clone(),
            gives: sealed.digest(),
            spoil: Arc::new(spoil),
            away: Arc::default(),
            sent: Arc::default(),
            opened: Arc::default(),
        }
    }

    /// Gives what it is asked for, and lets the other wait so long for each chunk.
    pub(crate) fn slow(sealed: &Sealed, by: Duration) -> Self {
        Self::spoiled(sealed, move |piece, bytes| match piece {
            Piece::Manifest(_) => Sent::Bytes(bytes),
            Piece::Chunk(..) => Sent::Late(by, bytes),
        })
    }

    /// Cannot be reached while that is set.
    pub(crate) fn away(sealed: &Sealed) -> (Self, Arc<AtomicBool>) {
        let peer = Self::honest(sealed);
        let away = Arc::clone(&peer.away);
        away.store(true, Ordering::Relaxed);
        (peer, away)
    }

    /// Streams that were opened to it.
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::Relaxed)
    }

    fn connect(&self, node: NodeId, asked: Asked, counted: &Counted) -> DuplexStream {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let (mut server, near) = tokio::io::duplex(PIPE_BYTES);
        let (far, fetcher) = tokio::io::duplex(PIPE_BYTES);
        let store = self.store.clone();
        let serves = Asked {
            digest: self.gives,
            ..asked
        };
        tokio::spawn(async move { store.serve(serves, &mut server).await });
        let (answers, requests) = tokio::io::split(near);
        let (from_fetcher, to_fetcher) = tokio::io::split(far);
        let names = Arc::default();
        let pieces = pass_pieces(
            answers,
            to_fetcher,
            asked.wants,
            self.clone(),
            Arc::clone(&names),
        );
        let names = pass_names(from_fetcher, requests, node, counted.clone(), names);
        tokio::spawn(async move {
            // A node that dies takes both directions with it.
            tokio::select! {
                _ended = pieces => {}
                _gone = names => {}
            }
        });
        fetcher
    }
}

/// The names that were asked for on a stream and have no answer yet.
type Names = Arc<Mutex<VecDeque<ChunkId>>>;

/// Passes on what a holder sends, spoiled. Ends with the connection, as a node that dies does.
async fn pass_pieces(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    wants: Wants,
    peer: Peer,
    names: Names,
) -> io::Result<()> {
    let mut manifests = if wants == Wants::Manifests {
        0..MANIFESTS
    } else {
        0..0
    };
    loop {
        let (piece, bytes) = match manifests.next() {
            Some(number) => (Piece::Manifest(number), read_manifest(&mut from).await?),
            None => {
                let bytes = read_answer(&mut from).await?;
                let id = names.lock().unwrap().pop_front().expect("it was asked for");
                let number = peer.sent.fetch_add(1, Ordering::Relaxed);
                (Piece::Chunk(number, id), bytes)
            }
        };
        match (peer.spoil)(piece, bytes) {
            Sent::Bytes(bytes) => to.write_all(&bytes).await?,
            Sent::Last(bytes) => {
                to.write_all(&bytes).await?;
                return to.shutdown().await;
            }
            Sent::Hangs(bytes) => {
                to.write_all(&bytes).await?;
                std::future::pending().await
            }
            Sent::Late(pause, bytes) => {
                tokio::time::sleep(pause).await;
                to.write_all(&bytes).await?;
            }
            Sent::Trickle(pause, bytes) => {
                for byte in bytes {
                    tokio::time::sleep(pause).await;
                    to.write_u8(byte).await?;
                }
            }
        }
    }
}

async fn read_manifest(from: &mut ReadHalf<DuplexStream>) -> io::Result<Vec<u8>> {
    let length = from.read_u32().await?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.resize(4 + length as usize, 0);
    from.read_exact(&mut bytes[4..]).await?;
    Ok(bytes)
}

async fn read_answer(from: &mut ReadHalf<DuplexStream>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![from.read_u8().await?];
    if bytes == LACKS {
        return Ok(bytes);
    }
    bytes.resize(ANSWER_HEAD, 0);
    from.read_exact(&mut bytes[1..]).await?;
    let stored = u32::from_be_bytes(bytes[5..ANSWER_HEAD].try_into().unwrap());
    bytes.resize(ANSWER_HEAD + stored as usize, 0);
    from.read_exact(&mut bytes[ANSWER_HEAD..]).await?;
    Ok(bytes)
}

/// Passes on what a fetcher asks for, and counts it.
async fn pass_names(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    node: NodeId,
    counted: Counted,
    names: Names,
) -> io::Result<()> {
    loop {
        let count = from.read_u16().await?;
        let mut bytes = vec![0; usize::from(count) * 32];
        from.read_exact(&mut bytes).await?;
        let ids: Vec<ChunkId> = bytes
            .chunks(32)
            .map(|name| ChunkId(name.try_into().unwrap()))
            .collect();
        names.lock().unwrap().extend(&ids);
        counted.lock().unwrap().entry(node).or_default().extend(ids);
        to.write_u16(count).await?;
        to.write_all(&bytes).await?;
    }
}

/// The chunks that each node was asked for.
type Counted = Arc<Mutex<BTreeMap<NodeId, Vec<ChunkId>>>>;

/// Nodes to ask, in this order, and who may seal.
#[derive(Clone, Default)]
pub(crate) struct Peers {
    pub(crate) peers: Arc<Mutex<Vec<(NodeId, Peer)>>>,
    pub(crate) sealer: Option<NodeKey>,
    /// Whether nobody can say who the holders are by now.
    pub(crate) cut_off: Arc<AtomicBool>,
    counted: Counted,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Peers")
    }
}

impl Peers {
    /// How many chunks that node was asked for.
    pub(crate) fn asked_of(&self, node: NodeId) -> usize {
        self.counted.lock().unwrap().get(&node).map_or(0, Vec::len)
    }

    /// Every chunk that was asked for, of whomever.
    pub(crate) fn asked(&self) -> Vec<ChunkId> {
        let counted = self.counted.lock().unwrap();
        counted.values().flatten().copied().collect()
    }
}

impl Holders for Peers {
    fn holders(&self, _: SnapshotDigest) -> Vec<NodeId> {
        let peers = self.peers.lock().unwrap();
        peers.iter().map(|(node, _)| *node).collect()
    }

    fn open(&self, node: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let asked = Asked::read(&header).expect("the header is understood");
        let peers = self.peers.lock().unwrap();
        let peer = peers.iter().find(|(id, _)| *id == node);
        let opened: io::Result<Box<dyn Wire>> = match peer {
            Some((_, peer)) if !peer.away.load(Ordering::Relaxed) => {
                Ok(Box::new(peer.connect(node, asked, &self.counted)))
            }
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        Box::pin(async { opened })
    }

    fn may_seal(&self, key: &NodeKey) -> bool {
        self.sealer == Some(*key)
    }

    fn renew(&self) -> BoxFuture<'_, bool> {
        let known = !self.cut_off.load(Ordering::Relaxed);
        Box::pin(async move { known })
    }
}

/// A store with nothing in it, a snapshot elsewhere, and who has sealed it.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) store: Store,
    pub(crate) sealed: Arc<Sealed>,
    pub(crate) identity: Arc<Identity>,
}

impl World {
    pub(crate) fn new() -> Self {
        let identity = Identity::ephemeral().unwrap();
        let sealed = Sealed::new(1, &identity);
        Self::of(Arc::new(sealed), Arc::new(identity))
    }

    /// The same world once more, before anything was fetched.
    pub(crate) fn anew(&self) -> Self {
        Self::of(Arc::clone(&self.sealed), Arc::clone(&self.identity))
    }

    fn of(sealed: Arc<Sealed>, identity: Arc<Identity>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            store: Store::open(&dir.path().join("store"), LIMITS).unwrap(),
            sealed,
            dir,
            identity,
        }
    }

    pub(crate) fn peers(&self, peers: impl IntoIterator<Item = (NodeId, Peer)>) -> Peers {
        Peers {
            peers: Arc::new(Mutex::new(peers.into_iter().collect())),
            sealer: Some(self.identity.key()),
            cut_off: Arc::default(),
            counted: Counted::default(),
        }
    }

    /// Sees that all of the snapshot is here and survives a restart.
    pub(crate) fn assert_whole_after_restart(self) {
        drop(self.store);
        let store = Store::open(&self.dir.path().join("store"), LIMITS).unwrap();
        self.sealed.assert_whole_in(&store, self.dir.path());
    }
}
