//! Which pages of a saved guest's memory have to be read: the file `dirty`.
//!
//! The shim writes it while the guest stands still, the daemon reads it and then those pages, from
//! the memfd. What is not listed is as in the snapshot that the guest was resumed from, or was sealed
//! as since, or zero for a guest that booted ([`Basis`]). A listed page need not exist in the memfd: a guest may have
//! given it back, and it reads as zeros.
//!
//! ```text
//! magic 8 | version 4 | basis 4 | memory bytes 8 | count 8 | count x (offset 8, bytes 8) | BLAKE3 32
//! ```
//!
//! Integers are little-endian; the hash is over all before it. Ranges are whole pages, ascending,
//! and do not touch each other.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::pager::memory::GuestMemory;
use crate::pager::region::{PAGE_BYTES, Region};
use crate::shim::files;

/// What the file begins with.
const MAGIC: [u8; 8] = *b"WRNDIRTY";
/// Its layout.
const VERSION: u32 = 1;
/// [`Basis::Zeros`] in the file.
const ZEROS: u32 = 1;
/// [`Basis::Parent`] in the file.
const PARENT: u32 = 2;
/// [`Basis::LastSeal`] in the file. A daemon that does not know it takes the list for garbled, and the
/// guest goes on: it would read too little.
const LAST_SEAL: u32 = 3;
/// Bytes before the ranges.
const HEAD_BYTES: usize = 8 + 4 + 4 + 8 + 8;
/// Bytes of one range.
const RANGE_BYTES: usize = 8 + 8;
/// Bytes of the hash at the end.
const HASH_BYTES: usize = blake3::OUT_LEN;

/// What the pages that are not listed hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Zeros: the list is of the whole image.
    Zeros,
    /// What they hold in the snapshot that the guest was resumed from.
    Parent,
    /// What they hold in the snapshot that it was sealed as last, where it went on.
    LastSeal,
}

/// The pages of a guest's memory that have to be read to keep it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyList {
    basis: Basis,
    memory_bytes: u64,
    ranges: Vec<Range<u64>>,
}

