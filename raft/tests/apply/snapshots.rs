//! Pausing, resuming, and who holds what.

use proto::epoch::Epoch;
use proto::ids::NodeId;
use wrenn_raft::command::{Answer, Command, Receipt, Refusal, Report, StopCause, Verdict};
use wrenn_raft::state::{Desired, Phase, Resources};

use crate::world::*;

fn unfit(answer: Answer) -> String {
    match answer {
        Err(Refusal::Unfit(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

fn no_room(answer: Answer) -> String {
    match answer {
        Err(Refusal::NoRoom(lack)) => lack.0,
        other => panic!("not refused: {other:?}"),
    }
}

/// Three nodes, and sandbox 1 at rest on the second as snapshot 1.
fn at_rest() -> (World, NodeId, NodeId) {
    let (mut world, second, third) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.rest(1, 1);
    (world, second, third)
}

#[test]
fn a_sealed_sandbox_rests_as_its_snapshot_and_frees_its_room() {
    let (world, second, _) = at_rest();
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.desired, sandbox.snapshot),
        (Phase::Paused, Desired::Paused, Some(snapshot_id(1)))
    );
    assert_eq!(world.state.reserved(second), Resources::default());
    assert_eq!(world.state.sandboxes_on(second).count(), 0);
    assert_eq!(world.state.ended_sandboxes().count(), 0, "it is not over");
    let snapshot = world.snapshot(1).expect("it is on record");
    assert_eq!(
        (snapshot.sealed_by, snapshot.epoch),
        (second, sandbox.epoch)
    );
    assert!(snapshot.holders.iter().eq([&second]));
}

#[test]
fn what_is_resumed_gets_a_new_epoch_on_the_node_that_holds_it() {
    let (mut world, second, _) = at_rest();
    let epoch = Epoch(world.index + 1);
    let placed = Ok(Receipt::Placed {
        node: second,
        epoch,
    });
    assert_eq!(world.resume(1, 1), placed);
    assert_eq!(world.sandbox(1).phase, Phase::Resuming);
    assert_eq!(world.resume(1, 1), placed, "asked again it is the same");
    world.run(1);
    assert_eq!(world.resume(1, 1), placed, "even once it runs");
    assert_eq!(
        world.sandbox(1).snapshot,
        Some(snapshot_id(1)),
        "its pages may still come from there"
    );
}

#[test]
fn a_new_pause_replaces_what_the_sandbox_rested_as() {
    let (mut world, _, _) = at_rest();
    world.resume(1, 1).expect("there is room");
    world.run(1);
    world.rest(1, 2);
    assert_eq!(world.snapshot(1), None);
    assert!(world.snapshot(2).is_some());
    let why = unfit(world.resume(1, 1));
    assert_eq!(why, "it was paused anew meanwhile: look again");
}

/// The answer to a pause was lost, and somebody resumed the sandbox before it was asked for again.
#[test]
fn a_pause_means_one_run_and_no_later_one() {
    let (mut world, _, _) = at_rest();
    let earlier = world.sandbox(1).epoch;
    world.resume(1, 1).expect("there is room");
    world.run(1);
    let again = world.act(Command::PauseSandbox {
        id: sandbox_id(1),
        epoch: earlier,
        cause: StopCause::Asked,
        then_on: None,
    });
    let newest = world.sandbox(1).epoch;
    assert_eq!(again, Err(Refusal::Fenced { newest }));
    assert_eq!(world.sandbox(1).phase, Phase::Running);
}

#[test]
fn only_what_runs_can_be_paused() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    assert!(unfit(world.pause(1)).starts_with("it does not run yet"));
    world.run(1);
    assert_eq!(world.pause(1), Ok(Receipt::Done(1)));
    assert_eq!(world.pause(1), Ok(Receipt::Done(0)), "asked again");
    world.act(stop(1)).expect("known");
    assert!(unfit(world.pause(1)).starts_with("it is stopped"));
}

#[test]
fn a_sandbox_that_could_not_be_sealed_runs_on_and_says_why() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.pause(1).expect("it runs");
    let thawed = Report::Thawed {
        reason: "the disk is full".into(),
    };
    assert_eq!(world.report(1, thawed), Ok(Receipt::Done(1)));
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.desired, sandbox.reason.as_str()),
        (Phase::Running, Desired::Running, "the disk is full")
    );
    // What became of the pause is not what became of the sandbox.
    world.report(1, ended()).expect("it ends");
    assert_eq!(world.sandbox(1).reason, "");
}

/// A seal whose report was late: the guest has gone on since, and is being paused again.
#[test]
fn a_seal_counts_for_the_pause_it_was_made_for_only() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.pause(1).expect("it runs");
    let late = world.seal(1, 1, true);
    let thawed = Report::Thawed {
        reason: "the daemon died".into(),
    };
    world.report(1, thawed).expect("told");
    world.pause(1).expect("it runs");
    assert_eq!(world.report(1, late), Ok(Receipt::Done(0)));
    assert_eq!(world.sandbox(1).phase, Phase::Pausing);
    let newest = world.seal(1, 2, true);
    assert_eq!(world.report(1, newest), Ok(Receipt::Done(1)));
}

