//! How one record of the log looks in its segment file. Pure: bytes in, bytes out.
//!
//! ```text
//! 0     4     8       12     13    16      24     32           32 + len, padded to 8
//! | crc | len | since | kind | 0 0 | index | term | body ...   |
//! ```
//!
//! All integers are little-endian. `crc` is CRC-32C over everything after it, padding included,
//! seeded with the segment's number and the record's offset: a record that lies where it was not
//! written (a copied file, a stale block) does not verify. Records start on multiples of 8, and
//! a zeroed file reads as "no record".
//!
//! `since` is what tells a torn tail from corruption. It is the offset of the first byte of this
//! segment that was *not* known to be on the medium when the record was written. The pages of one
//! write may reach the medium in any order, so after a power cut a bad record may well be followed
//! by good ones of the same write; none of them was acknowledged. But if any good record says
//! `since > p`, everything before `since` had been synced, and a bad record at `p` is damage to
//! acknowledged data.

/// Records start on multiples of this.
pub(super) const ALIGN: u32 = 8;
/// Bytes before a record's body.
pub(super) const HEADER_BYTES: u32 = 32;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A log entry; body: `Entry`.
    Entry,
    /// A vote; body: `Vote`.
    Vote,
    /// How far the log is committed; body: `LogId`. Written without a sync.
    Committed,
    /// Entries up to and including the body's `LogId` are no longer needed.
    Purge,
    /// Entries from `index` on are void.
    Truncate,
    /// The segment is complete and the next one goes on.
    Seal,
    /// Everything but the entries, at the head of a segment; body: `HardState`.
    State,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Entry,
        Self::Vote,
        Self::Committed,
        Self::Purge,
        Self::Truncate,
        Self::Seal,
        Self::State,
    ];

    const fn byte(self) -> u8 {
        match self {
            Self::Entry => 1,
            Self::Vote => 2,
            Self::Committed => 3,
            Self::Purge => 4,
            Self::Truncate => 5,
            Self::Seal => 6,
            Self::State => 7,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.byte() == byte)
    }
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) offset: u32,
    /// Of the whole record, padding included.
    pub(super) len: u32,
}

/// A record read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) kind: Kind,
    pub(super) since: u32,
    pub(super) index: u64,
    pub(super) term: u64,
    pub(super) body: &'a [u8],
    /// Of the whole record, padding included.
    pub(super) len: u32,
}

/// What a new record shall say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draft<'a> {
    pub(super) kind: Kind,
    pub(super) index: u64,
    pub(super) term: u64,
    pub(super) body: &'a [u8],
}

impl Draft<'_> {
    /// Bytes the record takes, padding included; `None` where no segment could hold it.
    pub(super) fn len(&self) -> Option<u32> {
        let body = u32::try_from(self.body.len()).ok()?;
        let body = body.checked_next_multiple_of(ALIGN)?;
        body.checked_add(HEADER_BYTES)
    }

    /// Appends the record, to lie at `offset` of `segment`, to `out`.
    pub(super) fn encode(&self, segment: u64, offset: u32, since: u32, out: &mut Vec<u8>) {
        let start = out.len();
        let body_bytes = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&body_bytes.to_le_bytes());
        out.extend_from_slice(&since.to_le_bytes());
        out.extend_from_slice(&[self.kind.byte(), 0, 0, 0]);
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.term.to_le_bytes());
        out.extend_from_slice(self.body);
        let whole = (out.len() - start).next_multiple_of(ALIGN as usize);
        out.resize(start + whole, 0);
        let crc = checksum(segment, offset, &out[start + 4..]);
        out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Reads the record at the head of `bytes`, which lie at `offset` of `segment`; `None` where no
/// whole and undamaged record lies there.
pub(super) fn parse(segment: u64, offset: u32, bytes: &[u8]) -> Option<Record<'_>> {
    let header = bytes.get(..HEADER_BYTES as usize)?;
    let kind = Kind::from_byte(header[12])?;
    let body_bytes = u32_at(header, 4);
    let len = body_bytes
        .checked_next_multiple_of(ALIGN)?
        .checked_add(HEADER_BYTES)?;
    let since = u32_at(header, 8);
    if since > offset {
        return None;
    }
    let whole = bytes.get(..len as usize)?;
    if u32_at(header, 0) != checksum(segment, offset, &whole[4..]) {
        return None;
    }
    Some(Record {
        kind,
        since,
        index: u64_at(header, 16),
        term: u64_at(header, 24),
        body: &whole[HEADER_BYTES as usize..][..body_bytes as usize],
        len,
    })
}

/// Whether anything after the unreadable place at `bad` proves that `bad` had been synced.
/// `bytes` is the whole segment.
pub(super) fn proves_synced(segment: u64, bytes: &[u8], bad: u32) -> bool {
    let later = (bad as usize + ALIGN as usize..bytes.len()).step_by(ALIGN as usize);
    later
        .filter_map(|at| Some((u32::try_from(at).ok()?, bytes.get(at..)?)))
        .filter_map(|(at, rest)| parse(segment, at, rest))
        .any(|record| record.since > bad)
}

pub(super) fn checksum(segment: u64, offset: u32, bytes: &[u8]) -> u32 {
    let seed = crc32c::crc32c(&segment.to_le_bytes());
    let seed = crc32c::crc32c_append(seed, &offset.to_le_bytes());
    crc32c::crc32c_append(seed, bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(offset: u32, since: u32, body: &[u8]) -> Vec<u8> {
        let draft = Draft {
            kind: Kind::Entry,
            index: 9,
            term: 3,
            body,
        };
        let mut out = Vec::new();
        draft.encode(7, offset, since, &mut out);
        assert_eq!(Some(out.len()), draft.len().map(|len| len as usize));
        out
    }

    #[test]
    fn zeroes_are_no_record() {
        assert_eq!(parse(0, 0, &[0; 64]), None);
    }

    #[test]
    fn a_record_verifies_only_where_it_was_written() {
        let bytes = encoded(64, 32, b"body");
        assert!(parse(7, 64, &bytes).is_some());
        assert_eq!(parse(7, 72, &bytes), None);
        assert_eq!(parse(8, 64, &bytes), None);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = encoded(64, 32, b"thirteen byte");
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(parse(7, 64, &damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn a_later_record_of_the_same_write_proves_nothing_and_one_after_a_sync_does() {
        let mut segment = vec![0; 128];
        segment.extend(encoded(128, 32, b"same write"));
        assert!(!proves_synced(7, &segment, 32));
        let next = u32::try_from(segment.len()).unwrap();
        segment.extend(encoded(next, 128, b"after a sync"));
        assert!(proves_synced(7, &segment, 32));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(body: Vec<u8>, slot in 4_u32..1000) {
            let offset = slot * ALIGN;
            let bytes = encoded(offset, 32, &body);
            let record = parse(7, offset, &bytes).expect("reads back");
            prop_assert_eq!(record.body, &body[..]);
            prop_assert_eq!((record.index, record.term, record.since), (9, 3, 32));
            prop_assert_eq!(record.len as usize, bytes.len());
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes: Vec<u8>) {
            let _ = parse(7, 64, &bytes);
        }
    }
}
