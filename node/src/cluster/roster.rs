//! Who belongs to the cluster and where they are dialled, as of one entry of the log.
//!
//! A member derives it from its own applied state. A node that has just joined knows it from the
//! answer to its join, until its state has caught up with that: a log that is replayed from its
//! beginning goes through times in which today's leader was no member.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use proto::ids::{ClusterId, NodeId, NodeKey};
use proto::wire::mesh as wire;
use raft::state::{Node, State};

/// How a member is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    /// Its id.
    pub id: NodeId,
    /// Its key; a connection counts as this member only under this key.
    pub key: NodeKey,
    /// Where it takes calls.
    pub control: SocketAddr,
    /// Where it takes bulk transfers.
    pub bulk: SocketAddr,
}

impl Contact {
    fn of(node: &Node) -> Option<Self> {
        Some(Self {
            id: node.id,
            key: node.key,
            control: node.cluster_address.parse().ok()?,
            bulk: node.bulk_address.parse().ok()?,
        })
    }
}

/// Everybody who belongs to a cluster, as of one entry of its log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    /// The cluster; all zero while it has no name yet.
    pub cluster: ClusterId,
    /// The entry.
    pub index: u64,
    /// The members, by id.
    pub nodes: BTreeMap<NodeId, Contact>,
    /// What the cluster was called before it was recovered from a lost quorum, the oldest first.
    pub former: Vec<ClusterId>,
    /// Those of `nodes` that serve one team. They run on somebody else's machine: they are reached,
    /// and heard about themselves, and never asked about anything else.
    pub hosts: BTreeSet<NodeId>,
}

/// A roster that a peer sent is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the list of members is garbled")]
pub(super) struct BadRoster;

impl Roster {
    /// The roster that `state` describes at `index`.
    #[must_use]
    pub fn of(state: &State, index: u64) -> Self {
        // Whoever a recovery declared lost is no member, though its row waits to be settled.
        let members = || {
            let nodes = state.nodes();
            nodes.filter(|node| state.removed_node(&node.key).is_none())
        };
        let hosts = members().filter(|node| node.team.is_some());
        let hosts = hosts.map(|node| node.id).collect();
        let contacts = members().filter_map(Contact::of);
        let cluster = state.cluster();
        let former = cluster.into_iter().flat_map(|cluster| &cluster.former);
        Self {
            cluster: cluster.map(|cluster| cluster.id).unwrap_or_default(),
            index,
            nodes: contacts.map(|contact| (contact.id, contact)).collect(),
            former: former.map(|former| former.id).collect(),
            hosts,
        }
    }

    /// As much of it as a host of one team is told: whom to dial.
    #[must_use]
    pub(super) fn for_host(mut self, voters: &BTreeSet<NodeId>) -> Self {
        let hosts = &self.hosts;
        self.nodes
            .retain(|id, _| voters.contains(id) && !hosts.contains(id));
        self.hosts.clear();
        self
    }

    /// Whom node `here` may ask about the cluster: the other full members.
    #[must_use]
    pub fn peers(&self, here: NodeId) -> Vec<NodeId> {
        let others = self.nodes.keys().copied();
        let others = others.filter(|id| *id != here && !self.hosts.contains(id));
        others.collect()
    }

    /// This roster, or `told` as long as that is newer: a log that is replayed goes through times
    /// in which today's members were none, and others were. The cluster's name is taken from
    /// there until the state has it: members answer nobody of another cluster.
    #[must_use]
    pub fn or_told(mut self, told: &Self) -> Self {
        if told.index > self.index {
            return told.clone();
        }
        if self.cluster == ClusterId::default() {
            self.cluster = told.cluster;
        }
        self
    }

    /// The member with this key.
    #[must_use]
    pub fn by_key(&self, key: &NodeKey) -> Option<&Contact> {
        self.nodes.values().find(|contact| contact.key == *key)
    }

    pub(super) fn to_wire(&self) -> wire::Roster {
        let contact = |contact: &Contact| wire::Contact {
            node: contact.id.0,
            key: contact.key.0.to_vec(),
            control: contact.control.to_string(),
            bulk: contact.bulk.to_string(),
            host: self.hosts.contains(&contact.id),
        };
        wire::Roster {
            cluster: self.cluster.0.to_vec(),
            index: self.index,
            nodes: self.nodes.values().map(contact).collect(),
        }
    }

    pub(super) fn from_wire(wire: wire::Roster) -> Result<Self, BadRoster> {
        let hosts = wire.nodes.iter().filter(|node| node.host);
        let hosts = hosts.map(|node| NodeId(node.node)).collect();
        let contact = |wire: wire::Contact| {
            let contact = Contact {
                id: NodeId(wire.node),
                key: NodeKey(wire.key.try_into().map_err(|_| BadRoster)?),
                control: wire.control.parse().map_err(|_| BadRoster)?,
                bulk: wire.bulk.parse().map_err(|_| BadRoster)?,
            };
            Ok((contact.id, contact))
        };
        let nodes = wire.nodes.into_iter().map(contact);
        Ok(Self {
            cluster: ClusterId(wire.cluster.try_into().map_err(|_| BadRoster)?),
            index: wire.index,
            nodes: nodes.collect::<Result<_, BadRoster>>()?,
            // A joiner has no past in this cluster.
            former: Vec::new(),
            hosts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contact(id: u64) -> Contact {
        Contact {
            id: NodeId(id),
            key: NodeKey([u8::try_from(id).expect("small"); 32]),
            control: "127.0.0.1:7321".parse().expect("an address"),
            bulk: "127.0.0.1:7322".parse().expect("an address"),
        }
    }

    fn roster(index: u64, ids: &[u64]) -> Roster {
        Roster {
            cluster: ClusterId([1; 16]),
            index,
            nodes: ids.iter().map(|id| (NodeId(*id), contact(*id))).collect(),
            ..Roster::default()
        }
    }

    #[test]
    fn hosts_of_one_team_are_asked_for_nothing_and_told_about_voters_only() {
        let mut roster = roster(4, &[1, 2, 3, 4]);
        roster.hosts.insert(NodeId(3));
        assert_eq!(roster.peers(NodeId(1)), [NodeId(2), NodeId(4)]);
        let again = Roster::from_wire(roster.to_wire()).expect("whole");
        assert_eq!(again.hosts, roster.hosts);
        let voters = [NodeId(1), NodeId(2), NodeId(3)].into();
        let told = roster.for_host(&voters);
        assert!(told.nodes.keys().eq([NodeId(1), NodeId(2)].iter()));
    }

    #[test]
    fn a_state_that_lags_behind_the_join_keeps_the_members_of_the_join() {
        let lagging = roster(3, &[1]).or_told(&roster(9, &[1, 2]));
        assert!(lagging.nodes.contains_key(&NodeId(2)));
        let caught_up = roster(9, &[1]).or_told(&roster(9, &[1, 2]));
        assert!(!caught_up.nodes.contains_key(&NodeId(2)));
    }

    #[test]
    fn an_empty_state_knows_its_cluster_from_the_join() {
        let roster = Roster::default().or_told(&roster(9, &[1]));
        assert_eq!(roster.cluster, ClusterId([1; 16]));
    }

    #[test]
    fn a_roster_survives_the_wire_and_garbage_is_refused() {
        let roster = roster(4, &[1, 2, 3]);
        let mut wire = roster.to_wire();
        assert_eq!(Roster::from_wire(wire.clone()), Ok(roster));
        wire.nodes[0].control = "nowhere".into();
        assert_eq!(Roster::from_wire(wire), Err(BadRoster));
    }
}
