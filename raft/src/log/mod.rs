//! The durable log: entries, votes and marks in append-only segment files.
//!
//! ```text
//! adapter --(memory, at once)--> Index <------------- readers
//!    '-----(queue, in order)---> Writer thread --> NNNNNNNN.seg --fdatasync--> callbacks
//! ```
//!
//! [`Log`] is the handle: it changes the [`Index`] and queues the matching record in one go, so
//! what a reader sees is always what the file will say. Durability is reported by the callbacks,
//! never by a return. `record.rs` has the format of a record, `segment.rs` that of a file,
//! `recover.rs` what a crash leaves, `writer.rs` the thread.
//!
//! Stopping: [`Log::stop`] lets the thread write and sync what is queued and joins it. Dropping the
//! handle without it does the same, only unobserved.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod index;
mod offline;
mod record;
mod recover;
mod segment;
mod writer;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use prost::Message;
use proto::wire::raftlog as pb;
use tokio::sync::{mpsc, oneshot};

pub use self::recover::OpenLogError;
pub use self::segment::{BadHead, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES};

use self::index::{Found, Index};
use self::record::{Kind, Place};
use self::writer::{Op, Writer};
use crate::codec;
use crate::disk::{Disk, LogFile};
use crate::fault::{Fault, FaultCell, as_io};
use crate::types::{Entry, LogId, Vote};

/// Operations that may wait for the writing thread; a proposer beyond that waits itself. openraft
/// batches up to 4096 entries into one operation, so this is no bound on throughput.
const QUEUE_OPS: usize = 1024;
/// Most bytes one limited read returns: what replication holds in memory per member.
const READ_BYTES: usize = 1024 * 1024;

/// The handle to the log.
pub(crate) struct Log {
    dir: PathBuf,
    index: Arc<Mutex<Index>>,
    queue: mpsc::Sender<Op>,
    /// Entries up to here are covered by a durable snapshot file.
    snapshot: Arc<AtomicU64>,
    fault: FaultCell,
    thread: Mutex<Option<JoinHandle<()>>>,
    pristine: bool,
}

/// How the log is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogOptions {
    /// Size of segments made from now on.
    pub(crate) segment_bytes: u32,
    /// Most bytes of written entries kept in memory.
    pub(crate) cache_bytes: usize,
}

