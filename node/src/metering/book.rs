//! What is known of each guest here: its VMM, the last look at it, its samples.
//!
//! Samples lie in memory, from where they are asked for, and on the [`Shelf`], from where a daemon
//! that comes back recalls them. Calls that touch files say so; of those, one runs at a time.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Stamp;
use tracing::warn;

use super::host::{self, Files, Outside, Reading};
use super::ring::{FINEST, Placed, Rings};
use super::shelf::Shelf;
use crate::base::clock::Clock;
use crate::base::sample::{Inside, Sample};

/// Guests whose samples are kept, also of those that rest: 380 MiB when all of them are full, and
/// 432 MiB of the disk.
const MOST_GUESTS: usize = 4096;
/// How often what is outside of a VMM is looked at: its counters cost more than all the rest.
const OUTSIDE_INTERVAL: Duration = Duration::from_secs(1);
/// A guest that was not looked at for so long rests, or is no more.
const RESTS_AFTER: Duration = Duration::from_secs(60);

/// The guests of this node.
#[derive(Debug)]
pub(super) struct Book {
    kept: Mutex<HashMap<SandboxId, Kept>>,
    shelf: Shelf,
    /// The disk refused samples of somebody in the last look; it is told once.
    refused: AtomicBool,
}

/// What is kept of one guest.
#[derive(Debug, Default)]
struct Kept {
    epoch: Epoch,
    rings: Rings,
    inside: Inside,
    /// The VMM, once its shim has named it, and the last look at it.
    vmm: Option<u32>,
    last: Option<(Stamp, Reading)>,
    /// When what is outside of it was looked at.
    outside_at: Stamp,
}

impl Kept {
    /// What is outside of the VMM, where that is fresh enough not to be looked at again.
    fn outside(&self, now: Stamp) -> Option<Outside> {
        let age = Duration::from_millis(now.0.abs_diff(self.outside_at.0));
        let is_due = age + FINEST / 2 >= OUTSIDE_INTERVAL;
        self.last.filter(|_| !is_due).map(|it| it.1.outside)
    }

    /// Takes a look at the host as a sample, which needs the one before.
    fn look(
        &mut self,
        at: Stamp,
        reading: Reading,
    ) -> Option<impl Iterator<Item = Placed> + use<>> {
        let (then, before) = self.last.replace((at, reading))?;
        let passed_ms = at.0.saturating_sub(then.0);
        if passed_ms == 0 {
            return None;
        }
        let busy_ms = reading.busy_ms.saturating_sub(before.busy_ms);
        Some(self.rings.push(Sample {
            at,
            busy_cores: ratio(busy_ms, passed_ms),
            resident_kib: reading.resident_kib,
            disk_kib: reading.outside.disk_kib,
            sent_bytes: reading.outside.sent_bytes,
            received_bytes: reading.outside.received_bytes,
            inside: self.inside,
        }))
    }

    /// When it was last known to run.
    fn seen(&self) -> Option<Stamp> {
        self.rings.newest().max(self.last.map(|(at, _)| at))
    }

    /// Whether there is nothing to tell of it and nobody to look at.
    fn is_idle(&self, now: Stamp) -> bool {
        let rests = |(then, _): (Stamp, Reading)| now.since(then) > RESTS_AFTER;
        self.rings.newest().is_none() && (self.vmm.is_none() || self.last.is_some_and(rests))
    }
}

#[allow(clippy::cast_precision_loss)] // milliseconds of a second or so
fn ratio(part: u64, whole: u64) -> f32 {
    part as f32 / whole as f32
}

/// One guest to look at.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) id: SandboxId,
    pub(super) pid: u32,
    pub(super) overlay: PathBuf,
}

