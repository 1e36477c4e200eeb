//! What pagers are told, and what they are not.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt as _;

use proto::epoch::Epoch;
use proto::units::{Mib, Stamp};
use transport::Identity;

use super::*;
use crate::pager::source::{Daemon, Finder as _, Found};
use crate::store::snapshot::{GuestFacts, MachineFacts, Running};
use crate::store::{Decoder, ImageDigest, ImageRef, Kept, Limits, SignedSnapshot};

const GUEST: SandboxId = SandboxId([3; 16]);
const WINDOW: usize = crate::store::CHUNK_BYTES;

/// A chunk's worth of bytes that no other number has, and that do not compress.
fn window(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; WINDOW];
    let mut reader = blake3::Hasher::new()
        .update(&number.to_le_bytes())
        .finalize_xof();
    reader.fill(&mut bytes);
    bytes
}

struct World {
    store: Store,
    paging: Paging,
    home: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let limits = Limits {
            keep_free_bytes: 0,
            pack_bytes: 1 << 20,
            ..Limits::default()
        };
        let store = Store::open(&home.path().join("store"), limits).expect("a store");
        Self {
            paging: Paging::new(store.clone()),
            store,
            home,
        }
    }

    /// A snapshot whose memory, a MiB, has `windows` at its start.
    fn seal(&self, windows: &[u64]) -> (SnapshotDigest, Kept) {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("sparse");
        for (at, number) in windows.iter().enumerate() {
            let at = (at * WINDOW) as u64;
            file.write_all_at(&window(*number), at).expect("written");
        }
        let seal = self.store.begin();
        let memory = seal.image(&file, 1 << 20).expect("sealed").image;
        let identity = Identity::ephemeral().expect("a key");
        let signed = SignedSnapshot::sign(manifest(memory), &identity).expect("sound");
        let kept = seal.finish(Some(&signed)).expect("durable");
        (signed.digest(), kept)
    }

    fn memory(&self, snapshot: SnapshotDigest) -> Manifest {
        let signed = self.store.snapshot(&snapshot).expect("here");
        let memory = signed.manifest().running.expect("it ran").memory.digest;
        self.store.image(&memory).expect("here")
    }

    /// Damages the first chunk of a snapshot's memory.
    fn spoil(&self, snapshot: SnapshotDigest) {
        let map = map_of(&self.store, &self.memory(snapshot)).expect("a map");
        let place = map.chunks()[0].place.clone().expect("here");
        let pack = fs::OpenOptions::new().write(true).open(&*place.pack);
        let pack = pack.expect("writable");
        pack.write_all_at(b"rot", place.offset).expect("spoiled");
    }

    fn admit(&self, snapshot: SnapshotDigest, bringer: impl Bringer) -> Admitted {
        self.paging.admit(GUEST, snapshot, Arc::new(bringer))
    }
}

fn manifest(memory: ImageRef) -> SnapshotManifest {
    SnapshotManifest {
        sandbox: GUEST,
        epoch: Epoch(1),
        created_at: Stamp(1),
        parent: None,
        running: Some(Running {
            memory,
            device_state: memory,
        }),
        disk: memory,
        working_set: None,
        base: ImageDigest([6; 32]),
        machine: MachineFacts {
            driver: "qemu".into(),
            driver_version: "7.2".into(),
            machine_type: "q35".into(),
            cpu_model: "tcg-1".into(),
            accelerator: "tcg".into(),
            vcpus: 1,
            memory: Mib(1),
        },
        guest: GuestFacts {
            kernel: "6.1".into(),
            initramfs: "0".into(),
            agent: "0".into(),
            mac: [2; 6],
            address: Ipv4Addr::LOCALHOST,
            prefix: 30,
            gateway: Ipv4Addr::LOCALHOST,
            token: "secret".into(),
        },
    }
}

/// Puts the chunks it has into the store, and otherwise says what it was made with.
#[derive(Debug)]
struct Brings {
    store: Store,
    has: Vec<u64>,
    otherwise: NotBrought,
}

impl Brings {
    fn nothing(world: &World) -> Self {
        Self {
            store: world.store.clone(),
            has: Vec::new(),
            otherwise: not_now("nobody answers"),
        }
    }
}

impl Bringer for Brings {
    fn bring(&self, chunk: ChunkId) -> BoxFuture<'_, Result<(), NotBrought>> {
        let found = self.has.iter().map(|it| window(*it));
        let found = found.into_iter().find(|it| ChunkId::of(it) == chunk);
        Box::pin(async move {
            let bytes = found.ok_or_else(|| self.otherwise.clone())?;
            let seal = self.store.begin();
            seal.put_named(chunk, &bytes).expect("stored");
            drop(seal.finish(None).expect("durable"));
            Ok(())
        })
    }
}

fn question(number: u64, spoiled: bool) -> Question {
    Question {
        sandbox: GUEST.to_string(),
        chunk: ChunkId::of(&window(number)),
        spoiled,
        takes_bytes: true,
    }
}

