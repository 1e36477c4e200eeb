//! What a member answers to others: proposals and reads for the leader, renewals, the load table,
//! entries for mirrors, slices for hosts of one team.
//!
//! Every caller has proven its key and is on the member list; a host of one team is on it too, and
//! may do only what concerns itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::ids::{NodeId, NodeKey, SandboxId, TeamId};
use proto::wire::mesh as wire;
use raft::command::{Command, Proposal};
use raft::group::{EntriesError, Group, ProposeError};
use raft::state::{Actor, State};
use tokio::time::{self, Instant};
use transport::{Call, Handler, RpcError};

use super::calls;
use super::desk::{self, Desk, NotGranted};
use super::hearsay::Told;
use super::lease::Renewal;
use super::load::LoadTable;
use super::log::{ClusterLog, not_leader};
use super::mesh::Mesh;
use super::replica::Replica;
use super::slices::SentSlices;
use crate::base::chain::chain;

/// What is kept of a caller's patience for the way back.
const WAY_BACK: Duration = Duration::from_millis(50);
/// Longest a mirror's question is held open while there is nothing new. Its answer also says that
/// this node is alive.
const PULL_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of entries in one answer to a mirror; well below the largest frame.
const PULL_BYTES: usize = 1 << 20;

/// Answers the cluster's calls.
pub(super) struct ClusterCalls {
    pub(super) group: Group<State>,
    pub(super) mesh: Mesh,
    pub(super) log: ClusterLog,
    pub(super) replica: Replica,
    pub(super) desk: Arc<Desk>,
    pub(super) loads: Arc<LoadTable>,
    pub(super) slices: SentSlices,
}

impl Handler for ClusterCalls {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        let patience = call.patience.saturating_sub(WAY_BACK);
        let deadline = Instant::now() + patience;
        let from = self
            .mesh
            .node_of(&call.peer)
            .ok_or_else(|| RpcError::rejected("the caller is no member"))?;
        match call.method {
            calls::PROPOSE => {
                check_listed(&self.replica.state(), from)?;
                self.propose(from, call.body, patience).await
            }
            calls::READ_INDEX => self.read_index(call.body, deadline).await,
            calls::RENEW => self.renew(from, call.body, deadline).await,
            calls::VOUCH => self.vouch(call.body),
            calls::LOAD_TABLE => self.load_table(from),
            calls::PULL => self.pull(from, call.body, deadline).await,
            method => Err(RpcError::NotServed { method }),
        }
    }
}

impl ClusterCalls {
    async fn propose(
        &self,
        from: NodeId,
        body: Bytes,
        patience: Duration,
    ) -> Result<Bytes, RpcError> {
        let request: wire::ProposeRequest = calls::request(body)?;
        // Whatever is in the log must be applied by everybody, so what nobody can read must not get
        // there.
        let proposal = Proposal::decode(&request.proposal)
            .map_err(|err| RpcError::rejected(err.to_string()))?;
        self.permit(from, &proposal.command)?;
        let (index, answer) = if request.last_hop {
            let deadline = Instant::now() + patience;
            let proposed = self.group.propose(request.proposal, deadline.into_std());
            let proposed = proposed.await.map_err(refused)?;
            (proposed.index, proposed.answer)
        } else {
            let proposed = self.log.propose_anywhere(request.proposal, patience);
            proposed
                .await
                .map_err(|err| RpcError::failed(err.to_string()))?
        };
        Ok(calls::body(&wire::ProposeAnswer { index, answer }))
    }

    /// A host of one team may speak for itself and its own sandboxes only; nobody may tell a leader
    /// what only a leader finds out, or what is decided before there are others.
    fn permit(&self, from: NodeId, command: &Command) -> Result<(), RpcError> {
        let state = self.replica.state();
        if is_local(command.change()) {
            return Err(RpcError::rejected("this is for the leader itself to say"));
        }
        let Some(team) = state.node(from).and_then(|node| node.team) else {
            return Ok(());
        };
        if may_of_team(&state, from, team, command.change()) && is_of_team(&state, team, command) {
            return Ok(());
        }
        Err(RpcError::rejected("a host of one team may not change that"))
    }

    async fn read_index(&self, body: Bytes, deadline: Instant) -> Result<Bytes, RpcError> {
        let request: wire::ReadRequest = calls::request(body)?;
        let index = if request.last_hop {
            let read = time::timeout_at(deadline, self.group.read_index()).await;
            read.ok().and_then(Result::ok).ok_or_else(not_leader)?
        } else {
            use super::propose::Log as _;
            let patience = deadline.saturating_duration_since(Instant::now());
            let read = self.log.read_index(patience).await;
            read.map_err(|err| RpcError::failed(err.to_string()))?
        };
        Ok(calls::body(&wire::ReadAnswer { index }))
    }

