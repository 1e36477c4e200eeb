//! The cluster room, assembled: what wiring builds and the rest of the node uses.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use proto::ids::NodeId;
use raft::group::{Group, Role};
use raft::state::State;
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, info_span, warn};
use transport::{Lane, Service};

use super::calls;
use super::desk::{self, Desk};
use super::hearsay::{Hearsay, Told};
use super::join::JoinCalls;
use super::keeper::{Keeper, LeaseHand, LeaseSink};
use super::leader::Leader;
use super::link::{RaftCalls, SnapshotStreams};
use super::liveness::Hint;
use super::load::{LoadSource, LoadTable, Reporter};
use super::log::ClusterLog;
use super::mesh::Mesh;
use super::mirror::{Mirror, PullStreams};
use super::propose::Proposer;
use super::replica::Replica;
use super::roster::Roster;
use super::seldom::Seldom;
use super::serve::ClusterCalls;
use super::slices::SentSlices;
use crate::base::chain::chain;
use crate::base::clock::Clock;
use crate::base::stop::Tasks;

/// Longest a stopping leader looks for somebody to lead in its place.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(3);
/// A leader that heard from a quorum within this time has one; a sole voter hears nobody.
const QUORUM_RECENT: Duration = Duration::from_secs(2);
/// Longest one peer may take to say whether it knows a key.
const VOUCH_TIMEOUT: Duration = Duration::from_secs(2);
/// Peers asked about a key that this node does not know.
const VOUCHERS: usize = 3;

/// This node's part in its cluster. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    group: Group<State>,
    mesh: Mesh,
    replica: Replica,
    proposer: Proposer,
    desk: Arc<Desk>,
    loads: Arc<LoadTable>,
    leads: watch::Sender<bool>,
    hearsay: Hearsay,
    removed: CancellationToken,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("mesh", &self.mesh)
            .finish_non_exhaustive()
    }
}

/// A node's part in decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It votes.
    Voter,
    /// It receives the log.
    Learner,
    /// It pulls the log.
    Mirror,
    /// It serves one team.
    Host,
}

/// How the cluster stands, as seen from this node.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Who leads, as far as is known.
    pub leader: Option<NodeId>,
    /// The term.
    pub term: u64,
    /// The last entry applied here.
    pub applied: u64,
    /// Who votes.
    pub voters: Vec<NodeId>,
    /// Who receives the log without a vote.
    pub learners: Vec<NodeId>,
    /// Whether a change of the members is under way; then the voters of before and after are named.
    pub is_changing: bool,
    /// Whether most voters were in touch a moment ago, as far as this node can tell.
    pub has_quorum: bool,
}

impl Cluster {
    /// Puts the parts together. `told` is what this node was told when it joined.
    #[must_use]
    pub fn assemble(group: Group<State>, mesh: Mesh, told: &Roster, clock: Arc<dyn Clock>) -> Self {
        let replica = Replica::new(group.state().borrow().clone());
        let log = ClusterLog::new(group.clone(), mesh.clone(), replica.clone());
        let this = Self {
            desk: Arc::new(Desk::new(group.clone(), replica.clone())),
            proposer: Proposer::new(Arc::new(log), clock),
            group,
            mesh,
            replica,
            loads: Arc::default(),
            leads: watch::Sender::new(false),
            hearsay: Hearsay::default(),
            removed: CancellationToken::new(),
        };
        this.update_roster(told);
        this
    }

    /// The right to propose.
    #[must_use]
    pub const fn proposer(&self) -> &Proposer {
        &self.proposer
    }

    /// The way to other nodes.
    #[must_use]
    pub const fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Whether this node leads, watchable.
    #[must_use]
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Cancelled once it is certain that this node was removed from the cluster.
    #[must_use]
    pub const fn removed(&self) -> &CancellationToken {
        &self.removed
    }

    /// What is known of every node's load, and when it was last heard.
    #[must_use]
    pub fn loads(&self) -> Vec<Hint> {
        self.loads.hints()
    }

