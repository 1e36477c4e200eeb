//! The end that hands snapshots out: what it gives to whom, and how long it bears with a fetcher.

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;
use wrenn_node::store::serve::{Asked, NamedChunks, ServeError, Wants};
use wrenn_node::store::{ChunkId, Content, SnapshotDigest, Store};

use super::store_support::peers::{GOOD, LACKS, MANIFESTS, Peer, Sealed, World};
use super::{AT_ONCE, LONG, fetch_whole};

#[tokio::test(start_paused = true)]
async fn a_fetcher_that_asks_for_too_much_or_goes_away_ends_only_its_own_stream() {
    let world = World::new();
    let asked = |digest| Asked {
        digest,
        wants: Wants::Manifests,
    };
    for ask in [&[0xff_u8, 0xff][..], &[0], &[]] {
        let (mut server, mut fetcher) = tokio::io::duplex(1 << 20);
        fetcher.write_all(ask).await.unwrap();
        fetcher.shutdown().await.unwrap();
        let asked = asked(world.sealed.digest());
        let served = world.sealed.store.serve(asked, &mut server).await;
        assert!(matches!(served, Err(ServeError::Stream(_))), "{served:?}");
    }
    let (mut server, _fetcher) = tokio::io::duplex(1 << 20);
    let nobodys = asked(SnapshotDigest([9; 32]));
    let served = world.sealed.store.serve(nobodys, &mut server).await;
    assert!(matches!(served, Err(ServeError::Read(_))), "{served:?}");
    let peers = world.peers([(GOOD, Peer::honest(&world.sealed))]);
    fetch_whole(world, &peers).await;
}

#[tokio::test(start_paused = true)]
async fn a_fetcher_that_says_nothing_is_let_go() {
    let world = World::new();
    let (mut server, _fetcher) = tokio::io::duplex(1 << 20);
    let asked = Asked {
        digest: world.sealed.digest(),
        wants: Wants::Chunks,
    };
    let began = Instant::now();
    let served = world.sealed.store.serve(asked, &mut server).await;
    assert!(matches!(served, Err(ServeError::Stream(_))), "{served:?}");
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
}

/// What it asked for does not keep a stream of its holder either.
#[tokio::test(start_paused = true)]
async fn a_fetcher_that_reads_nothing_is_let_go() {
    let world = World::new();
    // One that does not compress.
    let chunk = world.sealed.memory_chunks()[1];
    for wants in [Wants::Manifests, Wants::Chunks, Wants::Urgent] {
        // Less than one answer.
        let (mut server, mut fetcher) = tokio::io::duplex(500);
        fetcher.write_all(&request(&[chunk])).await.unwrap();
        let digest = world.sealed.digest();
        let began = Instant::now();
        let asked = Asked { digest, wants };
        let served = world.sealed.store.serve(asked, &mut server).await;
        assert!(matches!(served, Err(ServeError::Stream(_))), "{served:?}");
        assert!(began.elapsed() < LONG, "{wants:?}: {:?}", began.elapsed());
    }
}

/// A request for these chunks, as it is sent.
fn request(names: &[ChunkId]) -> Vec<u8> {
    let count = u16::try_from(names.len()).unwrap().to_be_bytes();
    let names = names.iter().flat_map(|name| name.0);
    count.into_iter().chain(names).collect()
}

/// All chunks of a snapshot that is in that store.
fn chunks_of(store: &Store, digest: SnapshotDigest) -> Vec<ChunkId> {
    let signed = store.snapshot(&digest).unwrap();
    let images = signed.manifest().images().into_iter();
    let manifests = images.map(|image| store.image(&image.digest).unwrap());
    let extents = manifests.flat_map(|manifest| manifest.extents().to_vec());
    let chunks = extents.filter_map(|extent| match extent.content {
        Content::Hole => None,
        Content::Chunk { id, .. } => Some(id),
    });
    chunks.collect()
}

