//! Looking for damage: every chunk and every manifest is read and hashed again.
//!
//! A chunk that is not what its name says is forgotten for good, and a manifest that is not is
//! moved to `bad/`. Both are then missing, and what is missing can be fetched from another holder.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::ControlFlow;
use std::sync::PoisonError;

use super::chunk::ChunkId;
use super::engine::{Core, Store};
use super::error::{CheckError, ReadManifestError};
use super::index::Place;
use super::pack::{Depth, FIRST_RECORD, Found, Pack};
use super::pin::Pin;
use super::record::Head;

/// What a check found. A sound and complete store has only the two counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Chunks that were read and are what their names say.
    pub chunks: u64,
    /// Manifests that were read and are what their names say.
    pub manifests: u64,
    /// Chunks that were damaged, and have been forgotten.
    pub damaged: BTreeSet<ChunkId>,
    /// Bytes in packs that are no records.
    pub garbled_bytes: u64,
    /// Packs that the disk would not read to their ends.
    pub unreadable_packs: BTreeSet<u32>,
    /// Manifests that were damaged, and have been moved out of the way.
    pub bad_manifests: BTreeSet<Pin>,
    /// Manifests that need what is not here: how many chunks or images.
    pub incomplete: BTreeMap<Pin, u64>,
}

impl Checked {
    /// Whether everything here is what it should be. An incomplete image is no damage: another node
    /// may have the rest.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.bad_manifests.is_empty() && self.unreadable_packs.is_empty()
    }
}

impl Store {
    /// Reads and hashes everything. Seals may go on meanwhile, collections wait.
    ///
    /// # Errors
    /// The list of manifests could not be read, or the store is being closed. Damage is no error, it is
    /// what is looked for.
    pub fn check(&self) -> Result<Checked, CheckError> {
        let core = &self.core;
        let _one = core
            .collecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut checked = Checked::default();
        core.check_packs(&mut checked)?;
        let listed = core.manifests.list();
        let listed = listed.map_err(|source| CheckError::Disk {
            path: core.packs.dir().to_owned(),
            source,
        })?;
        // Images come first, so by its turn it is known what a snapshot lacks.
        for pin in &listed {
            core.unless_closing()?;
            self.check_manifest(pin, &mut checked);
        }
        Ok(checked)
    }

    fn check_manifest(&self, pin: &Pin, checked: &mut Checked) {
        let lacks = match pin {
            Pin::Image(digest) => self
                .image(digest)
                .map(|manifest| self.missing(&manifest).len() as u64),
            Pin::Snapshot(digest) => self.snapshot(digest).map(|snapshot| {
                let images = snapshot.manifest().images();
                let lacking = images.iter().map(|image| Pin::Image(image.digest));
                let lacking = lacking.filter(|image| {
                    checked.incomplete.contains_key(image)
                        || !self.core.manifests.path(image).exists()
                });
                lacking.count() as u64
            }),
        };
        match lacks {
            Ok(0) => checked.manifests += 1,
            Ok(lacks) => {
                checked.manifests += 1;
                checked.incomplete.insert(*pin, lacks);
            }
            // Gone since it was listed.
            Err(ReadManifestError::Missing { .. }) => {}
            Err(err) => self.core.set_aside(pin, &err, checked),
        }
    }
}

impl Core {
    fn unless_closing(&self) -> Result<(), CheckError> {
        match self.is_closing() {
            true => Err(CheckError::Stopped),
            false => Ok(()),
        }
    }

    /// Moves a damaged manifest out of the way.
    pub(super) fn set_aside(&self, pin: &Pin, why: &ReadManifestError, checked: &mut Checked) {
        tracing::warn!(err = %why, "a manifest is damaged");
        if let Err(err) = self.manifests.set_aside(pin) {
            tracing::warn!(%pin, %err, "could not move a damaged manifest");
        }
        self.tell_damage();
        checked.bad_manifests.insert(*pin);
    }

    fn check_packs(&self, checked: &mut Checked) -> Result<(), CheckError> {
        let ends = self.packs.lengths();
        for pack in self.packs.all() {
            let number = pack.number();
            if let Err(err) = self.check_pack(&pack, checked) {
                tracing::warn!(pack = number, %err, "could not read a pack to its end");
                checked.unreadable_packs.insert(number);
            }
            self.unless_closing()?;
        }
        // An entry that no walk came by names bytes that are no record any more.
        let old = |place: &Place| ends.get(&place.pack).is_some_and(|end| place.offset < *end);
        let entries = self.with_index(|index| {
            let mut entries = 0;
            index.each(|_, place| entries += u64::from(old(&place)))?;
            Ok(entries)
        });
        if entries.is_some_and(|entries| entries > checked.chunks) {
            self.check_entries(checked)?;
        }
        Ok(())
    }

    fn check_pack(&self, pack: &Pack, checked: &mut Checked) -> io::Result<()> {
        pack.walk_from(FIRST_RECORD, Depth::Bodies, |found| {
            if self.is_closing() {
                return Ok(ControlFlow::Break(()));
            }
            match found {
                Found::Record { offset, head, body } => {
                    self.check_record(pack, (offset, head), body, checked)?;
                }
                Found::Gap { from, to } => checked.garbled_bytes += u64::from(to - from),
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(())
    }

    /// Looks at a record, if it is the one by which its chunk is read.
    pub(super) fn check_record(
        &self,
        pack: &Pack,
        (offset, head): (u32, Head),
        body: Option<&[u8]>,
        checked: &mut Checked,
    ) -> io::Result<()> {
        let place = Place::of(pack.number(), offset, &head);
        let entry = self.with_index(|index| index.get(&head.id)).flatten();
        match place.filter(|place| entry == Some(*place)) {
            Some(place) => self.check_chunk(pack, &head.id, &place, body, checked),
            None => Ok(()),
        }
    }

    fn check_chunk(
        &self,
        pack: &Pack,
        id: &ChunkId,
        place: &Place,
        body: Option<&[u8]>,
        checked: &mut Checked,
    ) -> io::Result<()> {
        let sound = match body {
            None => false,
            Some(stored) => self.decode(id, place, stored)?.is_some(),
        };
        if sound {
            checked.chunks += 1;
        } else {
            self.condemn(id, pack, place);
            checked.damaged.insert(*id);
        }
        Ok(())
    }

    /// Reads every chunk by its entry.
    fn check_entries(&self, checked: &mut Checked) -> Result<(), CheckError> {
        let ids = self.with_index(|index| {
            let mut ids = Vec::new();
            index.each(|id, _| ids.push(id))?;
            Ok(ids)
        });
        checked.chunks = 0;
        for id in ids.unwrap_or_default() {
            self.unless_closing()?;
            let Some((pack, place)) = self.find(&id) else {
                self.drop_entry(&id);
                continue;
            };
            let head = pack.head(place.offset).ok().flatten();
            if head.is_none_or(|head| head.id != id) {
                // Its bytes may be there, but the next filling of the index would not find them.
                self.condemn(&id, &pack, &place);
                checked.damaged.insert(id);
            } else if self.get(&id).is_ok() {
                checked.chunks += 1;
            } else {
                checked.damaged.insert(id);
            }
        }
        Ok(())
    }

    /// An entry that leads nowhere.
    fn drop_entry(&self, id: &ChunkId) {
        self.pins.still(|| {
            if self.find(id).is_none() {
                self.with_index(|index| index.remove(id));
            }
        });
    }
}
