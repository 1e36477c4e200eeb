//! Entries, and what becomes of them when sled fails.

use proptest::prelude::*;

use super::*;

fn place(pack: u32) -> Place {
    Place {
        pack,
        offset: 16,
        stored_bytes: 100,
        chunk_bytes: 4096,
        encoding: Encoding::Zstd,
    }
}

fn entries(index: &Index) -> Vec<(ChunkId, Place)> {
    let mut all = Vec::new();
    index.each(|id, place| all.push((id, place))).unwrap();
    all.sort_unstable_by_key(|(id, _)| *id);
    all
}

#[test]
fn both_kinds_of_index_keep_the_same_entries() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("index");
    let guard = dir.path().join("guard");
    let ids: Vec<_> = (0..50).map(|name| ChunkId([name; 32])).collect();
    let fill: Fill<'_> = &|put| ids.iter().for_each(|id| put(*id, place(1)));
    let sled = Index::open(&at, &guard, None, fill);
    let memory = Index::open(&at, &guard, None, &|_| {});
    memory.refill(fill);
    for index in [&sled, &memory] {
        index.insert(&ids[0], &place(2)).unwrap();
        index.remove(&ids[1]).unwrap();
        assert_eq!(index.get(&ids[0]).unwrap(), Some(place(2)));
        assert_eq!(index.get(&ids[1]).unwrap(), None);
    }
    assert_eq!(entries(&sled), entries(&memory));
    assert_eq!(entries(&sled).len(), 49);
}

/// Found by `deploy/fuzz index-row`: whoever read the chunk set aside as much as the row said.
#[test]
fn an_entry_longer_than_any_record_is_refused() {
    for (stored_bytes, chunk_bytes) in [(u32::MAX, 4096), (100, u32::MAX), (65_537, 65_536)] {
        let long = Place {
            stored_bytes,
            chunk_bytes,
            ..place(1)
        };
        assert!(Place::decode(&long.encode()).is_err());
    }
    assert_eq!(Place::decode(&place(1).encode()).ok(), Some(place(1)));
}

#[test]
fn a_closed_index_is_trusted_once() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("index");
    let guard = dir.path().join("guard");
    let never: Fill<'_> = &|_| panic!("a trusted index is not filled in");
    let index = Index::open(&at, &guard, None, &|put| put(ChunkId([1; 32]), place(1)));
    index.close(BTreeMap::from([(1, 200)])).unwrap();
    drop(index);

    let taken = Index::take_guard(&guard).unwrap().unwrap();
    assert_eq!(taken.packs, BTreeMap::from([(1, 200)]));
    let index = Index::open(&at, &guard, Some(&taken), never);
    assert_eq!(index.get(&ChunkId([1; 32])).unwrap(), Some(place(1)));
    assert_eq!(Index::take_guard(&guard).unwrap(), None);
}

/// The longest chunk.
const LONGEST: u32 = 64 << 10;

proptest! {
    #[test]
    fn a_place_is_read_back_if_it_is_no_longer_than_a_chunk(
        pack: u32,
        offset: u32,
        stored_bytes in 0..2 * LONGEST,
        chunk_bytes in 0..2 * LONGEST,
        zstd: bool,
    ) {
        let encoding = if zstd { Encoding::Zstd } else { Encoding::Raw };
        let place = Place { pack, offset, stored_bytes, chunk_bytes, encoding };
        let read = Place::decode(&place.encode());
        if stored_bytes.max(chunk_bytes) <= LONGEST {
            prop_assert_eq!(read.unwrap(), place);
        } else {
            prop_assert!(read.is_err());
        }
    }

    #[test]
    fn no_value_makes_the_index_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let _ = Place::decode(&bytes);
    }
}
