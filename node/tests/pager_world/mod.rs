//! What the tests of the pager share: an image in packs, a daemon, and a process to be paged.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

pub mod daemon;
pub mod vmm;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use proto::units::Mib;
use wrenn_node::pager::handle::{Pager, PagerEnd, PagerSpec, StartPagerError};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::page_map::{Encoding, MappedChunk, PageMap, Place};
use wrenn_node::pager::prefetch::Fill;
use wrenn_node::pager::region::{ImageOffset, PAGE_BYTES, Region, WINDOW_BYTES};
use wrenn_node::pager::stats::Stats;
use wrenn_node::pager::uffd::Tracking;
use wrenn_node::store::chunk::{CHUNK_BYTES, ChunkId, is_zero};

use vmm::Vmm;

pub const SOON: Duration = Duration::from_secs(10);
pub const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);
const WINDOW: usize = CHUNK_BYTES;

/// Waits until `holds`, looking again and again.
pub fn eventually(timeout: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !holds() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// A memory image of a kind: every fourth window is a hole, every third of the others is not on
/// this node, and some are stored raw.
pub struct Image {
    pub bytes: Vec<u8>,
    pub map: PageMap,
    /// What a daemon would have to fetch, and its stored bytes.
    pub elsewhere: Vec<(ChunkId, Vec<u8>)>,
}

/// Which windows are not on this node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    None,
    EveryThird,
}

impl Image {
    pub fn make(dir: &Path, size: Mib, elsewhere: Elsewhere) -> Self {
        let region = Region::new(size);
        let mut bytes = vec![0; usize::try_from(region.bytes()).expect("64-bit")];
        let mut builder = PageMap::builder(region);
        let (pack, mut packed) = (dir.join("0001.pack"), b"head".to_vec());
        let mut fetched = Vec::new();
        for (number, window) in bytes.chunks_exact_mut(WINDOW).enumerate() {
            if number % 4 == 3 {
                continue;
            }
            for (at, word) in window.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                *word = (((number as u64) << 32) | ((at / 3) as u64 * 2_654_435_761)).to_le_bytes();
            }
            let stored = match number % 2 {
                0 => (Encoding::Raw, window.to_vec()),
                _ => (
                    Encoding::Zstd,
                    zstd::bulk::compress(window, 1).expect("compressed"),
                ),
            };
            let id = ChunkId::of(window);
            let far = elsewhere == Elsewhere::EveryThird && number % 3 == 0;
            let place = if far {
                fetched.push((id, window.to_vec()));
                None
            } else {
                let offset = packed.len() as u64;
                packed.extend(&stored.1);
                Some(Place {
                    pack: pack.as_path().into(),
                    offset,
                    stored_bytes: u32::try_from(stored.1.len()).expect("small"),
                    encoding: stored.0,
                })
            };
            let chunk = MappedChunk {
                id,
                bytes: u32::try_from(WINDOW).expect("small"),
                place,
            };
            let start = ImageOffset(number as u64 * WINDOW_BYTES);
            builder.push(start, WINDOW_BYTES, 0, chunk).expect("fits");
        }
        fs::write(&pack, packed).expect("written");
        let map = builder.finish();
        map.write(&dir.join("pages")).expect("written");
        Self {
            bytes,
            map,
            elsewhere: fetched,
        }
    }

    /// The image of a guest's memory as it is, all of it on this node.
    pub fn of(dir: &Path, bytes: &[u8]) -> Self {
        let region = Region::of_bytes(bytes.len() as u64).expect("whole pages");
        let mut builder = PageMap::builder(region);
        let (pack, mut packed) = (dir.join("0001.pack"), Vec::new());
        for (number, window) in bytes.chunks_exact(WINDOW).enumerate() {
            if is_zero(window) {
                continue;
            }
            let stored = zstd::bulk::compress(window, 1).expect("compressed");
            let raw = stored.len() >= window.len();
            let (encoding, stored) = match raw {
                true => (Encoding::Raw, window),
                false => (Encoding::Zstd, stored.as_slice()),
            };
            let place = Place {
                pack: pack.as_path().into(),
                offset: packed.len() as u64,
                stored_bytes: u32::try_from(stored.len()).expect("small"),
                encoding,
            };
            packed.extend(stored);
            let chunk = MappedChunk {
                id: ChunkId::of(window),
                bytes: u32::try_from(WINDOW).expect("small"),
                place: Some(place),
            };
            let start = ImageOffset(number as u64 * WINDOW_BYTES);
            builder.push(start, WINDOW_BYTES, 0, chunk).expect("fits");
        }
        fs::write(&pack, packed).expect("written");
        let map = builder.finish();
        map.write(&dir.join("pages")).expect("written");
        Self {
            bytes: bytes.to_vec(),
            map,
            elsewhere: Vec::new(),
        }
    }

    /// BLAKE3 of some of its pages.
    pub fn hash(&self, from: u64, pages: u64) -> String {
        hash(&self.bytes, from, pages)
    }
}

pub fn hash(bytes: &[u8], from: u64, pages: u64) -> String {
    let from = usize::try_from(from).expect("small") * PAGE;
    let length = usize::try_from(pages).expect("small") * PAGE;
    blake3::hash(&bytes[from..from + length]).to_string()
}

/// A guest's memory, a process that has mapped it, and what it is resumed from.
pub struct World {
    pub dir: tempfile::TempDir,
    pub memory: GuestMemory,
    pub vmm: Vmm,
    pub image: Image,
}

pub const MEMORY: Mib = Mib(16);
pub const PAGES: u64 = 16 * 256;

impl World {
    pub fn new(elsewhere: Elsewhere) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let image = Image::make(dir.path(), MEMORY, elsewhere);
        let memory = GuestMemory::create(MEMORY).expect("memory");
        let vmm = Vmm::start(dir.path(), &memory);
        Self {
            dir,
            memory,
            vmm,
            image,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn spec(&self) -> PagerSpec {
        PagerSpec {
            program: PathBuf::from(env!("CARGO_BIN_EXE_wrenn")),
            dir: self.dir.path().to_owned(),
            vmm_pid: self.vmm.pid(),
            pages: self.path("pages"),
            daemon: self.path("pager.sock"),
            sandbox: "cl-test".to_owned(),
            working_set: None,
            record_to: None,
            fill: Fill::Nothing,
            tracking: Tracking::WriteProtect,
        }
    }

    /// A pager for `spec`, and how it ends.
    pub fn try_start(
        &self,
        spec: PagerSpec,
    ) -> Result<(Pager, Receiver<PagerEnd>), StartPagerError> {
        let (sender, end) = mpsc::channel();
        let deadline = Instant::now() + SOON;
        let pager = Pager::start(spec, &self.memory, deadline, move |end| {
            let _nobody_waits = sender.send(end);
        })?;
        Ok((pager, end))
    }

    pub fn start(&self, spec: PagerSpec) -> Pager {
        self.try_start(spec).expect("it serves").0
    }
}

pub fn stats(pager: &Pager) -> Stats {
    pager.stats(Instant::now() + SOON).expect("told")
}

/// The pages of a list of runs.
pub fn pages_of(runs: &[Range<ImageOffset>]) -> Vec<u64> {
    runs.iter()
        .flat_map(|run| run.start.0 / PAGE_BYTES..run.end.0 / PAGE_BYTES)
        .collect()
}
