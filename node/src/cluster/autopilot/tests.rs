//! Each rule by a case, then what holds of every picture, then whole clusters run to rest.

use proptest::prelude::*;

use super::*;

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
    ids.iter().copied().map(NodeId).collect()
}

/// A healthy cluster of nodes 1 to `count`, led by node 1.
fn cluster(count: u64, voters: &[u64], learners: &[u64]) -> Picture {
    let all = (1..=count).map(NodeId);
    Picture {
        here: NodeId(1),
        nodes: all.clone().map(|id| (id, Listed::default())).collect(),
        voters: ids(voters),
        learners: ids(learners),
        contacts: all.skip(1).map(|id| (id, in_step())).collect(),
        last_log: 10_000,
        leader_for: secs(3600),
        since_change: Some(secs(3600)),
        ..Picture::default()
    }
}

/// Alive, caught up and steady.
fn in_step() -> Contact {
    Contact {
        heard: Some(secs(1)),
        matched: Some(10_000),
        steady_for: secs(3600),
    }
}

impl Picture {
    fn seen(mut self, id: u64, contact: Contact) -> Self {
        self.contacts.insert(NodeId(id), contact);
        self
    }

    fn silent(self, id: u64, secs_ago: u64) -> Self {
        let contact = Contact {
            heard: Some(secs(secs_ago)),
            steady_for: Duration::ZERO,
            ..in_step()
        };
        self.seen(id, contact)
    }

    fn behind(self, id: u64) -> Self {
        let contact = Contact {
            matched: Some(0),
            steady_for: Duration::ZERO,
            ..in_step()
        };
        self.seen(id, contact)
    }

    fn draining(mut self, id: u64) -> Self {
        self.row(id).draining = true;
        self
    }

    fn in_zone(mut self, id: u64, zone: &str) -> Self {
        self.row(id).zone = Some(zone.into());
        self
    }

    fn removed(mut self, id: u64) -> Self {
        self.nodes.remove(&NodeId(id));
        self
    }

    fn row(&mut self, id: u64) -> &mut Listed {
        self.nodes.get_mut(&NodeId(id)).expect("the node is listed")
    }
}

fn voters(members: &[u64]) -> Option<Action> {
    Some(Action::SetVoters(ids(members)))
}

#[test]
fn a_healthy_cluster_is_left_alone() {
    for picture in [
        cluster(1, &[1], &[]),
        cluster(2, &[1], &[2]),
        cluster(3, &[1, 2, 3], &[]),
        cluster(6, &[1, 2, 3], &[4, 5, 6]),
        cluster(7, &[1, 2, 3, 4, 5], &[6, 7]),
    ] {
        assert_eq!(decide(&picture), None, "{picture:?}");
    }
}

#[test]
fn new_nodes_become_learners_one_at_a_time() {
    assert_eq!(
        decide(&cluster(3, &[1], &[])),
        Some(Action::AddLearner(NodeId(2)))
    );
    assert_eq!(
        decide(&cluster(3, &[1], &[2])),
        Some(Action::AddLearner(NodeId(3)))
    );
}

#[test]
fn a_node_that_is_not_heard_is_not_added() {
    let picture = cluster(2, &[1], &[]).seen(2, Contact::default());
    assert_eq!(decide(&picture), None);
}

#[test]
fn a_young_cluster_grows_from_one_voter_to_three_in_one_change_and_at_once() {
    let unsteady = Contact {
        steady_for: Duration::ZERO,
        ..in_step()
    };
    let mut picture = cluster(3, &[1], &[2, 3])
        .seen(2, unsteady)
        .seen(3, unsteady);
    picture.since_change = Some(Duration::ZERO);
    assert_eq!(decide(&picture), voters(&[1, 2, 3]));
}

#[test]
fn two_caught_up_nodes_of_three_do_not_make_two_voters() {
    assert_eq!(decide(&cluster(3, &[1], &[2, 3]).behind(3)), None);
}

