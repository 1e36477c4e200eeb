//! Dropping what no pin needs.
//!
//! ```text
//! begin     whatever is let go from now on stays held
//! mark      pins from outside, and manifests held here > their chunks
//! sweep     manifests that are neither marked nor held
//! choose    packs of which less than half is still needed
//! compact   each: copy what is needed to the newest pack, forget the rest > sync > unlink
//! ```
//!
//! Chunks of packs that are not chosen stay, and stay findable: a later seal may reuse them. A
//! chunk is forgotten under the lock under which seals begin to hold chunks, so a seal either held
//! it before, and it is kept, or looks for it after, and does not find it.
//!
//! Safe at any instruction: a pack is unlinked only after everything needed from it has been synced
//! elsewhere; until then there are two copies, and after a crash either will do. A chunk that was
//! forgotten in a pack that still exists comes back with the next filling of the index, and is
//! dropped again.

use std::collections::{BTreeMap, HashSet};
use std::error::Error;
use std::io;
use std::sync::{Arc, PoisonError};

use super::chunk::ChunkId;
use super::engine::{Core, Store};
use super::error::{CollectError, ReadManifestError, SealError};
use super::extent::Content;
use super::index::Place;
use super::manifest::ImageDigest;
use super::pack::{Depth, FIRST_RECORD, Found, Pack};
use super::packs::Purpose;
use super::pin::{ChunkSet, Pin};
use super::record::{Draft, Head};
use crate::base::fault;

/// A pack is compacted when less than one in so many of its bytes is needed. At a half, each byte
/// that is copied frees at least one, and a store is at most twice as large as what it must keep,
/// but for the pack being written.
const NEEDED_SHARE: u64 = 2;

/// What a collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Manifests that were dropped.
    pub manifests: u64,
    /// Packs that were dropped.
    pub packs: u64,
    /// Chunks that were dropped with them.
    pub chunks: u64,
    /// Bytes copied to free the rest.
    pub copied_bytes: u64,
    /// Bytes by which the packs have become smaller.
    pub freed_bytes: u64,
    /// Pinned manifests that are not here; their chunks may be on other nodes.
    pub absent: u64,
    /// Chunks that were needed and turned out damaged; they must be fetched again.
    pub damaged: u64,
}

/// What must be kept.
#[derive(Debug, Default)]
struct Marked {
    manifests: HashSet<Pin>,
    chunks: ChunkSet,
    absent: u64,
}

impl Store {
    /// Drops what is needed neither by `pins` nor by what is under way in this store.
    ///
    /// `pins` is asked once, after the collection has begun. It must see everything that was
    /// committed before: whoever has just started asks the cluster first, and does not collect by
    /// an old copy of its state.
    ///
    /// # Errors
    /// - [`CollectError::Pins`]: they could not be had; nothing was touched.
    /// - [`CollectError::Manifest`]: a pinned manifest is damaged, so what it needs is unknown;
    ///   nothing was touched.
    /// - [`CollectError::Disk`], [`CollectError::Copy`], [`CollectError::Stopped`]: it ended early; some
    ///   may have been dropped.
    pub fn collect<E>(
        &self,
        pins: impl FnOnce() -> Result<Vec<Pin>, E>,
    ) -> Result<Collected, CollectError>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let core = &self.core;
        let _one = core
            .collecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let _late = core.pins.begin_collection();
        let pinned = pins().map_err(|err| CollectError::Pins(err.into()))?;
        let marked = core.mark(pinned.into_iter().chain(core.pins.manifests()))?;
        let mut collected = Collected {
            manifests: core.sweep_manifests(&marked)?,
            absent: marked.absent,
            ..Collected::default()
        };
        fault::point("store-collect-swept");
        let before = core.packs.total_bytes();
        core.compact_all(&marked, &mut collected)?;
        collected.freed_bytes = before.saturating_sub(core.packs.total_bytes());
        Ok(collected)
    }
}

impl Core {
    /// Between any two steps, unless the store is being closed.
    fn go_on(&self) -> Result<(), CollectError> {
        match self.is_closing() {
            true => Err(CollectError::Stopped),
            false => Ok(()),
        }
    }

