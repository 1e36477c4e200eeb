//! The state machine, command by command, and under random histories.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use proto::epoch::Epoch;
use proto::ids::{ClusterId, KeyId, NodeId, NodeKey, SandboxId, TeamId};
use proto::units::{Mib, Stamp};
use wrenn_raft::command::{Answer, Command, Proposal, Receipt, Refusal, Report, StopCause};
use wrenn_raft::placement::Lack;
use wrenn_raft::state::{
    Desired, GuestVersions, Key, Node, Phase, Resources, SandboxSpec, State, Template,
};
use wrenn_raft::wire;

const NODE: NodeId = NodeId(1);
const TEAM: TeamId = TeamId([0; 16]);

fn node(id: u64, sandboxes: u32) -> Node {
    Node {
        id: NodeId(id),
        name: format!("n{id}"),
        key: NodeKey([u8::try_from(id).expect("small"); 32]),
        api_url: "http://127.0.0.1:7320".into(),
        cluster_address: "127.0.0.1:7321".into(),
        capacity: Resources {
            vcpus: 8,
            memory: Mib(4096),
            disk: Mib(40_960),
            sandboxes,
        },
        vmm: "qemu".into(),
        vmm_version: "7.2".into(),
        accelerator: "tcg".into(),
        version: "0.1.0".into(),
        templates: BTreeMap::from([("minimal".into(), [1; 32])]),
        ..Node::default()
    }
}

fn template() -> Template {
    Template {
        name: "minimal".into(),
        digest: [1; 32],
        disk: Mib(5120),
        size_bytes: 300 << 20,
        created_at: Stamp(0),
    }
}

fn spec(memory: u32) -> SandboxSpec {
    SandboxSpec {
        template: "minimal".into(),
        vcpus: 1,
        memory: Mib(memory),
        disk: Mib(5120),
        idle_timeout: Some(Duration::from_secs(60)),
        metadata: BTreeMap::from([("who".into(), "me".into())]),
        ..SandboxSpec::default()
    }
}

fn sandbox_id(n: u8) -> SandboxId {
    SandboxId([n; 16])
}

/// A state with its log position, driven like the log drives it.
#[derive(Clone, Default)]
struct World {
    state: State,
    index: u64,
}

impl World {
    fn with_node() -> Self {
        let mut world = Self::default();
        world
            .apply(Command::AdmitNode(node(1, 100)))
            .expect("a first node is admitted");
        world
            .apply(Command::PutTemplate(template()))
            .expect("a template is put");
        world
    }

    fn apply(&mut self, command: Command) -> Answer {
        self.index += 1;
        self.state
            .apply(
                self.index,
                Proposal {
                    at: Stamp(self.index * 1000),
                    command,
                },
            )
            .answer
    }

    fn create(&mut self, n: u8) -> Answer {
        self.apply(Command::CreateSandbox {
            id: sandbox_id(n),
            team: TEAM,
            spec: spec(512),
            hints: vec![],
        })
    }

    fn report(&mut self, n: u8, epoch: Epoch, report: Report) -> Answer {
        self.apply(Command::ReportSandbox {
            id: sandbox_id(n),
            epoch,
            node: NODE,
            report,
        })
    }

    fn phase(&self, n: u8) -> Phase {
        self.state
            .sandbox(sandbox_id(n))
            .expect("the sandbox is known")
            .phase
    }
}

#[test]
fn creating_twice_with_one_id_answers_the_same_and_reserves_once() {
    let mut world = World::with_node();
    let first = world.create(1);
    assert_eq!(
        first,
        Ok(Receipt::Placed {
            node: NODE,
            epoch: Epoch(3)
        })
    );
    assert_eq!(world.create(1), first);
    // Whatever was changed since.
    let changed = Command::ChangeSandbox {
        id: sandbox_id(1),
        ports_open: Some(true),
        wakes: Some(true),
    };
    world.apply(changed).expect("known");
    assert_eq!(world.create(1), first);
    assert_eq!(world.state.reserved(NODE).sandboxes, 1);
}

#[test]
fn what_a_template_was_called_makes_no_other_sandbox() {
    let mut world = World::with_node();
    let create = |name: &str| {
        let mut spec = spec(512);
        spec.asked_template = name.into();
        let (id, team, hints) = (sandbox_id(1), TEAM, vec![]);
        Command::CreateSandbox {
            id,
            team,
            spec,
            hints,
        }
    };
    assert_eq!(world.apply(create("x")), world.apply(create("")));
}

#[test]
fn an_id_that_stands_for_another_sandbox_is_refused() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    let other = Command::CreateSandbox {
        id: sandbox_id(1),
        team: TEAM,
        spec: spec(1024),
        hints: vec![],
    };
    assert!(matches!(world.apply(other), Err(Refusal::IdTaken(_))));
}

