//! A store on a file system that fills up for real.
//!
//! Each test mounts a small tmpfs of its own, which needs root, and unmounts it.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::convert::Infallible;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use store_support::{LIMITS, content, file_with};
use wrenn_node::store::{ImageDigest, Pin, SealError, Store};

const PAGE: u64 = 4096;

/// A file system of 16 MiB, and beside it, on another, room for what is sealed.
struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("small");
        fs::create_dir(&at).unwrap();
        let options = "size=16m,mode=700";
        mount(
            Some("wrenn-store-test"),
            &at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .expect("mounting needs root");
        Self { dir }
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("small")
    }

    fn open(&self) -> Store {
        Store::open(&self.at().join("store"), LIMITS).unwrap()
    }

    fn free_bytes(&self) -> u64 {
        let stat = statvfs(&self.at()).unwrap();
        stat.blocks_available() * stat.fragment_size()
    }

    /// Fills the file system until only so much is free.
    fn leave_free(&self, bytes: u64) {
        let ballast = vec![1; usize::try_from(self.free_bytes() - bytes).unwrap()];
        fs::write(self.at().join("ballast"), ballast).unwrap();
        assert_eq!(self.free_bytes(), bytes);
    }

    fn make_room(&self) {
        fs::remove_file(self.at().join("ballast")).unwrap();
    }

    fn seal(&self, store: &Store, name: u64) -> Result<ImageDigest, SealError> {
        let bytes = content(name);
        let file = file_with(&self.dir.path().join("image"), &bytes);
        let seal = store.begin();
        let sealed = seal.image(&file, bytes.len() as u64)?;
        seal.finish(None)?;
        Ok(sealed.image.digest)
    }

    fn assert_whole(&self, store: &Store, name: u64, digest: &ImageDigest) {
        let expected = content(name);
        let path = self.dir.path().join("assembled");
        let manifest = store.image(digest).unwrap();
        store
            .assemble(&manifest, expected.len() as u64, &path)
            .unwrap();
        assert!(fs::read(path).unwrap() == expected, "image {name}");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.at(), MntFlags::MNT_DETACH);
    }
}

fn is_about_room(err: &SealError) -> bool {
    matches!(err, SealError::NoRoom { .. } | SealError::DiskFull { .. })
}

#[test]
fn seals_until_the_disk_is_full_fail_by_name_and_nothing_sealed_before_is_lost() {
    let small = Small::mount();
    let store = small.open();
    let mut sealed = Vec::new();
    let refused = (0..1000).find_map(|name| match small.seal(&store, name) {
        Ok(digest) => {
            sealed.push((name, digest));
            None
        }
        Err(err) => Some(err),
    });
    let refused = refused.expect("16 MiB fill up");
    assert!(is_about_room(&refused), "{refused:?}");
    assert!(store.check().unwrap().is_sound());
    for (name, digest) in &sealed {
        small.assert_whole(&store, *name, digest);
    }

    let (name, digest) = sealed[sealed.len() / 2];
    let pins = vec![Pin::Image(digest)];
    store.collect(|| Ok::<_, Infallible>(pins)).unwrap();
    small.assert_whole(&store, name, &digest);
    let again = small.seal(&store, 2000).expect("there is room again");
    small.assert_whole(&store, 2000, &again);
}

#[test]
fn a_record_that_the_disk_cuts_short_is_undone() {
    let small = Small::mount();
    let large = small.dir.path().join("large");
    let open = || Store::open(&large, LIMITS).unwrap();
    let store = open();
    let first = small.seal(&store, 1).unwrap();
    drop(store);
    // The store sees room where the packs are listed, and the pack itself has none.
    let pack = large.join("packs/00000000.pack");
    let moved = small.at().join("pack");
    fs::copy(&pack, &moved).unwrap();
    fs::remove_file(&pack).unwrap();
    symlink(&moved, &pack).unwrap();
    let store = open();
    let before = fs::metadata(&moved).unwrap().len();
    small.leave_free(3 * PAGE);
    let mut record = vec![0; 1 << 16];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut record);
    let seal = store.begin();
    let refused = seal.put(&record).unwrap_err();
    assert!(matches!(refused, SealError::DiskFull { .. }), "{refused:?}");
    assert_eq!(fs::metadata(&moved).unwrap().len(), before);

    small.make_room();
    let id = seal.put(&record).unwrap().unwrap();
    assert_eq!(store.get(&id).unwrap(), record);
    seal.finish(None).unwrap();
    small.assert_whole(&store, 1, &first);
    assert!(store.check().unwrap().is_sound());
    drop(store);
    assert_eq!(open().get(&id).unwrap(), record);
}

#[test]
fn a_store_on_a_disk_without_a_free_byte_opens_reads_and_collects() {
    let small = Small::mount();
    let store = small.open();
    let sealed: Vec<_> = (0..16)
        .map(|name| (name, small.seal(&store, name).unwrap()))
        .collect();
    small.leave_free(0);
    assert!(is_about_room(&small.seal(&store, 40).unwrap_err()));
    drop(store);

    // Its index could not be put down in good order, nor can it be filled in again on the disk.
    let store = small.open();
    for (name, digest) in &sealed {
        small.assert_whole(&store, *name, digest);
    }
    assert!(is_about_room(&small.seal(&store, 41).unwrap_err()));
    let gone = store.collect(|| Ok::<_, Infallible>(Vec::new())).unwrap();
    assert!(gone.freed_bytes > 0);
    let again = small.seal(&store, 42).expect("there is room again");
    small.assert_whole(&store, 42, &again);
    drop(store);
    let store = small.open();
    small.assert_whole(&store, 42, &again);
    assert!(sane(&small.at()));
}

/// Nothing half-written is left beside what counts.
fn sane(at: &Path) -> bool {
    let images = fs::read_dir(at.join("store/images")).unwrap();
    let mut names = images.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.all(|name| !name.ends_with(".unfinished"))
}
