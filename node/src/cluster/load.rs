//! Load and liveness by datagram: what each node says of itself once a second, and what voters make
//! of it.
//!
//! Nothing of it goes through the log and no decision of safety rests on it. A node that does not
//! vote asks one that does for the table, at most once a second.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::ids::{NodeId, NodeKey};
use raft::group::Group;
use raft::state::State;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::calls;
use super::lease::Tick;
use super::liveness::{Hint, REPORT_EVERY, Report, Table, decode_table};
use super::mesh::Mesh;
use super::replica::Replica;
use super::serve::received_at;

/// Longest wait for another voter's table.
const TABLE_TIMEOUT: Duration = Duration::from_secs(1);
/// Nodes that a node outside raft's configuration reports to while it does not know who votes.
const UNKNOWN_VOTERS: usize = 8;

/// What this node can say of itself beyond the replicated state.
pub trait LoadSource: Send + Sync + 'static {
    /// What is free here by the machine's own measure.
    fn sample(&self) -> LoadSample;
}

/// A look at this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSample {
    /// Processors that were idle lately.
    pub free_vcpus: u32,
    /// Memory that could be had.
    pub free_memory_mib: u32,
    /// Guests that run.
    pub running: u32,
    /// How long 95 of 100 of them took to start at most; zero where none was started lately.
    pub create_p95: Duration,
}

/// The load table of this node.
#[derive(Debug, Default)]
pub(super) struct LoadTable {
    table: Mutex<Table>,
}

impl LoadTable {
    /// Takes a datagram of the member behind `key`.
    pub(super) fn receive(&self, mesh: &Mesh, key: NodeKey, bytes: &[u8]) {
        let Ok(report) = Report::decode(bytes) else {
            tracing::debug!(peer = %key, "a datagram that is no load report");
            return;
        };
        // A member may be wrong about itself, but speaks for nobody else.
        if mesh.node_of(&key).is_some_and(|from| report.is_from(from)) {
            self.heard(report, received_at());
        }
    }

    pub(super) fn heard(&self, report: Report, at: Tick) {
        self.lock().heard(report, at);
    }

    pub(super) fn hints(&self) -> Vec<Hint> {
        self.lock().hints(received_at()).collect()
    }

    pub(super) fn age(&self, node: NodeId) -> Option<Duration> {
        self.lock().age(node, received_at())
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        self.lock().encode(received_at())
    }

    fn merge(&self, others: Vec<Hint>) {
        self.lock().merge(others, received_at());
    }

    fn keep_only(&self, keep: impl FnMut(NodeId) -> bool) {
        self.lock().keep_only(keep);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends this node's reports, and fetches the table where this node does not vote.
pub(super) struct Reporter {
    pub(super) group: Group<State>,
    pub(super) mesh: Mesh,
    pub(super) replica: Replica,
    pub(super) loads: Arc<LoadTable>,
    pub(super) source: Arc<dyn LoadSource>,
}

impl Reporter {
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut ticks = time::interval(REPORT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seq = 0;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            seq += 1;
            let report = self.report(seq);
            self.loads.heard(report.clone(), received_at());
            let state = self.replica.state();
            self.loads.keep_only(|id| state.node(id).is_some());
            let voters = self.voters();
            let bytes = Bytes::from(report.encode());
            let sends = voters.iter().filter(|id| **id != self.mesh.here());
            let sends = sends.map(|id| self.mesh.send_datagram(*id, bytes.clone()));
            futures::future::join_all(sends).await;
            let is_host = state
                .node(self.mesh.here())
                .is_some_and(|own| own.team.is_some());
            if !voters.contains(&self.mesh.here()) && !is_host {
                self.fetch(&voters).await;
            }
        }
    }

    fn report(&self, seq: u64) -> Report {
        let here = self.mesh.here();
        let seen = self.replica.now();
        let node = seen.state.node(here);
        let sample = self.source.sample();
        let mut free = node.map_or_else(Default::default, |node| {
            node.capacity.less(seen.state.reserved(here))
        });
        free.vcpus = sample.free_vcpus;
        free.memory.0 = free.memory.0.min(sample.free_memory_mib);
        Report {
            node: here,
            incarnation: node.map_or(0, |node| node.incarnation),
            seq,
            free,
            running: sample.running,
            applied: seen.applied.unwrap_or(0),
            membership: self.mesh.roster().index,
            create_p95: sample.create_p95,
        }
    }

    fn voters(&self) -> Vec<NodeId> {
        let metrics = self.group.metrics();
        let voters = metrics.members.iter().filter(|(_, member)| member.voter);
        let voters: Vec<NodeId> = voters.map(|(id, _)| *id).collect();
        let is_member = metrics.members.contains_key(&self.mesh.here());
        if is_member && !voters.is_empty() {
            return voters;
        }
        let roster = self.mesh.roster();
        let known = roster.peers(self.mesh.here()).into_iter();
        let old = voters
            .into_iter()
            .filter(|id| roster.nodes.contains_key(id));
        let mut asked: Vec<NodeId> = old.chain(known).take(UNKNOWN_VOTERS).collect();
        asked.sort_unstable();
        asked.dedup();
        asked
    }

    async fn fetch(&self, voters: &[NodeId]) {
        let here = self.mesh.here();
        let others = voters.iter().filter(|id| **id != here);
        for voter in others {
            let deadline = Instant::now() + TABLE_TIMEOUT;
            let called = self
                .mesh
                .call(*voter, calls::LOAD_TABLE, Bytes::new(), deadline);
            let table = called
                .await
                .ok()
                .and_then(|bytes| decode_table(&bytes).ok());
            if let Some(table) = table {
                self.loads.merge(table);
                return;
            }
        }
    }
}
