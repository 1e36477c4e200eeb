//! Checkpoints: names for snapshots, forks, and what is kept warm.

use proto::epoch::Epoch;
use proto::ids::{NodeId, TeamId};
use proto::units::Mib;
use wrenn_raft::command::{Command, DropNamed, Receipt, Refusal, Report};
use wrenn_raft::state::{Desired, Node, Phase, SandboxSpec, Sealed, SnapshotKind};

use crate::world::*;

const NAME: &str = "mine";

/// Three nodes, and sandbox 1 that runs on the second.
fn running() -> (World, NodeId, NodeId) {
    let (mut world, second, third) = World::of_three();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    (world, second, third)
}

/// The same, paused as snapshot 1.
fn at_rest() -> (World, NodeId, NodeId) {
    let (mut world, second, third) = running();
    world.rest(1, 1);
    (world, second, third)
}

/// A sandbox that starts from the name.
fn named_spec() -> SandboxSpec {
    SandboxSpec {
        template: NAME.into(),
        ..waiting(512)
    }
}

fn drop_name(world: &mut World, by: u8) -> Receipt {
    let dropped = world.act(Command::DropNamed(DropNamed {
        team: TEAM,
        name: NAME.into(),
        snapshot: snapshot_id(by),
    }));
    dropped.expect("dropping is never refused")
}

#[test]
fn a_running_sandbox_is_sealed_under_a_name_and_goes_on() {
    let (mut world, second, _) = running();
    let epoch = world.sandbox(1).epoch;
    world.checkpointed(1, 7, name(NAME, false));
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.desired, sandbox.epoch),
        (Phase::Running, Desired::Running, epoch)
    );
    assert_eq!((sandbox.snapshot, &sandbox.checkpoint), (None, &None));
    let named = world.named(NAME).expect("it has its name");
    assert_eq!((named.snapshot, named.memory.0), (snapshot_id(7), 512));
    assert_eq!(named.size_bytes, 65 << 20);
    let snapshot = world.snapshot(7).expect("it is on record");
    assert!(snapshot.holders.iter().eq([&second]));
}

/// Sandbox 1 was sealed for a name as the disk alone, by a host with another hypervisor than all others.
fn base() -> (World, NodeId, NodeId) {
    let (mut world, second, third) = running();
    let asked = world.checkpoint(1, 7, name_of(SnapshotKind::Base, NAME, false));
    assert_eq!(asked, Ok(Receipt::Done(1)));
    let disk = sealed_disk(&world);
    assert_eq!(world.report(1, disk), Ok(Receipt::Done(1)));
    world.run(1);
    (world, second, third)
}

/// What the owner of sandbox 1 reports of a disk alone.
fn sealed_disk(world: &World) -> Report {
    Report::Sealed(Sealed {
        pause: world.sandbox(1).pause,
        kind: SnapshotKind::Base,
        memory_bytes: 0,
        ..sealed(7, false)
    })
}

#[test]
fn a_base_leaves_the_shape_to_the_create_but_for_the_disk_and_takes_any_hypervisor() {
    let (mut world, second, _) = base();
    let named = world.named(NAME).expect("it has its name");
    assert_eq!(
        (named.kind, named.size_bytes),
        (SnapshotKind::Base, 1 << 20)
    );
    let other_shape = SandboxSpec {
        vcpus: 3,
        memory: Mib(768),
        ..named_spec()
    };
    let placed = world.create(2, other_shape.clone()).expect("any shape");
    let Receipt::Placed { node, .. } = placed else {
        panic!("not placed: {placed:?}");
    };
    assert_eq!(node, second, "who holds the disk need not fetch it");
    assert_eq!(world.sandbox(2).origin, Some(snapshot_id(7)));
    let other_disk = SandboxSpec {
        disk: Mib(other_shape.disk.0 + 1),
        ..other_shape
    };
    assert!(matches!(
        world.create(3, other_disk),
        Err(Refusal::Unfit(_))
    ));
}

#[test]
fn what_boots_from_a_base_keeps_its_disk_on_record_until_it_rests_by_itself() {
    let (mut world, _, _) = base();
    world.create(2, named_spec()).expect("there is room");
    world.run(2);
    assert_eq!(drop_name(&mut world, 7), Receipt::Done(1));
    assert!(world.snapshot(7).is_some(), "it may have to boot again");
    world.rest(2, 2);
    assert_eq!(world.snapshot(7), None, "nobody needs it");
}

