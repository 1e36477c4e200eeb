//! What holds under any history of commands, checked after each of them.

mod step;

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use proto::ids::NodeId;
use proto::units::Stamp;
use step::{Memory, Step};
use wrenn_raft::apply::Applied;
use wrenn_raft::command::{Command, Proposal, Receipt, Refusal, Report, Verdict};
use wrenn_raft::state::{Liveness, Node, Phase, RowKey, Sandbox, State};
use wrenn_raft::wire;

use crate::world::history::{any_history, busy_world};
use crate::world::people::{EVENTS, asked, event_of, first_asked};
use crate::world::promises::{Sides, may_repeat};
use crate::world::*;

/// Applies a proposal three ways that must agree, and checks the step.
fn play(world: &mut World, memory: &mut Memory, proposal: Proposal) {
    let wire = Proposal::decode(&proposal.encode());
    assert_eq!(wire, Ok(proposal.clone()));
    let before = world.state.clone();
    let mut reread = State::from_rows(before.rows()).expect("own rows are readable");
    world.index += 1;
    world.now = world.now.max(proposal.at);
    let applied = world.state.apply(world.index, proposal.clone());
    assert_eq!(reread.apply(world.index, proposal.clone()), applied);
    assert!(
        reread == world.state,
        "a state read from rows goes another way"
    );
    let answer = wire::decode_answer(&wire::encode_answer(&applied.answer));
    assert_eq!(answer, applied.answer);
    Step {
        index: world.index,
        at: proposal.at.max(Stamp(1)),
        command: proposal.command.change(),
        applied: &applied,
        before: &before,
        after: &world.state,
    }
    .check(memory);
    Sides {
        index: world.index,
        command: &proposal.command,
        applied: &applied,
        before: &before,
        after: &world.state,
    }
    .check();
    let mut twice = world.state.clone();
    let announced = match proposal.command.change() {
        Command::AdmitNode(node) => world.state.node(node.id).cloned(),
        _ => None,
    };
    let again = twice.apply(world.index + 1, proposal.clone());
    if let (Some(announced), Ok(_)) = (announced, &again.answer) {
        check_announced_again(&world.state, world.index + 1, &announced, &twice);
        return;
    }
    for (key, _) in twice.changes_since(&world.state) {
        assert!(
            may_repeat(&proposal.command, &key),
            "applied twice it changed the state twice: {again:?}"
        );
    }
}

/// Every announcement of a node makes a new incarnation, the second of two alike as well; nothing
/// else comes of it.
fn check_announced_again(once: &State, index: u64, announced: &Node, twice: &State) {
    let expected = Node {
        incarnation: index,
        ..announced.clone()
    };
    assert_eq!(twice.node(announced.id), Some(&expected));
    assert_eq!(twice.changes_since(once).len(), 1);
}

/// Ends everything that holds resources, by its owner or by giving the owner up.
fn end_everything(world: &mut World, memory: &mut Memory) {
    world.join(50);
    let held: Vec<Sandbox> = world.state.sandboxes().cloned().collect();
    for sandbox in held.iter().filter(|it| it.phase.holds_resources()) {
        let stop = Command::StopSandbox {
            id: sandbox.id,
            cause: wrenn_raft::command::StopCause::Asked,
        };
        let at = world.now;
        play(world, memory, Proposal { at, command: stop });
        let owner = world.state.node(sandbox.owner).expect("it has an owner");
        if owner.liveness == Liveness::Alive {
            let report = Command::ReportSandbox {
                id: sandbox.id,
                epoch: sandbox.epoch,
                node: sandbox.owner,
                report: ended(),
            };
            play(
                world,
                memory,
                Proposal {
                    at,
                    command: report,
                },
            );
        }
    }
    let away: Vec<NodeId> = world
        .state
        .nodes()
        .filter(|it| !it.liveness.is_alive())
        .map(|it| it.id)
        .collect();
    for id in away {
        world
            .act(remove(id, true))
            .expect("a dead node can be given up");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn every_promise_holds_after_every_command(
        history in any_history(110),
        asked_for in prop::collection::vec(prop::bool::weighted(0.3), 110),
    ) {
        let mut world = busy_world();
        let mut memory = Memory::default();
        for node in world.state.nodes() {
            memory.keys.insert(node.id, node.key);
        }
        for token in world.state.tokens() {
            let ids = token.redeemed.iter().map(|(_, id)| *id);
            memory.redeemed.insert(token.id, ids.collect());
        }
        for (what, by_somebody) in history.into_iter().zip(asked_for) {
            if let Some(Proposal { at, command }) = world.proposal(what) {
                let command = if by_somebody { asked(command) } else { command };
                play(&mut world, &mut memory, Proposal { at, command });
            }
        }
        end_everything(&mut world, &mut memory);
        let stuck: Vec<_> = world.state.sandboxes().filter(|it| it.phase.holds_resources()).collect();
        prop_assert!(stuck.is_empty(), "no way out: {stuck:?}");
    }
}

/// The word for what a seal was for.
fn sealed_for(applied: &Applied) -> &'static str {
    let is_name = |key: &RowKey| matches!(key, RowKey::Named(..));
    let is_sandbox = |key: &&RowKey| matches!(key, RowKey::Sandbox(_));
    if applied.touched.iter().any(is_name) {
        return "named";
    }
    match applied.touched.iter().filter(is_sandbox).count() {
        1 => "sealed",
        _ => "forked",
    }
}

