//! How one chunk looks in its pack. Pure: bytes in, bytes out.
//!
//! ```text
//! 0          4          8        12      16         17      24         56   56 + stored, padded to 8
//! | head crc | body crc | stored | chunk | encoding | 0 ... | chunk id | stored bytes ... |
//! ```
//!
//! All integers are little-endian. `stored` and `chunk` are lengths in bytes: of what lies here,
//! and of the chunk it stands for. The head has a checksum of its own, seeded with the pack's
//! number and the record's offset: a record that lies where it was not written does not verify, and
//! packs can be walked from head to head without reading what lies between. Records start on
//! multiples of 8.
//!
//! A record that was found bad is made *void* by rewriting its head: it is still walked over, and
//! nobody finds a chunk in it any more, however often the index is rebuilt.

use super::chunk::{CHUNK_BYTES, ChunkId};
use super::codec::Encoding;

/// Bytes before what a record stores.
pub(super) const HEAD_BYTES: usize = HEAD_LEN as usize;
/// The same, for arithmetic on offsets.
const HEAD_LEN: u32 = 56;
/// Records start on multiples of this.
pub(super) const ALIGN: u32 = 8;
/// The longest record.
pub(super) const MAX_RECORD_BYTES: usize = HEAD_BYTES + CHUNK_BYTES;

const _: () = assert!(MAX_RECORD_BYTES.is_multiple_of(ALIGN as usize));

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const VOID: u8 = 2;

/// What a record says about what it stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) id: ChunkId,
    /// `None` where the record is void.
    pub(super) encoding: Option<Encoding>,
    /// Bytes that lie in the pack.
    pub(super) stored_bytes: u32,
    /// Bytes of the chunk.
    pub(super) chunk_bytes: u32,
    pub(super) body_crc: u32,
}

impl Head {
    /// The head of a record for the chunk `id` of `chunk_bytes`, stored as `stored`. `None` where
    /// no record may be like that.
    pub(super) fn new(
        id: ChunkId,
        chunk_bytes: usize,
        encoding: Encoding,
        stored: &[u8],
    ) -> Option<Self> {
        let head = Self {
            id,
            encoding: Some(encoding),
            stored_bytes: u32::try_from(stored.len()).ok()?,
            chunk_bytes: u32::try_from(chunk_bytes).ok()?,
            body_crc: crc32c::crc32c(stored),
        };
        head.is_sound().then_some(head)
    }

    /// Bytes of the whole record, padding included.
    pub(super) fn record_bytes(&self) -> u32 {
        record_bytes(self.stored_bytes)
    }

    /// The head's bytes, to lie at `offset` of `pack`.
    pub(super) fn encode(&self, pack: u32, offset: u32) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[4..8].copy_from_slice(&self.body_crc.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.stored_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.chunk_bytes.to_le_bytes());
        bytes[16] = match self.encoding {
            Some(Encoding::Raw) => RAW,
            Some(Encoding::Zstd) => ZSTD,
            None => VOID,
        };
        bytes[24..].copy_from_slice(&self.id.0);
        let crc = checksum(pack, offset, &bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a head that lies at `offset` of `pack`; `None` where no head lies there.
    pub(super) fn parse(pack: u32, offset: u32, bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEAD_BYTES] = bytes.first_chunk()?;
        // The cheap questions come first: a search asks them at every eighth byte.
        let encoding = match bytes[16] {
            RAW => Some(Encoding::Raw),
            ZSTD => Some(Encoding::Zstd),
            VOID => None,
            _ => return None,
        };
        let mut id = [0; 32];
        id.copy_from_slice(&bytes[24..]);
        let head = Self {
            id: ChunkId(id),
            encoding,
            stored_bytes: u32_at(bytes, 8),
            chunk_bytes: u32_at(bytes, 12),
            body_crc: u32_at(bytes, 4),
        };
        let plausible = head.is_sound() && bytes[17..24].iter().all(|byte| *byte == 0);
        let right = plausible && u32_at(bytes, 0) == checksum(pack, offset, &bytes[4..]);
        right.then_some(head)
    }

    /// Whether `stored` is what was written behind this head.
    pub(super) fn fits(&self, stored: &[u8]) -> bool {
        stored.len() == self.stored_bytes as usize && crc32c::crc32c(stored) == self.body_crc
    }

    /// The head that makes this record void.
    pub(super) const fn void(self) -> Self {
        Self {
            encoding: None,
            ..self
        }
    }

    const fn is_sound(&self) -> bool {
        let length = self.chunk_bytes as usize;
        let in_bounds = length >= 1 && length <= CHUNK_BYTES && self.stored_bytes >= 1;
        in_bounds
            && match self.encoding {
                Some(Encoding::Raw) => self.stored_bytes == self.chunk_bytes,
                Some(Encoding::Zstd) => self.stored_bytes < self.chunk_bytes,
                None => self.stored_bytes <= self.chunk_bytes,
            }
    }
}

