//! Snapshots go from store to store: all of one arrives byte for byte from whoever gives it, and
//! nothing that a holder does wrong matters while another one is there.

#![allow(clippy::unwrap_used)] // a failed test may panic

#[path = "store_transfer/serving.rs"]
mod serving;
mod store_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto::ids::NodeId;
use store_support::peers::{
    ANSWER_HEAD, BAD, GOOD, LACKS, MANIFESTS, Peer, Peers, Piece, Sealed, Sent, World,
};
use store_support::{LIMITS, file_with};
use tokio::time::{Instant, timeout};
use transport::Identity;
use wrenn_node::store::fetch::{FetchError, NoHolders};
use wrenn_node::store::{Limits, SealError, Store};

/// Chunks that one request names at most.
const AT_ONCE: usize = 16;
/// A chunk in the second request of a stream: the first one has been stored when it comes.
const LATE: usize = AT_ONCE + 6;
/// Longer than a holder that is alone may keep a fetch waiting, and far shorter than for ever.
const LONG: Duration = Duration::from_secs(120);
/// The same for one of two: shorter than a single silence is borne.
const SOON: Duration = Duration::from_secs(10);

/// Fetches the snapshot whole, and sees that it is.
async fn fetch_whole(world: World, peers: &Peers) {
    let kept = world.store.fetch(world.sealed.digest(), peers).await;
    drop(kept.unwrap());
    world.assert_whole_after_restart();
}

/// What is said where nobody gives all of it, of which then nothing counts.
async fn refused(world: &World, peers: &Peers) -> String {
    let failed = world.store.fetch(world.sealed.digest(), peers).await;
    let Err(err @ FetchError::NoHolder { .. }) = failed else {
        panic!("{failed:?}");
    };
    assert!(world.store.snapshot(&world.sealed.digest()).is_err());
    assert!(world.store.manifests().unwrap().is_empty());
    err.to_string()
}

/// A holder that fails as `bad` does is named with what it did. Beside one that does not, it costs
/// some time and nothing else.
async fn gives_way(bad: impl Fn(&Sealed) -> Peer, said: &str) {
    let world = World::new();
    let peers = world.peers([(BAD, bad(&world.sealed))]);
    let began = Instant::now();
    let told = refused(&world, &peers).await;
    assert!(told.contains(&format!("{BAD}: ")), "{told}");
    assert!(told.contains(said), "{told}");
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());

    for bad_first in [true, false] {
        let world = world.anew();
        let mut both = vec![
            (BAD, bad(&world.sealed)),
            (GOOD, Peer::honest(&world.sealed)),
        ];
        if !bad_first {
            both.reverse();
        }
        let peers = world.peers(both);
        let began = Instant::now();
        fetch_whole(world, &peers).await;
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    }
}

/// Gives some chunks as it should, and spoils every one after.
fn spoils_chunks(sealed: &Sealed, spoil: impl Fn(Vec<u8>) -> Sent + Send + Sync + 'static) -> Peer {
    Peer::spoiled(sealed, move |piece, bytes| match piece {
        Piece::Chunk(number, _) if number >= LATE => spoil(bytes),
        _ => Sent::Bytes(bytes),
    })
}

/// Spoils one of the manifests it sends, each time.
fn spoils_manifest(
    sealed: &Sealed,
    at: usize,
    spoil: impl Fn(Vec<u8>) -> Sent + Send + Sync + 'static,
) -> Peer {
    Peer::spoiled(sealed, move |piece, bytes| match piece {
        Piece::Manifest(number) if number == at => spoil(bytes),
        _ => Sent::Bytes(bytes),
    })
}

fn half(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len() / 2);
    bytes
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_arrives_whole_and_no_chunk_is_asked_for_twice() {
    let world = World::new();
    let chunks = world.sealed.chunks();
    assert!(chunks > 4 * AT_ONCE, "it takes a few requests");
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    fetch_whole(world, &peers).await;
    assert_eq!(peers.asked_of(GOOD), chunks);
}

