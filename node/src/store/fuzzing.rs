//! What lies in the store's directory and what comes from other stores, as fuzz targets.

use std::fs;
use std::io::Cursor;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::LazyLock;

use proto::epoch::Epoch;
use proto::fuzzing::{Target, scratch};
use proto::ids::SandboxId;
use proto::units::{Mib, Stamp};
use tempfile::TempDir;
use transport::Identity;

use super::codec::{Decoder, Encoder, Encoding};
use super::disk::{Overlay, rebase};
use super::exchange::{Answer, Asked, Carried, Wants, read_answer, write_answer};
use super::extent::{Content, Extent};
use super::index::Place;
use super::index::guard::Guard;
use super::manifest::{MAX_IMAGE_BYTES, Manifest};
use super::pack::{Depth, FIRST_RECORD, Found, Pack};
use super::packs::Limits;
use super::record::{ALIGN, HEAD_BYTES, Head, MAX_RECORD_BYTES};
use super::snapshot::{
    GuestFacts, ImageRef, MachineFacts, Running, SignedSnapshot, SnapshotDigest, SnapshotManifest,
};
use super::{CHUNK_BYTES, ChunkId, Kept, Store};
use crate::fuzzing::{file_with, hashed, now};

mod rounds;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "pack-head",
        samples: || vec![Sealed::new().head()],
        run: pack_head,
    },
    Target {
        name: "pack-walk",
        samples: || vec![Sealed::new().pack],
        run: pack_walk,
    },
    Target {
        name: "store-open",
        samples: || vec![Sealed::new().pack],
        run: store_open,
    },
    Target {
        name: "chunk",
        samples: chunks,
        run: chunk,
    },
    Target {
        name: "image-manifest",
        samples: manifests,
        run: manifest,
    },
    Target {
        name: "signed-snapshot",
        samples: signed_snapshots,
        run: signed_snapshot,
    },
    Target {
        name: "index-guard",
        samples: guards,
        run: guard,
    },
    Target {
        name: "index-row",
        samples: rows,
        run: row,
    },
    Target {
        name: "scrub-rounds",
        samples: rounds::samples,
        run: rounds::run,
    },
    Target {
        name: "overlay-header",
        samples: overlays,
        run: overlay,
    },
    Target {
        name: "store-header",
        samples: || vec![asked(Wants::Chunks).header()],
        run: header,
    },
    Target {
        name: "store-serve",
        samples: requests,
        run: serve,
    },
    Target {
        name: "store-answer",
        samples: answers,
        run: answer,
    },
];

/// Room for what the targets store, and none for the usual reserve.
const LIMITS: Limits = Limits {
    keep_free_bytes: 0,
    budget_bytes: 64 << 20,
    pack_bytes: 1 << 20,
};
const PACK: u32 = 7;
const OFFSET: u32 = 64;
const DISK: Mib = Mib(16);

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity::ephemeral().expect("randomness"));

/// A store with one small snapshot in it, and the bytes of it all.
struct Sealed {
    store: Store,
    signed: SignedSnapshot,
    chunks: Vec<(ChunkId, Vec<u8>)>,
    pack: Vec<u8>,
    _kept: Kept,
    _dir: TempDir,
}

impl Sealed {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(scratch()).expect("a directory");
        let store = Store::open(dir.path(), LIMITS).expect("a new store");
        let seal = store.begin();
        let contents = [b"memory ".repeat(800), vec![3; CHUNK_BYTES], noise()];
        let chunks = contents.map(|bytes| {
            let id = ChunkId::of(&bytes);
            seal.put_named(id, &bytes).expect("there is room");
            (id, bytes)
        });
        let images = [
            image(Mib(1).bytes(), chunks[1].0),
            image(Mib(2).bytes(), chunks[1].0),
            image(1 << 20, chunks[1].0),
        ];
        for image in &images {
            seal.put_image(image);
        }
        let signed = SignedSnapshot::sign(snapshot(&images), &IDENTITY).expect("it is sound");
        let kept = seal.finish(Some(&signed)).expect("there is room");
        Self {
            pack: pack_in(dir.path()),
            store,
            signed,
            chunks: chunks.into(),
            _kept: kept,
            _dir: dir,
        }
    }

    /// The first record, as it would lie where [`pack_head`] looks.
    fn head(&self) -> Vec<u8> {
        let (id, bytes) = &self.chunks[0];
        let head = Head::new(*id, bytes.len(), Encoding::Raw, bytes).expect("a sound record");
        head.encode(PACK, OFFSET).to_vec()
    }
}

