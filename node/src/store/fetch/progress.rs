//! How far a fetch has come, for whoever wants to know: the API, and people.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::ledger::Owed;
use crate::store::engine::Store;
use crate::store::snapshot::SnapshotDigest;

/// Over how long a rate is taken: shorter ones jump, longer ones lag.
const WINDOW: Duration = Duration::from_secs(1);

/// How far a fetch has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the snapshot's chunks that are here.
    pub bytes_done: u64,
    /// Bytes of all its chunks.
    pub bytes_total: u64,
    /// Nodes that are giving some at the moment.
    pub sources: u32,
    /// Bytes of chunks that came in the last second or so.
    pub bytes_per_second: u64,
}

/// Counts what arrives. Cheap to share and to ask.
#[derive(Debug, Default)]
pub(super) struct Meter {
    progress: watch::Sender<Progress>,
    window: Mutex<Option<(Instant, u64)>>,
}

impl Meter {
    /// Of so many bytes, those of `owed` are still to come.
    pub(super) fn begin(&self, bytes_total: u64, owed: &[Owed]) {
        let owed: u64 = owed.iter().map(|owed| owed.bytes).sum();
        self.progress.send_replace(Progress {
            bytes_done: bytes_total.saturating_sub(owed),
            bytes_total,
            ..Progress::default()
        });
    }

    pub(super) fn add(&self, bytes: u64) {
        let rate = self.rate(bytes);
        self.progress.send_modify(|progress| {
            progress.bytes_done = progress.bytes_total.min(progress.bytes_done + bytes);
            progress.bytes_per_second = rate.unwrap_or(progress.bytes_per_second);
        });
    }

    pub(super) fn sources(&self, sources: usize) {
        let sources = u32::try_from(sources).unwrap_or(u32::MAX);
        self.progress.send_if_modified(|progress| {
            let changed = progress.sources != sources;
            progress.sources = sources;
            changed
        });
    }

    pub(super) fn now(&self) -> Progress {
        *self.progress.borrow()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The rate, at the end of each window.
    fn rate(&self, bytes: u64) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, counted) = window.get_or_insert_with(|| (Instant::now(), 0));
        *counted += bytes;
        let took = began.elapsed();
        if took < WINDOW {
            return None;
        }
        let millis = took.as_millis().max(1);
        let rate = u128::from(*counted) * 1000 / millis;
        *window = None;
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

/// The fetches that are under way in a store.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct Transfers(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    under_way: HashMap<u64, (SnapshotDigest, watch::Receiver<Progress>)>,
}

impl Transfers {
    /// Shows a fetch until the answer is dropped.
    pub(super) fn show(&self, digest: SnapshotDigest, meter: &Meter) -> Shown {
        let mut table = self.table();
        let number = table.next;
        table.next += 1;
        table.under_way.insert(number, (digest, meter.watch()));
        Shown {
            transfers: self.clone(),
            number,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fetch is shown.
pub(super) struct Shown {
    transfers: Transfers,
    number: u64,
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.transfers.table().under_way.remove(&self.number);
    }
}

impl Store {
    /// How far the fetch of a snapshot has come; `None` where none is under way.
    #[must_use]
    pub fn transfer(&self, digest: SnapshotDigest) -> Option<Progress> {
        let table = self.core.transfers.table();
        let mut all = table.under_way.values();
        let (_, progress) = all.find(|(of, _)| *of == digest)?;
        Some(*progress.borrow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::chunk::ChunkId;

    #[tokio::test(start_paused = true)]
    async fn what_arrives_is_counted_and_its_rate_is_that_of_the_last_window() {
        let meter = Meter::default();
        let owed = [Owed {
            id: ChunkId([1; 32]),
            bytes: 600,
        }];
        meter.begin(1000, &owed);
        assert_eq!(meter.now().bytes_done, 400);
        meter.add(100);
        tokio::time::advance(WINDOW).await;
        meter.add(100);
        assert_eq!(meter.now().bytes_done, 600);
        assert_eq!(meter.now().bytes_per_second, 200);
        meter.add(10_000);
        assert_eq!(meter.now().bytes_done, 1000, "never more than there is");
    }

    #[test]
    fn a_fetch_is_shown_as_long_as_it_lasts() {
        let (transfers, meter) = (Transfers::default(), Meter::default());
        let shown = transfers.show(SnapshotDigest([1; 32]), &meter);
        assert_eq!(transfers.table().under_way.len(), 1);
        drop(shown);
        assert!(transfers.table().under_way.is_empty());
    }
}