#[test]
fn a_cluster_without_room_names_what_is_missing() {
    let mut world = World::with_node();
    let huge = Command::CreateSandbox {
        id: sandbox_id(1),
        team: TEAM,
        spec: spec(8192),
        hints: vec![],
    };
    let Err(Refusal::NoRoom(lack)) = world.apply(huge) else {
        panic!("it was placed")
    };
    assert_eq!(lack.0, "n1 lacks memory (8192 MiB wanted, 4096 MiB free)");
}

#[test]
fn a_report_under_an_old_epoch_or_from_another_node_is_fenced() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    let running = Report::Running(GuestVersions::default());
    let stale = world.report(1, Epoch(2), running.clone());
    assert_eq!(stale, Err(Refusal::Fenced { newest: Epoch(3) }));
    let stranger = Command::ReportSandbox {
        id: sandbox_id(1),
        epoch: Epoch(3),
        node: NodeId(2),
        report: running,
    };
    assert_eq!(
        world.apply(stranger),
        Err(Refusal::Fenced { newest: Epoch(3) })
    );
    assert_eq!(world.phase(1), Phase::Starting);
}

/// Found by `deploy/fuzz raft-apply`: a row says "never" by a zero, so a member that started again
/// had another state than one that had not.
#[test]
fn what_happened_at_the_beginning_of_time_survives_as_rows() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    world.index += 1;
    let running = Proposal {
        at: Stamp(0),
        command: Command::ReportSandbox {
            id: sandbox_id(1),
            epoch: Epoch(3),
            node: NODE,
            report: Report::Running(GuestVersions::default()),
        },
    };
    let applied = world.state.apply(world.index, running);
    assert_eq!(applied.answer, Ok(Receipt::Done(1)));
    let again = State::from_rows(world.state.rows()).expect("own rows are readable");
    assert!(again == world.state);
}

#[test]
fn a_stop_frees_the_room_only_when_the_owner_says_everything_is_released() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    let stop = Command::StopSandbox {
        id: sandbox_id(1),
        cause: StopCause::Asked,
    };
    assert_eq!(world.apply(stop.clone()), Ok(Receipt::Done(1)));
    assert_eq!(
        world.apply(stop),
        Ok(Receipt::Done(0)),
        "a second stop does nothing"
    );
    assert_eq!(world.phase(1), Phase::Stopping);
    assert_eq!(world.state.reserved(NODE).sandboxes, 1);
    let stopped = Report::Stopped {
        reason: String::new(),
    };
    world
        .report(1, Epoch(3), stopped)
        .expect("the owner may report");
    assert_eq!(world.phase(1), Phase::Stopped);
    assert_eq!(world.state.reserved(NODE), Resources::default());
}

#[test]
fn a_change_sets_what_it_names_and_nothing_once_the_sandbox_has_ended() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    let change = |ports_open, wakes| Command::ChangeSandbox {
        id: sandbox_id(1),
        ports_open,
        wakes,
    };
    let ways = |world: &World| {
        let sandbox = world.state.sandbox(sandbox_id(1)).expect("it is known");
        (sandbox.spec.ports_open, sandbox.spec.wakes)
    };
    assert_eq!(ways(&world), (false, false));
    let both = change(Some(true), Some(true));
    assert_eq!(world.apply(both.clone()), Ok(Receipt::Done(1)));
    assert_eq!(world.apply(both), Ok(Receipt::Done(0)));
    let one = change(None, Some(false));
    assert_eq!(world.apply(one), Ok(Receipt::Done(1)));
    assert_eq!(ways(&world), (true, false));
    let again = State::from_rows(world.state.rows()).expect("own rows are readable");
    assert!(again == world.state);

    let failed = Report::Failed {
        reason: "no disk".into(),
    };
    world.report(1, Epoch(3), failed).expect("heard");
    assert_eq!(world.apply(change(Some(false), None)), Ok(Receipt::Done(0)));
    let unknown = Command::ChangeSandbox {
        id: sandbox_id(9),
        ports_open: None,
        wakes: None,
    };
    assert!(world.apply(unknown).is_err());
}

#[test]
fn a_start_that_races_with_a_stop_stays_stopping() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    let stop = Command::StopSandbox {
        id: sandbox_id(1),
        cause: StopCause::Idle,
    };
    world.apply(stop).expect("it may be stopped");
    let running = Report::Running(GuestVersions::default());
    assert_eq!(world.report(1, Epoch(3), running), Ok(Receipt::Done(0)));
    assert_eq!(world.phase(1), Phase::Stopping);
}