#[test]
fn a_bound_guest_that_is_lost_before_it_was_ever_sealed_starts_anew() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, bound(512));
    world.run(1);
    world.pause(1).expect("it runs");
    world.lose(second);
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.desired),
        (Phase::Starting, Desired::Running)
    );
}

#[test]
fn a_resume_that_fails_where_nobody_else_can_leaves_the_sandbox_as_it_was() {
    let (mut world, second, third) = at_rest();
    for other in [FOUNDER, third] {
        world.act(cordon(other)).expect("known");
    }
    world.resume(1, 1).expect("there is room");
    let failed = Report::Failed {
        reason: "no memory".into(),
    };
    assert_eq!(world.report(1, failed), Ok(Receipt::Done(1)));
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.reason.as_str()),
        (Phase::Paused, "on host2: no memory")
    );
    assert_eq!(world.state.reserved(second), Resources::default());
    world.resume(1, 1).expect("it can be tried again");
}

#[test]
fn what_is_stopped_at_rest_is_gone_at_once_with_its_snapshot() {
    let (mut world, _, _) = at_rest();
    assert_eq!(world.act(stop(1)), Ok(Receipt::Done(1)));
    assert_eq!(world.sandbox(1).phase, Phase::Stopped);
    assert_eq!(world.snapshot(1), None);
    assert!(unfit(world.resume(1, 1)).starts_with("it is stopped"));
}

#[test]
fn a_holder_is_preferred_to_a_node_with_more_room() {
    let (mut world, second, third) = at_rest();
    for n in 10..13 {
        world.create_on(second, n, waiting(1024));
    }
    let placed = world.resume(1, 1).expect("there is room");
    assert!(matches!(placed, Receipt::Placed { node, .. } if node == second));
    world.run(1);
    world.rest(1, 2);
    assert_eq!(world.hold(2, third, true), Ok(Receipt::Done(1)));
    assert_eq!(world.hold(2, third, true), Ok(Receipt::Done(0)));
    let placed = world.resume(1, 2).expect("there is room");
    assert!(
        matches!(placed, Receipt::Placed { node, .. } if node == third),
        "of two holders the one with more room: {placed:?}"
    );
}

#[test]
fn without_a_holder_in_reach_nothing_is_placed_and_the_holders_are_named() {
    let (mut world, second, third) = at_rest();
    world.judge(second, Verdict::Missing).expect("judged");
    assert_eq!(
        no_room(world.resume(1, 1)),
        "no host that holds its snapshot is reachable: host2"
    );
    world.hold(1, third, true).expect("known");
    let placed = world.resume(1, 1).expect("another has it");
    assert!(matches!(placed, Receipt::Placed { node, .. } if node == third));
}

#[test]
fn a_node_with_another_hypervisor_cannot_resume_it() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.pause(1).expect("it runs");
    let sealed = world.seal(1, 1, false);
    world.report(1, sealed).expect("sealed");
    assert_eq!(
        no_room(world.resume(1, 1)),
        "3 hosts are with another hypervisor than the snapshot's"
    );
}

#[test]
fn a_node_that_alone_holds_what_rests_is_not_removed_by_accident() {
    let (mut world, second, third) = at_rest();
    let why = unfit(world.act(remove(second, false)));
    assert!(
        why.starts_with("host2 has 1 capsule: drain it first"),
        "{why}"
    );
    world.hold(1, third, true).expect("known");
    world.act(remove(second, false)).expect("another has it");
    assert!(world.snapshot(1).expect("kept").holders.iter().eq([&third]));
    world.resume(1, 1).expect("it goes on there");
}

#[test]
fn a_lost_guest_that_was_paused_before_goes_on_from_there() {
    let (mut world, second, third) = World::of_three();
    world.create_on(second, 1, bound(512));
    world.run(1);
    world.rest(1, 1);
    world.hold(1, third, true).expect("known");
    world.resume(1, 1).expect("there is room");
    let owner = world.sandbox(1).owner;
    let other = if owner == second { third } else { second };
    world.run(1);
    world.lose(owner);
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.owner, sandbox.epoch),
        (Phase::Resuming, other, Epoch(world.index))
    );
}

#[test]
fn what_waited_for_a_host_that_is_declared_dead_is_back_at_its_last_pause() {
    let (mut world, second, third) = at_rest();
    world.hold(1, third, true).expect("known");
    world.resume(1, 1).expect("there is room");
    world.run(1);
    let owner = world.sandbox(1).owner;
    world.lose(owner);
    world.act(remove(owner, true)).expect("declared dead");
    let sandbox = world.sandbox(1);
    let name = if owner == second { "host2" } else { "host3" };
    assert_eq!(
        (sandbox.phase, sandbox.desired),
        (Phase::Paused, Desired::Paused)
    );
    assert_eq!(
        sandbox.reason,
        format!(
            "its host {name} was declared dead; it is as it was when it was last paused, and what it \
             did since is lost"
        )
    );
    world.resume(1, 1).expect("the other has it");
}