#[tokio::test(start_paused = true)]
async fn several_holders_share_the_work_by_how_fast_they_are() {
    let world = World::new();
    let chunks = world.sealed.chunks();
    let slow = |by| Peer::slow(&world.sealed, Duration::from_millis(by));
    let nodes = [NodeId(1), NodeId(2)];
    let peers = world.peers(nodes.into_iter().zip([slow(12), slow(1)]));
    fetch_whole(world, &peers).await;
    let [slow, fast] = nodes.map(|node| peers.asked_of(node));
    assert_eq!(slow + fast, chunks, "nothing is asked for twice");
    assert!(slow > 0 && slow < fast, "{slow} {fast}");
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
    fetch_whole(world, &peers).await;
    assert_eq!(peers.asked_of(GOOD), missing);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_lacks_chunks_gives_way() {
    let lacks = |sealed: &Sealed| spoils_chunks(sealed, |_| Sent::Bytes(LACKS.to_vec()));
    gives_way(lacks, "it does not have chunk").await;
    let has_none = |sealed: &Sealed| {
        Peer::spoiled(sealed, |piece, bytes| match piece {
            Piece::Manifest(_) => Sent::Bytes(bytes),
            Piece::Chunk(..) => Sent::Bytes(LACKS.to_vec()),
        })
    };
    gives_way(has_none, "it does not have chunk").await;
}

/// Two damaged copies that are damaged in different places are as good as a sound one.
#[tokio::test(start_paused = true)]
async fn holders_of_which_each_lacks_something_make_a_whole() {
    let world = World::new();
    let without = |odd: u8| {
        Peer::spoiled(&world.sealed, move |piece, bytes| match piece {
            Piece::Chunk(_, id) if id.0[0] % 2 == odd => Sent::Bytes(LACKS.to_vec()),
            _ => Sent::Bytes(bytes),
        })
    };
    let peers = world.peers([(BAD, without(0)), (GOOD, without(1))]);
    fetch_whole(world, &peers).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_wrong_bytes_gives_way() {
    let lies = |sealed: &Sealed| {
        spoils_chunks(sealed, |mut bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            Sent::Bytes(bytes)
        })
    };
    gives_way(lies, "wrong bytes for chunk").await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_another_chunk_than_was_asked_for_gives_way() {
    let first = Arc::new(std::sync::Mutex::new(None));
    let repeats = move |sealed: &Sealed| {
        let first = Arc::clone(&first);
        spoils_chunks(sealed, move |bytes| {
            let mut first = first.lock().unwrap();
            Sent::Bytes(first.get_or_insert(bytes).clone())
        })
    };
    // The first one it repeats is right where it belongs.
    gives_way(repeats, "wrong bytes for chunk").await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_another_snapshot_gives_way() {
    let world = World::new();
    let other = Sealed::new(2, &world.identity);
    let peers = world.peers([(BAD, Peer::honest(&other))]);
    let told = refused(&world, &peers).await;
    assert!(told.contains("it sent another snapshot"), "{told}");
    assert_eq!(peers.asked_of(BAD), 0);
    let peers = world.peers([
        (BAD, Peer::honest(&other)),
        (GOOD, Peer::honest(&world.sealed)),
    ]);
    fetch_whole(world, &peers).await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_the_manifest_of_another_image_gives_way() {
    let twice = |sealed: &Sealed| {
        let memory = sealed.signed.manifest().running.unwrap().memory.digest;
        let memory = sealed.store.image(&memory).unwrap().encode();
        let length = u32::try_from(memory.len()).unwrap().to_be_bytes();
        let part = [&length[..], &memory].concat();
        spoils_manifest(sealed, 2, move |_| Sent::Bytes(part.clone()))
    };
    gives_way(twice, "it sent another manifest").await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_nonsense_for_a_manifest_gives_way() {
    for at in 0..MANIFESTS {
        let nonsense = |sealed: &Sealed| {
            spoils_manifest(sealed, at, |mut bytes| {
                bytes[4] ^= 1;
                Sent::Bytes(bytes)
            })
        };
        gives_way(nonsense, "read ").await;
    }
}

/// Nothing is set aside for what a peer only claims.
#[tokio::test(start_paused = true)]
async fn a_part_that_is_too_long_is_not_taken_in() {
    for at in [0, 1, MANIFESTS - 1] {
        let claim = u32::MAX.to_be_bytes();
        let claims =
            |sealed: &Sealed| spoils_manifest(sealed, at, move |_| Sent::Hangs(claim.to_vec()));
        let said = match at {
            0 => "it sent a snapshot manifest of 4294967295 bytes, which is too long",
            _ => "images with more than some 100 GiB in use cannot be fetched",
        };
        gives_way(claims, said).await;
    }
    let claims = |sealed: &Sealed| {
        spoils_chunks(sealed, |mut bytes| {
            bytes[1..ANSWER_HEAD].fill(0xff);
            Sent::Bytes(bytes)
        })
    };
    gives_way(claims, "too long").await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_breaks_off_gives_way() {
    for at in [0, 1] {
        let dies = |sealed: &Sealed| spoils_manifest(sealed, at, |_| Sent::Last(Vec::new()));
        gives_way(dies, "talk to it").await;
        let amid = |sealed: &Sealed| spoils_manifest(sealed, at, |all| Sent::Last(half(all)));
        gives_way(amid, "talk to it").await;
    }
    let dies = |sealed: &Sealed| spoils_chunks(sealed, |_| Sent::Last(Vec::new()));
    gives_way(dies, "talk to it").await;
    let amid = |sealed: &Sealed| spoils_chunks(sealed, |all| Sent::Last(half(all)));
    gives_way(amid, "talk to it").await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_stalls_gives_way() {
    for at in [0, 1] {
        let stalls = |sealed: &Sealed| spoils_manifest(sealed, at, |_| Sent::Hangs(Vec::new()));
        gives_way(stalls, "it said nothing for").await;
    }
    let stalls = |sealed: &Sealed| spoils_chunks(sealed, |all| Sent::Hangs(half(all)));
    gives_way(stalls, "it said nothing for").await;
}

/// Never silent, and never done.
#[tokio::test(start_paused = true)]
async fn a_holder_that_sends_its_bytes_one_by_one_gives_way() {
    let second = Duration::from_secs(1);
    let trickles = |sealed: &Sealed| spoils_chunks(sealed, move |all| Sent::Trickle(second, all));
    gives_way(trickles, "it said nothing for").await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_cannot_be_reached_gives_way() {
    gives_way(|sealed| Peer::away(sealed).0, "talk to it").await;
}

/// A connection that breaks now and then is no reason to give up on a holder that has no like.
#[tokio::test(start_paused = true)]
async fn a_holder_that_breaks_off_again_and_again_is_asked_for_the_rest_each_time() {
    let world = World::new();
    let chunks = world.sealed.chunks();
    let breaks = Peer::spoiled(&world.sealed, |piece, bytes| match piece {
        Piece::Chunk(number, _) if number % 50 == 49 => Sent::Last(half(bytes)),
        _ => Sent::Bytes(bytes),
    });
    let peers = world.peers([(BAD, breaks)]);
    fetch_whole(world, &peers).await;
    assert!(peers.asked_of(BAD) > chunks, "it broke off");
}

/// All of it is here by then: whether the holder hears a goodbye is nothing to fail for.
#[tokio::test(start_paused = true)]
async fn a_holder_that_dies_after_the_last_chunk_has_given_all() {
    let world = World::new();
    let last = world.sealed.chunks() - 1;
    let peer = Peer::spoiled(&world.sealed, move |piece, bytes| match piece {
        Piece::Chunk(number, _) if number == last => Sent::Last(bytes),
        _ => Sent::Bytes(bytes),
    });
    let peers = world.peers([(BAD, peer)]);
    fetch_whole(world, &peers).await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_nobody_has_is_refused_by_name() {
    let world = World::new();
    let told = refused(&world, &world.peers([])).await;
    assert!(told.contains("there is none"), "{told}");
    assert!(told.contains(&world.sealed.digest().to_string()), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_an_unknown_sealer_is_refused_from_whomever_it_comes() {
    let world = World::new();
    let holder = || Peer::honest(&world.sealed);
    let mut peers = world.peers([(BAD, holder()), (GOOD, holder())]);
    peers.sealer = Some(Identity::ephemeral().unwrap().key());
    let told = refused(&world, &peers).await;
    let signer = world.identity.key().to_string();
    assert_eq!(told.matches(&signer).count(), 2, "{told}");
    assert_eq!((peers.asked_of(BAD), peers.asked_of(GOOD)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn every_holder_that_failed_is_named_with_what_it_did() {
    let world = World::new();
    let stalls = spoils_chunks(&world.sealed, |_| Sent::Hangs(Vec::new()));
    let dies = spoils_chunks(&world.sealed, |_| Sent::Last(Vec::new()));
    let told = refused(&world, &world.peers([(BAD, stalls), (GOOD, dies)])).await;
    let (first, second) = told.split_once("; ").unwrap();
    assert!(first.contains(&format!("{BAD}: it said nothing")), "{told}");
    assert!(second.contains(&format!("{GOOD}: talk to it")), "{told}");
}

/// Copies a directory as a crash leaves it: nobody closes anything.
fn copy_as_it_is(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_as_it_is(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The fetcher is killed when nine tenths have come; its next life asks for the rest only.
#[tokio::test(start_paused = true)]
async fn a_fetch_that_was_killed_goes_on_where_it_was() {
    let world = World::new();
    let (digest, chunks) = (world.sealed.digest(), world.sealed.chunks());
    let stops_at = chunks * 9 / 10;
    let peer = Peer::spoiled(&world.sealed, move |piece, bytes| match piece {
        Piece::Chunk(number, _) if number >= stops_at => Sent::Hangs(Vec::new()),
        _ => Sent::Bytes(bytes),
    });
    let peers = world.peers([(GOOD, peer)]);
    let fetch = world.store.fetch(digest, &peers);
    timeout(Duration::from_secs(5), fetch).await.unwrap_err();
    let after_crash = world.dir.path().join("after");
    copy_as_it_is(&world.dir.path().join("store"), &after_crash);

    let store = Store::open(&after_crash, LIMITS).unwrap();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    drop(store.fetch(digest, &peers).await.unwrap());
    world.sealed.assert_whole_in(&store, world.dir.path());
    // What was in the batches that had not come whole is asked for again.
    let again = chunks - stops_at + 4 * AT_ONCE;
    assert!(peers.asked_of(GOOD) <= again, "{}", peers.asked_of(GOOD));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_full_says_so_and_goes_on_once_there_is_room() {
    let world = World::new();
    let (digest, chunks) = (world.sealed.digest(), world.sealed.chunks());
    let dir = world.dir.path().join("small");
    let tight = Limits {
        budget_bytes: 4 << 20,
        ..LIMITS
    };
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let store = Store::open(&dir, tight).unwrap();
    let failed = store.fetch(digest, &peers).await;
    let full = matches!(
        &failed,
        Err(FetchError::Store(SealError::OverBudget { .. }))
    );
    assert!(full, "{failed:?}");
    assert!(store.snapshot(&digest).is_err());
    let here = usize::try_from(store.stats().unwrap().chunks).unwrap();
    assert!(here > AT_ONCE, "{here}");
    drop(store);

    let store = Store::open(&dir, LIMITS).unwrap();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    drop(store.fetch(digest, &peers).await.unwrap());
    assert_eq!(peers.asked_of(GOOD), chunks - here);
    world.sealed.assert_whole_in(&store, world.dir.path());
}

#[tokio::test(start_paused = true)]
async fn progress_is_shown_while_a_fetch_is_under_way_and_not_after() {
    let world = World::new();
    let digest = world.sealed.digest();
    let (store, seen) = (world.store.clone(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&seen);
    let peer = Peer::spoiled(&world.sealed, move |piece, bytes| {
        if let (Piece::Chunk(..), Some(progress)) = (piece, store.transfer(digest)) {
            assert!(progress.bytes_done < progress.bytes_total);
            assert_eq!(progress.sources, 1);
            count.fetch_add(1, Ordering::Relaxed);
        }
        Sent::Bytes(bytes)
    });
    let peers = world.peers([(GOOD, peer)]);
    assert_eq!(world.store.transfer(digest), None);
    let kept = world.store.fetch(digest, &peers).await.unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), world.sealed.chunks());
    assert_eq!(world.store.transfer(digest), None);
    drop(kept);
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_is_damaged_at_its_holder_is_not_sent_and_the_holder_hears_of_it() {
    let world = World::new();
    let damage = world.sealed.store.damage();
    let chunk = world.sealed.memory_chunks()[LATE];
    let place = world.sealed.store.locate(&chunk).unwrap();
    let mut pack = fs::read(&place.pack).unwrap();
    pack[usize::try_from(place.offset_bytes).unwrap() + 9] ^= 1;
    fs::write(&place.pack, pack).unwrap();

    let peers = world.peers([(BAD, Peer::honest(&world.sealed))]);
    let told = refused(&world, &peers).await;
    let lacks = format!("{BAD}: it does not have chunk {chunk}");
    assert!(told.contains(&lacks), "{told}");
    assert_eq!(*damage.borrow(), 1);
    assert!(!world.sealed.store.has(&chunk));
}
