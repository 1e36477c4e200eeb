//! Packs that were cut, overwritten and filled with noise.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::chunk::ChunkId;
use super::super::codec::Encoding;
use super::super::record::Draft;
use super::*;

fn put(pack: &Pack, bytes: &[u8]) -> u32 {
    let head = Head::new(ChunkId::of(bytes), bytes.len(), Encoding::Raw, bytes).unwrap();
    let mut draft = Draft::new(head, bytes);
    let offset = pack.end();
    let length = draft.len();
    pack.append(draft.at(pack.number(), offset), length)
        .unwrap();
    offset
}

/// The chunks that a walk finds whole, and the gaps.
fn walked(pack: &Pack) -> (Vec<ChunkId>, Vec<(u32, u32)>, u32) {
    let (mut chunks, mut gaps) = (Vec::new(), Vec::new());
    let end = pack
        .walk(Depth::Bodies, |found| {
            match found {
                Found::Record { head, body, .. } => chunks.extend(body.map(|_| head.id)),
                Found::Gap { from, to } => gaps.push((from, to)),
            }
            Ok(())
        })
        .unwrap();
    (chunks, gaps, end)
}

fn reopened(dir: &Path) -> Pack {
    Pack::open(dir, 3).unwrap().0
}

fn three(dir: &Path) -> (Pack, [u32; 3], [ChunkId; 3]) {
    let pack = Pack::create(dir, 3).unwrap();
    let chunks: [Vec<u8>; 3] = [vec![1; 100], vec![2; 40], vec![3; 77]];
    let offsets = chunks.each_ref().map(|bytes| put(&pack, bytes));
    (
        pack,
        offsets,
        chunks.each_ref().map(|bytes| ChunkId::of(bytes)),
    )
}

#[test]
fn a_file_name_gives_its_number_back_and_others_are_left_alone() {
    for number in [0, 7, 99_999_999, u32::MAX] {
        assert_eq!(Pack::number_in(&Pack::file_name(number)), Some(number));
    }
    for other in [
        "7.pack",
        "00000007.pack~",
        "-0000007.pack",
        "+0000007.pack",
        "",
    ] {
        assert_eq!(Pack::number_in(other), None, "{other}");
    }
}

#[test]
fn a_pack_cut_at_any_byte_keeps_every_record_before_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, offsets, ids) = three(dir.path());
    let end = pack.end();
    let whole = std::fs::read(pack.path()).unwrap();
    for length in 0..=end {
        std::fs::write(pack.path(), &whole[..length as usize]).unwrap();
        let (chunks, _, sound_to) = walked(&reopened(dir.path()));
        let ends = [offsets[1], offsets[2], end];
        let kept = ends.iter().filter(|end| **end <= length).count();
        assert_eq!(chunks, ids[..kept], "cut at {length}");
        assert!(sound_to <= length.max(FIRST_RECORD));
    }
}

#[test]
fn a_bad_head_costs_its_own_record_and_none_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, offsets, ids) = three(dir.path());
    pack.file
        .write_all_at(b"????", u64::from(offsets[1]))
        .unwrap();
    let (chunks, gaps, end) = walked(&reopened(dir.path()));
    assert_eq!(chunks, [ids[0], ids[2]]);
    assert_eq!(gaps, [(offsets[1], offsets[2])]);
    assert_eq!(end, pack.end());
}

#[test]
fn a_walk_from_amid_a_record_finds_all_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, [first, second, _], ids) = three(dir.path());
    for from in first + 1..second {
        let mut found = Vec::new();
        pack.walk_from(from, Depth::Bodies, |it| {
            if let Found::Record { head, .. } = it {
                found.push(head.id);
            }
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
        assert!(found.ends_with(&ids[1..]), "from {from}: {found:?}");
    }
}

#[test]
fn a_head_far_behind_a_long_gap_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let pack = Pack::create(dir.path(), 3).unwrap();
    let far = FIRST_RECORD + SEARCH_BYTES * 2 + ALIGN;
    pack.end.store(far, Ordering::Release);
    put(&pack, b"far away");
    let (chunks, gaps, _) = walked(&pack);
    assert_eq!(chunks, [ChunkId::of(b"far away")]);
    assert_eq!(gaps, [(FIRST_RECORD, far)]);
}

#[test]
fn a_void_record_stays_void_and_those_around_it_stay_found() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, offsets, ids) = three(dir.path());
    let head = pack.head(offsets[1]).unwrap().unwrap();
    pack.make_void(offsets[1], head).unwrap();
    let mut found = Vec::new();
    reopened(dir.path())
        .walk(Depth::Heads, |record| {
            if let Found::Record { head, .. } = record {
                found.push((head.id, head.encoding.is_some()));
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(found, [(ids[0], true), (ids[1], false), (ids[2], true)]);
}

#[test]
fn titles_tell_another_version_from_damage() {
    let dir = tempfile::tempdir().unwrap();
    let pack = Pack::create(dir.path(), 3).unwrap();
    let title = || Pack::open(dir.path(), 3).unwrap().1;
    assert_eq!(title(), Title::Ours);
    pack.file.write_all_at(&9_u32.to_le_bytes(), 8).unwrap();
    assert_eq!(title(), Title::Version(9));
    pack.file.write_all_at(&[0; 16], 0).unwrap();
    assert_eq!(title(), Title::Garbled);
    pack.mend_title().unwrap();
    assert_eq!(title(), Title::Ours);
}

proptest! {
    // Each case writes a file.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn damage_anywhere_loses_only_the_records_it_touches(
        lengths in vec(1_usize..400, 1..12), at: prop::sample::Index, noise in vec(any::<u8>(), 1..64),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let pack = Pack::create(dir.path(), 3).unwrap();
        let mut spans = Vec::new();
        for (nth, length) in lengths.iter().enumerate() {
            let bytes = vec![u8::try_from(nth).unwrap() + 1; *length];
            let offset = put(&pack, &bytes);
            spans.push((ChunkId::of(&bytes), offset, pack.end()));
        }
        let end = pack.end() as usize;
        let at = FIRST_RECORD as usize + at.index(end - FIRST_RECORD as usize);
        let noise = &noise[..noise.len().min(end - at)];
        pack.file.write_all_at(noise, at as u64).unwrap();
        let (chunks, _, _) = walked(&reopened(dir.path()));
        for (id, from, to) in spans {
            let touched = at < to as usize && at + noise.len() > from as usize;
            prop_assert!(touched || chunks.contains(&id));
        }
    }

    #[test]
    fn no_file_makes_the_walk_panic(bytes in vec(any::<u8>(), 0..2000)) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(Pack::file_name(3)), &bytes).unwrap();
        let (chunks, _, _) = walked(&reopened(dir.path()));
        prop_assert!(chunks.is_empty());
    }
}
