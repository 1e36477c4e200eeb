//! One stream to one holder: asks for batches, takes in what comes.
//!
//! Two batches are asked for at a time, so that the holder reads the second while the first is on
//! its way and stored here; only one before anything has come. That is also the most a stream makes
//! us hold: one batch in memory, and of the other what QUIC's window takes.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::ids::NodeId;
use tokio_util::task::TaskTracker;

use super::ledger::{Ledger, Number};
use super::progress::Meter;
use super::{Failed, Holders, STALL, Wire, patiently};
use crate::store::chunk::ChunkId;
use crate::store::engine::Store;
use crate::store::error::SealError;
use crate::store::exchange::{
    Answer, Asked, Carried, NAMES_AT_ONCE, Wants, read_answer, write_names,
};
use crate::store::snapshot::SnapshotDigest;

/// Batches that are asked for at a time.
const BATCHES: usize = 2;
/// Chunks a holder may lack before it is no use as one.
const LACKS_AT_MOST: usize = 1024;

/// What all streams of a fetch share.
pub(super) struct Shared<'a> {
    pub(super) store: &'a Store,
    pub(super) holders: &'a dyn Holders,
    pub(super) digest: SnapshotDigest,
    pub(super) ledger: Mutex<Ledger>,
    pub(super) meter: &'a Meter,
    /// Work on the store that is under way, also for streams that were given up since.
    pub(super) works: TaskTracker,
}

impl Shared<'_> {
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs work on the store off the runtime's workers.
    async fn off<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let done = self.works.spawn_blocking(work).await;
        done.map_err(io::Error::other)
    }
}

/// A stream, and what its holder owes on it. What it still owes goes back when this is dropped.
pub(super) struct Source<'a> {
    shared: &'a Shared<'a>,
    node: NodeId,
    owes: VecDeque<Vec<Number>>,
    /// Chunks that it gave.
    pub(super) gave: usize,
    /// Chunks that it said it does not have.
    pub(super) lacked: usize,
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        let mut ledger = self.shared.ledger();
        // The last ones first: each goes to the very front.
        for batch in self.owes.drain(..).rev() {
            ledger.give_back(self.node, batch.into_iter().rev());
        }
    }
}

impl<'a> Source<'a> {
    pub(super) const fn new(shared: &'a Shared<'a>, node: NodeId) -> Self {
        Self {
            shared,
            node,
            owes: VecDeque::new(),
            gave: 0,
            lacked: 0,
        }
    }

    /// Asks for one batch after the other until there is nothing to ask for.
    pub(super) async fn give(&mut self, wire: Option<Box<dyn Wire>>) -> Result<(), Failed> {
        let mut wire = match wire {
            Some(wire) => wire,
            None => self.open().await?,
        };
        loop {
            let batches = if self.gave > 0 { BATCHES } else { 1 };
            while self.owes.len() < batches && self.ask(&mut wire).await? {}
            let Some(batch) = self.owes.front().cloned() else {
                break;
            };
            let came = self.receive(&mut wire, &batch).await?;
            self.store(came).await?;
            self.owes.pop_front();
        }
        // All that it owed is here: one that is gone by now, or does not listen, has not failed.
        let _unheard = patiently(STALL, write_names(&mut wire, &[])).await;
        Ok(())
    }

    async fn open(&self) -> Result<Box<dyn Wire>, Failed> {
        let asked = Asked {
            digest: self.shared.digest,
            wants: Wants::Chunks,
        };
        patiently(STALL, self.shared.holders.open(self.node, asked.header())).await
    }

    /// Asks for a batch; false where there is nothing to ask for. What has come by another way
    /// meanwhile is not asked for.
    async fn ask(&mut self, wire: &mut Box<dyn Wire>) -> Result<bool, Failed> {
        loop {
            let batch = self.shared.ledger().take(self.node, NAMES_AT_ONCE);
            if batch.is_empty() {
                return Ok(false);
            }
            self.owes.push_back(batch.clone());
            let (here, missing) = self.look(batch).await?;
            self.settle(here);
            let numbers = missing.iter().map(|(number, _)| *number);
            self.owes.pop_back();
            if missing.is_empty() {
                continue;
            }
            self.owes.push_back(numbers.collect());
            let names: Vec<ChunkId> = missing.into_iter().map(|(_, id)| id).collect();
            patiently(STALL, write_names(wire, &names)).await?;
            return Ok(true);
        }
    }

    /// Which of these are here by now, and which are not.
    async fn look(
        &self,
        batch: Vec<Number>,
    ) -> Result<(Vec<Number>, Vec<(Number, ChunkId)>), Failed> {
        let named: Vec<(Number, ChunkId)> = {
            let ledger = self.shared.ledger();
            let named = batch.iter().map(|number| (*number, ledger.get(*number).id));
            named.collect()
        };
        let store = self.shared.store.clone();
        let looked = self.shared.off(move || {
            let (here, missing): (Vec<_>, Vec<_>) =
                named.into_iter().partition(|(_, id)| store.has(id));
            (
                here.into_iter().map(|(number, _)| number).collect(),
                missing,
            )
        });
        Ok(looked.await?)
    }

    /// Notes that these are here.
    fn settle(&self, here: Vec<Number>) {
        let mut bytes = 0;
        {
            let mut ledger = self.shared.ledger();
            for number in here {
                if ledger.arrived(number) {
                    bytes += ledger.get(number).bytes;
                }
            }
        }
        self.shared.meter.add(bytes);
    }

    async fn receive(
        &mut self,
        wire: &mut Box<dyn Wire>,
        batch: &[Number],
    ) -> Result<Vec<(Number, ChunkId, Carried)>, Failed> {
        let mut came = Vec::with_capacity(batch.len());
        for number in batch {
            let answer = match patiently(STALL, read_answer(wire)).await {
                Ok(answer) => answer,
                Err(err) => {
                    // Those before it are as good as any.
                    self.store(came).await?;
                    return Err(err);
                }
            };
            let id = self.shared.ledger().get(*number).id;
            match answer {
                Answer::Here(carried) => came.push((*number, id, carried)),
                Answer::Lacks => {
                    self.shared.ledger().lacks(self.node, *number);
                    self.lacked += 1;
                    if self.lacked > LACKS_AT_MOST {
                        return Err(Failed::Lacks(id));
                    }
                }
            }
        }
        Ok(came)
    }

    /// Checks what came and writes it down; what is right of it counts even if the rest is not.
    async fn store(&mut self, came: Vec<(Number, ChunkId, Carried)>) -> Result<(), Failed> {
        if came.is_empty() {
            return Ok(());
        }
        let store = self.shared.store.clone();
        let (stored, failed) = self.shared.off(move || take_in(&store, &came)).await?;
        self.gave += stored.len();
        self.settle(stored);
        failed.map_or(Ok(()), Err)
    }
}

/// Those that are stored, and what was wrong with the next one.
fn take_in(store: &Store, came: &[(Number, ChunkId, Carried)]) -> (Vec<Number>, Option<Failed>) {
    // Their manifest is held by whoever fetches, and keeps them.
    let seal = store.begin();
    let mut stored = Vec::with_capacity(came.len());
    for (number, id, carried) in came {
        match seal.put_carried(*id, carried) {
            Ok(()) => stored.push(*number),
            // Its fault, not this store's.
            Err(SealError::NotTheChunk { chunk }) => return (stored, Some(Failed::Wrong(chunk))),
            Err(err) => return (stored, Some(err.into())),
        }
    }
    (stored, None)
}