#[test]
fn seven_voters_come_only_when_they_are_asked_for() {
    let settings = Settings::default();
    let of = |nodes, voters| settings.target_voters(nodes, voters);
    assert_eq!(
        [
            of(1, 1),
            of(2, 1),
            of(3, 1),
            of(6, 3),
            of(7, 3),
            of(1000, 5)
        ],
        [1, 1, 3, 3, 5, 5]
    );
    let seven = Settings {
        max_voters: 7,
        ..settings
    };
    assert_eq!(seven.target_voters(8, 5), 5);
    assert_eq!(seven.target_voters(9, 5), 7);
}

#[test]
fn a_cluster_that_shrinks_keeps_its_voters_while_there_are_as_many_nodes() {
    let of = |nodes, voters| Settings::default().target_voters(nodes, voters);
    assert_eq!(
        [of(6, 5), of(5, 5), of(4, 5), of(3, 5), of(2, 3)],
        [5, 5, 3, 3, 1]
    );
}

#[test]
fn a_voter_silent_for_ten_seconds_is_replaced_by_a_caught_up_learner() {
    let picture = cluster(4, &[1, 2, 3], &[4]);
    assert_eq!(decide(&picture.clone().silent(3, 9)), None);
    assert_eq!(decide(&picture.silent(3, 10)), voters(&[1, 2, 4]));
}

#[test]
fn a_silent_voter_without_a_replacement_stays() {
    assert_eq!(decide(&cluster(3, &[1, 2, 3], &[]).silent(3, 999)), None);
    assert_eq!(
        decide(&cluster(4, &[1, 2, 3], &[4]).silent(3, 999).behind(4)),
        None
    );
}

#[test]
fn a_replacement_must_have_been_steady() {
    let fresh = Contact {
        steady_for: secs(9),
        ..in_step()
    };
    let picture = cluster(4, &[1, 2, 3], &[4]).silent(3, 60).seen(4, fresh);
    assert_eq!(decide(&picture), None);
}

#[test]
fn replacements_keep_their_distance() {
    let mut picture = cluster(4, &[1, 2, 3], &[4]).silent(3, 60);
    picture.since_change = Some(secs(29));
    assert_eq!(decide(&picture), None);
    picture.since_change = Some(secs(30));
    assert_eq!(decide(&picture), voters(&[1, 2, 4]));
}

#[test]
fn nothing_is_done_below_quorum() {
    let picture = cluster(5, &[1, 2, 3], &[4, 5]).silent(2, 60).silent(3, 60);
    assert_eq!(decide(&picture), None);
}

#[test]
fn a_new_leader_calls_nobody_silent_before_it_has_listened() {
    let mut picture = cluster(4, &[1, 2, 3], &[4]).silent(3, 60);
    picture.leader_for = secs(9);
    assert_eq!(decide(&picture), None);
}

#[test]
fn a_joint_membership_is_finished_before_anything_else() {
    let mut picture = cluster(3, &[1, 2, 3], &[]).draining(1);
    picture.joint = true;
    assert_eq!(decide(&picture), Some(Action::FinishJoint));
    picture.change_under_way = true;
    assert_eq!(decide(&picture), None);
}

#[test]
fn another_zone_comes_before_a_higher_log() {
    let ahead = Contact {
        matched: Some(10_001),
        ..in_step()
    };
    let picture = cluster(5, &[1, 2, 3], &[4, 5])
        .silent(3, 60)
        .seen(4, ahead)
        .in_zone(1, "a")
        .in_zone(2, "b")
        .in_zone(4, "a")
        .in_zone(5, "c");
    assert_eq!(decide(&picture), voters(&[1, 2, 5]));
}

#[test]
fn in_equal_zones_the_higher_log_comes_first() {
    let ahead = Contact {
        matched: Some(10_001),
        ..in_step()
    };
    let picture = cluster(5, &[1, 2, 3], &[4, 5]).silent(3, 60).seen(5, ahead);
    assert_eq!(decide(&picture), voters(&[1, 2, 5]));
}

#[test]
fn a_draining_leader_hands_over_and_is_then_replaced() {
    let picture = cluster(4, &[1, 2, 3], &[4]).draining(1);
    assert_eq!(decide(&picture), Some(Action::TransferLeader(NodeId(2))));
    let next = Picture {
        here: NodeId(2),
        contacts: [1, 3, 4].map(|id| (NodeId(id), in_step())).into(),
        ..picture
    };
    assert_eq!(decide(&next), voters(&[2, 3, 4]));
}