    async fn renew(&self, from: NodeId, body: Bytes, deadline: Instant) -> Result<Bytes, RpcError> {
        let request: wire::RenewRequest = calls::request(body)?;
        let node = NodeId(request.node);
        let state = self.replica.state();
        let speaks_for_others = state.node(from).is_some_and(|node| node.team.is_none());
        if node != from && !speaks_for_others {
            return Err(RpcError::rejected(
                "a host of one team renews its own lease",
            ));
        }
        let leader = self.group.watch_metrics().borrow().leader;
        let elsewhere = leader.filter(|leader| *leader != self.mesh.here());
        if let Some(leader) = elsewhere.filter(|_| !request.last_hop) {
            let onward = wire::RenewRequest {
                last_hop: true,
                ..request
            };
            let called = self
                .mesh
                .call(leader, calls::RENEW, calls::body(&onward), deadline);
            return called.await.map_err(|err| RpcError::failed(chain(&err)));
        }
        let renewal = Renewal {
            incarnation: request.incarnation,
            seq: request.seq,
        };
        let granted = self.desk.renew(node, renewal, deadline).await;
        let times = granted.map_err(|why| match why {
            NotGranted::NoQuorum => RpcError::failed(why.to_string()),
            NotGranted::NotLeader | NotGranted::Refused(_) => RpcError::rejected(why.to_string()),
        })?;
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        Ok(calls::body(&wire::RenewAnswer {
            seq: request.seq,
            ttl_ms: millis(times.ttl()),
            grace_ms: millis(times.grace()),
        }))
    }

    fn vouch(&self, body: Bytes) -> Result<Bytes, RpcError> {
        let request: wire::VouchRequest = calls::request(body)?;
        let key = <[u8; 32]>::try_from(request.key.as_slice()).map(NodeKey);
        let state = self.replica.state();
        let member = key.is_ok_and(|key| may_vouch_for(&state, &key));
        Ok(calls::body(&wire::VouchAnswer { member }))
    }

    async fn pull(&self, from: NodeId, body: Bytes, deadline: Instant) -> Result<Bytes, RpcError> {
        let request: wire::PullRequest = calls::request(body)?;
        let state = self.replica.state();
        if !may_pull(&state, &request) {
            return Err(RpcError::rejected(
                "of another cluster, or of this one and past the point it was recovered from: \
                 remove the data directory and join anew",
            ));
        }
        let Some(node) = state.node(from) else {
            return Err(RpcError::rejected("the asker is no member"));
        };
        let until = deadline.min(Instant::now() + PULL_PATIENCE);
        self.replica.wait_applied(request.from, until).await;
        let mut answer = wire::PullAnswer {
            applied: self.replica.applied(),
            ..wire::PullAnswer::default()
        };
        let feed = self.replica.feed();
        let told = Told::by(self.mesh.here(), &self.group.metrics(), feed);
        told.write(&mut answer);
        if node.team.is_some() {
            self.pull_slice(from, &request, &told.voters, &mut answer)?;
            return Ok(calls::body(&answer));
        }
        match self.group.entries(request.from, PULL_BYTES).await {
            Ok(entries) => {
                answer.entries = entries
                    .entries
                    .into_iter()
                    .map(|(index, proposal)| wire::PulledEntry {
                        index,
                        proposal: proposal.map(|bytes| bytes.to_vec()),
                    })
                    .collect();
            }
            Err(EntriesError::Purged { .. }) => answer.snapshot_needed = true,
            Err(err) => return Err(RpcError::failed(err.to_string())),
        }
        Ok(calls::body(&answer))
    }
}

impl ClusterCalls {
    /// Other nodes' load is none of a host's business.
    fn load_table(&self, from: NodeId) -> Result<Bytes, RpcError> {
        let state = self.replica.state();
        if state.node(from).is_none_or(|node| node.team.is_some()) {
            return Err(RpcError::rejected("the load of nodes is for full members"));
        }
        Ok(self.loads.encode().into())
    }

    /// Fills in what a host of one team lacks of its slice.
    fn pull_slice(
        &self,
        host: NodeId,
        request: &wire::PullRequest,
        voters: &BTreeSet<NodeId>,
        answer: &mut wire::PullAnswer,
    ) -> Result<(), RpcError> {
        if voters.is_empty() {
            return Err(RpcError::rejected("this node does not know who votes"));
        }
        let seen = self.replica.now();
        let slice = seen.state.sliced(host, voters);
        let slice = slice.ok_or_else(|| RpcError::rejected("the asker is no host any more"))?;
        self.slices
            .keep_only(|host| seen.state.node(host).is_some());
        answer.applied = seen.applied.unwrap_or(0);
        answer.slice = Some(self.slices.next(host, request.slice_mark, &slice));
        Ok(())
    }
}

