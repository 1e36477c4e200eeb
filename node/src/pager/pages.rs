//! Sets of pages, and which pages of a memfd exist. Pure but for [`PageSet::present_in`].

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::pager::region::{ImageOffset, PAGE_BYTES, PageIndex, Region, index};

/// Pages in one word of the set.
const WORD_PAGES: u64 = u64::BITS as u64;

/// Some of the pages of a region: one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// No page of `region`.
    #[must_use]
    pub fn none(region: Region) -> Self {
        let pages = region.pages();
        Self {
            words: vec![0; index(pages.div_ceil(WORD_PAGES))],
            pages,
        }
    }

    /// The pages that exist in `memory`, a memfd, swapped out or not.
    ///
    /// # Errors
    /// The kernel refused to tell.
    pub fn present_in(memory: BorrowedFd<'_>, region: Region) -> io::Result<Self> {
        let mut present = Self::none(region);
        let seek = |from: u64, whence| -> Result<Option<u64>, Errno> {
            let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
            match lseek(memory, from, whence) {
                Ok(found) => Ok(u64::try_from(found).ok()),
                // Past the last piece of data.
                Err(Errno::ENXIO) => Ok(None),
                Err(errno) => Err(errno),
            }
        };
        let mut at = 0;
        while let Some(start) = seek(at, Whence::SeekData)? {
            let end = seek(start, Whence::SeekHole)?.unwrap_or(region.bytes());
            present.insert(ImageOffset(start)..ImageOffset(end));
            at = end;
            if at >= region.bytes() {
                break;
            }
        }
        Ok(present)
    }

    /// Adds every page that `bytes` touches.
    pub fn insert(&mut self, bytes: Range<ImageOffset>) {
        let last = bytes.end.0.div_ceil(PAGE_BYTES).min(self.pages);
        for page in bytes.start.page().0..last {
            self.words[index(page / WORD_PAGES)] |= 1 << (page % WORD_PAGES);
        }
    }

    /// Adds one page.
    pub fn add(&mut self, page: PageIndex) {
        if page.0 < self.pages {
            self.words[index(page.0 / WORD_PAGES)] |= 1 << (page.0 % WORD_PAGES);
        }
    }

    /// True if `page` is one of them.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        let word = self.words.get(index(page.0 / WORD_PAGES));
        word.is_some_and(|word| word >> (page.0 % WORD_PAGES) & 1 == 1)
    }

    /// Drops every page that is not in `other` too.
    pub fn keep_only(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= other;
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Them, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().zip(0_u64..).flat_map(|(word, at)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = u64::from(left.trailing_zeros());
                (left != 0).then(|| {
                    left &= left - 1;
                    PageIndex(at * WORD_PAGES + bit)
                })
            })
        })
    }

    /// Them as runs of bytes of the image, in order, none touching the next.
    #[must_use]
    pub fn runs(&self) -> Vec<Range<ImageOffset>> {
        let mut runs: Vec<Range<ImageOffset>> = Vec::new();
        for page in self.iter() {
            let (start, end) = (page.offset(), PageIndex(page.0 + 1).offset());
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::fd::AsFd;

    use nix::sys::uio::pwrite;
    use proptest::prelude::*;
    use proto::units::Mib;

    use super::*;
    use crate::pager::memory::GuestMemory;

    #[test]
    fn the_pages_of_a_memfd_are_those_that_were_written() {
        let memory = GuestMemory::create(Mib(1)).expect("memfd");
        let present = || PageSet::present_in(memory.as_fd(), memory.region()).expect("told");
        assert!(present().is_empty());
        for page in [0, 1, 7, 255] {
            pwrite(&memory, b"x", page * 4096 + 17).expect("written");
        }
        let pages: Vec<u64> = present().iter().map(|page| page.0).collect();
        assert_eq!(pages, [0, 1, 7, 255]);
    }

    proptest! {
        #[test]
        fn a_set_is_what_was_put_in_and_its_runs_say_the_same(
            pages in prop::collection::btree_set(0_u64..256, 0..80),
            others in prop::collection::btree_set(0_u64..256, 0..80),
        ) {
            let set_of = |pages: &BTreeSet<u64>| {
                let mut set = PageSet::none(Region::new(Mib(1)));
                pages.iter().for_each(|page| set.add(PageIndex(*page)));
                set
            };
            let mut set = set_of(&pages);
            prop_assert_eq!(set.len(), pages.len() as u64);
            prop_assert!(set.iter().map(|page| page.0).eq(pages.iter().copied()));

            let mut again = PageSet::none(Region::new(Mib(1)));
            let runs = set.runs();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            runs.into_iter().for_each(|run| again.insert(run));
            prop_assert_eq!(&again, &set);

            set.keep_only(&set_of(&others));
            prop_assert!(set.iter().map(|page| page.0).eq(pages.intersection(&others).copied()));
        }

        #[test]
        fn a_range_past_the_end_is_cut(start in 0_u64..1 << 22, len in 0_u64..1 << 22) {
            let mut set = PageSet::none(Region::new(Mib(1)));
            set.insert(ImageOffset(start)..ImageOffset(start + len));
            prop_assert!(set.iter().all(|page| page.0 < 256));
        }
    }
}
