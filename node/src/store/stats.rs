//! What a store holds, in figures.

use std::io;

use super::engine::Store;
use super::error::ReadManifestError;
use super::extent::Content;
use super::pin::{ChunkSet, Pin};
use super::rounds::Rounds;

/// What a store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Packs.
    pub packs: u64,
    /// Bytes they take.
    pub pack_bytes: u64,
    /// Chunks that can be read.
    pub chunks: u64,
    /// Bytes of those chunks.
    pub chunk_bytes: u64,
    /// Bytes they take in packs.
    pub stored_bytes: u64,
    /// Manifests of images.
    pub images: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Bytes that the images have in chunks, each image on its own.
    pub image_bytes: u64,
    /// Bytes of the different chunks that the images need.
    pub unique_bytes: u64,
    /// Bytes in packs that no manifest here needs. What a collection frees depends on its pins, and
    /// it frees whole packs.
    pub garbage_bytes: u64,
    /// How far all of it was read again in search of damage.
    pub rounds: Rounds,
}

impl Stats {
    /// How many times the images would take the room of their chunks, were each stored on its own;
    /// 1 where there is nothing to tell.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn dedup_ratio(&self) -> f64 {
        if self.unique_bytes == 0 {
            return 1.0;
        }
        self.image_bytes as f64 / self.unique_bytes as f64
    }

    /// The share of the packs' bytes that no manifest here needs.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn garbage_share(&self) -> f64 {
        if self.pack_bytes == 0 {
            return 0.0;
        }
        self.garbage_bytes as f64 / self.pack_bytes as f64
    }
}

impl Store {
    /// Counts what is here. Reads all manifests and the whole index.
    ///
    /// # Errors
    /// The manifests could not be listed, or the store is being closed.
    pub fn stats(&self) -> io::Result<Stats> {
        let mut stats = Stats {
            rounds: self.rounds(),
            ..Stats::default()
        };
        let mut needed = ChunkSet::default();
        for pin in self.manifests()? {
            if self.core.is_closing() {
                return Err(io::Error::other("the store is being closed"));
            }
            match self.count_manifest(&pin, &mut stats, &mut needed) {
                // A check tells more about those.
                Ok(()) | Err(_) => {}
            }
        }
        let lengths = self.core.packs.lengths();
        stats.packs = lengths.len() as u64;
        stats.pack_bytes = lengths.values().map(|length| u64::from(*length)).sum();
        let counted = self.core.with_index(|index| {
            let mut counted = stats;
            let mut needed_bytes = 0;
            index.each(|id, place| {
                let record_bytes = u64::from(place.record_bytes());
                counted.chunks += 1;
                counted.chunk_bytes += u64::from(place.chunk_bytes);
                counted.stored_bytes += record_bytes;
                if needed.contains(&id) {
                    needed_bytes += record_bytes;
                }
            })?;
            counted.garbage_bytes = counted.pack_bytes.saturating_sub(needed_bytes);
            Ok(counted)
        });
        Ok(counted.unwrap_or(stats))
    }

    fn count_manifest(
        &self,
        pin: &Pin,
        stats: &mut Stats,
        needed: &mut ChunkSet,
    ) -> Result<(), ReadManifestError> {
        let Pin::Image(digest) = pin else {
            stats.snapshots += 1;
            return Ok(());
        };
        stats.images += 1;
        for extent in self.image(digest)?.extents() {
            if let Content::Chunk { id, .. } = &extent.content {
                stats.image_bytes += extent.len_bytes;
                if needed.insert(id) {
                    stats.unique_bytes += extent.len_bytes;
                }
            }
        }
        Ok(())
    }
}
