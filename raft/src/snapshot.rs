//! Snapshot files: the whole state at one position of the log.
//!
//! ```text
//! raft/snap/<index>.snap     0     8         12
//!                            | magic | version | head | row | row ... | 0 | rows | crc |
//! ```
//!
//! Head and rows are frames (`u32` length, bytes); a zero length ends them, followed by the number
//! of rows (`u64`) and the CRC-32C of everything before it. A file is written under `.tmp`,
//! synced, renamed and the folder synced: a `.snap` file is whole unless the disk damaged it, and
//! then the checksum says so. The two newest are kept, so that one damaged file does not cost the
//! state, as long as the log still reaches back to the older one.
//!
//! The log may only be purged up to a snapshot that is durable here; `Log::covered_by_snapshot` is
//! told after the folder's sync and not before. All functions block.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use prost::Message;
use proto::wire::raftlog as pb;

use crate::codec::{self, BadBytes};
use crate::disk::{Disk, LogFile};
use crate::fault::Fault;
use crate::machine::{Machine, Row, Unreadable};
use crate::types::SnapshotMeta;

/// Snapshot files kept: the newest, and one to fall back on.
const KEEP: usize = 2;
/// Bytes gathered before a write.
const BUFFER_BYTES: usize = 256 * 1024;
const MAGIC: &[u8; 8] = b"WRENNSNP";
/// Layout of the file.
const VERSION: u32 = 1;
/// Magic and version.
const START_BYTES: usize = 12;
/// Zero length, number of rows, checksum.
const END_BYTES: usize = 16;

/// A snapshot file, as openraft carries it about.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    /// Where it lies. It may be replaced by newer ones, but not changed.
    pub path: PathBuf,
}

