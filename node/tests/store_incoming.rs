//! A snapshot is here but for its memory: what a guest touches comes at once, the rest meanwhile,
//! and holders come and go.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use proto::ids::NodeId;
use store_support::LIMITS;
use store_support::peers::{BAD, GOOD, LACKS, Peer, Peers, Piece, Sealed, Sent, World};
use tokio::time::{Instant, sleep, timeout};
use wrenn_node::store::fetch::{FetchError, NoHolders};
use wrenn_node::store::{
    BringError, CHUNK_BYTES, Came, Carried, ChunkId, Decoder, Holding, Incoming, Limits, SealError,
    Store,
};

/// How long after everybody lacked a chunk they are asked once more before it is called gone.
const ONCE_MORE_AFTER: Duration = Duration::from_secs(2);
/// Longer than any wait there is.
const LONG: Duration = Duration::from_secs(3600);

/// What becomes of every chunk that a holder sends.
type Spoils = fn(Vec<u8>) -> Sent;

async fn lazily(world: &World, peers: &Peers) -> Incoming {
    let peers = Arc::new(peers.clone());
    let fetched = world.store.fetch_lazily(world.sealed.digest(), peers);
    fetched.await.unwrap()
}

/// Chunks that are of the memory only.
fn memory_only(world: &World) -> usize {
    world.sealed.memory_chunks().len()
}

#[tokio::test(start_paused = true)]
async fn everything_but_the_memory_is_here_and_durable_when_it_answers() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    assert_eq!(incoming.snapshot(), &world.sealed.signed);
    assert_eq!(
        peers.asked_of(GOOD),
        world.sealed.chunks() - memory_only(&world)
    );
    let manifest = world.sealed.signed.manifest();
    let path = world.dir.path().join("out");
    let running = manifest.running.unwrap();
    for image in [manifest.disk, running.device_state] {
        let image_manifest = world.store.image(&image.digest).unwrap();
        world
            .store
            .assemble(&image_manifest, image.len_bytes, &path)
            .unwrap();
    }
    let memory = world.store.image(&running.memory.digest).unwrap();
    assert_eq!(world.store.missing(&memory).len(), memory_only(&world));

    // A daemon that starts anew with the guest under way needs nobody for it.
    drop(incoming);
    drop(world.store);
    let store = Store::open(&world.dir.path().join("store"), LIMITS).unwrap();
    let nobody = Arc::new(NoHolders);
    let again = store.fetch_lazily(world.sealed.digest(), nobody).await;
    let not_now = again.unwrap().bring(world.sealed.memory_chunks()[0]).await;
    assert!(
        matches!(not_now, Err(BringError::NotNow { .. })),
        "{not_now:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_chunk_is_brought_when_it_is_asked_for_and_never_twice() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    let before = peers.asked_of(GOOD);
    let chunk = world.sealed.memory_chunks()[7];
    let asked = (0..10).map(|_| incoming.bring(chunk));
    for brought in join_all(asked).await {
        assert_eq!(Some(brought.unwrap()), world.store.locate(&chunk));
    }
    incoming.bring(chunk).await.unwrap();
    assert_eq!(peers.asked_of(GOOD), before + 1);
    let bytes = world.store.get(&chunk).unwrap();
    assert_eq!(
        bytes[..],
        world.sealed.images[0][7 * CHUNK_BYTES..8 * CHUNK_BYTES]
    );
}

/// A guest goes on with it before it is stored; stored it is all the same, and asked for only once.
#[tokio::test(start_paused = true)]
async fn a_chunk_in_a_hurry_is_handed_over_and_stored_after_that() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    let before = peers.asked_of(GOOD);
    let chunk = world.sealed.memory_chunks()[7];
    let rushed = join_all((0..10).map(|_| incoming.rush(chunk))).await;
    for came in rushed {
        let came = came.unwrap();
        let carried = came.carried().clone();
        let mut decoder = Decoder::new().unwrap();
        let bytes = decoder.decode(
            chunk,
            carried.encoding,
            &carried.stored,
            carried.chunk_bytes,
        );
        assert_eq!(bytes.unwrap().len(), CHUNK_BYTES);
        came.stored().await.unwrap();
        assert!(world.store.has(&chunk));
    }
    assert_eq!(peers.asked_of(GOOD), before + 1);
}

