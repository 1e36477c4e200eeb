//! The store: chunks in packs, where they lie in the index, manifests beside them.
//!
//! ```text
//! <store>/lock         held while the store is open
//!         packs/       NNNNNNNN.pack: the chunks, the only truth about them
//!         index/       sled; index.clean beside it says whether it may be trusted
//!         images/      manifests of images, each under its digest
//!         snapshots/   signed snapshot manifests, each under its digest
//!         bad/         manifests that a check moved out of the way
//! ```
//!
//! One [`Store`] owns the directory; clones of it are the same store. All calls block and may run
//! at once. Who does what: `seal` writes, this file reads, `collect` drops, `scrub` looks for
//! damage. What a crash at any instruction leaves, and why that is enough, is proved in
//! `docs/internals/store.md`.
//!
//! Locks, in the order in which they may be taken: collecting, pins or the end of the newest pack
//! (in `packs`, never both), index. None is held while anything is hashed or compressed.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::Flock;
use tokio::sync::watch;

use super::chunk::ChunkId;
use super::codec::{Decoder, Encoder, Encoding};
use super::durable;
use super::error::{OpenStoreError, ReadChunkError, ReadManifestError, SealError};
use super::extent::Content;
use super::fetch::progress::Transfers;
use super::index::{Doubt, Index, Place};
use super::manifest::{ImageDigest, Manifest};
use super::manifests::Manifests;
use super::pack::{Depth, Found, Pack};
use super::packs::{Limits, Packs, Purpose};
use super::pin::{Hold, Pin, Pins};
use super::record::{Draft, HEAD_BYTES};
use super::share::Helper;
use super::snapshot::{SignedSnapshot, SnapshotDigest};

/// Coders kept for the next caller. More are made while more work at once, and dropped after.
const KEPT_CODERS: usize = 4;

/// A content-addressed store of chunks and manifests. Clones are the same store; it closes with the
/// last of them.
#[derive(Clone, Debug)]
pub struct Store {
    pub(super) core: Arc<Core>,
}

/// Where the bytes of a chunk lie, for a process that reads packs itself.
///
/// A collection may move the chunk and unlink the pack. Who has the pack open reads on; who comes
/// later and finds no file asks again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The pack's file.
    pub pack: PathBuf,
    /// Where in it the stored bytes begin.
    pub offset_bytes: u64,
    /// How many there are.
    pub stored_bytes: u32,
    /// How long the chunk is.
    pub chunk_bytes: u32,
    /// How to read them: by a [`Decoder`], which checks them against the chunk's name.
    pub encoding: Encoding,
}

/// Keeps what it names, and all that needs, from being collected until it is dropped.
#[derive(Debug)]
pub struct Kept {
    _hold: Hold,
}

/// What all clones share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) packs: Packs,
    pub(super) index: Index,
    pub(super) pins: Arc<Pins>,
    pub(super) manifests: Manifests,
    pub(super) encoders: Pool<Encoder>,
    decoders: Pool<Decoder>,
    pub(super) helper: Helper,
    pub(super) transfers: Transfers,
    /// How many chunks and manifests turned out damaged since the store was opened.
    damage: watch::Sender<u64>,
    /// How many snapshots that came piecemeal have become whole since.
    pub(super) completed: watch::Sender<u64>,
    /// One collection or check at a time.
    pub(super) collecting: Mutex<()>,
    /// Whether collections and checks are to end, and none to begin.
    is_closing: AtomicBool,
    /// Dropped, and with it released, last.
    _lock: Flock<File>,
}

