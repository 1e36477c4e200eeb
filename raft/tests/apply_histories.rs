//! What holds under any history of commands, checked after each of them.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use proto::epoch::Epoch;
use proto::ids::{NodeId, NodeKey, SandboxId, TokenId};
use proto::units::Stamp;
use world::history::{TEAMS, any_history, busy_world, team, token_of};
use world::people::{EVENTS, asked, event_of, first_asked};
use world::promises::{Sides, may_repeat};
use world::*;
use wrenn_raft::apply::Applied;
use wrenn_raft::command::{Command, Proposal, Receipt, Refusal, Report, Verdict};
use wrenn_raft::state::{
    Day, Happening, HostLoss, Liveness, Node, Phase, Resources, RowKey, Sandbox, State, Usage,
};
use wrenn_raft::wire;

/// What cannot be seen from two states in a row.
#[derive(Default)]
struct Memory {
    epochs: BTreeMap<SandboxId, Epoch>,
    keys: BTreeMap<NodeId, NodeKey>,
    removed: BTreeSet<NodeKey>,
    redeemed: BTreeMap<TokenId, BTreeSet<NodeId>>,
    /// The runs that were let begin: a guest of them may have executed something.
    begun: BTreeSet<(SandboxId, Epoch)>,
}

/// One command and both sides of it.
struct Step<'a> {
    index: u64,
    at: Stamp,
    /// What is to be done, whoever asked for it.
    command: &'a Command,
    applied: &'a Applied,
    before: &'a State,
    after: &'a State,
}

fn sum_of(state: &State, node: NodeId) -> Resources {
    let held = state.sandboxes().filter(|it| it.owner == node);
    held.filter(|it| it.phase.holds_resources())
        .fold(Resources::default(), |sum, it| {
            sum.plus(it.spec.resources())
        })
}

/// Everything a node must be to be given a sandbox, spelled out once more.
fn may_take(state: &State, node: &Node, sandbox: &Sandbox) -> bool {
    let spec = &sandbox.spec;
    let boots = || {
        let template = state.template(&spec.template).expect("it is known");
        node.templates.get(&spec.template) == Some(&template.digest)
    };
    let fits = match sandbox.snapshot.or(sandbox.origin) {
        None => boots(),
        Some(id) => {
            let snapshot = state.snapshot(id).expect("it needs it");
            let needs = &snapshot.sealed.needs;
            let warm = snapshot.warm.as_ref();
            (&needs.vmm, &needs.machine) == (&node.vmm, &node.machine)
                && needs.cpu == node.cpu
                && node.templates.values().any(|digest| *digest == needs.base)
                && warm.is_none_or(|warm| {
                    boots() && warm.fits(spec) && warm.version == node.version && !warm.retired
                })
        }
    };
    node.liveness == Liveness::Alive
        && !node.cordoned
        && !node.draining
        && (node.team.is_none() || node.team == Some(sandbox.team))
        // It says where a sandbox begins.
        && (sandbox.snapshot.is_some() || spec.on_node.is_none_or(|only| only == node.id))
        && spec
            .node_tags
            .iter()
            .all(|(k, v)| node.tags.get(k) == Some(v))
        && fits
}

