//! Reading windows from pack files that are whole, damaged, missing, or somewhere else.

use std::fs;

use proto::units::Mib;

use super::*;
use crate::pager::region::{ImageOffset, Region};

/// Answers from a list, and remembers whether it was told that a place was spoiled.
#[derive(Default)]
struct Fake {
    answers: Mutex<Vec<Result<Found, String>>>,
    told: Arc<Mutex<Vec<bool>>>,
}

impl Finder for Fake {
    fn find(&self, _chunk: ChunkId, spoiled: bool) -> Result<Found, String> {
        lock(&self.told).push(spoiled);
        let mut answers = lock(&self.answers);
        if answers.len() > 1 {
            answers.remove(0)
        } else {
            answers[0].clone()
        }
    }
}

struct Packs {
    dir: tempfile::TempDir,
    told: Arc<Mutex<Vec<bool>>>,
}

impl Packs {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("tempdir"),
            told: Arc::default(),
        }
    }

    /// A pack named `name` that holds `bytes` behind a head of 10 bytes.
    fn pack(&self, name: &str, bytes: &[u8], encoding: Encoding) -> Place {
        let stored = match encoding {
            Encoding::Raw => bytes.to_vec(),
            Encoding::Zstd => zstd::bulk::compress(bytes, 1).expect("compressed"),
        };
        let pack = self.dir.path().join(name);
        fs::write(&pack, [&[0xee; 10], stored.as_slice()].concat()).expect("written");
        Place {
            pack: pack.into(),
            offset: 10,
            stored_bytes: u32::try_from(stored.len()).expect("small"),
            encoding,
        }
    }

    /// A source whose second window is `bytes`, at `place` or wherever `answers` say.
    fn source(
        &self,
        bytes: &[u8],
        place: Option<Place>,
        answers: Vec<Result<Place, String>>,
    ) -> ImageSource {
        let answers = answers.into_iter().map(|it| it.map(Found::At));
        self.source_told(bytes, place, answers.collect())
    }

    /// The same, where the answers need not be places.
    fn source_told(
        &self,
        bytes: &[u8],
        place: Option<Place>,
        answers: Vec<Result<Found, String>>,
    ) -> ImageSource {
        let mut builder = PageMap::builder(Region::new(Mib(1)));
        let chunk = MappedChunk {
            id: ChunkId::of(bytes),
            bytes: u32::try_from(bytes.len()).expect("small"),
            place,
        };
        builder
            .push(ImageOffset(WINDOW_BYTES), bytes.len() as u64, 0, chunk)
            .expect("fits");
        let fake = Fake {
            answers: Mutex::new(answers),
            told: Arc::clone(&self.told),
        };
        ImageSource::new(builder.finish(), Box::new(fake))
    }

    fn told(&self) -> Vec<bool> {
        lock(&self.told).clone()
    }
}

fn bytes() -> Vec<u8> {
    (0..CHUNK_BYTES)
        .map(|at| u8::try_from(at / 7 % 251).expect("small"))
        .collect()
}

fn read(source: &ImageSource) -> Result<Vec<u8>, SourceError> {
    let mut scratch = Scratch::new().expect("room");
    let content = source.read(WindowIndex(1), None, &mut scratch)?;
    assert_eq!(content, Content::Bytes);
    Ok(scratch.window.into_vec())
}

#[test]
fn a_local_window_is_read_raw_or_compressed_and_nobody_is_asked() {
    for encoding in [Encoding::Raw, Encoding::Zstd] {
        let packs = Packs::new();
        let place = packs.pack("a", &bytes(), encoding);
        let source = packs.source(&bytes(), Some(place), Vec::new());
        assert_eq!(source.whereabouts(WindowIndex(1)), Whereabouts::Here);
        assert_eq!(read(&source).expect("read"), bytes());
        assert!(packs.told().is_empty());
    }
}

