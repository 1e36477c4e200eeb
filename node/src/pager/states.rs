//! What has become of each page: one byte a page, in memory that outlives the pager.
//!
//! ```text
//! absent ──claim──> filling ──settle──> present
//!    ^                 │
//!    └────give up──────┘
//! ```
//!
//! Whoever wants to fill a page must win it first (compare-and-swap), so no two threads fill the
//! same one. *Present* means that the image's bytes were put there once, not that they still are: a
//! guest that gives a page back (balloon, free page reporting) makes it missing again, and it must
//! then be zero and never the image's old bytes. That is why the table belongs to the shim and a
//! pager only maps it: one that takes over knows what its predecessor had filled.
//!
//! A pager that dies leaves pages *filling*. They are judged by whether they exist ([`repair`]).
//!
//! [`repair`]: StateTable::repair

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::pager::pages::PageSet;
use crate::pager::region::{PageIndex, Region, index};
use crate::pager::uffd::sys::SharedBytes;

const ABSENT: u8 = 0;
const FILLING: u8 = 1;
const PRESENT: u8 = 2;

/// What has become of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Nothing yet: its bytes are those of the image.
    Absent,
    /// Somebody is putting them there.
    Filling,
    /// They were put there.
    Present,
}

/// The states of all pages of a guest.
#[derive(Debug)]
pub struct StateTable {
    table: SharedBytes,
    region: Region,
}

impl StateTable {
    /// The table in `file`, a memfd with one byte for each page of `region`. A new file says that
    /// all are absent.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn map(file: impl AsFd, region: Region) -> io::Result<Self> {
        let table = SharedBytes::map(file, region.pages())?;
        Ok(Self { table, region })
    }

    /// The memory it is about.
    #[must_use]
    pub fn region(&self) -> Region {
        self.region
    }

    /// The state of `page`. One past the end counts as present: nobody will fill it.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> PageState {
        match self.cell(page).map(|cell| cell.load(Ordering::Acquire)) {
            Some(ABSENT) => PageState::Absent,
            Some(FILLING) => PageState::Filling,
            _ => PageState::Present,
        }
    }

    /// Wins the right to fill `page`.
    #[must_use]
    pub fn claim(&self, page: PageIndex) -> bool {
        self.cell(page).is_some_and(|cell| {
            cell.compare_exchange(ABSENT, FILLING, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        })
    }

    /// Says that a claimed page has its bytes.
    pub fn settle(&self, page: PageIndex) {
        self.set(page, PRESENT);
    }

    /// Gives a claimed page back.
    pub fn give_up(&self, page: PageIndex) {
        self.set(page, ABSENT);
    }

    /// Makes the table agree with `existing`, the pages that are in the memory, after the death of
    /// whoever was filling. To be called while nobody fills.
    ///
    /// A page that was being filled, arrived, and was given back by the guest before its filler
    /// could say so counts as absent. The guest then reads the image's bytes where it gave up all
    /// claim to any.
    pub fn repair(&self, existing: &PageSet) {
        for (number, cell) in (0..).zip(self.table.bytes()) {
            let exists = existing.contains(PageIndex(number));
            match (cell.load(Ordering::Acquire), exists) {
                (ABSENT | FILLING, true) => cell.store(PRESENT, Ordering::Release),
                (FILLING, false) => cell.store(ABSENT, Ordering::Release),
                _ => {}
            }
        }
    }

    /// The pages whose bytes were put there once.
    #[must_use]
    pub fn filled(&self) -> PageSet {
        let mut filled = PageSet::none(self.region);
        for (number, cell) in (0..).zip(self.table.bytes()) {
            if cell.load(Ordering::Acquire) == PRESENT {
                filled.add(PageIndex(number));
            }
        }
        filled
    }

    fn cell(&self, page: PageIndex) -> Option<&AtomicU8> {
        self.table.bytes().get(index(page.0))
    }

    fn set(&self, page: PageIndex, state: u8) {
        if let Some(cell) = self.cell(page) {
            cell.store(state, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proto::units::Mib;

    use super::*;
    use crate::pager::memory::sealed_memfd;

    fn table() -> StateTable {
        let region = Region::new(Mib(1));
        let file = sealed_memfd("states", region.pages()).expect("memfd");
        StateTable::map(file, region).expect("mapped")
    }

    #[test]
    fn a_page_is_won_by_exactly_one_of_many() {
        let table = table();
        let won: usize = thread::scope(|scope| {
            let tries: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..256)
                            .filter(|page| table.claim(PageIndex(*page)))
                            .count()
                    })
                })
                .collect();
            tries.into_iter().map(|t| t.join().expect("counted")).sum()
        });
        assert_eq!(won, 256);
    }

    #[test]
    fn a_successor_sees_what_was_filled_and_judges_what_was_under_way() {
        let table = table();
        for page in 0..3 {
            assert!(table.claim(PageIndex(page)));
        }
        // 0 was filled and given back by the guest, 1 arrived but nobody said so, 2 did not.
        table.settle(PageIndex(0));
        let mut existing = PageSet::none(table.region());
        existing.add(PageIndex(1));
        existing.add(PageIndex(9));
        table.repair(&existing);
        let states: Vec<_> = [0, 1, 2, 9, 10]
            .map(|page| table.get(PageIndex(page)))
            .into();
        use PageState::{Absent, Present};
        assert_eq!(states, [Present, Present, Absent, Present, Absent]);
        assert_eq!(table.filled().len(), 3);
    }

    #[test]
    fn a_page_past_the_end_cannot_be_won() {
        let table = table();
        assert!(!table.claim(PageIndex(256)));
        assert_eq!(table.get(PageIndex(u64::MAX)), PageState::Present);
    }
}
