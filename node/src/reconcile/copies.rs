//! Copies of snapshots: enough of each, and nothing that nobody needs.
//!
//! Every node decides for itself by the replicated state: of the nodes that could hold a snapshot of
//! which too few live copies are left, those that come first by a hash of both fetch one, and tell the
//! cluster once they have all of it. What no record names any more is collected a while later.
//!
//! ```text
//! copies    a few at once, never two of one snapshot, and not all from one holder     (wanted)
//! audit     a look, then what is wrong one by one: told, or mended first
//! collect   one at a time, whatever else is under way
//! ```
//!
//! All of it is futures of one task: none waits for another, and a stop drops them together. A
//! collection may run beside copies, since a fetch holds the chunks of its manifests from before it
//! looks which of them are here; what a copy that failed has left is kept by nobody.
//!
//! What the cluster believes of this node is compared with what is here after a start, whenever a
//! chunk turned out damaged, and when a snapshot that a guest was started from is whole. A copy of which a little is missing is mended at once; one that
//! cannot be, or is gone, is said not to be here, and made again by whomever that falls to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use proto::ids::{NodeId, SnapshotId};
use raft::command::Command;
use raft::state::State;
use tokio::task;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, info_span, warn};

use crate::base::chain::chain;
use crate::base::stop::Tasks;
use crate::cluster::{LogError, Proposer, View};
use crate::store::fetch::{FetchError, Holders};
use crate::store::{CollectError, Collected, Holding, Kept, SnapshotDigest, Store};

mod wanted;

use wanted::{UnderWay, Wanted, has_room, pins, wanted};

/// Pause after a copy that could not be made: its holder may be back by then.
const AGAIN: Duration = Duration::from_secs(10);
/// Longest a copy may take to bring [`LEAST_BYTES`] or its end: a peer that trickles costs no more.
const COPY_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// What comes of a copy in [`COPY_TIMEOUT`] at the least: its share of a poor link, 8 Mbit/s, where
/// as many are under way as may be.
const LEAST_BYTES: u64 = COPY_TIMEOUT.as_secs() * 1_000_000 / wanted::AT_ONCE as u64;
/// How long chunks are left alone after the last record that named them went: several pauses of one
/// sandbox are collected at once.
const COLLECT_AFTER: Duration = Duration::from_secs(60);
/// Longest that is put off by more records that go meanwhile, as they always do on a busy cluster.
const COLLECT_WITHIN: Duration = Duration::from_secs(10 * 60);
/// Longest the mending of a damaged copy may take before the cluster is told that this node has
/// none: some chunks take a second, and a copy of which more is missing is no copy.
const MEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to look away when nothing is due. Every change wakes the loop anyway.
const NOTHING_DUE: Duration = Duration::from_secs(3600);

/// The loop that copies and collects, for one node.
pub struct Copies {
    /// This node.
    pub here: NodeId,
    /// What snapshots there are.
    pub view: View,
    /// How the cluster is told.
    pub proposer: Proposer,
    /// Where they are kept.
    pub store: Store,
    /// Who else has them.
    pub holders: Arc<dyn Holders>,
}

impl Copies {
    /// Starts the loop; it ends when `tasks` are stopped.
    pub fn spawn(self, tasks: &Tasks) {
        let stop = tasks.token().clone();
        let span = info_span!("copies", node = %self.here);
        tasks.spawn(span, async move {
            stop.run_until_cancelled(self.run(&stop)).await;
        });
    }

    async fn run(&self, stop: &CancellationToken) {
        let mut view = self.view.clone();
        let (mut damage, mut completed) = (self.store.damage(), self.store.completed());
        let mut agenda = Agenda::new(Instant::now());
        let mut under_way = FuturesUnordered::new();
        while !stop.is_cancelled() {
            let state = self.view.state();
            let names = state.snapshots().map(|it| it.sealed.id);
            agenda.learn(names.collect(), Instant::now());
            let wanted = wanted(&state, self.here);
            while let Some(work) = agenda.next(&wanted, Instant::now()) {
                under_way.push(self.carry_out(work));
            }
            let due = agenda.due();
            let due = due.unwrap_or_else(|| Instant::now() + NOTHING_DUE);
            tokio::select! {
                Some(done) = under_way.next() => agenda.note(done, Instant::now()),
                alive = view.changed() => if !alive { break },
                Ok(()) = damage.changed() => agenda.audit_at = Some(Instant::now()),
                Ok(()) = completed.changed() => agenda.audit_at = Some(Instant::now()),
                () = time::sleep_until(due) => {}
            }
        }
    }

