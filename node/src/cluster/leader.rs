//! What the leader does beside raft: verdicts about leases, and who votes.
//!
//! One task on every node, idle on all but the leader. It begins a term once the first entry of
//! that term is committed, looks every [`TICK`], proposes what the desk's book says about leases,
//! removes whom a recovery declared lost, and carries out one step of the autopilot at a time. It
//! ends the term the moment it sees another leader; a verdict is taken in the term it was found in, or
//! not at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::ids::NodeId;
use raft::command::Command;
use raft::group::{ChangeError, Group, Metrics, Role};
use raft::state::{Liveness, State};
use raft::types::{DiskId, Node};
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::autopilot::{Action, Contact, Listed, Picture, Settings, Steadiness, decide};
use super::desk::{self, Desk};
use super::keeper::LeaseHand;
use super::load::LoadTable;
use super::mesh::Mesh;
use super::propose::Proposer;
use super::replica::Replica;
use crate::base::chain::chain;

/// How often the leader looks: twice a second is well below every limit it acts on.
const TICK: Duration = Duration::from_millis(500);
/// Longest one step of the autopilot: a change of voters needs two commits.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a verdict may take to be committed; it is repeated where it was not.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a new leader asks whether its first entry is committed, before it looks again whether
/// it leads at all.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);

/// The leader's task.
pub(super) struct Leader {
    pub(super) group: Group<State>,
    pub(super) mesh: Mesh,
    pub(super) replica: Replica,
    pub(super) desk: Arc<Desk>,
    pub(super) loads: Arc<LoadTable>,
    pub(super) proposer: Proposer,
    pub(super) hand: LeaseHand,
    /// Tells the rest of the node whether it leads.
    pub(super) leads: watch::Sender<bool>,
}

/// What is remembered within a term.
struct Term {
    begun: Instant,
    steadiness: Steadiness,
    last_change: Option<Instant>,
}

