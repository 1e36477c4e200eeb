//! A store that is opened, killed, damaged, filled up and collected.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use transport::Identity;

use super::super::chunk::CHUNK_BYTES;
use super::super::collect::Collected;
use super::super::durable::TEMP_SUFFIX;
use super::super::error::SealError;
use super::super::extent::Extent;
use super::super::seal::Seal;
use super::super::snapshot::ImageRef;
use super::*;

/// Packs of a few chunks, and no regard for the machine's disk.
pub(crate) const SMALL: Limits = Limits {
    keep_free_bytes: 0,
    budget_bytes: u64::MAX,
    pack_bytes: 400_000,
};

fn open(dir: &Path) -> Store {
    Store::open(&dir.join("store"), SMALL).unwrap()
}

/// A chunk that does not compress, different for each name.
fn noise(name: u64) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK_BYTES];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&name.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

fn image_of(ids: &[ChunkId]) -> Manifest {
    let len_bytes = CHUNK_BYTES as u64;
    let extents = ids.iter().zip(0..).map(|(id, nth): (_, u64)| Extent {
        start_bytes: nth * len_bytes,
        len_bytes,
        content: Content::Chunk {
            id: *id,
            within_bytes: 0,
        },
    });
    Manifest::new(ids.len() as u64 * len_bytes, extents).unwrap()
}

/// Seals an image of these chunks.
fn seal(store: &Store, names: impl IntoIterator<Item = u64>) -> (ImageDigest, Manifest) {
    let seal = store.begin();
    let (digest, manifest) = put(&seal, names);
    seal.finish(None).unwrap();
    (digest, manifest)
}

fn put(seal: &Seal, names: impl IntoIterator<Item = u64>) -> (ImageDigest, Manifest) {
    let ids = names
        .into_iter()
        .map(|name| seal.put(&noise(name)).unwrap().unwrap());
    let manifest = image_of(&ids.collect::<Vec<_>>());
    (seal.put_image(&manifest), manifest)
}

fn collect(store: &Store, pins: &[Pin]) -> Collected {
    store
        .collect(|| Ok::<_, Infallible>(pins.to_vec()))
        .unwrap()
}

/// What would be on disk if the process were killed now.
fn killed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(&dir.join("store"), &copy.path().join("store"));
    copy
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn packs(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir.join("store/packs")).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn reads_back(store: &Store, names: impl IntoIterator<Item = u64>) {
    for name in names {
        let bytes = noise(name);
        assert!(
            store.get(&ChunkId::of(&bytes)).unwrap() == bytes,
            "chunk {name}"
        );
    }
}

/// Overwrites bytes of a file.
fn damage(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn what_was_sealed_is_read_back_in_this_life_and_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (digest, manifest) = seal(&store, 0..20);
    reads_back(&store, 0..20);
    assert!(packs(dir.path()).len() > 2, "they fill several packs");
    drop(store);

    let store = open(dir.path());
    reads_back(&store, 0..20);
    assert_eq!(store.image(&digest).unwrap(), manifest);
    assert!(store.missing(&manifest).is_empty());
}

#[test]
fn a_known_chunk_is_not_written_again_and_zeroes_never() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    seal(&store, 0..3);
    let before = store.stats().unwrap().pack_bytes;
    let seal = store.begin();
    assert_eq!(seal.put(&vec![0; CHUNK_BYTES]).unwrap(), None);
    put(&seal, 0..3);
    assert_eq!(seal.tally().reused_chunks, 3);
    assert_eq!(seal.tally().new_chunks, 0);
    assert_eq!(store.stats().unwrap().pack_bytes, before);
}

#[test]
fn a_chunk_lies_where_the_store_says() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    seal(&store, [1]);
    let text = b"these words compress well. ".repeat(2000);
    let seal = store.begin();
    let id = seal.put(&text).unwrap().unwrap();
    for (id, encoding) in [
        (ChunkId::of(&noise(1)), Encoding::Raw),
        (id, Encoding::Zstd),
    ] {
        let location = store.locate(&id).unwrap();
        assert_eq!(location.encoding, encoding);
        let mut stored = vec![0; location.stored_bytes as usize];
        let file = File::open(&location.pack).unwrap();
        file.read_exact_at(&mut stored, location.offset_bytes)
            .unwrap();
        let decoded = Decoder::new()
            .unwrap()
            .decode(id, encoding, &stored, location.chunk_bytes);
        assert_eq!(
            decoded,
            store.get(&id).map_err(|_| super::super::codec::NotTheChunk)
        );
    }
    assert_eq!(store.locate(&ChunkId([1; 32])), None);
}