/// Bytes that no codec makes smaller.
fn noise() -> Vec<u8> {
    let mut bytes = vec![0; 3000];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// One chunk, and a hole behind it.
fn image(bytes: u64, id: ChunkId) -> Manifest {
    let first = Extent {
        start_bytes: 0,
        len_bytes: CHUNK_BYTES as u64,
        content: Content::Chunk {
            id,
            within_bytes: 0,
        },
    };
    let rest = Extent {
        start_bytes: first.end_bytes(),
        len_bytes: bytes - first.end_bytes(),
        content: Content::Hole,
    };
    Manifest::new(bytes, [first, rest]).expect("it is sound")
}

fn snapshot(images: &[Manifest; 3]) -> SnapshotManifest {
    let [memory, disk, device_state] = images.each_ref().map(|image| ImageRef {
        digest: image.digest(),
        len_bytes: image.image_bytes(),
    });
    SnapshotManifest {
        sandbox: SandboxId([3; 16]),
        epoch: Epoch(7),
        created_at: Stamp(1_700_000_000_000),
        parent: Some(SnapshotDigest([5; 32])),
        running: Some(Running {
            memory,
            device_state,
        }),
        disk,
        working_set: None,
        base: image(1 << 20, ChunkId([9; 32])).digest(),
        machine: MachineFacts {
            driver: "qemu".into(),
            driver_version: "7.2.19".into(),
            machine_type: "pc-q35-7.2".into(),
            cpu_model: "tcg-1".into(),
            accelerator: "tcg".into(),
            vcpus: 2,
            memory: Mib(1),
        },
        guest: GuestFacts {
            kernel: "6.1.0".into(),
            initramfs: "0.1.0".into(),
            agent: "0.1.0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            address: Ipv4Addr::new(169, 254, 0, 21),
            prefix: 30,
            gateway: Ipv4Addr::new(169, 254, 0, 22),
            token: "secret".into(),
        },
    }
}

fn packs_of(store: &Path) -> std::path::PathBuf {
    store.join("packs")
}

/// The bytes of a store's only pack.
fn pack_in(store: &Path) -> Vec<u8> {
    let listed = fs::read_dir(packs_of(store)).expect("a store has packs");
    let first = listed.flatten().next().expect("one was written");
    fs::read(first.path()).expect("just written")
}

fn pack_head(bytes: &[u8]) {
    check_head(bytes);
    let mut mended = bytes.to_vec();
    mend_head(&mut mended, PACK, OFFSET, 0);
    check_head(&mended);
}

fn check_head(bytes: &[u8]) {
    if let Some(head) = Head::parse(PACK, OFFSET, bytes) {
        assert_eq!(head.encode(PACK, OFFSET), bytes[..HEAD_BYTES]);
        assert!(head.record_bytes() as usize <= MAX_RECORD_BYTES);
        assert!(head.chunk_bytes as usize <= CHUNK_BYTES);
    }
}

/// Makes the checksum of a head at `at` right, as somebody would who knows the format.
fn mend_head(bytes: &mut [u8], pack: u32, offset: u32, at: usize) {
    let Some(head) = bytes
        .get_mut(at..)
        .and_then(|rest| rest.get_mut(..HEAD_BYTES))
    else {
        return;
    };
    let seed = crc32c::crc32c(&pack.to_le_bytes());
    let seed = crc32c::crc32c_append(seed, &offset.to_le_bytes());
    let crc = crc32c::crc32c_append(seed, &head[4..]);
    head[..4].copy_from_slice(&crc.to_le_bytes());
}

/// Walks a pack as it is, and with the checksums of its records' heads made right.
fn pack_walk(bytes: &[u8]) {
    walk(bytes);
    walk(&with_mended_heads(bytes));
}

fn with_mended_heads(bytes: &[u8]) -> Vec<u8> {
    let mut mended = bytes.to_vec();
    let mut at = FIRST_RECORD;
    while (at as usize) < mended.len() {
        mend_head(&mut mended, 1, at, at as usize);
        let head = mended.get(at as usize..).unwrap_or_default();
        at += Head::parse(1, at, head).map_or(ALIGN, |head| head.record_bytes());
    }
    mended
}

/// What a walk shows lies side by side and ends where the pack does.
fn walk(bytes: &[u8]) {
    let (dir, _path) = file_with(&Pack::file_name(1), bytes);
    let (pack, _title) = Pack::open(dir.path(), 1).expect("it is there");
    for depth in [Depth::Heads, Depth::Bodies] {
        let mut reached = FIRST_RECORD;
        let sound_to = pack.walk(depth, |found| {
            let (from, to) = match found {
                Found::Record { offset, head, .. } => (offset, offset + head.record_bytes()),
                Found::Gap { from, to } => (from, to),
            };
            assert!(from == reached && to > from, "{reached} {from} {to}");
            reached = to;
            Ok(())
        });
        assert!(sound_to.expect("the disk is well") <= pack.end());
        assert_eq!(reached, pack.end());
    }
}

/// Opens a store over a damaged pack: what can be read is right, the rest can be put again.
fn store_open(bytes: &[u8]) {
    for bytes in [bytes, &with_mended_heads(bytes)] {
        let dir = tempfile::tempdir_in(scratch()).expect("a directory");
        fs::create_dir_all(packs_of(dir.path())).expect("a directory");
        fs::write(packs_of(dir.path()).join(Pack::file_name(1)), bytes).expect("written");
        // One of another version is refused whole, by name.
        if let Ok(store) = Store::open(dir.path(), LIMITS) {
            use_store(&store);
        }
    }
}

fn use_store(store: &Store) {
    let text = b"memory ".repeat(800);
    for bytes in [&text, &vec![3; CHUNK_BYTES], &noise()] {
        let id = ChunkId::of(bytes);
        if let Ok(read) = store.get(&id) {
            assert_eq!(&read, bytes, "wrong bytes of {id}");
        }
        let seal = store.begin();
        seal.put_named(id, bytes).expect("there is room");
        let read = store.get(&id);
        assert_eq!(read.as_ref().ok(), Some(bytes), "{id} cannot be mended");
    }
    store.check().expect("the disk is well");
}

/// Encoding, claimed length, name, and what a pack stores.
fn chunks() -> Vec<Vec<u8>> {
    let text = b"the same words again, ".repeat(300);
    let stored = |encoding: u8, bytes: &[u8], stored: &[u8]| {
        let length = u32::try_from(bytes.len()).expect("a chunk").to_le_bytes();
        [&[encoding], &length[..], &ChunkId::of(bytes).0, stored].concat()
    };
    let shrunk = Encoder::new().expect("memory").shrink(&text);
    let shrunk = shrunk.expect("it repeats itself");
    vec![stored(1, &text, &shrunk), stored(0, &noise(), &noise())]
}

fn chunk(bytes: &[u8]) {
    let Some((&[encoding, a, b, c, d], rest)) = bytes.split_first_chunk::<5>() else {
        return;
    };
    let Some((id, stored)) = rest.split_first_chunk::<32>() else {
        return;
    };
    let encoding = match encoding % 2 {
        0 => Encoding::Raw,
        _ => Encoding::Zstd,
    };
    let length = u32::from_le_bytes([a, b, c, d]);
    let mut decoder = Decoder::new().expect("memory");
    if let Ok(chunk) = decoder.decode(ChunkId(*id), encoding, stored, length) {
        assert_eq!(chunk.len(), length as usize);
        assert_eq!(ChunkId::of(&chunk), ChunkId(*id));
        assert!(chunk.len() <= CHUNK_BYTES);
    }
}

fn manifests() -> Vec<Vec<u8>> {
    let id = ChunkId([1; 32]);
    let small = image(1 << 20, id);
    let part = |start: u64, blocks: u64, content| Extent {
        start_bytes: start * 4096,
        len_bytes: blocks * 4096,
        content,
    };
    let within = |within_bytes| Content::Chunk { id, within_bytes };
    let pieces = [
        part(0, 3, Content::Hole),
        part(3, 16, within(0)),
        part(19, 2, within(8192)),
        part(21, 11, Content::Hole),
    ];
    let mixed = Manifest::new(32 * 4096, pieces).expect("it is sound");
    vec![small.encode(), mixed.encode()]
}

/// What is taken covers its image exactly, in order, inside its chunks, and has one spelling.
fn manifest(bytes: &[u8]) {
    let Ok(read) = Manifest::decode(bytes) else {
        return;
    };
    assert_eq!(read.encode(), bytes, "a second spelling");
    assert!(read.image_bytes() <= MAX_IMAGE_BYTES);
    let mut reached = 0;
    for extent in read.extents() {
        assert!(extent.start_bytes == reached && extent.len_bytes > 0);
        if let Content::Chunk { within_bytes, .. } = extent.content {
            assert!(u64::from(within_bytes) + extent.len_bytes <= CHUNK_BYTES as u64);
        }
        assert_eq!(read.extent_at(reached), Some(extent));
        reached = extent.end_bytes();
    }
    assert_eq!(reached, read.image_bytes());
}

/// One of each version: the second names a working set, the third a disk alone.
fn signed_snapshots() -> Vec<Vec<u8>> {
    let first = Sealed::new().signed;
    let mut manifest = first.manifest().clone();
    manifest.working_set = Some(manifest.disk);
    let second = SignedSnapshot::sign(manifest.clone(), &IDENTITY).expect("it is sound");
    (manifest.running, manifest.working_set) = (None, None);
    let third = SignedSnapshot::sign(manifest, &IDENTITY).expect("it is sound");
    vec![first.encode(), second.encode(), third.encode()]
}

/// Reads it as it came, and its body signed anew by a node that may seal.
fn signed_snapshot(bytes: &[u8]) {
    if let Ok(read) = SignedSnapshot::decode(bytes, |_| true) {
        assert_eq!(read.encode(), bytes, "a second spelling");
    }
    assert!(SignedSnapshot::decode(bytes, |_| false).is_err());
    // Head, version, key and signature.
    let body = bytes.get(8 + 4 + 32 + 64..).unwrap_or_default();
    let Ok(manifest) = SnapshotManifest::decode(body) else {
        return;
    };
    assert_eq!(manifest.encode().as_deref(), Ok(body), "a second spelling");
    let signed = SignedSnapshot::sign(manifest, &IDENTITY).expect("it was read");
    let read = SignedSnapshot::decode(&signed.encode(), |key| *key == IDENTITY.key());
    assert_eq!(read, Ok(signed));
}

fn guards() -> Vec<Vec<u8>> {
    let guard = Guard {
        entries: 3,
        sum: 77,
        packs: [(1, 4000), (2, 16)].into(),
    };
    vec![guard.encode()]
}

fn guard(bytes: &[u8]) {
    for bytes in [bytes, &hashed(bytes)] {
        if let Some(read) = Guard::decode(bytes) {
            assert_eq!(Guard::decode(&read.encode()), Some(read));
        }
    }
}

fn rows() -> Vec<Vec<u8>> {
    let place = Place {
        pack: 1,
        offset: 64,
        stored_bytes: 3000,
        chunk_bytes: 65536,
        encoding: Encoding::Zstd,
    };
    vec![place.encode().to_vec()]
}

fn row(bytes: &[u8]) {
    if let Ok(place) = Place::decode(bytes) {
        assert_eq!(place.encode(), bytes);
        let _length = place.record_bytes();
    }
}

fn overlays() -> Vec<Vec<u8>> {
    let (dir, base) = file_with("base.raw", &[0; 4096]);
    let path = dir.path().join("overlay");
    let overlay = Overlay {
        base: &base,
        size: DISK,
    };
    overlay.create(&path).expect("there is room");
    let mut head = fs::read(&path).expect("just made");
    head.truncate(512);
    vec![head]
}

/// An overlay that is taken names the image it was put on, and no other file.
fn overlay(bytes: &[u8]) {
    let (_dir, path) = file_with("overlay", bytes);
    let base = Path::new("/images/0123.raw");
    if rebase(&path, base, DISK).is_err() {
        assert_eq!(
            fs::read(&path).expect("still there"),
            bytes,
            "it was touched"
        );
        return;
    }
    let head = fs::read(&path).expect("still there");
    let word = |at: usize| {
        let word = head[at..at + 4].try_into().expect("four bytes");
        u32::from_be_bytes(word) as usize
    };
    let (at, length) = (word(12), word(16));
    assert_eq!(word(8), 0);
    assert_eq!(&head[at..at + length], base.as_os_str().as_encoded_bytes());
    let features = [32, 60, 72, 76].map(word);
    assert_eq!(features, [0; 4], "it wants what ours do not have");
}

fn asked(wants: Wants) -> Asked {
    let digest = SnapshotDigest([7; 32]);
    Asked { digest, wants }
}

fn header(bytes: &[u8]) {
    if let Some(asked) = Asked::read(bytes) {
        assert_eq!(asked.header()[..], *bytes);
    }
}

/// What a fetcher sends behind its header: names that are here, names that are not, and the end.
fn requests() -> Vec<Vec<u8>> {
    let sealed = Sealed::new();
    let mut bytes = 2_u16.to_be_bytes().to_vec();
    bytes.extend(sealed.chunks[1].0.0);
    bytes.extend([4; 32]);
    bytes.extend(0_u16.to_be_bytes());
    vec![bytes]
}

thread_local! {
    /// Kept from one input to the next: opening one takes longer than an input.
    static SERVED: Sealed = Sealed::new();
}

fn serve(bytes: &[u8]) {
    SERVED.with(|sealed| {
        for wants in [Wants::Manifests, Wants::Chunks, Wants::Urgent] {
            let mut stream = tokio::io::join(Cursor::new(bytes.to_vec()), tokio::io::sink());
            let digest = sealed.signed.digest();
            let _refused = now(sealed.store.serve(Asked { digest, wants }, &mut stream));
        }
    });
}

/// What a holder says to a name: a chunk as it lies in a pack, or that it lacks it.
fn answers() -> Vec<Vec<u8>> {
    let here = |encoding, stored: &[u8]| {
        Answer::Here(Carried {
            encoding,
            chunk_bytes: 300,
            stored: stored.to_vec().into(),
        })
    };
    let all = [
        here(Encoding::Raw, &[3; 300]),
        here(Encoding::Zstd, &[5; 40]),
        Answer::Lacks,
    ];
    all.iter().map(said).collect()
}

fn said(answer: &Answer) -> Vec<u8> {
    let mut bytes = Vec::new();
    now(write_answer(&mut bytes, answer)).expect("memory takes all");
    bytes
}

fn answer(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(answer) = now(read_answer(&mut rest)) {
        if let Answer::Here(carried) = &answer {
            assert!(carried.stored.len() <= CHUNK_BYTES, "more than a chunk");
        }
        let again = now(read_answer(&mut &said(&answer)[..]));
        assert_eq!(again.expect("it was just said"), answer);
    }
}
