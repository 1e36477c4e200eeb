//! Reading the log back at start.
//!
//! What a crash may leave, and what is made of it:
//!
//! | found | meaning | done |
//! |---|---|---|
//! | last segment ends in zeroes | clean end | go on there |
//! | bad bytes at its end, nothing later proves they were synced | torn tail: never acknowledged | zero them, go on there |
//! | last segment empty, the one before not sealed | died while switching | drop the empty one |
//! | anything else that does not read | damage to acknowledged data | refuse, by name |
//!
//! Never is anything cut in the middle. Before reading, the segments that may hold unsynced bytes
//! are synced: after `kill -9` the page cache still has records that never reached the medium, and
//! what is reported as recovered must not be lost by a later power cut.

use std::fs;
use std::path::{Path, PathBuf};

use proto::wire::raftlog as pb;

use super::index::{Hard, Index};
use super::record::{self, ALIGN, Kind, Place, Record};
use super::segment::{self, BadHead, HEAD_BYTES, Segment, Spare};
use crate::codec::{self, BadBytes};
use crate::disk::Disk;
use crate::fault::Fault;

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenLogError {
    /// Acknowledged data is damaged. An operator must remove this member and let it join anew;
    /// cutting the log here could take back what the cluster was promised.
    #[error("the log is damaged: {what} at byte {offset} of {}", .path.display())]
    Corrupt {
        /// The segment.
        path: PathBuf,
        /// Where in it.
        offset: u32,
        /// What is wrong there.
        what: &'static str,
    },
    /// A segment is not what its name says.
    #[error("cannot use log segment {}", .path.display())]
    Head {
        /// The segment.
        path: PathBuf,
        /// What is wrong with it.
        source: BadHead,
    },
    /// A segment between others, or the newest, is gone.
    #[error("the log is damaged: {} is missing", .0.display())]
    Missing(PathBuf),
    /// The disk refused.
    #[error("open the log")]
    Disk(#[source] Fault),
}

/// The log as found.
pub(super) struct Recovered {
    pub(super) index: Index,
    pub(super) kept: Vec<Kept>,
    /// Where to go on writing.
    pub(super) active: Segment,
    pub(super) offset: u32,
    /// Whether the log holds nothing at all yet.
    pub(super) pristine: bool,
}

/// A segment, and the highest index among the entries in it.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    pub(super) highest: Option<u64>,
}

/// What one segment's bytes say.
struct Scanned {
    segment: Segment,
    bytes: Vec<u8>,
    /// Behind the last good record.
    end: u32,
    sealed: bool,
    highest: Option<u64>,
}

impl Scanned {
    const fn is_empty(&self) -> bool {
        self.end == HEAD_BYTES
    }

    /// Whether there are bytes behind the last good record.
    fn has_tail(&self) -> bool {
        self.bytes[self.end as usize..]
            .iter()
            .any(|&byte| byte != 0)
    }

    fn corrupt(&self, what: &'static str) -> OpenLogError {
        OpenLogError::Corrupt {
            path: self.segment.path.clone(),
            offset: self.end,
            what,
        }
    }
}

/// Opens the log in `dir`, making its first segment where there is none.
pub(super) fn recover(
    dir: &Path,
    segment_bytes: u32,
    cache_bytes: usize,
    disk: &dyn Disk,
) -> Result<Recovered, OpenLogError> {
    let numbers = segment::list(dir, disk)
        .map_err(|source| OpenLogError::Disk(Fault::disk("list log folder", dir, source)))?;
    let mut index = Index::new(cache_bytes);
    let mut kept = Vec::new();
    let mut newest: Option<Scanned> = None;
    for (at, &number) in numbers.iter().enumerate() {
        if number != numbers[0] + at as u64 {
            let gap = numbers[0] + at as u64;
            return Err(OpenLogError::Missing(segment::path(dir, gap)));
        }
        let is_last = at + 1 == numbers.len();
        if let Some(before) = newest.as_ref().filter(|before| !before.sealed) {
            if !is_last || !drop_if_unused(dir, number, disk)? {
                return Err(before.corrupt("an unreadable record before the newest segment"));
            }
            break;
        }
        let may_be_unsynced = at + 2 >= numbers.len();
        let scanned = scan(dir, number, may_be_unsynced, &mut index, disk)?;
        index.add_file(number, scanned.segment.file.clone());
        kept.push(Kept {
            number,
            path: scanned.segment.path.clone(),
            highest: scanned.highest,
        });
        newest = Some(scanned);
    }
    match newest {
        Some(newest) => go_on(newest, index, kept, dir),
        None => start(index, dir, segment_bytes, disk).map_err(OpenLogError::Disk),
    }
}

fn start(
    mut index: Index,
    dir: &Path,
    segment_bytes: u32,
    disk: &dyn Disk,
) -> Result<Recovered, Fault> {
    let active = Spare::create(dir, 1, segment_bytes, disk)?.publish(dir, disk)?;
    index.add_file(active.number, active.file.clone());
    Ok(Recovered {
        index,
        kept: vec![Kept {
            number: active.number,
            path: active.path.clone(),
            highest: None,
        }],
        active,
        offset: HEAD_BYTES,
        pristine: true,
    })
}

