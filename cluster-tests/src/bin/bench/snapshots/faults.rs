//! How long a page takes that a guest touches first: out of this node's packs and from a peer, beside
//! a file mapped into memory.
//!
//! A process plays the VMM: it maps the memory, touches the first byte of each window of 64 KiB once,
//! in an order that no read-ahead guesses, and times each touch by itself; so a figure has all that
//! a virtual CPU would wait for: the fault, the pager's process being woken, reading, decoding and
//! hashing a chunk, putting it in place, being woken. The pager is the product's, started as a shim
//! starts it. Of the file once all of it is in the page cache, and once none is.
//!
//! The peer is another store behind a transport of its own on loopback ([`peer`]): what comes from it
//! is encrypted on its way, verified, and stored before the pager hears where it lies.
//!
//! The image is of 64 KiB windows of which half is bytes of chance and half one byte, so it
//! compresses about as memory does. All is sealed in a real store first.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use node::pager::handle::{Pager, PagerSpec, WORKING_SET};
use node::pager::memory::GuestMemory;
use node::pager::page_map::{self, MappedChunk, PAGES, PageMap, Place};
use node::pager::region::{ImageOffset, Region, WINDOW_BYTES};
use node::pager::uffd::sys::SharedBytes;
use node::store::{CHUNK_BYTES, Content, Encoding, ImageRef, Limits, Manifest, Store};
use proto::ids::SandboxId;
use proto::units::Mib;
use tempfile::TempDir;
use wrenn_cluster_tests::world::wrenn;

use super::peer::Peer;
use super::{floor, rounds};
use crate::figures::{Samples, at_most, ratio};
use crate::{Outcome, Run};

/// Whose memory it is.
pub(super) const GUEST: SandboxId = SandboxId([7; 16]);
/// Where the daemon's half answers.
const SOCKET: &str = "pager.sock";
/// Memory that is paged: 4096 windows, so that 41 are slower than the 99th percentile.
pub(super) const MEMORY: Mib = Mib(256);
/// Windows between two that are touched one after the other; prime, so that all are reached.
const STRIDE: u64 = 1361;
/// Touches that are not counted: the processes wake up, the decoder warms up.
const WARM_UP: usize = 64;
/// Longest anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks for a socket.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// The most that a page may take, wherever it comes from.
const P99_GOAL_US: f64 = 300.0;

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let image = Image::make()?;
    let [mut cached, mut uncached, mut local, mut peer] = [const { Vec::new() }; 4];
    for round in 1..=rounds(run) {
        run.go_on()?;
        image.forget()?;
        uncached.extend(image.touch_file()?);
        cached.extend(image.touch_file()?);
        local.extend(image.touch_local()?);
        peer.extend(image.touch_peer()?);
        run.note(&format!("round {round}"));
    }
    let print = |name: &str, values: Vec<f64>| -> Samples {
        let samples: Samples = values.into_iter().collect();
        samples.print(&format!("fault_{name}"), "us");
        samples
    };
    print("file_cached", cached);
    let uncached = print("file_uncached", uncached);
    let local = print("local", local);
    // In the middle a file wins: what is read for one touch is read far ahead for others.
    let name = "fault_local_over_file_uncached_p99";
    ratio(name, local.p99(), uncached.p99(), 1.0);
    at_most("fault_local_p99", local.p99(), P99_GOAL_US);
    let peer = print("peer", peer);
    ratio("fault_peer_over_local_p50", peer.p50(), local.p50(), 3.0);
    at_most("fault_peer_p99", peer.p99(), P99_GOAL_US);
    floor::stream()?.print("fault_floor_stream", "us");
    floor::socket()?.print("fault_floor_socket", "us");
    Ok(())
}

/// A memory image, as a file and in a store.
struct Image {
    dir: TempDir,
    file: File,
    store: Store,
    memory: ImageRef,
    manifest: Manifest,
}

impl Image {
    fn make() -> Outcome<Self> {
        let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        let path = dir.path().join("image");
        let mut file = File::create_new(&path)?;
        let mut random = File::open("/dev/urandom")?;
        let mut window = [0; CHUNK_BYTES];
        for _ in 0..MEMORY.bytes() / WINDOW_BYTES {
            random.read_exact(&mut window[..CHUNK_BYTES / 2])?;
            file.write_all(&window)?;
        }
        file.sync_all()?;
        let file = File::options().read(true).write(true).open(path)?;
        let store = Store::open(&dir.path().join("store"), Limits::default())?;
        let seal = store.begin();
        let sealed = seal.image(&file, MEMORY.bytes())?;
        drop(seal.finish(None)?);
        let manifest = store.image(&sealed.image.digest)?;
        Ok(Self {
            dir,
            file,
            store,
            memory: sealed.image,
            manifest,
        })
    }

    /// Has the page cache drop the file.
    fn forget(&self) -> Outcome {
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }

    /// Touches of the file itself.
    fn touch_file(&self) -> Outcome<Vec<f64>> {
        Paged::start(self.dir.path(), &self.file)?.touch_all()
    }