/// The bytes at a place, as a pager would read them.
fn read(place: &Place, chunk: ChunkId) -> Vec<u8> {
    let mut stored = vec![0; place.stored_bytes as usize];
    let pack = File::open(&*place.pack).expect("the pack is there");
    pack.read_exact_at(&mut stored, place.offset).expect("read");
    let encoding = match place.encoding {
        page_map::Encoding::Raw => Encoding::Raw,
        page_map::Encoding::Zstd => Encoding::Zstd,
    };
    let mut decoder = Decoder::new().expect("a decoder");
    let length = u32::try_from(WINDOW).expect("small");
    let decoded = decoder.decode(chunk, encoding, &stored, length);
    decoded.expect("the chunk's bytes")
}

#[tokio::test]
async fn a_chunk_that_a_collection_has_moved_is_found_where_it_is_now() {
    let world = World::new();
    let (kept, _hold) = world.seal(&[1, 2, 3]);
    let map = map_of(&world.store, &world.memory(kept)).expect("a map");
    let old = map.chunks()[0].place.clone().expect("here");
    // Fills the pack, and then some, with what nobody keeps.
    let all: Vec<u64> = (100..116).collect();
    for _ in 0..2 {
        drop(world.seal(&all));
    }
    let collected = world
        .store
        .collect(|| Ok::<_, io::Error>(vec![Pin::Snapshot(kept)]))
        .expect("collected");
    assert!(collected.copied_bytes > 0, "{collected:?}");
    assert!(!old.pack.exists(), "its pack is still there");

    let _admitted = world.admit(kept, Brings::nothing(&world));
    for number in [1, 2, 3] {
        let asked = question(number, true);
        let Answer::At(place) = world.paging.answer(&asked).await else {
            panic!("window {number} is not found");
        };
        assert_eq!(read(&place, asked.chunk), window(number));
    }
}

#[tokio::test]
async fn a_guest_is_told_of_its_own_memory_only() {
    let world = World::new();
    let (mine, _mine) = world.seal(&[1]);
    let (_, _theirs) = world.seal(&[2]);
    let answer = world.paging.answer(&question(1, false)).await;
    assert!(matches!(answer, Answer::NotNow(_)), "{answer:?}");
    let admitted = world.admit(mine, Brings::nothing(&world));
    let answer = world.paging.answer(&question(1, false)).await;
    assert!(matches!(answer, Answer::At(_)), "{answer:?}");
    let answer = world.paging.answer(&question(2, false)).await;
    assert!(matches!(answer, Answer::Gone(_)), "{answer:?}");
    drop(admitted);
    let answer = world.paging.answer(&question(1, false)).await;
    assert!(matches!(answer, Answer::NotNow(_)), "{answer:?}");
}

#[tokio::test]
async fn a_damaged_chunk_is_brought_again_or_waited_for_or_given_up() {
    let world = World::new();
    let (kept, _hold) = world.seal(&[1]);
    world.spoil(kept);
    let answered = async |has: &[u64], otherwise: &NotBrought| {
        let bringer = Brings {
            store: world.store.clone(),
            has: has.to_vec(),
            otherwise: otherwise.clone(),
        };
        let _admitted = world.admit(kept, bringer);
        world.paging.answer(&question(1, true)).await
    };
    let later = not_now("no holder answers");
    let never = NotBrought::Gone("no holder is left".into());
    assert_eq!(
        answered(&[], &later).await,
        Answer::NotNow("no holder answers".into())
    );
    assert_eq!(
        answered(&[], &never).await,
        Answer::Gone("no holder is left".into())
    );
    let Answer::At(place) = answered(&[1], &never).await else {
        panic!("it was brought");
    };
    assert_eq!(read(&place, question(1, false).chunk), window(1));
}

/// Gives a chunk without storing it, where it may. Whether it is right it does not know.
#[derive(Debug)]
struct Gives(Brings);

impl Bringer for Gives {
    fn bring(&self, chunk: ChunkId) -> BoxFuture<'_, Result<(), NotBrought>> {
        self.0.bring(chunk)
    }

    fn rush(&self, _: ChunkId) -> BoxFuture<'_, Result<Option<Carried>, NotBrought>> {
        let carried = Carried {
            encoding: Encoding::Raw,
            chunk_bytes: u32::try_from(WINDOW).expect("small"),
            stored: window(1).into(),
        };
        Box::pin(async move { Ok(Some(carried)) })
    }
}

