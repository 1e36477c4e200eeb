//! Extents: a run of blocks of an image that lies in one chunk, or is a hole.

use super::chunk::{CHUNK_BYTES_U64, ChunkId};

/// The unit of a disk image; images and extents are whole numbers of it.
pub const BLOCK_BYTES: u64 = 4096;

/// A run of blocks of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes from the start of the image.
    pub start_bytes: u64,
    /// How long it is.
    pub len_bytes: u64,
    /// What it holds.
    pub content: Content,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes, which are stored nowhere.
    Hole,
    /// Part of a chunk.
    Chunk {
        /// Which one.
        id: ChunkId,
        /// Where in it the extent begins.
        within_bytes: u32,
    },
}

impl Extent {
    /// Where it ends: the first byte that is not its own any more.
    #[must_use]
    pub fn end_bytes(&self) -> u64 {
        self.start_bytes.saturating_add(self.len_bytes)
    }

    /// True if it is not empty, lies on block borders, and stays inside its chunk.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let blocks = |bytes: u64| bytes.is_multiple_of(BLOCK_BYTES);
        let aligned = blocks(self.start_bytes) && blocks(self.len_bytes) && self.len_bytes > 0;
        aligned
            && match self.content {
                Content::Hole => self.start_bytes.checked_add(self.len_bytes).is_some(),
                Content::Chunk { within_bytes, .. } => {
                    let within = u64::from(within_bytes);
                    blocks(within)
                        && self.len_bytes <= CHUNK_BYTES_U64
                        && within + self.len_bytes <= CHUNK_BYTES_U64
                }
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start_bytes: u64, len_bytes: u64, within_bytes: Option<u32>) -> Extent {
        let id = ChunkId([0; 32]);
        Extent {
            start_bytes,
            len_bytes,
            content: within_bytes.map_or(Content::Hole, |within_bytes| Content::Chunk {
                id,
                within_bytes,
            }),
        }
    }

    #[test]
    fn a_run_inside_one_chunk_is_sound_and_one_past_its_end_is_not() {
        assert!(extent(0, 65536, Some(0)).is_sound());
        assert!(extent(4096, 8192, Some(57344)).is_sound());
        assert!(!extent(0, 65536, Some(4096)).is_sound());
        assert!(!extent(0, 69632, Some(0)).is_sound());
        assert!(!extent(0, u64::MAX - 4095, Some(0)).is_sound());
    }

    #[test]
    fn empty_and_unaligned_runs_are_not_sound() {
        assert!(!extent(0, 0, None).is_sound());
        assert!(!extent(1, 4096, None).is_sound());
        assert!(!extent(0, 4097, None).is_sound());
        assert!(!extent(0, 4096, Some(1)).is_sound());
        assert!(!extent(u64::MAX - 4095, 8192, None).is_sound());
    }
}