impl Store {
    /// Opens the store in `dir`, making it if there is none.
    ///
    /// After a crash the newest pack is read through, and the heads of all others.
    ///
    /// # Errors
    /// - [`OpenStoreError::InUse`]: another process, or this one, has it open.
    /// - [`OpenStoreError::OtherVersion`]: its packs are not ours to read.
    /// - [`OpenStoreError::Disk`]: the disk failed.
    pub fn open(dir: &Path, limits: Limits) -> Result<Self, OpenStoreError> {
        let packs_dir = dir.join("packs");
        for dir in [dir, &packs_dir] {
            durable::create_dir(dir).map_err(OpenStoreError::disk("create directory", dir))?;
        }
        let lock = take_lock(dir)?;
        durable::remove_leftovers(dir).map_err(OpenStoreError::disk("clear leftovers in", dir))?;
        let manifests =
            Manifests::open(dir).map_err(OpenStoreError::disk("make ready manifests in", dir))?;
        let guard_path = dir.join("index.clean");
        let guard =
            Index::take_guard(&guard_path).map_err(OpenStoreError::disk("use up", &guard_path))?;
        let known = guard.as_ref().map(|guard| &guard.packs);
        let (packs, as_left) = Packs::open(&packs_dir, limits, known)?;
        let trusted = guard.as_ref().filter(|_| as_left);
        let index = Index::open(&dir.join("index"), &guard_path, trusted, &|put| {
            fill_from(&packs, put);
        });
        let core = Core {
            packs,
            index,
            pins: Arc::default(),
            manifests,
            encoders: Pool::new(Encoder::new),
            decoders: Pool::new(Decoder::new),
            helper: Helper::default(),
            transfers: Transfers::default(),
            damage: watch::Sender::default(),
            completed: watch::Sender::default(),
            collecting: Mutex::default(),
            is_closing: AtomicBool::new(false),
            _lock: lock,
        };
        Ok(Self {
            core: Arc::new(core),
        })
    }

    /// Whether the store has the chunk.
    #[must_use]
    pub fn has(&self, id: &ChunkId) -> bool {
        self.core.find(id).is_some()
    }

    /// The bytes of a chunk, checked against its name.
    ///
    /// # Errors
    /// - [`ReadChunkError::Missing`]: it is not here.
    /// - [`ReadChunkError::Corrupt`]: it was damaged on disk, and has been forgotten.
    /// - [`ReadChunkError::Disk`]: the disk failed.
    pub fn get(&self, id: &ChunkId) -> Result<Vec<u8>, ReadChunkError> {
        self.core.get(id)
    }

    /// Where the chunk lies, if it is here.
    #[must_use]
    pub fn locate(&self, id: &ChunkId) -> Option<Location> {
        let (pack, place) = self.core.find(id)?;
        Some(Location {
            pack: pack.path().to_owned(),
            offset_bytes: u64::from(place.offset) + HEAD_BYTES as u64,
            stored_bytes: place.stored_bytes,
            chunk_bytes: place.chunk_bytes,
            encoding: place.encoding,
        })
    }

    /// The chunks of an image that are not here, each once, in the image's order.
    #[must_use]
    pub fn missing(&self, manifest: &Manifest) -> Vec<ChunkId> {
        let mut asked = HashSet::new();
        let chunks = manifest
            .extents()
            .iter()
            .filter_map(|extent| match extent.content {
                Content::Hole => None,
                Content::Chunk { id, .. } => Some(id),
            });
        chunks
            .filter(|id| asked.insert(*id) && !self.has(id))
            .collect()
    }

    /// The manifest of an image.
    ///
    /// # Errors
    /// [`ReadManifestError`]: it is not here, damaged, or the disk failed.
    pub fn image(&self, digest: &ImageDigest) -> Result<Manifest, ReadManifestError> {
        self.core.manifests.image(digest)
    }

    /// A snapshot. Whether its signer may seal was decided when it was put here.
    ///
    /// # Errors
    /// [`ReadManifestError`]: it is not here, damaged, or the disk failed.
    pub fn snapshot(&self, digest: &SnapshotDigest) -> Result<SignedSnapshot, ReadManifestError> {
        self.core.manifests.snapshot(digest)
    }

    /// Every manifest that is here, sorted. Its chunks need not be.
    ///
    /// # Errors
    /// The disk failed.
    pub fn manifests(&self) -> io::Result<Vec<Pin>> {
        self.core.manifests.list()
    }

    /// How many chunks and manifests turned out damaged since the store was opened. They are missing from then on,
    /// so whoever says that all of something is here looks again when this changes.
    #[must_use]
    pub fn damage(&self) -> watch::Receiver<u64> {
        self.core.damage.subscribe()
    }

    /// How many snapshots whose memory came last have become whole here since the store was opened.
    #[must_use]
    pub fn completed(&self) -> watch::Receiver<u64> {
        self.core.completed.subscribe()
    }

    /// Ends every collection, check and count that is under way within one chunk, and lets none begin:
    /// they take as long as the store is large, and whoever is about to go cannot wait for that. All
    /// else goes on.
    pub fn stop_chores(&self) {
        self.core.is_closing.store(true, Ordering::Relaxed);
    }

