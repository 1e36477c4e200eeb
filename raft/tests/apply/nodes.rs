//! Nodes and join tokens, refusal by refusal, and what becomes of a lost node's sandboxes.

mod tokens;

use std::collections::BTreeMap;
use std::time::Duration;

use proto::ids::{ClusterId, NodeId, TeamId};
use proto::units::Stamp;
use wrenn_raft::command::{Command, Receipt, Refusal, Report, Verdict};
use wrenn_raft::state::{
    Desired, Former, GuestVersions, Liveness, Node, Phase, Resources, SandboxSpec, Settings, Token,
};

use crate::world::*;

fn unfit(answer: Result<Receipt, Refusal>) -> String {
    match answer {
        Err(Refusal::Unfit(why)) => why,
        other => panic!("not refused as unfit: {other:?}"),
    }
}

fn with_token(uses: u32) -> World {
    let mut world = World::founded();
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    world
        .act(Command::PutToken(token(1, uses, expires_at)))
        .expect("a token is put");
    world
}

// Founding and settings.

#[test]
fn a_cluster_is_founded_once_and_by_settings_that_work() {
    let mut world = World::empty();
    let found = |number, settings| Command::FoundCluster {
        id: ClusterId(mark(b'c', number)),
        settings,
    };
    let even = Settings {
        max_voters: 4,
        ..Settings::default()
    };
    assert_eq!(
        unfit(world.act(Command::PutSettings(Settings::default()))),
        "the cluster is not founded yet"
    );
    assert_eq!(
        unfit(world.act(found(1, even))),
        "max_voters is 1, 3, 5 or 7, not 4"
    );
    let defaults = Settings::default();
    assert_eq!(world.act(found(1, defaults)), Ok(Receipt::Done(1)));
    assert_eq!(world.act(found(1, defaults)), Ok(Receipt::Done(0)));
    assert!(matches!(
        world.act(found(2, defaults)),
        Err(Refusal::IdTaken(_))
    ));
    assert!(matches!(
        world.act(Command::PutSettings(even)),
        Err(Refusal::Unfit(_))
    ));
}

fn recovered(id: u8, last: u64, lost: &[NodeId]) -> Command {
    Command::RecoverCluster {
        id: ClusterId(mark(b'r', id)),
        last,
        lost: lost.to_vec(),
    }
}

#[test]
fn a_recovered_cluster_has_another_id_and_remembers_the_former_ones() {
    let (mut world, second, third) = World::of_three();
    let founded = world.state.cluster().expect("founded").clone();
    let recover = recovered(1, 40, &[second, third]);
    assert_eq!(world.act(recover.clone()), Ok(Receipt::Done(1)));
    let now = world.state.cluster().expect("founded").clone();
    assert_eq!(now.id, ClusterId(mark(b'r', 1)));
    assert_eq!(
        now.former,
        [Former {
            id: founded.id,
            last: 40
        }]
    );
    assert_eq!(
        (now.founded_at, now.settings),
        (founded.founded_at, founded.settings)
    );
    // Proposed again after a crash it changes nothing, and neither does an older one.
    assert_eq!(world.act(recover.clone()), Ok(Receipt::Done(0)));
    world.act(recovered(2, 60, &[])).expect("recovered again");
    assert_eq!(world.act(recover), Ok(Receipt::Done(0)));
    let former = &world.state.cluster().expect("founded").former;
    assert_eq!(former.len(), 2);
    for id in 3..40 {
        world.act(recovered(id, 99, &[])).expect("recovered");
    }
    let former = &world.state.cluster().expect("founded").former;
    assert_eq!(former.len(), 16, "bounded");
}

#[test]
fn whoever_a_recovery_declares_lost_is_shut_out_at_once_and_settled_later() {
    let (mut world, second, third) = World::of_three();
    let epoch = world.create_on(second, 1, bound(512));
    let lost = world.state.node(second).expect("known").clone();
    world
        .act(recovered(1, 40, &[second, NodeId(77)]))
        .expect("recovered");
    let row = world.state.node(second).expect("its row waits");
    assert!(row.cordoned && row.liveness == Liveness::Alive);
    assert!(world.state.removed_node(&lost.key).is_some());
    assert_eq!(world.sandbox(1).epoch, epoch, "its lease may not be over");
    assert!(world.state.removed_node(&node(3).key).is_none());
    assert!(world.state.node(third).is_some_and(|node| !node.cordoned));
    // Even with a token it is not taken in again under its old key.
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    world
        .act(Command::PutToken(token(9, 1, expires_at)))
        .expect("put");
    let why = unfit(world.act(redeem(9, lost.clone())));
    assert!(why.contains("was removed"), "{why}");

    world.lose(second);
    let again = world.sandbox(1);
    assert!(again.epoch > epoch && again.owner != second);
    world.act(remove(second, true)).expect("its lease is over");
    assert!(world.state.node(second).is_none());
    assert!(world.state.removed_node(&lost.key).is_some());
}

