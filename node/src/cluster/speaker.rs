//! Whether a request of raft comes from the member it speaks for.
//!
//! The transport proves a key, and the request names a sender. A member that names another one
//! could vote twice, or lead under a foreign name; nothing below raft would notice.

use proto::ids::{NodeId, NodeKey};
use raft::state::State;

use super::roster::Roster;

/// A request of raft that raft must not see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FalseSpeaker {
    /// The bytes are no request.
    #[error("the request does not say who made it")]
    Nobody,
    /// Its maker is not whose key was proven.
    #[error("the request is made in the name of {claimed}, which has another key")]
    OtherName {
        /// For whom it speaks.
        claimed: NodeId,
    },
    /// It is made by a node that has no part in decisions.
    #[error("{0} is a host of one team and has no part in raft")]
    Host(NodeId),
}

/// Checks that `request`, which came from whoever has `peer`, names that node as its sender.
///
/// A key that this node does not know yet was vouched for by others: it may speak under an id that
/// is new here too, and never under one that is known to have another key.
pub(super) fn check(
    roster: &Roster,
    here: NodeId,
    state: &State,
    peer: &NodeKey,
    request: &[u8],
) -> Result<NodeId, FalseSpeaker> {
    let claimed = raft::link::sender(request).ok_or(FalseSpeaker::Nobody)?;
    let is_own = match roster.by_key(peer) {
        Some(contact) => contact.id == claimed,
        None => claimed != here && !roster.nodes.contains_key(&claimed),
    };
    if !is_own {
        return Err(FalseSpeaker::OtherName { claimed });
    }
    // A node that has just joined was told who is a host before its state says so.
    let is_host = state.node(claimed).is_some_and(|node| node.team.is_some());
    if is_host || roster.hosts.contains(&claimed) {
        return Err(FalseSpeaker::Host(claimed));
    }
    Ok(claimed)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use proto::ids::{TeamId, TokenId};
    use proto::units::Stamp;
    use proto::wire::raftlog::PeerRequest;
    use raft::command::{Command, Proposal};
    use raft::state::{Node, Token};

    use super::*;
    use crate::cluster::Contact;

    const HERE: NodeId = NodeId(1);

    fn key(id: u8) -> NodeKey {
        NodeKey([id; 32])
    }

    fn roster(ids: &[u8]) -> Roster {
        let contact = |id: &u8| Contact {
            id: NodeId(u64::from(*id)),
            key: key(*id),
            control: "127.0.0.1:7321".parse().expect("an address"),
            bulk: "127.0.0.1:7322".parse().expect("an address"),
        };
        let contacts = ids.iter().map(contact);
        Roster {
            nodes: contacts.map(|contact| (contact.id, contact)).collect(),
            ..Roster::default()
        }
    }

    fn request(sender: u64) -> Vec<u8> {
        let request = PeerRequest {
            target_disk: vec![0; 16],
            sender,
            ..PeerRequest::default()
        };
        request.encode_to_vec()
    }

    fn heard(ids: &[u8], peer: u8, sender: u64) -> Result<NodeId, FalseSpeaker> {
        let (roster, state) = (roster(ids), State::default());
        check(&roster, HERE, &state, &key(peer), &request(sender))
    }

    #[test]
    fn a_member_speaks_for_itself_and_for_nobody_else() {
        let other = |id| {
            Err(FalseSpeaker::OtherName {
                claimed: NodeId(id),
            })
        };
        assert_eq!(heard(&[1, 2, 3], 2, 2), Ok(NodeId(2)));
        assert_eq!(heard(&[1, 2, 3], 2, 3), other(3));
        assert_eq!(heard(&[1, 2, 3], 2, 1), other(1), "the receiver's own name");
        assert_eq!(heard(&[1, 2, 3], 2, 9), other(9), "a name that is nobody's");
    }

    #[test]
    fn a_member_that_is_new_here_speaks_under_a_name_that_is_new_here_too() {
        assert_eq!(heard(&[1, 2], 9, 9), Ok(NodeId(9)));
        let taken = FalseSpeaker::OtherName { claimed: NodeId(2) };
        assert_eq!(heard(&[1, 2], 9, 2), Err(taken));
        let here = FalseSpeaker::OtherName { claimed: HERE };
        assert_eq!(heard(&[2], 9, 1), Err(here));
    }

    #[test]
    fn bytes_that_name_no_sender_are_refused() {
        let (roster, state) = (roster(&[1, 2]), State::default());
        let bytes = [0xff; 7];
        let refused = check(&roster, HERE, &state, &key(2), &bytes);
        assert_eq!(refused, Err(FalseSpeaker::Nobody));
    }

    #[test]
    fn a_host_of_one_team_has_no_part_in_raft() {
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
        let node = Node {
            key: key(2),
            ..Node::default()
        };
        let redeem = Command::RedeemToken {
            token: token.id,
            node,
        };
        let mut state = State::default();
        for (index, command) in [(1, Command::PutToken(token)), (2, redeem)] {
            let at = Stamp(index);
            let applied = state.apply(index, Proposal { at, command });
            applied.answer.expect("the command fits");
        }
        let refused = check(&roster(&[1, 2]), HERE, &state, &key(2), &request(2));
        assert_eq!(refused, Err(FalseSpeaker::Host(NodeId(2))));
    }

    /// A node that has just joined has no state yet, and raft would take a log from anybody.
    #[test]
    fn a_host_has_no_part_in_raft_before_the_state_names_it() {
        let mut told = roster(&[1, 2]);
        told.hosts.insert(NodeId(2));
        let refused = check(&told, HERE, &State::default(), &key(2), &request(2));
        assert_eq!(refused, Err(FalseSpeaker::Host(NodeId(2))));
    }
}
