//! The handle to the replicated state: open, propose, read, stop.
//!
//! ```text
//! propose --> openraft core --> log (durable) --> commit --> store --> view, then the answer
//! ```
//!
//! openraft's tasks run on a small runtime of their own ([`CORE_THREADS`] threads), not on the
//! daemon's: a request handler that blocks, or a host busy with booting guests, must not delay
//! heartbeats and elections. All file work is on further threads: one writes the log, one writes the
//! derived state, and snapshots use the runtime's blocking pool. The methods here only talk to
//! channels and may be called from any runtime.
//!
//! A [`Fault`] ends the group for good: proposals in flight get [`ProposeError::Fatal`] (their
//! outcome is unknown), later ones too, [`Group::failed`] resolves, and the daemon is expected to
//! exit. Nothing is retried and nothing is acknowledged after it.
//!
//! Stopping, in order: openraft's core (no new work), its runtime (state machine, snapshots), the
//! log's thread (writes and syncs what is queued), the derived state (flushed), the folder's lock.

mod change;
mod config;
mod error;
mod metrics;
mod mirror;
mod open;
mod recover;
mod serve;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{
    ClientWriteError, Fatal, ForwardReason, ForwardToLeader, InitializeError,
    LinearizableReadError, RaftError,
};
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use openraft::{Raft, ReadPolicy};
use proto::ids::NodeId;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time;

pub use self::config::{GroupConfig, Timeouts};
pub use self::error::{
    BootstrapError, ChangeError, EntriesError, OpenError, ProposeError, ReadError, SnapshotError,
};
pub use self::metrics::{Member, MembershipStamp, Metrics, Role, Standing};
pub use self::mirror::{Entries, OfferedSnapshot};
pub use self::open::prepare;
pub use self::recover::{Inspected, Position, RecoverError, Recovered, inspect, recover};

use self::error::Ended;
use self::open::Opened;
use crate::adapter::{LogStore, Networks, StateMachine};
use crate::disk::{Disk, RealDisk};
use crate::fault::{Fault, FaultCell};
use crate::identity::Home;
use crate::link::Link;
use crate::machine::Machine;
use crate::store::{Files, View};
use crate::types::{Leader, Node, ProposalBytes, Types};

/// Threads of openraft's runtime: its core, and one more so that a long apply does not hold up
/// heartbeats.
const CORE_THREADS: usize = 2;
/// Threads for snapshots and cold reads.
const BLOCKING_THREADS: usize = 4;
/// How long a stop waits for a snapshot being written; after that its thread is left behind and
/// its `.tmp` file is removed at the next start.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a new leader may take to be accepted by itself or its quorum. An election takes two
/// timeouts at most; the rest is for a slow disk.
const BOOTSTRAP_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause before a proposal is offered again to a leader whose quorum has not answered yet.
const LEASE_RETRY: Duration = Duration::from_millis(5);
/// Largest proposal. Commands are a few KiB; data does not belong into the log.
pub const MAX_PROPOSAL_BYTES: usize = 1024 * 1024;
/// Share of a segment one proposal may take.
const PROPOSALS_PER_SEGMENT: usize = 4;

/// A proposal that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// Its place in the log. Any member that has applied this far has the change.
    pub index: u64,
    /// What the machine answered.
    pub answer: Vec<u8>,
}

/// One member's part of the replicated state; clones are handles to the same.
pub struct Group<M: Machine> {
    inner: Arc<Inner<M>>,
}

impl<M: Machine> Clone for Group<M> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

struct Inner<M: Machine> {
    raft: Raft<Types, StateMachine<M>>,
    runtime: Mutex<Option<Runtime>>,
    /// For work that must be finished even if its caller gives up.
    spawner: Handle,
    standing: Arc<watch::Sender<Standing>>,
    timeouts: Timeouts,
    view: watch::Receiver<View<M>>,
    files: Files,
    node_id: NodeId,
    node: Node,
    max_proposal_bytes: usize,
    /// Released last.
    home: Mutex<Option<Home>>,
}

impl<M: Machine> Drop for Inner<M> {
    fn drop(&mut self) {
        let runtime = self
            .runtime
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = runtime.take() {
            // Without a shutdown: what was acknowledged is durable, the rest just ends.
            runtime.shutdown_background();
        }
    }
}

