//! Page maps that are sound, that are not, and that were damaged.

use proptest::prelude::*;
use proto::units::Mib;

use super::*;

fn chunk(name: u8, place: Option<u64>) -> MappedChunk {
    MappedChunk {
        id: ChunkId([name; 32]),
        bytes: 65536,
        place: place.map(|offset| Place {
            pack: Path::new(&format!("/store/packs/{:04}.pack", offset % 3)).into(),
            offset,
            stored_bytes: 100,
            encoding: Encoding::Zstd,
        }),
    }
}

fn refused(build: impl FnOnce(&mut PageMapBuilder) -> Result<(), PageMapError>) -> String {
    let mut builder = PageMap::builder(Region::new(Mib(1)));
    build(&mut builder).expect_err("refused").to_string()
}

#[test]
fn a_piece_across_windows_is_found_from_both() {
    let mut builder = PageMap::builder(Region::new(Mib(1)));
    let start = ImageOffset(WINDOW_BYTES - 4096);
    builder
        .push(start, 8192, 4096, chunk(1, None))
        .expect("fits");
    let map = builder.finish();
    let first = map.extents_of(WindowIndex(0));
    let second = map.extents_of(WindowIndex(1));
    assert_eq!((first[0].start, first[0].within), (start, 4096));
    assert_eq!((second[0].start.0, second[0].within), (WINDOW_BYTES, 8192));
    assert_eq!((first.len(), second.len()), (1, 1));
    assert!(map.extents_of(WindowIndex(u64::MAX)).is_empty());
}

#[test]
fn pieces_that_make_no_sense_are_refused_by_name() {
    let at = |start, bytes, within| {
        refused(|map| map.push(ImageOffset(start), bytes, within, chunk(1, None)))
    };
    assert!(at(1, 4096, 0).contains("whole pages"));
    assert!(at(1 << 20, 4096, 0).contains("past the image"));
    assert!(at(0, 65536, 4096).contains("past its chunk"));
    assert!(at(u64::MAX - 4095, 4096, 0).contains("past the image"));
    let twice = refused(|map| {
        map.push(ImageOffset(4096), 4096, 0, chunk(1, None))?;
        map.push(ImageOffset(0), 8192, 0, chunk(2, None))
    });
    assert!(twice.contains("overlap"));
    let long = refused(|map| {
        let mut long = chunk(1, Some(0));
        long.place.as_mut().expect("has one").stored_bytes = MAX_STORED_BYTES + 1;
        map.push(ImageOffset(0), 4096, 0, long)
    });
    assert!(long.contains("stored length"));
}

#[test]
fn every_cut_and_every_flipped_byte_is_noticed() {
    let mut builder = PageMap::builder(Region::new(Mib(1)));
    builder
        .push(ImageOffset(0), 65536, 0, chunk(1, Some(7)))
        .expect("fits");
    let file = builder.finish().encode();
    for cut in 0..file.len() {
        assert!(PageMap::decode(&file[..cut]).is_err(), "cut at {cut}");
        let mut flipped = file.clone();
        flipped[cut] ^= 0x10;
        assert!(PageMap::decode(&flipped).is_err(), "flipped at {cut}");
    }
}

/// Behind a right hash anything may stand.
fn sealed(mut body: Vec<u8>) -> Vec<u8> {
    let hash = blake3::hash(&body);
    body.extend(hash.as_bytes());
    body
}

proptest! {
    #[test]
    fn a_map_survives_its_file(
        pieces in prop::collection::vec((0_u64..8, 1_u64..16, 0_u8..4, any::<bool>()), 0..12)
    ) {
        let mut builder = PageMap::builder(Region::new(Mib(1)));
        let mut at = 0;
        for (gap, pages, name, local) in pieces {
            at += gap * PAGE_BYTES;
            let bytes = pages * PAGE_BYTES;
            if at + bytes > 1 << 20 {
                break;
            }
            let place = local.then_some(u64::from(name) * 100);
            builder.push(ImageOffset(at), bytes, 0, chunk(name, place)).expect("fits");
            at += bytes;
        }
        let map = builder.finish();
        let back = PageMap::decode(&map.encode()).expect("readable");
        prop_assert_eq!(back, map);
    }

    #[test]
    fn no_bytes_behind_a_right_hash_make_the_reader_panic(
        packs in 0_u32..4, chunks in 0_u32..4, extents in 0_u32..4, rest: Vec<u8>
    ) {
        let mut body = Vec::from(MAGIC);
        body.extend(VERSION.to_le_bytes());
        body.extend((1_u64 << 20).to_le_bytes());
        for number in [packs, chunks, extents] {
            body.extend(number.to_le_bytes());
        }
        body.extend(rest);
        let _ = PageMap::decode(&sealed(body));
    }

    #[test]
    fn no_extents_behind_a_right_hash_lead_out_of_the_image(
        extents in prop::collection::vec(any::<(u32, u8, bool, u8)>(), 0..8)
    ) {
        let mut body = Vec::from(MAGIC);
        body.extend(VERSION.to_le_bytes());
        body.extend((1_u64 << 20).to_le_bytes());
        for number in [0, 1, count(extents.len())] {
            body.extend(number.to_le_bytes());
        }
        encode_chunk(&chunk(1, None), &HashMap::new(), &mut body);
        for (start, pages, known, within) in extents {
            body.extend((start % 300).to_le_bytes());
            body.push(pages % 18);
            body.extend(u32::from(!known).to_le_bytes());
            body.push(within % 18);
        }
        if let Ok(map) = PageMap::decode(&sealed(body)) {
            for window in 0..map.region().windows() {
                for extent in map.extents_of(WindowIndex(window)) {
                    prop_assert!(extent.start.0 + extent.bytes <= 1 << 20);
                    prop_assert!(u64::from(extent.within) + extent.bytes <= 65536);
                }
            }
        }
    }
}
