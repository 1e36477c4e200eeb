//! What a host of one team is sent, under any history: all it may see, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::ids::{NodeId, TeamId};
use proto::units::{Mib, Stamp};
use wrenn_raft::command::{Command, Receipt};
use wrenn_raft::state::{BadRow, Change, Node, Resources, RowKey, State, Token};

use crate::world::history::{any_history, busy_world, machine_of, tag_of};
use crate::world::*;

/// The first members: what raft would elect from is not the state's business.
fn voters(state: &State) -> BTreeSet<NodeId> {
    state.nodes().map(|node| node.id).take(3).collect()
}

/// Whoever has, or sealed, what the team's sandboxes rest on.
fn sources(state: &State, team: TeamId) -> BTreeSet<NodeId> {
    let of_team = state.sandboxes().filter(|it| it.team == team);
    let needed = of_team.flat_map(|it| it.snapshots());
    let named = state.named_by(team).map(|it| it.snapshot);
    let rests_on = needed.chain(named).filter_map(|id| state.snapshot(id));
    let rests_on = rests_on.filter(|it| it.team == team && it.warm.is_none());
    let sources = rests_on.flat_map(|it| it.holders.iter().copied().chain([it.sealed_by]));
    sources.collect()
}

/// Byte strings that must not be sent to `host`.
fn secrets(state: &State, host: &Node, voters: &BTreeSet<NodeId>) -> Vec<Vec<u8>> {
    let team = host.team.expect("a host of a team");
    let mut secrets: Vec<Vec<u8>> = Vec::new();
    for sandbox in state.sandboxes().filter(|it| it.team != team) {
        secrets.push(sandbox.id.0.to_vec());
        if sandbox.team != TeamId::default() {
            secrets.push(sandbox.team.0.to_vec());
        }
    }
    for key in state.keys().filter(|key| key.team != team) {
        secrets.extend([
            key.id.0.to_vec(),
            key.hash.to_vec(),
            key.name.clone().into(),
        ]);
    }
    for token in state.tokens() {
        secrets.extend([token.id.0.to_vec(), token.public_key.to_vec()]);
    }
    let sources = sources(state, team);
    let others = state
        .removed()
        .filter(|removed| !sources.contains(&removed.node));
    secrets.extend(others.map(|removed| removed.key.0.to_vec()));
    for node in state.nodes().filter(|node| node.id != host.id) {
        secrets.extend([node.disk.to_vec(), node.api_url.clone().into()]);
        let asked_for = state
            .sandboxes_of(team)
            .any(|it| !it.spec.node_tags.is_empty());
        if !asked_for {
            secrets.push(tag_of(machine_of(node)).into());
        }
        let is_voter = voters.contains(&node.id) && node.team.is_none();
        if !is_voter && !sources.contains(&node.id) {
            secrets.extend([node.key.0.to_vec(), node.cluster_address.clone().into()]);
        }
    }
    secrets
}

fn bytes_of(changes: &[Change]) -> Vec<u8> {
    let parts = changes
        .iter()
        .flat_map(|(key, value)| [key.as_slice(), value.as_deref().unwrap_or_default(), b"|"]);
    parts.collect::<Vec<_>>().concat()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    // A node without an address has none that could be told.
    !part.is_empty() && bytes.windows(part.len()).any(|window| window == part)
}

/// A slice holds exactly what the list in `state/slice.rs` says.
fn check_slice(state: &State, host: &Node, slice: &State, voters: &BTreeSet<NodeId>) {
    let team = host.team.expect("a host of a team");
    assert_eq!(slice.cluster(), state.cluster());
    assert_eq!(slice.node(host.id), Some(host));
    assert!(slice.tokens().next().is_none());
    let sources = sources(state, team);
    for removed in slice.removed() {
        assert!(sources.contains(&removed.node) && removed.name.is_empty());
    }
    let of_team: Vec<_> = state.sandboxes().filter(|it| it.team == team).collect();
    assert_eq!(slice.sandboxes().collect::<Vec<_>>(), of_team);
    let keys: Vec<_> = state.keys().filter(|it| it.team == team).collect();
    assert_eq!(slice.keys().collect::<Vec<_>>(), keys);
    assert!(slice.templates().eq(state.templates()));
    assert!(slice.all_named().eq(state.named_by(team)));
    assert!(
        slice
            .snapshots()
            .all(|it| it.team == team && it.warm.is_none())
    );
    for node in slice.nodes().filter(|it| it.id != host.id) {
        let known = state.node(node.id).expect("a node of the cluster");
        let is_voter = voters.contains(&node.id) && known.team.is_none();
        assert!(is_voter || sources.contains(&node.id));
        assert_eq!(node.team, known.team);
        assert_eq!(
            (node.key, &node.cluster_address),
            (known.key, &known.cluster_address)
        );
        assert_eq!((node.capacity, node.tags.len()), (Resources::default(), 0));
    }
}

/// What a member remembers of each host, and what the host has.
#[derive(Default)]
struct Followed {
    sent: BTreeMap<NodeId, State>,
    held: BTreeMap<NodeId, State>,
}