    fn carry_out(&self, work: Work) -> BoxFuture<'_, Done> {
        Box::pin(async move {
            match work {
                Work::Look => Done::Looked(self.look().await),
                Work::PutRight(wrong) => Done::PutRight(self.put_right(wrong).await),
                Work::Copy(id, digest) => Done::Copied(id, self.copy(id, digest).await),
                Work::Collect => Done::Collected(self.collect().await),
            }
        })
    }

    /// Where the cluster is wrong about this node; `None` where that cannot be known now.
    async fn look(&self) -> Option<Vec<Wrong>> {
        // A record that this node has not seen yet is none that it is wrong about.
        if let Err(err) = self.proposer.linearize().await {
            warn!(%err, "did not look what is held here: the cluster's newest state is not known");
            return None;
        }
        let (store, state, here) = (self.store.clone(), self.view.state(), self.here);
        let looked = task::spawn_blocking(move || wrong_about(&store, &state, here)).await;
        looked
            .inspect_err(|err| warn!(%err, "did not look what is held here to the end"))
            .ok()
    }

    /// Mends a copy or tells the cluster; says whether it is right about this one now.
    async fn put_right(
        &self,
        Wrong {
            id,
            digest,
            holding,
        }: Wrong,
    ) -> bool {
        let holds = match holding {
            Holding::Whole => true,
            Holding::Part => self.mend(digest).await,
            Holding::Nothing => false,
        };
        if holds && holding == Holding::Part {
            return true;
        }
        warn!(snapshot = %id, ?holding, "the cluster is wrong about this node's copy");
        self.tell(id, holds).await
    }

    /// Brings what is missing of a damaged copy; says whether it is whole again.
    async fn mend(&self, digest: SnapshotDigest) -> bool {
        let fetched = self.store.fetch(digest, self.holders.as_ref());
        match time::timeout(MEND_TIMEOUT, fetched).await {
            Ok(Ok(_)) => {
                info!(%digest, "mended a damaged copy");
                true
            }
            Ok(Err(err)) => {
                warn!(%digest, err = chain(&err), "could not mend a damaged copy");
                false
            }
            Err(_) => {
                warn!(%digest, "a damaged copy takes long to mend");
                false
            }
        }
    }

    /// Fetches one snapshot and tells; says whether that came about, or is of no use any more.
    async fn copy(&self, id: SnapshotId, digest: SnapshotDigest) -> bool {
        let fetched = tokio::select! {
            fetched = self.fetch(digest) => fetched,
            () = self.is_gone(id) => {
                info!(snapshot = %id, "is not copied any further: no record names it");
                return true;
            }
        };
        // Kept until the cluster names this node a holder.
        let kept = match fetched {
            Some(Ok(kept)) => kept,
            Some(Err(err)) => {
                warn!(snapshot = %id, err = chain(&err), "could not copy; will try again");
                return false;
            }
            None => {
                warn!(snapshot = %id, "too little of a copy came; will try again");
                return false;
            }
        };
        let told = self.tell(id, true).await;
        drop(kept);
        told
    }

    /// Waits until the cluster has forgotten a snapshot.
    async fn is_gone(&self, id: SnapshotId) {
        let mut view = self.view.clone();
        while view.state().snapshot(id).is_some() {
            if !view.changed().await {
                return future::pending().await;
            }
        }
    }

    /// Fetches as long as enough of it comes; `None` once too little does.
    async fn fetch(&self, digest: SnapshotDigest) -> Option<Result<Kept, FetchError>> {
        let fetched = self.store.fetch(digest, self.holders.as_ref());
        tokio::pin!(fetched);
        let mut had_bytes = 0;
        loop {
            if let Ok(fetched) = time::timeout(COPY_TIMEOUT, &mut fetched).await {
                return Some(fetched);
            }
            let progress = self.store.transfer(digest);
            let has_bytes = progress.map_or(0, |it| it.bytes_done);
            // Less than there was: it is counted anew.
            let came = has_bytes.checked_sub(had_bytes).unwrap_or(has_bytes);
            if came < LEAST_BYTES {
                return None;
            }
            had_bytes = has_bytes;
        }
    }

    async fn tell(&self, id: SnapshotId, holds: bool) -> bool {
        let node = self.here;
        let told = self
            .proposer
            .propose(Command::HoldSnapshot { id, node, holds });
        match told.await {
            Ok(_) => {
                info!(snapshot = %id, holds, "told of a copy");
                true
            }
            // Gone meanwhile, for one.
            Err(err) => {
                warn!(snapshot = %id, err = chain(&err), "could not tell of a copy");
                false
            }
        }
    }

    /// Says whether it came about.
    async fn collect(&self) -> bool {
        let collected = collect(&self.store, &self.proposer).await;
        match &collected {
            Ok(collected) => info!(?collected, "collected"),
            Err(err) => warn!(err = chain(err), "could not collect"),
        }
        collected.is_ok()
    }
}