/// Whether a host of `team` may propose that: what concerns itself, and what its team may want.
fn may_of_team(state: &State, from: NodeId, team: TeamId, command: &Command) -> bool {
    let known = |id: &SandboxId| state.sandbox(*id);
    let is_ours = |id| known(id).is_some_and(|it| it.team == team);
    match command {
        Command::AdmitNode(node) => node.id == from,
        Command::ReportSandbox { id, node, .. } => {
            *node == from && known(id).is_some_and(|it| it.owner == from)
        }
        Command::ChangeSandbox { id, .. }
        | Command::LinkSandbox { id, .. }
        | Command::StopSandbox { id, .. }
        | Command::PauseSandbox { id, .. }
        | Command::ResumeSandbox { id, .. } => is_ours(id),
        Command::CheckpointSandbox(asked) => is_ours(&asked.id),
        Command::DropNamed(which) => which.team == team,
        Command::HoldSnapshot { id, node, .. } => {
            *node == from && state.snapshot(*id).is_some_and(|it| it.team == team)
        }
        Command::CreateSandbox { team: for_team, .. } => *for_team == team,
        _ => false,
    }
}

/// Whether who is said to have asked, if anybody, has a key of `team`: a host of one team is somebody else's
/// machine, and could name anybody.
fn is_of_team(state: &State, team: TeamId, command: &Command) -> bool {
    let Command::By(attributed) = command else {
        return true;
    };
    match &attributed.actor {
        Actor::System => false,
        Actor::Key { id, .. } => state.key(*id).is_some_and(|key| key.team == team),
    }
}

/// What a proposer may change depends on what it is, which this node may not have applied yet: it
/// was told at its own join whom to let in, and not what they are.
fn check_listed(state: &State, from: NodeId) -> Result<(), RpcError> {
    match state.node(from) {
        Some(_) => Ok(()),
        None => Err(RpcError::rejected("the proposer is not known here yet")),
    }
}

/// Whether others may let `key` in on this node's word. A host of one team has to wait until they
/// list it themselves: they could not tell it from a full member, which takes part in raft.
fn may_vouch_for(state: &State, key: &NodeKey) -> bool {
    let node = state.node_by_key(key);
    node.is_some_and(|node| node.team.is_none()) && state.removed_node(key).is_none()
}

/// Whether entries follow on what the asker has: it is of this cluster, or of what this cluster was
/// and has seen nothing that was lost with its quorum.
fn may_pull(state: &State, request: &wire::PullRequest) -> bool {
    let asker = request.cluster.as_slice();
    state.cluster().is_some_and(|ours| {
        let mut former = ours.former.iter();
        ours.id.0 == asker
            || former.any(|past| past.id.0 == asker && request.from <= past.last.saturating_add(1))
    })
}

/// What a proposer is told: only a plain no may be taken as "nothing happened".
fn refused(err: ProposeError) -> RpcError {
    match err {
        ProposeError::NotLeader { .. } => not_leader(),
        ProposeError::TooLarge { .. } => RpcError::rejected(err.to_string()),
        err => RpcError::failed(err.to_string()),
    }
}

/// The instant at which a load report came in.
pub(super) fn received_at() -> super::lease::Tick {
    desk::now()
}

/// What a node proposes to itself, and takes from no other.
const fn is_local(command: &Command) -> bool {
    matches!(
        command,
        Command::JudgeNode { .. } | Command::FoundCluster { .. } | Command::RecoverCluster { .. }
    )
}

#[cfg(test)]
mod tests {
    use proto::epoch::Epoch;
    use proto::ids::{SnapshotId, TokenId};
    use proto::units::{Mib, Stamp};
    use raft::command::{Report, StopCause};
    use raft::state::{GuestVersions, Node, Resources, SandboxSpec, Sealed, Template, Token};

    use super::*;

    const FULL: NodeKey = NodeKey([1; 32]);
    const HOST: NodeKey = NodeKey([2; 32]);