    fn mark(&self, pins: impl Iterator<Item = Pin>) -> Result<Marked, CollectError> {
        let mut marked = Marked::default();
        for pin in pins {
            self.go_on()?;
            match pin {
                Pin::Image(digest) => self.mark_image(&mut marked, digest)?,
                Pin::Snapshot(digest) => {
                    if !marked.manifests.insert(pin) {
                        continue;
                    }
                    match self.manifests.snapshot(&digest) {
                        Ok(snapshot) => {
                            let manifest = snapshot.manifest();
                            for image in manifest.images() {
                                self.mark_image(&mut marked, image.digest)?;
                            }
                            // Kept where it is in chunks; a template is mostly a file of its own.
                            self.mark_image(&mut marked, manifest.base)?;
                        }
                        Err(ReadManifestError::Missing { .. }) => marked.absent += 1,
                        Err(err) => return Err(err.into()),
                    }
                }
            }
        }
        Ok(marked)
    }

    fn mark_image(&self, marked: &mut Marked, digest: ImageDigest) -> Result<(), CollectError> {
        if !marked.manifests.insert(Pin::Image(digest)) {
            return Ok(());
        }
        match self.manifests.image(&digest) {
            Ok(manifest) => {
                for extent in manifest.extents() {
                    if let Content::Chunk { id, .. } = &extent.content {
                        marked.chunks.insert(id);
                    }
                }
            }
            Err(ReadManifestError::Missing { .. }) => marked.absent += 1,
            Err(err) => return Err(err.into()),
        }
        Ok(())
    }

    fn sweep_manifests(&self, marked: &Marked) -> Result<u64, CollectError> {
        let dir = self.packs.dir();
        let all = self.manifests.list();
        let all = all.map_err(CollectError::disk("list the manifests beside", dir))?;
        let mut dropped = 0;
        for pin in all.iter().filter(|pin| !marked.manifests.contains(pin)) {
            self.go_on()?;
            let removed = self
                .pins
                .unless_manifest_held(pin, || self.manifests.remove(pin));
            if let Some(removed) = removed {
                let path = self.manifests.path(pin);
                removed.map_err(CollectError::disk("remove", &path))?;
                dropped += 1;
            }
        }
        let synced = self.manifests.sync_names();
        synced.map_err(CollectError::disk("sync the manifests beside", dir))?;
        Ok(dropped)
    }

    fn compact_all(&self, marked: &Marked, done: &mut Collected) -> Result<(), CollectError> {
        let chosen = self.choose(marked);
        self.settle(self.packs.retire_active(&chosen))?;
        for number in chosen {
            self.go_on()?;
            if let Some(pack) = self.packs.get(number) {
                self.compact(&pack, marked, done)?;
            }
        }
        let dir = self.packs.dir();
        let synced = self.packs.sync_names();
        synced.map_err(CollectError::disk("sync directory", dir))
    }

    /// The packs worth compacting, those with the least to copy first: they give room to the
    /// others.
    fn choose(&self, marked: &Marked) -> Vec<u32> {
        let needed = self.with_index(|index| {
            let mut needed: BTreeMap<u32, u64> = BTreeMap::new();
            index.each(|id, place| {
                if marked.chunks.contains(&id) {
                    *needed.entry(place.pack).or_default() += u64::from(place.record_bytes());
                }
            })?;
            Ok(needed)
        });
        let needed = needed.unwrap_or_default();
        let mut chosen: Vec<(u64, u32)> = self
            .packs
            .lengths()
            .into_iter()
            .filter(|(_, length)| *length > FIRST_RECORD)
            .map(|(number, length)| (needed.get(&number).copied().unwrap_or(0), number, length))
            .filter(|(needed, _, length)| needed * NEEDED_SHARE < u64::from(*length))
            .map(|(needed, number, _)| (needed, number))
            .collect();
        chosen.sort_unstable();
        chosen.into_iter().map(|(_, number)| number).collect()
    }

    fn compact(
        &self,
        pack: &Arc<Pack>,
        marked: &Marked,
        done: &mut Collected,
    ) -> Result<(), CollectError> {
        let generation = self.packs.generation();
        self.copy_needed(pack, marked, done)?;
        self.remove_copied(pack, generation)?;
        done.packs += 1;
        Ok(())
    }

