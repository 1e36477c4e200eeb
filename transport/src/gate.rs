//! The decision taken right after each handshake, as a pure function.
//!
//! TLS only proves which key the other end has: its verifier sees neither the protocol asked for
//! nor the rest of the picture. So the verifier lets through who *might* be welcome
//! ([`Standing::may_handshake`]) and the gate says what they may do ([`decide`]), before any
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

/// What this node knows of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// On the member list, or vouched for a moment ago.
    Member,
    /// Not on the list, which may be behind: known peers can be asked.
    Vouchable,
    /// Not on the list, and nobody is asked: it was removed, or there is no voucher.
    Stranger,
}

impl Standing {
    /// Whether a handshake may complete at all.
    #[must_use]
    pub fn may_handshake(self, join_open: bool) -> bool {
        join_open || self != Self::Stranger
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
    /// What is known of that key.
    pub standing: Standing,
    /// Whether a join token is outstanding.
    pub join_open: bool,
    /// Connections of the same address that have not said hello yet, this one included.
    pub unproven: usize,
}

/// What a connection may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything a member may.
    Mesh,
    /// Everything a member may, once a known peer has vouched for it.
    Vouch,
    /// One call of the join service.
    Join,
    /// Nothing: it is closed with this reason.
    Close(CloseCode),
}

/// Decides about `arrival` at a node with the key `own`.
#[must_use]
pub fn decide(own: NodeKey, arrival: Arrival) -> Verdict {
    if arrival.key == own {
        return Verdict::Close(CloseCode::DialledSelf);
    }
    // Members are never crowded out by strangers behind the same address.
    if arrival.standing != Standing::Member && arrival.unproven > MAX_UNPROVEN_PER_ADDRESS {
        return Verdict::Close(CloseCode::Crowded);
    }
    match (arrival.lane, arrival.alpn) {
        (_, Some(Alpn::Mesh)) => match arrival.standing {
            Standing::Member => Verdict::Mesh,
            Standing::Vouchable => Verdict::Vouch,
            Standing::Stranger => Verdict::Close(CloseCode::NotMember),
        },
        (Lane::Control, Some(Alpn::Join)) if arrival.join_open => Verdict::Join,
        (Lane::Control, Some(Alpn::Join)) => Verdict::Close(CloseCode::NoJoinOpen),
        (Lane::Bulk, Some(Alpn::Join)) | (_, None) => Verdict::Close(CloseCode::UnknownProtocol),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: NodeKey = NodeKey([1; 32]);
    const OTHER: NodeKey = NodeKey([2; 32]);
    const STANDINGS: [Standing; 3] = [Standing::Member, Standing::Vouchable, Standing::Stranger];

    fn arrival(lane: Lane, alpn: Option<Alpn>, standing: Standing) -> Arrival {
        Arrival {
            lane,
            alpn,
            key: OTHER,
            standing,
            join_open: false,
            unproven: 1,
        }
    }

    #[test]
    fn only_members_and_whom_they_vouch_for_get_onto_the_mesh_on_either_lane() {
        for join_open in [false, true] {
            for lane in [Lane::Control, Lane::Bulk] {
                let decide = |key, standing| {
                    let arrival = Arrival {
                        key,
                        join_open,
                        ..arrival(lane, Some(Alpn::Mesh), standing)
                    };
                    decide(OWN, arrival)
                };
                assert_eq!(decide(OTHER, Standing::Member), Verdict::Mesh);
                assert_eq!(decide(OTHER, Standing::Vouchable), Verdict::Vouch);
                let refused = Verdict::Close(CloseCode::NotMember);
                assert_eq!(decide(OTHER, Standing::Stranger), refused);
                let own = Verdict::Close(CloseCode::DialledSelf);
                assert_eq!(decide(OWN, Standing::Member), own);
            }
        }
    }

    #[test]
    fn joining_needs_an_outstanding_token_and_the_control_lane() {
        for standing in STANDINGS {
            let join = |join_open, lane| {
                let arrival = Arrival {
                    join_open,
                    ..arrival(lane, Some(Alpn::Join), standing)
                };
                decide(OWN, arrival)
            };
            assert_eq!(join(true, Lane::Control), Verdict::Join);
            let closed = Verdict::Close(CloseCode::NoJoinOpen);
            assert_eq!(join(false, Lane::Control), closed);
            let elsewhere = Verdict::Close(CloseCode::UnknownProtocol);
            assert_eq!(join(true, Lane::Bulk), elsewhere);
        }
    }

    #[test]
    fn an_unknown_protocol_is_refused_even_to_a_member() {
        let verdict = decide(OWN, arrival(Lane::Control, None, Standing::Member));
        assert_eq!(verdict, Verdict::Close(CloseCode::UnknownProtocol));
    }

    #[test]
    fn a_crowd_of_strangers_does_not_shut_out_a_member_at_the_same_address() {
        let crowd = |standing, alpn| {
            let arrival = Arrival {
                join_open: true,
                unproven: MAX_UNPROVEN_PER_ADDRESS + 1,
                ..arrival(Lane::Control, Some(alpn), standing)
            };
            decide(OWN, arrival)
        };
        let crowded = Verdict::Close(CloseCode::Crowded);
        assert_eq!(crowd(Standing::Stranger, Alpn::Join), crowded);
        assert_eq!(crowd(Standing::Vouchable, Alpn::Mesh), crowded);
        assert_eq!(crowd(Standing::Member, Alpn::Mesh), Verdict::Mesh);
    }

    #[test]
    fn a_stranger_completes_a_handshake_only_while_a_token_is_outstanding() {
        assert!(!Standing::Stranger.may_handshake(false));
        assert!(Standing::Stranger.may_handshake(true));
        assert!(Standing::Member.may_handshake(false));
        assert!(Standing::Vouchable.may_handshake(false));
    }
}