impl<M: Machine> Group<M> {
    /// Opens the group in `config.dir`, creating it where there is none, and starts taking part.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left running.
    pub async fn open(config: GroupConfig, link: impl Link) -> Result<Self, OpenError> {
        Self::open_on(config, link, Arc::new(RealDisk)).await
    }

    /// [`Self::open`] on a given disk: for tests that count or break its operations.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left running.
    pub async fn open_on(
        mut config: GroupConfig,
        link: impl Link,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, OpenError> {
        let raft_config = config::raft_config(&config)?;
        let opening = config.clone();
        let opened = spawn_blocking(move || Opened::<M>::open(&opening, disk)).await;
        let opened = opened.map_err(|died| OpenError::Core(died.to_string()))??;
        config.node.disk = opened.disk_id;
        let runtime =
            core_runtime().map_err(|source| OpenError::Disk(config.dir.clone(), source))?;
        let view = opened.store.subscribe();
        let files = opened.store.files.clone();
        let networks = Networks::new(link, config.node_id);
        let log = LogStore(Arc::clone(&files.log));
        let starting = Raft::new(
            config.node_id.0,
            Arc::new(raft_config),
            networks,
            log,
            StateMachine(opened.store),
        );
        let starting = async {
            let raft = starting.await?;
            // The core answers once it has published what is on disk: until then the metrics are
            // those of a blank node.
            raft.with_raft_state(|_| ()).await?;
            Ok::<_, Fatal<Types>>(raft)
        };
        let started = runtime.spawn(starting).await;
        let raft = match started {
            Ok(Ok(raft)) => raft,
            failed => {
                runtime.shutdown_background();
                let text = failed.map_or_else(
                    |died| died.to_string(),
                    |raft| {
                        raft.err()
                            .map_or_else(String::new, |fatal| fatal.to_string())
                    },
                );
                return Err(OpenError::Core(text));
            }
        };
        let standing = Arc::new(watch::Sender::new(Standing::default()));
        let watching = watch_core(raft.clone(), files.fault.clone(), Arc::clone(&standing));
        runtime.spawn(watching);
        let share = config.segment_bytes as usize / PROPOSALS_PER_SEGMENT;
        Ok(Self {
            inner: Arc::new(Inner {
                raft,
                spawner: runtime.handle().clone(),
                runtime: Mutex::new(Some(runtime)),
                standing,
                timeouts: config.timeouts,
                view,
                files,
                node_id: config.node_id,
                node: config.node,
                max_proposal_bytes: MAX_PROPOSAL_BYTES.min(share),
                home: Mutex::new(Some(opened.home)),
            }),
        })
    }

    /// Forms a cluster of this node alone, once; on a member of a cluster it changes nothing.
    /// Returns when proposals are accepted, here or by a leader that is known.
    ///
    /// # Errors
    /// [`BootstrapError`].
    pub async fn bootstrap(&self) -> Result<(), BootstrapError> {
        let deadline = time::Instant::now() + BOOTSTRAP_TIMEOUT;
        let id = self.inner.node_id.0;
        let alone = BTreeMap::from([(id, self.inner.node.clone())]);
        match self.inner.raft.initialize(alone).await {
            // Not allowed: there is a log already, this node is a member of something.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(RaftError::APIError(err)) => {
                let fault = Fault::Core(err.to_string());
                return Err(BootstrapError::Fatal(self.inner.files.fault.file(fault)));
            }
            Err(RaftError::Fatal(fatal)) => return Err(self.ended(&fatal).into()),
        }
        while time::Instant::now() < deadline {
            match time::timeout_at(deadline, self.linearizable()).await {
                Ok(Ok(()) | Err(ReadError::NotLeader { leader: Some(_) })) => return Ok(()),
                Ok(Err(ReadError::Stopped)) => return Err(BootstrapError::Stopped),
                Ok(Err(ReadError::Fatal(fault))) => return Err(BootstrapError::Fatal(fault)),
                // Being leader is not being ready: the quorum has to answer first.
                Ok(Err(ReadError::NotLeader { leader: None } | ReadError::NoQuorum)) | Err(_) => {
                    time::sleep(LEASE_RETRY).await;
                }
            }
        }
        Err(BootstrapError::TimedOut(BOOTSTRAP_TIMEOUT))
    }

