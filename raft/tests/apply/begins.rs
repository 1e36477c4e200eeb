//! What a node has not begun it can lose without its word, and what it was let begin it cannot.

use proto::ids::{ClusterId, NodeId};
use wrenn_raft::command::{Command, Receipt, Refusal, Report, Verdict};
use wrenn_raft::state::{Desired, Node, Phase};

use crate::world::*;

/// Three nodes of a release that asks first; the second and third.
fn asking() -> (World, NodeId, NodeId) {
    let (mut world, second, third) = World::of_three();
    for (id, n) in [(FOUNDER, 1), (second, 2), (third, 3)] {
        let again = Node {
            id,
            asks_first: true,
            ..node(n)
        };
        world.act(Command::AdmitNode(again)).expect("a member");
    }
    (world, second, third)
}

/// The same, with sandbox 1 given to the second and not begun.
fn given() -> (World, NodeId) {
    let (mut world, second, _) = asking();
    let epoch = world.create_on(second, 1, waiting(512));
    let sandbox = world.sandbox(1);
    assert!(sandbox.not_begun);
    assert_eq!((sandbox.owner, sandbox.epoch), (second, epoch));
    (world, second)
}

#[test]
fn what_a_node_never_began_is_given_out_again_as_soon_as_it_is_missing() {
    let (mut world, second) = given();
    let before = world.sandbox(1).clone();
    world.judge(second, Verdict::Missing).expect("it is alive");
    let after = world.sandbox(1).clone();
    assert_ne!(after.owner, second);
    assert_eq!((after.phase, after.epoch.0), (Phase::Starting, world.index));
    assert!(after.not_begun, "the next one has to ask as well");

    let late = Command::ReportSandbox {
        id: before.id,
        epoch: before.epoch,
        node: second,
        report: Report::Begins,
    };
    let newest = after.epoch;
    assert_eq!(world.act(late), Err(Refusal::Fenced { newest }));
    assert_eq!(world.report(1, Report::Begins), Ok(Receipt::Done(1)));
    assert!(!world.sandbox(1).not_begun);
}

#[test]
fn what_a_node_was_let_begin_waits_for_it() {
    let (mut world, second) = given();
    assert_eq!(world.report(1, Report::Begins), Ok(Receipt::Done(1)));
    assert_eq!(world.report(1, Report::Begins), Ok(Receipt::Done(0)));
    world.lose(second);
    let sandbox = world.sandbox(1);
    assert_eq!((sandbox.owner, sandbox.phase), (second, Phase::Starting));
}

#[test]
fn what_nobody_else_can_take_stays_and_begins_when_its_node_is_back() {
    let (mut world, second, third) = asking();
    world.create_on(second, 1, waiting(512));
    for other in [FOUNDER, third] {
        world.act(cordon(other)).expect("known");
    }
    world.judge(second, Verdict::Missing).expect("it is alive");
    assert_eq!(world.sandbox(1).owner, second);
    world.judge(second, Verdict::Back).expect("it is missing");
    assert_eq!(world.report(1, Report::Begins), Ok(Receipt::Done(1)));

    world.judge(second, Verdict::Missing).expect("it is alive");
    world.judge(second, Verdict::Lost).expect("it is missing");
    assert_eq!(world.sandbox(1).owner, second);
}

#[test]
fn a_resume_that_was_never_begun_goes_on_elsewhere_from_the_same_snapshot() {
    let (mut world, second, third) = asking();
    world.create_on(second, 1, bound(512));
    world.run(1);
    world.rest(1, 1);
    world.hold(1, third, true).expect("known");
    world.resume(1, 1).expect("there is room");
    let first = world.sandbox(1).clone();
    assert!(first.not_begun && first.phase == Phase::Resuming);
    world.judge(first.owner, Verdict::Missing).expect("alive");
    let next = world.sandbox(1);
    assert_eq!((next.phase, next.snapshot), (first.phase, first.snapshot));
    assert!(next.owner != first.owner && next.epoch > first.epoch && next.not_begun);
}