#[test]
fn bytes_of_another_name_and_impossible_chunks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let seal = store.begin();
    let id = ChunkId::of(b"other");
    let refused = seal.put_named(id, b"bytes").unwrap_err();
    assert!(matches!(refused, SealError::NotTheChunk { chunk } if chunk == id));
    assert!(seal.put(&vec![1; CHUNK_BYTES + 1]).is_err());
    seal.put_named(ChunkId::of(b"bytes"), b"bytes").unwrap();
    assert_eq!(store.get(&ChunkId::of(b"bytes")).unwrap(), b"bytes");
}

#[test]
fn a_second_opener_is_refused_until_the_first_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let refused = Store::open(&dir.path().join("store"), SMALL).unwrap_err();
    assert!(matches!(refused, OpenStoreError::InUse { .. }));
    drop(first);
    open(dir.path());
}

#[test]
fn a_killed_store_opens_with_all_that_was_finished() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (_, manifest) = seal(&store, 0..20);
    let unfinished = store.begin();
    put(&unfinished, 20..23);
    let copy = killed(dir.path());

    let store = open(copy.path());
    reads_back(&store, 0..20);
    assert!(store.missing(&manifest).is_empty());
    assert!(store.check().unwrap().is_sound());
}

#[test]
fn leftovers_and_foreign_files_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (digest, _) = seal(&store, 0..3);
    drop(store);
    let place = dir.path().join("store");
    let leftover = place.join(format!("images/.x{TEMP_SUFFIX}"));
    fs::write(&leftover, b"half").unwrap();
    for foreign in ["packs/readme", "images/readme", "packs/1.pack"] {
        fs::write(place.join(foreign), b"?").unwrap();
    }
    let store = open(dir.path());
    assert!(!leftover.exists());
    assert_eq!(store.manifests().unwrap(), [Pin::Image(digest)]);
    reads_back(&store, 0..3);
}

/// Each way in which an index can be in doubt.
#[test]
fn a_doubtful_index_is_filled_in_again_from_the_packs() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 7] = [
        ("no guard", |place| {
            fs::remove_file(place.join("index.clean")).unwrap()
        }),
        ("a damaged guard", |place| {
            damage(&place.join("index.clean"), 9, b"?")
        }),
        ("no index", |place| {
            fs::remove_dir_all(place.join("index")).unwrap()
        }),
        ("a file for an index", |place| {
            fs::remove_dir_all(place.join("index")).unwrap();
            fs::write(place.join("index"), b"?").unwrap();
        }),
        ("an empty index", |place| {
            fs::write(place.join("index/db"), b"").unwrap()
        }),
        ("a damaged index", |place| {
            let db = place.join("index/db");
            let len = fs::metadata(&db).unwrap().len();
            damage(&db, len / 2, &[0xa5; 4096]);
            damage(&db, 0, &[0xa5; 64]);
        }),
        ("a longer pack", |place| {
            let pack = place.join("packs/00000000.pack");
            let file = OpenOptions::new().append(true).open(pack).unwrap();
            file.write_all_at(b"more", 1 << 20).unwrap();
        }),
    ];
    for (what, spoil) in spoils {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        seal(&store, 0..10);
        drop(store);
        spoil(&dir.path().join("store"));
        let store = open(dir.path());
        reads_back(&store, 0..10);
        seal(&store, 10..12);
        reads_back(&store, 0..12);
        drop(store);
        reads_back(&open(dir.path()), 0..12);
        println!("{what}: fine");
    }
}

#[test]
fn a_pack_of_a_later_version_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let store = open(dir.path());
    seal(&store, [1]);
    drop(store);
    damage(
        &dir.path().join("store/packs/00000000.pack"),
        8,
        &7_u32.to_le_bytes(),
    );
    let refused = Store::open(&dir.path().join("store"), SMALL).unwrap_err();
    assert!(refused.to_string().contains("has version 7"), "{refused}");
}

#[test]
fn a_torn_tail_is_cut_at_every_byte_and_what_was_whole_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    seal(&store, [1]);
    let seal = store.begin();
    let whole = fs::metadata(dir.path().join("store/packs/00000000.pack"))
        .unwrap()
        .len();
    seal.put(b"the torn one").unwrap();
    let copy = killed(dir.path());
    let pack = copy.path().join("store/packs/00000000.pack");
    let bytes = fs::read(&pack).unwrap();
    let whole = usize::try_from(whole).unwrap();
    for length in (whole..bytes.len()).step_by(3) {
        fs::write(&pack, &bytes[..length]).unwrap();
        let store = open(copy.path());
        reads_back(&store, [1]);
        assert!(!store.has(&ChunkId::of(b"the torn one")));
        assert_eq!(fs::metadata(&pack).unwrap().len(), whole as u64);
    }
}

