//! Whether a cluster may be recovered from one survivor, and what that would do. Pure.
//!
//! A person declares nodes dead for good; this file checks that it makes sense: those who are left
//! are no quorum, this node is one of them, and nobody is named who does not exist. What it cannot
//! check is whether another survivor has more of the log, and whether the lost are really dead. So
//! it says both.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{ClusterId, NodeId};
use raft::group::{Inspected, Position};

/// What a stopped node's folder says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Whose it is.
    pub node: NodeId,
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// Its log.
    pub log: Inspected,
}

/// What a recovery would make of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The only voter from then on.
    pub survivor: NodeId,
    /// The cluster as it is called now.
    pub cluster: ClusterId,
    /// The last entry that goes on.
    pub last: Position,
    /// Who is shut out for ever, and where it was reached.
    pub lost: BTreeMap<NodeId, String>,
    /// Who follows, and where it is reached.
    pub kept: BTreeMap<NodeId, String>,
}

/// Why a recovery would be wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// Nobody is named.
    #[error("nobody is declared lost; name every node that is dead for good with --lost")]
    NobodyLost,
    /// The survivor itself is named.
    #[error("{0} is this node; run this on a node that is not lost")]
    ThisNode(NodeId),
    /// The log knows no such node.
    #[error("{node} is not in the log's membership, which has {known}")]
    Unknown {
        /// Who was named.
        node: NodeId,
        /// Who there is.
        known: String,
    },
    /// The folder is of a node that takes part in nothing.
    #[error("{0} is no member by its own log: recover another survivor")]
    NoMember(NodeId),
    /// Enough voters are left.
    #[error(
        "the cluster is not lost: of its voters {voters}, {left} are left, which is a quorum; start \
         them, and remove dead nodes with `wrenn node remove`"
    )]
    QuorumLeft {
        /// All of them.
        voters: String,
        /// Those not declared lost.
        left: String,
    },
}

/// What recovering from the surveyed node, without those in `lost`, would do.
///
/// # Errors
/// [`Refused`].
pub fn plan(survey: &Survey, lost: &BTreeSet<NodeId>) -> Result<Plan, Refused> {
    let (here, log) = (survey.node, &survey.log);
    if !log.members.contains_key(&here) {
        return Err(Refused::NoMember(here));
    }
    if lost.contains(&here) {
        return Err(Refused::ThisNode(here));
    }
    if lost.is_empty() {
        return Err(Refused::NobodyLost);
    }
    if let Some(node) = lost.iter().find(|id| !log.members.contains_key(id)) {
        return Err(Refused::Unknown {
            node: *node,
            known: list(log.members.keys()),
        });
    }
    let left: BTreeSet<NodeId> = log.voters.difference(lost).copied().collect();
    if left.len() * 2 > log.voters.len() {
        return Err(Refused::QuorumLeft {
            voters: list(&log.voters),
            left: list(&left),
        });
    }
    let of = |wanted: &dyn Fn(&NodeId) -> bool| {
        let members = log.members.iter().filter(|(id, _)| wanted(id));
        members
            .map(|(id, node)| (*id, node.address.clone()))
            .collect()
    };
    Ok(Plan {
        survivor: here,
        cluster: survey.cluster,
        last: log.last,
        lost: of(&|id| lost.contains(id)),
        kept: of(&|id| *id != here && !lost.contains(id)),
    })
}

/// Ids for people.
pub fn list<'a>(ids: impl IntoIterator<Item = &'a NodeId>) -> String {
    let ids: Vec<String> = ids.into_iter().map(ToString::to_string).collect();
    ids.join(", ")
}

#[cfg(test)]
mod tests {
    use raft::types::{DiskId, Node};

    use super::*;

    fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    fn survey(here: u64, voters: &[u64], learners: &[u64]) -> Survey {
        let member = |id: &u64| {
            let node = Node {
                address: format!("10.0.0.{id}:7321"),
                ..Node::default()
            };
            (NodeId(*id), node)
        };
        Survey {
            node: NodeId(here),
            cluster: ClusterId([9; 16]),
            log: Inspected {
                last: Position { term: 2, index: 40 },
                term: 3,
                disk: DiskId::default(),
                voters: ids(voters),
                members: voters.iter().chain(learners).map(member).collect(),
            },
        }
    }

    #[test]
    fn the_survivor_goes_on_and_whoever_is_not_lost_follows() {
        let survey = survey(3, &[1, 2, 3, 4, 5], &[6]);
        let planned = plan(&survey, &ids(&[1, 2, 4])).expect("a majority is lost");
        let keys = |of: &BTreeMap<NodeId, String>| of.keys().copied().collect::<BTreeSet<_>>();
        assert_eq!(planned.survivor, NodeId(3));
        assert_eq!(keys(&planned.lost), ids(&[1, 2, 4]));
        assert_eq!(keys(&planned.kept), ids(&[5, 6]));
        assert_eq!(planned.kept[&NodeId(5)], "10.0.0.5:7321");
    }

    #[test]
    fn half_of_the_voters_is_no_quorum_and_more_is_left_alone() {
        let two = survey(1, &[1, 2], &[]);
        assert!(plan(&two, &ids(&[2])).is_ok());
        let three = survey(1, &[1, 2, 3], &[]);
        let refused = plan(&three, &ids(&[2])).expect_err("two of three are left");
        assert!(matches!(refused, Refused::QuorumLeft { .. }));
        assert!(refused.to_string().contains("node-1, node-3 are left"));
    }

    #[test]
    fn a_learner_may_be_all_that_is_left() {
        let survey = survey(4, &[1, 2, 3], &[4]);
        assert!(plan(&survey, &ids(&[1, 2, 3])).is_ok());
    }

    #[test]
    fn an_order_that_makes_no_sense_is_refused_by_name() {
        let survey = survey(1, &[1, 2, 3], &[]);
        let refused = |lost: &[u64]| plan(&survey, &ids(lost)).expect_err("refused");
        assert_eq!(refused(&[]), Refused::NobodyLost);
        assert_eq!(refused(&[1, 2]), Refused::ThisNode(NodeId(1)));
        let unknown = refused(&[2, 8]).to_string();
        assert!(unknown.contains("node-8") && unknown.contains("node-1, node-2, node-3"));
        let stranger = Survey {
            node: NodeId(7),
            ..survey.clone()
        };
        let refused = plan(&stranger, &ids(&[2, 3])).expect_err("refused");
        assert_eq!(refused, Refused::NoMember(NodeId(7)));
    }
}
