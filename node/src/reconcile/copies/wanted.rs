//! Which snapshots a node should copy, and what its store must keep, by the replicated state alone.

use std::collections::BTreeMap;

use proto::ids::{NodeId, SnapshotId};
use raft::state::{Snapshot, State};

use crate::store::{Pin, SnapshotDigest};

/// Snapshots that are copied at once at most. With fewer, some slow ones would hold up all others;
/// more would share one network and one disk, and each costs 8 MiB and its manifests.
pub(super) const AT_ONCE: usize = 4;
/// Of these, how many may depend on the same holder: one that is slow, or stalls, leaves the rest
/// of [`AT_ONCE`] to what others give, however many snapshots it alone has.
const AT_ONCE_OF_ONE: usize = AT_ONCE / 2;
const _: () = assert!(0 < AT_ONCE_OF_ONE && AT_ONCE_OF_ONE < AT_ONCE);
/// The copies under way here, and the nodes that may give each.
pub(super) type UnderWay = BTreeMap<SnapshotId, Vec<NodeId>>;

/// A snapshot of which this node should make a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) id: SnapshotId,
    pub(super) digest: SnapshotDigest,
    /// The nodes in reach that have it.
    pub(super) givers: Vec<NodeId>,
}

/// All of them.
pub(super) fn wanted(state: &State, here: NodeId) -> Vec<Wanted> {
    let without = state.snapshots().filter(|it| !it.holders.contains(&here));
    let wanted = without.filter(|snapshot| copiers(state, snapshot).contains(&here));
    let wanted = wanted.map(|snapshot| Wanted {
        id: snapshot.sealed.id,
        digest: SnapshotDigest(snapshot.sealed.digest),
        givers: givers(state, snapshot),
    });
    wanted.collect()
}

/// The nodes in reach that have it.
fn givers(state: &State, snapshot: &Snapshot) -> Vec<NodeId> {
    let alive = |id: &&NodeId| state.node(**id).is_some_and(|it| it.liveness.is_alive());
    snapshot.holders.iter().filter(alive).copied().collect()
}

/// Whether one more copy may begin, of what `givers` have.
pub(super) fn has_room(under_way: &UnderWay, givers: &[NodeId]) -> bool {
    let gives = |node: &NodeId| under_way.values().filter(|it| it.contains(node)).count();
    under_way.len() < AT_ONCE && givers.iter().any(|node| gives(node) < AT_ONCE_OF_ONE)
}

/// Who should make a copy: as many as are lacking, in an order of the snapshot's own.
fn copiers(state: &State, snapshot: &Snapshot) -> Vec<NodeId> {
    let holders = || snapshot.holders.iter().filter_map(|id| state.node(*id));
    let reached = holders().any(|node| node.liveness.is_alive());
    // What a node has that is being emptied counts as gone already.
    let live = holders().filter(|node| node.liveness.is_alive() && !node.draining);
    let wanted = usize::try_from(state.settings().replicas).unwrap_or(usize::MAX);
    let lacking = wanted.saturating_sub(live.count());
    let mut able: Vec<NodeId> = state
        .nodes()
        .filter(|node| node.liveness.is_alive() && !node.draining)
        // Hosts of one team do not see everything that this takes.
        .filter(|node| node.team.is_none())
        .map(|node| node.id)
        .filter(|id| !snapshot.holders.contains(id))
        .collect();
    // First of all those that could start something from it; the bytes are safe with any.
    let resumes = |id: &NodeId| {
        let node = state.node(*id);
        node.is_some_and(|it| snapshot.sealed.can_start_on(it))
    };
    able.sort_by_key(|node| (!resumes(node), rank(snapshot.sealed.id, *node)));
    if !reached {
        // Of a snapshot that nobody can give there is nothing to copy.
        return Vec::new();
    }
    if snapshot.warm.as_ref().is_some_and(|warm| !warm.retired) {
        // Capsules are started from it on every node that can, and should not wait for its bytes.
        able.retain(resumes);
    } else {
        able.truncate(lacking);
    }
    able
}

/// The same on every node, and for every snapshot another.
fn rank(snapshot: SnapshotId, node: NodeId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&snapshot.0).update(&node.0.to_be_bytes());
    *hasher.finalize().as_bytes()
}

