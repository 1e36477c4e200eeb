//! The only file that implements openraft's traits.
//!
//! Each implementation is a translation: [`LogStore`] to [`Log`], [`StateMachine`] to [`Store`],
//! [`Network`] to a [`Link`]. Nothing is decided here. Whatever blocks (snapshot files, cold
//! reads) is sent to the runtime's blocking threads, because the tasks that call these traits also
//! drive elections.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::{Arc, Mutex, PoisonError};

use futures::{Stream, TryStreamExt};
use openraft::errors::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::storage::{EntryResponder, IOFlushed, LogState, RaftLogStorage, RaftStateMachine};
use openraft::{
    OptionalSend, RPCTypes, RaftLogReader, RaftNetworkFactory, RaftNetworkV2, RaftSnapshotBuilder,
};
use proto::ids::NodeId;
use tokio::task::spawn_blocking;

use crate::fault::{Fault, FaultCell, as_io};
use crate::link::{Link, LinkError};
use crate::log::Log;
use crate::machine::Machine;
use crate::peer::{self, Envelope, NoAnswer};
use crate::snapshot::SnapshotFile;
use crate::store::{Builder, Store};
use crate::types::{
    CommittedLeader, Entry, LogId, Node, SnapshotMeta, StoredMembership, Types, Vote,
};

type Snapshot = openraft::Snapshot<CommittedLeader, u64, Node, SnapshotFile>;

/// The log, as openraft writes and reads it.
#[derive(Clone)]
pub(crate) struct LogStore(pub(crate) Arc<Log>);

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        self.0.read(half_open(&range)).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.0.vote())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.0.read_limited(start..end).await
    }
}