/// Why a list of pages is none.
#[derive(Debug, thiserror::Error)]
pub enum DirtyListError {
    /// Ranges overlap, touch, are out of order or empty, or lie past the end of the memory.
    #[error("a list of written pages has a range {start:#x}..{end:#x} out of place")]
    BadRange {
        /// Where it starts.
        start: u64,
        /// Where it ends.
        end: u64,
    },
    /// It is cut short, too long, or damaged.
    #[error("the list of written pages is garbled")]
    Garbled,
    /// Another release wrote it.
    #[error("the list of written pages has version {found}, and this release knows {VERSION}")]
    UnknownVersion {
        /// Its version.
        found: u32,
    },
    /// It is of another guest.
    #[error("the list of written pages is of {found} bytes of memory, not {wanted}")]
    OtherMemory {
        /// What it says.
        found: u64,
        /// What the guest has.
        wanted: u64,
    },
    /// The disk refused.
    #[error("read the list of written pages")]
    Disk(#[source] io::Error),
}

/// Why the written pages could not be found out.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ListDirtyError {
    /// The kernel would not tell.
    #[error("find out which pages were written")]
    Kernel(#[source] io::Error),
    /// What it told makes no sense.
    #[error(transparent)]
    List(#[from] DirtyListError),
}

/// Knows which pages of a guest's memory were written since it was resumed, booted or sealed.
pub trait DirtyPages: Send + Sync {
    /// Lists them. The guest stands still, and goes on doing so until what was listed was read, or
    /// until the save was given up; a list that was given up takes nothing from the next one.
    ///
    /// # Errors
    /// See [`ListDirtyError`]; the save fails and the guest goes on.
    fn list(&self, memory: &GuestMemory, deadline: Instant) -> Result<DirtyList, ListDirtyError>;

    /// Lists at least those that were written since the guest was resumed, or booted, whatever it was
    /// sealed as since.
    ///
    /// # Errors
    /// As [`DirtyPages::list`].
    fn list_since_resume(
        &self,
        memory: &GuestMemory,
        deadline: Instant,
    ) -> Result<DirtyList, ListDirtyError> {
        self.list(memory, deadline)
    }

    /// What was listed last has been read and sealed, and the guest stands still until this returns:
    /// whoever can lists only what is written later. Nobody has to.
    fn sealed(&self) {}
}

/// All pages that exist: right for a guest that booted here, or whose memory was all brought here
/// before it ran.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllPresent;

impl DirtyPages for AllPresent {
    fn list(&self, memory: &GuestMemory, _: Instant) -> Result<DirtyList, ListDirtyError> {
        let region = memory.region();
        let ranges = present(memory.as_fd(), region).map_err(ListDirtyError::Kernel)?;
        Ok(DirtyList::new(Basis::Zeros, region, ranges)?)
    }
}

/// What exists of a file of `region`'s length. Moves the descriptor's position.
pub(super) fn present(file: BorrowedFd<'_>, region: Region) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < region.bytes() {
        let Some(start) = seek(file, at, Whence::SeekData)? else {
            break;
        };
        let end = seek(file, start, Whence::SeekHole)?.unwrap_or(region.bytes());
        ranges.push(start..end.min(region.bytes()));
        at = end;
    }
    Ok(ranges)
}

/// `None` past the last of what is looked for.
fn seek(file: BorrowedFd<'_>, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| io::ErrorKind::InvalidInput)?;
    match lseek(file, from, whence) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

impl DirtyList {
    /// The list of `ranges` in `region`.
    ///
    /// # Errors
    /// [`DirtyListError::BadRange`].
    pub fn new(
        basis: Basis,
        region: Region,
        ranges: Vec<Range<u64>>,
    ) -> Result<Self, DirtyListError> {
        let mut free_from = 0;
        for (index, range) in ranges.iter().enumerate() {
            let whole = range.start % PAGE_BYTES == 0 && range.end % PAGE_BYTES == 0;
            let apart = index == 0 || range.start > free_from;
            if !whole || !apart || range.is_empty() || range.end > region.bytes() {
                return Err(DirtyListError::BadRange {
                    start: range.start,
                    end: range.end,
                });
            }
            free_from = range.end;
        }
        Ok(Self {
            basis,
            memory_bytes: region.bytes(),
            ranges,
        })
    }

    /// What the other pages hold.
    #[must_use]
    pub fn basis(&self) -> Basis {
        self.basis
    }

    /// The pages, as ranges of bytes from the start of the memory.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// How much is to be read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Reads the list in `dir`, which must be of `region`.
    ///
    /// # Errors
    /// See [`DirtyListError`].
    pub fn read(dir: &Path, region: Region) -> Result<Self, DirtyListError> {
        let file = File::open(dir.join(files::DIRTY)).map_err(DirtyListError::Disk)?;
        // Every second page, each a range of its own, and a byte that would be too many.
        let most = HEAD_BYTES + HASH_BYTES + RANGE_BYTES;
        let most = (region.pages() / 2 + 1) * RANGE_BYTES as u64 + most as u64;
        let mut content = Vec::new();
        file.take(most)
            .read_to_end(&mut content)
            .map_err(DirtyListError::Disk)?;
        Self::decode(&content, region)
    }

    /// Writes the list for `dir`; it is not in its place yet.
    pub(super) fn draft(&self, dir: &Path) -> io::Result<files::Draft> {
        let mut draft = files::Draft::create(dir, files::DIRTY)?;
        draft.file().write_all(&self.encode())?;
        draft.sync()?;
        Ok(draft)
    }

    fn encode(&self) -> Vec<u8> {
        let length = HEAD_BYTES + self.ranges.len() * RANGE_BYTES + HASH_BYTES;
        let mut content = Vec::with_capacity(length);
        content.extend(MAGIC);
        content.extend(VERSION.to_le_bytes());
        let basis = match self.basis {
            Basis::Zeros => ZEROS,
            Basis::Parent => PARENT,
            Basis::LastSeal => LAST_SEAL,
        };
        content.extend(basis.to_le_bytes());
        content.extend(self.memory_bytes.to_le_bytes());
        content.extend((self.ranges.len() as u64).to_le_bytes());
        for range in &self.ranges {
            content.extend(range.start.to_le_bytes());
            content.extend((range.end - range.start).to_le_bytes());
        }
        let hash = blake3::hash(&content);
        content.extend(hash.as_bytes());
        content
    }

    fn decode(content: &[u8], region: Region) -> Result<Self, DirtyListError> {
        use DirtyListError::Garbled;
        let rest = content.strip_prefix(&MAGIC).ok_or(Garbled)?;
        // First of all: another layout may have its hash elsewhere.
        let (version, _) = rest.split_first_chunk().ok_or(Garbled)?;
        match u32::from_le_bytes(*version) {
            VERSION => {}
            found => return Err(DirtyListError::UnknownVersion { found }),
        }
        let (body, hash) = content.split_last_chunk::<HASH_BYTES>().ok_or(Garbled)?;
        if blake3::hash(body) != *hash {
            return Err(Garbled);
        }
        let ranges = body.get(HEAD_BYTES..).ok_or(Garbled)?;
        let (ranges, odd) = ranges.as_chunks::<RANGE_BYTES>();
        let counted = u64_at(body, 24).ok_or(Garbled)? == ranges.len() as u64;
        if !odd.is_empty() || !counted {
            return Err(Garbled);
        }
        let basis = match u64_at(body, 8).ok_or(Garbled)? >> 32 {
            basis if basis == u64::from(ZEROS) => Basis::Zeros,
            basis if basis == u64::from(PARENT) => Basis::Parent,
            basis if basis == u64::from(LAST_SEAL) => Basis::LastSeal,
            _ => return Err(Garbled),
        };
        let found = u64_at(body, 16).ok_or(Garbled)?;
        if found != region.bytes() {
            let wanted = region.bytes();
            return Err(DirtyListError::OtherMemory { found, wanted });
        }
        let ranges = ranges.iter().map(|range| range_in(range).ok_or(Garbled));
        Self::new(basis, region, ranges.collect::<Result<_, _>>()?)
    }
}

fn range_in(bytes: &[u8]) -> Option<Range<u64>> {
    let (start, length) = (u64_at(bytes, 0)?, u64_at(bytes, 8)?);
    Some(start..start.checked_add(length)?)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let (word, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use proto::units::Mib;

    use super::*;

    const REGION: Region = Region::new(Mib(1));

    fn pages(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        let in_bytes = |range: &Range<u64>| range.start * PAGE_BYTES..range.end * PAGE_BYTES;
        ranges.iter().map(in_bytes).collect()
    }

    fn list(ranges: &[Range<u64>]) -> DirtyList {
        DirtyList::new(Basis::Parent, REGION, pages(ranges)).expect("in order")
    }

    fn first_page() -> DirtyList {
        list(std::slice::from_ref(&(0..1)))
    }

    #[test]
    fn a_list_survives_its_file_and_leaves_no_other() {
        let dir = tempfile::tempdir().expect("tempdir");
        for written in [list(&[]), list(&[0..1, 2..7, 255..256])] {
            let draft = written.draft(dir.path()).expect("written");
            draft.keep().expect("kept");
            let read = DirtyList::read(dir.path(), REGION).expect("read");
            assert_eq!(read, written);
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 1);
        assert_eq!(list(&[0..1, 2..7]).bytes(), 6 * PAGE_BYTES);
    }

    #[test]
    fn a_list_of_every_second_page_can_be_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let every_second: Vec<_> = (0..128).map(|page| 2 * page..2 * page + 1).collect();
        let written = list(&every_second);
        written
            .draft(dir.path())
            .and_then(files::Draft::keep)
            .expect("kept");
        let read = DirtyList::read(dir.path(), REGION).expect("read");
        assert_eq!(read, written);
    }

    #[test]
    fn a_new_guests_list_is_of_the_pages_that_exist() {
        let memory = GuestMemory::create(Mib(1)).expect("memfd");
        let listed = || AllPresent.list(&memory, Instant::now()).expect("listed");
        assert_eq!(listed().ranges(), []);
        let file = File::from(memory.as_fd().try_clone_to_owned().expect("a clone"));
        for page in [0, 1, 7, 255] {
            file.write_all_at(b"x", page * PAGE_BYTES).expect("written");
        }
        assert_eq!(listed().basis(), Basis::Zeros);
        assert_eq!(listed().ranges(), pages(&[0..2, 7..8, 255..256]));
    }

    #[test]
    fn ranges_out_of_place_are_refused() {
        let page = |at: u64| at * PAGE_BYTES;
        let alone = |start, end| vec![Range { start, end }];
        for bad in [
            pages(&[1..3, 2..4]),
            pages(&[1..2, 2..4]),
            pages(&[5..6, 1..2]),
            alone(page(3), page(3)),
            alone(page(2), page(1)),
            alone(page(255), page(257)),
            alone(1, page(1)),
            alone(0, page(1) + 1),
        ] {
            let refused = DirtyList::new(Basis::Zeros, REGION, bad.clone());
            assert!(
                matches!(refused, Err(DirtyListError::BadRange { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn the_list_of_another_release_or_guest_is_refused_by_name() {
        let mut newer = first_page().encode();
        newer[8] = 2;
        let refused = DirtyList::decode(&newer, REGION);
        assert!(
            matches!(refused, Err(DirtyListError::UnknownVersion { found: 2 })),
            "{refused:?}"
        );
        let refused = DirtyList::decode(&first_page().encode(), Region::new(Mib(2)));
        assert!(
            matches!(refused, Err(DirtyListError::OtherMemory { .. })),
            "{refused:?}"
        );
    }

    proptest! {
        #[test]
        fn no_damaged_list_is_believed(at in 0..HEAD_BYTES + 2 * RANGE_BYTES, bit in 0..8_u32) {
            let mut content = list(&[0..1, 2..7]).encode();
            content[at] ^= 1 << bit;
            prop_assert!(DirtyList::decode(&content, REGION).is_err());
            content[at] ^= 1 << bit;
            prop_assert!(DirtyList::decode(&content[..at], REGION).is_err());
        }

        /// Whoever can make the hash right must still not make us read past the memory.
        #[test]
        fn no_bytes_make_the_reader_panic(
            ranges in prop::collection::vec((any::<u64>(), any::<u64>()), 0..4),
        ) {
            let mut content = list(&[]).encode();
            content.truncate(HEAD_BYTES);
            content[24..32].copy_from_slice(&(ranges.len() as u64).to_le_bytes());
            for (start, length) in ranges {
                content.extend(start.to_le_bytes());
                content.extend(length.to_le_bytes());
            }
            let hash = blake3::hash(&content);
            content.extend(hash.as_bytes());
            if let Ok(list) = DirtyList::decode(&content, REGION) {
                prop_assert!(list.ranges().iter().all(|range| range.end <= REGION.bytes()));
            }
        }
    }
}