#[test]
fn a_disk_alone_is_not_taken_for_a_pause_or_a_snapshot_with_memory() {
    let (mut world, _, _) = running();
    world.checkpoint(1, 7, name(NAME, false)).expect("it runs");
    let disk = sealed_disk(&world);
    assert_eq!(world.report(1, disk), Ok(Receipt::Done(0)));
    let whole = world.seal(1, 7, true);
    world.report(1, whole).expect("sealed");
    world.run(1);
    assert_eq!(
        world.named(NAME).map(|it| it.kind),
        Some(SnapshotKind::Snapshot)
    );
    world.pause(1).expect("it runs");
    let disk = Report::Sealed(Sealed {
        pause: world.sandbox(1).pause,
        kind: SnapshotKind::Base,
        ..sealed(8, true)
    });
    assert_eq!(world.report(1, disk), Ok(Receipt::Done(0)));
    assert_eq!(world.sandbox(1).phase, Phase::Pausing);
}

#[test]
fn a_name_says_what_was_sealed_and_not_what_was_asked_for() {
    let (mut world, _, _) = at_rest();
    world
        .checkpoint(1, 7, name_of(SnapshotKind::Base, NAME, false))
        .expect("it rests");
    assert_eq!(
        world.named(NAME).map(|it| it.kind),
        Some(SnapshotKind::Snapshot)
    );
}

#[test]
fn what_rests_is_named_at_once_and_the_row_is_shared() {
    let (mut world, _, _) = at_rest();
    world.checkpoint(1, 7, name(NAME, false)).expect("it rests");
    assert_eq!(
        world.named(NAME).map(|it| it.snapshot),
        Some(snapshot_id(1))
    );
    assert_eq!(world.sandbox(1).phase, Phase::Paused);
    world.act(stop(1)).expect("known");
    assert!(world.snapshot(1).is_some(), "its name still stands for it");
    assert_eq!(drop_name(&mut world, 1), Receipt::Done(1));
    assert_eq!(world.snapshot(1), None, "nobody needs it");
}

#[test]
fn a_name_outlives_the_next_pause_of_what_was_sealed() {
    let (mut world, _, _) = at_rest();
    world.checkpoint(1, 7, name(NAME, false)).expect("it rests");
    world.resume(1, 1).expect("there is room");
    world.run(1);
    world.rest(1, 2);
    assert!(world.snapshot(1).is_some());
    assert_eq!(world.sandbox(1).snapshot, Some(snapshot_id(2)));
}

#[test]
fn a_checkpoint_asked_for_again_is_known_by_its_ask() {
    let (mut world, _, _) = running();
    world.checkpoint(1, 7, name(NAME, false)).expect("it runs");
    assert_eq!(
        world.checkpoint(1, 7, name(NAME, false)),
        Ok(Receipt::Done(0))
    );
    let sealed = world.seal(1, 7, true);
    world.report(1, sealed).expect("sealed");
    assert_eq!(
        world.checkpoint(1, 7, name(NAME, false)),
        Ok(Receipt::Done(0)),
        "it is there"
    );
    assert_eq!(
        world.sandbox(1).phase,
        Phase::Snapshotting,
        "it stands still"
    );
    world.run(1);
    assert_eq!(world.sandbox(1).phase, Phase::Running);
}

#[test]
fn a_name_is_taken_over_only_on_purpose() {
    let (mut world, _, _) = running();
    world.checkpointed(1, 7, name(NAME, false));
    let refused = world.checkpoint(1, 8, name(NAME, false));
    assert_eq!(refused, Err(Refusal::NameTaken(NAME.into())));
    world.checkpointed(1, 8, name(NAME, true));
    assert_eq!(
        world.named(NAME).map(|it| it.snapshot),
        Some(snapshot_id(8))
    );
    assert_eq!(world.snapshot(7), None, "nothing needs the one before");
    assert_eq!(
        drop_name(&mut world, 7),
        Receipt::Done(0),
        "it is another's now"
    );
    assert!(world.named(NAME).is_some());
}

#[test]
fn the_names_of_the_platform_are_nobodys_to_take() {
    let (mut world, _, _) = running();
    let refused = world.checkpoint(1, 7, name("minimal", true));
    assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
}