fn half_open(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        Ok(LogState {
            last_purged_log_id: self.0.purged(),
            last_log_id: self.0.last(),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.0.save_vote(*vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.0.save_committed(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.0.committed())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().collect();
        let done = move |result| callback.io_completed(result);
        self.0.append(entries, done).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.0.truncate_after(last).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        self.0.purge(upto).await
    }
}

/// The state, as openraft drives it.
pub(crate) struct StateMachine<M>(pub(crate) Store<M>);

impl<M: Machine> RaftStateMachine<Types> for StateMachine<M> {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder<M>;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let position = self.0.position();
        Ok((position.applied, position.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        let mut responders = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            batch.push(entry);
            responders.push(responder);
        }
        let applied = self.0.apply(batch);
        let answers = applied.map_err(|fault| filed(&self.0.files.fault, fault))?;
        for (responder, answer) in responders.into_iter().zip(answers) {
            if let Some(responder) = responder {
                responder.send(answer);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        SnapshotBuilder {
            builder: Arc::new(self.0.builder()),
            fault: self.0.files.fault.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        _meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> io::Result<()> {
        let files = self.0.files.clone();
        let taken = blocking(move || files.take_over::<M>(&snapshot.path)).await;
        let (machine, meta) = taken.map_err(|fault| filed(&self.0.files.fault, fault))?;
        self.0.install(machine, meta);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let newest = self.0.files.snapshots.newest();
        Ok(newest.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

/// Writes a snapshot beside the running state machine.
pub(crate) struct SnapshotBuilder<M> {
    builder: Arc<Builder<M>>,
    fault: FaultCell,
}

impl<M: Machine> RaftSnapshotBuilder<Types> for SnapshotBuilder<M> {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let builder = Arc::clone(&self.builder);
        let built = blocking(move || builder.build()).await;
        let (meta, snapshot) = built.map_err(|fault| filed(&self.fault, fault))?;
        Ok(Snapshot { meta, snapshot })
    }
}

async fn blocking<T, F>(work: F) -> Result<T, Fault>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Fault> + Send + 'static,
{
    let done = spawn_blocking(work).await;
    done.unwrap_or(Err(Fault::Died("snapshot")))
}

fn filed(cell: &FaultCell, fault: Fault) -> io::Error {
    as_io(&cell.file(fault))
}

/// Makes one [`Network`] for each member.
pub(crate) struct Networks<L> {
    link: Arc<L>,
    own_id: u64,
    /// Members found to be on another disk, so that each is reported once.
    strangers: Arc<Mutex<BTreeSet<u64>>>,
}

impl<L: Link> Networks<L> {
    pub(crate) fn new(link: L, own_id: NodeId) -> Self {
        Self {
            link: Arc::new(link),
            own_id: own_id.0,
            strangers: Arc::default(),
        }
    }
}

impl<L: Link> RaftNetworkFactory<Types> for Networks<L> {
    type Network = Network<L>;

    async fn new_client(&mut self, target: u64, node: &Node) -> Network<L> {
        Network {
            link: Arc::clone(&self.link),
            own_id: self.own_id,
            strangers: Arc::clone(&self.strangers),
            target,
            node: node.clone(),
        }
    }
}

/// The way to one member.
pub(crate) struct Network<L> {
    link: Arc<L>,
    own_id: u64,
    strangers: Arc<Mutex<BTreeSet<u64>>>,
    target: u64,
    node: Node,
}

impl<L: Link> Network<L> {
    const fn envelope(&self) -> Envelope {
        Envelope {
            sender: self.own_id,
            target_disk: self.node.disk,
        }
    }

    /// An answer that is none counts as nobody there: asking again at once would not help.
    fn unreachable(&self, none: &NoAnswer) -> Unreachable<Types> {
        if let NoAnswer::OtherDisk(here) = none {
            let mut strangers = self
                .strangers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if strangers.insert(self.target) {
                tracing::error!(
                    member = self.target,
                    known = %self.node.disk,
                    %here,
                    "a member lost its disk: remove it, it must join anew under a new id"
                );
            }
        }
        Unreachable::new(none)
    }

    fn garbled(&self, none: &NoAnswer) -> RPCError<Types> {
        RPCError::Unreachable(self.unreachable(none))
    }

    async fn call(
        &self,
        action: RPCTypes,
        request: Vec<u8>,
        option: &RPCOption,
    ) -> Result<Vec<u8>, RPCError<Types>> {
        let within = option.soft_ttl();
        let target = NodeId(self.target);
        let answer = self.link.call(target, &self.node, request, within).await;
        answer.map_err(|err| match err {
            LinkError::Unreachable(_) => RPCError::Unreachable(Unreachable::new(&err)),
            LinkError::Broken(_) => RPCError::Network(NetworkError::new(&err)),
            LinkError::TimedOut(_) => RPCError::Timeout(Timeout {
                action,
                id: self.own_id,
                target: self.target,
                timeout: within,
            }),
        })
    }
}

impl<L: Link> RaftNetworkV2<Types> for Network<L> {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        let request = peer::append_request(self.envelope(), &rpc);
        let answer = self.call(RPCTypes::AppendEntries, request, &option).await?;
        peer::append_answer(&answer).map_err(|none| self.garbled(&none))
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let request = peer::vote_request(self.envelope(), &rpc, false);
        let answer = self.call(RPCTypes::Vote, request, &option).await?;
        peer::vote_answer(&answer).map_err(|none| self.garbled(&none))
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let request = peer::vote_request(self.envelope(), &rpc, true);
        let answer = self.call(RPCTypes::Vote, request, &option).await?;
        peer::vote_answer(&answer).map_err(|none| self.garbled(&none))
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let request = peer::transfer_request(self.envelope(), &rpc);
        let answer = self
            .call(RPCTypes::TransferLeader, request, &option)
            .await?;
        peer::transfer_answer(&answer).map_err(|none| self.garbled(&none))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let request = peer::snapshot_offer(self.envelope(), &vote, &snapshot.meta);
        let target = NodeId(self.target);
        let sent = self
            .link
            .send_snapshot(target, &self.node, request, snapshot.snapshot);
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = sent => {
                let answer = sent.map_err(|err| StreamingError::Unreachable(Unreachable::new(&err)))?;
                let vote = peer::snapshot_answer(&answer)
                    .map_err(|none| StreamingError::Unreachable(self.unreachable(&none)))?;
                Ok(SnapshotResponse::new(vote))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use openraft::StorageError;
    use openraft::testing::log::{StoreBuilder, Suite};

    use super::*;
    use crate::disk::RealDisk;
    use crate::log::{LogOptions, MIN_SEGMENT_BYTES};
    use crate::snapshot::Snapshots;
    use crate::toy::Toy;

    struct RealStores;

    impl StoreBuilder<Types, LogStore, StateMachine<Toy>, tempfile::TempDir> for RealStores {
        async fn build(
            &self,
        ) -> Result<(tempfile::TempDir, LogStore, StateMachine<Toy>), StorageError<Types>> {
            let dir = tempfile::tempdir().unwrap();
            let (log_dir, snap_dir) = (dir.path().join("log"), dir.path().join("snap"));
            std::fs::create_dir(&log_dir).unwrap();
            std::fs::create_dir(&snap_dir).unwrap();
            let fault = FaultCell::new();
            let options = LogOptions {
                segment_bytes: MIN_SEGMENT_BYTES,
                // Small, so that reads also come from the disk.
                cache_bytes: 512,
            };
            let log = Log::open(&log_dir, options, Arc::new(RealDisk), fault.clone()).unwrap();
            let log = Arc::new(log);
            let snapshots = Snapshots::open(&snap_dir, Arc::new(RealDisk)).unwrap();
            let state_dir = dir.path().join("state");
            let store = Store::open(snapshots, &state_dir, Arc::clone(&log), fault).unwrap();
            Ok((dir, LogStore(log), StateMachine(store)))
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_stores_pass_the_suite_of_openraft() {
        Suite::test_all(RealStores).await.expect("passes");
    }
}
