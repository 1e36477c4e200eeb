//! All packs of a store, and the one that is being written.
//!
//! One lock, [`Writer`], orders everything that happens at the end of the newest pack: appending,
//! going on to the next pack, syncing. It is never held while anything is hashed or compressed.
//! What it keeps true, and a crash at any instruction leaves true:
//!
//! - every pack but the newest is on the medium, whole: a pack is synced before the next is made;
//! - a pack's name is on the medium before anything is written into it.
//!
//! So after a crash only the newest pack can have a torn tail; it is walked record by record and
//! cut behind the last sound one.
//!
//! **A sync that fails** means that the kernel may have dropped what was written since the last
//! one, and will not say so again. Those bytes are given up on the spot: the pack is cut back to
//! what was synced, no more is written into it, and [`Packs::generation`] moves on. A seal that
//! finds another generation at its end than at its start fails: chunks it counted on may be among
//! the lost.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use nix::sys::statvfs::statvfs;

use super::disk::ROOM_KEPT;
use super::durable;
use super::error::{OpenStoreError, SealError};
use super::index::Place;
use super::pack::{Depth, FIRST_RECORD, Found, MAX_PACK_BYTES, PACK_VERSION, Pack, Title};
use super::record::Draft;

/// Size at which a pack is full. A collection copies at most half of one at a time, so this bounds
/// the room it needs; and a store of 100 GiB keeps 800 files open.
const PACK_BYTES: u32 = 128 << 20;
const _: () = assert!(PACK_BYTES <= MAX_PACK_BYTES);

/// How much a store may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Left free on the file system, for running guests and the node's own log. A seal also leaves
    /// the room a collection needs, one pack, so that a full store can still be collected.
    pub keep_free_bytes: u64,
    /// The most that all packs together may take.
    pub budget_bytes: u64,
    /// Size at which a pack is full; at most 1 GiB.
    pub pack_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            keep_free_bytes: ROOM_KEPT.bytes(),
            budget_bytes: u64::MAX,
            pack_bytes: PACK_BYTES,
        }
    }
}

/// What is written, which decides how much room must be left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Seal,
    /// Copies what is kept, so that more can be freed.
    Collect,
}

/// How far the newest pack is written and synced.
#[derive(Debug)]
struct Writer {
    active: Option<Active>,
    next_number: u32,
}

#[derive(Debug)]
struct Active {
    pack: Arc<Pack>,
    synced_to: u32,
}

/// The packs of a store.
#[derive(Debug)]
pub(super) struct Packs {
    dir: PathBuf,
    limits: Limits,
    table: RwLock<BTreeMap<u32, Arc<Pack>>>,
    writer: Mutex<Writer>,
    generation: AtomicU64,
    /// Something was lost, and nobody has acted on it.
    lost: AtomicBool,
}

impl Packs {
    /// Opens the packs in `dir`. `known` gives the lengths they had when the store was closed in
    /// good order, if it was; the second answer says whether they still have them.
    pub(super) fn open(
        dir: &Path,
        limits: Limits,
        known: Option<&BTreeMap<u32, u32>>,
    ) -> Result<(Self, bool), OpenStoreError> {
        let limits = Limits {
            pack_bytes: limits.pack_bytes.clamp(FIRST_RECORD + 1, MAX_PACK_BYTES),
            ..limits
        };
        let table = open_all(dir)?;
        let lengths = table.iter().map(|(number, pack)| (*number, pack.end()));
        let as_left = known.is_some_and(|known| *known == lengths.collect());
        let newest = table.last_key_value().map(|(_, pack)| Arc::clone(pack));
        let active = newest.and_then(|pack| {
            let synced_to = if as_left {
                Some(pack.end())
            } else {
                recover(&pack)
            };
            synced_to.map(|synced_to| Active { pack, synced_to })
        });
        let next_number = table
            .last_key_value()
            .map_or(0, |(last, _)| last.saturating_add(1));
        let packs = Self {
            dir: dir.to_owned(),
            limits,
            table: RwLock::new(table),
            writer: Mutex::new(Writer {
                active,
                next_number,
            }),
            generation: AtomicU64::new(0),
            lost: AtomicBool::new(false),
        };
        Ok((packs, as_left))
    }

    /// Moves on whenever bytes that had been written were lost.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether something was lost since this was last asked.
    pub(super) fn take_loss(&self) -> bool {
        self.lost.swap(false, Ordering::AcqRel)
    }

