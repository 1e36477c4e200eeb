//! Which index is where: the pool's books. Pure; the pool's task is the only one to write here.
//!
//! ```text
//!   free --begin--> building --built--> ready --take--> taken --razed--> free
//!                       '---failed---> free      ^--return--'
//!   found on the host at start --adopt--> taken
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::slot::{Serial, Slot, SlotIndex};

/// Slots built at once. The kernel makes one link at a time whoever asks; the second build does
/// its other half meanwhile.
const BUILDS_MAX: usize = 2;

/// The pool's books.
#[derive(Debug)]
pub(super) struct Ledger {
    /// Longest free first, so that an index rests before it is used again.
    free: VecDeque<SlotIndex>,
    building: BTreeSet<SlotIndex>,
    ready: VecDeque<Slot>,
    taken: BTreeMap<Serial, SlotIndex>,
    found: BTreeMap<Serial, SlotIndex>,
    /// The indexes this node may give to new slots.
    ours: BTreeSet<SlotIndex>,
    target: usize,
}

impl Ledger {
    /// Books with `ours` to give out, of which `found` and `foreign` are in use on the host.
    pub(super) fn new(
        ours: BTreeSet<SlotIndex>,
        target: usize,
        found: BTreeMap<Serial, SlotIndex>,
        foreign: &BTreeSet<SlotIndex>,
    ) -> Self {
        let used: BTreeSet<_> = found.values().chain(foreign).copied().collect();
        Self {
            free: ours.difference(&used).copied().collect(),
            ours: ours.difference(foreign).copied().collect(),
            building: BTreeSet::new(),
            ready: VecDeque::new(),
            taken: BTreeMap::new(),
            found,
            target,
        }
    }

    /// An index to build a slot with, if one is wanted: the pool is short of its target, or of
    /// what `waiting` callers need.
    pub(super) fn begin_build(&mut self, waiting: usize, refill: bool) -> Option<SlotIndex> {
        let wanted = waiting + if refill { self.target } else { 0 };
        let coming = self.ready.len() + self.building.len();
        if coming >= wanted || self.building.len() >= BUILDS_MAX {
            return None;
        }
        let index = self.free.pop_front()?;
        self.building.insert(index);
        Some(index)
    }

    /// A build is done.
    pub(super) fn built(&mut self, slot: Slot) {
        self.building.remove(&slot.index);
        self.ready.push_back(slot);
    }

    /// A build failed; its index is free again.
    pub(super) fn build_failed(&mut self, index: SlotIndex) {
        self.building.remove(&index);
        self.free.push_back(index);
    }

    /// Whether one more caller than `waiting` can be served without anything being given back.
    pub(super) fn can_promise(&self, waiting: usize) -> bool {
        self.ready.len() + self.building.len() + self.free.len() > waiting
    }

    /// Gives out the slot that has been ready longest.
    pub(super) fn take(&mut self) -> Option<Slot> {
        let slot = self.ready.pop_front()?;
        self.taken.insert(slot.serial, slot.index);
        Some(slot)
    }

    /// A slot given out came back unused: nobody was there to receive it.
    pub(super) fn return_unused(&mut self, slot: Slot) {
        if self.taken.remove(&slot.serial).is_some() {
            self.ready.push_front(slot);
        }
    }

    /// Whether a slot was found on the host and may be adopted.
    pub(super) fn is_found(&self, serial: Serial, index: SlotIndex) -> bool {
        self.found.get(&serial) == Some(&index)
    }

    /// A slot found on the host belongs to a sandbox from now on.
    pub(super) fn adopt(&mut self, serial: Serial) {
        if let Some(index) = self.found.remove(&serial) {
            self.taken.insert(serial, index);
        }
    }

    /// Whether a sandbox may have this slot.
    pub(super) fn is_held(&self, serial: Serial) -> bool {
        self.taken.contains_key(&serial) || self.found.contains_key(&serial)
    }

    /// A slot is gone from the host.
    pub(super) fn razed(&mut self, serial: Serial) {
        let was = self.taken.remove(&serial).or(self.found.remove(&serial));
        // An adopted slot may have an index that is no longer this node's.
        self.free
            .extend(was.filter(|index| self.ours.contains(index)));
    }

    /// Takes out all slots that nobody has used.
    pub(super) fn drain_ready(&mut self) -> Vec<Slot> {
        let unused: Vec<_> = self.ready.drain(..).collect();
        self.free.extend(unused.iter().map(|slot| slot.index));
        unused
    }