#[test]
fn a_failure_keeps_its_reason_and_ends_in_error() {
    let mut world = World::with_node();
    world.create(1).expect("there is room");
    let failed = Report::Failed {
        reason: "no disk".into(),
    };
    world
        .report(1, Epoch(3), failed)
        .expect("the owner may report");
    let record = world
        .state
        .sandbox(sandbox_id(1))
        .expect("the record is kept");
    assert_eq!(
        (record.phase, record.desired),
        (Phase::Error, Desired::Stopped)
    );
    assert_eq!(record.reason, "no disk");
}

#[test]
fn pruning_forgets_only_what_ended_before_the_instant() {
    let mut world = World::with_node();
    for n in [1, 2] {
        world.create(n).expect("there is room");
    }
    world
        .report(
            1,
            Epoch(3),
            Report::Stopped {
                reason: String::new(),
            },
        )
        .expect("reported");
    let now = Stamp(world.index * 1000);
    let prune = |before| Command::PruneSandboxes {
        ended_before: before,
    };
    assert_eq!(
        world.apply(prune(now)),
        Ok(Receipt::Done(0)),
        "not strictly older"
    );
    assert_eq!(world.apply(prune(Stamp(now.0 + 1))), Ok(Receipt::Done(1)));
    assert!(world.state.sandbox(sandbox_id(1)).is_none());
    assert!(
        world.state.sandbox(sandbox_id(2)).is_some(),
        "a live one is never pruned"
    );
}

#[test]
fn a_revoked_key_opens_nothing_and_its_id_stays_taken() {
    let mut world = World::with_node();
    let key = Key {
        id: KeyId([5; 16]),
        team: TEAM,
        name: "first".into(),
        hash: [9; 32],
        shown: "wrn_012345".into(),
        ..Key::default()
    };
    world
        .apply(Command::PutKey(key.clone()))
        .expect("a key is put");
    assert!(world.state.key_by_hash(&[9; 32]).is_some());
    world
        .apply(Command::RevokeKey(key.id))
        .expect("a key is revoked");
    assert!(world.state.key_by_hash(&[9; 32]).is_none());
    let again = Key {
        hash: [8; 32],
        ..key.clone()
    };
    let revived = Key {
        id: KeyId([6; 16]),
        ..key
    };
    for key in [again, revived] {
        let answer = world.apply(Command::PutKey(key));
        assert!(matches!(answer, Err(Refusal::IdTaken(_))), "{answer:?}");
    }
}

#[test]
fn a_node_id_cannot_change_hands_nor_a_key_its_id() {
    let mut world = World::with_node();
    let thief = Node {
        key: NodeKey([9; 32]),
        ..node(1, 1)
    };
    assert!(matches!(
        world.apply(Command::AdmitNode(thief)),
        Err(Refusal::IdTaken(_))
    ));
    let second = Node {
        key: NodeKey([1; 32]),
        ..node(2, 1)
    };
    assert!(matches!(
        world.apply(Command::AdmitNode(second)),
        Err(Refusal::IdTaken(_))
    ));
}

fn any_report() -> impl Strategy<Value = Report> {
    prop_oneof![
        Just(Report::Running(GuestVersions::default())),
        "[a-z ]{0,8}".prop_map(|reason| Report::Stopped { reason }),
        "[a-z ]{0,8}".prop_map(|reason| Report::Failed { reason }),
    ]
}

fn any_command() -> impl Strategy<Value = Command> {
    let id = || (0_u8..6).prop_map(sandbox_id);
    prop_oneof![
        (1_u64..4, 1_u32..5).prop_map(|(id, room)| Command::AdmitNode(node(id, room))),
        Just(Command::PutTemplate(template())),
        (id(), 1_u32..5000).prop_map(|(id, memory)| Command::CreateSandbox {
            id,
            team: TEAM,
            spec: spec(memory),
            hints: vec![],
        }),
        id().prop_map(|id| Command::StopSandbox {
            id,
            cause: StopCause::Asked
        }),
        (id(), any::<Option<bool>>(), any::<Option<bool>>()).prop_map(|(id, ports_open, wakes)| {
            Command::ChangeSandbox {
                id,
                ports_open,
                wakes,
            }
        }),
        (id(), 0_u64..30, 1_u64..4, any_report()).prop_map(|(id, epoch, node, report)| {
            Command::ReportSandbox {
                id,
                epoch: Epoch(epoch),
                node: NodeId(node),
                report,
            }
        }),
        (0_u64..40_000).prop_map(|ms| Command::PruneSandboxes {
            ended_before: Stamp(ms)
        }),
        (0_u8..3, 0_u64..40, prop::collection::vec(1_u64..4, 0..3)).prop_map(|(id, last, lost)| {
            Command::RecoverCluster {
                id: ClusterId([id; 16]),
                last,
                lost: lost.into_iter().map(NodeId).collect(),
            }
        }),
    ]
}