    /// Touches of memory that a pager brings from the store of this node.
    fn touch_local(&self) -> Outcome<Vec<f64>> {
        self.touch_paged(&self.store)
    }

    /// Touches of memory that a pager brings from the store of another node, none of which is here.
    fn touch_peer(&self) -> Outcome<Vec<f64>> {
        let socket = self.dir.path().join(SOCKET);
        let peer = Peer::start(&self.store, self.memory, self.dir.path(), &socket)?;
        let touched = self.touch_paged(peer.lacking());
        peer.stop();
        touched
    }

    /// Touches of memory that a pager brings, as far as it can out of `store`.
    fn touch_paged(&self, store: &Store) -> Outcome<Vec<f64>> {
        map_of(store, &self.manifest, Region::new(MEMORY))?.write(&self.dir.path().join(PAGES))?;
        let memory = GuestMemory::create(MEMORY)?;
        let paged = Paged::start(self.dir.path(), &memory)?;
        let socket = self.dir.path().join(SOCKET);
        let spec = PagerSpec {
            program: wrenn(),
            ..PagerSpec::new(self.dir.path(), paged.pid(), socket, GUEST.to_string())
        };
        let _pager = Pager::start(spec, &memory, Instant::now() + PATIENCE, |_| ())?;
        let touched = paged.touch_all();
        // What was recorded here is no working set for the next one.
        let _none = std::fs::remove_file(self.dir.path().join(WORKING_SET));
        touched
    }
}

/// Where each chunk of an image lies in `store`, for a pager.
pub(crate) fn map_of(store: &Store, manifest: &Manifest, region: Region) -> Outcome<PageMap> {
    let mut map = PageMap::builder(region);
    for extent in manifest.extents() {
        let Content::Chunk { id, within_bytes } = extent.content else {
            continue;
        };
        let place = store.locate(&id).map(|at| Place {
            pack: at.pack.into(),
            offset: at.offset_bytes,
            stored_bytes: at.stored_bytes,
            encoding: match at.encoding {
                Encoding::Raw => page_map::Encoding::Raw,
                Encoding::Zstd => page_map::Encoding::Zstd,
            },
        });
        let chunk = MappedChunk {
            id,
            bytes: u32::try_from(CHUNK_BYTES)?,
            place,
        };
        let start = ImageOffset(extent.start_bytes);
        map.push(start, extent.len_bytes, within_bytes, chunk)?;
    }
    Ok(map.finish())
}

/// The process whose memory is paged: this very program, started again.
struct Paged {
    child: Child,
    socket: PathBuf,
}

impl Paged {
    /// One that has mapped `memory`, and has touched nothing of it.
    fn start(dir: &Path, memory: &impl AsFd) -> Outcome<Self> {
        let socket = dir.join("paged.sock");
        let _old = std::fs::remove_file(&socket);
        let child = Command::new(std::env::current_exe()?)
            .arg("--paged")
            .arg(&socket)
            .stdin(Stdio::from(memory.as_fd().try_clone_to_owned()?))
            .spawn()?;
        let paged = Self { child, socket };
        let deadline = Instant::now() + PATIENCE;
        // Its file is there a moment before it listens.
        while UnixStream::connect(&paged.socket).is_err() {
            if Instant::now() > deadline {
                return Err("the process to be paged does not come up".into());
            }
            thread::sleep(LOOK_AGAIN);
        }
        Ok(paged)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it touch every window; microseconds each.
    fn touch_all(&self) -> Outcome<Vec<f64>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"go\n")?;
        let mut told = String::new();
        BufReader::new(stream).read_line(&mut told)?;
        let nanos = told.split_whitespace().map(str::parse::<u32>);
        let nanos: Vec<u32> = nanos.collect::<Result<_, _>>()?;
        Ok(nanos
            .into_iter()
            .skip(WARM_UP)
            .map(|nanos| f64::from(nanos) / 1e3)
            .collect())
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        // It may have ended by itself; what matters is that it is reaped.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The process itself: maps the memory in its standard input's place, and touches it when told.
pub(crate) fn be_paged(socket: &Path) -> Outcome {
    let memory = SharedBytes::map(io::stdin().as_fd().try_clone_to_owned()?, MEMORY.bytes())?;
    let listener = UnixListener::bind(socket)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        if BufReader::new(&stream).read_line(&mut String::new())? == 0 {
            // Whoever only looked whether we listen.
            continue;
        }
        let mut told = String::new();
        let windows = MEMORY.bytes() / WINDOW_BYTES;
        for number in 0..windows {
            let at = usize::try_from(number * STRIDE % windows * WINDOW_BYTES)?;
            let began = Instant::now();
            memory.bytes()[at].load(Ordering::Relaxed);
            told += &format!("{} ", began.elapsed().as_nanos());
        }
        told.push('\n');
        stream.write_all(told.as_bytes())?;
    }
    Ok(())
}