impl Log {
    /// Opens the log in `dir`, which must exist, and starts its thread.
    ///
    /// # Errors
    /// [`OpenLogError`], see there.
    pub(crate) fn open(
        dir: &Path,
        options: LogOptions,
        disk: Arc<dyn Disk>,
        fault: FaultCell,
    ) -> Result<Self, OpenLogError> {
        let segment_bytes = options
            .segment_bytes
            .clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES);
        let found = recover::recover(dir, segment_bytes, options.cache_bytes, disk.as_ref())?;
        let (queue, ops) = mpsc::channel(QUEUE_OPS);
        let snapshot = Arc::new(AtomicU64::new(0));
        let hard = found.index.hard;
        let index = Arc::new(Mutex::new(found.index));
        let mut writer = Writer {
            dir: dir.to_owned(),
            disk,
            index: Arc::clone(&index),
            fault: fault.clone(),
            snapshot: Arc::clone(&snapshot),
            segment_bytes,
            durable: found.offset,
            offset: found.offset,
            active: found.active,
            kept: found.kept,
            hard,
            next: None,
            buffer: Vec::new(),
            placed: Vec::new(),
        };
        writer.begin().map_err(OpenLogError::Disk)?;
        let thread = thread::Builder::new()
            .name("raft-log".into())
            .spawn(move || {
                let _report = ReportPanic(writer.fault.clone());
                writer.run(ops);
            })
            .map_err(|source| OpenLogError::Disk(Fault::disk("start a thread for", dir, source)))?;
        Ok(Self {
            dir: dir.to_owned(),
            index,
            queue,
            snapshot,
            fault,
            thread: Mutex::new(Some(thread)),
            pristine: found.pristine,
        })
    }

    /// Whether the log held nothing when it was opened.
    pub(crate) const fn was_pristine(&self) -> bool {
        self.pristine
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds entries, readable at once; `done` is called when they are durable or never will be.
    pub(crate) async fn append<F>(&self, entries: Vec<Entry>, done: F) -> io::Result<()>
    where
        F: FnOnce(io::Result<()>) + Send + 'static,
    {
        let bodies = entries.iter().map(|entry| {
            let body = codec::entry_to_wire(entry).encode_to_vec();
            (entry.log_id, body)
        });
        let bodies = bodies.collect();
        {
            let mut index = self.lock();
            for entry in entries {
                if !index.push(entry) {
                    return Err(io::Error::other("append would leave a gap in the log"));
                }
            }
        }
        self.send(Op::Append(bodies, Box::new(done))).await
    }

    /// Records `vote`; returns once it is durable.
    pub(crate) async fn save_vote(&self, vote: Vote) -> io::Result<()> {
        let (done, saved) = oneshot::channel();
        self.lock().hard.vote = Some(vote);
        let tell = |result| drop(done.send(result));
        self.send(Op::Vote(vote, Box::new(tell))).await?;
        saved.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    /// Notes how far the log is committed; written with whatever is synced next.
    ///
    /// After a crash an older mark only means that more is applied again, so the writer is not
    /// woken for it: that would cost a lone client a write and a thread's turn on every member.
    pub(crate) fn save_committed(&self, committed: Option<LogId>) {
        self.lock().hard.committed = committed;
    }

    /// Removes entries behind `last`.
    pub(crate) async fn truncate_after(&self, last: Option<LogId>) -> io::Result<()> {
        let from = last.map_or(0, |last| last.index + 1);
        self.lock().truncate(from);
        self.send(Op::Truncate(from)).await
    }

    /// Forgets entries up to and including `upto`. Their segments are deleted once a snapshot
    /// covers them too.
    pub(crate) async fn purge(&self, upto: LogId) -> io::Result<()> {
        self.lock().purge(upto);
        self.send(Op::Purge(upto)).await
    }

    /// Allows deleting entries up to `index`: a durable snapshot file covers them.
    pub(crate) fn covered_by_snapshot(&self, index: u64) {
        self.snapshot.fetch_max(index, Ordering::AcqRel);
    }

    pub(crate) fn vote(&self) -> Option<Vote> {
        self.lock().hard.vote
    }

    pub(crate) fn committed(&self) -> Option<LogId> {
        self.lock().hard.committed
    }

    pub(crate) fn purged(&self) -> Option<LogId> {
        self.lock().hard.purged
    }

    /// The last entry's position, or the purged one where no entry is left.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.lock().last()
    }

    /// The position of the entry at `index`, if the log has it.
    pub(crate) fn id_at(&self, index: u64) -> Option<LogId> {
        self.lock().id_at(index)
    }

    /// All entries of `range` that the log holds.
    pub(crate) async fn read(&self, range: Range<u64>) -> io::Result<Vec<Entry>> {
        self.read_up_to(range, usize::MAX).await
    }

    /// The first entries of `range`: as many as fit a message to another member, at least one.
    pub(crate) async fn read_limited(&self, range: Range<u64>) -> io::Result<Vec<Entry>> {
        self.read_up_to(range, READ_BYTES).await
    }

    /// The first entries of `range`, about `max_bytes` of them, at least one.
    pub(crate) async fn read_up_to(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<Entry>> {
        let found = self.lock().find(range, max_bytes);
        if found.iter().all(|found| matches!(found, Found::Here(_))) {
            return collect(found);
        }
        // Cold entries come from the disk: not on a thread that drives elections.
        let read = tokio::task::spawn_blocking(move || collect(found));
        let entries = read
            .await
            .unwrap_or_else(|died| Err(io::Error::other(died)));
        entries.inspect_err(|source| {
            let copy = io::Error::new(source.kind(), source.to_string());
            self.fault.file(Fault::disk("read", &self.dir, copy));
        })
    }

    async fn send(&self, op: Op) -> io::Result<()> {
        self.queue.send(op).await.map_err(|_| self.stopped())
    }

    fn stopped(&self) -> io::Error {
        match self.fault.get() {
            Some(fault) => as_io(&fault),
            None => io::Error::other("the log is closed"),
        }
    }

    /// Writes and syncs what is queued, then ends the thread. Blocks.
    pub(crate) fn stop(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A closed queue means the thread is gone already.
            drop(self.queue.blocking_send(Op::Stop));
            if thread.join().is_err() {
                self.fault.file(Fault::Died("log"));
            }
        }
    }
}

/// Files a fault if the thread that holds it panics: waiting callbacks are dropped then, and openraft
/// alone would wait for them for ever.
struct ReportPanic(FaultCell);

impl Drop for ReportPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.file(Fault::Died("log"));
        }
    }
}

fn collect(found: Vec<Found>) -> io::Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::with_capacity(found.len());
    for found in found {
        let entry = match found {
            Found::Here(entry) => entry,
            Found::OnDisk(place, file, id) => read_entry(place, file.as_ref(), id)?,
        };
        if entries
            .last()
            .is_some_and(|last| last.log_id.index + 1 != entry.log_id.index)
        {
            return Err(io::Error::other("the log has a hole"));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn read_entry(place: Place, file: &dyn LogFile, id: LogId) -> io::Result<Entry> {
    let damaged = || {
        let what = format!("entry {} is damaged on disk", id.index);
        io::Error::new(io::ErrorKind::InvalidData, what)
    };
    let mut bytes = vec![0; place.len as usize];
    file.read_at(&mut bytes, u64::from(place.offset))?;
    let record = record::parse(place.segment, place.offset, &bytes)
        .filter(|record| record.kind == Kind::Entry)
        .ok_or_else(damaged)?;
    let entry = pb::Entry::decode(record.body).map_err(|_| damaged())?;
    codec::entry_from_wire(entry)
        .ok()
        .filter(|entry| entry.log_id == id)
        .ok_or_else(damaged)
}

#[cfg(test)]
mod tests;
