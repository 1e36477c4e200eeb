//! Scrubbing: the same look for damage as a check takes, a little at a time.
//!
//! ```text
//! slice > pause > slice > ... > the round is over > a long pause > the next round
//! ```
//!
//! A round reads every manifest and every record once, oldest pack first. Whoever has it done says how
//! much at a time, and when. What is damaged is forgotten, as by a check, and told by
//! [`Store::damage`], so it is mended from another holder. `<store>/scrub.json` says where the round
//! stands: a restart costs what was read since that was last written, and a file that cannot be read
//! costs a round. Seals, reads and collections go on meanwhile.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, TryLockError};

use proto::units::Stamp;
use serde::{Deserialize, Serialize};

use super::durable;
use super::engine::{Core, Store};
use super::error::ReadManifestError;
use super::pack::{Depth, Found, Pack};
use super::pin::Pin;
use super::scrub::Checked;

/// Where the state of the rounds lies in the store.
const FILE: &str = "scrub.json";

/// How far the store was read again, in search of damage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rounds {
    /// The round under way.
    pub under_way: Option<Round>,
    /// The last one that was finished.
    pub last: Option<Round>,
}

/// One reading of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// When it began, in milliseconds since 1970.
    pub began_at_ms: u64,
    /// When it ended; 0 while it is under way.
    pub ended_at_ms: u64,
    /// Bytes it has read.
    pub read_bytes: u64,
    /// Chunks that were sound.
    pub chunks: u64,
    /// Chunks that were damaged.
    pub damaged_chunks: u64,
    /// Manifests that were.
    pub damaged_manifests: u64,
    /// Packs that the disk would not read to their ends.
    pub unreadable_packs: u64,
    /// Where it goes on.
    next: Next,
}

/// Where a round goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Next {
    /// Behind so many manifests, in their order. Where some have come or gone meanwhile, as many are
    /// left out or read twice.
    Manifests(usize),
    /// In this pack, or the first one after it, behind so many bytes.
    Packs(u32, u32),
}

impl Default for Next {
    fn default() -> Self {
        Self::Manifests(0)
    }
}

/// What came of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slice {
    /// So many bytes were read; there are more.
    Read(u64),
    /// A check or a collection is under way.
    Busy,
    /// The round is over.
    Over,
}

impl Round {
    /// One that begins now.
    #[must_use]
    pub fn begun(at: Stamp) -> Self {
        Self {
            began_at_ms: at.0,
            ..Self::default()
        }
    }

    /// Whether nothing was found.
    #[must_use]
    pub const fn is_sound(&self) -> bool {
        self.damaged_chunks == 0 && self.damaged_manifests == 0 && self.unreadable_packs == 0
    }

    /// Counts on. What was read back from the disk may say anything.
    fn count(&mut self, checked: &Checked) {
        let add = |counter: &mut u64, more: usize| *counter = counter.saturating_add(more as u64);
        self.chunks = self.chunks.saturating_add(checked.chunks);
        add(&mut self.damaged_chunks, checked.damaged.len());
        add(&mut self.damaged_manifests, checked.bad_manifests.len());
        add(&mut self.unreadable_packs, checked.unreadable_packs.len());
    }

    fn add_read(&mut self, bytes: u64) {
        self.read_bytes = self.read_bytes.saturating_add(bytes);
    }
}

impl Rounds {
    /// What such a file says; `None` where it is none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// The bytes of a file that says so.
    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(io::Error::other)
    }

    /// Ends the round under way.
    pub fn end(&mut self, at: Stamp) {
        if let Some(round) = self.under_way.take() {
            self.last = Some(Round {
                ended_at_ms: at.0,
                ..round
            });
        }
    }
}

impl Store {
    /// Where the rounds stand, as was last written down.
    #[must_use]
    pub fn rounds(&self) -> Rounds {
        let read = fs::read(self.rounds_file());
        let decoded = read.map(|bytes| Rounds::decode(&bytes));
        decoded.ok().flatten().unwrap_or_default()
    }

    /// Writes down where the rounds stand.
    ///
    /// # Errors
    /// The disk failed.
    pub fn keep_rounds(&self, rounds: &Rounds) -> io::Result<()> {
        durable::write(&self.rounds_file(), &rounds.encode()?)
    }