    /// The pack of that number, if the store still has it.
    pub(super) fn get(&self, number: u32) -> Option<Arc<Pack>> {
        self.table().get(&number).cloned()
    }

    /// All packs, oldest first.
    pub(super) fn all(&self) -> Vec<Arc<Pack>> {
        self.table().values().cloned().collect()
    }

    /// How long each pack is.
    pub(super) fn lengths(&self) -> BTreeMap<u32, u32> {
        let table = self.table();
        table
            .iter()
            .map(|(number, pack)| (*number, pack.end()))
            .collect()
    }

    /// Bytes of all packs.
    pub(super) fn total_bytes(&self) -> u64 {
        self.table()
            .values()
            .map(|pack| u64::from(pack.end()))
            .sum()
    }

    /// Writes a record at the end of the newest pack and hands `enter` its place. It is not yet
    /// durable. Once [`Self::retire_active`] has answered, every record of the pack has been
    /// entered.
    pub(super) fn append(
        &self,
        mut draft: Draft,
        purpose: Purpose,
        enter: impl FnOnce(&Place),
    ) -> Result<Place, SealError> {
        let mut writer = self.writer();
        self.check_room(u64::from(draft.len()), purpose)?;
        let pack = self.pack_with_room(&mut writer)?;
        let offset = pack.end();
        let length = draft.len();
        let head = draft.head;
        let written = pack.append(draft.at(pack.number(), offset), length);
        written.map_err(|source| SealError::of_disk("write pack", pack.path(), source))?;
        let place = Place::of(pack.number(), offset, &head);
        let place = place.expect("nobody drafts a void record");
        enter(&place);
        Ok(place)
    }

    /// Returns once every record appended so far would survive a power cut.
    pub(super) fn sync(&self) -> Result<(), SealError> {
        let mut writer = self.writer();
        self.sync_active(&mut writer)
    }

    /// Syncs the newest pack, if its number is one of `numbers`, and writes no more into it.
    pub(super) fn retire_active(&self, numbers: &[u32]) -> Result<(), SealError> {
        let mut writer = self.writer();
        let active = writer.active.as_ref().map(|active| active.pack.number());
        if active.is_some_and(|active| numbers.contains(&active)) {
            self.sync_active(&mut writer)?;
            writer.active = None;
        }
        Ok(())
    }

    /// Takes a pack out of the store and removes its file. Whoever has it open reads on.
    pub(super) fn remove(&self, number: u32) -> io::Result<()> {
        let removed = {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.remove(&number)
        };
        removed.map_or(Ok(()), |pack| fs::remove_file(pack.path()))
    }