    /// Has `proposal` applied, and returns its answer. By then the change is durable on a quorum
    /// and visible in [`Self::state`] here.
    ///
    /// `deadline` bounds the whole call. Dropping the future leaves the outcome unknown.
    ///
    /// # Errors
    /// [`ProposeError`], which says whether the outcome is known.
    pub async fn propose(
        &self,
        proposal: Vec<u8>,
        deadline: Instant,
    ) -> Result<Proposed, ProposeError> {
        self.submit(None, proposal, deadline).await
    }

    /// Like [`Self::propose`], but only as the leader of `term`: for what this node knows as that
    /// leader and its successor may know better.
    ///
    /// # Errors
    /// [`ProposeError`]; of another term nothing was taken.
    pub async fn propose_in(
        &self,
        term: u64,
        proposal: Vec<u8>,
        deadline: Instant,
    ) -> Result<Proposed, ProposeError> {
        let leader = Leader {
            term,
            node_id: self.inner.node_id.0,
        };
        self.submit(Some(leader), proposal, deadline).await
    }

    async fn submit(
        &self,
        only_as: Option<Leader>,
        proposal: Vec<u8>,
        deadline: Instant,
    ) -> Result<Proposed, ProposeError> {
        let (bytes, limit) = (proposal.len(), self.inner.max_proposal_bytes);
        if bytes > limit {
            return Err(ProposeError::TooLarge { bytes, limit });
        }
        let deadline = time::Instant::from_std(deadline);
        let proposal = ProposalBytes(proposal.into());
        loop {
            let write = self.write(only_as, proposal.clone());
            let refused = match time::timeout_at(deadline, write).await {
                Err(_) => return Err(ProposeError::Timeout),
                Ok(Ok(Ok(written))) => {
                    return Ok(Proposed {
                        index: written.log_id.index,
                        answer: written.data.0,
                    });
                }
                Ok(Ok(Err(refused))) => refused,
                Ok(Err(fatal)) => return Err(self.ended(&fatal).into()),
            };
            let forward = match refused {
                ClientWriteError::ForwardToLeader(forward) => forward,
                ClientWriteError::LogEntryDiscarded(_) => return Err(ProposeError::LeaderChanged),
                // Only for changes of the membership, which this is not.
                ClientWriteError::ChangeMembershipError(_)
                | ClientWriteError::PreconditionFailed(_) => {
                    return Err(ProposeError::NotLeader { leader: None });
                }
            };
            // A leader that waits for its quorum's first answer: refused before it was appended.
            let soon = time::Instant::now() + LEASE_RETRY;
            if forward.reason != ForwardReason::LeaseExpired || soon >= deadline {
                let leader = leader_of(forward);
                return Err(ProposeError::NotLeader { leader });
            }
            time::sleep_until(soon).await;
        }
    }

    /// Hands a proposal to the core and waits for what became of it.
    async fn write(
        &self,
        only_as: Option<Leader>,
        proposal: ProposalBytes,
    ) -> Result<ClientWriteResult<Types>, Fatal<Types>> {
        let (responder, outcome) = ProgressResponder::complete_only();
        let write = self.inner.raft.write(proposal).responder(responder);
        match only_as {
            Some(leader) => write.with_leader(leader).await?,
            None => write.await?,
        }
        // The core drops the other end only when it ends.
        outcome.await.map_err(|_| Fatal::Stopped)
    }

    /// Watches the state. It is as new as this member's log, which may lag; see
    /// [`Self::linearizable`].
    #[must_use]
    pub fn state(&self) -> watch::Receiver<View<M>> {
        self.inner.view.clone()
    }

    /// Returns once [`Self::state`] holds everything that was acknowledged anywhere before the
    /// call. Waits as long as it takes: put a deadline around it.
    ///
    /// # Errors
    /// [`ReadError`]; the state may be stale.
    pub async fn linearizable(&self) -> Result<(), ReadError> {
        self.read_index().await.map(drop)
    }