#[test]
fn a_draining_voter_without_a_replacement_goes_on_voting() {
    assert_eq!(decide(&cluster(3, &[1, 2, 3], &[]).draining(3)), None);
}

#[test]
fn a_draining_node_is_not_promoted() {
    assert_eq!(
        decide(&cluster(4, &[1, 2, 3], &[4]).silent(3, 60).draining(4)),
        None
    );
}

#[test]
fn the_only_voter_drains_into_its_one_successor() {
    assert_eq!(decide(&cluster(2, &[1], &[2]).draining(1)), voters(&[1, 2]));
    let both = cluster(2, &[1, 2], &[]).draining(1);
    let handed = Some(Action::TransferLeader(NodeId(2)));
    assert_eq!(decide(&both), handed);
    let mut after = both.seen(1, in_step());
    after.here = NodeId(2);
    assert_eq!(decide(&after), voters(&[2]));
    assert_eq!(decide(&cluster(2, &[1], &[2]).draining(1).behind(2)), None);
    assert_eq!(decide(&cluster(1, &[1], &[]).draining(1)), None);
}

#[test]
fn a_removed_learner_goes_at_once_and_a_removed_voter_when_the_rest_can_do_without() {
    let picture = cluster(4, &[1, 2, 3], &[4]);
    let gone = Some(Action::Remove(ids(&[4])));
    assert_eq!(decide(&picture.clone().removed(4)), gone);
    assert_eq!(decide(&picture.clone().removed(3)), voters(&[1, 2, 4]));
    assert_eq!(
        decide(&cluster(3, &[1, 2, 3], &[]).removed(3)),
        voters(&[1])
    );
    // Three nodes are to be three voters: one alone would be worse than to wait.
    assert_eq!(decide(&picture.behind(4).removed(3)), None);
}

#[test]
fn two_removed_voters_of_five_leave_three_at_once() {
    let picture = cluster(7, &[1, 2, 3, 4, 5], &[6, 7]).behind(6).behind(7);
    let action = decide(&picture.removed(4).removed(5));
    assert_eq!(action, voters(&[1, 2, 3]));
}

#[test]
fn a_node_with_another_disk_neither_votes_nor_learns() {
    let mut picture = cluster(4, &[1, 2, 3], &[4]);
    picture.row(3).other_disk = true;
    assert_eq!(decide(&picture), voters(&[1, 2, 4]));
    let mut alone = cluster(2, &[1], &[]);
    alone.row(2).other_disk = true;
    assert_eq!(decide(&alone), None);
}

#[test]
fn learners_past_a_lowered_cap_become_mirrors() {
    let mut picture = cluster(6, &[1, 2, 3], &[4, 5, 6]).silent(4, 60);
    picture.settings.max_learners = 2;
    assert_eq!(decide(&picture), Some(Action::Remove(ids(&[4]))));
    picture.settings.max_learners = 1;
    assert_eq!(decide(&picture), Some(Action::Remove(ids(&[4, 6]))));
}

#[test]
fn a_learner_long_silent_leaves_its_place_to_a_mirror_that_is_alive() {
    let mut picture = cluster(6, &[1, 2, 3], &[4, 5]);
    picture.settings.max_learners = 2;
    assert_eq!(decide(&picture.clone().silent(4, 599)), None);
    let picture = picture.silent(4, 600);
    assert_eq!(decide(&picture), Some(Action::Remove(ids(&[4]))));
    assert_eq!(decide(&picture.silent(6, 600)), None);
}

#[test]
fn steadiness_begins_anew_with_each_break() {
    let mut steadiness = Steadiness::default();
    let mut look = |now: u64, picture: &Picture| {
        let mut picture = picture.clone();
        steadiness.fill_in(Tick(secs(now)), &mut picture);
        picture.contacts[&NodeId(2)].steady_for
    };
    let (good, bad) = (cluster(2, &[1], &[2]), cluster(2, &[1], &[2]).silent(2, 60));
    assert_eq!(look(100, &good), Duration::ZERO);
    assert_eq!(look(107, &good), secs(7));
    look(108, &bad);
    assert_eq!(look(109, &good), Duration::ZERO);
}