    /// Makes removals survive a power cut.
    pub(super) fn sync_names(&self) -> io::Result<()> {
        durable::sync_dir(&self.dir)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest pack, or the next one where that is full or given up.
    fn pack_with_room(&self, writer: &mut Writer) -> Result<Arc<Pack>, SealError> {
        if let Some(active) = &writer.active {
            if active.pack.end() < self.limits.pack_bytes {
                return Ok(Arc::clone(&active.pack));
            }
            // Only ever one pack has a tail that a crash could tear.
            self.sync_active(writer)?;
            writer.active = None;
        }
        let made = Pack::create(&self.dir, writer.next_number);
        let pack =
            made.map_err(|source| SealError::of_disk("make a pack in", &self.dir, source))?;
        let pack = Arc::new(pack);
        writer.next_number = writer.next_number.saturating_add(1);
        writer.active = Some(Active {
            pack: Arc::clone(&pack),
            synced_to: FIRST_RECORD,
        });
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.insert(pack.number(), Arc::clone(&pack));
        Ok(pack)
    }

    fn sync_active(&self, writer: &mut Writer) -> Result<(), SealError> {
        let Some(active) = &mut writer.active else {
            return Ok(());
        };
        let end = active.pack.end();
        if active.synced_to == end {
            return Ok(());
        }
        match active.pack.sync() {
            Ok(()) => {
                active.synced_to = end;
                Ok(())
            }
            Err(source) => {
                let err = SealError::of_disk("sync pack", active.pack.path(), source);
                self.give_up_tail(writer);
                Err(err)
            }
        }
    }

    /// Drops what was written into the newest pack since its last good sync.
    fn give_up_tail(&self, writer: &mut Writer) {
        let Some(active) = writer.active.take() else {
            return;
        };
        // If it cannot be cut either, what is behind is not looked at any more.
        let cut = active.pack.cut(active.synced_to);
        if let Err(err) = cut.and_then(|()| active.pack.sync()) {
            let pack = active.pack.number();
            tracing::warn!(pack, %err, "could not cut a pack that failed to sync");
        }
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.lost.store(true, Ordering::Release);
    }

    /// The newest pack and where its synced part ends.
    #[cfg(test)]
    pub(super) fn synced_for_test(&self) -> Option<(u32, u32)> {
        let writer = self.writer();
        let active = writer.active.as_ref();
        active.map(|active| (active.pack.number(), active.synced_to))
    }

    /// Acts as if the newest pack had failed to sync.
    #[cfg(test)]
    pub(super) fn lose_tail_for_test(&self) {
        self.give_up_tail(&mut self.writer());
    }

    fn check_room(&self, record_bytes: u64, purpose: Purpose) -> Result<(), SealError> {
        let budget_bytes = self.limits.budget_bytes;
        if purpose == Purpose::Seal && budget_bytes < u64::MAX {
            let taken_bytes = self.total_bytes();
            if taken_bytes + record_bytes > budget_bytes {
                return Err(SealError::OverBudget {
                    taken_bytes,
                    budget_bytes,
                });
            }
        }
        let needed = match purpose {
            Purpose::Seal => self.limits.keep_free_bytes + u64::from(self.limits.pack_bytes),
            Purpose::Collect => self.limits.keep_free_bytes,
        };
        let stat = statvfs(&self.dir).map_err(|errno| {
            SealError::of_disk("ask for free space in", &self.dir, errno.into())
        })?;
        let free = stat.blocks_available() * stat.fragment_size();
        if free < needed.saturating_add(record_bytes) {
            return Err(SealError::NoRoom {
                free_bytes: free,
                needed_bytes: needed,
            });
        }
        Ok(())
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<u32, Arc<Pack>>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_all(dir: &Path) -> Result<BTreeMap<u32, Arc<Pack>>, OpenStoreError> {
    let mut table = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(OpenStoreError::disk("read directory", dir))? {
        let entry = entry.map_err(OpenStoreError::disk("read directory", dir))?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(Pack::number_in) else {
            continue;
        };
        let path = entry.path();
        let opened = Pack::open(dir, number).map_err(OpenStoreError::disk("open pack", &path))?;
        let (pack, title) = opened;
        match title {
            Title::Ours => {}
            Title::Version(found) => {
                return Err(OpenStoreError::OtherVersion {
                    path,
                    found,
                    ours: PACK_VERSION,
                });
            }
            Title::Garbled => {
                // A crash while it was made, or damage: the records speak for themselves.
                tracing::warn!(pack = number, "the title of a pack was garbled");
                pack.mend_title()
                    .map_err(OpenStoreError::disk("mend the title of pack", &path))?;
            }
        }
        table.insert(number, Arc::new(pack));
    }
    Ok(table)
}

/// Cuts the torn tail off the newest pack and makes sure of the rest. Returns where it ends, or
/// `None` where no more should be written into it.
fn recover(pack: &Pack) -> Option<u32> {
    let mut unsound = Vec::new();
    let recovered = pack
        .walk(Depth::Bodies, |found| {
            if let Found::Record {
                offset,
                head,
                body: None,
            } = found
            {
                unsound.push((offset, head));
            }
            Ok(())
        })
        .and_then(|sound_to| {
            // Whoever walks from head to head from now on shall not take these for chunks.
            for (offset, head) in unsound {
                if offset < sound_to {
                    tracing::warn!(pack = pack.number(), chunk = %head.id, "a record is damaged");
                    pack.make_void(offset, head)?;
                }
            }
            if sound_to < pack.end() {
                let torn_bytes = pack.end() - sound_to;
                tracing::info!(pack = pack.number(), torn_bytes, "cut a torn tail");
                pack.cut(sound_to)?;
            }
            // A killed process leaves records in the page cache that were never synced. From here
            // on they count as durable, so now they must become so.
            pack.sync()?;
            Ok(sound_to)
        });
    match recovered {
        Ok(end) => Some(end),
        Err(err) => {
            tracing::warn!(pack = pack.number(), %err, "could not read a pack to its end");
            None
        }
    }
}