impl Book {
    /// Of nobody yet; what `dir` holds waits to be recalled.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            kept: Mutex::default(),
            shelf: Shelf::new(dir),
            refused: AtomicBool::new(false),
        }
    }

    /// Recalls what an earlier daemon left, of whomever; the first sweep drops what is not wanted.
    /// Reads files.
    pub(super) fn recall(&self, now: Stamp) {
        let present = self.shelf.present().unwrap_or_else(|err| {
            warn!(%err, "cannot recall how busy guests were");
            Vec::new()
        });
        for id in present {
            match self.shelf.read(id) {
                Ok(found) => self.take_in(id, found, now),
                Err(err) => warn!(%id, %err, "cannot recall how busy it was"),
            }
        }
    }

    fn take_in(&self, id: SandboxId, found: Vec<Placed>, now: Stamp) {
        // Of a clock that was ahead then, or is behind now. Once it is right they may be wanted.
        let is_early = found.iter().any(|it| it.sample.at > now);
        let rings = Rings::recalled(found, now);
        match rings.latest() {
            Some(latest) if self.len() < MOST_GUESTS => {
                let mut all = self.kept();
                let kept = all.entry(id).or_default();
                (kept.rings, kept.inside) = (rings, latest.inside);
            }
            None if is_early => {}
            _ => self.remove_file(id),
        }
    }

    /// The samples of the last `range`, the earliest first.
    pub(super) fn samples(&self, id: SandboxId, range: Duration, now: Stamp) -> Vec<Sample> {
        let kept = self.kept();
        let rings = kept.get(&id).map(|kept| &kept.rings);
        rings.map_or_else(Vec::new, |rings| rings.last(range, now))
    }

    /// The VMM of a guest under `epoch`, if it was found before.
    pub(super) fn vmm(&self, id: SandboxId, epoch: Epoch) -> Option<u32> {
        let kept = self.kept();
        let kept = kept.get(&id)?;
        kept.vmm.filter(|_| kept.epoch == epoch)
    }

    /// Notes the VMM of a guest; `false` where there is no room for one more.
    pub(super) fn found(&self, id: SandboxId, epoch: Epoch, vmm: u32) -> bool {
        let mut all = self.kept();
        if !all.contains_key(&id) && all.len() >= MOST_GUESTS {
            return false;
        }
        let kept = all.entry(id).or_default();
        kept.epoch = epoch;
        (kept.vmm, kept.last) = (Some(vmm), None);
        true
    }

    /// Notes what a guest said of itself.
    pub(super) fn heard(&self, id: SandboxId, inside: Inside) {
        if let Some(kept) = self.kept().get_mut(&id) {
            kept.inside = inside;
        }
    }

    /// Looks at each of `targets`, and writes down what it saw once it has seen all: no look waits
    /// for the disk. Reads and writes files.
    pub(super) fn look(&self, targets: &[Target], files: &impl Files, clock: &dyn Clock) {
        let mut seen = Vec::with_capacity(targets.len());
        for target in targets {
            let known = self.outside(target.id, clock.now());
            let reading = host::read(files, target.pid, &target.overlay, known);
            let at = clock.now();
            let placed = self.looked(target.id, at, reading, known.is_none());
            seen.extend(placed.map(|it| (target.id, it)));
        }
        let puts = seen
            .into_iter()
            .map(|(id, placed)| self.shelf.put(id, placed).map_err(|err| (id, err)));
        let refused: Vec<_> = puts.filter_map(Result::err).collect();
        self.note_refused(refused.first());
    }

    fn outside(&self, id: SandboxId, now: Stamp) -> Option<Outside> {
        self.kept().get(&id)?.outside(now)
    }

    fn looked(
        &self,
        id: SandboxId,
        at: Stamp,
        reading: Option<Reading>,
        is_whole: bool,
    ) -> Option<impl Iterator<Item = Placed> + use<>> {
        let mut kept = self.kept();
        let kept = kept.get_mut(&id)?;
        let Some(reading) = reading else {
            // Its shim names another, if there is one.
            (kept.vmm, kept.last) = (None, None);
            return None;
        };
        if is_whole {
            kept.outside_at = at;
        }
        kept.look(at, reading)
    }

    /// A disk that refuses costs a restart of the daemon its charts, and nothing now. A full one
    /// refuses new places only, so it is told once until all is written again.
    fn note_refused(&self, first: Option<&(SandboxId, io::Error)>) {
        let is_news = self.is_news(first.is_some());
        if let (Some((id, err)), true) = (first, is_news) {
            warn!(%id, %err, "cannot write down how busy guests are; a restart will forget it");
        }
    }

    fn is_news(&self, is_refused: bool) -> bool {
        let was_refused = self.refused.swap(is_refused, Ordering::Relaxed);
        is_refused && !was_refused
    }

    /// Drops what is not `ours` any more and what has grown old; where there is no room, what has
    /// rested longest. Removes files.
    pub(super) fn sweep(&self, now: Stamp, ours: impl Fn(SandboxId) -> bool) {
        for id in self.drop_unwanted(now, ours) {
            self.remove_file(id);
        }
    }

    fn drop_unwanted(&self, now: Stamp, ours: impl Fn(SandboxId) -> bool) -> Vec<SandboxId> {
        let mut all = self.kept();
        let mut unwanted = Vec::new();
        for (id, kept) in all.iter_mut() {
            kept.rings.forget(now);
            if !ours(*id) || kept.is_idle(now) {
                unwanted.push(*id);
            }
        }
        if all.len() - unwanted.len() >= MOST_GUESTS {
            let oldest = all.iter().min_by_key(|(_, it)| it.seen());
            unwanted.extend(oldest.map(|(id, _)| *id));
        }
        for id in &unwanted {
            all.remove(id);
        }
        unwanted
    }

    fn remove_file(&self, id: SandboxId) {
        if let Err(err) = self.shelf.remove(id) {
            warn!(%id, %err, "cannot remove the file of its samples");
        }
    }

    /// Guests of which something is kept.
    pub(super) fn len(&self) -> usize {
        self.kept().len()
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<SandboxId, Kept>> {
        // Every change leaves the table whole; a sample may be missing.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