#[test]
fn what_no_chunk_covers_is_a_hole_or_zero() {
    let packs = Packs::new();
    let half = &bytes()[..8192];
    let place = packs.pack("a", half, Encoding::Raw);
    let source = packs.source(half, Some(place), Vec::new());
    let mut scratch = Scratch::new().expect("room");
    scratch.window.fill(0xff);
    let hole = source
        .read(WindowIndex(0), None, &mut scratch)
        .expect("read");
    assert_eq!(hole, Content::Hole);
    assert_eq!(source.whereabouts(WindowIndex(0)), Whereabouts::Nowhere);
    source
        .read(WindowIndex(1), None, &mut scratch)
        .expect("read");
    assert_eq!(&scratch.window[..8192], half);
    assert!(scratch.window[8192..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_chunk_that_is_elsewhere_is_asked_for() {
    let packs = Packs::new();
    let place = packs.pack("fetched", &bytes(), Encoding::Zstd);
    let source = packs.source(&bytes(), None, vec![Ok(place)]);
    assert_eq!(source.whereabouts(WindowIndex(1)), Whereabouts::Elsewhere);
    assert_eq!(read(&source).expect("read"), bytes());
    assert_eq!(packs.told(), [false]);
}

#[test]
fn wrong_bytes_never_reach_the_guest_and_another_holder_is_asked() {
    let good = bytes();
    let mut flipped = good.clone();
    flipped[100] ^= 1;
    let spoil = |packs: &Packs, how: usize| match how {
        // Another content, a length that is not the chunk's, rubbish in place of a frame, no file.
        0 => packs.pack("bad", &flipped, Encoding::Raw),
        1 => packs.pack("bad", &good[..4096], Encoding::Zstd),
        2 => Place {
            encoding: Encoding::Zstd,
            ..packs.pack("bad", &good, Encoding::Raw)
        },
        _ => Place {
            pack: packs.dir.path().join("none").into(),
            ..packs.pack("bad", &good, Encoding::Raw)
        },
    };
    for how in 0..4 {
        let packs = Packs::new();
        let bad = spoil(&packs, how);
        let better = packs.pack("good", &good, Encoding::Raw);
        let source = packs.source(&good, Some(bad.clone()), vec![Ok(bad), Ok(better)]);
        assert_eq!(read(&source).expect("read"), good);
        assert_eq!(packs.told(), [true, true], "way {how}");
    }
}

#[test]
fn a_daemon_that_is_wrong_again_and_again_is_not_believed_for_ever() {
    let packs = Packs::new();
    let bad = packs.pack("bad", &[1; CHUNK_BYTES], Encoding::Zstd);
    let source = packs.source(&bytes(), None, vec![Ok(bad)]);
    let err = read(&source).expect_err("damaged");
    assert!(matches!(err, SourceError::Damaged { .. }), "{err}");
    assert_eq!(packs.told(), [false, true, true, true]);
}

#[test]
fn a_chunk_that_is_given_is_used_as_it_is() {
    let packs = Packs::new();
    let frame = zstd::bulk::compress(&bytes(), 1).expect("compressed");
    for (encoding, stored) in [(Encoding::Raw, bytes()), (Encoding::Zstd, frame)] {
        let given = Found::Here(Stored {
            encoding,
            bytes: stored.into(),
        });
        let source = packs.source_told(&bytes(), None, vec![Ok(given)]);
        assert_eq!(read(&source).expect("read"), bytes());
    }
    assert_eq!(packs.told(), [false, false]);
}

#[test]
fn wrong_bytes_that_are_given_never_reach_the_guest() {
    let bomb = zstd::bulk::compress(&vec![0; 50 << 20], 1).expect("compressed");
    let wrong = [
        (Encoding::Raw, vec![1; CHUNK_BYTES]),
        (Encoding::Raw, bytes()[..4096].to_vec()),
        (Encoding::Zstd, bytes()),
        (Encoding::Zstd, bomb),
    ];
    for (encoding, stored) in wrong {
        let packs = Packs::new();
        let bytes_given = stored.into();
        let given = Found::Here(Stored {
            encoding,
            bytes: bytes_given,
        });
        let better = Found::At(packs.pack("good", &bytes(), Encoding::Raw));
        let source = packs.source_told(&bytes(), None, vec![Ok(given.clone()), Ok(better)]);
        assert_eq!(read(&source).expect("read"), bytes());
        assert_eq!(packs.told(), [false, true]);

        let source = packs.source_told(&bytes(), None, vec![Ok(given)]);
        let err = read(&source).expect_err("damaged");
        assert!(matches!(err, SourceError::Damaged { .. }), "{err}");
    }
}

#[test]
fn a_frame_that_claims_more_than_a_chunk_is_refused() {
    let packs = Packs::new();
    let bomb = packs.pack("bomb", &vec![0; 50 << 20], Encoding::Zstd);
    let source = packs.source(&bytes(), Some(bomb), vec![Err("no holder".to_owned())]);
    let err = read(&source).expect_err("gone");
    assert!(matches!(err, SourceError::Gone { .. }), "{err}");
    assert_eq!(packs.told(), [true]);
}