/// The word for what a command about names, forks and new sandboxes came to.
fn naming_event(world: &World, proposal: &Proposal, applied: &Applied) -> Option<&'static str> {
    Some(match (&proposal.command, &applied.answer) {
        (Command::CheckpointSandbox(_), Ok(Receipt::Done(1))) => {
            let made = |key: &&RowKey| matches!(key, RowKey::Named(..));
            let sandbox = |key: &&RowKey| matches!(key, RowKey::Sandbox(_));
            let count = |of: &dyn Fn(&&RowKey) -> bool| applied.touched.iter().filter(of).count();
            match count(&made) > 0 {
                true => "named at rest",
                false if count(&sandbox) > 1 => "forked at rest",
                false => "snapshotting",
            }
        }
        (Command::CheckpointSandbox(_), Ok(_)) => "checkpoint known",
        (_, Err(Refusal::NameTaken(_))) => "name taken",
        (Command::DropNamed(_), Ok(Receipt::Done(1))) => "name dropped",
        (Command::PutWarm(_), Ok(Receipt::Done(1))) => "kept warm",
        (Command::PutWarm(_), Err(_)) => "not kept warm",
        (Command::RetireWarm(_), Ok(Receipt::Done(1))) => "given up",
        (Command::CreateSandbox { id, .. }, Ok(_)) if !applied.touched.is_empty() => {
            let made = world.state.sandbox(*id).expect("it was made");
            let origin = made.origin.and_then(|id| world.state.snapshot(id));
            match origin {
                None => "placed",
                Some(origin) if origin.warm.is_some() => "starts warm",
                Some(_) => "starts from a name",
            }
        }
        _ => return None,
    })
}

/// The word for what became of a node's sandboxes when it was judged.
fn judged(world: &World, verdict: Verdict, applied: &Applied) -> &'static str {
    let mut settled = applied.touched.iter().filter_map(|key| match key {
        RowKey::Sandbox(id) => world.state.sandbox(*id),
        _ => None,
    });
    match settled.next().map(|it| it.phase) {
        None => "judged",
        Some(Phase::Starting | Phase::Resuming) if verdict == Verdict::Missing => {
            "never begun and given out again"
        }
        Some(Phase::Starting) => "given out again",
        Some(Phase::Resuming) => "resumed elsewhere",
        Some(Phase::Paused) => "back to its last pause",
        Some(Phase::Error) => "found no room elsewhere",
        Some(_) => "stopped with its node",
    }
}