    /// How the cluster stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let metrics = self.group.metrics();
        let here = self.mesh.here();
        let own = Told::by(here, &metrics, self.replica.feed());
        // Where raft is silent, a member may have said how it stands.
        let heard = self.hearsay.newest().filter(|_| own.leader.is_none());
        let told = heard.unwrap_or(own);
        Standing {
            leader: told.leader,
            term: told.term,
            applied: self.replica.applied(),
            voters: told.voters.into_iter().collect(),
            learners: told.learners.into_iter().collect(),
            is_changing: metrics.is_joint || !metrics.is_settled,
            // Whoever leads knows by itself; others know by hearing of a leader at all.
            has_quorum: match metrics.role {
                Role::Leader => metrics.quorum_age.is_none_or(|age| age < QUORUM_RECENT),
                _ => told.leader.is_some(),
            },
        }
    }

    /// Answers other nodes from now on. `spool` is where snapshots lie while they arrive.
    pub fn serve(&self, spool: PathBuf, clock: Arc<dyn Clock>) {
        let transport = self.mesh.transport();
        transport.register(
            Service::RAFT,
            RaftCalls {
                group: self.group.clone(),
                mesh: self.mesh.clone(),
                feed: self.replica.feed().clone(),
                complained: AtomicBool::new(false),
            },
        );
        transport.register(
            Service::CLUSTER,
            ClusterCalls {
                group: self.group.clone(),
                mesh: self.mesh.clone(),
                log: self.log(),
                replica: self.replica.clone(),
                desk: Arc::clone(&self.desk),
                loads: Arc::clone(&self.loads),
                slices: SentSlices::default(),
            },
        );
        let proposer = self.proposer.clone();
        let this = self.clone();
        let join = JoinCalls {
            proposer,
            clock,
            voters: Box::new(move || this.standing().voters.into_iter().collect()),
        };
        transport.register(Service::JOIN, join);
        let snapshots = SnapshotStreams {
            group: self.group.clone(),
            mesh: self.mesh.clone(),
            spool,
            complained: AtomicBool::new(false),
            failures: Seldom::default(),
        };
        transport.register_streams(Service::SNAPSHOT, Lane::Bulk, snapshots);
        let pulls = PullStreams {
            group: self.group.clone(),
            mesh: self.mesh.clone(),
            replica: self.replica.clone(),
            failures: Seldom::default(),
        };
        transport.register_streams(Service::PULL, Lane::Bulk, pulls);
        let (mesh, loads) = (self.mesh.clone(), Arc::clone(&self.loads));
        transport.on_datagram(move |key, bytes| loads.receive(&mesh, key, &bytes));
        let (mesh, replica) = (self.mesh.clone(), self.replica.clone());
        transport.set_voucher(move |key| Box::pin(vouched(mesh.clone(), replica.clone(), key)));
    }

    /// Starts following the log: from raft, or from a peer where raft does not feed this node; and
    /// keeps the list of who is let in up to date.
    pub fn follow(&self, told: Roster, spool: PathBuf, tasks: &Tasks) {
        let follow = self.replica.clone().follow(self.group.state());
        let stop = tasks.token().clone();
        tasks.spawn(info_span!("replica"), async move {
            stop.run_until_cancelled(follow).await;
        });
        let (this, stop) = (self.clone(), tasks.token().clone());
        tasks.spawn(info_span!("roster"), async move {
            stop.run_until_cancelled(this.keep_roster(told)).await;
        });
        let mirror = Mirror {
            group: self.group.clone(),
            mesh: self.mesh.clone(),
            replica: self.replica.clone(),
            spool,
            hearsay: self.hearsay.clone(),
        };
        tasks.spawn(info_span!("mirror"), mirror.run(tasks.token().clone()));
    }

    /// Starts what an announced node does: renewing its lease, reporting its load, and leading
    /// when it is its turn.
    pub fn take_part(&self, sink: Arc<dyn LeaseSink>, source: Arc<dyn LoadSource>, tasks: &Tasks) {
        let state = self.replica.state();
        let own = state.node(self.mesh.here());
        let incarnation = own.map_or(0, |node| node.incarnation);
        let hand = LeaseHand::new(sink, desk::times(state.settings()), incarnation);
        let keeper = Keeper {
            group: self.group.clone(),
            mesh: self.mesh.clone(),
            replica: self.replica.clone(),
            desk: Arc::clone(&self.desk),
            proposer: self.proposer.clone(),
            hand: hand.clone(),
            removed: self.removed.clone(),
        };
        tasks.spawn(
            info_span!("lease-keeper"),
            keeper.run(tasks.token().clone()),
        );
        let reporter = Reporter {
            group: self.group.clone(),
            mesh: self.mesh.clone(),
            replica: self.replica.clone(),
            loads: Arc::clone(&self.loads),
            source,
        };
        tasks.spawn(info_span!("reporter"), reporter.run(tasks.token().clone()));
        let leader = Leader {
            group: self.group.clone(),
            mesh: self.mesh.clone(),
            replica: self.replica.clone(),
            desk: Arc::clone(&self.desk),
            loads: Arc::clone(&self.loads),
            proposer: self.proposer.clone(),
            hand,
            leads: self.leads.clone(),
        };
        tasks.spawn(info_span!("leader"), leader.run(tasks.token().clone()));
    }

    /// Hands the leadership to the voter that has most of the log, if this node has it and there
    /// is one: others then need no election to notice that this node stops.
    pub async fn hand_over(&self) {
        if self.group.role() != Role::Leader {
            return;
        }
        let metrics = self.group.metrics();
        let here = self.mesh.here();
        let voters = metrics.members.iter();
        let voters = voters.filter(|(id, member)| member.voter && **id != here);
        let mut others: Vec<NodeId> = voters.map(|(id, _)| *id).collect();
        others.sort_by_key(|id| std::cmp::Reverse(metrics.matched.get(id).copied()));
        for to in others {
            let handing = time::timeout(HAND_OVER_TIMEOUT, self.group.transfer_leader(to));
            match handing.await {
                Ok(Ok(())) => return info!(%to, "handed the leadership over"),
                Ok(Err(err)) => warn!(err = chain(&err), %to, "could not hand the leadership over"),
                Err(_) => warn!(%to, "handing the leadership over took too long"),
            }
        }
    }

    fn log(&self) -> ClusterLog {
        ClusterLog::new(self.group.clone(), self.mesh.clone(), self.replica.clone())
    }

    async fn keep_roster(self, told: Roster) {
        let mut seen = self.replica.watch();
        loop {
            seen.borrow_and_update();
            self.update_roster(&told);
            if seen.changed().await.is_err() {
                return;
            }
        }
    }

    fn update_roster(&self, told: &Roster) {
        let seen = self.replica.now();
        let roster = Roster::of(&seen.state, seen.applied.unwrap_or(0)).or_told(told);
        // Strangers are heard as long as any token is remembered: whoever comes too late is told
        // so by name, and not just refused.
        let join_open = seen.state.tokens().next().is_some();
        self.mesh.set_roster(roster, join_open);
    }
}

/// Whether another member knows `key` as a member: this node may have slept through its joining.
/// One that it knows to be removed is nobody's, whatever a member says that lags behind.
async fn vouched(mesh: Mesh, replica: Replica, key: proto::ids::NodeKey) -> bool {
    if replica.state().removed_node(&key).is_some() {
        return false;
    }
    let roster = mesh.roster();
    let here = mesh.here();
    let request = calls::body(&proto::wire::mesh::VouchRequest {
        key: key.0.to_vec(),
    });
    for node in roster.peers(here).into_iter().take(VOUCHERS) {
        let deadline = Instant::now() + VOUCH_TIMEOUT;
        let called = mesh.call(node, calls::VOUCH, request.clone(), deadline);
        let answer = called.await.ok().map(calls::answer);
        if let Some(Ok(proto::wire::mesh::VouchAnswer { member: true })) = answer {
            return true;
        }
    }
    false
}
