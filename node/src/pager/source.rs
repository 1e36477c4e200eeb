//! Where the bytes of a window come from.
//!
//! [`PageSource`] is what the fault loop asks. [`ImageSource`] reads pack files by the page map and
//! asks a [`Finder`] for chunks that are not on this node, or not as they should be: every chunk is
//! decoded and hashed before a byte of it reaches a guest, wherever it comes from.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::pager::ask::{self, Answer, AskError, Question, Stored};
use crate::pager::page_map::{Encoding, MappedChunk, PageMap, Place};
use crate::pager::region::{WINDOW_BYTES, WindowIndex, index};
use crate::store::chunk::{CHUNK_BYTES, ChunkId};

/// The first pause before the daemon is asked again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// A daemon that comes back is noticed within a second.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long one answer is waited for: the daemon may have to try several holders. Past it the
/// connection counts as dead and the question is asked again on another.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the daemon may point at bytes that are not the chunk's before it is not believed.
const MAX_WRONG_ANSWERS: u32 = 4;

/// Packs that are held open at once. An image of many generations may lie in thousands.
const MAX_OPEN_PACKS: usize = 256;

/// What stands in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes only; nothing was read.
    Hole,
    /// The bytes in the buffer.
    Bytes,
}

/// Where a window's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// Nowhere: it is zero.
    Nowhere,
    /// All on this node.
    Here,
    /// At least one chunk has to be asked for.
    Elsewhere,
}

/// Why a window cannot be had. There is no retry left: the guest cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Nobody holds the chunk any more.
    #[error("chunk {chunk} of the guest's memory cannot be had: {reason}")]
    Gone {
        /// Which one.
        chunk: ChunkId,
        /// What the daemon says.
        reason: String,
    },
    /// The daemon's places hold other bytes, again and again.
    #[error("chunk {chunk} of the guest's memory is damaged wherever it was looked for")]
    Damaged {
        /// Which one.
        chunk: ChunkId,
        /// What was wrong with the last place.
        source: LoadError,
    },
}

/// Why the bytes at a place are not the chunk's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// They cannot be read.
    #[error("read {stored_bytes} bytes at {offset} of {pack:?}")]
    Read {
        /// The file.
        pack: Arc<Path>,
        /// Where in it.
        offset: u64,
        /// How many.
        stored_bytes: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// They are no frame, or one of another length.
    #[error("the bytes at {offset} of {pack:?} do not decode")]
    Undecodable {
        /// The file.
        pack: Arc<Path>,
        /// Where in it.
        offset: u64,
    },
    /// They hash to another name.
    #[error("the bytes at {offset} of {pack:?} are another chunk's")]
    WrongHash {
        /// The file.
        pack: Arc<Path>,
        /// Where in it.
        offset: u64,
    },
    /// What the daemon gave in a place's stead is not the chunk.
    #[error("what the daemon gave is another chunk, or none")]
    Given,
}

/// What one thread needs to read windows.
pub struct Scratch {
    /// The window that was read last. Full length; zero where the image has nothing.
    pub window: Box<[u8]>,
    stored: Vec<u8>,
    chunk: Vec<u8>,
    decoder: zstd::bulk::Decompressor<'static>,
}

impl Scratch {
    /// Some 200 KiB of buffers.
    ///
    /// # Errors
    /// There is no memory for the decoder.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            window: vec![0; index(WINDOW_BYTES)].into_boxed_slice(),
            stored: Vec::new(),
            chunk: Vec::with_capacity(CHUNK_BYTES),
            decoder: zstd::bulk::Decompressor::new()?,
        })
    }
}

/// The image that a guest was resumed from.
pub trait PageSource: Send + Sync {
    /// Where the bytes of `window` are, from memory.
    fn whereabouts(&self, window: WindowIndex) -> Whereabouts;

    /// Reads `window` into the scratch's from this node's disk alone; `None` if that does not do.
    fn read_here(&self, window: WindowIndex, scratch: &mut Scratch) -> Option<Content>;

    /// Asks for what of `window` is elsewhere, without waiting for an answer or for anything else; that
    /// is for [`Self::read`]. `None` where nothing is, or where it would have to wait.
    fn ask_ahead(&self, window: WindowIndex) -> Option<Asked>;

