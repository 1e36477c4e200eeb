//! What the pager reads, as fuzz targets.

use std::io::{self, Cursor, IoSlice, Read, Write};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::sys::socket::{MsgFlags, sendmsg};
use proto::fuzzing::Target;
use proto::units::Mib;
use serde::Serialize;

use super::ask::{self, Answer, Question, Stored};
use super::control::{Channel, FromPager, Setup, ToPager};
use super::page_map::{Encoding, MappedChunk, PageMap, Place};
use super::post_copy::{QUESTION_BYTES, Slot, page_in};
use super::prefetch::Fill;
use super::region::{ImageOffset, PAGE_BYTES, Region, WINDOW_BYTES, WindowIndex};
use super::stats::Stats;
use super::uffd::Tracking;
use super::working_set::{Recorder, WorkingSet};
use crate::fuzzing::{hashed, now};
use crate::store::chunk::ChunkId;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "page-map",
        samples: || vec![map().encode()],
        run: page_map,
    },
    Target {
        name: "working-set",
        samples: working_sets,
        run: working_set,
    },
    Target {
        name: "pager-question",
        samples: questions,
        run: question,
    },
    Target {
        name: "pager-answer",
        samples: answers,
        run: answer,
    },
    Target {
        name: "vmm-question",
        samples: vmm_questions,
        run: vmm_question,
    },
    Target {
        name: "pager-control",
        samples: packets,
        run: packet,
    },
];

fn map() -> PageMap {
    let mut map = PageMap::builder(Region::new(Mib(1)));
    let mut piece = |window: u64, chunk: u8, place| {
        let chunk = MappedChunk {
            id: ChunkId([chunk; 32]),
            bytes: 65536,
            place,
        };
        let start = ImageOffset(window * WINDOW_BYTES);
        map.push(start, WINDOW_BYTES, 0, chunk).expect("it fits");
    };
    piece(0, 1, Some(place()));
    piece(1, 2, None);
    piece(5, 1, None);
    map.finish()
}

fn place() -> Place {
    Place {
        pack: Path::new("/store/packs/00000001.pack").into(),
        offset: 72,
        stored_bytes: 3000,
        encoding: Encoding::Zstd,
    }
}

/// Reads the map as it is, and with its hash made right: what is taken lies in the memory, in order,
/// apart, and inside its chunks.
fn page_map(bytes: &[u8]) {
    for bytes in [bytes, &hashed(bytes)] {
        let Ok(map) = PageMap::decode(bytes) else {
            continue;
        };
        let again = PageMap::decode(&map.encode());
        assert_eq!(again.ok().as_ref(), Some(&map), "it changed on its way");
        check_map(&map);
    }
}

fn check_map(map: &PageMap) {
    let mut reached = 0;
    // Holes may be of any length; so few windows as there are extents in reach of the samples.
    for window in (0..map.region().windows().min(64)).map(WindowIndex) {
        for extent in map.extents_of(window) {
            let end = extent.start.0 + extent.bytes;
            assert!(extent.start.0 >= reached && extent.bytes > 0);
            assert!(end <= map.region().bytes());
            assert_eq!(extent.start.page().window(), window);
            assert!(end <= (window.0 + 1) * WINDOW_BYTES);
            let chunk = &map.chunks()[extent.chunk as usize];
            assert!(u64::from(extent.within) + extent.bytes <= u64::from(chunk.bytes));
            assert!(extent.start.0.is_multiple_of(PAGE_BYTES));
            reached = end;
        }
    }
    assert!(map.extents_of(WindowIndex(u64::MAX)).is_empty());
}

fn working_sets() -> Vec<Vec<u8>> {
    let mut recorder = Recorder::new(Region::new(Mib(64)), &WorkingSet::default());
    for window in [7, 3, 900, 0, 5] {
        recorder.note(WindowIndex(window));
    }
    let recorded = recorder.finish().unwrap_or_default();
    vec![recorded.encode(), WorkingSet::default().encode()]
}

/// A recorded set may name windows past the end of this guest's memory: recording goes on behind it.
fn working_set(bytes: &[u8]) {
    for bytes in [bytes, &hashed(bytes)] {
        let Some(set) = WorkingSet::decode(bytes) else {
            continue;
        };
        assert_eq!(set.encode(), bytes, "a second spelling");
        let mut recorder = Recorder::new(Region::new(Mib(1)), &set);
        recorder.note(WindowIndex(3));
        recorder.note(WindowIndex(u64::MAX));
    }
}

/// A stream that says these bytes and hears whatever is said.
struct Said(Cursor<Vec<u8>>);

