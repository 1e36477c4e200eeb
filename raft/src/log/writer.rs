//! The one thread that writes the log.
//!
//! It takes everything that has queued up while the last sync ran, encodes it into one buffer,
//! writes that once, syncs once if anything in it needs to be durable, and only then calls all the
//! callbacks: group commit without a timer. Votes, entries and marks go into the same file in the
//! order they were issued, so a vote can never overtake an append.
//!
//! An error is final. The file's content is then unknown, so nothing that follows may be
//! acknowledged: every waiting and every later operation fails with the first fault, and the
//! thread only drains its queue until it is told to stop.
//!
//! Switching segments: make the next one (usually made ahead, in the background, once the current
//! one is half full), name it, then seal and sync the current one, then go on in the next, which
//! starts with the hard state. Whole segments are deleted, oldest first, when their entries are
//! both purged and covered by a durable snapshot.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use prost::Message;
use proto::wire::raftlog as pb;
use tokio::sync::mpsc;

use super::index::{Hard, Index};
use super::record::{Draft, HEADER_BYTES, Kind, Place};
use super::recover::Kept;
use super::segment::{HEAD_BYTES, Segment, Spare};
use crate::codec;
use crate::disk::Disk;
use crate::fault::{Fault, FaultCell, as_io};
use crate::types::{LogId, Vote};

/// A batch is closed once it has this many bytes: what one write may cost in memory and in delay
/// for the callbacks of its first operation.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Called when an operation is durable, or never will be.
pub(super) type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// What the thread is asked to do.
pub(super) enum Op {
    /// Entries, with their encoded bodies.
    Append(Vec<(LogId, Vec<u8>)>, Done),
    Vote(Vote, Done),
    /// Not synced: until the next append is durable, so is what it replaces.
    Truncate(u64),
    /// Not synced by itself, but nothing is deleted before it is.
    Purge(LogId),
    /// Write and sync all that came before, then end.
    Stop,
}

/// State of the writing thread.
pub(super) struct Writer {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) index: Arc<Mutex<Index>>,
    pub(super) fault: FaultCell,
    /// Entries up to here are covered by a durable snapshot file.
    pub(super) snapshot: Arc<AtomicU64>,
    pub(super) active: Segment,
    pub(super) segment_bytes: u32,
    /// Where the next record goes.
    pub(super) offset: u32,
    /// Everything before this offset is on the medium.
    pub(super) durable: u32,
    /// All segments, the active one last.
    pub(super) kept: Vec<Kept>,
    /// What the records written so far add up to.
    pub(super) hard: Hard,
    /// The next segment, being made.
    pub(super) next: Option<JoinHandle<Result<Spare, Fault>>>,
    /// Encoded records that are not written yet; they go to `offset - buffer.len()`.
    pub(super) buffer: Vec<u8>,
    /// Entries in `buffer`.
    pub(super) placed: Vec<(LogId, Place)>,
}