/// The word for what a command came to.
fn event(world: &World, proposal: &Proposal, applied: &Applied) -> &'static str {
    let by_people = || event_of(world, &proposal.command, applied);
    if let Some(event) = naming_event(world, proposal, applied).or_else(by_people) {
        return event;
    }
    match (&proposal.command, &applied.answer) {
        (Command::JudgeNode { verdict, .. }, Ok(Receipt::Done(1))) => {
            judged(world, *verdict, applied)
        }
        (Command::JudgeNode { .. }, Ok(_)) => "no step",
        (Command::RemoveNode { .. }, Ok(Receipt::Done(1)))
            if (applied.touched.iter()).any(|key| matches!(key, RowKey::Sandbox(_))) =>
        {
            "given up with its node"
        }
        (Command::RemoveNode { .. }, Ok(Receipt::Done(1))) => "removed",
        (Command::PruneSandboxes { .. }, Ok(Receipt::Done(1..))) => "pruned",
        (Command::PutToken(_), Ok(_)) if applied.touched.len() > 1 => "tokens forgotten",
        (Command::ResumeSandbox { .. }, Ok(_)) if applied.touched.is_empty() => "runs already",
        (Command::ResumeSandbox { .. }, Ok(_)) => "resumed",
        (Command::ResumeSandbox { .. }, Err(Refusal::NoRoom(_))) => "cannot be resumed",
        (Command::ResumeSandbox { .. }, Err(_)) => "not resumed",
        (Command::PauseSandbox { .. }, Ok(Receipt::Done(1))) => "pausing",
        (Command::PauseSandbox { .. }, Err(Refusal::Unfit(_))) => "not paused",
        (Command::HoldSnapshot { .. }, Ok(Receipt::Done(1))) => "holder told",
        (
            Command::ReportSandbox {
                id,
                report: Report::Sealed(_),
                ..
            },
            Ok(Receipt::Done(1)),
        ) => match world.state.sandbox(*id).map(|it| it.phase) {
            Some(Phase::Resuming) => "moved",
            _ => sealed_for(applied),
        },
        (
            Command::ReportSandbox {
                report: Report::Thawed { .. },
                ..
            },
            Ok(Receipt::Done(1)),
        ) => "thawed",
        (
            Command::ReportSandbox {
                report: Report::Begins,
                ..
            },
            Ok(Receipt::Done(1)),
        ) => "let begin",
        (_, Ok(Receipt::Placed { .. })) => "placed",
        (_, Ok(Receipt::Admitted(_))) if applied.touched.is_empty() => "same id again",
        (_, Ok(Receipt::Admitted(_))) => "let in",
        (_, Err(Refusal::TokenExpired(_))) => "token expired",
        (_, Err(Refusal::TokenUsed(_))) => "token used",
        (_, Err(Refusal::NoSuchToken(_))) => "no token",
        (_, Err(Refusal::Fenced { .. })) => "fenced",
        (_, Err(Refusal::NoRoom(_))) => "no room",
        (_, Err(Refusal::IdTaken(_))) => "id taken",
        (Command::RedeemToken { .. }, Err(Refusal::Unfit(_))) => "may not join",
        (Command::RemoveNode { .. }, Err(Refusal::Unfit(_))) => "may not be removed",
        (_, Err(_)) => "otherwise refused",
        (_, Ok(_)) => "done",
    }
}

/// Histories that miss what they were written for would prove nothing.
#[test]
fn the_histories_reach_what_they_are_about() {
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..400 {
        let mut world = busy_world();
        // Events are kept from the first change on that names who asked.
        world.act(first_asked()).expect("it fits");
        let tree = any_history(130).new_tree(&mut runner).expect("a history");
        for what in tree.current() {
            let Some(proposal) = world.proposal(what) else {
                continue;
            };
            world.index += 1;
            world.now = world.now.max(proposal.at);
            let applied = world.state.apply(world.index, proposal.clone());
            *seen.entry(event(&world, &proposal, &applied)).or_default() += 1;
        }
    }
    let wanted = "judged, given out again, found no room elsewhere, stopped with its node, no step, \
                  given up with its node, removed, pruned, tokens forgotten, placed, same id again, \
                  let in, token expired, token used, no token, fenced, no room, id taken, \
                  may not join, may not be removed, pausing, sealed, moved, thawed, resumed, runs already, \
                  not resumed, not paused, cannot be resumed, holder told, resumed elsewhere, \
                  back to its last pause, snapshotting, named, named at rest, forked, forked at rest, \
                  name taken, name dropped, kept warm, not kept warm, given up, starts warm, \
                  starts from a name, never begun and given out again, let begin";
    for event in wanted.split(", ").chain(EVENTS.split(", ")) {
        let times = seen.get(event).copied().unwrap_or_default();
        assert!(times >= 5, "{event}: {times} times; all: {seen:?}");
    }
}