impl Followed {
    /// One pull of every host there is.
    fn pull(&mut self, state: &State) {
        let voters = voters(state);
        for host in state.nodes().filter(|node| node.team.is_some()) {
            let slice = state.sliced(host.id, &voters).expect("a host of a team");
            let sent = self.sent.entry(host.id).or_default();
            let changes = slice.changes_since(sent);
            let bytes = bytes_of(&changes);
            for secret in secrets(state, host, &voters) {
                assert!(
                    !contains(&bytes, &secret),
                    "{} was sent {secret:x?}",
                    host.id
                );
            }
            check_slice(state, host, &slice, &voters);
            let held = self.held.entry(host.id).or_default();
            held.follow(changes).expect("own rows are readable");
            assert!(*held == slice, "{} has another slice", host.id);
            *sent = slice;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn hosts_follow_their_slices_and_are_sent_nothing_else(
        history in any_history(80),
        pulls in prop::collection::vec(any::<bool>(), 80),
    ) {
        let mut world = busy_world();
        let mut followed = Followed::default();
        for (what, pull) in history.into_iter().zip(pulls) {
            if let Some(proposal) = world.proposal(what) {
                world.index += 1;
                world.now = world.now.max(proposal.at);
                let _ = world.state.apply(world.index, proposal);
            }
            if pull {
                followed.pull(&world.state);
            }
        }
        followed.pull(&world.state);
        for node in world.state.nodes().filter(|node| node.team.is_none()) {
            prop_assert!(world.state.sliced(node.id, &voters(&world.state)).is_none());
        }
    }

    #[test]
    fn changes_lead_from_any_state_to_any_other(
        one in any_history(60),
        other in any_history(60),
    ) {
        let [one, other] = [one, other].map(|history| {
            let mut world = busy_world();
            for what in history {
                if let Some(proposal) = world.proposal(what) {
                    world.index += 1;
                    let _ = world.state.apply(world.index, proposal);
                }
            }
            world.state
        });
        let mut there = one.clone();
        there.follow(other.changes_since(&one)).expect("own rows are readable");
        prop_assert!(there == other);
        prop_assert!(other.changes_since(&other).is_empty());
    }

    #[test]
    fn garbage_is_refused_and_changes_nothing(
        key in prop::collection::vec(any::<u8>(), 0..40),
        value in prop::option::of(prop::collection::vec(any::<u8>(), 0..60)),
    ) {
        let mut state = busy_world().state;
        let before = state.clone();
        let gone = (RowKey::Node(FOUNDER).encode(), None);
        if state.follow([gone, (key, value)]).is_err() {
            prop_assert!(state == before);
        }
    }
}

/// A cluster of one member with a host of `team`.
fn with_host(team: TeamId) -> (World, NodeId) {
    let mut world = World::founded();
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let scoped = Token {
        team: Some(team),
        ..token(1, 1, expires_at)
    };
    world.act(Command::PutToken(scoped)).expect("put");
    match world.act(redeem(1, node(2))) {
        Ok(Receipt::Admitted(host)) => (world, host),
        other => panic!("not let in: {other:?}"),
    }
}

#[test]
fn members_strangers_and_removed_hosts_get_no_slice() {
    let (mut world, host) = with_host(TeamId([7; 16]));
    let voters = BTreeSet::from([FOUNDER]);
    assert!(world.state.sliced(host, &voters).is_some());
    assert!(world.state.sliced(FOUNDER, &voters).is_none());
    assert!(world.state.sliced(NodeId(99), &voters).is_none());
    world.act(remove(host, false)).expect("it is empty");
    assert!(world.state.sliced(host, &voters).is_none());
}

#[test]
fn a_voter_in_a_slice_can_be_dialled_and_says_nothing_else() {
    let (mut world, host) = with_host(TeamId([7; 16]));
    world.act(cordon(FOUNDER)).expect("known");
    let slice = world.state.sliced(host, &BTreeSet::from([FOUNDER, host]));
    let expected = Node {
        id: FOUNDER,
        name: "node-1".into(),
        key: node_key(1),
        cluster_address: "10.0.0.1:7321".into(),
        bulk_address: "10.0.0.1:7322".into(),
        ..Node::default()
    };
    assert_eq!(slice.expect("a host").node(FOUNDER), Some(&expected));
}

#[test]
fn a_row_under_the_key_of_another_is_refused() {
    let world = World::founded();
    let value = world
        .state
        .row(&RowKey::Node(FOUNDER))
        .expect("it is there");
    let misplaced = [(RowKey::Node(NodeId(2)).encode(), value)];
    assert_eq!(State::from_rows(misplaced).err(), Some(BadRow::Misplaced));
}

#[test]
fn every_row_key_survives_being_encoded() {
    let (world, _) = with_host(TeamId([7; 16]));
    for (key, _) in world.state.rows() {
        let read = RowKey::decode(&key).expect("an own key");
        assert_eq!(read.encode(), key);
        assert!(world.state.row(&read).is_some());
    }
    let garbled: [&[u8]; 5] = [b"", b"c1", b"n\0\0\0", b"t\xff", b"?"];
    for bytes in garbled {
        assert!(RowKey::decode(bytes).is_err(), "{bytes:?}");
    }
}

#[test]
fn nothing_is_sent_where_only_other_teams_were_busy() {
    let (mut world, host) = with_host(TeamId([7; 16]));
    let voters = BTreeSet::from([FOUNDER]);
    let before = world.state.sliced(host, &voters).expect("a host");
    world.create(1, waiting(512)).expect("there is room");
    world.act(stop(1)).expect("known");
    world.report(1, ended()).expect("reported");
    let smaller = Node {
        capacity: Resources {
            memory: Mib(1024),
            ..node(1).capacity
        },
        ..node(1)
    };
    world.act(Command::AdmitNode(smaller)).expect("known");
    let after = world.state.sliced(host, &voters).expect("a host");
    assert_eq!(after.changes_since(&before), []);
}
