//! Manifests: the ordered extents that describe one image.
//!
//! An image has exactly one manifest and a manifest exactly one encoding, because its BLAKE3 hash
//! is the image's digest, by which nodes agree on what they hold. That is why the encoding is our
//! own, with fixed widths, and not a format with several spellings of one value:
//!
//! ```text
//! "wrenn-im"  u32 version  u64 image bytes  u32 extents      all integers little-endian
//! per extent: u8 0  u64 length                               a hole
//!             u8 1  u32 length  u32 offset in the chunk  32 bytes chunk id
//! ```
//!
//! Offsets in the image are not written: each extent begins where the one before it ends, so
//! overlaps, gaps and disorder cannot be expressed on the wire. Holes are as long as they can be.
//! Bytes from a peer are checked in full before anything is built from them, and memory is set
//! aside only for as many extents as the bytes have room for.

use std::fmt;
use std::str::FromStr;

use super::chunk::{CHUNK_BYTES_U64, ChunkId, ParseHashError, parse_hex, write_hex};
use super::error::DecodeManifestError;
use super::extent::{BLOCK_BYTES, Content, Extent};

/// Version of the encoding.
pub const MANIFEST_VERSION: u32 = 1;
/// The largest image we handle: with 64 KiB chunks its manifest stays below 3 GiB, and every
/// offset fits a signed file offset with room to spare.
pub const MAX_IMAGE_BYTES: u64 = 4 << 40;

const MAGIC: [u8; 8] = *b"wrenn-im";
const HEADER_BYTES: usize = MAGIC.len() + 4 + 8 + 4;
const HOLE: u8 = 0;
const CHUNK: u8 = 1;
const HOLE_BYTES: usize = 1 + 8;
const CHUNK_REF_BYTES: usize = 1 + 4 + 4 + 32;

/// Longest manifest of an image of which so many bytes are in use, in windows of a chunk: with a hole
/// between any two. None that we seal is longer.
pub(super) const fn longest_bytes(in_use_bytes: u64) -> u64 {
    let windows = in_use_bytes.div_ceil(CHUNK_BYTES_U64);
    let (chunk, hole) = (CHUNK_REF_BYTES as u64, HOLE_BYTES as u64);
    HEADER_BYTES as u64 + hole + windows * (chunk + hole)
}

/// The digest of an image: BLAKE3 of its manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageDigest(pub [u8; 32]);

impl fmt::Display for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageDigest({self})")
    }
}

impl FromStr for ImageDigest {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        parse_hex(text).map(Self)
    }
}

/// Ordered extents that describe one image, without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    image_bytes: u64,
    extents: Vec<Extent>,
}

impl Manifest {
    /// The manifest of an image of `image_bytes` with these extents.
    ///
    /// Neighbouring holes are joined, so that equal images get equal manifests.
    ///
    /// # Errors
    /// - [`DecodeManifestError::ImageSize`]: no image can have that size.
    /// - [`DecodeManifestError::Extent`]: one is empty, unaligned or reaches outside its chunk.
    /// - [`DecodeManifestError::Cover`]: they are out of order, overlap, leave gaps or end
    ///   elsewhere than the image.
    pub fn new(
        image_bytes: u64,
        extents: impl IntoIterator<Item = Extent>,
    ) -> Result<Self, DecodeManifestError> {
        check_size(image_bytes)?;
        let mut manifest = Self {
            image_bytes,
            extents: Vec::new(),
        };
        for (index, extent) in extents.into_iter().enumerate() {
            if !extent.is_sound() {
                return Err(DecodeManifestError::Extent { index });
            }
            if extent.start_bytes != manifest.covered_bytes() {
                return Err(DecodeManifestError::Cover);
            }
            manifest.append(extent);
        }
        if manifest.covered_bytes() != image_bytes {
            return Err(DecodeManifestError::Cover);
        }
        Ok(manifest)
    }