    /// Copies what is needed of `pack` into the newest one.
    fn copy_needed(
        &self,
        pack: &Arc<Pack>,
        marked: &Marked,
        done: &mut Collected,
    ) -> Result<(), CollectError> {
        let mut failed = None;
        let walked = pack.walk(Depth::Heads, |found| {
            let Found::Record { offset, head, .. } = found else {
                return Ok(());
            };
            let Some(place) = Place::of(pack.number(), offset, &head) else {
                return Ok(());
            };
            let moved = self.go_on();
            let moved = moved.and_then(|()| self.move_or_forget(pack, &head, &place, marked, done));
            moved.map_err(|err| {
                failed = Some(err);
                io::Error::other("stopped")
            })
        });
        match failed {
            Some(err) => Err(err),
            None => walked
                .map(drop)
                .map_err(CollectError::disk("read pack", pack.path())),
        }
    }

    /// Removes `pack` once its copies, which were begun in `generation`, are durable. Somebody else's
    /// sync may have failed meanwhile, and have cost them although ours does not.
    fn remove_copied(&self, pack: &Arc<Pack>, generation: u64) -> Result<(), CollectError> {
        self.sync()?;
        if self.packs.generation() != generation {
            self.settle(Err(SealError::Lost))?;
        }
        fault::point("store-collect-copied");
        let removed = self.packs.remove(pack.number());
        removed.map_err(CollectError::disk("remove pack", pack.path()))?;
        fault::point("store-collect-unlinked");
        Ok(())
    }

    /// Copies a record if its chunk is needed, and forgets the chunk if not.
    fn move_or_forget(
        &self,
        pack: &Pack,
        head: &Head,
        place: &Place,
        marked: &Marked,
        done: &mut Collected,
    ) -> Result<(), CollectError> {
        let id = &head.id;
        if self.with_index(|index| index.get(id)).flatten() != Some(*place) {
            // A spare copy.
            return Ok(());
        }
        if !marked.chunks.contains(id) && self.forget(id, place) {
            done.chunks += 1;
            return Ok(());
        }
        let stored = pack.stored(place.offset, place.stored_bytes);
        let stored = stored.map_err(CollectError::disk("read pack", pack.path()))?;
        if !head.fits(&stored) {
            self.condemn(id, pack, place);
            done.damaged += 1;
            return Ok(());
        }
        let copied = self.append(Draft::new(*head, &stored), Purpose::Collect)?;
        done.copied_bytes += u64::from(copied.record_bytes());
        Ok(())
    }

    /// Forgets a chunk that nobody holds. Says whether it did.
    fn forget(&self, id: &ChunkId, place: &Place) -> bool {
        self.pins.unless_held(id, || {
            if self.with_index(|index| index.get(id)).flatten() == Some(*place) {
                self.with_index(|index| index.remove(id));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Limits;
    use super::*;

    /// As when a seal that goes on meanwhile hears of a failed sync, and the next sync succeeds.
    #[test]
    fn a_pack_whose_copies_were_lost_before_they_were_durable_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), Limits::default()).unwrap();
        let seal = store.begin();
        let id = seal.put(&[7; 5000]).unwrap().unwrap();
        let core = &store.core;
        core.sync().unwrap();
        let pack = core.packs.all().pop().unwrap();
        core.packs.retire_active(&[pack.number()]).unwrap();
        let mut marked = Marked::default();
        marked.chunks.insert(&id);
        let generation = core.packs.generation();
        let mut done = Collected::default();
        core.copy_needed(&pack, &marked, &mut done).unwrap();
        assert!(done.copied_bytes > 0);

        core.packs.lose_tail_for_test();
        let kept = core.remove_copied(&pack, generation).unwrap_err();
        assert!(
            matches!(kept, CollectError::Copy(SealError::Lost)),
            "{kept}"
        );
        assert_eq!(store.get(&id).unwrap(), [7; 5000]);
        // The next collection finishes it.
        let generation = core.packs.generation();
        core.copy_needed(&pack, &marked, &mut done).unwrap();
        core.remove_copied(&pack, generation).unwrap();
        assert_eq!(store.get(&id).unwrap(), [7; 5000]);
    }
}
