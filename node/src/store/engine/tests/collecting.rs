//! What collections keep and drop, alone and while seals go on.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::super::error::{CheckError, CollectError};
use super::*;

#[test]
fn a_collection_keeps_what_is_pinned_and_drops_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let kept: Vec<_> = (0..4).map(|nth| seal(&store, [nth, 100])).collect();
    let dropped: Vec<_> = (0..4)
        .map(|nth| seal(&store, 200 + nth * 10..208 + nth * 10))
        .collect();
    let before = store.stats().unwrap();
    let pins: Vec<_> = kept.iter().map(|(digest, _)| Pin::Image(*digest)).collect();

    let collected = collect(&store, &pins);
    assert_eq!(collected.manifests, 4);
    assert!(collected.packs > 0 && collected.freed_bytes > before.pack_bytes / 2);
    for (digest, manifest) in &kept {
        assert!(store.missing(manifest).is_empty());
        store.image(digest).unwrap();
    }
    reads_back(&store, (0..4).chain([100]));
    for (digest, _) in &dropped {
        assert!(matches!(
            store.image(digest),
            Err(ReadManifestError::Missing { .. })
        ));
    }
    let after = store.stats().unwrap();
    assert!(after.garbage_share() <= 0.5, "{after:?}");
    assert_eq!(collect(&store, &pins).manifests, 0);
    let copy = killed(dir.path());
    reads_back(&open(copy.path()), (0..4).chain([100]));
}

#[test]
fn with_no_pins_everything_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    seal(&store, 0..10);
    drop(store.begin().put(b"never finished"));
    collect(&store, &[]);
    assert_eq!(
        store.stats().unwrap(),
        super::super::super::stats::Stats::default()
    );
    assert!(packs(dir.path()).is_empty());
    seal(&store, 0..2);
    reads_back(&store, 0..2);
}

#[test]
fn what_a_seal_has_touched_survives_collections_until_it_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    seal(&store, 0..5);
    let sealing = store.begin();
    let (digest, manifest) = put(&sealing, 0..8);
    collect(&store, &[]);
    assert!(store.missing(&manifest).is_empty());
    let kept = sealing.finish(None).unwrap();
    collect(&store, &[]);
    assert!(store.missing(&manifest).is_empty());
    assert_eq!(store.image(&digest).unwrap(), manifest);

    let held = store.keep([Pin::Image(digest)]);
    drop(kept);
    collect(&store, &[]);
    reads_back(&store, 0..8);
    drop(held);
    collect(&store, &[]);
    assert_eq!(store.missing(&manifest).len(), 8);
}

#[test]
fn what_is_committed_while_a_collection_asks_for_its_pins_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sealing = store.begin();
    let (digest, manifest) = put(&sealing, 0..8);
    // The pins are read just before the commit, and the seal is let go just after.
    let pins = || {
        drop(sealing.finish(None).unwrap());
        Ok::<_, Infallible>(Vec::new())
    };
    store.collect(pins).unwrap();
    assert_eq!(store.image(&digest).unwrap(), manifest);
    assert!(store.missing(&manifest).is_empty());
}

#[test]
fn a_snapshot_keeps_its_images() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sealing = store.begin();
    let images = [0..16, 16..18].map(|names| {
        let (digest, manifest) = put(&sealing, names);
        ImageRef {
            digest,
            len_bytes: manifest.image_bytes(),
        }
    });
    let manifest = super::super::super::snapshot::tests::manifest(images[0], images[1]);
    let identity = Identity::ephemeral().unwrap();
    let signed = SignedSnapshot::sign(manifest, &identity).unwrap();
    drop(sealing.finish(Some(&signed)).unwrap());
    seal(&store, 20..30);

    let pin = Pin::Snapshot(signed.digest());
    collect(&store, &[pin, Pin::Snapshot(SnapshotDigest([9; 32]))]);
    assert_eq!(store.snapshot(&signed.digest()).unwrap(), signed);
    reads_back(&store, 0..18);
    assert_eq!(store.manifests().unwrap().len(), 3);
    let checked = store.check().unwrap();
    assert!(checked.is_sound() && checked.incomplete.is_empty());

    fs::remove_file(
        dir.path()
            .join("store/images")
            .join(images[0].digest.to_string()),
    )
    .unwrap();
    assert_eq!(store.check().unwrap().incomplete[&pin], 1);
}

