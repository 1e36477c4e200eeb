//! The note that an index was closed in good order.
//!
//! ```text
//! "wrenn-ix"  u32 version  u64 entries  u64 sum
//! per pack    u32 number  u32 length
//! 32 bytes BLAKE3 of all before
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use super::super::durable;

/// Version of this file and of the entries it stands for.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"wrenn-ix";
const HASH_BYTES: usize = 32;

/// What must still be true for an index to be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Guard {
    pub(in crate::store) entries: u64,
    pub(in crate::store) sum: u64,
    /// Number and length of every pack.
    pub(crate) packs: BTreeMap<u32, u32>,
}

impl Guard {
    /// Writes it so that it survives a power cut.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        durable::write(path, &self.encode())
    }

    /// Reads it. One that is missing, damaged or of another version is none.
    pub(super) fn read(path: &Path) -> Option<Self> {
        fs::read(path).ok().and_then(|bytes| Self::decode(&bytes))
    }

    pub(in crate::store) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.entries.to_le_bytes());
        bytes.extend(self.sum.to_le_bytes());
        for (number, length) in &self.packs {
            bytes.extend(number.to_le_bytes());
            bytes.extend(length.to_le_bytes());
        }
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        bytes
    }

    pub(in crate::store) fn decode(bytes: &[u8]) -> Option<Self> {
        let (bytes, hash) = bytes.split_last_chunk::<HASH_BYTES>()?;
        if blake3::hash(bytes) != *hash {
            return None;
        }
        let rest = bytes.strip_prefix(MAGIC)?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*version) != VERSION {
            return None;
        }
        let (entries, rest) = rest.split_first_chunk::<8>()?;
        let (sum, rest) = rest.split_first_chunk::<8>()?;
        let (numbers, rest) = rest.as_chunks::<4>();
        let (pairs, odd) = numbers.as_chunks::<2>();
        if !rest.is_empty() || !odd.is_empty() {
            return None;
        }
        let number = u32::from_le_bytes;
        let packs = pairs
            .iter()
            .map(|[pack, length]| (number(*pack), number(*length)));
        Some(Self {
            entries: u64::from_le_bytes(*entries),
            sum: u64::from_le_bytes(*sum),
            packs: packs.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_read_back_and_any_damage_makes_it_nothing(
            entries: u64, sum: u64, packs in btree_map(any::<u32>(), any::<u32>(), 0..20),
            at: prop::sample::Index, flip in 1_u8..,
        ) {
            let guard = Guard { entries, sum, packs };
            let mut bytes = guard.encode();
            prop_assert_eq!(Guard::decode(&bytes), Some(guard));
            let cut = at.index(bytes.len());
            prop_assert_eq!(Guard::decode(&bytes[..cut]), None);
            bytes[cut] ^= flip;
            prop_assert_eq!(Guard::decode(&bytes), None);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Guard::decode(&bytes), None);
        }
    }
}