impl Leader {
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut standing = self.group.watch_metrics();
        loop {
            let leading = standing.wait_for(|standing| standing.role == Role::Leader);
            let term = match stop.run_until_cancelled(leading).await {
                Some(Ok(standing)) => standing.term,
                Some(Err(_)) | None => return,
            };
            if stop.run_until_cancelled(self.lead(term)).await.is_none() {
                return;
            }
            self.desk.close();
            self.leads.send_replace(false);
        }
    }

    async fn lead(&self, number: u64) {
        while self.leads_in(number) {
            let confirmed = time::timeout(CONFIRM_TIMEOUT, self.group.read_index()).await;
            if matches!(confirmed, Ok(Ok(_))) {
                break;
            }
        }
        info!(term = number, "leading");
        self.leads.send_replace(true);
        let mut term = Term {
            begun: Instant::now(),
            steadiness: Steadiness::default(),
            last_change: None,
        };
        let mut ticks = time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.leads_in(number) {
            ticks.tick().await;
            self.judge(number).await;
            self.bury().await;
            self.steer(&mut term).await;
        }
        info!(term = number, "no longer leading");
    }

    fn leads_in(&self, term: u64) -> bool {
        let standing = *self.group.watch_metrics().borrow();
        standing.role == Role::Leader && standing.term == term
    }

    async fn judge(&self, term: u64) {
        for verdict in self.desk.verdicts(term) {
            info!(?verdict, "judging a node's lease");
            // Only in this term: a successor may have answered a renewal that this book lacks.
            let judged = self.proposer.stamped(verdict.command());
            let deadline = (Instant::now() + VERDICT_TIMEOUT).into_std();
            if let Err(err) = self.group.propose_in(term, judged, deadline).await {
                warn!(err = chain(&err), "could not tell the cluster about a node");
            }
        }
    }

    /// Removes those whom a recovery declared lost, once their leases and grace are over: what lived
    /// by the lease there is dead by then, and was given out anew. Where there was nothing, the
    /// lease is enough.
    async fn bury(&self) {
        let state = self.replica.state();
        let over = |node: &&raft::state::Node| {
            let settled = match node.liveness {
                Liveness::Alive => false,
                Liveness::Missing { .. } => state.reserved(node.id).sandboxes == 0,
                Liveness::Lost { .. } => true,
            };
            settled && state.removed_node(&node.key).is_some()
        };
        for node in state.nodes().filter(over) {
            info!(node = %node.id, name = node.name, "removing a node that was declared lost");
            let remove = Command::RemoveNode {
                node: node.id,
                declared_dead: true,
            };
            if let Err(err) = self.proposer.propose(remove).await {
                warn!(err = chain(&err), node = %node.id, "could not remove a lost node");
            }
        }
    }

    async fn steer(&self, term: &mut Term) {
        let metrics = self.group.metrics();
        let mut picture = self.picture(&metrics, term);
        term.steadiness.fill_in(desk::now(), &mut picture);
        let Some(action) = decide(&picture) else {
            return;
        };
        info!(?action, "changing the membership");
        let is_vote = matches!(action, Action::SetVoters(_));
        match self.carry_out(action, &metrics, &picture).await {
            Ok(()) if is_vote => term.last_change = Some(Instant::now()),
            Ok(()) => {}
            // The next look decides on what is there then.
            Err(err) => warn!(err = chain(&err), "could not change the membership"),
        }
    }

    fn picture(&self, metrics: &Metrics, term: &Term) -> Picture {
        let state = self.replica.state();
        let settings = state.settings();
        let members = |voter: bool| {
            let members = metrics.members.iter();
            let members = members.filter(move |(_, member)| member.voter == voter);
            members.map(|(id, _)| *id).collect()
        };
        let listed = |node: &raft::state::Node| {
            let known = metrics.members.get(&node.id);
            let other_disk = known.is_some_and(|member| member.node.disk != DiskId(node.disk));
            Some((node.id, Listed::of(node, other_disk)?))
        };
        Picture {
            here: self.mesh.here(),
            nodes: state.nodes().filter_map(listed).collect(),
            voters: members(true),
            learners: members(false),
            joint: metrics.is_joint,
            change_under_way: !metrics.is_settled,
            contacts: self.contacts(&state, metrics),
            last_log: metrics.last_log.unwrap_or(0),
            leader_for: term.begun.elapsed(),
            since_change: term.last_change.map(|at| at.elapsed()),
            settings: Settings::from(&settings),
        }
    }

    fn contacts(&self, state: &State, metrics: &Metrics) -> BTreeMap<NodeId, Contact> {
        let here = self.mesh.here();
        let others = state.nodes().map(|node| node.id);
        let members = metrics.members.keys().copied();
        let mut contacts = BTreeMap::new();
        for id in others.chain(members).filter(|id| *id != here) {
            let over_raft = metrics.heard.get(&id).copied();
            let by_report = self.loads.age(id);
            let heard = over_raft.into_iter().chain(by_report).min();
            let contact = Contact {
                heard,
                matched: metrics.matched.get(&id).copied(),
                steady_for: Duration::ZERO,
            };
            contacts.insert(id, contact);
        }
        contacts
    }

    async fn carry_out(
        &self,
        action: Action,
        metrics: &Metrics,
        picture: &Picture,
    ) -> Result<(), ChangeError> {
        let deadline = (Instant::now() + STEP_TIMEOUT).into_std();
        let stamp = metrics.stamp;
        match action {
            Action::FinishJoint => {
                let voters = picture.voters.clone();
                self.group.change_voters(voters, stamp, deadline).await
            }
            Action::SetVoters(voters) => {
                // The freedom from limits ends before there is anybody to share power with.
                // Without a lease to fall back to, the next look tries again.
                if !self.hand.share_power() {
                    debug!("no lease yet to share power under");
                    return Ok(());
                }
                self.group.change_voters(voters, stamp, deadline).await
            }
            Action::Remove(ids) => self.group.remove_members(ids, stamp, deadline).await,
            Action::TransferLeader(to) => self.group.transfer_leader(to).await,
            Action::AddLearner(id) => {
                let state = self.replica.state();
                let Some(node) = state.node(id) else {
                    debug!(%id, "gone before it was added");
                    return Ok(());
                };
                let mut record = Node::new(node.cluster_address.clone(), node.key);
                record.disk = DiskId(node.disk);
                self.group.add_learner(id, record, deadline).await
            }
        }
    }
}