/// Carries a step out as raft would, and says whether this node still leads.
fn carry_out(picture: &mut Picture, action: Action) {
    match action {
        Action::FinishJoint => picture.joint = false,
        Action::TransferLeader(to) => {
            let old = std::mem::replace(&mut picture.here, to);
            picture.contacts.remove(&to);
            picture.contacts.insert(old, in_step());
        }
        Action::Remove(gone) => picture.learners.retain(|id| !gone.contains(id)),
        Action::SetVoters(voters) => {
            picture.learners.extend(picture.voters.iter());
            picture.learners.retain(|id| !voters.contains(id));
            picture.voters = voters;
            if !picture.voters.contains(&picture.here) {
                let next = *picture.voters.first().expect("somebody votes");
                carry_out(picture, Action::TransferLeader(next));
            }
        }
        Action::AddLearner(id) => {
            picture.learners.insert(id);
        }
    }
}

/// Decides and carries out until nothing is left to do; `None` if that never comes.
fn run_to_rest(picture: &mut Picture) -> Option<usize> {
    // Each node joins or goes once, and the voters change a few times.
    let bound = picture.nodes.len() + picture.learners.len() + picture.voters.len() + 10;
    for step in 0..bound {
        let Some(action) = decide(picture) else {
            return Some(step);
        };
        carry_out(picture, action);
        picture.since_change = Some(secs(3600));
    }
    None
}

#[test]
fn a_thousand_nodes_come_to_rest_at_exactly_the_caps() {
    for (max_voters, expected) in [(5, 5), (3, 3), (7, 7), (1, 1)] {
        let mut picture = cluster(1000, &[1], &[]);
        picture.settings.max_voters = max_voters;
        run_to_rest(&mut picture).expect("it comes to rest");
        assert_eq!(
            (picture.voters.len(), picture.learners.len()),
            (expected, 32)
        );
    }
}

#[test]
fn low_caps_still_let_a_cluster_grow_to_its_voters() {
    let mut picture = cluster(9, &[1], &[]);
    picture.settings.max_learners = 0;
    run_to_rest(&mut picture).expect("it comes to rest");
    assert_eq!((picture.voters.len(), picture.learners.len()), (5, 0));
}

fn any_contact() -> impl Strategy<Value = Contact> {
    let heard = prop_oneof![
        4 => Just(Some(secs(1))),
        1 => (0_u64..1000).prop_map(|ago| Some(secs(ago))),
        1 => Just(None),
    ];
    let matched = prop_oneof![
        4 => (9_990_u64..=10_000).prop_map(Some),
        1 => Just(Some(0)),
        1 => Just(None),
    ];
    (heard, matched, 0_u64..20).prop_map(|(heard, matched, steady)| Contact {
        heard,
        matched,
        steady_for: secs(steady),
    })
}

fn any_listed() -> impl Strategy<Value = Listed> {
    let zone = prop::option::of(prop::sample::select(vec!["a", "b", "c"]));
    let flag = |weight| prop::bool::weighted(weight);
    (zone, flag(0.15), flag(0.1)).prop_map(|(zone, draining, other_disk)| Listed {
        zone: zone.map(Into::into),
        draining,
        other_disk,
    })
}

/// What one id is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Voter,
    Learner,
    Mirror,
}

type AnyNode = (Role, Option<Listed>, Contact);

fn any_node() -> impl Strategy<Value = AnyNode> {
    let role = prop::sample::select(vec![Role::Voter, Role::Learner, Role::Mirror]);
    (
        role,
        prop::option::weighted(0.9, any_listed()),
        any_contact(),
    )
}