#[test]
fn a_resume_that_fails_is_tried_on_each_of_three_hosts() {
    let (mut world, second, third) = asking();
    world.create_on(second, 1, bound(512));
    world.run(1);
    world.rest(1, 1);
    world.hold(1, third, true).expect("known");
    world.resume(1, 1).expect("there is room");
    let failed = |why: &str| Report::Failed {
        reason: why.to_owned(),
    };
    let mut hosts = vec![world.sandbox(1).owner];
    for why in ["no state for this processor", "a full disk"] {
        world.report(1, failed(why)).expect("it is the owner's");
        let next = world.sandbox(1);
        assert_eq!(next.phase, Phase::Resuming);
        assert!(
            next.reason.contains(why) && next.not_begun,
            "{}",
            next.reason
        );
        assert!(!hosts.contains(&next.owner), "{hosts:?}");
        hosts.push(next.owner);
    }
    world
        .report(1, failed("nothing"))
        .expect("it is the owner's");
    let rests = world.sandbox(1);
    assert_eq!((rests.phase, rests.failed_on.len()), (Phase::Paused, 0));
    for why in ["no state for this processor", "a full disk", "nothing"] {
        assert!(rests.reason.contains(why), "{}", rests.reason);
    }
    // Asked again, all may try again.
    world.resume(1, 1).expect("there is room");
    assert_eq!(world.sandbox(1).owner, hosts[0]);
}

#[test]
fn a_resume_that_was_bound_to_a_host_is_not_tried_elsewhere() {
    let (mut world, second, third) = asking();
    world.create_on(second, 1, bound(512));
    world.run(1);
    world.rest(1, 1);
    world.hold(1, third, true).expect("known");
    let resume = Command::ResumeSandbox {
        id: sandbox_id(1),
        snapshot: snapshot_id(1),
        to: Some(second),
        hints: vec![],
    };
    world.act(resume).expect("there is room");
    let reason = "no state for this processor".to_owned();
    let failed = Report::Failed { reason };
    world.report(1, failed).expect("it is the owner's");
    let rests = world.sandbox(1);
    assert_eq!((rests.phase, rests.owner), (Phase::Paused, second));
}

#[test]
fn what_was_never_begun_outlives_a_node_that_is_declared_dead() {
    let (mut world, second, third) = asking();
    world.create_on(second, 1, waiting(512));
    for other in [FOUNDER, third] {
        world.act(cordon(other)).expect("known");
    }
    world.judge(second, Verdict::Missing).expect("it is alive");
    let uncordon = Command::ChangeNode {
        node: third,
        cordoned: Some(false),
        draining: None,
        tags: None,
    };
    world.act(uncordon).expect("known");
    world.act(remove(second, true)).expect("declared dead");
    let sandbox = world.sandbox(1);
    assert_eq!((sandbox.owner, sandbox.phase), (third, Phase::Starting));
}

#[test]
fn what_was_never_begun_is_stopped_at_once_and_then_never_begins() {
    let (mut world, second, third) = asking();
    world.create_on(second, 1, waiting(512));
    for other in [FOUNDER, third] {
        world.act(cordon(other)).expect("known");
    }
    world.judge(second, Verdict::Missing).expect("it is alive");
    world.act(stop(1)).expect("it is there");
    assert_eq!(world.sandbox(1).phase, Phase::Stopped);
    world.judge(second, Verdict::Back).expect("it is missing");
    let refused = world.report(1, Report::Begins);
    assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
}

#[test]
fn what_is_to_stop_does_not_begin() {
    let (mut world, _) = given();
    world.act(stop(1)).expect("it is there");
    let refused = world.report(1, Report::Begins);
    assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
    assert_eq!(world.sandbox(1).desired, Desired::Stopped);
}

/// The word that let it begin may be among what the survivor never had.
#[test]
fn after_a_lost_quorum_nothing_counts_as_never_begun() {
    let (mut world, second) = given();
    let recover = Command::RecoverCluster {
        id: ClusterId([9; 16]),
        last: world.index,
        lost: vec![second],
    };
    world.act(recover).expect("the first one");
    assert!(!world.sandbox(1).not_begun);
    world.lose(second);
    assert_eq!(world.sandbox(1).owner, second);
    world.act(remove(second, true)).expect("declared dead");
    assert_eq!(world.sandbox(1).phase, Phase::Error);
}

/// Its guests run before anybody could know.
#[test]
fn a_node_of_an_earlier_release_keeps_what_it_was_given() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    assert!(!world.sandbox(1).not_begun);
    world.lose(second);
    assert_eq!(world.sandbox(1).owner, second);
    assert_eq!(world.report(1, Report::Begins), Ok(Receipt::Done(0)));
}
