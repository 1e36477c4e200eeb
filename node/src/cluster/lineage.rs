//! Which cluster a raft request comes from, counting what that cluster was before recoveries.
//!
//! After a quorum is lost for good, one survivor goes on under a new cluster id (`recovery`). Should
//! the lost nodes come back with their old disks, they are a quorum of the old cluster among
//! themselves, and their votes and entries would overrule the new one's. So every request of raft
//! names its sender's cluster and all that it was before:
//!
//! ```text
//! count (u8) | ids, 16 bytes each, the oldest first, the present one last | raft's request
//! ```
//!
//! Whoever is of the receiver's past is refused, and so is a stranger. Whoever is of its *future* is
//! heard: so a survivor that slept through the recovery follows.

use proto::ids::ClusterId;

use super::roster::Roster;

/// Bytes of an id.
const ID_BYTES: usize = 16;

/// A request that raft must not see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Foreign {
    /// The sender lives before a recovery.
    #[error("cluster {0} was recovered as another one without this node")]
    Past(ClusterId),
    /// The sender is of an unrelated cluster.
    #[error("cluster {0} is another cluster")]
    Other(ClusterId),
    /// There are no ids.
    #[error("the request does not say which cluster it is from")]
    Garbled,
}

/// `request`, as a member by `roster` sends it.
pub(super) fn stamped(roster: &Roster, request: &[u8]) -> Vec<u8> {
    // The state machine keeps far fewer.
    let skipped = roster.former.len().saturating_sub(usize::from(u8::MAX) - 1);
    let former = roster.former.iter().skip(skipped);
    let ids: Vec<_> = former.chain([&roster.cluster]).collect();
    let mut bytes = Vec::with_capacity(1 + ids.len() * ID_BYTES + request.len());
    bytes.push(u8::try_from(ids.len()).unwrap_or(u8::MAX));
    for id in ids {
        bytes.extend_from_slice(&id.0);
    }
    bytes.extend_from_slice(request);
    bytes
}

/// The request in `bytes`, if a member by `roster` may hear it.
pub(super) fn read<'a>(roster: &Roster, bytes: &'a [u8]) -> Result<&'a [u8], Foreign> {
    let (count, rest) = bytes.split_first().ok_or(Foreign::Garbled)?;
    let length = usize::from(*count) * ID_BYTES;
    let (ids, request) = rest.split_at_checked(length).ok_or(Foreign::Garbled)?;
    let (ids, _) = ids.as_chunks::<ID_BYTES>();
    let theirs = ClusterId(*ids.last().ok_or(Foreign::Garbled)?);
    let ours = roster.cluster;
    // A cluster has no name for the first moments of its founder, who is alone then.
    let is_unnamed = [ours, theirs].contains(&ClusterId::default());
    if is_unnamed || ids.contains(&ours.0) {
        Ok(request)
    } else if roster.former.contains(&theirs) {
        Err(Foreign::Past(theirs))
    } else {
        Err(Foreign::Other(theirs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(former: &[u8], cluster: u8) -> Roster {
        Roster {
            cluster: ClusterId([cluster; 16]),
            former: former.iter().map(|it| ClusterId([*it; 16])).collect(),
            ..Roster::default()
        }
    }

    fn heard(receiver: &Roster, sender: &Roster) -> bool {
        read(receiver, &stamped(sender, b"request")) == Ok(b"request")
    }

    #[test]
    fn the_future_is_heard_and_the_past_is_refused() {
        let (before, after, later) = (of(&[], 1), of(&[1], 2), of(&[1, 2], 3));
        for same in [&before, &after, &later] {
            assert!(heard(same, same));
        }
        assert!(heard(&before, &after) && heard(&before, &later) && heard(&after, &later));
        assert!(!heard(&after, &before) && !heard(&later, &before) && !heard(&later, &after));
        let request = stamped(&before, b"");
        let refused = read(&after, &request);
        assert_eq!(refused, Err(Foreign::Past(before.cluster)));
    }

    #[test]
    fn two_recoveries_of_one_cluster_do_not_hear_each_other() {
        let (one, other) = (of(&[1], 2), of(&[1], 3));
        assert!(!heard(&one, &other) && !heard(&other, &one));
        assert!(!heard(&of(&[], 7), &of(&[], 8)));
    }

    #[test]
    fn a_request_without_whole_ids_is_garbled() {
        let whole = stamped(&of(&[1], 2), b"");
        for cut in 0..whole.len() {
            assert_eq!(read(&of(&[], 2), &whole[..cut]), Err(Foreign::Garbled));
        }
        assert_eq!(read(&of(&[], 2), &[0, 1, 2]), Err(Foreign::Garbled));
    }
}