    /// Reads the next of `round`, about `most_bytes` of it, and looks for damage.
    ///
    /// # Errors
    /// The manifests cannot be listed.
    pub fn scrub(&self, round: &mut Round, most_bytes: u64) -> io::Result<Slice> {
        let core = &self.core;
        let _one = match core.collecting.try_lock() {
            Ok(one) => one,
            Err(TryLockError::Poisoned(one)) => one.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(Slice::Busy),
        };
        let before = round.read_bytes;
        let mut checked = Checked::default();
        let is_over = match round.next {
            Next::Manifests(done) => {
                core.scrub_manifests(round, done, most_bytes, &mut checked)?;
                false
            }
            Next::Packs(number, offset) => {
                core.scrub_pack(round, (number, offset), most_bytes, &mut checked)
            }
        };
        round.count(&checked);
        Ok(match is_over {
            true => Slice::Over,
            false => Slice::Read(round.read_bytes - before),
        })
    }

    fn rounds_file(&self) -> PathBuf {
        // Beside the packs.
        self.core.packs.dir().with_file_name(FILE)
    }
}

impl Core {
    fn scrub_manifests(
        &self,
        round: &mut Round,
        done: usize,
        most_bytes: u64,
        checked: &mut Checked,
    ) -> io::Result<()> {
        let mut left = most_bytes;
        let listed = self.manifests.list()?;
        let mut kept = done;
        for pin in listed.iter().skip(done) {
            if left == 0 || self.is_closing() {
                round.next = Next::Manifests(kept);
                return Ok(());
            }
            let path = self.manifests.path(pin);
            let bytes = fs::metadata(path).map_or(0, |it| it.len());
            left = left.saturating_sub(bytes);
            round.add_read(bytes);
            kept += usize::from(self.scrub_manifest(pin, checked));
        }
        round.next = Next::Packs(0, 0);
        Ok(())
    }

    /// Says whether it is still in its place.
    fn scrub_manifest(&self, pin: &Pin, checked: &mut Checked) -> bool {
        let read = match pin {
            Pin::Image(digest) => self.manifests.image(digest).map(drop),
            Pin::Snapshot(digest) => self.manifests.snapshot(digest).map(drop),
        };
        match read {
            Ok(()) => true,
            // Gone since it was listed.
            Err(ReadManifestError::Missing { .. }) => false,
            Err(err) => {
                self.set_aside(pin, &err, checked);
                false
            }
        }
    }

    /// Says whether there was no pack left.
    fn scrub_pack(
        &self,
        round: &mut Round,
        (number, offset): (u32, u32),
        most_bytes: u64,
        checked: &mut Checked,
    ) -> bool {
        let packs = self.packs.all();
        let Some(pack) = packs.into_iter().find(|it| it.number() >= number) else {
            return true;
        };
        let from = if pack.number() == number { offset } else { 0 };
        let mut read_bytes = 0;
        let mut gaps = Vec::new();
        let walked = pack.walk_from(from, Depth::Bodies, |found| {
            match found {
                Found::Record { offset, head, body } => {
                    read_bytes += u64::from(head.record_bytes());
                    self.check_record(&pack, (offset, head), body, checked)?;
                }
                Found::Gap { from, to } => {
                    read_bytes += u64::from(to - from);
                    gaps.push((from, to));
                }
            }
            Ok(match read_bytes >= most_bytes || self.is_closing() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        });
        self.check_gaps(&pack, &gaps, checked);
        round.add_read(read_bytes);
        let next_pack = Next::Packs(pack.number().saturating_add(1), 0);
        round.next = match walked.map(|it| it.broken_off_at) {
            Ok(Some(at)) => Next::Packs(pack.number(), at),
            Ok(None) => next_pack,
            Err(err) => {
                tracing::warn!(pack = pack.number(), %err, "could not read a pack to its end");
                checked.unreadable_packs.insert(pack.number());
                next_pack
            }
        };
        false
    }

    /// Forgets the chunks whose entries lead to where no record is any more.
    fn check_gaps(&self, pack: &Arc<Pack>, gaps: &[(u32, u32)], checked: &mut Checked) {
        if gaps.is_empty() {
            return;
        }
        let is_in = |offset: u32| gaps.iter().any(|(from, to)| (*from..*to).contains(&offset));
        let led_there = self.with_index(|index| {
            let mut ids = Vec::new();
            index.each(|id, place| {
                if place.pack == pack.number() && is_in(place.offset) {
                    ids.push((id, place));
                }
            })?;
            Ok(ids)
        });
        for (id, place) in led_there.unwrap_or_default() {
            self.condemn(&id, pack, &place);
            checked.damaged.insert(id);
        }
    }
}