impl Writer {
    /// Runs until told to stop or until the queue's last sender is gone.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Op>) {
        let mut going = true;
        while going {
            let Some(first) = queue.blocking_recv() else {
                break;
            };
            let (batch, stop) = collect(first, &mut queue);
            going = !stop;
            self.handle(batch, stop);
        }
        if let Some(next) = self.next.take() {
            // Its file is a leftover that the next start removes.
            drop(next.join());
        }
    }

    fn handle(&mut self, batch: Vec<Op>, stop: bool) {
        let result = match self.fault.get() {
            Some(fault) => Err(fault),
            None => self
                .write(&batch, stop)
                .map_err(|fault| self.fault.file(fault)),
        };
        for op in batch {
            if let Op::Append(_, done) | Op::Vote(_, done) = op {
                done(result.as_ref().map_err(|fault| as_io(fault)).copied());
            }
        }
        if result.is_ok() {
            self.look_ahead();
        }
    }

    fn write(&mut self, batch: &[Op], stop: bool) -> Result<(), Fault> {
        let mut purges = false;
        let mut must_sync = stop;
        for op in batch {
            self.encode(op)?;
            purges |= matches!(op, Op::Purge(_));
            must_sync |= matches!(op, Op::Append(..) | Op::Vote(..) | Op::Purge(_));
        }
        if must_sync {
            self.mark_committed()?;
        }
        self.write_buffer()?;
        if must_sync && self.durable < self.offset {
            self.sync()?;
        }
        if purges {
            self.delete_purged()?;
        }
        Ok(())
    }

    fn encode(&mut self, op: &Op) -> Result<(), Fault> {
        match op {
            Op::Append(entries, _) => {
                for (id, body) in entries {
                    let place = self.put(Kind::Entry, Some(id), body)?;
                    self.placed.push((*id, place));
                    if let Some(last) = self.kept.last_mut() {
                        last.highest = last.highest.max(Some(id.index));
                    }
                }
            }
            Op::Vote(vote, _) => {
                self.hard.vote = Some(*vote);
                self.put(Kind::Vote, None, &codec::vote_to_wire(vote).encode_to_vec())?;
            }
            Op::Truncate(index) => {
                let from = LogId::new(
                    codec::log_id_from_wire(&pb::LogId::default()).leader_id,
                    *index,
                );
                self.put(Kind::Truncate, Some(&from), &[])?;
            }
            Op::Purge(upto) => {
                self.hard.purged = self.hard.purged.max(Some(*upto));
                self.put(Kind::Purge, Some(upto), &log_id_bytes(upto))?;
            }
            Op::Stop => {}
        }
        Ok(())
    }

    /// Adds how far the log is committed, where that is news and the entry is in the file by then:
    /// it may have been committed by the others while it still waits in the queue here.
    fn mark_committed(&mut self) -> Result<(), Fault> {
        let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let committed = index.hard.committed;
        drop(index);
        let highest = self.kept.iter().rev().find_map(|kept| kept.highest);
        let known = highest.max(self.hard.purged.map(|id| id.index));
        if let Some(id) = committed
            && self.hard.committed != committed
            && Some(id.index) <= known
        {
            self.hard.committed = committed;
            self.put(Kind::Committed, Some(&id), &log_id_bytes(&id))?;
        }
        Ok(())
    }

    /// Puts a record into the buffer, in the next segment if this one is full.
    fn put(&mut self, kind: Kind, id: Option<&LogId>, body: &[u8]) -> Result<Place, Fault> {
        let draft = Draft {
            kind,
            index: id.map_or(0, |id| id.index),
            term: id.map_or(0, |id| id.leader_id.term),
            body,
        };
        if !self.fits(&draft) {
            self.switch()?;
        }
        if !self.fits(&draft) {
            let too_large = io::Error::new(io::ErrorKind::FileTooLarge, "record exceeds a segment");
            return Err(self.fault_while("append to", too_large));
        }
        Ok(self.place(&draft))
    }

    /// Whether `draft` and a seal still fit the active segment.
    fn fits(&self, draft: &Draft<'_>) -> bool {
        let end = draft
            .len()
            .and_then(|len| len.checked_add(self.offset))
            .and_then(|end| end.checked_add(HEADER_BYTES));
        end.is_some_and(|end| end <= self.active.capacity)
    }

    fn place(&mut self, draft: &Draft<'_>) -> Place {
        let place = Place {
            segment: self.active.number,
            offset: self.offset,
            len: draft.len().unwrap_or(u32::MAX),
        };
        draft.encode(place.segment, place.offset, self.durable, &mut self.buffer);
        self.offset += place.len;
        place
    }

    fn write_buffer(&mut self) -> Result<(), Fault> {
        if !self.buffer.is_empty() {
            let start = u64::from(self.offset) - self.buffer.len() as u64;
            let written = self.active.file.write_at(&self.buffer, start);
            written.map_err(|source| self.fault_while("append to", source))?;
            self.buffer.clear();
        }
        if !self.placed.is_empty() {
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            for (id, place) in self.placed.drain(..) {
                index.placed(id, place);
            }
            index.evict();
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Fault> {
        let synced = self.active.file.sync();
        synced.map_err(|source| self.fault_while("sync", source))?;
        self.durable = self.offset;
        Ok(())
    }

    fn fault_while(&self, doing: &'static str, source: io::Error) -> Fault {
        Fault::disk(doing, &self.active.path, source)
    }

    fn switch(&mut self) -> Result<(), Fault> {
        let next = self.take_next()?.publish(&self.dir, self.disk.as_ref())?;
        self.place(&Draft {
            kind: Kind::Seal,
            index: 0,
            term: 0,
            body: &[],
        });
        self.write_buffer()?;
        self.sync()?;
        {
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            index.add_file(next.number, Arc::clone(&next.file));
        }
        self.kept.push(Kept {
            number: next.number,
            path: next.path.clone(),
            highest: None,
        });
        self.active = next;
        self.offset = HEAD_BYTES;
        self.durable = HEAD_BYTES;
        self.put_state();
        Ok(())
    }

    /// Starts the active segment with everything that older ones said besides the entries.
    pub(super) fn put_state(&mut self) {
        let body = pb::HardState {
            vote: self.hard.vote.as_ref().map(codec::vote_to_wire),
            committed: self.hard.committed.as_ref().map(codec::log_id_to_wire),
            purged: self.hard.purged.as_ref().map(codec::log_id_to_wire),
        }
        .encode_to_vec();
        // A few dozen bytes: they fit the smallest segment.
        self.place(&Draft {
            kind: Kind::State,
            index: 0,
            term: 0,
            body: &body,
        });
    }

    /// Writes and syncs the head of a segment that has none yet.
    pub(super) fn begin(&mut self) -> Result<(), Fault> {
        if self.offset == HEAD_BYTES {
            self.put_state();
            self.write_buffer()?;
            self.sync()?;
        }
        Ok(())
    }

    fn take_next(&mut self) -> Result<Spare, Fault> {
        let made = self.next.take().map(JoinHandle::join);
        match made {
            Some(Ok(Ok(next))) => Ok(next),
            // What failed in the background may work by now: nothing was promised on it.
            _ => self.make_next(),
        }
    }

    fn make_next(&self) -> Result<Spare, Fault> {
        let number = self.active.number + 1;
        Spare::create(&self.dir, number, self.segment_bytes, self.disk.as_ref())
    }

    /// Has the next segment made in the background once the active one is half full.
    fn look_ahead(&mut self) {
        if self.next.is_some() || self.offset < self.active.capacity / 2 {
            return;
        }
        let (dir, disk) = (self.dir.clone(), Arc::clone(&self.disk));
        let (number, bytes) = (self.active.number + 1, self.segment_bytes);
        let make = move || Spare::create(&dir, number, bytes, disk.as_ref());
        // No thread to be had: the segment is made when it is needed.
        self.next = thread::Builder::new()
            .name("raft-log-ahead".into())
            .spawn(make)
            .ok();
    }

    fn delete_purged(&mut self) -> Result<(), Fault> {
        let purged = self.hard.purged.map_or(0, |id| id.index);
        let upto = purged.min(self.snapshot.load(Ordering::Acquire));
        let old = self.kept[..self.kept.len() - 1]
            .iter()
            .take_while(|kept| kept.highest.is_none_or(|highest| highest <= upto))
            .count();
        for kept in self.kept.drain(..old) {
            let removed = self.disk.remove(&kept.path);
            removed.map_err(|source| Fault::disk("delete log segment", &kept.path, source))?;
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            index.remove_file(kept.number);
        }
        if old > 0 {
            let synced = self.disk.sync_dir(&self.dir);
            synced.map_err(|source| Fault::disk("sync log folder", &self.dir, source))?;
        }
        Ok(())
    }
}

/// Everything that is queued, up to [`BATCH_BYTES`], and whether a stop was among it.
fn collect(first: Op, queue: &mut mpsc::Receiver<Op>) -> (Vec<Op>, bool) {
    let mut bytes = 0;
    let mut batch = Vec::new();
    let mut next = Some(first);
    while let Some(op) = next.take() {
        if matches!(op, Op::Stop) {
            return (batch, true);
        }
        if let Op::Append(entries, _) = &op {
            bytes += entries.iter().map(|(_, body)| body.len()).sum::<usize>();
        }
        batch.push(op);
        if bytes < BATCH_BYTES {
            next = queue.try_recv().ok();
        }
    }
    (batch, false)
}

fn log_id_bytes(id: &LogId) -> Vec<u8> {
    codec::log_id_to_wire(id).encode_to_vec()
}