    /// Reads `window` into the scratch's. Takes as long as it takes: a holder may have to be found.
    /// `asked` is what was asked ahead for it.
    ///
    /// # Errors
    /// See [`SourceError`].
    fn read(
        &self,
        window: WindowIndex,
        asked: Option<Asked>,
        scratch: &mut Scratch,
    ) -> Result<Content, SourceError>;
}

/// A question for a chunk that is under way.
#[derive(Debug)]
pub struct Asked {
    chunk: ChunkId,
    stream: UnixStream,
}

/// Finds chunks that are not where the page map says, or nowhere in it.
pub trait Finder: Send + Sync {
    /// Where `chunk` is on this node now, or the chunk itself. Blocks until it is there. `spoiled` says
    /// that the place known so far does not hold its bytes.
    ///
    /// # Errors
    /// The reason why it will never be there.
    fn find(&self, chunk: ChunkId, spoiled: bool) -> Result<Found, String>;

    /// Asks for `chunk`, if that takes no waiting.
    fn ask_ahead(&self, _chunk: ChunkId) -> Option<Asked> {
        None
    }

    /// The answer to that; `None` where it has to be asked for anew.
    ///
    /// # Errors
    /// As [`Self::find`].
    fn hear(&self, _asked: Asked) -> Option<Result<Found, String>> {
        None
    }
}

/// What a [`Finder`] has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Where it lies.
    At(Place),
    /// What is stored of it.
    Here(Stored),
}

/// The image that a page map describes.
pub struct ImageSource {
    map: PageMap,
    finder: Box<dyn Finder>,
    packs: Mutex<HashMap<Arc<Path>, Arc<File>>>,
}

impl ImageSource {
    /// The image of `map`, with `finder` for what it does not place.
    #[must_use]
    pub fn new(map: PageMap, finder: Box<dyn Finder>) -> Self {
        Self {
            map,
            finder,
            packs: Mutex::default(),
        }
    }

    /// The map.
    #[must_use]
    pub fn map(&self) -> &PageMap {
        &self.map
    }

    /// Puts `window` together from what `load` leaves in `scratch.chunk`.
    fn assemble<E>(
        &self,
        window: WindowIndex,
        scratch: &mut Scratch,
        mut load: impl FnMut(&MappedChunk, &mut Scratch) -> Result<(), E>,
    ) -> Result<Content, E> {
        let extents = self.map.extents_of(window);
        if extents.is_empty() {
            return Ok(Content::Hole);
        }
        scratch.window.fill(0);
        let base = window.offset().0;
        for extent in extents {
            load(&self.map.chunks()[index(u64::from(extent.chunk))], scratch)?;
            let to = index(extent.start.0 - base);
            let from = index(u64::from(extent.within));
            let length = index(extent.bytes);
            let bytes = &scratch.chunk[from..from + length];
            scratch.window[to..to + length].copy_from_slice(bytes);
        }
        Ok(Content::Bytes)
    }

    /// Leaves the chunk's bytes in `scratch.chunk`, wherever they have to come from. What was asked
    /// ahead is taken if it is this chunk.
    fn load_chunk(
        &self,
        chunk: &MappedChunk,
        asked: &mut Option<Asked>,
        scratch: &mut Scratch,
    ) -> Result<(), SourceError> {
        let mut asked = asked.take_if(|asked| asked.chunk == chunk.id);
        let mut failure = match &chunk.place {
            Some(place) => match self.load(place, chunk, scratch) {
                Ok(()) => return Ok(()),
                Err(err) => Some(err),
            },
            None => None,
        };
        for _ in 0..MAX_WRONG_ANSWERS {
            let heard = asked.take().and_then(|asked| self.finder.hear(asked));
            let found = heard.unwrap_or_else(|| self.finder.find(chunk.id, failure.is_some()));
            let found = found.map_err(|reason| SourceError::Gone {
                chunk: chunk.id,
                reason,
            })?;
            let loaded = match found {
                Found::At(place) => self.load(&place, chunk, scratch),
                Found::Here(stored) => unpack_given(&stored, chunk, scratch),
            };
            match loaded {
                Ok(()) => return Ok(()),
                Err(err) => failure = Some(err),
            }
        }
        Err(match failure {
            Some(source) => SourceError::Damaged {
                chunk: chunk.id,
                source,
            },
            None => SourceError::Gone {
                chunk: chunk.id,
                reason: "it was not looked for".to_owned(),
            },
        })
    }

