//! Sealing: chunks into packs, then manifests, durable in that order.
//!
//! ```text
//! begin      from now on what this seal touches is held
//! put ...    hashed; known already: held and reused; new: compressed, appended, entered
//! finish     sync the newest pack > image manifests > snapshot manifest, each synced > Kept
//! ```
//!
//! Nothing counts before `finish` has answered; a seal that fails or is dropped leaves chunks that
//! nobody names, for the next seal to reuse or the next collection to drop. Any number of seals run
//! at once. Two that write the same chunk at the same instant write it twice; the spare one is
//! dropped with the rest.
//!
//! A seal may reuse a chunk that another one, still unfinished, has just written. That is why
//! `finish` syncs everything written so far, not only its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::chunk::{CHUNK_BYTES, ChunkId, is_zero};
use super::codec::Encoding;
use super::engine::{Core, Kept, Store};
use super::error::SealError;
use super::exchange::Carried;
use super::extent::Content;
use super::manifest::{ImageDigest, Manifest};
use super::packs::Purpose;
use super::pin::{Hold, Pin};
use super::record::{Draft, Head};
use super::snapshot::SignedSnapshot;
use crate::base::fault;

/// A batch of writes that becomes durable as a whole, or does not count.
#[derive(Debug)]
pub struct Seal {
    pub(super) core: Arc<Core>,
    hold: Hold,
    /// Of the packs when it began.
    generation: u64,
    images: Mutex<Vec<(ImageDigest, Vec<u8>)>>,
    tally: Counters,
}

/// What a seal has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Bytes of images that were read.
    pub read_bytes: u64,
    /// Chunks that were new.
    pub new_chunks: u64,
    /// Bytes those took in packs.
    pub written_bytes: u64,
    /// Chunks that were here already.
    pub reused_chunks: u64,
}

#[derive(Debug, Default)]
struct Counters {
    read_bytes: AtomicU64,
    new_chunks: AtomicU64,
    written_bytes: AtomicU64,
    reused_chunks: AtomicU64,
}

impl Store {
    /// Begins a seal.
    #[must_use]
    pub fn begin(&self) -> Seal {
        Seal {
            core: Arc::clone(&self.core),
            hold: self.core.pins.hold(),
            generation: self.core.packs.generation(),
            images: Mutex::default(),
            tally: Counters::default(),
        }
    }
}

impl Seal {
    /// Stores `bytes`, at most a chunk of them; `None` if they are all zero: a hole has no chunk.
    ///
    /// # Errors
    /// [`SealError`], of which those about room leave the store as it was.
    pub fn put(&self, bytes: &[u8]) -> Result<Option<ChunkId>, SealError> {
        if is_zero(bytes) {
            return Ok(None);
        }
        let id = ChunkId::of(bytes);
        self.put_chunk(id, bytes).map(|()| Some(id))
    }

    /// Stores the chunk `id`, whose bytes came from elsewhere.
    ///
    /// # Errors
    /// [`SealError::NotTheChunk`] if they are others; else as [`Self::put`].
    pub fn put_named(&self, id: ChunkId, bytes: &[u8]) -> Result<(), SealError> {
        if ChunkId::of(bytes) != id {
            return Err(SealError::NotTheChunk { chunk: id });
        }
        self.put_chunk(id, bytes)
    }

    /// Stores the chunk `id` as another store has it. What is stored is unpacked and checked against
    /// the name, and written as it came.
    ///
    /// # Errors
    /// As [`Self::put_named`].
    pub(super) fn put_carried(&self, id: ChunkId, carried: &Carried) -> Result<(), SealError> {
        let not_it = || SealError::NotTheChunk { chunk: id };
        let (encoding, stored) = (carried.encoding, &carried.stored[..]);
        let chunk_bytes = carried.chunk_bytes;
        let unpacked = self.core.unpack(id, encoding, stored, chunk_bytes);
        let unpacked = unpacked.map_err(|source| SealError::Read { source })?;
        let bytes = unpacked.ok_or_else(not_it)?;
        // Who compresses worse than nothing is made up for.
        let head = Head::new(id, bytes.len(), encoding, stored);
        match head {
            Some(head) => self.put_draft(id, || Ok(Draft::new(head, stored))),
            None => self.put_chunk(id, &bytes),
        }
    }