#[test]
fn a_guest_that_breaks_after_a_pause_is_back_at_that_pause() {
    let (mut world, _, _) = at_rest();
    world.resume(1, 1).expect("there is room");
    world.run(1);
    let failed = Report::Failed {
        reason: "its VMM was killed by signal 9".into(),
    };
    world.report(1, failed).expect("told");
    let sandbox = world.sandbox(1);
    assert_eq!(sandbox.phase, Phase::Paused);
    assert!(
        sandbox.reason.contains("signal 9; it is as it was"),
        "{}",
        sandbox.reason
    );
    world.resume(1, 1).expect("it can go on");
}

#[test]
fn a_guest_that_was_never_sealed_is_lost_with_its_dead_host() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.pause(1).expect("it runs");
    world.lose(second);
    world.act(remove(second, true)).expect("declared dead");
    assert_eq!(world.sandbox(1).phase, Phase::Error);
}

/// Sandbox 1 on the second of three nodes, being paused to go on where `to` says.
fn on_the_move(to: impl Fn(NodeId, NodeId) -> NodeId) -> (World, NodeId, NodeId) {
    let (mut world, second, third) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    let answer = world.pause_to(1, to(second, third));
    assert_eq!(answer, Ok(Receipt::Done(1)));
    (world, second, third)
}

#[test]
fn what_moves_goes_on_at_its_goal_with_the_entry_that_seals_it() {
    let (mut world, second, third) = on_the_move(|_, third| third);
    let before = world.sandbox(1).epoch;
    assert_eq!(world.sandbox(1).bound_for, Some(third));
    let sealed = world.seal(1, 1, true);
    assert_eq!(world.report(1, sealed), Ok(Receipt::Done(1)));
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.owner, sandbox.bound_for),
        (Phase::Resuming, third, None)
    );
    assert!(sandbox.epoch > before, "a new ownership");
    assert_eq!(world.state.reserved(second), Resources::default());
    let snapshot = world.snapshot(1).expect("kept");
    assert!(snapshot.holders.contains(&second), "its sealer holds it");
}

#[test]
fn a_move_to_where_there_is_no_room_is_refused_and_the_sandbox_runs_on() {
    let (mut world, second, third) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.act(cordon(third)).expect("cordoned");
    let lack = no_room(world.pause_to(1, third));
    assert!(lack.contains("cordoned"), "{lack}");
    assert_eq!(world.sandbox(1).phase, Phase::Running);
}

#[test]
fn what_cannot_go_on_at_its_goal_any_more_goes_on_where_it_can() {
    let (mut world, second, third) = on_the_move(|_, third| third);
    world.act(cordon(third)).expect("cordoned");
    let sealed = world.seal(1, 1, true);
    world.report(1, sealed).expect("sealed");
    let sandbox = world.sandbox(1);
    assert_eq!((sandbox.phase, sandbox.owner), (Phase::Resuming, second));
    assert!(
        sandbox.reason.contains("could not be moved"),
        "{}",
        sandbox.reason
    );
}

#[test]
fn a_move_that_could_not_be_sealed_is_over() {
    let (mut world, second, _) = on_the_move(|_, third| third);
    let reason = "full".to_owned();
    world.report(1, Report::Thawed { reason }).expect("thawed");
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.owner, sandbox.bound_for),
        (Phase::Running, second, None)
    );
    world.rest(1, 1);
    assert_eq!(world.sandbox(1).phase, Phase::Paused, "a plain pause since");
}

#[test]
fn a_resume_may_name_its_node_and_the_node_of_the_create_binds_it_no_more() {
    let (mut world, second, third) = World::of_three();
    let mut spec = waiting(512);
    spec.on_node = Some(second);
    world.create_on(second, 1, spec);
    world.run(1);
    world.rest(1, 1);
    let answer = world.act(Command::ResumeSandbox {
        id: sandbox_id(1),
        snapshot: snapshot_id(1),
        to: Some(third),
        hints: vec![],
    });
    assert!(
        matches!(answer, Ok(Receipt::Placed { node, .. }) if node == third),
        "{answer:?}"
    );
}

#[test]
fn what_is_paused_for_idleness_says_so_until_it_goes_on() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    let epoch = world.sandbox(1).epoch;
    let answer = world.act(Command::PauseSandbox {
        id: sandbox_id(1),
        epoch,
        cause: StopCause::Idle,
        then_on: None,
    });
    assert_eq!(answer, Ok(Receipt::Done(1)));
    let sealed = world.seal(1, 1, true);
    world.report(1, sealed).expect("sealed");
    assert_eq!(world.sandbox(1).reason, "inactivity timeout passed");
    world.resume(1, 1).expect("there is room");
    assert_eq!(world.sandbox(1).reason, "");
}
