//! What guests took, and what is told of it: counted from changes, whoever is alive.

use proto::ids::NodeId;
use proto::units::Stamp;
use wrenn_raft::command::{Attributed, Command, StopCause, Verdict};
use wrenn_raft::state::{
    Actor, Day, EventId, Happening, Phase, RowKey, SandboxSpec, Settings, State, TeamLoad, Usage,
};

use crate::world::*;

/// A world in which somebody has asked for something: from then on everything is noted.
fn noted(mut world: World) -> World {
    let change = Command::PutSettings(Settings {
        replicas: 3,
        ..world.state.settings()
    });
    let asked = Command::By(Attributed {
        actor: Actor::System,
        change: Box::new(change),
    });
    world.act(asked).expect("it may be asked for");
    world
}

fn of_three_noted() -> (World, NodeId, NodeId) {
    let (world, second, third) = World::of_three();
    (noted(world), second, third)
}

/// What the team has taken so far, by what is written and what runs.
fn taken(world: &World) -> Usage {
    let days = Day(0)..=Day(u32::MAX);
    let days = world.state.usage_until(TEAM, days, world.now);
    days.iter()
        .fold(Usage::default(), |sum, day| sum.plus(day.total()))
}

fn two_vcpus() -> SandboxSpec {
    SandboxSpec {
        vcpus: 2,
        ..waiting(512)
    }
}

/// The phases that the events of one sandbox went through.
fn phases(state: &State, n: u8) -> Vec<Phase> {
    let of_it = state.all_events().filter_map(|event| match event.what {
        Happening::Sandbox { id, to, .. } if id == sandbox_id(n) => Some(to),
        _ => None,
    });
    of_it.collect()
}

#[test]
fn a_guest_counts_from_its_first_answer_until_it_is_told_to_stop() {
    let mut world = noted(World::founded());
    world.create(1, two_vcpus()).expect("placed");
    assert_eq!(taken(&world).vcpu_ms, 0, "it is still starting");
    world.run(1);
    world.now.0 += HOUR_MS;
    let usage = taken(&world);
    assert_eq!(
        (usage.vcpu_ms, usage.mib_ms, usage.sandbox_ms, usage.created),
        (2 * HOUR_MS, 512 * HOUR_MS, HOUR_MS, 1)
    );
    world.act(stop(1)).expect("it runs");
    let counted = taken(&world);
    assert_eq!(counted.sandbox_ms, HOUR_MS + 1000, "a step takes a second");
    world.report(1, ended()).expect("it ends");
    world.now.0 += HOUR_MS;
    assert_eq!(taken(&world), counted);
    let peak = TeamLoad {
        sandboxes: 1,
        vcpus: 2,
        memory_mib: 512,
    };
    assert_eq!(counted.peak, peak);
    assert_eq!(world.state.load_of(TEAM), TeamLoad::default());
}

#[test]
fn a_change_of_its_record_neither_loses_nor_doubles_what_has_run() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    world.run(1);
    let began = world.now.0;
    for ports_open in [true, false, true] {
        world.now.0 += HOUR_MS;
        let change = Command::ChangeSandbox {
            id: sandbox_id(1),
            ports_open: Some(ports_open),
            wakes: None,
        };
        world.act(change).expect("it runs");
        assert_eq!(taken(&world).sandbox_ms, world.now.0 - began);
    }
}

#[test]
fn a_paused_capsule_takes_nothing_until_it_runs_again() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    world.run(1);
    world.rest(1, 1);
    let rested = taken(&world);
    assert_eq!(rested.sandbox_ms, 2000, "until it was sealed");
    world.now.0 += 9 * HOUR_MS;
    world.resume(1, 1).expect("it rests");
    world.run(1);
    assert_eq!(taken(&world), rested);
    world.now.0 += HOUR_MS;
    assert_eq!(taken(&world).sandbox_ms, rested.sandbox_ms + HOUR_MS);
}

#[test]
fn what_was_lost_with_its_host_counts_until_the_host_was_missed() {
    let (mut world, second, _) = of_three_noted();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    world.now.0 += HOUR_MS;
    world.judge(second, Verdict::Missing).expect("it is silent");
    let missed = taken(&world);
    world.now.0 += 5 * HOUR_MS;
    assert_eq!(taken(&world), missed, "nobody can say whether it runs");
    world.judge(second, Verdict::Lost).expect("for long");
    world.act(remove(second, true)).expect("it is dead");
    assert_eq!(world.sandbox(1).phase, Phase::Error);
    assert_eq!(taken(&world), missed);
}

