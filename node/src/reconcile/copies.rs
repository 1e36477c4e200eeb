//! Copies of snapshots: enough of each, and nothing that nobody needs.
//!
//! Every node decides for itself by the replicated state: of the nodes that could hold a snapshot of
//! which too few live copies are left, those that come first by a hash of both fetch one, and tell the
//! cluster once they have all of it. What no record names any more is collected a while later.
//!
//! What the cluster believes of this node is compared with what is here after a start, whenever a
//! chunk turned out damaged, and when a snapshot that a guest was started from is whole. A copy of which a little is missing is mended at once; one that
//! cannot be, or is gone, is said not to be here, and made again by whomever that falls to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proto::ids::{NodeId, SnapshotId};
use raft::command::Command;
use raft::state::{Snapshot, State};
use tokio::task;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, info_span, warn};

use crate::base::chain::chain;
use crate::base::stop::Tasks;
use crate::cluster::{LogError, Proposer, View};
use crate::store::fetch::Holders;
use crate::store::{CollectError, Collected, Holding, Pin, SnapshotDigest, Store};

/// Pause after a copy that could not be made: its holder may be back by then.
const AGAIN: Duration = Duration::from_secs(10);
/// Longest one copy may take: 100 GiB on a network of 1 Gbit/s. A peer that trickles costs no more.
const COPY_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// How long chunks are left alone after the last record that named them went: several pauses of one
/// sandbox are collected at once.
const COLLECT_AFTER: Duration = Duration::from_secs(60);
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
        // Whatever an earlier daemon left.
        let mut collect_at = Some(Instant::now() + COLLECT_AFTER);
        let mut named = BTreeSet::new();
        let mut failed: BTreeMap<SnapshotId, Instant> = BTreeMap::new();
        let (mut damage, mut completed) = (self.store.damage(), self.store.completed());
        let mut audit_at = Some(Instant::now());
        while !stop.is_cancelled() {
            if audit_at.is_some_and(|at| at <= Instant::now()) {
                let done = self.audit().await;
                audit_at = (!done).then(|| Instant::now() + AGAIN);
            }
            let state = self.view.state();
            let names: BTreeSet<_> = state.snapshots().map(|it| it.sealed.id).collect();
            if !named.is_subset(&names) {
                collect_at = Some(Instant::now() + COLLECT_AFTER);
            }
            named = names;
            failed.retain(|_, at| *at > Instant::now());
            let is_due = |it: &&Snapshot| !failed.contains_key(&it.sealed.id);
            if let Some(snapshot) = wanted(&state, self.here).find(is_due) {
                // Those that cannot be copied now do not hold up the others.
                if !self.copy(snapshot).await {
                    failed.insert(snapshot.sealed.id, Instant::now() + AGAIN);
                }
                continue;
            }
            if collect_at.is_some_and(|at| at <= Instant::now()) {
                let done = self.collect().await;
                collect_at = (!done).then(|| Instant::now() + COLLECT_AFTER);
            }
            let due = failed.values().copied().chain(collect_at).chain(audit_at);
            let due = due.min();
            let due = due.unwrap_or_else(|| Instant::now() + NOTHING_DUE);
            tokio::select! {
                alive = view.changed() => if !alive { break },
                Ok(()) = damage.changed() => audit_at = Some(Instant::now()),
                Ok(()) = completed.changed() => audit_at = Some(Instant::now()),
                () = time::sleep_until(due) => {}
            }
        }
    }

    /// Tells the cluster where it is wrong about this node. Says whether it knows all now.
    async fn audit(&self) -> bool {
        // A record that this node has not seen yet is none that it is wrong about.
        if let Err(err) = self.proposer.linearize().await {
            warn!(%err, "did not look what is held here: the cluster's newest state is not known");
            return false;
        }
        let (store, state, here) = (self.store.clone(), self.view.state(), self.here);
        let looked = task::spawn_blocking(move || wrong_about(&store, &state, here)).await;
        let mut told = true;
        for (id, digest, holding) in looked.unwrap_or_default() {
            let holds = match holding {
                Holding::Whole => true,
                Holding::Part => self.mend(digest).await,
                Holding::Nothing => false,
            };
            if !(holds && holding == Holding::Part) {
                warn!(snapshot = %id, ?holding, "the cluster is wrong about this node's copy");
                told &= self.tell(id, holds).await;
            }
        }
        told
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

    /// Fetches one snapshot and tells; says whether that came about.
    async fn copy(&self, snapshot: &Snapshot) -> bool {
        let (id, digest) = (snapshot.sealed.id, SnapshotDigest(snapshot.sealed.digest));
        // Kept until the cluster names this node a holder.
        let fetched = self.store.fetch(digest, self.holders.as_ref());
        let kept = match time::timeout(COPY_TIMEOUT, fetched).await {
            Ok(Ok(kept)) => kept,
            Ok(Err(err)) => {
                warn!(snapshot = %id, err = chain(&err), "could not copy; will try again");
                return false;
            }
            Err(_) => {
                warn!(snapshot = %id, "a copy took too long; what has come is used by the next try");
                return false;
            }
        };
        let told = self.tell(id, true).await;
        drop(kept);
        told
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
fn wrong_about(
    store: &Store,
    state: &State,
    here: NodeId,
) -> Vec<(SnapshotId, SnapshotDigest, Holding)> {
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
    wrong
        .map(|(snapshot, digest, holding)| (snapshot.sealed.id, digest, holding))
        .collect()
}

/// The snapshots of which this node should make a copy.
fn wanted(state: &State, here: NodeId) -> impl Iterator<Item = &Snapshot> {
    let without = state
        .snapshots()
        .filter(move |snapshot| !snapshot.holders.contains(&here));
    without.filter(move |snapshot| copiers(state, snapshot).contains(&here))
}

/// Who should make a copy: as many as are lacking, in an order of the snapshot's own.
fn copiers(state: &State, snapshot: &Snapshot) -> Vec<NodeId> {
    let holders = || snapshot.holders.iter().filter_map(|id| state.node(*id));
    let reached = holders().any(|node| node.liveness.is_alive());
    // What a node has that is being emptied counts as gone already.
    let live = holders().filter(|node| node.liveness.is_alive() && !node.draining);
    let wanted = usize::try_from(state.settings().replicas).unwrap_or(usize::MAX);
    let lacking = wanted.saturating_sub(live.count());
    let mut able: Vec<NodeId> = state
        .nodes()
        .filter(|node| node.liveness.is_alive() && !node.draining)
        // Hosts of one team do not see everything that this takes.
        .filter(|node| node.team.is_none())
        .map(|node| node.id)
        .filter(|id| !snapshot.holders.contains(id))
        .collect();
    // First of all those that could resume it; the bytes are safe with any.
    let resumes = |id: &NodeId| {
        let needs = &snapshot.sealed.needs;
        state
            .node(*id)
            .is_some_and(|it| needs.are_met_by(it) && needs.has_base(it))
    };
    able.sort_by_key(|node| (!resumes(node), rank(snapshot.sealed.id, *node)));
    if !reached {
        // Of a snapshot that nobody can give there is nothing to copy.
        return Vec::new();
    }
    if snapshot.warm.as_ref().is_some_and(|warm| !warm.retired) {
        // Capsules are started from it on every node that can, and should not wait for its bytes.
        able.retain(resumes);
    } else {
        able.truncate(lacking);
    }
    able
}

/// The same on every node, and for every snapshot another.
fn rank(snapshot: SnapshotId, node: NodeId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&snapshot.0).update(&node.0.to_be_bytes());
    *hasher.finalize().as_bytes()
}

/// What the store must keep: whatever has a record. What this node is not said to hold may be on its
/// way here, and is worth more than its room while it may be asked for.
fn pins(state: &State) -> Vec<Pin> {
    state
        .snapshots()
        .map(|it| Pin::Snapshot(SnapshotDigest(it.sealed.digest)))
        .collect()
}

#[cfg(test)]
mod tests {
    use proto::epoch::Epoch;
    use proto::ids::{NodeKey, SandboxId, TeamId};
    use proto::units::Stamp;
    use raft::command::Proposal;
    use raft::state::{Node, Sealed, Warm};

    use super::*;

    /// Three nodes, and a snapshot that the first has sealed.
    fn state() -> State {
        let mut state = State::default();
        for n in 1..=3 {
            let node = Node {
                id: NodeId(n),
                name: format!("n{n}"),
                key: NodeKey([u8::try_from(n).unwrap_or(0); 32]),
                ..Node::default()
            };
            state = with_node(&state, node);
        }
        state
    }

    fn with_node(state: &State, node: Node) -> State {
        let row = (
            raft::state::RowKey::Node(node.id).encode(),
            Some(raft::wire::encode_node(&node)),
        );
        let mut next = state.clone();
        next.follow([row]).expect("a row of ours");
        next
    }

    fn snapshot(n: u8, holders: &[u64]) -> Snapshot {
        Snapshot {
            sealed: Sealed {
                id: SnapshotId([n; 16]),
                ..Sealed::default()
            },
            team: TeamId::default(),
            sandbox: SandboxId([n; 16]),
            epoch: Epoch(1),
            sealed_by: NodeId(1),
            sealed_at: Stamp(0),
            holders: holders.iter().map(|id| NodeId(*id)).collect(),
            warm: None,
        }
    }

    #[test]
    fn one_other_node_copies_what_one_holds_and_all_agree_which() {
        let state = state();
        let chosen: BTreeSet<_> = (0..40)
            .map(|n| copiers(&state, &snapshot(n, &[1])))
            .inspect(|chosen| assert_eq!(chosen.len(), 1))
            .collect();
        assert_eq!(chosen.len(), 2, "the work is shared: {chosen:?}");
        assert!(!chosen.contains(&vec![NodeId(1)]));
    }

    #[test]
    fn nobody_copies_what_has_enough_copies_or_none_in_reach() {
        let state = state();
        assert!(copiers(&state, &snapshot(1, &[1, 3])).is_empty());
        assert!(copiers(&state, &snapshot(1, &[])).is_empty());
        assert!(copiers(&state, &snapshot(1, &[9])).is_empty());
    }

    #[test]
    fn a_holder_that_is_gone_is_replaced() {
        let mut state = state();
        let judge = |verdict| Proposal {
            at: Stamp(1),
            command: Command::JudgeNode {
                node: NodeId(3),
                incarnation: 0,
                verdict,
            },
        };
        let missing = judge(raft::command::Verdict::Missing);
        state.apply(9, missing).answer.expect("it is known");
        assert_eq!(copiers(&state, &snapshot(1, &[1, 3])), [NodeId(2)]);
    }

    #[test]
    fn what_is_kept_warm_lies_on_every_node_that_starts_from_it() {
        let mut state = state();
        for n in [1, 2] {
            let known = state.node(NodeId(n)).cloned().expect("known");
            let templates = [("minimal".into(), [0; 32])].into();
            state = with_node(&state, Node { templates, ..known });
        }
        let warm = |retired| Snapshot {
            warm: Some(Warm {
                retired,
                ..Warm::default()
            }),
            ..snapshot(1, &[1])
        };
        assert_eq!(copiers(&state, &warm(false)), [NodeId(2)]);
        let both = Snapshot {
            holders: [NodeId(1), NodeId(2)].into(),
            ..warm(false)
        };
        assert!(copiers(&state, &both).is_empty(), "the third has no image");
        assert_eq!(copiers(&state, &warm(true)).len(), 1);
    }

    #[test]
    fn a_host_of_one_team_copies_nothing_of_others() {
        let mut state = state();
        for n in [2, 3] {
            let known = state.node(NodeId(n)).cloned().expect("known");
            let team = Some(TeamId([7; 16]));
            state = with_node(&state, Node { team, ..known });
        }
        assert!(copiers(&state, &snapshot(1, &[1])).is_empty());
    }
}