    fn load(
        &self,
        place: &Place,
        chunk: &MappedChunk,
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        self.read_stored(place, &mut scratch.stored)
            .map_err(|source| {
                self.forget(&place.pack);
                LoadError::Read {
                    pack: Arc::clone(&place.pack),
                    offset: place.offset,
                    stored_bytes: place.stored_bytes,
                    source,
                }
            })?;
        let Scratch {
            stored,
            chunk: into,
            decoder,
            ..
        } = scratch;
        let (pack, offset) = (Arc::clone(&place.pack), place.offset);
        match unpack(decoder, place.encoding, stored, chunk, into) {
            Ok(()) => Ok(()),
            Err(NotIt::Undecodable) => Err(LoadError::Undecodable { pack, offset }),
            Err(NotIt::WrongHash) => Err(LoadError::WrongHash { pack, offset }),
        }
    }

    fn read_stored(&self, place: &Place, stored: &mut Vec<u8>) -> io::Result<()> {
        stored.resize(index(u64::from(place.stored_bytes)), 0);
        self.pack(&place.pack)?.read_exact_at(stored, place.offset)
    }

    /// The open file of a pack. Once open it stays readable, even if the name goes.
    fn pack(&self, path: &Arc<Path>) -> io::Result<Arc<File>> {
        if let Some(file) = lock(&self.packs).get(path) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(File::open(path)?);
        let mut packs = lock(&self.packs);
        if packs.len() >= MAX_OPEN_PACKS {
            packs.clear();
        }
        packs.insert(Arc::clone(path), Arc::clone(&file));
        Ok(file)
    }

    /// Has the pack opened anew next time: it may have been rewritten.
    fn forget(&self, path: &Path) {
        lock(&self.packs).remove(path);
    }
}

/// How stored bytes fail to be a chunk.
enum NotIt {
    Undecodable,
    WrongHash,
}

/// Leaves in `into` the chunk that `stored` is of.
fn unpack(
    decoder: &mut zstd::bulk::Decompressor<'_>,
    encoding: Encoding,
    stored: &[u8],
    chunk: &MappedChunk,
    into: &mut Vec<u8>,
) -> Result<(), NotIt> {
    into.clear();
    match encoding {
        Encoding::Raw => into.extend_from_slice(stored),
        // Never writes past the capacity, whatever the frame claims.
        Encoding::Zstd => {
            let unpacked = decoder.decompress_to_buffer(stored, into);
            unpacked.map_err(|_| NotIt::Undecodable)?;
        }
    }
    // Of a chunk that was elsewhere the map says only how much of it the image needs.
    if (into.len() as u64) < u64::from(chunk.bytes) {
        return Err(NotIt::Undecodable);
    }
    match ChunkId::of(into) == chunk.id {
        true => Ok(()),
        false => Err(NotIt::WrongHash),
    }
}

fn unpack_given(
    given: &Stored,
    chunk: &MappedChunk,
    scratch: &mut Scratch,
) -> Result<(), LoadError> {
    let Scratch {
        chunk: into,
        decoder,
        ..
    } = scratch;
    let unpacked = unpack(decoder, given.encoding, &given.bytes, chunk, into);
    unpacked.map_err(|_| LoadError::Given)
}

impl PageSource for ImageSource {
    fn whereabouts(&self, window: WindowIndex) -> Whereabouts {
        let extents = self.map.extents_of(window);
        let here = |chunk: u32| {
            let chunk = self.map.chunks().get(index(u64::from(chunk)));
            chunk.is_some_and(|chunk| chunk.place.is_some())
        };
        if extents.is_empty() {
            Whereabouts::Nowhere
        } else if extents.iter().all(|extent| here(extent.chunk)) {
            Whereabouts::Here
        } else {
            Whereabouts::Elsewhere
        }
    }

    fn read_here(&self, window: WindowIndex, scratch: &mut Scratch) -> Option<Content> {
        self.assemble(window, scratch, |chunk, scratch| {
            let place = chunk.place.as_ref().ok_or(())?;
            self.load(place, chunk, scratch).map_err(drop)
        })
        .ok()
    }

    fn ask_ahead(&self, window: WindowIndex) -> Option<Asked> {
        let extents = self.map.extents_of(window).iter();
        let mut chunks = extents.map(|extent| &self.map.chunks()[index(u64::from(extent.chunk))]);
        let elsewhere = chunks.find(|chunk| chunk.place.is_none())?;
        self.finder.ask_ahead(elsewhere.id)
    }