    /// Keeps these, and all they need, from every collection that begins while the answer lives.
    /// What is not here is kept from the moment it arrives.
    pub fn keep(&self, pins: impl IntoIterator<Item = Pin>) -> Kept {
        let hold = self.core.pins.hold();
        for pin in pins {
            hold.manifest(pin);
        }
        Kept::new(hold)
    }
}

impl Kept {
    /// Its manifests are durable and name all that must be kept.
    pub(super) fn new(hold: Hold) -> Self {
        hold.let_chunks_go();
        Self { _hold: hold }
    }
}

impl Core {
    /// Whether a long chore is to end.
    pub(super) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed)
    }

    /// Where the chunk lies, if it can be read from there.
    pub(super) fn find(&self, id: &ChunkId) -> Option<(Arc<Pack>, Place)> {
        let place = self.with_index(|index| index.get(id))??;
        // An entry may name a pack that is gone, where the index was filled in while packs were
        // being dropped.
        let pack = self.packs.get(place.pack)?;
        let end = place.offset.checked_add(place.record_bytes())?;
        (end <= pack.end()).then_some((pack, place))
    }

    pub(super) fn get(&self, id: &ChunkId) -> Result<Vec<u8>, ReadChunkError> {
        let chunk = *id;
        let (pack, place) = self.find(id).ok_or(ReadChunkError::Missing { chunk })?;
        let disk = |source| ReadChunkError::Disk { chunk, source };
        let stored = pack.stored(place.offset, place.stored_bytes);
        let stored = match stored {
            Err(err) if is_lost(&err) => None,
            stored => Some(stored.map_err(disk)?),
        };
        let decoded = match &stored {
            Some(stored) => self.decode(id, &place, stored).map_err(disk)?,
            None => None,
        };
        decoded.ok_or_else(|| {
            self.condemn(id, &pack, &place);
            ReadChunkError::Corrupt { chunk }
        })
    }

    /// What is stored of a chunk, checked against its checksum: who gets it checks the name.
    pub(super) fn stored(&self, id: &ChunkId) -> Result<(Place, Vec<u8>), ReadChunkError> {
        let chunk = *id;
        let (pack, place) = self.find(id).ok_or(ReadChunkError::Missing { chunk })?;
        let disk = |source| ReadChunkError::Disk { chunk, source };
        let read = || {
            let head = pack.head(place.offset)?;
            let stored = pack.stored(place.offset, place.stored_bytes)?;
            Ok(head
                .filter(|head| head.id == chunk && head.fits(&stored))
                .map(|_| stored))
        };
        match read() {
            Ok(Some(stored)) => return Ok((place, stored)),
            Err(err) if !is_lost(&err) => return Err(disk(err)),
            Ok(None) | Err(_) => {}
        }
        self.condemn(id, &pack, &place);
        Err(ReadChunkError::Corrupt { chunk })
    }

    /// The chunk, if what is stored of it is sound. Fails only where there is no memory to look.
    pub(super) fn decode(
        &self,
        id: &ChunkId,
        place: &Place,
        stored: &[u8],
    ) -> io::Result<Option<Vec<u8>>> {
        self.unpack(*id, place.encoding, stored, place.chunk_bytes)
    }

    /// The same for bytes from anywhere.
    pub(super) fn unpack(
        &self,
        id: ChunkId,
        encoding: Encoding,
        stored: &[u8],
        chunk_bytes: u32,
    ) -> io::Result<Option<Vec<u8>>> {
        self.decoders.with(|decoder| {
            let decoded = decoder.decode(id, encoding, stored, chunk_bytes);
            decoded.ok()
        })
    }

    /// Writes a record and enters where it lies.
    pub(super) fn append(&self, draft: Draft, purpose: Purpose) -> Result<Place, SealError> {
        let id = draft.head.id;
        let appended = self.packs.append(draft, purpose, |place| {
            self.with_index(|index| index.insert(&id, place));
        });
        self.settle(appended)
    }

    /// Returns once every record written so far would survive a power cut.
    pub(super) fn sync(&self) -> Result<(), SealError> {
        self.settle(self.packs.sync())
    }

    /// Where bytes were lost, entries may name them while an older copy is still there.
    pub(super) fn settle<T>(&self, done: Result<T, SealError>) -> Result<T, SealError> {
        if done.is_err() && self.packs.take_loss() {
            self.refill();
        }
        done
    }

    /// Wakes whoever says what is here.
    pub(super) fn tell_damage(&self) {
        self.damage.send_modify(|count| *count += 1);
    }

    /// Forgets a damaged chunk for good, so that it can be fetched again.
    pub(super) fn condemn(&self, id: &ChunkId, pack: &Pack, place: &Place) {
        tracing::warn!(chunk = %id, pack = place.pack, offset = place.offset, "a chunk is damaged");
        self.pins.still(|| {
            if self.with_index(|index| index.get(id)).flatten() == Some(*place) {
                self.with_index(|index| index.remove(id));
            }
        });
        self.tell_damage();
        let made_void = pack.head(place.offset).and_then(|head| match head {
            Some(head) if head.id == *id => pack.make_void(place.offset, head),
            // The head itself is damaged: no walk finds it.
            _ => Ok(()),
        });
        if let Err(err) = made_void {
            // Found again at the next start, and condemned again when it is read.
            tracing::warn!(chunk = %id, %err, "could not mark a damaged chunk");
        }
    }

    /// Asks the index; if it fails, it is filled in again from the packs and asked once more.
    pub(super) fn with_index<T>(&self, ask: impl Fn(&Index) -> Result<T, Doubt>) -> Option<T> {
        match ask(&self.index) {
            Ok(answer) => Some(answer),
            Err(doubt) => {
                tracing::warn!(%doubt, "the chunk index failed and is filled in again");
                self.refill();
                // Now it is in memory, where nothing fails.
                ask(&self.index).ok()
            }
        }
    }

    /// Fills the index in again from the packs.
    fn refill(&self) {
        self.index.refill(&|put| fill_from(&self.packs, put));
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if let Err(err) = self.packs.sync() {
            tracing::warn!(%err, "could not sync the store");
            return;
        }
        if let Err(doubt) = self.index.close(self.packs.lengths()) {
            tracing::warn!(%doubt, "the chunk index will be filled in again at the next start");
        }
    }
}

