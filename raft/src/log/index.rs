//! The log as readers see it: in memory, ahead of the disk.
//!
//! One mutex guards it, held for map operations only, never across I/O. The adapter changes it in
//! the order in which openraft issues operations and queues the matching records in that same
//! order, so memory is always the state the file will have once the queue is written. Entries stay
//! in memory until they are written (a reader must find them at once) and beyond that as long as
//! they fit `cache_bytes`.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::record::Place;
use crate::codec;
use crate::disk::LogFile;
use crate::types::{Entry, LogId, Vote};

/// One entry of the log.
struct Slot {
    id: LogId,
    /// Where it lies on disk, once it does.
    place: Option<Place>,
    /// The entry itself, unless it was evicted.
    entry: Option<Entry>,
    bytes: usize,
}

/// Everything but the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hard {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
}

/// An entry as a reader gets it: from memory, or the place to read it from.
pub(super) enum Found {
    Here(Entry),
    OnDisk(Place, Arc<dyn LogFile>, LogId),
}

/// The log in memory.
pub(super) struct Index {
    pub(super) hard: Hard,
    slots: VecDeque<Slot>,
    /// Open segments, by number.
    files: BTreeMap<u64, Arc<dyn LogFile>>,
    cache_bytes: usize,
    cached_bytes: usize,
    /// Slots before this index hold no entry in memory.
    evicted_to: u64,
}

impl Index {
    pub(super) fn new(cache_bytes: usize) -> Self {
        Self {
            hard: Hard::default(),
            slots: VecDeque::new(),
            files: BTreeMap::new(),
            cache_bytes,
            cached_bytes: 0,
            evicted_to: 0,
        }
    }

    pub(super) fn add_file(&mut self, segment: u64, file: Arc<dyn LogFile>) {
        self.files.insert(segment, file);
    }

    pub(super) fn remove_file(&mut self, segment: u64) {
        self.files.remove(&segment);
    }

    /// Adds `entry` at the end. False where it does not follow the last one.
    #[must_use]
    pub(super) fn push(&mut self, entry: Entry) -> bool {
        let bytes = codec::entry_bytes(&entry);
        let id = entry.log_id;
        if !self.push_slot(id, None, Some(entry), bytes) {
            return false;
        }
        self.cached_bytes += bytes;
        true
    }

    /// Adds an entry that recovery found at `place`.
    #[must_use]
    pub(super) fn push_stored(&mut self, id: LogId, place: Place) -> bool {
        self.push_slot(id, Some(place), None, 0)
    }

    fn push_slot(
        &mut self,
        id: LogId,
        place: Option<Place>,
        entry: Option<Entry>,
        bytes: usize,
    ) -> bool {
        if self
            .slots
            .back()
            .is_some_and(|last| last.id.index + 1 != id.index)
        {
            return false;
        }
        self.slots.push_back(Slot {
            id,
            place,
            entry,
            bytes,
        });
        true
    }

    /// Forgets entries from `index` on.
    pub(super) fn truncate(&mut self, index: u64) {
        self.evicted_to = self.evicted_to.min(index);
        while self.slots.back().is_some_and(|last| last.id.index >= index) {
            let slot = self.slots.pop_back();
            self.uncount(slot.as_ref());
        }
    }

    /// Forgets entries up to and including `upto`.
    pub(super) fn purge(&mut self, upto: LogId) {
        if self
            .hard
            .purged
            .is_some_and(|purged| purged.index >= upto.index)
        {
            return;
        }
        self.hard.purged = Some(upto);
        while self
            .slots
            .front()
            .is_some_and(|first| first.id.index <= upto.index)
        {
            let slot = self.slots.pop_front();
            self.uncount(slot.as_ref());
        }
    }

    fn uncount(&mut self, slot: Option<&Slot>) {
        if let Some(slot) = slot.filter(|slot| slot.entry.is_some()) {
            self.cached_bytes -= slot.bytes;
        }
    }

    /// The last entry's position, or the purged one where no entry is left.
    pub(super) fn last(&self) -> Option<LogId> {
        let last = self.slots.back().map(|slot| slot.id);
        last.or(self.hard.purged)
    }

    /// The position of the entry at `index`, if the log has it.
    pub(super) fn id_at(&self, index: u64) -> Option<LogId> {
        let first = self.slots.front()?.id.index;
        let at = usize::try_from(index.checked_sub(first)?).ok()?;
        self.slots.get(at).map(|slot| slot.id)
    }

    /// Notes that `id` now lies at `place`; then forgets entries that no longer fit memory.
    pub(super) fn placed(&mut self, id: LogId, place: Place) {
        if let Some(slot) = self.slot_mut(id.index).filter(|slot| slot.id == id) {
            slot.place = Some(place);
        }
    }