/// A snapshot of which this node has more or less than the cluster believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wrong {
    id: SnapshotId,
    digest: SnapshotDigest,
    /// How much is here.
    holding: Holding,
}

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Look,
    PutRight(Wrong),
    Copy(SnapshotId, SnapshotDigest),
    Collect,
}

/// What came of it.
enum Done {
    Looked(Option<Vec<Wrong>>),
    PutRight(bool),
    Copied(SnapshotId, bool),
    Collected(bool),
}

/// What is under way, and what is due when. Reads no clock.
struct Agenda {
    /// All there is, as of the last look at the state.
    named: BTreeSet<SnapshotId>,
    copying: UnderWay,
    /// Those that could not be copied, and when they may be tried again.
    failed: BTreeMap<SnapshotId, Instant>,
    audit_at: Option<Instant>,
    looking: bool,
    /// What the last look has found; the first of it is being put right.
    wrong: VecDeque<Wrong>,
    putting_right: bool,
    collect_at: Option<Instant>,
    /// When it is put off no longer.
    collect_by: Option<Instant>,
    collecting: bool,
}

impl Agenda {
    fn new(now: Instant) -> Self {
        Self {
            named: BTreeSet::new(),
            copying: UnderWay::new(),
            failed: BTreeMap::new(),
            audit_at: Some(now),
            looking: false,
            wrong: VecDeque::new(),
            putting_right: false,
            // Whatever an earlier daemon left.
            collect_at: Some(now + COLLECT_AFTER),
            collect_by: None,
            collecting: false,
        }
    }

    /// Takes in what there is by now.
    fn learn(&mut self, names: BTreeSet<SnapshotId>, now: Instant) {
        if !self.named.is_subset(&names) {
            let by = *self.collect_by.get_or_insert(now + COLLECT_WITHIN);
            self.collect_at = Some(by.min(now + COLLECT_AFTER));
        }
        self.named = names;
        self.failed.retain(|_, at| *at > now);
    }

    /// What may begin now, and counts as under way from then on.
    fn next(&mut self, wanted: &[Wanted], now: Instant) -> Option<Work> {
        if self.may_look() && self.audit_at.is_some_and(|at| at <= now) {
            self.audit_at = None;
            self.looking = true;
            return Some(Work::Look);
        }
        if !self.putting_right
            && let Some(wrong) = self.wrong.front()
        {
            self.putting_right = true;
            return Some(Work::PutRight(*wrong));
        }
        if !self.collecting && self.collect_at.is_some_and(|at| at <= now) {
            (self.collect_at, self.collect_by) = (None, None);
            self.collecting = true;
            return Some(Work::Collect);
        }
        // Those that cannot be copied now do not hold up the others.
        let may_begin = |it: &&Wanted| !self.is_busy_with(it.id) && self.has_room_for(it);
        let begun = wanted.iter().find(may_begin)?;
        self.copying.insert(begun.id, begun.givers.clone());
        Some(Work::Copy(begun.id, begun.digest))
    }