impl Step<'_> {
    fn check(&self, memory: &mut Memory) {
        self.check_rows();
        self.check_reservations();
        if self.before.keeps_audit() {
            self.check_usage();
            self.check_events();
        }
        if let Command::ReportSandbox {
            id,
            epoch,
            report: Report::Begins | Report::Running(_),
            ..
        } = self.command
            && self.applied.answer.is_ok()
        {
            memory.begun.insert((*id, *epoch));
        }
        for sandbox in self.after.sandboxes() {
            self.check_sandbox(sandbox, memory);
            let newest = memory.epochs.entry(sandbox.id).or_default();
            assert!(sandbox.epoch >= *newest, "the epoch of {} fell", sandbox.id);
            *newest = sandbox.epoch;
        }
        self.check_snapshots();
        self.check_names();
        self.check_nodes(memory);
        self.check_tokens(memory);
    }

    /// What rests on a snapshot finds it, and none is kept that nothing rests on.
    fn check_snapshots(&self) {
        for sandbox in self.after.sandboxes() {
            if matches!(sandbox.phase, Phase::Paused | Phase::Resuming) {
                assert!(sandbox.snapshot.is_some(), "{sandbox:?} rests on nothing");
            }
            if sandbox.phase.is_ended() {
                assert_eq!(sandbox.snapshot, None, "{} has ended", sandbox.id);
            }
            let is_sealed = sandbox.phase == Phase::Snapshotting;
            assert!(sandbox.checkpoint.is_none() || is_sealed, "{sandbox:?}");
            if let Some(id) = sandbox.origin {
                let snapshot = self
                    .after
                    .snapshot(id)
                    .expect("what it is made from is there");
                assert_ne!(snapshot.sandbox, sandbox.id, "it is made from itself");
                assert!(snapshot.warm.is_some() || snapshot.team == sandbox.team);
            }
            if let Some(id) = sandbox.snapshot {
                let snapshot = self.after.snapshot(id).expect("what it rests on is there");
                assert_eq!(snapshot.sandbox, sandbox.id);
                assert!(snapshot.epoch <= sandbox.epoch);
            }
        }
        for snapshot in self.after.snapshots() {
            let id = snapshot.sealed.id;
            let by_sandbox = self
                .after
                .sandboxes()
                .any(|it| it.snapshots().any(|of| of == id));
            let by_name = self.after.all_named().any(|it| it.snapshot == id);
            let warm = snapshot.warm.as_ref().is_some_and(|it| !it.retired);
            assert!(by_sandbox || by_name || warm, "nobody needs {snapshot:?}");
            assert!(self.after.is_needed(id));
            if warm {
                let base = snapshot.sealed.needs.base;
                assert!(self.after.templates().any(|it| it.digest == base));
            }
            for holder in &snapshot.holders {
                assert!(self.after.node(*holder).is_some(), "{holder} is gone");
            }
        }
    }

    /// A name stands for a snapshot of its own team, of its shape.
    fn check_names(&self) {
        for named in self.after.all_named() {
            let snapshot = self
                .after
                .snapshot(named.snapshot)
                .expect("it stands for one");
            assert_eq!(snapshot.team, named.team);
            let found = self.after.named(named.team, &named.name);
            assert_eq!(found, Some(named));
            assert!(self.after.named_by(named.team).any(|it| it == named));
        }
    }

    /// What the derived copy relies on.
    fn check_rows(&self) {
        let changes = self.applied.touched.iter();
        let changes = changes.map(|key| (key.encode(), self.after.row(key)));
        let mut copy = self.before.clone();
        copy.follow(changes).expect("own rows are readable");
        assert!(
            copy == *self.after,
            "the touched rows are not all that changed"
        );
        let read = State::from_rows(self.after.rows()).expect("own rows are readable");
        assert!(read == *self.after, "the state does not survive as rows");
        if self.applied.answer.is_err() {
            // Only that somebody asked, and was refused.
            let is_record = |key: &RowKey| matches!(key, RowKey::Audit(..));
            assert!(
                self.applied.touched.iter().all(is_record),
                "a refused command changed something"
            );
        }
        let changed = self.after.changes_since(self.before);
        assert_eq!(changed.is_empty(), self.before == self.after);
        for (key, _) in changed {
            let told = self.applied.touched.iter().any(|it| it.encode() == key);
            assert!(told, "a row changed and was not told");
        }
    }

    fn check_reservations(&self) {
        for node in self.after.nodes() {
            assert_eq!(self.after.reserved(node.id), sum_of(self.after, node.id));
            let held: Vec<_> = self.after.sandboxes_on(node.id).map(|it| it.id).collect();
            let all = self.after.sandboxes().filter(|it| it.owner == node.id);
            let all = all.filter(|it| it.phase.holds_resources());
            assert_eq!(held, all.map(|it| it.id).collect::<Vec<_>>());
        }
        let ended = self.after.sandboxes().filter(|it| it.phase.is_ended());
        let mut ended: Vec<_> = ended.map(|it| (it.updated_at, it.id)).collect();
        ended.sort_unstable();
        assert_eq!(self.after.ended_sandboxes().collect::<Vec<_>>(), ended);
    }

    /// What runs is the sum over what runs, and at the instant of a change exactly as much has been
    /// taken by what is written and what runs still as before it.
    fn check_usage(&self) {
        for team in (0..TEAMS).map(team) {
            let of_team = self
                .after
                .sandboxes_of(team)
                .filter(|it| it.phase.runs_guest());
            let runs = of_team.fold((0, 0, 0), |(count, vcpus, memory), it| {
                let memory = memory + u64::from(it.spec.memory.0);
                (count + 1, vcpus + it.spec.vcpus, memory)
            });
            let load = self.after.load_of(team);
            assert_eq!((load.sandboxes, load.vcpus, load.memory_mib), runs);
            let taken = |state: &State| {
                let days = state.usage_until(team, Day(0)..=Day(u32::MAX), self.at);
                let all = days
                    .iter()
                    .fold(Usage::default(), |sum, it| sum.plus(it.total()));
                (all.sandbox_ms, all.vcpu_ms, all.mib_ms)
            };
            let about_node = matches!(
                self.command,
                Command::JudgeNode { .. } | Command::AdmitNode(_) | Command::RemoveNode { .. }
            );
            // Whether a missing node's guests run is known once it is back.
            if !about_node {
                assert_eq!(taken(self.before), taken(self.after), "{:?}", self.command);
            }
        }
    }

    /// There is an event of every change of a phase, and of nothing else of a sandbox.
    fn check_events(&self) {
        let news = self
            .after
            .all_events()
            .filter(|it| it.id.index == self.index);
        let mut told: Vec<_> = news
            .filter_map(|event| match event.what {
                Happening::Sandbox { id, from, to, .. } => Some((id, from, to)),
                _ => None,
            })
            .collect();
        told.sort_unstable();
        let phase = |id| self.before.sandbox(id).map(|it: &Sandbox| it.phase);
        let moved = self
            .after
            .sandboxes()
            .map(|it| (it.id, phase(it.id), it.phase));
        let mut moved: Vec<_> = moved.filter(|(_, from, to)| *from != Some(*to)).collect();
        moved.sort_unstable();
        assert_eq!(told, moved);
    }

    fn check_sandbox(&self, sandbox: &Sandbox, memory: &Memory) {
        if sandbox.not_begun {
            let starts = matches!(sandbox.phase, Phase::Starting | Phase::Resuming);
            assert!(starts, "{sandbox:?} was not begun");
            let begun = memory.begun.contains(&(sandbox.id, sandbox.epoch));
            assert!(!begun, "{} was let begin", sandbox.id);
        }
        if sandbox.phase.holds_resources() {
            assert!(
                self.after.node(sandbox.owner).is_some(),
                "nobody is left who could end {}",
                sandbox.id
            );
        }
        let known = self.before.sandbox(sandbox.id);
        if known.is_some_and(|known| known.epoch == sandbox.epoch) {
            let owner = known.map(|known| known.owner);
            assert_eq!(owner, Some(sandbox.owner), "another owner under one epoch");
            return;
        }
        // Its ownership was given out by this command.
        assert_eq!(sandbox.epoch, Epoch(self.index));
        if known.is_none() && sandbox.phase == Phase::Error {
            assert!(
                !sandbox.reason.is_empty(),
                "a fork that found no room says so"
            );
            return;
        }
        let owner = self.after.node(sandbox.owner).expect("given to a node");
        assert!(
            may_take(self.after, owner, sandbox),
            "{owner:?} got {sandbox:?}"
        );
        let reserved = self.after.reserved(owner.id);
        assert!(
            owner.capacity.covers(reserved),
            "{} is over-committed",
            owner.id
        );
        if let Some(known) = known {
            self.check_given_out_again(known, memory);
        }
    }

    /// Only what is bound to a lease, once that is certainly over; and what its owner, which cannot be
    /// reached, was never let begin.
    fn check_given_out_again(&self, known: &Sandbox, memory: &Memory) {
        if known.phase == Phase::Paused {
            let meant = |id, snapshot| id == known.id && known.snapshot == Some(snapshot);
            let asked = matches!(self.command,
                Command::ResumeSandbox { id, snapshot, .. } if meant(*id, *snapshot));
            assert!(asked, "{:?} resumed {}", self.command, known.id);
            return;
        }
        if let Command::ReportSandbox { report, .. } = self.command {
            if matches!(report, Report::Failed { .. }) {
                self.check_resumed_elsewhere(known);
                return;
            }
            // Its owner sealed it, and so it goes on where it is bound for.
            assert!(matches!(report, Report::Sealed(_)), "{report:?}");
            assert_eq!(known.phase, Phase::Pausing, "{:?}: {known:?}", self.command);
            assert!(
                known.bound_for.is_some(),
                "nobody wanted {} to move",
                known.id
            );
            return;
        }
        let begun = memory.begun.contains(&(known.id, known.epoch));
        if self.gives_up_owner(known) && !begun && known.not_begun {
            return;
        }
        assert_eq!(known.spec.on_host_loss, HostLoss::Restart);
        assert!(known.phase.holds_resources(), "what ended stays ended");
        let owner = self.before.node(known.owner).expect("it had one");
        let lost_now = matches!(
            (self.command, owner.liveness),
            (
                Command::JudgeNode { node, incarnation, verdict: Verdict::Lost },
                Liveness::Missing { .. }
            ) if *node == owner.id && *incarnation == owner.incarnation
        );
        assert!(lost_now, "{:?} gave {} out again", self.command, known.id);
    }

    /// Its owner has ended it; the other host is one that it has not failed on.
    fn check_resumed_elsewhere(&self, known: &Sandbox) {
        let next = self
            .after
            .sandbox(known.id)
            .expect("it rests on a snapshot");
        assert_eq!(
            (known.phase, next.phase),
            (Phase::Resuming, Phase::Resuming)
        );
        assert!(!known.host_named, "{known:?}");
        assert!(next.failed_on.contains(&known.owner) && !next.failed_on.contains(&next.owner));
        assert_eq!(next.snapshot, known.snapshot);
    }

    /// Whether the command says that the owner cannot be reached.
    fn gives_up_owner(&self, known: &Sandbox) -> bool {
        let away = self.after.node(known.owner);
        let away = away.is_none_or(|node| !node.liveness.is_alive());
        let about = match self.command {
            Command::JudgeNode { node, .. } | Command::RemoveNode { node, .. } => Some(*node),
            _ => None,
        };
        away && about == Some(known.owner)
    }

    fn check_nodes(&self, memory: &mut Memory) {
        for node in self.before.nodes() {
            if self.after.node(node.id).is_none() {
                memory.removed.insert(node.key);
                let again = self.after.removed_node(&node.key);
                assert_eq!(again.map(|it| it.node), Some(node.id));
            }
        }
        let mut names = BTreeSet::new();
        for node in self.after.nodes() {
            let first = *memory.keys.entry(node.id).or_insert(node.key);
            assert_eq!(first, node.key, "{} changed hands", node.id);
            assert!(!memory.removed.contains(&node.key), "a removed key is back");
            assert!(
                names.insert(&node.name),
                "two nodes are called {}",
                node.name
            );
            assert!(node.cordoned || !node.draining);
            self.check_incarnation(node);
            let found = self.after.node_by_key(&node.key).map(|it| it.id);
            assert_eq!(found, Some(node.id), "two nodes have one key");
        }
        let full = |state: &State| state.nodes().any(|node| node.team.is_none());
        assert!(full(self.after) || !full(self.before), "no member is left");
    }

    /// It is the newest announcement's entry, so a verdict about an earlier one is told apart.
    fn check_incarnation(&self, node: &Node) {
        let announced = matches!(&self.command, Command::AdmitNode(it) if it.id == node.id)
            && self.applied.answer.is_ok();
        match self.before.node(node.id) {
            Some(known) if !announced => assert_eq!(node.incarnation, known.incarnation),
            _ => assert_eq!(node.incarnation, self.index),
        }
    }

    fn check_tokens(&self, memory: &mut Memory) {
        let Command::RedeemToken { token, .. } = self.command else {
            return;
        };
        if let Ok(Receipt::Admitted(id)) = self.applied.answer {
            let joined = memory.redeemed.entry(*token).or_default();
            joined.insert(id);
            let uses = (0..u8::MAX).map(token_of).find(|it| it.id == *token);
            let uses = uses.expect("all tokens are known").uses_left;
            assert!(joined.len() <= usize::try_from(uses).expect("small"));
            assert!(self.after.node(id).is_some(), "let in as nobody");
        }
    }
}

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