/// Whoever is in a hurry checks for himself. Nothing wrong is stored, and who asks again gets it from
/// somebody else; from then on the liar is checked first.
#[tokio::test(start_paused = true)]
async fn wrong_bytes_in_a_hurry_are_never_stored_and_come_from_a_holder_once() {
    let world = World::new();
    let lies = |piece: Piece, mut bytes: Vec<u8>| {
        if let Piece::Chunk(..) = piece {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        Sent::Bytes(bytes)
    };
    // The rest of the snapshot is here, so that the liar is not known when the first chunk is asked for.
    let honest = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    drop(lazily(&world, &honest).await);
    let bad = Peer::spoiled(&world.sealed, lies);
    let alone = world.peers([(BAD, bad.clone())]);
    let incoming = lazily(&world, &alone).await;
    let chunks = world.sealed.memory_chunks();
    let right = |came: &Came, chunk| {
        let Carried {
            encoding,
            chunk_bytes,
            stored,
        } = came.carried();
        let mut decoder = Decoder::new().unwrap();
        let decoded = decoder.decode(chunk, *encoding, stored, *chunk_bytes);
        decoded.is_ok()
    };
    let came = incoming.rush(chunks[0]).await.unwrap();
    assert!(!right(&came, chunks[0]), "the world is not as it should be");
    let refused = came.stored().await;
    assert!(
        matches!(refused, Err(BringError::NotNow { .. })),
        "{refused:?}"
    );
    assert!(!world.store.has(&chunks[0]));
    // It is known now, and there is nobody else.
    let refused = incoming.rush(chunks[1]).await;
    assert!(
        matches!(refused, Err(BringError::NotNow { .. })),
        "{refused:?}"
    );
    drop(incoming);

    let both = world.peers([(BAD, bad), (GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &both).await;
    let mut wrong = 0;
    for chunk in &chunks[..20] {
        let came = incoming.rush(*chunk).await.unwrap();
        if !right(&came, *chunk) {
            wrong += 1;
            incoming.bring(*chunk).await.unwrap();
        }
        let _stored = came.stored().await;
        assert!(world.store.get(chunk).is_ok());
    }
    assert!(wrong <= 1, "{wrong} times");
}

/// No room: the guest goes on, and nobody takes this node for a holder.
#[tokio::test(start_paused = true)]
async fn a_chunk_that_was_handed_over_and_not_stored_is_still_missing() {
    let world = World::new();
    let dir = world.dir.path().join("small");
    let tight = Limits {
        budget_bytes: 4 << 20,
        ..LIMITS
    };
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let store = Store::open(&dir, tight).unwrap();
    let digest = world.sealed.digest();
    let incoming = store.fetch_lazily(digest, Arc::new(peers.clone()));
    let incoming = incoming.await.unwrap();
    let mut refused = 0;
    for chunk in world.sealed.memory_chunks() {
        let came = incoming.rush(chunk).await.unwrap();
        if let Err(err) = came.stored().await {
            assert!(matches!(err, BringError::Store { .. }), "{err:?}");
            assert!(!store.has(&chunk));
            refused += 1;
        }
    }
    assert!(refused > 0, "there is room for all");
    assert_ne!(store.holding(digest), Holding::Whole);
    let full = incoming.complete().await;
    let over = matches!(&full, Err(FetchError::Store(SealError::OverBudget { .. })));
    assert!(over, "{full:?}");
}

#[tokio::test(start_paused = true)]
async fn the_rest_comes_meanwhile_and_then_this_node_holds_it() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    for chunk in world.sealed.memory_chunks().into_iter().rev().take(20) {
        incoming.bring(chunk).await.unwrap();
    }
    let kept = incoming.complete().await.unwrap();
    let progress = *incoming.progress().borrow();
    assert_eq!(progress.bytes_done, progress.bytes_total);
    assert_eq!(progress.sources, 0);
    let mut asked = peers.asked();
    let in_all = asked.len();
    asked.sort();
    asked.dedup();
    assert_eq!(
        (in_all, asked.len()),
        (world.sealed.chunks(), world.sealed.chunks())
    );
    drop((incoming, kept));
    world.assert_whole_after_restart();
}

/// What a guest waits for does not wait for what nobody waits for.
#[tokio::test(start_paused = true)]
async fn a_chunk_is_brought_past_all_that_is_on_its_way() {
    let world = World::new();
    let slow = Peer::slow(&world.sealed, Duration::from_millis(100));
    let peers = world.peers([(GOOD, slow)]);
    let incoming = lazily(&world, &peers).await;
    let last = *world.sealed.memory_chunks().last().unwrap();
    let behind = incoming.clone();
    let rest = tokio::spawn(async move { behind.complete().await.map(drop) });
    sleep(Duration::from_millis(500)).await;
    let began = Instant::now();
    incoming.bring(last).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_millis(150),
        "{:?}",
        began.elapsed()
    );
    assert!(!rest.is_finished());
    rest.await.unwrap().unwrap();
    let asked = peers.asked().into_iter().filter(|id| *id == last);
    assert_eq!(asked.count(), 1, "the rest need not bring what has come");
}

#[tokio::test(start_paused = true)]
async fn streams_are_kept_open_between_questions() {
    let world = World::new();
    let peer = Peer::honest(&world.sealed);
    let peers = world.peers([(GOOD, peer.clone())]);
    let incoming = lazily(&world, &peers).await;
    let chunks = world.sealed.memory_chunks();
    incoming.bring(chunks[0]).await.unwrap();
    let opened = peer.opened();
    for chunk in &chunks[1..10] {
        sleep(Duration::from_secs(60)).await;
        incoming.bring(*chunk).await.unwrap();
    }
    assert_eq!(peer.opened(), opened);
    // One that the holder has closed at last is no failure.
    sleep(Duration::from_secs(3600)).await;
    incoming.bring(chunks[10]).await.unwrap();
    assert_eq!(peer.opened(), opened + 1);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_does_a_guest_no_good_costs_it_little() {
    let hang = |_| Sent::Hangs(Vec::new());
    let dies = |_| Sent::Last(Vec::new());
    let lacks = |_| Sent::Bytes(LACKS.to_vec());
    let lies = |mut bytes: Vec<u8>| {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        Sent::Bytes(bytes)
    };
    let trickles = |bytes| Sent::Trickle(Duration::from_secs(1), bytes);
    let all: [(&str, Spoils); 5] = [
        ("hangs", hang),
        ("dies", dies),
        ("lacks", lacks),
        ("lies", lies),
        ("trickles", trickles),
    ];
    let world = World::new();
    for (what, spoil) in all {
        let world = world.anew();
        let bad = Peer::spoiled(&world.sealed, move |piece, bytes| match piece {
            Piece::Manifest(_) => Sent::Bytes(bytes),
            Piece::Chunk(..) => spoil(bytes),
        });
        let good = Peer::honest(&world.sealed);
        let peers = world.peers([(BAD, bad), (GOOD, good)]);
        let incoming = lazily(&world, &peers).await;
        let began = Instant::now();
        for chunk in world.sealed.memory_chunks().into_iter().take(20) {
            incoming.bring(chunk).await.unwrap();
        }
        // Once it is known, it is not asked first any more.
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "{what} {:?}",
            began.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn while_no_holder_can_be_reached_it_is_not_now_and_never_gone() {
    let world = World::new();
    let (peer, away) = Peer::away(&world.sealed);
    away.store(false, Ordering::Relaxed);
    let peers = world.peers([(GOOD, peer)]);
    let incoming = lazily(&world, &peers).await;
    let chunk = world.sealed.memory_chunks()[0];
    away.store(true, Ordering::Relaxed);
    for _ in 0..5 {
        let failed = incoming.bring(chunk).await.unwrap_err();
        let is_away = matches!(&failed, BringError::NotNow { away, .. } if *away == [GOOD]);
        assert!(is_away, "{failed:?}");
        sleep(LONG).await;
    }
    away.store(false, Ordering::Relaxed);
    incoming.bring(chunk).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_every_holder_lacks_is_gone_after_one_more_round() {
    let world = World::new();
    let lost = world.sealed.memory_chunks()[3];
    let lacking = |sealed: &Sealed| {
        Peer::spoiled(sealed, move |piece, bytes| match piece {
            Piece::Chunk(_, id) if id == lost => Sent::Bytes(LACKS.to_vec()),
            _ => Sent::Bytes(bytes),
        })
    };
    let peers = world.peers([
        (BAD, lacking(&world.sealed)),
        (GOOD, lacking(&world.sealed)),
    ]);
    let incoming = lazily(&world, &peers).await;
    let failed = incoming.bring(lost).await.unwrap_err();
    assert!(matches!(failed, BringError::NotNow { .. }), "{failed:?}");
    let told = failed.to_string();
    assert!(
        told.contains(&BAD.to_string()) && told.contains(&GOOD.to_string()),
        "{told}"
    );
    sleep(ONCE_MORE_AFTER).await;
    let failed = incoming.bring(lost).await.unwrap_err();
    assert!(matches!(failed, BringError::Gone { .. }), "{failed:?}");
    // What was found long ago says nothing about now.
    sleep(LONG).await;
    let failed = incoming.bring(lost).await.unwrap_err();
    assert!(matches!(failed, BringError::NotNow { .. }), "{failed:?}");
    // The rest comes, and then it is said that this one does not.
    let failed = incoming.complete().await.unwrap_err();
    assert!(matches!(failed, FetchError::NoHolder { .. }), "{failed:?}");
    let memory = world
        .sealed
        .signed
        .manifest()
        .running
        .unwrap()
        .memory
        .digest;
    let memory = world.store.image(&memory).unwrap();
    assert_eq!(world.store.missing(&memory), [lost]);
    // A holder that has it again, or a new one, is all it takes.
    let new = (NodeId(7), Peer::honest(&world.sealed));
    peers.peers.lock().unwrap().push(new);
    incoming.bring(lost).await.unwrap();
    incoming.complete().await.unwrap();
}

/// What comes of a chunk that `holders` are asked for, twice with a pause.
async fn asked_twice(incoming: &Incoming, chunk: ChunkId) -> BringError {
    let _first = incoming.bring(chunk).await.unwrap_err();
    sleep(ONCE_MORE_AFTER).await;
    incoming.bring(chunk).await.unwrap_err()
}

#[tokio::test(start_paused = true)]
async fn a_chunk_is_gone_where_no_holder_is_left_or_all_send_other_bytes_for_it() {
    let world = World::new();
    let chunk = world.sealed.memory_chunks()[0];
    let liar = Peer::spoiled(&world.sealed, move |piece, mut bytes| {
        if matches!(piece, Piece::Chunk(_, id) if id == chunk) {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        Sent::Bytes(bytes)
    });
    let peers = world.peers([(BAD, liar)]);
    let incoming = lazily(&world, &peers).await;
    let failed = asked_twice(&incoming, chunk).await;
    assert!(matches!(failed, BringError::Gone { .. }), "{failed:?}");

    let world = world.anew();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    peers.peers.lock().unwrap().clear();
    let failed = asked_twice(&incoming, chunk).await;
    // It gave something before, and so was asked; it is no holder, and so not waited for.
    assert!(matches!(failed, BringError::Gone { .. }), "{failed:?}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_gone_by_a_list_of_holders_that_may_be_old() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    let chunk = world.sealed.memory_chunks()[0];
    peers.peers.lock().unwrap().clear();
    peers.cut_off.store(true, Ordering::Relaxed);
    for _ in 0..5 {
        let failed = asked_twice(&incoming, chunk).await;
        assert!(matches!(failed, BringError::NotNow { .. }), "{failed:?}");
    }
    peers.cut_off.store(false, Ordering::Relaxed);
    let failed = asked_twice(&incoming, chunk).await;
    assert!(matches!(failed, BringError::Gone { .. }), "{failed:?}");
}

/// One that mends its copy says that it holds none meanwhile.
#[tokio::test(start_paused = true)]
async fn a_node_that_is_no_holder_any_more_is_asked_last_but_asked() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    let chunks = world.sealed.memory_chunks();
    incoming.bring(chunks[0]).await.unwrap();
    let before = peers.asked_of(GOOD);
    peers.peers.lock().unwrap().clear();
    incoming.bring(chunks[1]).await.unwrap();
    assert_eq!(peers.asked_of(GOOD), before + 1);
}

#[tokio::test(start_paused = true)]
async fn the_rest_waits_for_holders_as_long_as_it_takes() {
    let world = World::new();
    let (peer, away) = Peer::away(&world.sealed);
    away.store(false, Ordering::Relaxed);
    let peers = world.peers([(GOOD, peer)]);
    let incoming = lazily(&world, &peers).await;
    away.store(true, Ordering::Relaxed);
    let behind = incoming.clone();
    let rest = tokio::spawn(async move { behind.complete().await.map(drop) });
    sleep(Duration::from_secs(3600)).await;
    assert!(!rest.is_finished());
    away.store(false, Ordering::Relaxed);
    let came = timeout(Duration::from_secs(60), rest).await;
    came.expect("it is looked for now and then")
        .unwrap()
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_store_loses_nothing_of_what_has_come() {
    let world = World::new();
    let dir = world.dir.path().join("small");
    let tight = Limits {
        budget_bytes: 4 << 20,
        ..LIMITS
    };
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let store = Store::open(&dir, tight).unwrap();
    let holders = Arc::new(peers.clone());
    let incoming = store.fetch_lazily(world.sealed.digest(), holders.clone());
    let incoming = incoming.await.unwrap();
    let full = incoming.complete().await;
    let over = matches!(&full, Err(FetchError::Store(SealError::OverBudget { .. })));
    assert!(over, "{full:?}");
    let lacking = world.sealed.memory_chunks().into_iter();
    let lacking = lacking.rev().find(|id| !store.has(id)).unwrap();
    let full = incoming.bring(lacking).await.unwrap_err();
    assert!(matches!(full, BringError::Store { .. }), "{full:?}");
    let here = store.stats().unwrap().chunks;
    drop((incoming, store));

    let store = Store::open(&dir, LIMITS).unwrap();
    assert_eq!(store.stats().unwrap().chunks, here);
    let incoming = store.fetch_lazily(world.sealed.digest(), holders).await;
    drop(incoming.unwrap().complete().await.unwrap());
    world.sealed.assert_whole_in(&store, world.dir.path());
}

/// Whatever came is named by a manifest that is kept: no collection takes it.
#[tokio::test(start_paused = true)]
async fn a_collection_takes_nothing_of_a_snapshot_that_is_on_its_way() {
    let world = World::new();
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    let incoming = lazily(&world, &peers).await;
    let chunks = world.sealed.memory_chunks();
    for chunk in &chunks[..10] {
        incoming.bring(*chunk).await.unwrap();
    }
    let nothing = || Ok::<_, std::convert::Infallible>(Vec::new());
    let here = world.store.stats().unwrap().chunks;
    world.store.collect(nothing).unwrap();
    assert_eq!(world.store.stats().unwrap().chunks, here);
    drop(incoming);
    world.store.collect(nothing).unwrap();
    assert_eq!(world.store.stats().unwrap().chunks, 0);
}
