//! Segment files: their names, their heads, and making them.
//!
//! ```text
//! raft/log/00000007.seg      0     8         12    16       24         32
//!                            | magic | version | crc | number | capacity | records ...
//! ```
//!
//! A segment is written full of zeroes and synced under a `.tmp` name before it gets its real one,
//! so a `.seg` file always has its full length and a valid head, and appending to it never
//! changes the file's size: `fdatasync` then writes data and nothing else. A crash leaves at most
//! one `.tmp`, which the next start removes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::HEADER_BYTES;
use crate::disk::{Disk, LogFile};
use crate::fault::Fault;

/// Where the first record starts.
pub(super) const HEAD_BYTES: u32 = 32;
/// Smallest segment worth having: head, hard state, one small entry and the seal.
pub const MIN_SEGMENT_BYTES: u32 = 16 * 1024;
/// Largest: offsets are 32 bits, and a whole segment is read into memory at start.
pub const MAX_SEGMENT_BYTES: u32 = 1024 * 1024 * 1024;
/// Zeroes are written in pieces of this size.
const FILL_BYTES: usize = 1024 * 1024;

const MAGIC: &[u8; 8] = b"WRENNLOG";
/// Layout of segments and records.
const VERSION: u32 = 1;

const _: () = assert!(HEAD_BYTES == HEADER_BYTES && MIN_SEGMENT_BYTES > HEAD_BYTES);

/// One open segment.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn LogFile>,
    pub(super) capacity: u32,
}

/// Why a segment's head cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadHead {
    /// The file is shorter than a head or than the head says.
    #[error("the file is cut short")]
    Short,
    /// Not a segment, or a damaged one.
    #[error("the head is damaged")]
    Damaged,
    /// Written by another version of the node.
    #[error("written in layout {0}, this version reads {VERSION}")]
    Version(u32),
}

/// The file name of segment `number`.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:08}.seg"))
}

/// Numbers of the segments in `dir`, ascending; leftovers of an interrupted creation are removed.
pub(super) fn list(dir: &Path, disk: &dyn Disk) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("seg") => numbers.extend(stem.and_then(|stem| stem.parse::<u64>().ok())),
            Some("tmp") => disk.remove(&path)?,
            _ => {}
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// A zero-filled and synced segment that nobody can find yet.
pub(super) struct Spare {
    segment: Segment,
    tmp: PathBuf,
}

impl Spare {
    /// Writes the file. Takes as long as the disk needs for `capacity` bytes.
    pub(super) fn create(
        dir: &Path,
        number: u64,
        capacity: u32,
        disk: &dyn Disk,
    ) -> Result<Self, Fault> {
        let tmp = dir.join(format!("{number:08}.tmp"));
        let file = fill(&tmp, number, capacity, disk)
            .map_err(|source| Fault::disk("create log segment", &tmp, source))?;
        let segment = Segment {
            number,
            path: path(dir, number),
            file,
            capacity,
        };
        Ok(Self { segment, tmp })
    }

    /// Gives the segment its name, durably.
    pub(super) fn publish(self, dir: &Path, disk: &dyn Disk) -> Result<Segment, Fault> {
        disk.rename(&self.tmp, &self.segment.path)
            .and_then(|()| disk.sync_dir(dir))
            .map_err(|source| Fault::disk("name log segment", &self.segment.path, source))?;
        Ok(self.segment)
    }
}

fn fill(path: &Path, number: u64, capacity: u32, disk: &dyn Disk) -> io::Result<Arc<dyn LogFile>> {
    let file = disk.create(path)?;
    let zeroes = vec![0; FILL_BYTES.min(capacity as usize)];
    let mut at = 0;
    while at < capacity as usize {
        let piece = zeroes.len().min(capacity as usize - at);
        file.write_at(&zeroes[..piece], at as u64)?;
        at += piece;
    }
    file.write_at(&head(number, capacity), 0)?;
    file.sync()?;
    Ok(file)
}

pub(super) fn head(number: u64, capacity: u32) -> [u8; HEAD_BYTES as usize] {
    let mut head = [0; HEAD_BYTES as usize];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[16..24].copy_from_slice(&number.to_le_bytes());
    head[24..28].copy_from_slice(&capacity.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..12]), &head[16..]);
    head[12..16].copy_from_slice(&crc.to_le_bytes());
    head
}

/// Checks that `bytes`, a whole file, is segment `number`; returns its capacity.
pub(super) fn check_head(number: u64, bytes: &[u8]) -> Result<u32, BadHead> {
    let found = bytes.get(..HEAD_BYTES as usize).ok_or(BadHead::Short)?;
    let mut four = [0; 4];
    four.copy_from_slice(&found[8..12]);
    let version = u32::from_le_bytes(four);
    if &found[..8] == MAGIC && version != VERSION && version != 0 {
        return Err(BadHead::Version(version));
    }
    four.copy_from_slice(&found[24..28]);
    let capacity = u32::from_le_bytes(four);
    if found != head(number, capacity) {
        return Err(BadHead::Damaged);
    }
    if bytes.len() as u64 != u64::from(capacity) {
        return Err(BadHead::Short);
    }
    Ok(capacity)
}
