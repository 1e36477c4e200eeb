//! The derived copy of the state, in sled: it makes a restart quick and is never the truth.
//!
//! Rows of applied entries are gathered in memory and written by one thread, a whole number of
//! apply batches at a time, as one `sled::Batch` together with how far it got. Nothing waits for
//! it: what piles up for [`GATHER`] and while it writes is merged by key, so the pile is never
//! larger than the state.
//!
//! sled's own flush does not reach the medium on Linux, and its background thread would sync twice
//! a second on an idle node; so that thread is off, and [`FLUSH_EVERY`] after a change (or on
//! [`Derived::flush`]) the data is flushed and the file synced by us. Values are split into parts
//! of [`PART_BYTES`], because a sled database with large values may panic at open after a power
//! cut.
//!
//! sled may lose a tail, come back empty or panic. So it is opened in a thread of its own under a
//! panic guard, and everything it returns is checked: a checksum a row, and a sum over all rows
//! that must equal the one written with the position. On any doubt the folder is moved aside and
//! filled again. If it fails while running, it is left alone until the next start: the log and the
//! snapshots are complete without it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use prost::Message;
use proto::wire::raftlog as pb;

use crate::codec::{self, BadBytes};
use crate::machine::{Change, Row};
use crate::types::{LogId, StoredMembership};

/// Longest sled keeps its lock after its last handle is dropped: a thread of its own lets go of it,
/// in milliseconds as a rule.
const LOCK_LAG: Duration = Duration::from_secs(5);
/// How often the lock is tried meanwhile.
const LOCK_RETRY: Duration = Duration::from_millis(5);
/// How long changes are gathered before they are written. sled wakes half a dozen threads for a
/// batch, which on a small machine costs a lone client more than its own write does; and what a
/// restart after a crash replays from the log for it is applied in less.
const GATHER: Duration = Duration::from_millis(250);
/// How long a change may stay unsynced: what a restart after a power cut replays from the log.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// sled's page cache. Rows are read once, at start; the rest is for the old values of rows being
/// changed.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Bytes of a value in one sled entry, so that with its head it stays below 4 KiB.
const PART_BYTES: usize = 4000;
/// Rows written in one batch when everything is replaced.
const REPLACE_ROWS: usize = 1000;
/// Layout of the entries.
const VERSION: u8 = 1;
/// Prefix of rows, and of the one entry that says how far they got.
const ROW: u8 = b'r';
const HEAD: u8 = b'm';

/// How far the copy got.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
}

/// A copy read back and found right.
pub(crate) struct Loaded {
    db: sled::Db,
    total: Total,
    pub(crate) position: Position,
    pub(crate) rows: Vec<Row>,
}