/// Why a snapshot file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadSnapshotError {
    /// The disk refused.
    #[error("read snapshot")]
    Io(#[from] io::Error),
    /// The bytes are not a whole snapshot.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// Written by another version of the node.
    #[error("the snapshot is written in layout {0}, this version reads {VERSION}")]
    Version(u32),
    /// A row was written by another version of the machine.
    #[error("the snapshot cannot be understood")]
    Unreadable(#[source] Unreadable),
}

impl From<BadBytes> for ReadSnapshotError {
    fn from(bad: BadBytes) -> Self {
        Self::Damaged(bad.0)
    }
}

/// A snapshot read back.
pub(crate) struct Loaded {
    pub(crate) meta: SnapshotMeta,
    pub(crate) rows: Vec<Row>,
}

/// The folder of snapshots.
pub(crate) struct Snapshots {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    newest: Mutex<Option<(SnapshotMeta, SnapshotFile)>>,
    /// Held while one is written: each clears away what looks unfinished, and the leader's may come
    /// while one of our own is being written.
    writing: Mutex<()>,
}

impl Snapshots {
    /// Opens the folder, which must exist, and reads the newest snapshot that is whole.
    pub(crate) fn open(dir: &Path, disk: Arc<dyn Disk>) -> Result<(Self, Option<Loaded>), Fault> {
        let snapshots = Self {
            dir: dir.to_owned(),
            disk,
            newest: Mutex::new(None),
            writing: Mutex::new(()),
        };
        let loaded = snapshots.load_newest()?;
        Ok((snapshots, loaded))
    }

    /// The newest snapshot there is.
    pub(crate) fn newest(&self) -> Option<(SnapshotMeta, SnapshotFile)> {
        let newest = self.newest.lock();
        newest.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes a snapshot; when this returns it survives a power cut.
    pub(crate) fn write(
        &self,
        meta: &SnapshotMeta,
        rows: impl Iterator<Item = Row>,
    ) -> Result<SnapshotFile, Fault> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let path = self.dir.join(format!("{index}.snap"));
        let tmp = self.dir.join(format!("{index}.tmp"));
        self.write_tmp(&tmp, meta, rows)
            .and_then(|()| self.disk.rename(&tmp, &path))
            .and_then(|()| self.disk.sync_dir(&self.dir))
            .map_err(|source| Fault::disk("write snapshot", &path, source))?;
        let file = SnapshotFile { path };
        let newest = Some((meta.clone(), file.clone()));
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = newest;
        self.prune()?;
        Ok(file)
    }

    fn write_tmp(
        &self,
        tmp: &Path,
        meta: &SnapshotMeta,
        rows: impl Iterator<Item = Row>,
    ) -> io::Result<()> {
        let mut out = Out::new(self.disk.create(tmp)?);
        out.put(MAGIC)?;
        out.put(&VERSION.to_le_bytes())?;
        out.frame(&head(meta).encode_to_vec())?;
        let mut count = 0_u64;
        for (key, value) in rows {
            out.frame(&pb::Row { key, value }.encode_to_vec())?;
            count += 1;
        }
        out.put(&0_u32.to_le_bytes())?;
        out.put(&count.to_le_bytes())?;
        out.finish()
    }

    fn load_newest(&self) -> Result<Option<Loaded>, Fault> {
        for index in self.list()?.into_iter().rev() {
            let path = self.dir.join(format!("{index}.snap"));
            match read(&path) {
                Ok(loaded) => {
                    let file = SnapshotFile { path };
                    let newest = Some((loaded.meta.clone(), file));
                    *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = newest;
                    return Ok(Some(loaded));
                }
                Err(ReadSnapshotError::Io(source)) => {
                    return Err(Fault::disk("read snapshot", &path, source));
                }
                Err(err) => {
                    tracing::warn!(path = %path.display(), %err, "putting a snapshot aside");
                    self.put_aside(&path)?;
                }
            }
        }
        Ok(None)
    }

    /// Indices of the snapshots, ascending; leftovers of interrupted writes are removed.
    fn list(&self) -> Result<Vec<u64>, Fault> {
        let list = || -> io::Result<Vec<u64>> {
            let mut indices = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let path = entry?.path();
                let stem = path.file_stem().and_then(|stem| stem.to_str());
                match path.extension().and_then(|extension| extension.to_str()) {
                    Some("snap") => indices.extend(stem.and_then(|stem| stem.parse::<u64>().ok())),
                    Some("tmp") => self.disk.remove(&path)?,
                    _ => {}
                }
            }
            indices.sort_unstable();
            Ok(indices)
        };
        list().map_err(|source| Fault::disk("list snapshots in", &self.dir, source))
    }

    fn prune(&self) -> Result<(), Fault> {
        let newest = self.newest().map(|(_, file)| file.path);
        let files = self.list()?.into_iter().rev();
        let files = files.map(|index| self.dir.join(format!("{index}.snap")));
        // One installed from a leader may carry a lower index than one of our own.
        let others = files.filter(|path| Some(path) != newest.as_ref());
        for old in others.skip(KEEP - 1) {
            let removed = self.disk.remove(&old);
            removed.map_err(|source| Fault::disk("remove snapshot", &old, source))?;
        }
        Ok(())
    }

    fn put_aside(&self, path: &Path) -> Result<(), Fault> {
        let renamed = self.disk.rename(path, &path.with_extension("damaged"));
        renamed.map_err(|source| Fault::disk("put aside snapshot", path, source))
    }
}

pub(crate) fn head(meta: &SnapshotMeta) -> pb::SnapshotHead {
    pb::SnapshotHead {
        last_applied: meta.last_log_id.as_ref().map(codec::log_id_to_wire),
        membership: Some(codec::stored_membership_to_wire(&meta.last_membership)),
    }
}

pub(crate) fn meta(head: pb::SnapshotHead) -> Result<SnapshotMeta, BadBytes> {
    Ok(SnapshotMeta {
        last_log_id: head.last_applied.as_ref().map(codec::log_id_from_wire),
        last_membership: codec::stored_membership_from_wire(head.membership)?,
    })
}

/// Reads and checks a whole snapshot file: the state, and the index of the last entry in it. For a
/// mirror, which goes on with the entries behind that.
///
/// # Errors
/// [`ReadSnapshotError`]; nothing of a damaged file is used.
pub fn load<M: Machine>(path: &Path) -> Result<(M, u64), ReadSnapshotError> {
    let loaded = read(path)?;
    let machine = M::from_rows(loaded.rows).map_err(ReadSnapshotError::Unreadable)?;
    Ok((machine, loaded.meta.last_log_id.map_or(0, |id| id.index)))
}

/// Reads and checks a whole snapshot file.
pub(crate) fn read(path: &Path) -> Result<Loaded, ReadSnapshotError> {
    let bytes = fs::read(path)?;
    let mut rest = checked_frames(&bytes)?;
    let head = frame(&mut rest)?.ok_or(ReadSnapshotError::Damaged("no head"))?;
    let meta = meta(codec::decode("a garbled head", head)?)?;
    let mut rows = Vec::new();
    while let Some(row) = frame(&mut rest)? {
        let row = codec::decode::<pb::Row>("a garbled row", row)?;
        rows.push((row.key, row.value));
    }
    if rest != (rows.len() as u64).to_le_bytes() {
        return Err(ReadSnapshotError::Damaged("rows are missing"));
    }
    Ok(Loaded { meta, rows })
}