fn go_on(
    newest: Scanned,
    index: Index,
    kept: Vec<Kept>,
    dir: &Path,
) -> Result<Recovered, OpenLogError> {
    if newest.sealed {
        let next = newest.segment.number + 1;
        return Err(OpenLogError::Missing(segment::path(dir, next)));
    }
    if newest.has_tail() {
        if record::proves_synced(newest.segment.number, &newest.bytes, newest.end) {
            return Err(newest.corrupt("an unreadable record before readable ones"));
        }
        tracing::warn!(
            segment = %newest.segment.path.display(),
            offset = newest.end,
            "cutting a torn record that was never acknowledged"
        );
        zero_tail(&newest).map_err(OpenLogError::Disk)?;
    }
    let pristine = kept.len() == 1 && index.hard == Hard::default() && index.last().is_none();
    Ok(Recovered {
        index,
        kept,
        offset: newest.end,
        active: newest.segment,
        pristine,
    })
}

/// Zeroes what lies behind the last good record: a shorter record written there later must not be
/// followed by the remains of this one.
fn zero_tail(newest: &Scanned) -> Result<(), Fault> {
    let tail = &newest.bytes[newest.end as usize..];
    let dirty = tail
        .iter()
        .rposition(|&byte| byte != 0)
        .map_or(0, |at| at + 1);
    let file = &newest.segment.file;
    file.write_at(&vec![0; dirty], u64::from(newest.end))
        .and_then(|()| file.sync())
        .map_err(|source| Fault::disk("cut the torn tail of", &newest.segment.path, source))
}

/// Removes the newest segment if nothing was ever written to it: the crash came between its
/// naming and the seal of the one before.
fn drop_if_unused(dir: &Path, number: u64, disk: &dyn Disk) -> Result<bool, OpenLogError> {
    let scanned = scan(dir, number, true, &mut Index::new(0), disk)?;
    if !scanned.is_empty() || scanned.has_tail() {
        return Ok(false);
    }
    let path = &scanned.segment.path;
    let removed = disk.remove(path).and_then(|()| disk.sync_dir(dir));
    removed.map_err(|source| {
        OpenLogError::Disk(Fault::disk("remove unused log segment", path, source))
    })?;
    Ok(true)
}

fn scan(
    dir: &Path,
    number: u64,
    may_be_unsynced: bool,
    index: &mut Index,
    disk: &dyn Disk,
) -> Result<Scanned, OpenLogError> {
    let path = segment::path(dir, number);
    let fault = |source| OpenLogError::Disk(Fault::disk("read log segment", &path, source));
    let file = disk.open(&path).map_err(fault)?;
    if may_be_unsynced {
        file.sync().map_err(fault)?;
    }
    let bytes = fs::read(&path).map_err(fault)?;
    let capacity = segment::check_head(number, &bytes).map_err(|source| OpenLogError::Head {
        path: path.clone(),
        source,
    })?;
    let mut scanned = Scanned {
        segment: Segment {
            number,
            path,
            file,
            capacity,
        },
        bytes: Vec::new(),
        end: HEAD_BYTES,
        sealed: false,
        highest: None,
    };
    scan_records(&mut scanned, &bytes, index)?;
    scanned.bytes = bytes;
    Ok(scanned)
}

fn scan_records(
    scanned: &mut Scanned,
    bytes: &[u8],
    index: &mut Index,
) -> Result<(), OpenLogError> {
    let number = scanned.segment.number;
    while let Some(record) = bytes
        .get(scanned.end as usize..)
        .and_then(|rest| record::parse(number, scanned.end, rest))
    {
        let place = Place {
            segment: number,
            offset: scanned.end,
            len: record.len,
        };
        replay(&record, place, index).map_err(|bad| scanned.corrupt(bad.0))?;
        match record.kind {
            Kind::Entry => scanned.highest = scanned.highest.max(Some(record.index)),
            Kind::Seal => scanned.sealed = true,
            _ => {}
        }
        debug_assert!(record.len % ALIGN == 0);
        scanned.end += record.len;
        if scanned.sealed {
            break;
        }
    }
    Ok(())
}

/// Does to `index` what the operation did that wrote `record`.
fn replay(record: &Record<'_>, place: Place, index: &mut Index) -> Result<(), BadBytes> {
    match record.kind {
        Kind::Entry => {
            let id = read_entry_id(record)?;
            if !index.push_stored(id, place) {
                return Err(BadBytes("an entry that does not follow the one before it"));
            }
        }
        Kind::Vote => {
            let vote = codec::decode::<pb::Vote>("a garbled vote", record.body)?;
            index.hard.vote = Some(codec::vote_from_wire(&vote));
        }
        Kind::Committed => {
            let id = codec::decode::<pb::LogId>("a garbled commit mark", record.body)?;
            index.hard.committed = Some(codec::log_id_from_wire(&id));
        }
        Kind::Purge => {
            let id = codec::decode::<pb::LogId>("a garbled purge mark", record.body)?;
            index.purge(codec::log_id_from_wire(&id));
        }
        Kind::Truncate => index.truncate(record.index),
        Kind::State => {
            let state = codec::decode::<pb::HardState>("a garbled head", record.body)?;
            index.hard.vote = state.vote.as_ref().map(codec::vote_from_wire);
            index.hard.committed = state.committed.as_ref().map(codec::log_id_from_wire);
            if let Some(purged) = state.purged.as_ref() {
                index.purge(codec::log_id_from_wire(purged));
            }
        }
        Kind::Seal => {}
    }
    Ok(())
}

fn read_entry_id(record: &Record<'_>) -> Result<crate::types::LogId, BadBytes> {
    let entry = codec::decode::<pb::Entry>("a garbled entry", record.body)?;
    let entry = codec::entry_from_wire(entry)?;
    if (entry.log_id.index, entry.log_id.leader_id.term) != (record.index, record.term) {
        return Err(BadBytes("an entry that contradicts its own header"));
    }
    Ok(entry.log_id)
}