/// Why the copy is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Doubt {
    #[error("sled refuses to open it")]
    Sled(#[from] sled::Error),
    #[error("sled panicked while opening it")]
    Panicked,
    #[error("{0}")]
    Wrong(&'static str),
    #[error("cannot start a thread for it")]
    Thread(#[source] io::Error),
}

impl From<BadBytes> for Doubt {
    fn from(bad: BadBytes) -> Self {
        Self::Wrong(bad.0)
    }
}

/// Number and sum of all rows; the sum does not depend on their order, so it can be kept up to
/// date one row at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Total {
    rows: u64,
    sum: u64,
}

impl Total {
    const fn add(&mut self, crc: u32) {
        self.rows += 1;
        self.sum = self.sum.wrapping_add(spread(crc));
    }

    const fn subtract(&mut self, crc: u32) {
        self.rows = self.rows.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(spread(crc));
    }
}

/// The checksum's bits spread over 64, so that sums of different rows do not cancel out.
const fn spread(crc: u32) -> u64 {
    let mut mixed = (crc as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// What waits to be written.
#[derive(Default)]
struct Pending {
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    position: Option<Position>,
    /// `changes` is the whole state: what is there now goes.
    replace: bool,
    flushed: Vec<SyncSender<()>>,
    stop: bool,
    /// Nobody will take anything from here any more.
    gone: bool,
}

impl Pending {
    /// Whether somebody waits for what is here to be written.
    const fn is_urgent(&self) -> bool {
        self.stop || !self.flushed.is_empty()
    }
}

type Shared = Arc<(Mutex<Pending>, Condvar)>;

/// The handle to the copy.
pub(crate) struct Derived {
    shared: Shared,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Reads the copy in `dir`, creating it where there is none.
pub(crate) fn load(dir: &Path) -> Result<Loaded, Doubt> {
    let path = dir.to_owned();
    let opening = thread::Builder::new()
        .name("raft-state-open".into())
        .spawn(move || load_here(&path))
        .map_err(Doubt::Thread)?;
    opening.join().map_err(|_| Doubt::Panicked)?
}

/// Moves a doubtful copy out of the way; the one moved last stays for whoever wants to look.
pub(crate) fn move_aside(dir: &Path) -> io::Result<()> {
    let mut aside = dir.as_os_str().to_owned();
    aside.push(".aside");
    let aside = PathBuf::from(aside);
    if aside.exists() {
        fs::remove_dir_all(&aside)?;
    }
    match fs::rename(dir, &aside) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

/// Opens sled, waiting while its lock is held: by nobody but an earlier handle of this process, since
/// the group's own lock keeps other processes out.
fn open(dir: &Path) -> Result<sled::Db, sled::Error> {
    let give_up = Instant::now() + LOCK_LAG;
    loop {
        let opened = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open();
        match opened {
            Err(sled::Error::Io(err)) if is_locked(&err) && Instant::now() < give_up => {
                thread::sleep(LOCK_RETRY);
            }
            opened => return opened,
        }
    }
}

/// sled wraps the kernel's answer in words of its own.
fn is_locked(err: &io::Error) -> bool {
    err.to_string().contains("could not acquire lock")
}

fn load_here(dir: &Path) -> Result<Loaded, Doubt> {
    let db = open(dir)?;
    let mut rows = Vec::new();
    let mut total = Total::default();
    let mut head = None;
    for (kind, key, parts) in group_parts(&db)? {
        let (value, crc) = join_parts(kind, &key, parts)?;
        match kind {
            ROW => {
                total.add(crc);
                rows.push((key, value));
            }
            HEAD => head = Some(value),
            _ => return Err(Doubt::Wrong("an entry of an unknown kind")),
        }
    }
    let position = match head {
        Some(head) => read_head(&head, total)?,
        None if rows.is_empty() => Position::default(),
        None => return Err(Doubt::Wrong("rows without a position")),
    };
    Ok(Loaded {
        db,
        total,
        position,
        rows,
    })
}

fn read_head(head: &[u8], total: Total) -> Result<Position, Doubt> {
    let (version, head) = head.split_first().ok_or(Doubt::Wrong("an empty head"))?;
    if *version != VERSION {
        return Err(Doubt::Wrong("written in another layout"));
    }
    let head = codec::decode::<pb::DerivedHead>("a garbled head", head)?;
    let written = Total {
        rows: head.rows,
        sum: head.sum,
    };
    if written != total {
        return Err(Doubt::Wrong("rows are missing, stale or too many"));
    }
    Ok(Position {
        applied: head.last_applied.as_ref().map(codec::log_id_from_wire),
        membership: codec::stored_membership_from_wire(head.membership)?,
    })
}

pub(crate) type Parts = BTreeMap<u16, sled::IVec>;

/// All entries, the parts of one value together.
fn group_parts(db: &sled::Db) -> Result<Vec<(u8, Vec<u8>, Parts)>, Doubt> {
    let mut groups: BTreeMap<(u8, Vec<u8>), Parts> = BTreeMap::new();
    for entry in db.iter() {
        let (key, value) = entry?;
        let (kind, rest) = key.split_first().ok_or(Doubt::Wrong("an empty key"))?;
        let (key, part) = rest
            .split_last_chunk::<2>()
            .ok_or(Doubt::Wrong("a key without a part number"))?;
        let parts = groups.entry((*kind, key.to_vec())).or_default();
        parts.insert(u16::from_be_bytes(*part), value);
    }
    let groups = groups.into_iter();
    Ok(groups
        .map(|((kind, key), parts)| (kind, key, parts))
        .collect())
}

pub(crate) fn join_parts(kind: u8, key: &[u8], parts: Parts) -> Result<(Vec<u8>, u32), Doubt> {
    let first = parts
        .get(&0)
        .ok_or(Doubt::Wrong("a value without its head"))?;
    let (count, crc) = part_head(first).ok_or(Doubt::Wrong("a value with a short head"))?;
    if parts.len() != usize::from(count) {
        return Err(Doubt::Wrong("parts of a value are missing"));
    }
    let mut value = first[PART_HEAD_BYTES..].to_vec();
    for (_, part) in parts.range(1..) {
        value.extend_from_slice(part);
    }
    if crc != checksum(kind, key, &value) {
        return Err(Doubt::Wrong("a value does not match its checksum"));
    }
    Ok((value, crc))
}

/// Number of parts and checksum, before the first part.
const PART_HEAD_BYTES: usize = 6;

fn part_head(part: &[u8]) -> Option<(u16, u32)> {
    let (count, rest) = part.split_first_chunk::<2>()?;
    let (crc, _) = rest.split_first_chunk::<4>()?;
    Some((u16::from_be_bytes(*count), u32::from_be_bytes(*crc)))
}

fn part_key(kind: u8, key: &[u8], part: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(key.len() + 3);
    bytes.push(kind);
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(&part.to_be_bytes());
    bytes
}

pub(crate) fn checksum(kind: u8, key: &[u8], value: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(u32::from(kind), &(key.len() as u64).to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(crc, key), value)
}

impl Derived {
    /// Starts the writing thread over a copy that was read.
    pub(crate) fn start(dir: &Path, loaded: Loaded) -> io::Result<(Self, Position, Vec<Row>)> {
        let writer = Writer {
            db: loaded.db,
            total: loaded.total,
            dir: dir.to_owned(),
            dir_synced: false,
        };
        let shared = Shared::default();
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("raft-state".into())
            .spawn(move || run(writer, &theirs))?;
        let derived = Self {
            shared,
            thread: Mutex::new(Some(thread)),
        };
        Ok((derived, loaded.position, loaded.rows))
    }

    /// No copy is kept: there is no usable folder for it.
    pub(crate) fn none() -> Self {
        let shared = Shared::default();
        lock(&shared).gone = true;
        Self {
            shared,
            thread: Mutex::new(None),
        }
    }

    /// Adds what applying up to `position` changed.
    pub(crate) fn put(&self, changes: impl IntoIterator<Item = Change>, position: Position) {
        let mut pending = lock(&self.shared);
        if pending.gone {
            return;
        }
        pending.changes.extend(changes);
        let gathering = pending.position.replace(position).is_some();
        if !gathering {
            self.shared.1.notify_one();
        }
    }

    /// Replaces everything.
    pub(crate) fn replace(&self, rows: impl IntoIterator<Item = Row>, position: Position) {
        let mut pending = lock(&self.shared);
        if pending.gone {
            return;
        }
        let rows = rows.into_iter();
        pending.changes = rows.map(|(key, value)| (key, Some(value))).collect();
        pending.replace = true;
        pending.position = Some(position);
        self.shared.1.notify_one();
    }

    /// Returns once everything put so far is on the medium, or the copy has been given up. Blocks.
    pub(crate) fn flush(&self) {
        let (flushed, wait) = sync_channel(1);
        {
            let mut pending = lock(&self.shared);
            if pending.gone {
                return;
            }
            pending.flushed.push(flushed);
        }
        self.shared.1.notify_one();
        // An error means that the thread has given up: nothing to wait for.
        let _ = wait.recv();
    }

    /// Flushes and ends the thread. Blocks.
    pub(crate) fn stop(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            lock(&self.shared).stop = true;
            self.shared.1.notify_one();
            drop(thread.join());
        }
    }
}

impl Drop for Derived {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Pending> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Writer {
    db: sled::Db,
    total: Total,
    dir: PathBuf,
    dir_synced: bool,
}

fn run(writer: Writer, shared: &Shared) {
    write_until_stopped(writer, shared);
    *lock(shared) = Pending {
        gone: true,
        ..Pending::default()
    };
}

fn write_until_stopped(mut writer: Writer, shared: &Shared) {
    let mut unsynced_since: Option<Instant> = None;
    loop {
        let due = unsynced_since.map(|since| since + FLUSH_EVERY);
        let work = wait(shared, due);
        let changed = work.position.is_some();
        if changed {
            unsynced_since = unsynced_since.or_else(|| Some(Instant::now()));
        }
        let due = due.is_some_and(|due| due <= Instant::now());
        let sync = unsynced_since.is_some() && (due || work.stop || !work.flushed.is_empty());
        let (flushed, stop) = (work.flushed.clone(), work.stop);
        // sled is known to panic on files it does not like.
        let attempt = panic::catch_unwind(AssertUnwindSafe(|| writer.carry_out(work, sync)));
        if !matches!(attempt, Ok(Ok(()))) {
            tracing::warn!(
                dir = %writer.dir.display(),
                reason = ?attempt.ok(),
                "giving up the derived state until the next start"
            );
            return;
        }
        if sync {
            unsynced_since = None;
        }
        for flushed in flushed {
            let _ = flushed.send(());
        }
        if stop {
            return;
        }
    }
}

/// Waits until something has been gathered or is asked for, or until `due`.
fn wait(shared: &Shared, due: Option<Instant>) -> Pending {
    let mut pending = lock(shared);
    let mut gathered = None;
    while !pending.is_urgent() {
        if gathered.is_none() && pending.position.is_some() {
            gathered = Some(Instant::now() + GATHER);
        }
        let Some(until) = due.into_iter().chain(gathered).min() else {
            pending = shared
                .1
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let waited = shared.1.wait_timeout(pending, left);
        pending = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    std::mem::take(&mut pending)
}

impl Writer {
    fn carry_out(&mut self, work: Pending, sync: bool) -> Result<(), Doubt> {
        if let Some(position) = work.position {
            if work.replace {
                self.replace(work.changes, &position)?;
            } else {
                self.change(work.changes, Some(&position))?;
            }
        }
        if sync {
            self.sync()?;
        }
        Ok(())
    }

    /// Without its head the copy counts for nothing, so a crash in between is noticed.
    fn replace(
        &mut self,
        rows: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
        position: &Position,
    ) -> Result<(), Doubt> {
        self.db.remove(part_key(HEAD, &[], 0))?;
        self.db.clear()?;
        self.total = Total::default();
        let mut rows = rows.into_iter();
        loop {
            let some: Vec<_> = rows.by_ref().take(REPLACE_ROWS).collect();
            if some.is_empty() {
                return self.change([], Some(position));
            }
            self.change(some, None)?;
        }
    }

    fn change(
        &mut self,
        changes: impl IntoIterator<Item = Change>,
        position: Option<&Position>,
    ) -> Result<(), Doubt> {
        let mut batch = sled::Batch::default();
        for (key, value) in changes {
            if let Some(crc) = self.put(&mut batch, ROW, &key, value.as_deref())? {
                self.total.subtract(crc);
            }
            if let Some(value) = value {
                self.total.add(checksum(ROW, &key, &value));
            }
        }
        if let Some(position) = position {
            let head = self.head(position);
            self.put(&mut batch, HEAD, &[], Some(&head))?;
        }
        self.db.apply_batch(batch)?;
        Ok(())
    }

    fn head(&self, position: &Position) -> Vec<u8> {
        let head = pb::DerivedHead {
            last_applied: position.applied.as_ref().map(codec::log_id_to_wire),
            membership: Some(codec::stored_membership_to_wire(&position.membership)),
            rows: self.total.rows,
            sum: self.total.sum,
        };
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&head.encode_to_vec());
        bytes
    }

    /// Puts a value in place of an older one, whose checksum is returned.
    fn put(
        &self,
        batch: &mut sled::Batch,
        kind: u8,
        key: &[u8],
        value: Option<&[u8]>,
    ) -> Result<Option<u32>, Doubt> {
        let old = self.db.get(part_key(kind, key, 0))?;
        let old = old.as_deref().and_then(part_head);
        let parts = value.map_or(0, |value| value.len().div_ceil(PART_BYTES).max(1));
        let count = u16::try_from(parts).map_err(|_| Doubt::Wrong("a value is too large"))?;
        for part in count..old.map_or(0, |(count, _)| count) {
            batch.remove(part_key(kind, key, part));
        }
        let Some(value) = value else {
            return Ok(old.map(|(_, crc)| crc));
        };
        let mut pieces = value.chunks(PART_BYTES);
        for part in 0..count {
            let piece = pieces.next().unwrap_or_default();
            let mut bytes = Vec::with_capacity(PART_HEAD_BYTES + piece.len());
            if part == 0 {
                bytes.extend_from_slice(&count.to_be_bytes());
                bytes.extend_from_slice(&checksum(kind, key, value).to_be_bytes());
            }
            bytes.extend_from_slice(piece);
            batch.insert(part_key(kind, key, part), bytes);
        }
        Ok(old.map(|(_, crc)| crc))
    }

    fn sync(&mut self) -> Result<(), Doubt> {
        self.db.flush()?;
        let synced = File::open(self.dir.join("db")).and_then(|db| db.sync_data());
        synced.map_err(sled::Error::Io)?;
        if !self.dir_synced {
            let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
            synced.map_err(sled::Error::Io)?;
            self.dir_synced = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