    /// Takes the manifest of an image into the seal, and holds its chunks, here or not.
    pub fn put_image(&self, manifest: &Manifest) -> ImageDigest {
        let chunks = manifest.extents().iter();
        self.hold
            .chunks(chunks.filter_map(|extent| match &extent.content {
                Content::Hole => None,
                Content::Chunk { id, .. } => Some(id),
            }));
        let bytes = manifest.encode();
        let digest = ImageDigest(*blake3::hash(&bytes).as_bytes());
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.push((digest, bytes));
        digest
    }

    /// Makes everything durable, chunks first, `snapshot` last. Its images and `snapshot` stay held
    /// until the answer is dropped: drop it once the pins that a collection asks for name them.
    ///
    /// # Errors
    /// [`SealError`]; nothing counts then. After [`SealError::Lost`] sealing again may succeed.
    pub fn finish(self, snapshot: Option<&SignedSnapshot>) -> Result<Kept, SealError> {
        self.core.sync()?;
        if self.core.packs.generation() != self.generation {
            return Err(SealError::Lost);
        }
        fault::point("store-seal-synced");
        let images = self.images.into_inner();
        for (digest, bytes) in images.unwrap_or_else(PoisonError::into_inner) {
            self.hold.manifest(Pin::Image(digest));
            self.core.manifests.put_image(&digest, &bytes)?;
        }
        fault::point("store-seal-images");
        if let Some(snapshot) = snapshot {
            self.hold.manifest(Pin::Snapshot(snapshot.digest()));
            self.core.manifests.put_snapshot(snapshot)?;
        }
        Ok(Kept::new(self.hold))
    }

    /// What it has done so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            read_bytes: load(&self.tally.read_bytes),
            new_chunks: load(&self.tally.new_chunks),
            written_bytes: load(&self.tally.written_bytes),
            reused_chunks: load(&self.tally.reused_chunks),
        }
    }

    pub(super) fn count_read(&self, bytes: usize) {
        let counter = &self.tally.read_bytes;
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn put_chunk(&self, id: ChunkId, bytes: &[u8]) -> Result<(), SealError> {
        if bytes.is_empty() || bytes.len() > CHUNK_BYTES {
            return Err(SealError::NotTheChunk { chunk: id });
        }
        self.put_draft(id, || self.draft(id, bytes))
    }

    fn put_draft(
        &self,
        id: ChunkId,
        draft: impl FnOnce() -> Result<Draft, SealError>,
    ) -> Result<(), SealError> {
        // Held first, looked for second: see `Hold::chunks`.
        self.hold.chunks([&id]);
        if self.core.find(&id).is_some() {
            self.tally.reused_chunks.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let draft = draft()?;
        let length = u64::from(draft.len());
        self.core.append(draft, Purpose::Seal)?;
        self.tally.new_chunks.fetch_add(1, Ordering::Relaxed);
        self.tally
            .written_bytes
            .fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    /// The record of a chunk: compressed if that pays. Any failure to compress only costs room.
    fn draft(&self, id: ChunkId, bytes: &[u8]) -> Result<Draft, SealError> {
        let shrunk = self.core.encoders.with(|encoder| encoder.shrink(bytes));
        let shrunk = shrunk.ok().flatten();
        let (encoding, stored) = match &shrunk {
            Some(shrunk) => (Encoding::Zstd, shrunk.as_slice()),
            None => (Encoding::Raw, bytes),
        };
        let head = Head::new(id, bytes.len(), encoding, stored);
        let head = head.ok_or(SealError::NotTheChunk { chunk: id })?;
        Ok(Draft::new(head, stored))
    }
}
