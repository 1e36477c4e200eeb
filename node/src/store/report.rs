//! What a store says of itself to people and programs, and the words by which a running daemon is
//! asked for it.
//!
//! `wrenn store` works on a stopped node's store by itself, and asks the daemon of a running one by
//! its socket: one line of JSON each way, a [`Chore`] and a [`Told`].

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::collect::Collected;
use super::rounds::Round;
use super::scrub::Checked;
use super::stats::Stats;

/// Longest question; the answers of a store with much damage are longer.
pub const MAX_CHORE_BYTES: u64 = 256;

/// What a store is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Chore {
    /// Read and hash everything.
    Check,
    /// Drop what no record of the cluster names.
    Gc,
    /// Count what is there.
    Stats,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// Of a check.
    Check(CheckReport),
    /// Of a collection.
    Gc(CollectReport),
    /// Of counting.
    Stats(StatsReport),
    /// It failed, for this reason.
    Failed(String),
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Whether nothing is damaged.
    pub sound: bool,
    /// Chunks that are what their names say.
    pub chunks: u64,
    /// Manifests that are.
    pub manifests: u64,
    /// Chunks that were damaged.
    pub damaged_chunks: Vec<String>,
    /// Manifests that were.
    pub damaged_manifests: Vec<String>,
    /// Packs that the disk would not read to their ends.
    pub unreadable_packs: Vec<u32>,
    /// Bytes in packs that are no chunks.
    pub garbled_bytes: u64,
    /// What needs more than is here.
    pub incomplete: Vec<Incomplete>,
}

/// A manifest that needs more than is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incomplete {
    /// Of what.
    pub of: String,
    /// How many chunks or images it lacks.
    pub lacks: u64,
}

/// What a collection did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectReport {
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
    /// Needed manifests that are not here.
    pub absent: u64,
    /// Needed chunks that turned out damaged.
    pub damaged: u64,
}

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Packs.
    pub packs: u64,
    /// Bytes they take.
    pub pack_bytes: u64,
    /// Chunks that can be read.
    pub chunks: u64,
    /// Bytes of those chunks.
    pub chunk_bytes: u64,
    /// Bytes they take in packs.
    pub stored_bytes: u64,
    /// Manifests of images.
    pub images: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Bytes that the images have in chunks.
    pub image_bytes: u64,
    /// Bytes of the different ones among those.
    pub unique_bytes: u64,
    /// Bytes in packs that no manifest here needs.
    pub garbage_bytes: u64,
    /// How many times the images would take the room of their chunks.
    pub dedup_ratio: f64,
    /// The share of the packs' bytes that no manifest here needs.
    pub garbage_share: f64,
    /// The reading of everything in search of damage that is under way.
    #[serde(default)]
    pub scrubbing: Option<ScrubReport>,
    /// The last one that was finished.
    #[serde(default)]
    pub scrubbed: Option<ScrubReport>,
}

/// What one reading of everything came to, so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// When it began.
    pub began_at: String,
    /// When it ended, if it has.
    pub ended_at: Option<String>,
    /// Bytes it has read.
    pub read_bytes: u64,
    /// Chunks that were what their names say.
    pub chunks: u64,
    /// Chunks that were damaged.
    pub damaged_chunks: u64,
    /// Manifests that were.
    pub damaged_manifests: u64,
    /// Packs that the disk would not read to their ends.
    pub unreadable_packs: u64,
}

impl From<&Checked> for CheckReport {
    fn from(checked: &Checked) -> Self {
        let incomplete = checked.incomplete.iter().map(|(pin, lacks)| Incomplete {
            of: pin.to_string(),
            lacks: *lacks,
        });
        Self {
            sound: checked.is_sound(),
            chunks: checked.chunks,
            manifests: checked.manifests,
            damaged_chunks: names(&checked.damaged),
            damaged_manifests: names(&checked.bad_manifests),
            unreadable_packs: checked.unreadable_packs.iter().copied().collect(),
            garbled_bytes: checked.garbled_bytes,
            incomplete: incomplete.collect(),
        }
    }
}

impl From<&Collected> for CollectReport {
    fn from(collected: &Collected) -> Self {
        let Collected {
            manifests,
            packs,
            chunks,
            copied_bytes,
            freed_bytes,
            absent,
            damaged,
        } = *collected;
        Self {
            manifests,
            packs,
            chunks,
            copied_bytes,
            freed_bytes,
            absent,
            damaged,
        }
    }
}

impl From<&Stats> for StatsReport {
    fn from(stats: &Stats) -> Self {
        Self {
            packs: stats.packs,
            pack_bytes: stats.pack_bytes,
            chunks: stats.chunks,
            chunk_bytes: stats.chunk_bytes,
            stored_bytes: stats.stored_bytes,
            images: stats.images,
            snapshots: stats.snapshots,
            image_bytes: stats.image_bytes,
            unique_bytes: stats.unique_bytes,
            garbage_bytes: stats.garbage_bytes,
            dedup_ratio: stats.dedup_ratio(),
            garbage_share: stats.garbage_share(),
            scrubbing: stats.rounds.under_way.as_ref().map(Into::into),
            scrubbed: stats.rounds.last.as_ref().map(Into::into),
        }
    }
}

impl From<&Round> for ScrubReport {
    fn from(round: &Round) -> Self {
        Self {
            began_at: when(round.began_at_ms),
            ended_at: (round.ended_at_ms > 0).then(|| when(round.ended_at_ms)),
            read_bytes: round.read_bytes,
            chunks: round.chunks,
            damaged_chunks: round.damaged_chunks,
            damaged_manifests: round.damaged_manifests,
            unreadable_packs: round.unreadable_packs,
        }
    }
}

/// An instant for people; the file it is from may say anything.
fn when(at_ms: u64) -> String {
    let at = i64::try_from(at_ms).unwrap_or(i64::MAX);
    let at = Timestamp::from_millisecond(at);
    at.map_or_else(|_| "unknown".to_owned(), |at| at.to_string())
}

fn names<'a>(all: impl IntoIterator<Item = &'a (impl ToString + 'a)>) -> Vec<String> {
    all.into_iter().map(ToString::to_string).collect()
}