#[test]
fn nothing_is_collected_while_it_is_unknown_what_must_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (digest, manifest) = seal(&store, 0..8);
    let failed = store.collect(|| Err("the cluster does not answer"));
    assert!(matches!(failed, Err(CollectError::Pins(_))));

    let path = dir.path().join("store/images").join(digest.to_string());
    damage(&path, 30, b"?");
    let failed = store.collect(|| Ok::<_, Infallible>(vec![Pin::Image(digest)]));
    assert!(matches!(failed, Err(CollectError::Manifest(_))));
    assert!(store.missing(&manifest).is_empty());
}

#[test]
fn a_reader_with_the_pack_open_reads_on_after_it_was_collected() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (digest, _) = seal(&store, [1]);
    seal(&store, 10..14);
    let id = ChunkId::of(&noise(1));
    let location = store.locate(&id).unwrap();
    let pack = File::open(&location.pack).unwrap();
    collect(&store, &[Pin::Image(digest)]);
    assert!(!location.pack.exists());
    let mut stored = vec![0; location.stored_bytes as usize];
    pack.read_exact_at(&mut stored, location.offset_bytes)
        .unwrap();
    assert_eq!(ChunkId::of(&stored), id);
    assert!(store.locate(&id).unwrap().pack.exists());
}

/// Seals, drops and collections at once, for as long as the machine takes for a few hundred.
#[test]
fn seals_and_collections_at_once_never_lose_a_pinned_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let pinned = Mutex::new(Vec::<(Pin, Manifest)>::new());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sealers: Vec<_> = (0..3_u64)
            .map(|thread| {
                let (store, pinned) = (&store, &pinned);
                scope.spawn(move || {
                    for round in 0..25 {
                        // They share most of their chunks, also with each other.
                        let sealing = store.begin();
                        let base = (round * 7 + thread) % 20;
                        let (digest, manifest) = put(&sealing, base..base + 4);
                        let kept = sealing.finish(None).unwrap();
                        let mut pinned = pinned.lock().unwrap();
                        pinned.push((Pin::Image(digest), manifest));
                        drop(kept);
                        if pinned.len() > 4 {
                            pinned.remove(0);
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let pins = || {
                    let pinned = pinned.lock().unwrap();
                    Ok::<_, Infallible>(pinned.iter().map(|(pin, _)| *pin).collect())
                };
                store.collect(pins).unwrap();
            }
        });
        let ends: Vec<_> = sealers.into_iter().map(|sealer| sealer.join()).collect();
        done.store(true, Ordering::Relaxed);
        ends.into_iter().for_each(|end| end.unwrap());
    });
    for (_, manifest) in pinned.lock().unwrap().iter() {
        assert!(store.missing(manifest).is_empty());
        for extent in manifest.extents() {
            if let Content::Chunk { id, .. } = extent.content {
                store.get(&id).unwrap();
            }
        }
    }
    assert!(store.check().unwrap().is_sound());
}

/// Whoever closes the store waits for a chunk at most, and not for all of them.
#[test]
fn a_check_and_a_collection_end_when_the_store_is_to_close_and_all_else_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (digest, _) = seal(&store, 0..200);
    seal(&store, 200..220);
    let keep = || Ok::<_, Infallible>(vec![Pin::Image(digest)]);
    std::thread::scope(|scope| {
        // Each ends by that alone.
        scope.spawn(|| while !matches!(store.check(), Err(CheckError::Stopped)) {});
        scope.spawn(|| while !matches!(store.collect(keep), Err(CollectError::Stopped)) {});
        std::thread::sleep(std::time::Duration::from_millis(30));
        store.stop_chores();
    });
    assert!(store.stats().is_err());
    reads_back(&store, 0..200);
    let (other, _) = seal(&store, 300..301);
    assert!(store.image(&other).is_ok());
    drop(store);

    let store = open(dir.path());
    assert!(store.check().unwrap().is_sound());
    collect(&store, &[Pin::Image(digest)]);
    reads_back(&store, 0..200);
}