#[tokio::test]
async fn a_pager_that_takes_bytes_is_given_them_and_an_older_one_a_place() {
    let world = World::new();
    let (kept, hold) = world.seal(&[1]);
    let map = map_of(&world.store, &world.memory(kept)).expect("a map");
    let place = map.chunks()[0].place.clone().expect("here");
    let pack = fs::OpenOptions::new().write(true).open(&*place.pack);
    pack.expect("writable")
        .write_all_at(b"rot", place.offset)
        .expect("spoiled");
    let newer = question(1, false);
    let _forgotten = world.store.get(&newer.chunk).expect_err("damaged");
    let has = Brings {
        has: vec![1],
        ..Brings::nothing(&world)
    };
    let _admitted = world.admit(kept, Gives(has));
    let Answer::Here(stored) = world.paging.answer(&newer).await else {
        panic!("it is given");
    };
    assert_eq!(stored.bytes, window(1));
    let older = Question {
        takes_bytes: false,
        ..newer.clone()
    };
    let Answer::At(place) = world.paging.answer(&older).await else {
        panic!("it takes no bytes");
    };
    assert_eq!(read(&place, older.chunk), window(1));
    // Once it is in the store nobody is given it any more.
    let found = world.paging.answer(&newer).await;
    assert_eq!(found, Answer::At(place));
    drop(hold);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_waits_for_others_is_seen_to_and_does_not_wait_for_ever() {
    let world = World::new();
    let (kept, _hold) = world.seal(&[1]);
    world.spoil(kept);
    let away = NotNow {
        why: "b is away".into(),
        away: vec!["b".into()],
    };
    let bringer = Brings {
        otherwise: NotBrought::NotNow(away.clone()),
        ..Brings::nothing(&world)
    };
    let _admitted = world.admit(kept, bringer);
    let began = time::Instant::now();
    let gone = loop {
        match world.paging.answer(&question(1, true)).await {
            Answer::NotNow(_) => time::sleep(Duration::from_secs(1)).await,
            answer => break answer,
        }
        let waiting = world.paging.waiting(GUEST);
        if let Some(waiting) = waiting {
            assert_eq!(waiting.reason, away);
        }
    };
    let told = format!(
        "b is away; that was waited for {:?} long: try again once b can be reached",
        longest()
    );
    assert_eq!(gone, Answer::Gone(told));
    assert_eq!(began.elapsed(), longest());
}

#[tokio::test]
async fn the_end_of_an_earlier_life_does_not_end_the_answers_of_a_later() {
    let world = World::new();
    let (kept, _hold) = world.seal(&[1]);
    let earlier = world.admit(kept, Brings::nothing(&world));
    let _later = world.admit(kept, Brings::nothing(&world));
    drop(earlier);
    let answer = world.paging.answer(&question(1, false)).await;
    assert!(matches!(answer, Answer::At(_)), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pager_is_answered_on_a_socket_with_a_long_path_by_one_daemon_after_the_other() {
    let world = World::new();
    let (kept, _hold) = world.seal(&[1]);
    let _admitted = world.admit(kept, Brings::nothing(&world));
    let deep = world.home.path().join("d".repeat(200));
    fs::create_dir(&deep).expect("made");
    let socket = deep.join("pager.sock");
    let daemon = Arc::new(Daemon::new(socket.clone(), GUEST.to_string()));
    let chunk = question(1, false).chunk;
    let first = Tasks::new();
    world.paging.serve(&socket, &first).expect("bound");
    let ask = || {
        let daemon = Arc::clone(&daemon);
        tokio::task::spawn_blocking(move || daemon.find(chunk, false))
    };
    let found = ask().await.expect("asked").expect("found");
    let Found::At(place) = found.clone() else {
        panic!("it is in the store: {found:?}");
    };
    assert_eq!(read(&place, chunk), window(1));
    first.stop_and_join().await;
    // Asked while there is none.
    let waits = ask();
    let second = Tasks::new();
    world.paging.serve(&socket, &second).expect("bound again");
    assert_eq!(waits.await.expect("asked").expect("found"), found);
    second.stop_and_join().await;
}

#[test]
fn a_working_set_goes_into_the_snapshot_and_is_laid_out_for_the_next_pager() {
    let world = World::new();
    let (here, there) = (
        tempfile::tempdir().expect("a directory"),
        tempfile::tempdir().expect("a directory"),
    );
    let mut recorder = working_set::Recorder::new(Region::new(Mib(1)), &WorkingSet::default());
    for window in [7, 0, 3] {
        recorder.note(crate::pager::region::WindowIndex(window));
    }
    let recorded = recorder.finish().expect("recorded");
    let sealed = |dir: &Path| {
        let seal = world.store.begin();
        let set = seal_working_set(&seal, dir).expect("sealed");
        (set, seal.finish(None).expect("durable"))
    };
    assert_eq!(sealed(here.path()).0, None, "it was never resumed");
    recorded
        .write(&here.path().join(WORKING_SET))
        .expect("written");
    let (set, _kept) = sealed(here.path());
    let (snapshot, _hold) = world.seal(&[1]);
    let memory = world.store.snapshot(&snapshot).expect("here");
    let next = SnapshotManifest {
        working_set: set,
        ..memory.manifest().clone()
    };
    describe(&world.store, &next, there.path()).expect("described");
    let path = there.path().join(WORKING_SET);
    assert_eq!(WorkingSet::read(&path).expect("sound"), recorded);
    let map = PageMap::read(&there.path().join(PAGES)).expect("sound");
    assert_eq!(map.chunks().len(), 1);

    fs::write(&path, b"rubbish").expect("written");
    assert_eq!(sealed(there.path()).0, None, "no pager would take it");
    let gone = ImageRef {
        digest: ImageDigest([9; 32]),
        len_bytes: 60,
    };
    let without = SnapshotManifest {
        working_set: Some(gone),
        ..next
    };
    describe(&world.store, &without, here.path()).expect("it goes without");
}
