//! Chunks: the unit that is hashed, stored and sent, named by its hash.

use std::fmt;
use std::str::FromStr;

/// Bytes in a full chunk. Measured (notes on chunk sizes in `docs/internals/images.md`): against
/// 4 KiB it costs a few percent of compressed size, and needs 16 times fewer names.
pub const CHUNK_BYTES: usize = 64 * 1024;
/// The same, for arithmetic on image offsets.
pub const CHUNK_BYTES_U64: u64 = CHUNK_BYTES as u64;

/// The name of a chunk: BLAKE3 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// The name of the chunk that holds `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({self})")
    }
}

impl FromStr for ChunkId {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        parse_hex(text).map(Self)
    }
}

/// The text is not 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a hash: expected 64 characters of [0-9a-f]")]
pub struct ParseHashError;

/// True if `bytes` are all zero. Such a chunk is a hole and has no name.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // By words: the compiler turns this into vector instructions.
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Writes a hash the way file names and logs spell it.
pub(super) fn write_hex(hash: &[u8; 32], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    hash.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Reads one back. Upper case is refused: a hash has one spelling.
pub(super) fn parse_hex(text: &str) -> Result<[u8; 32], ParseHashError> {
    let mut hash = [0; 32];
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != hash.len() || !rest.is_empty() {
        return Err(ParseHashError);
    }
    for (byte, [high, low]) in hash.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Ok(hash)
}

fn digit(character: u8) -> Result<u8, ParseHashError> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(ParseHashError),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_name_of_a_chunk_is_its_blake3_hash() {
        // The published test vector for the empty input.
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(ChunkId::of(b"").to_string(), empty);
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        for length in [1, 7, 8, 9, 4096] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in [0, length / 2, length - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "bit {at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    proptest! {
        #[test]
        fn every_name_survives_being_spelled_and_read(bytes: [u8; 32]) {
            let id = ChunkId(bytes);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<ChunkId>();
        }
    }
}
