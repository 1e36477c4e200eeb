//! The decision taken right after each handshake, as a pure function.
//!
//! TLS only proves which key the other end has: its verifier sees neither the protocol asked for
//! nor the rest of the picture. So the verifier lets through who *might* be welcome
//! ([`Membership::may_handshake`]) and the gate says what they may do ([`decide`]), before any
//! stream is read. Removing a member therefore holds even if a handshake was let through.

use std::collections::HashSet;

use proto::ids::NodeKey;

use crate::alpn::Alpn;
use crate::close::CloseCode;
use crate::endpoint::Lane;
use crate::limits::MAX_UNPROVEN_PER_ADDRESS;

/// Who belongs to the cluster, as of one entry of the log. Replaced as a whole, never edited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// The log index this list is from; an older one never replaces a newer.
    pub index: u64,
    /// Keys of all members, this node's own included.
    pub members: HashSet<NodeKey>,
    /// Whether a join token is outstanding, so that strangers may be heard.
    pub join_open: bool,
}

impl Membership {
    /// Whether a handshake of `key` may complete at all.
    #[must_use]
    pub fn may_handshake(&self, key: &NodeKey) -> bool {
        self.join_open || self.members.contains(key)
    }
}

/// What is known of a connection whose handshake has just completed.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The endpoint it came in on.
    pub lane: Lane,
    /// The protocol it asked for, if we know it.
    pub alpn: Option<Alpn>,
    /// The key it has proven.
    pub key: NodeKey,
    /// Connections of the same address that have not said hello yet, this one included.
    pub unproven: usize,
}

/// What a connection may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything a member may.
    Mesh,
    /// One call of the join service.
    Join,
    /// Nothing: it is closed with this reason.
    Close(CloseCode),
}

/// Decides about `arrival` at a node with the key `own`, under the member list `membership`.
#[must_use]
pub fn decide(own: NodeKey, membership: &Membership, arrival: Arrival) -> Verdict {
    if arrival.key == own {
        return Verdict::Close(CloseCode::DialledSelf);
    }
    let member = membership.members.contains(&arrival.key);
    // Members are never crowded out by strangers behind the same address.
    if !member && arrival.unproven > MAX_UNPROVEN_PER_ADDRESS {
        return Verdict::Close(CloseCode::Crowded);
    }
    match (arrival.lane, arrival.alpn) {
        (_, Some(Alpn::Mesh)) if member => Verdict::Mesh,
        (_, Some(Alpn::Mesh)) => Verdict::Close(CloseCode::NotMember),
        (Lane::Control, Some(Alpn::Join)) if membership.join_open => Verdict::Join,
        (Lane::Control, Some(Alpn::Join)) => Verdict::Close(CloseCode::NoJoinOpen),
        (Lane::Bulk, Some(Alpn::Join)) | (_, None) => Verdict::Close(CloseCode::UnknownProtocol),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: NodeKey = NodeKey([1; 32]);
    const MEMBER: NodeKey = NodeKey([2; 32]);
    const STRANGER: NodeKey = NodeKey([3; 32]);

    fn membership(join_open: bool) -> Membership {
        Membership {
            index: 1,
            members: HashSet::from([OWN, MEMBER]),
            join_open,
        }
    }

    fn arrival(lane: Lane, alpn: Option<Alpn>, key: NodeKey) -> Arrival {
        Arrival {
            lane,
            alpn,
            key,
            unproven: 1,
        }
    }

    #[test]
    fn only_members_get_onto_the_mesh_on_either_lane() {
        for join_open in [false, true] {
            for lane in [Lane::Control, Lane::Bulk] {
                let decide = |key| {
                    decide(
                        OWN,
                        &membership(join_open),
                        arrival(lane, Some(Alpn::Mesh), key),
                    )
                };
                assert_eq!(decide(MEMBER), Verdict::Mesh);
                assert_eq!(decide(STRANGER), Verdict::Close(CloseCode::NotMember));
                assert_eq!(decide(OWN), Verdict::Close(CloseCode::DialledSelf));
            }
        }
    }

    #[test]
    fn joining_needs_an_outstanding_token_and_the_control_lane() {
        let join = |open, lane| {
            decide(
                OWN,
                &membership(open),
                arrival(lane, Some(Alpn::Join), STRANGER),
            )
        };
        assert_eq!(join(true, Lane::Control), Verdict::Join);
        assert_eq!(
            join(false, Lane::Control),
            Verdict::Close(CloseCode::NoJoinOpen)
        );
        assert_eq!(
            join(true, Lane::Bulk),
            Verdict::Close(CloseCode::UnknownProtocol)
        );
    }

    #[test]
    fn an_unknown_protocol_is_refused_even_to_a_member() {
        let verdict = decide(OWN, &membership(true), arrival(Lane::Control, None, MEMBER));
        assert_eq!(verdict, Verdict::Close(CloseCode::UnknownProtocol));
    }

    #[test]
    fn a_crowd_of_strangers_does_not_shut_out_a_member_at_the_same_address() {
        let crowd = |key, alpn| {
            let arrival = Arrival {
                unproven: MAX_UNPROVEN_PER_ADDRESS + 1,
                ..arrival(Lane::Control, Some(alpn), key)
            };
            decide(OWN, &membership(true), arrival)
        };
        assert_eq!(
            crowd(STRANGER, Alpn::Join),
            Verdict::Close(CloseCode::Crowded)
        );
        assert_eq!(crowd(MEMBER, Alpn::Mesh), Verdict::Mesh);
    }

    #[test]
    fn a_stranger_completes_a_handshake_only_while_a_token_is_outstanding() {
        assert!(!membership(false).may_handshake(&STRANGER));
        assert!(membership(true).may_handshake(&STRANGER));
        assert!(membership(false).may_handshake(&MEMBER));
    }
}