/// Bytes of a record that stores so many, which are at most a chunk.
pub(super) fn record_bytes(stored_bytes: u32) -> u32 {
    HEAD_LEN
        .saturating_add(stored_bytes)
        .next_multiple_of(ALIGN)
}

/// A record ready to be written anywhere: only its head depends on where it will lie.
pub(super) struct Draft {
    pub(super) head: Head,
    bytes: Vec<u8>,
}

impl Draft {
    pub(super) fn new(head: Head, stored: &[u8]) -> Self {
        let mut bytes = vec![0; head.record_bytes() as usize];
        bytes[HEAD_BYTES..HEAD_BYTES + stored.len()].copy_from_slice(stored);
        Self { head, bytes }
    }

    /// The record's bytes, to lie at `offset` of `pack`.
    pub(super) fn at(&mut self, pack: u32, offset: u32) -> &[u8] {
        let head = self.head.encode(pack, offset);
        self.bytes[..HEAD_BYTES].copy_from_slice(&head);
        &self.bytes
    }

    pub(super) fn len(&self) -> u32 {
        self.head.record_bytes()
    }
}

fn checksum(pack: u32, offset: u32, bytes: &[u8]) -> u32 {
    let seed = crc32c::crc32c(&pack.to_le_bytes());
    let seed = crc32c::crc32c_append(seed, &offset.to_le_bytes());
    crc32c::crc32c_append(seed, bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn draft(bytes: &[u8]) -> Draft {
        let head = Head::new(ChunkId::of(bytes), bytes.len(), Encoding::Raw, bytes).unwrap();
        Draft::new(head, bytes)
    }

    #[test]
    fn a_record_is_only_one_where_it_was_written() {
        let mut draft = draft(b"bytes");
        let bytes = draft.at(7, 64).to_vec();
        assert_eq!(Head::parse(7, 64, &bytes), Some(draft.head));
        assert_eq!(Head::parse(8, 64, &bytes), None);
        assert_eq!(Head::parse(7, 72, &bytes), None);
    }

    #[test]
    fn zeroes_are_no_record() {
        assert_eq!(Head::parse(0, 0, &[0; HEAD_BYTES]), None);
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let id = ChunkId([1; 32]);
        let long = vec![1; CHUNK_BYTES + 1];
        assert_eq!(Head::new(id, 0, Encoding::Raw, b""), None);
        assert_eq!(Head::new(id, long.len(), Encoding::Raw, &long), None);
        assert_eq!(Head::new(id, 4, Encoding::Raw, b"123"), None);
        assert_eq!(Head::new(id, 3, Encoding::Zstd, b"123"), None);
        assert!(Head::new(id, 4, Encoding::Zstd, b"123").is_some());
    }

    #[test]
    fn a_void_record_is_as_long_and_has_no_chunk() {
        let head = draft(b"some bytes").head;
        let void = Head::parse(1, 16, &head.void().encode(1, 16)).unwrap();
        assert_eq!(void.encoding, None);
        assert_eq!(void.record_bytes(), head.record_bytes());
    }

    proptest! {
        #[test]
        fn every_record_is_read_back(bytes in vec(any::<u8>(), 1..500), pack: u32, place in 0_u32..1000) {
            let mut draft = draft(&bytes);
            let offset = place * ALIGN;
            let written = draft.at(pack, offset).to_vec();
            let head = Head::parse(pack, offset, &written).unwrap();
            prop_assert_eq!(head, draft.head);
            prop_assert!(head.fits(&written[HEAD_BYTES..HEAD_BYTES + bytes.len()]));
            prop_assert_eq!(written.len(), head.record_bytes() as usize);
        }

        #[test]
        fn a_record_cut_anywhere_is_noticed(bytes in vec(any::<u8>(), 1..100)) {
            let written = draft(&bytes).at(3, 16).to_vec();
            for length in 0..HEAD_BYTES + bytes.len() {
                match Head::parse(3, 16, &written[..length]) {
                    None => prop_assert!(length < HEAD_BYTES),
                    Some(head) => prop_assert!(!head.fits(&written[HEAD_BYTES..length])),
                }
            }
        }

        #[test]
        fn every_flipped_bit_is_noticed(bytes in vec(any::<u8>(), 1..100), bit: prop::sample::Index) {
            let mut written = draft(&bytes).at(3, 16).to_vec();
            let bit = bit.index((HEAD_BYTES + bytes.len()) * 8);
            written[bit / 8] ^= 1 << (bit % 8);
            let head = Head::parse(3, 16, &written);
            let sound = head.is_some_and(|head| head.fits(&written[HEAD_BYTES..HEAD_BYTES + bytes.len()]));
            prop_assert!(!sound);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in vec(any::<u8>(), 0..80), pack: u32, offset: u32) {
            let _ = Head::parse(pack, offset, &bytes);
        }
    }
}
