//! What the interface needs to know of the cluster beside the replicated state: how its log is
//! ordered, how busy its nodes are, and how a join token is spelled.
//!
//! The running node fills this in from its raft group, its table of load reports and its keys;
//! [`Alone`] is the answer of a cluster of one.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

use proto::ids::{NodeId, TeamId, TokenId};
use proto::units::Stamp;

use crate::cluster::View;
use crate::cluster::liveness::Hint;

/// A future that owns what it needs.
pub type LinearizeFuture = Pin<Box<dyn Future<Output = Result<(), NoQuorum>> + Send>>;

/// The cluster as far as this node can tell. None of these may block.
pub trait ClusterInfo: fmt::Debug + Send + Sync + 'static {
    /// Who orders the log.
    fn standing(&self) -> Standing;

    /// The newest load report of each node that was heard, this one included.
    fn loads(&self) -> Vec<Hint>;

    /// Waits until this node's state holds everything that was acknowledged anywhere before the
    /// call.
    fn linearize(&self) -> LinearizeFuture;

    /// Makes the secret of a join token and spells it out, with whom to ask. Nothing is proposed.
    ///
    /// # Errors
    /// Why this node cannot, in words.
    fn mint(&self, wanted: &TokenTerms) -> Result<Minted, String>;
}

/// Who orders the log, as one node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Who leads, as far as is known.
    pub leader: Option<NodeId>,
    /// Since which election.
    pub term: u64,
    /// Whose votes count.
    pub voters: BTreeSet<NodeId>,
    /// Who receives the log without a vote.
    pub learners: BTreeSet<NodeId>,
    /// Whether a change of the members is under way; then the voters of before and after are named.
    pub is_changing: bool,
    /// Whether most voters were in touch a moment ago, as far as this node can tell.
    pub has_quorum: bool,
}

/// No leader confirmed in time that it leads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no quorum confirmed that this is the newest state: {0}")]
pub struct NoQuorum(pub String);

/// What a join token is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenTerms {
    /// Which token.
    pub id: TokenId,
    /// The team whose host joins; `None` for a full member.
    pub team: Option<TeamId>,
    /// When it ends.
    pub expires_at: Stamp,
}

/// A join token that was made just now.
#[derive(Clone)]
pub struct Minted {
    /// What checks the secret, for the log.
    pub public_key: [u8; 32],
    /// The whole token, secret included: to be told once.
    pub text: String,
}

impl fmt::Debug for Minted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Minted(secret)")
    }
}

/// A cluster of one: this node votes, leads and hears itself.
#[derive(Clone, Debug)]
pub(super) struct Alone {
    pub(super) here: NodeId,
    pub(super) view: View,
}

impl ClusterInfo for Alone {
    fn standing(&self) -> Standing {
        let voters = self.view.state().nodes().map(|node| node.id).collect();
        Standing {
            leader: Some(self.here),
            term: 1,
            voters,
            learners: BTreeSet::new(),
            is_changing: false,
            has_quorum: true,
        }
    }

    fn loads(&self) -> Vec<Hint> {
        Vec::new()
    }

    fn linearize(&self) -> LinearizeFuture {
        // Nobody else acknowledges anything.
        Box::pin(std::future::ready(Ok(())))
    }

    fn mint(&self, _: &TokenTerms) -> Result<Minted, String> {
        Err("this node takes no others in".into())
    }
}