/// Which of these chunks a peer is given that has asked so; without `named`, one that may have all.
async fn given(
    store: &Store,
    asked: Asked,
    named: Option<&NamedChunks>,
    names: &[ChunkId],
) -> Vec<bool> {
    let (mut server, mut fetcher) = tokio::io::duplex(1 << 20);
    // The fetcher sees the end of a stream that is not served to its own.
    let serving = async move {
        match named {
            Some(named) => store.serve_named(asked, named, &mut server).await,
            None => store.serve(asked, &mut server).await,
        }
    };
    let asking = async {
        if asked.wants == Wants::Manifests {
            for _ in 0..MANIFESTS {
                let length = fetcher.read_u32().await.unwrap();
                skip(&mut fetcher, length).await;
            }
        }
        let mut given = Vec::new();
        for batch in names.chunks(AT_ONCE) {
            fetcher.write_all(&request(batch)).await.unwrap();
            for _ in batch {
                let is_here = fetcher.read_u8().await.unwrap() != LACKS[0];
                given.push(is_here);
                if is_here {
                    let _chunk_bytes = fetcher.read_u32().await.unwrap();
                    let stored_bytes = fetcher.read_u32().await.unwrap();
                    skip(&mut fetcher, stored_bytes).await;
                }
            }
        }
        fetcher.write_all(&request(&[])).await.unwrap();
        given
    };
    let (served, given) = tokio::join!(serving, asking);
    served.unwrap();
    given
}

async fn skip(from: &mut (impl AsyncRead + Unpin), bytes: u32) {
    let mut skipped = vec![0; bytes as usize];
    from.read_exact(&mut skipped).await.unwrap();
}

/// A host of one team that knows the names of another team's chunks, or guesses them, learns nothing.
#[tokio::test(start_paused = true)]
async fn a_peer_that_may_have_one_snapshot_is_given_all_of_it_and_nothing_of_another() {
    let world = World::new();
    let store = &world.sealed.store;
    let other = Sealed::new(100, &world.identity);
    let peers = world.peers([(GOOD, Peer::honest(&other))]);
    let _kept = store.fetch(other.digest(), &peers).await.unwrap();

    let own = chunks_of(store, world.sealed.digest());
    // Some are in both.
    let mut others = chunks_of(store, other.digest());
    others.retain(|id| !own.contains(id));
    assert!(others.len() > 4 * AT_ONCE && others.iter().all(|id| store.has(id)));
    let absent = [ChunkId([9; 32])];
    let mixed: Vec<ChunkId> = own
        .iter()
        .zip(&others)
        .flat_map(|(a, b)| [*a, *b])
        .collect();
    let named = NamedChunks::default();
    for wants in [Wants::Manifests, Wants::Chunks, Wants::Urgent] {
        let digest = world.sealed.digest();
        let asked = Asked { digest, wants };
        let hears = |names| given(store, asked, Some(&named), names);
        assert!(hears(&own).await.into_iter().all(|it| it));
        assert!(!hears(&others).await.into_iter().any(|it| it));
        assert_eq!(hears(&absent).await, [false]);
        let expected = (0..mixed.len()).map(|at| at % 2 == 0);
        assert_eq!(hears(&mixed).await, expected.collect::<Vec<_>>());

        let member = given(store, asked, None, &mixed).await;
        assert!(member.into_iter().all(|it| it), "a member may have both");
    }
}

/// Where what a snapshot names cannot be read, no chunk is taken for one of it.
#[tokio::test(start_paused = true)]
async fn a_peer_that_may_have_one_snapshot_gets_nothing_where_it_is_not_known_what_that_names() {
    let world = World::new();
    let (mut server, mut fetcher) = tokio::io::duplex(1 << 20);
    let chunk = world.sealed.memory_chunks()[0];
    fetcher.write_all(&request(&[chunk])).await.unwrap();
    let asked = Asked {
        digest: SnapshotDigest([9; 32]),
        wants: Wants::Chunks,
    };
    let named = NamedChunks::default();
    let served = world.sealed.store.serve_named(asked, &named, &mut server);
    let served = served.await;
    assert!(matches!(served, Err(ServeError::Read(_))), "{served:?}");
    drop(server);
    assert_eq!(fetcher.read(&mut [0]).await.unwrap(), 0);
}