    /// Whether no copy of it may begin now, whatever room there is.
    fn is_busy_with(&self, id: SnapshotId) -> bool {
        let is_wrong = self.wrong.iter().any(|wrong| wrong.id == id);
        is_wrong || self.copying.contains_key(&id) || self.failed.contains_key(&id)
    }

    fn has_room_for(&self, wanted: &Wanted) -> bool {
        has_room(&self.copying, &wanted.givers)
    }

    /// One audit after the other: what the last has found is old by then.
    fn may_look(&self) -> bool {
        !self.looking && self.wrong.is_empty()
    }

    fn note(&mut self, done: Done, now: Instant) {
        match done {
            Done::Looked(found) => {
                self.looking = false;
                let is_known = found.is_some();
                let found = found.unwrap_or_default();
                // What is being copied is told by its copy; if not, it is found again.
                let (copied, wrong): (Vec<_>, Vec<_>) = found
                    .into_iter()
                    .partition(|wrong| self.copying.contains_key(&wrong.id));
                self.wrong = wrong.into();
                if !is_known || !copied.is_empty() {
                    self.audit_again(now);
                }
            }
            Done::PutRight(told) => {
                self.putting_right = false;
                self.wrong.pop_front();
                if !told {
                    self.audit_again(now);
                }
            }
            Done::Copied(id, told) => {
                self.copying.remove(&id);
                if !told {
                    self.failed.insert(id, now + AGAIN);
                }
            }
            Done::Collected(done) => {
                self.collecting = false;
                if !done {
                    self.collect_at.get_or_insert(now + COLLECT_AFTER);
                }
            }
        }
    }

    fn audit_again(&mut self, now: Instant) {
        self.audit_at.get_or_insert(now + AGAIN);
    }

    /// When to look again even if nothing changes and nothing ends.
    fn due(&self) -> Option<Instant> {
        let collect_at = self.collect_at.filter(|_| !self.collecting);
        let audit_at = self.audit_at.filter(|_| self.may_look());
        let due = self.failed.values().copied();
        due.chain(collect_at).chain(audit_at).min()
    }
}

/// Why nothing was collected, or not all.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum UpkeepError {
    /// A record that is not seen is a snapshot that is lost: not by an old copy of the state.
    #[error("learn the cluster's newest state")]
    State(#[source] LogError),
    /// The store failed.
    #[error("collect")]
    Collect(#[source] CollectError),
    /// The work was cut short.
    #[error("finish collecting")]
    Cut(#[source] task::JoinError),
}

/// Drops from the store what no record of the cluster names.
///
/// # Errors
/// See [`UpkeepError`].
pub async fn collect(store: &Store, proposer: &Proposer) -> Result<Collected, UpkeepError> {
    proposer.linearize().await.map_err(UpkeepError::State)?;
    let (store, view) = (store.clone(), proposer.view());
    let collected =
        task::spawn_blocking(move || store.collect(|| Ok::<_, LogError>(pins(&view.state()))));
    let collected = collected.await.map_err(UpkeepError::Cut)?;
    collected.map_err(UpkeepError::Collect)
}

/// The snapshots of which this node has more or less than the cluster believes, and how much.
/// Reads manifests.
fn wrong_about(store: &Store, state: &State, here: NodeId) -> Vec<Wrong> {
    let all = state.snapshots().map(|snapshot| {
        let digest = SnapshotDigest(snapshot.sealed.digest);
        (snapshot, digest, store.holding(digest))
    });
    let wrong = all.filter(|(snapshot, _, holding)| {
        let said = snapshot.holders.contains(&here);
        said != (*holding == Holding::Whole)
    });
    let wrong = wrong.filter(|(snapshot, _, holding)| {
        // What has come of one that is still on its way here is no news.
        *holding == Holding::Whole || snapshot.holders.contains(&here)
    });
    let wrong = wrong.map(|(snapshot, digest, holding)| Wrong {
        id: snapshot.sealed.id,
        digest,
        holding,
    });
    wrong.collect()
}

#[cfg(test)]
mod tests;