    /// Reads a manifest from bytes that anyone may have written.
    ///
    /// # Errors
    /// Any of [`DecodeManifestError`]; the bytes are then worth nothing.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeManifestError> {
        let mut reader = Reader { all: bytes, at: 0 };
        if reader.array()? != MAGIC {
            return Err(DecodeManifestError::Magic);
        }
        let version = u32::from_le_bytes(reader.array()?);
        if version != MANIFEST_VERSION {
            return Err(DecodeManifestError::Version {
                found: version,
                ours: MANIFEST_VERSION,
            });
        }
        let image_bytes = u64::from_le_bytes(reader.array()?);
        let count = reader.count()?;
        let mut extents: Vec<Extent> = Vec::with_capacity(count);
        for index in 0..count {
            let start_bytes = extents.last().map_or(0, Extent::end_bytes);
            let extent = reader.extent(index, start_bytes)?;
            let after_hole = extents.last().map(|last| last.content) == Some(Content::Hole);
            if after_hole && extent.content == Content::Hole {
                // A second spelling of the same image.
                return Err(DecodeManifestError::Extent { index });
            }
            extents.push(extent);
        }
        if reader.at != bytes.len() {
            return Err(reader.wrong_length());
        }
        Self::new(image_bytes, extents)
    }

    /// The bytes that stand for this manifest.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.extents.len() * CHUNK_REF_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&MANIFEST_VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.image_bytes.to_le_bytes());
        bytes.extend_from_slice(&low_u32(self.extents.len() as u64).to_le_bytes());
        for extent in &self.extents {
            match extent.content {
                Content::Hole => {
                    bytes.push(HOLE);
                    bytes.extend_from_slice(&extent.len_bytes.to_le_bytes());
                }
                Content::Chunk { id, within_bytes } => {
                    bytes.push(CHUNK);
                    bytes.extend_from_slice(&low_u32(extent.len_bytes).to_le_bytes());
                    bytes.extend_from_slice(&within_bytes.to_le_bytes());
                    bytes.extend_from_slice(&id.0);
                }
            }
        }
        bytes
    }

    /// The digest of the image it describes.
    #[must_use]
    pub fn digest(&self) -> ImageDigest {
        ImageDigest(*blake3::hash(&self.encode()).as_bytes())
    }

    /// How long the image is.
    #[must_use]
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// The extents in order; together they cover the image exactly.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extent that holds the byte at `offset_bytes`; `None` past the end.
    #[must_use]
    pub fn extent_at(&self, offset_bytes: u64) -> Option<&Extent> {
        let index = self
            .extents
            .partition_point(|extent| extent.end_bytes() <= offset_bytes);
        self.extents.get(index)
    }

    fn covered_bytes(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end_bytes)
    }

    fn append(&mut self, extent: Extent) {
        match self.extents.last_mut() {
            Some(last) if last.content == Content::Hole && extent.content == Content::Hole => {
                last.len_bytes += extent.len_bytes;
            }
            _ => self.extents.push(extent),
        }
    }
}

/// A whole number of blocks, more than none, and no more than we handle.
pub(super) fn check_size(image_bytes: u64) -> Result<(), DecodeManifestError> {
    let whole = image_bytes.is_multiple_of(BLOCK_BYTES);
    if image_bytes == 0 || image_bytes > MAX_IMAGE_BYTES || !whole {
        return Err(DecodeManifestError::ImageSize { image_bytes });
    }
    Ok(())
}

/// Numbers that the rules of a manifest keep below 2^32: at most one extent per block of the
/// largest image, and chunk extents no longer than a chunk.
fn low_u32(number: u64) -> u32 {
    const { assert!(MAX_IMAGE_BYTES / BLOCK_BYTES <= u32::MAX as u64) };
    u32::try_from(number).expect("a manifest's counts fit 32 bits")
}