/// What the sandboxes that hold resources add up to on one node.
fn sum_of(state: &State, id: NodeId) -> Resources {
    state
        .sandboxes()
        .filter(|sandbox| sandbox.owner == id && sandbox.phase.holds_resources())
        .fold(Resources::default(), |sum, sandbox| {
            sum.plus(sandbox.spec.resources())
        })
}

#[test]
fn every_answer_survives_being_encoded() {
    let text = || "x".to_owned();
    let refusals = [
        Refusal::Unreadable(text()),
        Refusal::NoSuchSandbox(text()),
        Refusal::NoSuchTemplate(text()),
        Refusal::NoSuchKey(text()),
        Refusal::NoRoom(Lack(text())),
        Refusal::NoSuchNode(text()),
        Refusal::NoSuchToken(text()),
        Refusal::TokenExpired(text()),
        Refusal::TokenUsed(text()),
        Refusal::Unfit(text()),
        Refusal::IdTaken(text()),
        Refusal::Fenced { newest: Epoch(7) },
    ];
    let placed = Receipt::Placed {
        node: NODE,
        epoch: Epoch(3),
    };
    let receipts = [Receipt::Done(0), Receipt::Admitted(NodeId(9)), placed];
    let answers = receipts.into_iter().map(Ok);
    for answer in answers.chain(refusals.into_iter().map(Err)) {
        assert_eq!(wire::decode_answer(&wire::encode_answer(&answer)), answer);
    }
}

proptest! {
    /// The one promise placement makes, under any history.
    #[test]
    fn no_node_is_ever_promised_more_than_the_largest_capacity_it_had(
        commands in prop::collection::vec(any_command(), 0..60),
    ) {
        let mut world = World::with_node();
        let mut largest: BTreeMap<u64, u32> = BTreeMap::from([(1, 100)]);
        for command in commands {
            if let Command::AdmitNode(node) = &command {
                let most = largest.entry(node.id.0).or_default();
                *most = (*most).max(node.capacity.sandboxes);
            }
            let _ = world.apply(command);
            for node in world.state.nodes() {
                let reserved = world.state.reserved(node.id);
                prop_assert_eq!(reserved, sum_of(&world.state, node.id));
                prop_assert!(reserved.sandboxes <= largest[&node.id.0]);
                prop_assert!(reserved.memory <= node.capacity.memory);
            }
        }
    }

    #[test]
    fn applying_any_command_twice_in_a_row_changes_the_state_once(
        commands in prop::collection::vec(any_command(), 0..40),
    ) {
        let mut world = World::with_node();
        for command in commands {
            let _ = world.apply(command.clone());
            let once: Vec<_> = world.state.rows().collect();
            let at = Stamp(world.index * 1000);
            let mut twice = world.state.clone();
            // Each announcement of a node is one of its own: see `apply_histories.rs`.
            if matches!(command, Command::AdmitNode(_)) {
                continue;
            }
            let _ = twice.apply(world.index + 1, Proposal { at, command });
            prop_assert_eq!(once, twice.rows().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_state_survives_being_written_as_rows(
        commands in prop::collection::vec(any_command(), 0..40),
    ) {
        let mut world = World::with_node();
        for command in commands {
            let _ = world.apply(command);
        }
        let rows: Vec<_> = world.state.rows().collect();
        let read = State::from_rows(rows.clone()).expect("own rows are readable");
        prop_assert_eq!(rows, read.rows().collect::<Vec<_>>());
        for node in world.state.nodes() {
            prop_assert_eq!(world.state.reserved(node.id), read.reserved(node.id));
        }
    }

    #[test]
    fn the_touched_rows_are_exactly_those_that_changed(
        commands in prop::collection::vec(any_command(), 0..40),
    ) {
        let mut world = World::with_node();
        for command in commands {
            let before: BTreeMap<_, _> = world.state.rows().collect();
            world.index += 1;
            let proposal = Proposal { at: Stamp(world.index * 1000), command };
            let applied = world.state.apply(world.index, proposal);
            let after: BTreeMap<_, _> = world.state.rows().collect();
            let mut replayed = before;
            for key in applied.touched {
                match world.state.row(&key) {
                    Some(row) => replayed.insert(key.encode(), row),
                    None => replayed.remove(&key.encode()),
                };
            }
            prop_assert_eq!(replayed, after);
        }
    }

    #[test]
    fn every_command_survives_being_encoded(command in any_command(), at: u64) {
        let proposal = Proposal { at: Stamp(at), command };
        prop_assert_eq!(Proposal::decode(&proposal.encode()), Ok(proposal));
    }

    #[test]
    fn garbage_is_refused_and_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Proposal::decode(&bytes);
        let _ = wire::decode_answer(&bytes);
        let _ = State::from_rows([(bytes.clone(), bytes)]);
    }
}