/// Any picture at all in which node 1 leads and votes, consistent or not.
fn any_picture() -> impl Strategy<Value = Picture> {
    let nodes = prop::collection::vec(any_node(), 0..12);
    let caps = prop::sample::select(vec![1_usize, 3, 5, 7]);
    let since = prop::option::of((0_u64..60).prop_map(secs));
    (nodes, any_listed(), caps, 0_usize..6, since, 0_u64..60).prop_map(
        |(others, own, max_voters, max_learners, since_change, leader_for)| {
            let mut picture = cluster(1, &[1], &[]);
            picture.nodes.insert(NodeId(1), own);
            picture.settings.max_voters = max_voters;
            picture.settings.max_learners = max_learners;
            picture.since_change = since_change;
            picture.leader_for = secs(leader_for);
            for (id, (role, listed, contact)) in (2..).map(NodeId).zip(others) {
                picture.nodes.extend(listed.map(|listed| (id, listed)));
                picture.contacts.insert(id, contact);
                match role {
                    Role::Voter => picture.voters.insert(id),
                    Role::Learner => picture.learners.insert(id),
                    Role::Mirror => false,
                };
            }
            picture
        },
    )
}

/// More than half of `set` are listed and heard within [`ALIVE_WITHIN`], said independently.
fn quorum_is_alive(picture: &Picture, set: &BTreeSet<NodeId>) -> bool {
    let alive = |id: &&NodeId| {
        let heard = picture.contacts.get(id).and_then(|contact| contact.heard);
        let heard = heard.is_some_and(|heard| heard <= ALIVE_WITHIN);
        **id == picture.here || (heard && picture.nodes.contains_key(id))
    };
    set.iter().filter(alive).count() > set.len() / 2
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_change_of_voters_is_safe(picture in any_picture()) {
        if let Some(Action::SetVoters(new)) = decide(&picture) {
            prop_assert!(quorum_is_alive(&picture, &picture.voters), "old quorum");
            prop_assert!(quorum_is_alive(&picture, &new), "new quorum");
            let hands_over = picture.voters.len() == 1 && new.len() == 2;
            prop_assert!(new.len() % 2 == 1 || hands_over, "even");
            prop_assert!(new.iter().all(|id| picture.nodes.contains_key(id)), "not listed");
            for added in new.difference(&picture.voters) {
                let contact = picture.contacts[added];
                let listed = &picture.nodes[added];
                prop_assert!(contact.heard.is_some_and(|heard| heard <= ALIVE_WITHIN));
                prop_assert!(contact.matched >= Some(picture.last_log - CAUGHT_UP_WITHIN));
                prop_assert!(!listed.draining && !listed.other_disk);
                prop_assert!(picture.learners.contains(added), "not a learner");
            }
            let led = new.contains(&picture.here);
            let alone = picture.voters.len() == 1 && new.len() == 1;
            prop_assert!(led || alone, "left itself out");
        }
    }

    #[test]
    fn leadership_goes_only_to_a_fit_voter(picture in any_picture()) {
        if let Some(Action::TransferLeader(to)) = decide(&picture) {
            let listed = &picture.nodes[&to];
            prop_assert!(picture.voters.contains(&to) && to != picture.here);
            prop_assert!(!listed.draining && !listed.other_disk);
        }
    }

    #[test]
    fn nobody_who_votes_is_removed(picture in any_picture()) {
        if let Some(Action::Remove(gone)) = decide(&picture) {
            prop_assert!(!gone.is_empty());
            prop_assert!(gone.iter().all(|id| picture.learners.contains(id)));
        }
    }

    /// Whatever the picture, decisions carried out one after another come to an end.
    #[test]
    fn every_cluster_comes_to_rest(mut picture in any_picture()) {
        prop_assert!(run_to_rest(&mut picture).is_some(), "no rest: {:?}", decide(&picture));
    }

    /// From wherever it starts, a cluster whose every node is well comes to rest at its caps.
    #[test]
    fn a_healthy_cluster_rests_at_its_caps(mut picture in any_picture()) {
        let here = picture.here;
        for listed in picture.nodes.values_mut() {
            (listed.draining, listed.other_disk) = (false, false);
        }
        let outside = |id: &NodeId| picture.nodes.contains_key(id);
        picture.voters.retain(outside);
        for id in picture.nodes.keys().filter(|id| **id != here) {
            picture.contacts.insert(*id, in_step());
        }
        prop_assert!(run_to_rest(&mut picture).is_some());
        let target = picture.target();
        prop_assert_eq!(picture.voters.len(), target);
        let learners = picture.settings.max_learners.min(picture.nodes.len() - target);
        prop_assert_eq!(picture.learners.len(), learners);
    }
}