    fn read(
        &self,
        window: WindowIndex,
        mut asked: Option<Asked>,
        scratch: &mut Scratch,
    ) -> Result<Content, SourceError> {
        self.assemble(window, scratch, |chunk, scratch| {
            self.load_chunk(chunk, &mut asked, scratch)
        })
    }
}

/// Asks the daemon. See [`super::ask`].
pub struct Daemon {
    socket: PathBuf,
    sandbox: String,
    /// Connections on which nothing is under way.
    idle: Mutex<Vec<UnixStream>>,
    /// Questions that have been under way for longer than one answer may take, or were put off.
    stalled: AtomicU64,
}

impl Daemon {
    /// The daemon that listens on `socket`, for the guest of `sandbox`. Nothing is connected yet.
    #[must_use]
    pub fn new(socket: PathBuf, sandbox: String) -> Self {
        Self {
            socket,
            sandbox,
            idle: Mutex::default(),
            stalled: AtomicU64::new(0),
        }
    }

    /// How many questions have no answer although they were asked more than once.
    #[must_use]
    pub fn stalled(&self) -> u64 {
        self.stalled.load(Ordering::Relaxed)
    }

    fn question(&self, chunk: ChunkId, spoiled: bool) -> Question {
        Question {
            sandbox: self.sandbox.clone(),
            chunk,
            spoiled,
            takes_bytes: true,
        }
    }

    fn ask_once(&self, question: &Question) -> Result<Answer, AskError> {
        let idle = lock(&self.idle).pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => self.connect()?,
        };
        let answer = ask::ask(&mut stream, question)?;
        lock(&self.idle).push(stream);
        Ok(answer)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        // A socket's path may have 107 bytes, a data directory's may have more.
        let (dir, name) = match (self.socket.parent(), self.socket.file_name()) {
            (Some(dir), Some(name)) => (File::open(dir)?, Path::new(name)),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let through = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        let stream = UnixStream::connect(through.join(name))?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(stream)
    }
}

impl Finder for Daemon {
    fn find(&self, chunk: ChunkId, spoiled: bool) -> Result<Found, String> {
        let question = self.question(chunk, spoiled);
        let asked = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut counted = None;
        loop {
            match self.ask_once(&question) {
                Ok(Answer::At(place)) => return Ok(Found::At(place)),
                Ok(Answer::Here(stored)) => return Ok(Found::Here(stored)),
                Ok(Answer::Gone(reason)) => return Err(reason),
                Ok(Answer::NotNow(_)) => {}
                // A daemon that was restarted leaves connections that are none. They go first.
                Err(_) => lock(&self.idle).clear(),
            }
            if asked.elapsed() >= LONGEST_PAUSE {
                counted.get_or_insert_with(|| Stalled::new(&self.stalled));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn ask_ahead(&self, chunk: ChunkId) -> Option<Asked> {
        // To connect may take waiting.
        let mut stream = lock(&self.idle).pop()?;
        let sent = ask::send(&mut stream, &self.question(chunk, false));
        sent.is_ok().then_some(Asked { chunk, stream })
    }

    fn hear(&self, asked: Asked) -> Option<Result<Found, String>> {
        let mut stream = asked.stream;
        let Ok(answer) = ask::receive(&mut stream) else {
            lock(&self.idle).clear();
            return None;
        };
        lock(&self.idle).push(stream);
        match answer {
            Answer::At(place) => Some(Ok(Found::At(place))),
            Answer::Here(stored) => Some(Ok(Found::Here(stored))),
            Answer::Gone(reason) => Some(Err(reason)),
            Answer::NotNow(_) => None,
        }
    }
}

/// Counts one question as stalled for as long as it lives.
struct Stalled<'a>(&'a AtomicU64);

impl<'a> Stalled<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Finder for Arc<Daemon> {
    fn find(&self, chunk: ChunkId, spoiled: bool) -> Result<Found, String> {
        Daemon::find(self, chunk, spoiled)
    }

    fn ask_ahead(&self, chunk: ChunkId) -> Option<Asked> {
        Daemon::ask_ahead(self, chunk)
    }

    fn hear(&self, asked: Asked) -> Option<Result<Found, String>> {
        Daemon::hear(self, asked)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