#[test]
fn a_host_that_comes_back_has_run_its_guests_all_along() {
    let (mut world, second, _) = of_three_noted();
    world.create_on(second, 1, waiting(512));
    world.run(1);
    let began = world.now.0;
    world.judge(second, Verdict::Missing).expect("it is silent");
    world.now.0 += HOUR_MS;
    world.judge(second, Verdict::Back).expect("it is heard");
    assert_eq!(taken(&world).sandbox_ms, world.now.0 - began);
}

#[test]
fn usage_and_events_are_rows_like_everything_else() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    world.run(1);
    world.now.0 += 30 * HOUR_MS;
    let applied = world.step(stop(1));
    let days = applied
        .touched
        .iter()
        .filter(|it| matches!(it, RowKey::Usage(..)));
    assert!(
        days.count() >= 2,
        "it ran on two days: {:?}",
        applied.touched
    );
    let again = State::from_rows(world.state.rows()).expect("own rows are readable");
    assert_eq!(again, world.state);
    for key in &applied.touched {
        assert_eq!(RowKey::decode(&key.encode()).as_ref(), Ok(key));
    }
}

#[test]
fn every_change_of_a_phase_is_an_event_with_what_runs_after_it() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    world.run(1);
    world.rest(1, 1);
    world.act(stop(1)).expect("it rests");
    use Phase::{Paused, Pausing, Running, Starting, Stopped};
    assert_eq!(
        phases(&world.state, 1),
        [Starting, Running, Pausing, Paused, Stopped]
    );
    let ran: Vec<u32> = world
        .state
        .all_events()
        .filter(|it| matches!(it.what, Happening::Sandbox { .. }))
        .map(|it| it.load.sandboxes)
        .collect();
    assert_eq!(ran, [0, 1, 1, 0, 0]);
}

#[test]
fn who_has_seen_an_event_is_told_of_those_behind_it_and_others_of_none() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    let seen = world.state.newest_event(TEAM);
    assert_eq!(seen.index, world.index);
    world.run(1);
    let news = world.state.events_after(TEAM, seen, 10);
    assert_eq!((news.events.len(), news.missed), (1, false));
    assert!(matches!(
        news.events[0].what,
        Happening::Sandbox {
            from: Some(Phase::Starting),
            to: Phase::Running,
            ..
        }
    ));
    let other = proto::ids::TeamId([9; 16]);
    assert!(
        world
            .state
            .events_after(other, EventId::FIRST, 10)
            .events
            .is_empty()
    );
}

#[test]
fn a_host_that_comes_and_goes_and_a_reason_are_told() {
    let (mut world, second, _) = of_three_noted();
    world.create_on(second, 1, bound(512));
    world.run(1);
    let seen = world.state.newest_event(TEAM);
    let idle = Command::StopSandbox {
        id: sandbox_id(1),
        cause: StopCause::Idle,
    };
    world.act(idle).expect("it runs");
    world.judge(second, Verdict::Missing).expect("it is silent");
    world.judge(second, Verdict::Back).expect("it is heard");
    let told = world.state.events_after(TEAM, seen, 10).events;
    let what: Vec<_> = told.iter().map(|it| &it.what).collect();
    assert!(
        matches!(
            what[..],
            [
                Happening::Sandbox { reason, .. },
                Happening::Node { down: true, .. },
                Happening::Node { down: false, .. },
            ] if reason == "inactivity timeout passed"
        ),
        "{what:?}"
    );
}

#[test]
fn a_refused_command_counts_and_tells_nothing() {
    let mut world = noted(World::founded());
    let before = world.state.clone();
    assert!(world.act(stop(9)).is_err());
    assert_eq!(world.state, before);
}

#[test]
fn a_clock_that_goes_back_takes_nothing_away() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    world.run(1);
    world.now = Stamp(world.now.0 - HOUR_MS);
    world.act(stop(1)).expect("it runs");
    assert_eq!(taken(&world).sandbox_ms, 0);
}
