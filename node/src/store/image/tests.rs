//! Incremental and full seals of the same bytes.

use std::fs;
use std::path::Path;
use std::slice;

use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::collection::vec;
use proptest::prelude::*;

use super::super::chunk::{CHUNK_BYTES, is_zero};
use super::super::engine::Store;
use super::super::packs::Limits;
use super::*;

const PAGE: usize = 4096;
const PAGES_A_WINDOW: usize = CHUNK_BYTES / PAGE;

fn open(dir: &Path) -> Store {
    let limits = Limits {
        keep_free_bytes: 0,
        ..Limits::default()
    };
    Store::open(&dir.join("store"), limits).unwrap()
}

/// A file whose zero pages are holes.
fn file(dir: &Path, bytes: &[u8]) -> File {
    let path = dir.join("image");
    fs::write(&path, b"").unwrap();
    filled(
        File::options().read(true).write(true).open(path).unwrap(),
        bytes,
    )
}

/// The same in memory, as a guest's.
fn memfd(bytes: &[u8]) -> File {
    let fd = memfd_create(c"wrenn-store-test", MFdFlags::MFD_CLOEXEC).unwrap();
    filled(File::from(fd), bytes)
}

fn filled(file: File, bytes: &[u8]) -> File {
    file.set_len(bytes.len() as u64).unwrap();
    for (at, page) in bytes.chunks(PAGE).enumerate() {
        if !is_zero(page) {
            file.write_all_at(page, (at * PAGE) as u64).unwrap();
        }
    }
    file
}

fn full(store: &Store, file: &File, len: usize) -> SealedImage {
    store.begin().image(file, len as u64).unwrap()
}

fn assembled(store: &Store, dir: &Path, sealed: &SealedImage) -> Vec<u8> {
    let path = dir.join("assembled");
    let len_bytes = sealed.image.len_bytes;
    store.assemble(&sealed.manifest, len_bytes, &path).unwrap();
    fs::read(path).unwrap()
}

fn page_range(page: usize) -> Range<u64> {
    let start = (page * PAGE) as u64;
    start..start + PAGE as u64
}

#[test]
fn only_changed_windows_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut bytes = vec![7; 64 * CHUNK_BYTES];
    let image = file(dir.path(), &bytes);
    let parent = full(&store, &image, bytes.len());

    bytes[5 * CHUNK_BYTES + 3] = 1;
    image.write_all_at(&bytes, 0).unwrap();
    let seal = store.begin();
    let at = (5 * CHUNK_BYTES + 3) as u64;
    let changed = seal
        .image_changed(
            &parent.manifest,
            &image,
            bytes.len() as u64,
            slice::from_ref(&(at..at + 1)),
        )
        .unwrap();
    assert_eq!(seal.tally().read_bytes, CHUNK_BYTES_U64);
    assert_eq!(seal.tally().new_chunks, 1);
    assert_eq!(changed, full(&store, &image, bytes.len()));
}

#[test]
fn nothing_changed_is_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let image = file(dir.path(), &[3; 5 * PAGE]);
    let parent = full(&store, &image, 5 * PAGE);
    let seal = store.begin();
    let same = seal.image_changed(&parent.manifest, &image, 5 * PAGE as u64, &[]);
    assert_eq!(same.unwrap(), parent);
    assert_eq!(seal.tally(), super::super::Tally::default());
}

#[test]
fn a_page_that_was_given_back_becomes_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes = vec![9; 3 * CHUNK_BYTES];
    let parent = full(&store, &file(dir.path(), &bytes), bytes.len());

    let mut discarded = bytes;
    discarded[CHUNK_BYTES..2 * CHUNK_BYTES].fill(0);
    let image = file(dir.path(), &discarded);
    let window = CHUNK_BYTES_U64..2 * CHUNK_BYTES_U64;
    let len = discarded.len() as u64;
    let sealed = store
        .begin()
        .image_changed(&parent.manifest, &image, len, &[window]);
    let sealed = sealed.unwrap();
    assert_eq!(sealed.manifest.extents()[1].content, Content::Hole);
    assert_eq!(sealed, full(&store, &image, discarded.len()));
}