    /// A full member, node 1, and a host of one team, node 3.
    fn state() -> State {
        let node = |id: u64, key| Node {
            id: NodeId(id),
            key,
            ..Node::default()
        };
        let token = Token {
            id: TokenId([5; 16]),
            public_key: [5; 32],
            team: Some(TeamId([7; 16])),
            expires_at: Stamp(9),
            uses_left: 1,
            created_at: Stamp(0),
            created_by: "a person".into(),
            revoked: false,
            redeemed: vec![],
        };
        let redeem = Command::RedeemToken {
            token: token.id,
            node: node(0, HOST),
        };
        let commands = [
            Command::AdmitNode(node(1, FULL)),
            Command::PutToken(token),
            redeem,
        ];
        let mut state = State::default();
        for (index, command) in (1..).zip(commands) {
            let at = Stamp(index);
            let applied = state.apply(index, Proposal { at, command });
            applied.answer.expect("the command fits");
        }
        state
    }

    const TEAM: TeamId = TeamId([7; 16]);
    const HOST_ID: NodeId = NodeId(3);

    /// Admits node 1 with room, and has a sandbox of each of two teams paused there.
    fn with_paused() -> State {
        let mut state = state();
        let mut index = 10;
        let mut act = |command| {
            index += 1;
            let at = Stamp(index);
            let applied = state.apply(index, Proposal { at, command });
            applied.answer.expect("the command fits");
            index
        };
        let member = Node {
            id: NodeId(1),
            key: FULL,
            capacity: Resources {
                vcpus: 8,
                memory: Mib(4096),
                disk: Mib(9000),
                sandboxes: 8,
            },
            templates: [("minimal".into(), [0; 32])].into(),
            ..Node::default()
        };
        act(Command::AdmitNode(member));
        act(Command::PutTemplate(Template {
            name: "minimal".into(),
            digest: [0; 32],
            disk: Mib(1),
            size_bytes: 1,
            created_at: Stamp(0),
        }));
        for (n, team) in [(1, TEAM), (2, TeamId([8; 16]))] {
            let id = SandboxId([n; 16]);
            let spec = SandboxSpec {
                template: "minimal".into(),
                vcpus: 1,
                memory: Mib(256),
                disk: Mib(1),
                ..SandboxSpec::default()
            };
            let hints = Vec::new();
            let epoch = Epoch(act(Command::CreateSandbox {
                id,
                team,
                spec,
                hints,
            }));
            let report = |report| Command::ReportSandbox {
                id,
                epoch,
                node: NodeId(1),
                report,
            };
            act(report(Report::Running(GuestVersions::default())));
            let pause = act(Command::PauseSandbox {
                id,
                epoch,
                cause: StopCause::Asked,
                then_on: None,
            });
            act(report(Report::Sealed(Sealed {
                id: SnapshotId([n; 16]),
                pause,
                ..Sealed::default()
            })));
        }
        state
    }

    #[test]
    fn a_host_pauses_and_resumes_what_is_its_teams_and_nothing_else() {
        let state = with_paused();
        for (n, fine) in [(1, true), (2, false), (9, false)] {
            let id = SandboxId([n; 16]);
            let pause = Command::PauseSandbox {
                id,
                epoch: Epoch(1),
                cause: StopCause::Asked,
                then_on: None,
            };
            let resume = Command::ResumeSandbox {
                id,
                snapshot: SnapshotId([n; 16]),
                to: None,
                hints: Vec::new(),
            };
            for command in [pause, resume] {
                let may = may_of_team(&state, HOST_ID, TEAM, &command);
                assert_eq!(may, fine, "{command:?}");
            }
        }
    }

    #[test]
    fn a_host_speaks_of_its_own_copies_of_its_teams_snapshots() {
        let state = with_paused();
        let hold = |n: u8, node, holds| Command::HoldSnapshot {
            id: SnapshotId([n; 16]),
            node,
            holds,
        };
        for holds in [true, false] {
            let may = |command: &Command| may_of_team(&state, HOST_ID, TEAM, command);
            assert!(may(&hold(1, HOST_ID, holds)));
            assert!(!may(&hold(1, NodeId(1), holds)), "of another node");
            assert!(!may(&hold(2, HOST_ID, holds)), "of another team");
            assert!(!may(&hold(9, HOST_ID, holds)), "of nothing");
        }
    }

    /// Else a host could change anything by way of a node that has just joined.
    #[test]
    fn who_is_not_listed_yet_proposes_nothing() {
        assert!(check_listed(&State::default(), NodeId(3)).is_err());
        assert!(check_listed(&state(), NodeId(3)).is_ok());
        assert!(check_listed(&state(), NodeId(1)).is_ok());
    }

    #[test]
    fn full_members_are_vouched_for_and_hosts_are_not() {
        let state = state();
        assert!(may_vouch_for(&state, &FULL));
        assert!(!may_vouch_for(&state, &HOST));
        assert!(!may_vouch_for(&state, &NodeKey([9; 32])));
    }
}