#[test]
fn the_first_node_cannot_have_an_id_that_a_joiner_will_get() {
    for id in [0, 2, 900] {
        let mut world = World::empty();
        let founder = Node {
            id: NodeId(id),
            ..node(1)
        };
        let why = unfit(world.act(Command::AdmitNode(founder)));
        assert_eq!(why, format!("the first node cannot be node-{id}"));
    }
}

#[test]
fn a_node_that_starts_again_keeps_what_was_decided_about_it() {
    let (mut world, second, _) = World::of_three();
    world
        .act(Command::ChangeNode {
            node: second,
            cordoned: Some(true),
            draining: None,
            tags: Some(BTreeMap::from([("zone".into(), "b".into())])),
        })
        .expect("changed");
    world.judge(second, Verdict::Missing).expect("judged");
    let before = world.state.node(second).expect("known").clone();
    let again = Node {
        id: second,
        incarnation: 77,
        version: "0.2.0".into(),
        team: Some(TeamId([7; 16])),
        name: "other".into(),
        ..node(2)
    };
    world.act(Command::AdmitNode(again)).expect("known already");
    let after = world.state.node(second).expect("known");
    let expected = Node {
        incarnation: world.index,
        version: "0.2.0".into(),
        ..before
    };
    assert_eq!(*after, expected);
}

#[test]
fn only_a_token_lets_a_second_node_in() {
    let mut world = World::founded();
    let second = Node {
        id: NodeId(2),
        ..node(2)
    };
    assert_eq!(
        world.act(Command::AdmitNode(second)),
        Err(Refusal::NoSuchNode("node-2".into()))
    );
}

#[test]
fn a_draining_node_is_cordoned_until_both_end() {
    let mut world = World::founded();
    let change = |cordoned, draining| Command::ChangeNode {
        node: FOUNDER,
        cordoned,
        draining,
        tags: None,
    };
    let mut after = |cordoned, draining| {
        world.act(change(cordoned, draining)).expect("changed");
        let node = world.state.node(FOUNDER).expect("known");
        (node.cordoned, node.draining)
    };
    assert_eq!(after(None, Some(true)), (true, true));
    assert_eq!(after(Some(false), None), (true, true));
    assert_eq!(after(None, Some(false)), (true, false));
    assert_eq!(after(Some(false), None), (false, false));
    let unknown = cordon(NodeId(99));
    let refused = Err(Refusal::NoSuchNode("node-99".into()));
    assert_eq!(world.act(unknown), refused);
}

// Removal.

#[test]
fn an_empty_node_is_removed_once_and_its_key_never_comes_back() {
    let (mut world, second, _) = World::of_three();
    assert_eq!(world.act(remove(second, false)), Ok(Receipt::Done(1)));
    assert_eq!(world.act(remove(second, false)), Ok(Receipt::Done(0)));
    assert!(world.state.node_by_key(&node_key(2)).is_none());
    let expected = format!(
        "this node was removed from the cluster as {second} and its key is not taken again; \
         remove its data directory so that it gets a new one"
    );
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let another = Command::PutToken(token(1, 1, expires_at));
    world.act(another).expect("put");
    // By a new token, and by the one it came in by.
    for n in [1, 202] {
        assert_eq!(unfit(world.act(redeem(n, node(2)))), expected);
    }
    let back = Node {
        id: second,
        ..node(2)
    };
    let refused = world.act(Command::AdmitNode(back));
    assert_eq!(refused, Err(Refusal::NoSuchNode(second.to_string())));
    let unknown = remove(NodeId(99), true);
    let refused = Err(Refusal::NoSuchNode("node-99".into()));
    assert_eq!(world.act(unknown), refused);
}

#[test]
fn the_last_member_cannot_be_removed_whatever_hosts_of_teams_are_left() {
    let mut world = World::founded();
    let last = "it is the last node of the cluster";
    assert_eq!(unfit(world.act(remove(FOUNDER, false))), last);
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let scoped = Token {
        team: Some(TeamId([7; 16])),
        ..token(1, 1, expires_at)
    };
    world.act(Command::PutToken(scoped)).expect("put");
    let Ok(Receipt::Admitted(host)) = world.act(redeem(1, node(2))) else {
        panic!("not let in");
    };
    assert_eq!(unfit(world.act(remove(FOUNDER, true))), last);
    assert_eq!(world.act(remove(host, false)), Ok(Receipt::Done(1)));
}