#[test]
fn a_page_that_was_never_paged_in_is_the_parents() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes: Vec<u8> = (0..2 * CHUNK_BYTES)
        .map(|at| u8::try_from(at / PAGE + 1).unwrap())
        .collect();
    let parent = full(&store, &file(dir.path(), &bytes), bytes.len());

    // Of the guest's memory only page 3 is there, and it was written to.
    let mut present = vec![0; bytes.len()];
    present[3 * PAGE..4 * PAGE].fill(0xee);
    let memory = memfd(&present);
    let mut expected = bytes;
    expected[3 * PAGE..4 * PAGE].fill(0xee);
    let sealed = store
        .begin()
        .image_changed(
            &parent.manifest,
            &memory,
            expected.len() as u64,
            &[page_range(3)],
        )
        .unwrap();
    assert!(assembled(&store, dir.path(), &sealed) == expected);
}

#[test]
fn the_tail_of_an_odd_file_comes_back_at_its_length() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for len in [1, 4095, 4097, CHUNK_BYTES - 1, CHUNK_BYTES + 1, 356_000] {
        let bytes = vec![5; len];
        let sealed = full(&store, &file(dir.path(), &bytes), len);
        assert_eq!(sealed.manifest.image_bytes(), image_bytes_of(len as u64));
        assert!(assembled(&store, dir.path(), &sealed) == bytes);
    }
}

#[test]
fn an_empty_file_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let refused = store.begin().image(&file(dir.path(), &[]), 0).unwrap_err();
    assert!(matches!(refused, SealError::ImageSize { len_bytes: 0 }));
}

#[test]
fn a_file_that_is_shorter_than_said_is_a_read_error() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let image = file(dir.path(), &[1; PAGE]);
    let refused = store.begin().image(&image, 3 * PAGE as u64).unwrap_err();
    assert!(matches!(refused, SealError::Read { .. }), "{refused}");
}

#[derive(Clone, Debug)]
struct Write {
    page: usize,
    pages: usize,
    /// Zero gives the pages back.
    fill: u8,
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let write = (0..6 * PAGES_A_WINDOW, 1..2 * PAGES_A_WINDOW, 0_u8..4);
    vec(
        write.prop_map(|(page, pages, fill)| Write { page, pages, fill }),
        0..10,
    )
}

fn apply(bytes: &mut [u8], writes: &[Write]) -> Vec<Range<u64>> {
    let len = bytes.len();
    let mut changed = Vec::new();
    for Write { page, pages, fill } in writes {
        let from = (page * PAGE).min(len);
        let to = (from + pages * PAGE).min(len);
        bytes[from..to].fill(*fill);
        changed.push(from as u64..to as u64);
    }
    changed
}

proptest! {
    // Each case opens a store.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_incremental_seal_is_the_full_seal(
        pages in 1..5 * PAGES_A_WINDOW, more in 0..2 * PAGES_A_WINDOW, grows: bool,
        before in writes(), after in writes(), absent in vec(any::<bool>(), 7 * PAGES_A_WINDOW),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut bytes = vec![0; pages * PAGE];
        apply(&mut bytes, &before);
        let parent = full(&store, &file(dir.path(), &bytes), bytes.len());

        let len = if grows { (pages + more) * PAGE } else { pages.saturating_sub(more).max(1) * PAGE };
        let resized = len != bytes.len();
        bytes.resize(len, 0);
        let changed = apply(&mut bytes, &after);
        let expected = full(&store, &file(dir.path(), &bytes), len);
        prop_assert!(assembled(&store, dir.path(), &expected) == bytes);

        // What did not change may be missing from the file, as in a guest that is being paged in.
        let mut present = bytes.clone();
        for page in 0..len / PAGE {
            let range = page_range(page);
            let touched = changed.iter().any(|it| it.start < range.end && range.start < it.end);
            if absent[page] && !touched && !resized {
                present[page * PAGE..(page + 1) * PAGE].fill(0);
            }
        }
        let file = file(dir.path(), &present);
        let sealed = store.begin().image_changed(&parent.manifest, &file, len as u64, &changed).unwrap();
        prop_assert_eq!(&sealed, &expected);
        prop_assert!(store.missing(&sealed.manifest).is_empty());
    }
}