/// Two ask for one name; the second seal finds it taken.
#[test]
fn a_name_that_was_taken_meanwhile_is_left_to_its_owner() {
    let (mut world, second, _) = running();
    world.create_on(second, 2, waiting(512));
    world.run(2);
    world
        .checkpoint(1, 7, name(NAME, false))
        .expect("it is free");
    world.checkpointed(2, 8, name(NAME, false));
    let late = world.seal(1, 7, true);
    world.report(1, late).expect("heard");
    assert_eq!(world.sandbox(1).reason, "the name \"mine\" is taken");
    world.run(1);
    let sandbox = world.sandbox(1);
    assert_eq!(sandbox.phase, Phase::Running);
    assert_eq!(sandbox.reason, "the name \"mine\" is taken");
    assert_eq!(world.snapshot(7), None);
    assert_eq!(
        world.named(NAME).map(|it| it.snapshot),
        Some(snapshot_id(8))
    );
}

#[test]
fn a_checkpoint_that_cannot_be_sealed_registers_nothing() {
    let (mut world, _, _) = running();
    world.checkpoint(1, 7, name(NAME, false)).expect("it runs");
    let thawed = Report::Thawed {
        reason: "the disk is full".into(),
    };
    world.report(1, thawed).expect("told");
    let sandbox = world.sandbox(1);
    assert_eq!(
        (sandbox.phase, sandbox.reason.as_str()),
        (Phase::Running, "the disk is full")
    );
    assert_eq!(world.named(NAME), None);
    let late = world.seal(1, 7, true);
    assert_eq!(world.report(1, late), Ok(Receipt::Done(0)));
    assert_eq!(world.snapshot(7), None);
}

#[test]
fn what_starts_from_a_name_is_another_sandbox_of_its_shape() {
    let (mut world, second, _) = running();
    world.checkpointed(1, 7, name(NAME, false));
    let refused = world.create(
        2,
        SandboxSpec {
            vcpus: 2,
            ..named_spec()
        },
    );
    assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
    world.create(2, named_spec()).expect("there is room");
    let made = world.sandbox(2);
    assert_eq!(
        (made.phase, made.origin, made.snapshot),
        (Phase::Starting, Some(snapshot_id(7)), None)
    );
    assert_eq!(made.owner, second, "who has it comes first");
    assert!(made.epoch > world.sandbox(1).epoch);
    assert_eq!(drop_name(&mut world, 7), Receipt::Done(1));
    assert!(world.snapshot(7).is_some(), "a guest lives on it");
    world.run(2);
    world.rest(2, 9);
    assert_eq!(world.sandbox(2).origin, None);
    assert_eq!(world.snapshot(7), None, "all it had is in its own");
}

#[test]
fn what_breaks_before_its_own_first_pause_has_nothing_to_go_back_to() {
    let (mut world, _, _) = running();
    world.checkpointed(1, 7, name(NAME, false));
    world.create(2, named_spec()).expect("there is room");
    world.run(2);
    let failed = Report::Failed {
        reason: "killed".into(),
    };
    world.report(2, failed).expect("told");
    assert_eq!(world.sandbox(2).phase, Phase::Error);
    assert_eq!(world.sandbox(2).origin, None);
}

#[test]
fn a_bound_sandbox_starts_again_from_its_origin_elsewhere() {
    let (mut world, second, third) = running();
    world.checkpointed(1, 7, name(NAME, false));
    world.hold(7, third, true).expect("known");
    let spec = SandboxSpec {
        on_host_loss: bound(512).on_host_loss,
        ..named_spec()
    };
    world.create_on(second, 2, spec);
    world.run(2);
    drop_name(&mut world, 7);
    world.lose(second);
    let again = world.sandbox(2);
    assert_eq!(
        (again.phase, again.owner, again.origin),
        (Phase::Starting, third, Some(snapshot_id(7)))
    );
}

#[test]
fn another_team_neither_sees_nor_takes_a_name() {
    let (mut world, _, _) = running();
    world.checkpointed(1, 7, name(NAME, false));
    let other = TeamId(mark(b't', 9));
    assert_eq!(world.state.named(other, NAME), None);
    assert_eq!(world.state.named_by(other).count(), 0);
    let created = world.act(Command::CreateSandbox {
        id: sandbox_id(3),
        team: other,
        spec: named_spec(),
        hints: vec![],
    });
    assert_eq!(created, Err(Refusal::NoSuchTemplate(NAME.into())));
}