/// What the store must keep: whatever has a record. What this node is not said to hold may be on its
/// way here, and is worth more than its room while it may be asked for.
pub(super) fn pins(state: &State) -> Vec<Pin> {
    state
        .snapshots()
        .map(|it| Pin::Snapshot(SnapshotDigest(it.sealed.digest)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proto::epoch::Epoch;
    use proto::ids::{NodeKey, SandboxId, TeamId};
    use proto::units::Stamp;
    use raft::command::{Command, Proposal};
    use raft::state::{Node, Sealed, Warm};

    use super::*;

    /// Three nodes, and a snapshot that the first has sealed.
    fn state() -> State {
        let mut state = State::default();
        for n in 1..=3 {
            let node = Node {
                id: NodeId(n),
                name: format!("n{n}"),
                key: NodeKey([u8::try_from(n).unwrap_or(0); 32]),
                ..Node::default()
            };
            state = with_node(&state, node);
        }
        state
    }

    fn with_node(state: &State, node: Node) -> State {
        let row = (
            raft::state::RowKey::Node(node.id).encode(),
            Some(raft::wire::encode_node(&node)),
        );
        let mut next = state.clone();
        next.follow([row]).expect("a row of ours");
        next
    }

    fn snapshot(n: u8, holders: &[u64]) -> Snapshot {
        Snapshot {
            sealed: Sealed {
                id: SnapshotId([n; 16]),
                ..Sealed::default()
            },
            team: TeamId::default(),
            sandbox: SandboxId([n; 16]),
            epoch: Epoch(1),
            sealed_by: NodeId(1),
            sealed_at: Stamp(0),
            holders: holders.iter().map(|id| NodeId(*id)).collect(),
            warm: None,
        }
    }

    #[test]
    fn one_other_node_copies_what_one_holds_and_all_agree_which() {
        let state = state();
        let chosen: BTreeSet<_> = (0..40)
            .map(|n| copiers(&state, &snapshot(n, &[1])))
            .inspect(|chosen| assert_eq!(chosen.len(), 1))
            .collect();
        assert_eq!(chosen.len(), 2, "the work is shared: {chosen:?}");
        assert!(!chosen.contains(&vec![NodeId(1)]));
    }

    #[test]
    fn nobody_copies_what_has_enough_copies_or_none_in_reach() {
        let state = state();
        assert!(copiers(&state, &snapshot(1, &[1, 3])).is_empty());
        assert!(copiers(&state, &snapshot(1, &[])).is_empty());
        assert!(copiers(&state, &snapshot(1, &[9])).is_empty());
    }

    #[test]
    fn a_holder_that_is_gone_is_replaced() {
        let mut state = state();
        let judge = |verdict| Proposal {
            at: Stamp(1),
            command: Command::JudgeNode {
                node: NodeId(3),
                incarnation: 0,
                verdict,
            },
        };
        let missing = judge(raft::command::Verdict::Missing);
        state.apply(9, missing).answer.expect("it is known");
        assert_eq!(copiers(&state, &snapshot(1, &[1, 3])), [NodeId(2)]);
    }

    #[test]
    fn what_is_kept_warm_lies_on_every_node_that_starts_from_it() {
        let mut state = state();
        for n in [1, 2] {
            let known = state.node(NodeId(n)).cloned().expect("known");
            let templates = [("minimal".into(), [0; 32])].into();
            state = with_node(&state, Node { templates, ..known });
        }
        let warm = |retired| Snapshot {
            warm: Some(Warm {
                retired,
                ..Warm::default()
            }),
            ..snapshot(1, &[1])
        };
        assert_eq!(copiers(&state, &warm(false)), [NodeId(2)]);
        let both = Snapshot {
            holders: [NodeId(1), NodeId(2)].into(),
            ..warm(false)
        };
        assert!(copiers(&state, &both).is_empty(), "the third has no image");
        assert_eq!(copiers(&state, &warm(true)).len(), 1);
    }

    #[test]
    fn a_host_of_one_team_copies_nothing_of_others() {
        let mut state = state();
        for n in [2, 3] {
            let known = state.node(NodeId(n)).cloned().expect("known");
            let team = Some(TeamId([7; 16]));
            state = with_node(&state, Node { team, ..known });
        }
        assert!(copiers(&state, &snapshot(1, &[1])).is_empty());
    }

    #[test]
    fn one_holder_however_much_it_has_leaves_room_for_what_others_give() {
        let (bad, good) = (NodeId(2), NodeId(3));
        let mut under_way = UnderWay::new();
        let mut begin = |n: u8, givers: &[NodeId]| {
            let may = has_room(&under_way, givers);
            if may {
                under_way.insert(SnapshotId([n; 16]), givers.to_vec());
            }
            may
        };
        assert!(begin(1, &[bad]) && begin(2, &[bad]));
        assert!(!begin(3, &[bad]), "it has its share");
        assert!(begin(4, &[bad, good]), "the other can give it");
        assert!(begin(5, &[good]));
        assert!(!begin(6, &[NodeId(4)]), "that are all at once");
    }

    #[test]
    fn nobody_is_asked_for_a_copy_that_is_not_in_reach() {
        let state = state();
        assert_eq!(givers(&state, &snapshot(1, &[1, 9])), [NodeId(1)]);
        assert!(!has_room(&UnderWay::new(), &[]));
    }
}
