//! The raft group of this node as a [`Log`].
//!
//! In a cluster of one, this node is the leader once its group is bootstrapped; the moment after a
//! restart in which it is not yet is waited out. Forwarding to another leader joins here.

use std::fmt;
use std::time::Duration;

use raft::group::{Group, ProposeError};
use raft::state::State;
use tokio::sync::watch;
use tokio::time::{self, Instant};

use super::propose::{Log, LogError, LogFuture};
use super::view::Seen;
use crate::base::chain::chain;

/// Pause before a proposal is offered again while there is no leader: a small part of an election.
const NO_LEADER_RETRY: Duration = Duration::from_millis(20);

/// The raft group of this node.
#[derive(Clone)]
pub struct GroupLog(pub Group<State>);

impl fmt::Debug for GroupLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GroupLog").finish_non_exhaustive()
    }
}

impl Log for GroupLog {
    fn propose(&self, proposal: Vec<u8>, timeout: Duration) -> LogFuture {
        let group = self.0.clone();
        Box::pin(propose(group, proposal, timeout))
    }

    fn seen(&self) -> watch::Receiver<Seen> {
        self.0.state()
    }
}

async fn propose(
    group: Group<State>,
    proposal: Vec<u8>,
    timeout: Duration,
) -> Result<Vec<u8>, LogError> {
    let deadline = Instant::now() + timeout;
    loop {
        match group.propose(proposal.clone(), deadline.into_std()).await {
            Ok(proposed) => return Ok(proposed.answer),
            Err(ProposeError::NotLeader { .. }) if Instant::now() + NO_LEADER_RETRY < deadline => {
                time::sleep(NO_LEADER_RETRY).await;
            }
            Err(
                ProposeError::NotLeader { .. }
                | ProposeError::Timeout
                | ProposeError::LeaderChanged,
            ) => return Err(LogError::Unknown { waited: timeout }),
            Err(err) => return Err(LogError::Stopped(chain(&err))),
        }
    }
}