#[test]
fn a_damaged_chunk_is_never_returned_and_can_be_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (_, manifest) = seal(&store, 0..4);
    let id = ChunkId::of(&noise(2));
    let location = store.locate(&id).unwrap();
    damage(&location.pack, location.offset_bytes + 77, b"\0\0\0\0");

    let refused = store.get(&id).unwrap_err();
    assert!(matches!(refused, ReadChunkError::Corrupt { chunk } if chunk == id));
    assert_eq!(store.missing(&manifest), [id]);
    // Not even after the index was filled in again.
    let copy = killed(dir.path());
    assert_eq!(open(copy.path()).missing(&manifest), [id]);

    seal(&store, 0..4);
    reads_back(&store, 0..4);
}

#[test]
fn a_check_finds_every_kind_of_damage_and_makes_it_missing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (first, manifest) = seal(&store, 0..12);
    let (second, _) = seal(&store, 12..14);
    assert!(store.check().unwrap().is_sound());

    let [body, head] = [3, 8].map(|name| ChunkId::of(&noise(name)));
    let location = store.locate(&body).unwrap();
    damage(&location.pack, location.offset_bytes, b"\0\0\0\0");
    let location = store.locate(&head).unwrap();
    damage(&location.pack, location.offset_bytes - 20, b"????");
    damage(
        &dir.path().join("store/images").join(second.to_string()),
        30,
        b"?",
    );

    let checked = store.check().unwrap();
    assert!(!checked.is_sound());
    assert_eq!(checked.bad_manifests, BTreeSet::from([Pin::Image(second)]));
    assert!(checked.damaged.contains(&body));
    assert_eq!(checked.incomplete[&Pin::Image(first)], 2);
    assert_eq!(store.missing(&manifest), [body, head]);
    assert_eq!(store.manifests().unwrap(), [Pin::Image(first)]);
    assert!(
        dir.path()
            .join("store/bad")
            .join(second.to_string())
            .exists()
    );

    seal(&store, 0..12);
    let checked = store.check().unwrap();
    assert!(
        checked.is_sound() && checked.incomplete.is_empty(),
        "{checked:?}"
    );
}

#[test]
fn a_seal_beyond_the_budget_fails_by_name_and_the_store_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        budget_bytes: 1_000_000,
        ..SMALL
    };
    let store = Store::open(&dir.path().join("store"), limits).unwrap();
    let (digest, _) = seal(&store, 0..4);
    let sealing = store.begin();
    let refused = (4..100)
        .find_map(|name| sealing.put(&noise(name)).err())
        .unwrap();
    assert!(matches!(refused, SealError::OverBudget { .. }), "{refused}");
    drop(sealing);
    collect(&store, &[Pin::Image(digest)]);
    seal(&store, 50..54);
    reads_back(&store, (0..4).chain(50..54));
}

#[test]
fn a_seal_leaves_the_room_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        keep_free_bytes: 1 << 60,
        ..SMALL
    };
    let store = Store::open(&dir.path().join("store"), limits).unwrap();
    let refused = store.begin().put(b"bytes").unwrap_err();
    assert!(matches!(refused, SealError::NoRoom { .. }), "{refused}");
    assert!(packs(dir.path()).is_empty());
}

/// The disk dropped what was written and says so once, as Linux does.
#[test]
fn what_a_failed_sync_lost_is_not_counted_on_by_any_seal() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (_, first) = seal(&store, 0..2);
    let (writes, reuses) = (store.begin(), store.begin());
    let (_, manifest) = put(&writes, 2..4);
    put(&reuses, 2..4);
    store.core.packs.lose_tail_for_test();
    store
        .core
        .settle(Err::<(), _>(SealError::Lost))
        .unwrap_err();

    assert_eq!(store.missing(&manifest).len(), 2);
    assert!(matches!(writes.finish(None), Err(SealError::Lost)));
    assert!(matches!(reuses.finish(None), Err(SealError::Lost)));
    assert!(store.missing(&first).is_empty());
    seal(&store, 2..4);
    reads_back(&store, 0..4);
}

#[test]
fn a_store_can_be_used_from_any_thread() {
    fn is_shared<T: Send + Sync>(_: &T) {}
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    is_shared(&store);
    is_shared(&store.begin());
    is_shared(&store.keep([]));
}

mod collecting;
mod power_cut;