#[test]
fn a_node_with_sandboxes_goes_only_when_it_is_not_alive_and_declared_dead() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    let why = unfit(world.act(remove(second, false)));
    assert!(
        why.starts_with("host2 has 1 capsule: drain it first"),
        "{why}"
    );
    let why = unfit(world.act(remove(second, true)));
    assert_eq!(
        why,
        "host2 is alive and has 1 capsule: drain it, or stop it first"
    );
    world.judge(second, Verdict::Missing).expect("judged");
    assert!(matches!(
        world.act(remove(second, false)),
        Err(Refusal::Unfit(_))
    ));
    assert_eq!(world.act(remove(second, true)), Ok(Receipt::Done(1)));
    let given_up = world.sandbox(1);
    assert_eq!(
        (given_up.phase, given_up.desired, given_up.reason.as_str()),
        (
            Phase::Error,
            Desired::Stopped,
            "its host host2 was declared dead"
        )
    );
}

/// Its guest may run on for some seconds: until the lease has run out and the kill is due.
#[test]
fn a_bound_sandbox_of_a_missing_node_that_is_removed_is_not_given_out_again() {
    let (mut world, second, _) = World::of_three();
    let epoch = world.create_on(second, 1, bound(512));
    world.create_on(second, 2, bound(512));
    world.act(stop(2)).expect("known");
    world.judge(second, Verdict::Missing).expect("judged");
    world.act(remove(second, true)).expect("declared dead");
    let given_up = world.sandbox(1);
    assert_eq!(
        (given_up.owner, given_up.epoch, given_up.phase),
        (second, epoch, Phase::Error)
    );
    assert_eq!(world.sandbox(2).phase, Phase::Stopped);
    assert_eq!(world.state.reserved(second), Resources::default());
    assert_eq!(world.act(stop(1)), Ok(Receipt::Done(0)));
}

#[test]
fn declaring_a_lost_node_dead_gives_up_what_waited_for_it() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.create_on(second, 2, waiting(512));
    world.act(stop(2)).expect("known");
    world.lose(second);
    world.act(remove(second, true)).expect("declared dead");
    assert_eq!(world.sandbox(1).phase, Phase::Error);
    assert_eq!(world.sandbox(1).owner, second);
    assert_eq!(world.sandbox(2).phase, Phase::Stopped);
}

// Verdicts.

#[test]
fn a_verdict_about_an_earlier_start_changes_nothing() {
    let (mut world, second, _) = World::of_three();
    let stale = |verdict| Command::JudgeNode {
        node: second,
        incarnation: 0,
        verdict,
    };
    assert_eq!(world.act(stale(Verdict::Missing)), Ok(Receipt::Done(0)));
    world.judge(second, Verdict::Missing).expect("judged");
    for verdict in [Verdict::Lost, Verdict::Back] {
        assert_eq!(world.act(stale(verdict)), Ok(Receipt::Done(0)));
    }
    let unknown = Command::JudgeNode {
        node: NodeId(99),
        incarnation: 0,
        verdict: Verdict::Back,
    };
    let refused = Err(Refusal::NoSuchNode("node-99".into()));
    assert_eq!(world.act(unknown), refused);
}

#[test]
fn the_longest_lease_times_that_were_changed_are_remembered() {
    let mut world = World::of_three().0;
    let outlived = |world: &World| world.state.cluster().expect("founded").outlived;
    assert_eq!(outlived(&world), None);
    let times = |ttl| Settings {
        lease_ttl: Duration::from_secs(ttl),
        lease_grace: Duration::from_secs(2 * ttl),
        ..Settings::default()
    };
    for (ttl, longest) in [(30, (10, 60)), (5, (30, 60)), (5, (30, 60))] {
        world.act(Command::PutSettings(times(ttl))).expect("put");
        let outlived = outlived(&world).expect("changed");
        let secs = (outlived.lease_ttl.as_secs(), outlived.lease_grace.as_secs());
        assert_eq!(secs, longest, "after {ttl}");
    }
    world.now = Stamp(world.now.0 + 25 * 3600 * 1000);
    world.act(Command::PutSettings(times(4))).expect("put");
    let after = outlived(&world).expect("changed");
    assert_eq!(after.lease_ttl, Duration::from_secs(5));
}

#[test]
fn the_steps_between_alive_missing_and_lost() {
    let (mut world, second, _) = World::of_three();
    let since = Stamp(world.now.0 + 2000);
    let (missing, lost) = (Liveness::Missing { since }, Liveness::Lost { since });
    let mut after = |verdict| {
        world.judge(second, verdict).expect("judged");
        world.state.node(second).expect("known").liveness
    };
    assert_eq!(after(Verdict::Lost), Liveness::Alive, "no step");
    assert_eq!(after(Verdict::Missing), missing);
    assert_eq!(after(Verdict::Missing), missing, "since when stays");
    assert_eq!(after(Verdict::Lost), lost);
    assert_eq!(after(Verdict::Missing), lost, "no step");
    assert_eq!(after(Verdict::Back), lost, "not under this incarnation");
}

