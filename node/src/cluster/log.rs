//! Proposals and reads from any node: to raft where this node leads, over the mesh to the leader
//! where it does not.
//!
//! A proposal is never parked with a node that may be dead: an attempt lasts [`ATTEMPT`], or until
//! the leader is known to be another, and is then made again with the same bytes. That is safe
//! because every command is idempotent. Those that overwrite are not made again once the first
//! attempt may have been taken: the second would undo what others have written in between. So that one
//! lasts as long as there is time, and a client whose leader is lost meanwhile is told that nobody
//! knows. By the time an answer is returned its change is visible here,
//! so that a client reads what it wrote from the node it wrote through.

use std::fmt;
use std::time::Duration;

use proto::ids::NodeId;
use proto::wire::mesh as wire;
use raft::command::{Command, Proposal};
use raft::group::{Group, ProposeError, ReadError, Role};
use raft::state::State;
use tokio::sync::watch;
use tokio::time::{self, Instant};
use transport::RpcError;

use super::calls;
use super::mesh::{Mesh, MeshError};
use super::propose::{Log, LogError, LogFuture, ReadFuture};
use super::replica::Replica;
use super::view::Seen;
use crate::base::chain::chain;

/// Longest one attempt with one leader: more than a slow disk takes for a commit, and short enough
/// that the death of a leader costs little more than the election.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Pause before the next attempt while there is no leader: a small part of an election.
const NO_LEADER_RETRY: Duration = Duration::from_millis(20);

/// The cluster's log as seen from this node.
#[derive(Clone)]
pub struct ClusterLog {
    group: Group<State>,
    mesh: Mesh,
    replica: Replica,
}

impl fmt::Debug for ClusterLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClusterLog").finish_non_exhaustive()
    }
}

/// What one attempt came to.
enum Attempt<T> {
    Done(T),
    /// Definitely not taken.
    NotTaken,
    /// It may have been taken.
    Unknown,
    Stopped(String),
}

impl Log for ClusterLog {
    fn propose(&self, proposal: Vec<u8>, timeout: Duration) -> LogFuture {
        let this = self.clone();
        Box::pin(async move {
            let proposed = this.propose_anywhere(proposal, timeout).await;
            proposed.map(|(_, answer)| answer)
        })
    }

    fn read_index(&self, timeout: Duration) -> ReadFuture {
        let this = self.clone();
        Box::pin(async move { this.read_anywhere(timeout).await })
    }

    fn seen(&self) -> watch::Receiver<Seen> {
        self.replica.watch()
    }
}

impl ClusterLog {
    /// The log of `group`, whose other members are reached over `mesh`.
    #[must_use]
    pub const fn new(group: Group<State>, mesh: Mesh, replica: Replica) -> Self {
        Self {
            group,
            mesh,
            replica,
        }
    }

    /// Has `proposal` applied by whoever leads; returns its index and answer once they show here.
    pub(super) async fn propose_anywhere(
        &self,
        proposal: Vec<u8>,
        timeout: Duration,
    ) -> Result<(u64, Vec<u8>), LogError> {
        let begun = Instant::now();
        let deadline = begun + timeout;
        let overwrites = overwrites(&proposal);
        let mut unknown = false;
        while Instant::now() < deadline {
            let attempt = match overwrites {
                true => deadline,
                false => deadline.min(Instant::now() + ATTEMPT),
            };
            let came_to = match self.leader() {
                Some(leader) if leader == self.mesh.here() => {
                    self.propose_here(proposal.clone(), attempt).await
                }
                leader => self.propose_there(leader, &proposal, attempt).await,
            };
            match came_to {
                Attempt::Done((index, answer)) => {
                    // It is durable and applied where it was answered; a node that lags answers
                    // late rather than showing its client an older state.
                    self.replica.wait_applied(index, deadline).await;
                    return Ok((index, answer));
                }
                Attempt::Stopped(why) => return Err(LogError::Stopped(why)),
                Attempt::Unknown if overwrites => {
                    let waited = begun.elapsed();
                    return Err(LogError::Unknown { waited });
                }
                Attempt::Unknown => unknown = true,
                Attempt::NotTaken => time::sleep(NO_LEADER_RETRY).await,
            }
        }
        let waited = timeout;
        Err(if unknown {
            LogError::Unknown { waited }
        } else {
            LogError::NoLeader { waited }
        })
    }