impl Read for Said {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn asked() -> Question {
    Question {
        sandbox: "cl-1".to_owned(),
        chunk: ChunkId([7; 32]),
        spoiled: true,
        takes_bytes: true,
    }
}

fn questions() -> Vec<Vec<u8>> {
    /// Keeps what the pager says.
    struct Heard(Vec<u8>);
    impl Read for Heard {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
    }
    impl Write for Heard {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut heard = Heard(Vec::new());
    // Nobody answers; what was asked is heard all the same.
    let _unanswered = ask::ask(&mut heard, &asked());
    vec![heard.0]
}

/// The daemon hears a pager.
fn question(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some(_)) = now(ask::next_question(&mut rest)) {}
}

/// A guest of 1 MiB, half of it above 4 GiB.
const SLOTS: [Slot; 2] = [
    Slot {
        gpa: 0,
        bytes: 512 << 10,
        image: 0,
    },
    Slot {
        gpa: 4 << 30,
        bytes: 512 << 10,
        image: 512 << 10,
    },
];

/// Questions of a VMM that asks for pages, one after the other.
fn vmm_questions() -> Vec<Vec<u8>> {
    let question = |gpa: u64| {
        let mut bytes = vec![0; QUESTION_BYTES];
        (bytes[0], bytes[8]) = (9, 16);
        bytes[16..24].copy_from_slice(&gpa.to_le_bytes());
        bytes[24..].copy_from_slice(&PAGE_BYTES.to_le_bytes());
        bytes
    };
    vec![[question(0x2000), question((4 << 30) + 0x7_f000)].concat()]
}

fn vmm_question(bytes: &[u8]) {
    let pages = Region::new(Mib(1)).pages();
    for question in bytes.as_chunks::<QUESTION_BYTES>().0 {
        if let Ok(page) = page_in(question, &SLOTS) {
            assert!(page.0 < pages, "a page that the guest does not have");
        }
    }
}

fn answers() -> Vec<Vec<u8>> {
    let answers = [
        Answer::At(place()),
        Answer::Here(Stored {
            encoding: Encoding::Zstd,
            bytes: vec![5; 300].into(),
        }),
        Answer::NotNow("no holder answers".to_owned()),
        Answer::Gone("no holder is left".to_owned()),
    ];
    let said = answers.map(|answer| {
        let mut bytes = Vec::new();
        now(ask::answer(&mut bytes, &answer)).expect("said");
        bytes
    });
    said.into()
}

/// The pager hears a daemon.
fn answer(bytes: &[u8]) {
    let mut said = Said(Cursor::new(bytes.to_vec()));
    let Ok(answer) = ask::ask(&mut said, &asked()) else {
        return;
    };
    let mut again = Vec::new();
    // A reason may be longer than what is sent, and is refused then.
    if now(ask::answer(&mut again, &answer)).is_ok() {
        let mut said = Said(Cursor::new(again));
        let heard = ask::ask(&mut said, &asked()).expect("our own words");
        assert_eq!(heard, answer, "it changed on its way");
    }
}

fn packets() -> Vec<Vec<u8>> {
    fn packet(message: &impl Serialize) -> Vec<u8> {
        serde_json::to_vec(message).expect("JSON")
    }
    let setup = Setup {
        vmm_pid: 7,
        memory_bytes: 1 << 20,
        pages: PathBuf::from("/D/pages"),
        daemon: PathBuf::from("/data/pager.sock"),
        sandbox: "cl-1".into(),
        working_set: Some(PathBuf::from("/D/working-set")),
        record_to: None,
        fill: Fill::default(),
        tracking: Tracking::WriteProtect,
        takeovers: 1,
        slots: Some(SLOTS.to_vec()),
    };
    vec![
        packet(&ToPager::Setup(setup)),
        packet(&ToPager::Ready),
        packet(&FromPager::Serving {
            tracking: Tracking::Compare,
        }),
        packet(&FromPager::Told(Stats::default())),
    ]
}

/// Both ends hear a packet, as it comes from the kernel.
fn packet(bytes: &[u8]) {
    let (ours, theirs) = Channel::pair().expect("a pair");
    let send = || {
        let part = [IoSlice::new(bytes)];
        sendmsg::<()>(theirs.as_raw_fd(), &part, &[], MsgFlags::MSG_DONTWAIT, None)
    };
    if send().is_ok() {
        let _refused = ours.receive::<ToPager>();
    }
    if send().is_ok() {
        let _refused = ours.receive::<FromPager>();
    }
}