/// Bytes being taken apart, with the place reached.
struct Reader<'a> {
    all: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeManifestError> {
        let rest = self.all.get(self.at..).unwrap_or_default();
        let (taken, _) = rest
            .split_first_chunk::<N>()
            .ok_or_else(|| self.wrong_length())?;
        self.at += N;
        Ok(*taken)
    }

    /// The number of extents, refused if the bytes have no room for so many.
    fn count(&mut self) -> Result<usize, DecodeManifestError> {
        let count = u32::from_le_bytes(self.array()?);
        let room = (self.all.len() - self.at) / HOLE_BYTES;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= room)
            .ok_or_else(|| self.wrong_length())
    }

    fn extent(&mut self, index: usize, start_bytes: u64) -> Result<Extent, DecodeManifestError> {
        let [kind] = self.array()?;
        let (len_bytes, content) = match kind {
            HOLE => (u64::from_le_bytes(self.array()?), Content::Hole),
            CHUNK => {
                let len_bytes = u32::from_le_bytes(self.array()?);
                let within_bytes = u32::from_le_bytes(self.array()?);
                let id = ChunkId(self.array()?);
                (u64::from(len_bytes), Content::Chunk { id, within_bytes })
            }
            _ => return Err(DecodeManifestError::Extent { index }),
        };
        Ok(Extent {
            start_bytes,
            len_bytes,
            content,
        })
    }

    fn wrong_length(&self) -> DecodeManifestError {
        DecodeManifestError::Length {
            bytes: self.all.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The extents of an image from lengths in blocks and contents, each after the one before.
    fn lay_out(parts: &[(u64, Option<u8>)]) -> Vec<Extent> {
        let mut start_bytes = 0;
        parts
            .iter()
            .map(|(blocks, chunk)| {
                let extent = Extent {
                    start_bytes,
                    len_bytes: blocks * BLOCK_BYTES,
                    content: chunk.map_or(Content::Hole, |name| Content::Chunk {
                        id: ChunkId([name; 32]),
                        within_bytes: 0,
                    }),
                };
                start_bytes = extent.end_bytes();
                extent
            })
            .collect()
    }

    fn manifest(parts: &[(u64, Option<u8>)]) -> Manifest {
        let extents = lay_out(parts);
        Manifest::new(extents.last().unwrap().end_bytes(), extents).unwrap()
    }

    fn parts() -> impl Strategy<Value = Vec<(u64, Option<u8>)>> {
        vec((1_u64..=16, any::<Option<u8>>()), 1..40)
    }

    #[test]
    fn neighbouring_holes_become_one() {
        let joined = manifest(&[(1, None), (2, None), (1, Some(1)), (1, None)]);
        assert_eq!(joined, manifest(&[(3, None), (1, Some(1)), (1, None)]));
        assert_eq!(joined.extents().len(), 3);
    }

    #[test]
    fn a_manifest_is_longest_where_each_chunk_lies_between_holes() {
        let [first, second] = [(16, Some(1)), (16, Some(2))];
        let longest = longest_bytes(2 * CHUNK_BYTES_U64);
        let apart = manifest(&[(5, None), first, (16, None), second, (1, None)]);
        assert_eq!(apart.encode().len() as u64, longest);
        let together = manifest(&[first, second]);
        assert!((together.encode().len() as u64) < longest);
    }

    #[test]
    fn overlapping_unsorted_gapped_and_short_extents_are_refused() {
        let good = lay_out(&[(2, Some(1)), (2, Some(2)), (2, Some(3))]);
        let bytes = 6 * BLOCK_BYTES;
        Manifest::new(bytes, good.clone()).unwrap();

        let mut swapped = good.clone();
        swapped.swap(0, 1);
        let mut overlapping = good.clone();
        overlapping[1].start_bytes -= BLOCK_BYTES;
        let mut gapped = good.clone();
        gapped.remove(1);
        let short = good[..2].to_vec();
        for bad in [swapped, overlapping, gapped, short, Vec::new()] {
            assert_eq!(Manifest::new(bytes, bad), Err(DecodeManifestError::Cover));
        }
    }

    #[test]
    fn empty_huge_and_broken_sizes_are_refused() {
        for image_bytes in [0, 1, 4097, MAX_IMAGE_BYTES + BLOCK_BYTES, u64::MAX] {
            let hole = Extent {
                start_bytes: 0,
                len_bytes: image_bytes,
                content: Content::Hole,
            };
            let refused = Manifest::new(image_bytes, [hole]);
            assert_eq!(refused, Err(DecodeManifestError::ImageSize { image_bytes }));
        }
    }

    #[test]
    fn a_count_larger_than_the_bytes_can_hold_is_refused_before_memory_is_taken() {
        let mut bytes = manifest(&[(1, None)]).encode();
        bytes[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
        let refused = Manifest::decode(&bytes);
        assert_eq!(refused, Err(DecodeManifestError::Length { bytes: 33 }));
    }

    #[test]
    fn a_hole_written_in_two_parts_is_a_second_spelling_and_refused() {
        let mut bytes = manifest(&[(2, None)]).encode();
        bytes[20] = 2;
        bytes[25..33].copy_from_slice(&BLOCK_BYTES.to_le_bytes());
        let second = bytes[24..33].to_vec();
        bytes.extend(second);
        let refused = Manifest::decode(&bytes);
        assert_eq!(refused, Err(DecodeManifestError::Extent { index: 1 }));
    }

    #[test]
    fn holes_that_overflow_the_offset_are_refused() {
        let mut bytes = manifest(&[(1, None), (1, Some(1)), (1, None)]).encode();
        let huge = (u64::MAX - 4095).to_le_bytes();
        bytes[25..33].copy_from_slice(&huge);
        assert!(Manifest::decode(&bytes).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = manifest(&[(1, None)]).encode();
        bytes[8] = 9;
        let refused = Manifest::decode(&bytes).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "manifest version 9 is not the version 1 this wrenn reads"
        );
    }

    proptest! {
        #[test]
        fn every_manifest_survives_encoding(parts in parts()) {
            let manifest = manifest(&parts);
            let bytes = manifest.encode();
            prop_assert_eq!(Manifest::decode(&bytes), Ok(manifest));
        }

        #[test]
        fn every_byte_of_an_image_is_in_exactly_the_extent_found(parts in parts(), at in 0.0..1.0) {
            let manifest = manifest(&parts);
            #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]
            let offset = (manifest.image_bytes() as f64 * at) as u64;
            let found = manifest.extent_at(offset).unwrap();
            prop_assert!(found.start_bytes <= offset && offset < found.end_bytes());
            prop_assert_eq!(manifest.extent_at(manifest.image_bytes()), None);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in vec(any::<u8>(), 0..300)) {
            let _ = Manifest::decode(&bytes);
        }

        /// Garbage behind a good beginning gets further into the decoder than pure noise. What
        /// is accepted has one spelling only: the bytes it came from.
        #[test]
        fn a_damaged_manifest_is_refused_or_is_another_manifest(
            parts in parts(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        ) {
            let mut bytes = manifest(&parts).encode();
            let index = at.index(bytes.len());
            bytes[index] = byte;
            if let Ok(read) = Manifest::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes.clone());
            }
            bytes.truncate(cut.index(bytes.len()));
            prop_assert!(Manifest::decode(&bytes).is_err());
        }
    }
}