/// What lies between the start and the checksum, which must be right.
fn checked_frames(bytes: &[u8]) -> Result<&[u8], ReadSnapshotError> {
    let damaged = ReadSnapshotError::Damaged;
    if bytes.len() < START_BYTES + END_BYTES || &bytes[..8] != MAGIC {
        return Err(damaged("not a snapshot"));
    }
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return Err(damaged("checksum mismatch"));
    }
    let version = u32_at(&bytes[8..]).unwrap_or(0);
    if version != VERSION {
        return Err(ReadSnapshotError::Version(version));
    }
    Ok(&body[START_BYTES..])
}

fn frame<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>, ReadSnapshotError> {
    let short = || ReadSnapshotError::Damaged("a frame is cut short");
    let len = u32_at(rest).ok_or_else(short)? as usize;
    let after = &rest[4..];
    let bytes = after.get(..len).ok_or_else(short)?;
    *rest = &after[len..];
    Ok((len > 0).then_some(bytes))
}

fn u32_at(bytes: &[u8]) -> Option<u32> {
    let four = bytes.get(..4)?.try_into().ok()?;
    Some(u32::from_le_bytes(four))
}

/// A file being written from its start, and the checksum so far.
struct Out {
    file: Arc<dyn LogFile>,
    buffer: Vec<u8>,
    offset: u64,
    crc: u32,
}

impl Out {
    fn new(file: Arc<dyn LogFile>) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            offset: 0,
            crc: 0,
        }
    }

    fn frame(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.put(&len.to_le_bytes())?;
        self.put(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_at(&self.buffer, self.offset)?;
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.file.write_at(&self.crc.to_le_bytes(), self.offset)?;
        self.file.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;
    use crate::types::{CommittedLeader, LogId};

    fn at(index: u64) -> SnapshotMeta {
        let leader = CommittedLeader {
            term: 1,
            node_id: 1,
        };
        SnapshotMeta {
            last_log_id: Some(LogId::new(leader, index)),
            ..SnapshotMeta::default()
        }
    }

    fn rows(count: u32) -> impl Iterator<Item = Row> {
        (0..count).map(|row| (row.to_be_bytes().to_vec(), vec![7; 100]))
    }

    fn open(dir: &Path) -> (Snapshots, Option<Loaded>) {
        Snapshots::open(dir, Arc::new(RealDisk)).expect("opens")
    }

    #[test]
    fn a_snapshot_survives_being_written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).0.write(&at(5), rows(10_000)).unwrap();
        let loaded = open(dir.path()).1.expect("is there");
        assert_eq!(loaded.meta, at(5));
        assert_eq!(loaded.rows, rows(10_000).collect::<Vec<_>>());
    }

    #[test]
    fn the_two_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = open(dir.path()).0;
        for index in [5, 9, 70] {
            snapshots.write(&at(index), rows(1)).unwrap();
        }
        assert_eq!(snapshots.list().unwrap(), [9, 70]);
    }

    /// A member that lags may be sent one while it writes its own.
    #[test]
    fn two_writers_do_not_clear_each_other_s_files_away() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = open(dir.path()).0;
        std::thread::scope(|scope| {
            for first in [1, 2] {
                let indices = (first..40).step_by(2);
                let write = |index| snapshots.write(&at(index), rows(5000)).map(drop);
                scope.spawn(move || indices.for_each(|index| write(index).unwrap()));
            }
        });
        assert_eq!(snapshots.list().unwrap().len(), KEEP);
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_noticed_and_the_older_one_serves() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = open(dir.path()).0;
        snapshots.write(&at(5), rows(2)).unwrap();
        let file = snapshots.write(&at(6), rows(3)).unwrap();
        let whole = fs::read(&file.path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            fs::write(&file.path, &damaged).unwrap();
            assert!(read(&file.path).is_err(), "byte {at}");
            fs::write(&file.path, &whole[..at]).unwrap();
            assert!(read(&file.path).is_err(), "cut at {at}");
        }
        let loaded = open(dir.path()).1.expect("the older one");
        assert_eq!(loaded.meta, at(5));
        assert!(file.path.with_extension("damaged").exists());
    }
}