    /// How many slots are ready.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// How many indexes this node has in all.
    pub(super) fn size(&self) -> usize {
        self.ours.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn indexes(range: std::ops::Range<u16>) -> BTreeSet<SlotIndex> {
        range.map(SlotIndex).collect()
    }

    fn slot(serial: u64, index: SlotIndex) -> Slot {
        Slot::new(&"t".parse().unwrap(), Serial(serial), index)
    }

    impl Ledger {
        /// Every index in exactly one place.
        fn census(&self) -> Vec<SlotIndex> {
            let mut all: Vec<_> = self.free.iter().copied().collect();
            all.extend(self.building.iter());
            all.extend(self.ready.iter().map(|slot| slot.index));
            all.extend(self.taken.values());
            all.extend(self.found.values());
            all.sort_unstable();
            all
        }
    }

    proptest! {
        /// Whatever happens, no index is lost, and none is in two places.
        #[test]
        fn every_index_is_in_one_place(moves in prop::collection::vec((0..7_u8, 0..6_usize), 0..80)) {
            let found = BTreeMap::from([(Serial(1), SlotIndex(2))]);
            let mut books = Ledger::new(indexes(0..5), 2, found, &BTreeSet::new());
            let mut serial = 10;
            for (what, pick) in moves {
                let taken: Vec<_> = books.taken.clone().into_iter().collect();
                let chosen = taken.get(pick).copied();
                match (what, chosen) {
                    (0, _) => { books.begin_build(pick, true); }
                    (1, _) => if let Some(index) = books.building.first().copied() {
                        serial += 1;
                        books.built(slot(serial, index));
                    },
                    (2, _) => if let Some(index) = books.building.first().copied() {
                        books.build_failed(index);
                    },
                    (3, _) => { books.take(); }
                    (4, Some((serial, index))) => books.return_unused(slot(serial.0, index)),
                    (5, Some((serial, _))) => books.razed(serial),
                    (6, _) => books.adopt(Serial(1)),
                    _ => {}
                }
                prop_assert_eq!(books.census(), indexes(0..5).into_iter().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_pool_fills_to_its_target_and_no_further() {
        let mut books = Ledger::new(indexes(0..9), 3, BTreeMap::new(), &BTreeSet::new());
        let mut serial = 0;
        while let Some(index) = books.begin_build(0, true) {
            serial += 1;
            books.built(slot(serial, index));
        }
        assert_eq!(books.ready.len(), 3);
    }

    #[test]
    fn waiting_callers_are_built_for_even_when_refilling_rests() {
        let mut books = Ledger::new(indexes(0..9), 3, BTreeMap::new(), &BTreeSet::new());
        assert_eq!(books.begin_build(0, false), None);
        assert!(books.begin_build(1, false).is_some());
        assert_eq!(books.begin_build(1, false), None);
    }

    #[test]
    fn no_more_is_promised_than_there_is() {
        let books = Ledger::new(indexes(0..2), 0, BTreeMap::new(), &BTreeSet::new());
        assert!(books.can_promise(1));
        assert!(!books.can_promise(2));
    }

    #[test]
    fn indexes_in_use_on_the_host_are_not_given_out() {
        let found = BTreeMap::from([(Serial(7), SlotIndex(0))]);
        let foreign = BTreeSet::from([SlotIndex(1)]);
        let mut books = Ledger::new(indexes(0..3), 9, found, &foreign);
        assert_eq!(books.begin_build(9, true), Some(SlotIndex(2)));
        assert_eq!(books.begin_build(9, true), None);
    }

    #[test]
    fn an_adopted_index_outside_the_range_is_not_given_out_again() {
        let found = BTreeMap::from([(Serial(7), SlotIndex(40))]);
        let mut books = Ledger::new(indexes(0..1), 0, found, &BTreeSet::new());
        books.adopt(Serial(7));
        books.razed(Serial(7));
        assert_eq!(books.census(), [SlotIndex(0)]);
    }

    #[test]
    fn an_index_rests_before_it_is_used_again() {
        let mut books = Ledger::new(indexes(0..3), 9, BTreeMap::new(), &BTreeSet::new());
        let first = books.begin_build(1, false).unwrap();
        books.build_failed(first);
        assert_ne!(books.begin_build(1, false), Some(first));
    }
}