#[test]
fn what_was_bound_to_a_lost_node_starts_anew_elsewhere_under_a_new_epoch() {
    let (mut world, second, third) = World::of_three();
    world.act(cordon(FOUNDER)).expect("known");
    let first = world.create_on(second, 1, bound(512));
    world.act(cordon(FOUNDER)).expect("known");
    world
        .report(1, Report::Running(GuestVersions::default()))
        .expect("it runs");
    world.judge(second, Verdict::Missing).expect("judged");
    assert_eq!(
        world.sandbox(1).owner,
        second,
        "missing gives nothing out yet"
    );
    world.judge(second, Verdict::Lost).expect("judged");
    let again = world.sandbox(1);
    assert_eq!(
        (again.owner, again.phase, again.started_at),
        (third, Phase::Starting, None)
    );
    assert_eq!(again.epoch.0, world.index);
    let stale = Command::ReportSandbox {
        id: sandbox_id(1),
        epoch: first,
        node: second,
        report: ended(),
    };
    let newest = world.sandbox(1).epoch;
    assert_eq!(world.act(stale), Err(Refusal::Fenced { newest }));
    assert_eq!(world.state.reserved(second), Resources::default());
}

#[test]
fn what_finds_no_room_elsewhere_ends_with_the_reason() {
    let (mut world, second, third) = World::of_three();
    world.create_on(second, 1, bound(4096));
    world.create_on(third, 2, waiting(512));
    world.act(cordon(FOUNDER)).expect("known");
    world.lose(second);
    let ended = world.sandbox(1);
    assert_eq!((ended.phase, ended.owner), (Phase::Error, second));
    assert_eq!(
        ended.reason,
        "its host host2 was lost; it could not be started elsewhere: host3 lacks memory (4096 MiB \
         wanted, 3584 MiB free); 1 host is cordoned; 1 host is not reachable"
    );
}

#[test]
fn a_bound_sandbox_pinned_to_its_lost_node_ends() {
    let (mut world, second, _) = World::of_three();
    let pinned = SandboxSpec {
        on_node: Some(second),
        ..bound(512)
    };
    world.create(1, pinned).expect("placed");
    world.lose(second);
    assert_eq!(world.sandbox(1).phase, Phase::Error);
}

#[test]
fn what_was_wanted_stopped_is_stopped_and_what_waits_stays() {
    let (mut world, second, _) = World::of_three();
    let epoch = world.create_on(second, 1, waiting(512));
    world.create_on(second, 2, bound(512));
    world.act(stop(2)).expect("known");
    world.lose(second);
    assert_eq!(world.sandbox(2).phase, Phase::Stopped);
    let waits = world.sandbox(1);
    assert_eq!(
        (waits.phase, waits.owner, waits.epoch),
        (Phase::Starting, second, epoch)
    );
    assert_eq!(world.state.reserved(second).sandboxes, 1);
    // It comes back and goes on as if nothing had been.
    world.announce(second, 2);
    world.judge(second, Verdict::Back).expect("judged");
    world
        .report(1, Report::Running(GuestVersions::default()))
        .expect("the epoch is still the newest");
    assert_eq!(world.sandbox(1).phase, Phase::Running);
    world.create_on(second, 3, waiting(512));
}

#[test]
fn a_waiting_sandbox_of_a_lost_node_that_is_stopped_ends_when_its_owner_says_so() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.lose(second);
    world.act(stop(1)).expect("known");
    assert_eq!(
        world.sandbox(1).phase,
        Phase::Stopping,
        "the guest may still run"
    );
    world.announce(second, 2);
    world.judge(second, Verdict::Back).expect("judged");
    world.report(1, ended()).expect("reported");
    assert_eq!(world.sandbox(1).phase, Phase::Stopped);
}

#[test]
fn a_lost_node_that_starts_again_is_missing_until_it_renews() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.lose(second);
    let lost_since = world.state.node(second).expect("known").liveness.since();
    world.announce(second, 2);
    let since = lost_since.expect("it was missing");
    let known = world.state.node(second).expect("known").liveness;
    assert_eq!(known, Liveness::Missing { since });
    assert!(world.create(2, waiting(4096)).is_ok(), "elsewhere");
    assert_ne!(world.sandbox(2).owner, second);
    world.judge(second, Verdict::Back).expect("judged");
    assert_eq!(world.sandbox(1).owner, second, "what waited is there still");
}

#[test]
fn a_node_that_comes_back_in_time_keeps_what_was_bound_to_it() {
    let (mut world, second, _) = World::of_three();
    let epoch = world.create_on(second, 1, bound(512));
    world.judge(second, Verdict::Missing).expect("judged");
    world.judge(second, Verdict::Back).expect("judged");
    let kept = world.sandbox(1);
    assert_eq!((kept.owner, kept.epoch), (second, epoch));
}