    /// The entry that a read must have seen in order to be current; it is applied here.
    async fn read_anywhere(&self, timeout: Duration) -> Result<u64, LogError> {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            let attempt = deadline.min(Instant::now() + ATTEMPT);
            let came_to = match self.leader() {
                Some(leader) if leader == self.mesh.here() => self.read_here(attempt).await,
                leader => self.read_there(leader, attempt).await,
            };
            match came_to {
                Attempt::Done(index) if self.replica.wait_applied(index, deadline).await => {
                    return Ok(index);
                }
                Attempt::Stopped(why) => return Err(LogError::Stopped(why)),
                Attempt::Done(_) | Attempt::Unknown | Attempt::NotTaken => {
                    time::sleep(NO_LEADER_RETRY).await;
                }
            }
        }
        Err(LogError::NoLeader { waited: timeout })
    }

    fn leader(&self) -> Option<NodeId> {
        if self.group.role() == Role::Leader {
            return Some(self.mesh.here());
        }
        // Who led when this node was dropped from raft's configuration may lead no more; and one that
        // led and does not know by whom it was followed must not ask itself.
        let here = self.mesh.here();
        let standing = *self.group.watch_metrics().borrow();
        standing
            .leader
            .filter(|leader| *leader != here && self.belongs())
    }

    async fn propose_here(&self, proposal: Vec<u8>, deadline: Instant) -> Attempt<(u64, Vec<u8>)> {
        match self.group.propose(proposal, deadline.into_std()).await {
            Ok(proposed) => Attempt::Done((proposed.index, proposed.answer)),
            Err(ProposeError::NotLeader { .. }) => Attempt::NotTaken,
            Err(ProposeError::Timeout | ProposeError::LeaderChanged) => Attempt::Unknown,
            Err(err) => Attempt::Stopped(chain(&err)),
        }
    }

    async fn propose_there(
        &self,
        leader: Option<NodeId>,
        proposal: &[u8],
        deadline: Instant,
    ) -> Attempt<(u64, Vec<u8>)> {
        let Some((node, last_hop)) = self.ask(leader) else {
            return Attempt::NotTaken;
        };
        let request = wire::ProposeRequest {
            proposal: proposal.to_vec(),
            last_hop,
        };
        let called = self
            .mesh
            .call(node, calls::PROPOSE, calls::body(&request), deadline);
        match self.unless_deposed(leader, called).await {
            Some(Ok(answer)) => match calls::answer::<wire::ProposeAnswer>(answer) {
                Ok(answer) => Attempt::Done((answer.index, answer.answer)),
                Err(_) => Attempt::Unknown,
            },
            Some(Err(err)) if !err.may_have_acted() => Attempt::NotTaken,
            Some(Err(_)) | None => Attempt::Unknown,
        }
    }

    async fn read_here(&self, deadline: Instant) -> Attempt<u64> {
        match time::timeout_at(deadline, self.group.read_index()).await {
            Ok(Ok(index)) => Attempt::Done(index),
            Ok(Err(ReadError::Stopped | ReadError::Fatal(_))) => {
                Attempt::Stopped("the log has stopped".into())
            }
            Ok(Err(_)) | Err(_) => Attempt::NotTaken,
        }
    }

    async fn read_there(&self, leader: Option<NodeId>, deadline: Instant) -> Attempt<u64> {
        let Some((node, last_hop)) = self.ask(leader) else {
            return Attempt::NotTaken;
        };
        let request = calls::body(&wire::ReadRequest { last_hop });
        let called = self.mesh.call(node, calls::READ_INDEX, request, deadline);
        let answer = match self.unless_deposed(leader, called).await {
            Some(Ok(answer)) => calls::answer::<wire::ReadAnswer>(answer).ok(),
            Some(Err(_)) | None => None,
        };
        answer.map_or(Attempt::NotTaken, |answer| Attempt::Done(answer.index))
    }

    fn belongs(&self) -> bool {
        let members = self.group.metrics().members;
        self.replica.feed().belongs(self.mesh.here(), &members)
    }

    /// Whom to ask: the leader; or, from outside raft's configuration, anybody, who may send it on
    /// once.
    fn ask(&self, leader: Option<NodeId>) -> Option<(NodeId, bool)> {
        if let Some(leader) = leader {
            return Some((leader, true));
        }
        if self.belongs() {
            // A member hears of a new leader by itself, within an election.
            return None;
        }
        let others = self.mesh.roster().peers(self.mesh.here());
        let at = rand::random_range(0..others.len().max(1));
        others.get(at).map(|node| (*node, false))
    }

    /// Waits for `call`, unless another leader than the one asked comes up.
    async fn unless_deposed<T>(
        &self,
        leader: Option<NodeId>,
        call: impl Future<Output = Result<T, MeshError>>,
    ) -> Option<Result<T, MeshError>> {
        let mut standing = self.group.watch_metrics();
        let deposed = async {
            let other = standing.wait_for(|now| {
                leader.is_some() && now.leader.is_some_and(|now| Some(now) != leader)
            });
            if other.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            answer = call => Some(answer),
            () = deposed => None,
        }
    }
}

/// Whether a proposal that is applied twice could undo what somebody else wrote in between.
fn overwrites(proposal: &[u8]) -> bool {
    let proposal = Proposal::decode(proposal);
    proposal.is_ok_and(|proposal| {
        matches!(
            proposal.command.change(),
            Command::PutSettings(_) | Command::ChangeNode { .. }
        )
    })
}

/// What a node that does not lead says to whoever took it for the leader.
pub(super) fn not_leader() -> RpcError {
    RpcError::rejected(calls::NOT_LEADER)
}