    fn slot_mut(&mut self, index: u64) -> Option<&mut Slot> {
        let first = self.slots.front()?.id.index;
        let at = usize::try_from(index.checked_sub(first)?).ok()?;
        self.slots.get_mut(at)
    }

    /// Lets go of the oldest written entries until the rest fits the cache.
    pub(super) fn evict(&mut self) {
        let Some(first) = self.slots.front().map(|slot| slot.id.index) else {
            return;
        };
        let mut next = self.evicted_to.max(first);
        while self.cached_bytes > self.cache_bytes {
            let Some(slot) = self.slot_mut(next).filter(|slot| slot.place.is_some()) else {
                break;
            };
            if slot.entry.take().is_some() {
                let bytes = slot.bytes;
                self.cached_bytes -= bytes;
            }
            next += 1;
        }
        self.evicted_to = next;
    }

    /// The entries of `range` that the log holds, in order, as far as they fit `max_bytes`; at
    /// least one where there is any.
    pub(super) fn find(&self, range: Range<u64>, max_bytes: usize) -> Vec<Found> {
        let Some(first) = self.slots.front().map(|slot| slot.id.index) else {
            return Vec::new();
        };
        let skip = usize::try_from(range.start.saturating_sub(first)).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        let mut bytes = 0;
        for slot in self.slots.iter().skip(skip) {
            if slot.id.index >= range.end || (bytes > max_bytes && !found.is_empty()) {
                break;
            }
            bytes += slot.place.map_or(slot.bytes, |place| place.len as usize);
            found.extend(self.found(slot));
        }
        found
    }

    fn found(&self, slot: &Slot) -> Option<Found> {
        if let Some(entry) = &slot.entry {
            return Some(Found::Here(entry.clone()));
        }
        // An evicted entry has a place, and its segment stays open as long as the slot lives.
        let place = slot.place?;
        let file = self.files.get(&place.segment)?;
        Some(Found::OnDisk(place, Arc::clone(file), slot.id))
    }

    #[cfg(test)]
    pub(super) const fn cached_bytes(&self) -> usize {
        self.cached_bytes
    }
}

#[cfg(test)]
mod tests {
    use openraft::EntryPayload;

    use super::*;
    use crate::types::{CommittedLeader, ProposalBytes};

    fn id(term: u64, index: u64) -> LogId {
        let leader = CommittedLeader { term, node_id: 1 };
        LogId::new(leader, index)
    }

    fn entry(term: u64, index: u64) -> Entry {
        Entry {
            log_id: id(term, index),
            payload: EntryPayload::Normal(ProposalBytes(vec![7; 1000].into())),
        }
    }

    const fn place(offset: u32) -> Place {
        Place {
            segment: 1,
            offset,
            len: 1040,
        }
    }

    fn filled(entries: u64, cache_bytes: usize) -> Index {
        let mut index = Index::new(cache_bytes);
        for at in 0..entries {
            assert!(index.push(entry(1, at)));
        }
        index
    }

    #[test]
    fn unwritten_entries_are_never_evicted() {
        let mut index = filled(10, 0);
        index.evict();
        assert_eq!(index.find(0..10, usize::MAX).len(), 10);
        for at in 0..4 {
            index.placed(id(1, at), place(32));
        }
        index.evict();
        let kept = codec::entry_bytes(&entry(1, 0)) * 6;
        assert_eq!(index.cached_bytes(), kept);
    }

    #[test]
    fn a_gap_is_refused_and_an_empty_log_starts_anywhere() {
        let mut index = Index::new(1 << 20);
        assert!(index.push(entry(1, 5)));
        assert!(!index.push(entry(1, 7)));
        assert!(index.push(entry(1, 6)));
    }

    #[test]
    fn a_place_for_a_replaced_entry_is_ignored() {
        let mut index = filled(3, 1 << 20);
        index.truncate(2);
        assert!(index.push(entry(2, 2)));
        index.placed(id(1, 2), place(64));
        assert!(index.slot_mut(2).is_some_and(|slot| slot.place.is_none()));
    }

    #[test]
    fn truncating_and_purging_give_the_memory_back() {
        let mut index = filled(10, 1 << 20);
        index.truncate(8);
        index.purge(id(1, 4));
        assert_eq!(index.cached_bytes(), codec::entry_bytes(&entry(1, 0)) * 3);
        assert_eq!(index.last(), Some(id(1, 7)));
        index.purge(id(1, 20));
        assert_eq!((index.cached_bytes(), index.last()), (0, Some(id(1, 20))));
    }

    #[test]
    fn a_read_stops_after_its_bytes_but_gives_at_least_one() {
        let index = filled(10, 1 << 20);
        assert_eq!(index.find(3..10, 0).len(), 1);
        assert_eq!(index.find(8..100, usize::MAX).len(), 2);
        assert!(index.find(10..20, usize::MAX).is_empty());
    }
}