#[test]
fn forks_of_a_running_sandbox_all_start_from_one_checkpoint() {
    let (mut world, _, _) = running();
    world.checkpoint(1, 7, fork([11, 12])).expect("it runs");
    let sealed = world.seal(1, 7, true);
    world.report(1, sealed).expect("sealed");
    let epoch = Epoch(world.index);
    for n in [11, 12] {
        let made = world.sandbox(n);
        assert_eq!(
            (made.phase, made.origin, made.epoch),
            (Phase::Starting, Some(snapshot_id(7)), epoch)
        );
        assert_eq!(made.spec, world.sandbox(1).spec);
    }
    world.run(1);
    assert_eq!(world.sandbox(1).phase, Phase::Running);
    assert_eq!(world.checkpoint(1, 7, fork([11, 12])), Ok(Receipt::Done(0)));
    for n in [11, 12] {
        world.report(n, ended()).expect("told");
    }
    assert_eq!(world.snapshot(7), None, "it was theirs alone");
}

/// Two ask for forks of the same ids before either is sealed; who is sealed later makes none.
#[test]
fn forks_whose_ids_were_taken_meanwhile_are_left_as_they_are() {
    let (mut world, second, _) = running();
    world.create_on(second, 2, waiting(512));
    world.run(2);
    world.checkpoint(1, 7, fork([11, 12])).expect("it runs");
    world.checkpoint(2, 8, fork([12, 13])).expect("it runs");
    let sealed = world.seal(1, 7, true);
    world.report(1, sealed).expect("sealed");
    let made = world.sandbox(12).clone();
    let late = world.seal(2, 8, true);
    world.report(2, late).expect("heard");
    assert_eq!(world.sandbox(12), &made);
    assert_eq!(world.state.sandbox(sandbox_id(13)), None);
    assert_eq!(world.snapshot(8), None);
    assert!(
        world.sandbox(2).reason.contains("is taken"),
        "{:?}",
        world.sandbox(2)
    );
    world.run(2);
    assert_eq!(world.sandbox(2).phase, Phase::Running);
}

#[test]
fn what_rests_is_forked_at_once_and_keeps_resting() {
    let (mut world, _, _) = at_rest();
    world.checkpoint(1, 7, fork([11])).expect("it rests");
    assert_eq!(world.sandbox(1).phase, Phase::Paused);
    assert_eq!(world.sandbox(11).origin, Some(snapshot_id(1)));
}

#[test]
fn a_fork_without_room_says_so_and_the_others_start() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, waiting(2500));
    world.run(1);
    world.rest(1, 1);
    world.checkpoint(1, 7, fork(11..15)).expect("it rests");
    let phases: Vec<Phase> = (11..15).map(|n| world.sandbox(n).phase).collect();
    assert_eq!(
        phases,
        [
            Phase::Starting,
            Phase::Starting,
            Phase::Starting,
            Phase::Error
        ]
    );
    let last = world.sandbox(14);
    assert!(last.reason.contains("lacks memory"), "{}", last.reason);
    assert_eq!((last.desired, last.origin), (Desired::Stopped, None));
}

#[test]
fn a_sandbox_that_is_being_sealed_is_not_paused_or_sealed_again() {
    let (mut world, _, _) = running();
    world.checkpoint(1, 7, name(NAME, false)).expect("it runs");
    for refused in [world.pause(1), world.checkpoint(1, 8, fork([11]))] {
        assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
    }
    world.act(stop(1)).expect("it may be stopped");
    assert_eq!(world.sandbox(1).checkpoint, None);
}

#[test]
fn a_host_that_is_lost_takes_a_checkpoint_under_way_with_it() {
    let (mut world, second, _) = World::of_three();
    world.create_on(second, 1, bound(512));
    world.run(1);
    world.checkpoint(1, 7, name(NAME, false)).expect("it runs");
    world.lose(second);
    let again = world.sandbox(1);
    assert_eq!((again.phase, &again.checkpoint), (Phase::Starting, &None));
    assert_ne!(again.owner, second);
}

#[test]
fn a_node_that_alone_holds_a_name_is_not_removed_by_accident() {
    let (mut world, second, third) = running();
    world.checkpointed(1, 7, name(NAME, false));
    world.act(stop(1)).expect("known");
    world.report(1, ended()).expect("told");
    match world.act(remove(second, false)) {
        Err(Refusal::Unfit(why)) => {
            assert!(
                why.starts_with("host2 has 1 snapshot that no other"),
                "{why}"
            );
        }
        other => panic!("not refused: {other:?}"),
    }
    world.hold(7, third, true).expect("known");
    world.act(remove(second, false)).expect("another has it");
}

#[test]
fn a_create_of_the_same_shape_starts_warm_and_any_other_boots() {
    let (mut world, second, _) = World::of_three();
    world
        .act(Command::PutWarm(warm(7, second, 512)))
        .expect("first");
    world.create(1, waiting(512)).expect("there is room");
    assert_eq!(world.sandbox(1).origin, Some(snapshot_id(7)));
    assert_eq!(world.sandbox(1).phase, Phase::Starting);
    world.create(2, waiting(256)).expect("there is room");
    assert_eq!(world.sandbox(2).origin, None);
}