    /// [`Self::linearizable`], and the index that has to be applied for that. Another member that
    /// waits until it has applied as far may answer the same read from its own state.
    ///
    /// Leader only. The quorum is asked after the call, never before it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        let raft = &self.inner.raft;
        match raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(read) => Ok(read.log_id().index),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                let leader = leader_of(forward);
                Err(ReadError::NotLeader { leader })
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                Err(ReadError::NoQuorum)
            }
            Err(RaftError::Fatal(fatal)) => Err(self.ended(&fatal).into()),
        }
    }

    /// What this member is at the moment.
    #[must_use]
    pub fn role(&self) -> Role {
        if self.inner.files.fault.get().is_some() {
            return Role::Stopped;
        }
        metrics::role_of(self.inner.raft.metrics().borrow_watched().state)
    }

    /// How the group is doing.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        // Cloned at once: a borrow would block openraft's core.
        let metrics = self.inner.raft.metrics().borrow_watched().clone();
        Metrics::new(self.role(), &metrics)
    }

    /// Waits for changes of what [`Standing`] lists, which are few: unlike [`Self::metrics`] it
    /// does not move with every entry. Holding the borrow blocks nobody but this watch.
    #[must_use]
    pub fn watch_metrics(&self) -> watch::Receiver<Standing> {
        self.inner.standing.subscribe()
    }

    /// This member's record, with the identity of its disk.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.inner.node
    }

    /// Starts writing a snapshot now, besides those written on schedule.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] or [`ReadError::Fatal`].
    pub async fn snapshot(&self) -> Result<(), ReadError> {
        let triggered = self.inner.raft.trigger().snapshot().await;
        triggered.map_err(|fatal| self.ended(&fatal).into())
    }

    /// Waits until this member is broken; pending forever if it is shut down first.
    pub async fn failed(&self) -> Arc<Fault> {
        self.inner.files.fault.wait().await
    }

    /// Stops taking part, writes everything down and releases the folder. Proposals under way end
    /// with [`ProposeError::Stopped`].
    pub async fn shutdown(&self) {
        // The error is that of a task that has ended already.
        drop(self.inner.raft.shutdown().await);
        let inner = Arc::clone(&self.inner);
        let stopping = spawn_blocking(move || inner.stop_threads());
        if let Err(died) = stopping.await {
            tracing::warn!(%died, "stopping the storage threads failed");
        }
    }

    fn ended(&self, fatal: &Fatal<Types>) -> Ended {
        match (self.inner.files.fault.get(), fatal) {
            (Some(fault), _) => Ended::Fault(fault),
            (None, Fatal::Stopped) => Ended::Stopped,
            (None, fatal) => {
                let fault = Fault::Core(fatal.to_string());
                Ended::Fault(self.inner.files.fault.file(fault))
            }
        }
    }
}

impl<M: Machine> Inner<M> {
    fn stop_threads(&self) {
        let mut runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = runtime.take() {
            runtime.shutdown_timeout(STOP_TIMEOUT);
        }
        self.files.log.stop();
        self.files.derived.stop();
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        drop(home.take());
    }
}

fn core_runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CORE_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("raft-core")
        .enable_time()
        .build()
}

/// Publishes what openraft reports, and files a fault when it ends by itself, so that nobody has
/// to propose to find out.
async fn watch_core<M: Machine>(
    raft: Raft<Types, StateMachine<M>>,
    fault: FaultCell,
    standing: Arc<watch::Sender<Standing>>,
) {
    let mut metrics = raft.metrics();
    loop {
        // Copied at once: a borrow would block openraft's core.
        let (now, running) = {
            let metrics = metrics.borrow_watched();
            (Standing::new(&metrics), metrics.running_state.clone())
        };
        standing.send_if_modified(|standing| standing.update(now));
        if let Err(fatal) = running {
            if fatal != Fatal::Stopped {
                fault.file(Fault::Core(fatal.to_string()));
            }
            break;
        }
        if metrics.changed().await.is_err() {
            break;
        }
    }
    standing.send_modify(|standing| standing.role = Role::Stopped);
}

fn leader_of(forward: ForwardToLeader<Types>) -> Option<(NodeId, Node)> {
    Some((NodeId(forward.leader_id?), forward.leader_node?))
}