/// Hands over every record of every pack, oldest first. A pack that cannot be read to its end gives
/// what it can.
fn fill_from(packs: &Packs, put: &mut dyn FnMut(ChunkId, Place)) {
    for pack in packs.all() {
        let walked = pack.walk(Depth::Heads, |found| {
            match found {
                Found::Record { offset, head, .. } => {
                    if let Some(place) = Place::of(pack.number(), offset, &head) {
                        put(head.id, place);
                    }
                }
                Found::Gap { from, to } => {
                    tracing::warn!(pack = pack.number(), from, to, "a pack has damaged bytes");
                }
            }
            Ok(())
        });
        if let Err(err) = walked {
            tracing::warn!(pack = pack.number(), %err, "could not read a pack to its end");
        }
    }
}

/// Whether a failed read says that the bytes are no more: a file that was cut off, or a sector that
/// cannot be read. Another failure may be over the next time.
fn is_lost(err: &io::Error) -> bool {
    err.kind() == io::ErrorKind::UnexpectedEof || err.raw_os_error() == Some(Errno::EIO as i32)
}

fn take_lock(dir: &Path) -> Result<Flock<File>, OpenStoreError> {
    let path = dir.join("lock");
    let lock =
        durable::lock(&path, durable::LOCK_LAG).map_err(OpenStoreError::disk("lock", &path))?;
    lock.ok_or_else(|| OpenStoreError::InUse {
        path: dir.to_owned(),
    })
}

/// Things that are costly to make and used one at a time.
pub(super) struct Pool<T> {
    make: fn() -> io::Result<T>,
    idle: Mutex<Vec<T>>,
}

impl<T> Pool<T> {
    fn new(make: fn() -> io::Result<T>) -> Self {
        Self {
            make,
            idle: Mutex::default(),
        }
    }

    /// Uses one. Fails where another is needed and cannot be made.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> io::Result<R> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = idle().pop();
        let mut one = taken.map_or_else(self.make, Ok)?;
        let done = work(&mut one);
        let mut idle = idle();
        if idle.len() < KEPT_CODERS {
            idle.push(one);
        }
        Ok(done)
    }
}

impl<T> std::fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

#[cfg(test)]
mod tests;