#[test]
fn of_two_nodes_that_made_one_the_second_is_refused() {
    let (mut world, second, third) = World::of_three();
    let first = Command::PutWarm(warm(7, second, 512));
    world.act(first.clone()).expect("first");
    assert_eq!(world.act(first), Ok(Receipt::Done(0)), "told again");
    let refused = world.act(Command::PutWarm(warm(8, third, 512)));
    assert_eq!(
        refused,
        Err(Refusal::Unfit("another host has made one already".into()))
    );
    world
        .act(Command::PutWarm(warm(9, third, 256)))
        .expect("another shape");
}

#[test]
fn what_is_warm_goes_with_its_template_and_stays_for_those_that_started_from_it() {
    let (mut world, second, _) = World::of_three();
    for (n, memory) in [(7, 512), (8, 256)] {
        world
            .act(Command::PutWarm(warm(n, second, memory)))
            .expect("first");
    }
    world.create(1, waiting(512)).expect("there is room");
    world
        .act(Command::PutTemplate(template("minimal", 9)))
        .expect("replaced");
    assert_eq!(world.snapshot(8), None);
    assert!(world.snapshot(7).is_some(), "a guest lives on it");
    world
        .act(Command::PutTemplate(template("minimal", 1)))
        .expect("put back");
    world.create(2, waiting(512)).expect("there is room");
    assert_eq!(world.sandbox(2).origin, None, "it is not offered again");
    world.act(stop(1)).expect("known");
    world.report(1, ended()).expect("told");
    assert_eq!(world.snapshot(7), None);
}

#[test]
fn what_is_warm_and_nobody_has_any_more_is_retired_and_made_anew() {
    let (mut world, second, third) = World::of_three();
    world
        .act(Command::PutWarm(warm(7, second, 512)))
        .expect("first");
    world.create(1, waiting(512)).expect("there is room");
    world.hold(7, second, false).expect("known");
    assert_eq!(world.state.warm().count(), 0);
    assert!(world.snapshot(7).is_some(), "a guest started from it");
    world
        .act(Command::PutWarm(warm(8, third, 512)))
        .expect("nobody has the first");
    world.create(2, waiting(512)).expect("there is room");
    assert_eq!(world.sandbox(2).origin, Some(snapshot_id(8)));
}

#[test]
fn what_a_node_could_not_start_from_is_given_up_once_and_made_anew() {
    let (mut world, second, _) = World::of_three();
    let give_up = Command::RetireWarm(snapshot_id(7));
    assert_eq!(world.act(give_up.clone()), Ok(Receipt::Done(0)), "unknown");
    world
        .act(Command::PutWarm(warm(7, second, 512)))
        .expect("first");
    assert_eq!(world.act(give_up.clone()), Ok(Receipt::Done(1)));
    assert_eq!(world.act(give_up), Ok(Receipt::Done(0)), "told again");
    assert_eq!(world.snapshot(7), None, "nothing lives on it");
    world.create(1, waiting(512)).expect("there is room");
    assert_eq!(world.sandbox(1).origin, None);
    world
        .act(Command::PutWarm(warm(8, second, 512)))
        .expect("made anew");
}

#[test]
fn what_is_warm_goes_when_no_node_is_left_that_could_start_from_it() {
    let mut world = World::founded();
    world
        .act(Command::PutWarm(warm(7, FOUNDER, 512)))
        .expect("first");
    let newer = Node {
        version: "0.2.0".into(),
        ..node(1)
    };
    world.act(Command::AdmitNode(newer)).expect("restarted");
    assert_eq!(world.snapshot(7), None);
}

#[test]
fn a_host_of_one_team_gives_others_nothing_to_start_from() {
    let mut world = World::founded();
    let team = TeamId(mark(b't', 9));
    let expires_at = proto::units::Stamp(world.now.0 + HOUR_MS);
    let scoped = wrenn_raft::state::Token {
        team: Some(team),
        ..token(9, 1, expires_at)
    };
    world.act(Command::PutToken(scoped)).expect("put");
    let Ok(Receipt::Admitted(host)) = world.act(redeem(9, node(9))) else {
        panic!("not let in");
    };
    let refused = world.act(Command::PutWarm(warm(7, host, 512)));
    assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
}
