//! The rows of the table, each from a state that commands led to.

use proptest::prelude::*;
use proto::ids::{NodeKey, SnapshotId, TeamId};
use proto::units::Mib;
use raft::command::{CheckpointSandbox, Command, Proposal, StopCause};
use raft::state::{
    Checkpoint, GuestVersions, Needs, Node, Purpose, Resources, SandboxSpec, Sealed, SnapshotKind,
    Template,
};

use super::*;

const HERE: NodeId = NodeId(1);
const ID: SandboxId = SandboxId([7; 16]);
const IDLE: Duration = Duration::from_secs(60);

fn at() -> Circumstances {
    Circumstances {
        here: HERE,
        now: Stamp(1_000_000),
        ended_retention: Duration::from_secs(100),
        prunes: false,
    }
}

/// A state in which `commands` were applied after a node, a template and a create of `ID`.
fn state_after(commands: impl IntoIterator<Item = Command>) -> State {
    state_of(HostLoss::Wait, false, commands)
}

/// The same, with an `ID` that is bound to its node's lease.
fn bound_after(commands: impl IntoIterator<Item = Command>) -> State {
    state_of(HostLoss::Restart, false, commands)
}

/// The same on a node that asks before a guest begins.
fn asking_after(commands: impl IntoIterator<Item = Command>) -> State {
    state_of(HostLoss::Wait, true, commands)
}

fn state_of(
    on_host_loss: HostLoss,
    asks_first: bool,
    commands: impl IntoIterator<Item = Command>,
) -> State {
    let room = Resources {
        vcpus: 8,
        memory: Mib(4096),
        disk: Mib(9000),
        sandboxes: 8,
    };
    let node = Node {
        id: HERE,
        name: "n1".into(),
        key: NodeKey([1; 32]),
        capacity: room,
        templates: BTreeMap::from([("minimal".into(), [0; 32])]),
        asks_first,
        ..Node::default()
    };
    let template = Template {
        name: "minimal".into(),
        digest: [0; 32],
        disk: Mib(1),
        size_bytes: 1,
        created_at: Stamp(0),
    };
    let spec = SandboxSpec {
        template: "minimal".into(),
        vcpus: 1,
        memory: Mib(256),
        disk: Mib(1),
        idle_timeout: Some(IDLE),
        on_host_loss,
        ..SandboxSpec::default()
    };
    let team = TeamId::default();
    let first = [
        Command::AdmitNode(node),
        Command::PutTemplate(template),
        Command::CreateSandbox {
            id: ID,
            team,
            spec,
            hints: vec![],
        },
    ];
    let mut state = State::default();
    for (index, command) in (1..).zip(first.into_iter().chain(commands)) {
        let applied = state.apply(
            index,
            Proposal {
                at: Stamp(index * 1000),
                command,
            },
        );
        applied.answer.expect("the command fits");
    }
    state
}

fn report(report: Report) -> Command {
    Command::ReportSandbox {
        id: ID,
        epoch: Epoch(3),
        node: HERE,
        report,
    }
}

fn running() -> Command {
    report(Report::Running(GuestVersions::default()))
}

fn stop() -> Command {
    Command::StopSandbox {
        id: ID,
        cause: StopCause::Asked,
    }
}

fn seen(state: ObservedState) -> BTreeMap<SandboxId, Observed> {
    seen_under(Epoch(3), state, Duration::ZERO)
}

fn seen_under(
    epoch: Epoch,
    state: ObservedState,
    idle_for: Duration,
) -> BTreeMap<SandboxId, Observed> {
    BTreeMap::from([(
        ID,
        Observed {
            let_begin: true,
            epoch,
            state,
            idle_for,
            reclaimed: false,
            has_warm: false,
        },
    )])
}

fn ready() -> ObservedState {
    ObservedState::Ready(GuestVersions::default())
}

fn gone() -> ObservedState {
    ObservedState::Gone(End::Failed {
        reason: "broke".into(),
    })
}

fn steps(state: &State, observed: &BTreeMap<SandboxId, Observed>) -> Vec<Step> {
    plan(at(), state, observed).steps
}

#[test]
fn a_wanted_sandbox_that_is_not_here_is_started() {
    assert_eq!(steps(&state_after([]), &BTreeMap::new()), [Step::Start(ID)]);
}

#[test]
fn a_starting_sandbox_is_left_to_start() {
    assert_eq!(steps(&state_after([]), &seen(ObservedState::Starting)), []);
    let waits = BTreeMap::from([(
        ID,
        Observed {
            let_begin: false,
            ..seen(ObservedState::Starting)[&ID].clone()
        },
    )]);
    // Of a release that did not ask.
    assert_eq!(steps(&state_after([]), &waits), [Step::Begin(ID)]);
    let asks = Step::Report {
        id: ID,
        epoch: Epoch(3),
        report: Report::Begins,
    };
    assert_eq!(steps(&asking_after([]), &waits), [asks]);
    let begun = asking_after([report(Report::Begins)]);
    assert_eq!(steps(&begun, &waits), [Step::Begin(ID)]);
    assert_eq!(steps(&begun, &seen(ObservedState::Starting)), []);
}

#[test]
fn a_ready_guest_is_reported_once() {
    let expected = Report::Running(GuestVersions::default());
    let reported = Step::Report {
        id: ID,
        epoch: Epoch(3),
        report: expected,
    };
    assert_eq!(steps(&state_after([]), &seen(ready())), [reported]);
    assert_eq!(steps(&state_after([running()]), &seen(ready())), []);
}

#[test]
fn a_running_sandbox_that_vanished_is_reported_failed_and_never_restarted() {
    let planned = steps(&state_after([running()]), &BTreeMap::new());
    let [
        Step::Report {
            report: Report::Failed { .. },
            ..
        },
    ] = planned[..]
    else {
        panic!("{planned:?}");
    };
}

fn lease_lost() -> ObservedState {
    ObservedState::Gone(End::LeaseLost {
        reason: "no lease".into(),
    })
}

#[test]
fn a_bound_guest_that_lost_its_lease_starts_again_with_the_next_one() {
    let bound = bound_after([running()]);
    assert_eq!(steps(&bound, &seen(lease_lost())), [Step::Forget(ID)]);
    assert_eq!(steps(&bound, &BTreeMap::new()), [Step::Start(ID)]);
    assert_eq!(steps(&bound, &seen(ready())), []);
}

#[test]
fn a_bound_guest_that_broke_by_itself_is_reported_and_not_started_again() {
    let planned = steps(&bound_after([running()]), &seen(gone()));
    let [
        Step::Report {
            report: Report::Failed { .. },
            ..
        },
    ] = planned[..]
    else {
        panic!("{planned:?}");
    };
}

#[test]
fn a_bound_guest_that_is_not_wanted_any_more_is_not_started_again() {
    let stopping = bound_after([running(), stop()]);
    for seen in [BTreeMap::new(), seen(lease_lost())] {
        let planned = steps(&stopping, &seen);
        assert!(matches!(planned[..], [Step::Report { .. }]), "{planned:?}");
    }
}

/// The state is read through its indexes: what others hold costs this node nothing.
#[test]
fn sandboxes_of_other_nodes_and_ended_ones_are_not_planned_for() {
    let elsewhere = Circumstances {
        here: NodeId(2),
        ..at()
    };
    let state = state_after([running()]);
    assert_eq!(plan(elsewhere, &state, &BTreeMap::new()).steps, []);
    let stray = plan(elsewhere, &state, &seen(ready())).steps;
    assert_eq!(stray, [Step::Stop(ID)]);
    let reason = "broke".into();
    let ended = state_after([report(Report::Failed { reason })]);
    assert_eq!(steps(&ended, &BTreeMap::new()), []);
    assert_eq!(steps(&ended, &seen(ready())), [Step::Stop(ID)]);
    assert_eq!(steps(&ended, &seen(gone())), [Step::Forget(ID)]);
    assert_eq!(steps(&ended, &seen(ObservedState::Releasing)), []);
}

#[test]
fn an_unwanted_sandbox_is_stopped_then_reported_then_forgotten() {
    let stopping = state_after([running(), stop()]);
    assert_eq!(steps(&stopping, &seen(ready())), [Step::Stop(ID)]);
    assert_eq!(steps(&stopping, &seen(ObservedState::Releasing)), []);
    let planned = steps(&stopping, &seen(gone()));
    let [Step::Report { .. }] = planned[..] else {
        panic!("{planned:?}")
    };
    let stopped = report(Report::Stopped {
        reason: String::new(),
    });
    let ended = state_after([running(), stop(), stopped]);
    assert_eq!(steps(&ended, &seen(gone())), [Step::Forget(ID)]);
}

#[test]
fn a_reason_of_any_length_is_reported_in_bounds() {
    let reason = "\u{e9}".repeat(1 << 20);
    let ended = seen(ObservedState::Gone(End::Failed { reason }));
    let planned = steps(&state_after([]), &ended);
    let [
        Step::Report {
            report: Report::Failed { reason },
            ..
        },
    ] = &planned[..]
    else {
        panic!("{planned:?}");
    };
    assert_eq!(reason.chars().count(), REASON_CHARS);
}

#[test]
fn a_stop_of_a_sandbox_that_is_not_here_is_reported_done() {
    let planned = steps(&state_after([stop()]), &BTreeMap::new());
    let [
        Step::Report {
            report: Report::Stopped { .. },
            ..
        },
    ] = planned[..]
    else {
        panic!("{planned:?}");
    };
}

#[test]
fn what_runs_under_an_old_epoch_is_gone_before_anything_else_is_planned() {
    for state in [state_after([]), state_after([running()])] {
        let old = |seen| seen_under(Epoch(2), seen, Duration::ZERO);
        assert_eq!(steps(&state, &old(ready())), [Step::Stop(ID)]);
        assert_eq!(steps(&state, &old(ObservedState::Releasing)), []);
        assert_eq!(steps(&state, &old(gone())), [Step::Forget(ID)]);
    }
}

#[test]
fn what_no_record_names_is_stopped_and_forgotten() {
    let state = State::default();
    assert_eq!(steps(&state, &seen(ready())), [Step::Stop(ID)]);
    assert_eq!(steps(&state, &seen(gone())), [Step::Forget(ID)]);
}

#[test]
fn a_guest_that_will_be_paused_gives_memory_back_once_some_seconds_before() {
    let state = state_after([running()]);
    let mut seen = seen_under(Epoch(3), ready(), IDLE.saturating_sub(2 * RECLAIM_AHEAD));
    let waiting = plan(at(), &state, &seen);
    assert_eq!(waiting.steps, []);
    assert_eq!(waiting.look_again_in, Some(RECLAIM_AHEAD));
    let mut since = |idle_for, reclaimed| {
        let known = seen.get_mut(&ID).expect("it is seen");
        (known.idle_for, known.reclaimed) = (idle_for, reclaimed);
        plan(at(), &state, &seen)
    };
    let near = IDLE.saturating_sub(RECLAIM_AHEAD);
    assert_eq!(since(near, false).steps, [Step::Reclaim(ID)]);
    let done = since(near, true);
    assert_eq!(
        (done.steps, done.look_again_in),
        (vec![], Some(RECLAIM_AHEAD))
    );
    assert_eq!(since(IDLE, false).steps, [Step::PutAway(ID)]);
}

#[test]
fn an_idle_sandbox_is_put_away_when_its_timeout_has_passed_and_not_before() {
    let state = state_after([running()]);
    let mut nearly = seen_under(
        Epoch(3),
        ready(),
        IDLE.saturating_sub(Duration::from_secs(1)),
    );
    nearly.get_mut(&ID).expect("it is seen").reclaimed = true;
    let waiting = plan(at(), &state, &nearly);
    assert_eq!(waiting.steps, []);
    assert_eq!(waiting.look_again_in, Some(Duration::from_secs(1)));
    let over = seen_under(Epoch(3), ready(), IDLE);
    assert_eq!(steps(&state, &over), [Step::PutAway(ID)]);
}

#[test]
fn ended_records_are_pruned_after_their_retention_and_not_before() {
    let ended = state_after([report(Report::Failed {
        reason: "broke".into(),
    })]);
    // It ended at 4 s, now is 1000 s, kept for 100 s.
    let old = Circumstances {
        prunes: true,
        ..at()
    };
    let planned = plan(old, &ended, &BTreeMap::new()).steps;
    let expected = Step::Prune {
        ended_before: Stamp(900_000),
    };
    assert_eq!(planned, [expected]);
    let soon = Circumstances {
        now: Stamp(100_000),
        prunes: true,
        ..at()
    };
    let waiting = plan(soon, &ended, &BTreeMap::new());
    assert_eq!(waiting.steps, []);
    assert_eq!(waiting.look_again_in, Some(Duration::from_millis(4001)));
}

fn pause() -> Command {
    let epoch = Epoch(3);
    Command::PauseSandbox {
        id: ID,
        epoch,
        cause: StopCause::Asked,
        then_on: None,
    }
}

/// The entry that asks for the pause of a sandbox that was reported running before.
const PAUSE: u64 = 5;
const SEAL: Step = Step::Seal {
    id: ID,
    pause: PAUSE,
    kind: SnapshotKind::Snapshot,
};

/// A snapshot of `ID` as it is told of.
fn sealed() -> Sealed {
    Sealed {
        pause: PAUSE,
        id: SnapshotId([9; 16]),
        needs: Needs {
            base: [0; 32],
            ..Needs::default()
        },
        ..Sealed::default()
    }
}

fn paused() -> [Command; 3] {
    [running(), pause(), report(Report::Sealed(sealed()))]
}

fn frozen(reason: &str) -> ObservedState {
    let reason = reason.into();
    ObservedState::Frozen { reason }
}

fn reported(report: Report) -> Step {
    let epoch = Epoch(3);
    Step::Report {
        id: ID,
        epoch,
        report,
    }
}

#[test]
fn a_sandbox_to_be_paused_is_sealed_once_and_the_seal_is_reported() {
    let pausing = state_after([running(), pause()]);
    assert_eq!(steps(&pausing, &seen(ready())), [SEAL]);
    assert_eq!(steps(&pausing, &seen(ObservedState::Sealing)), []);
    let seen_sealed = seen(ObservedState::Sealed(sealed()));
    let told = reported(Report::Sealed(sealed()));
    assert_eq!(steps(&pausing, &seen_sealed), [told]);
}

#[test]
fn a_guest_that_could_not_be_sealed_goes_on_once_the_cluster_knows() {
    let pausing = state_after([running(), pause()]);
    let told = Report::Thawed {
        reason: "full".into(),
    };
    assert_eq!(
        steps(&pausing, &seen(frozen("full"))),
        [reported(told.clone())]
    );
    let goes_on = state_after([running(), pause(), report(told)]);
    assert_eq!(steps(&goes_on, &seen(frozen("full"))), [Step::Thaw(ID)]);
    let seen_sealed = seen(ObservedState::Sealed(sealed()));
    assert_eq!(steps(&goes_on, &seen_sealed), [Step::Thaw(ID)]);
    assert_eq!(steps(&goes_on, &seen(ready())), []);
}

#[test]
fn why_a_guest_was_not_sealed_is_reported_in_bounds() {
    let pausing = state_after([running(), pause()]);
    let planned = steps(&pausing, &seen(frozen(&"\u{e9}".repeat(1 << 20))));
    let [
        Step::Report {
            report: Report::Thawed { reason },
            ..
        },
    ] = &planned[..]
    else {
        panic!("{planned:?}");
    };
    assert_eq!(reason.chars().count(), REASON_CHARS);
}

/// Nobody knows how far its guest got: what is here under `pausing` was never sealed.
#[test]
fn a_sandbox_that_vanished_while_it_was_paused_is_reported_failed_even_if_bound() {
    let commands = || [running(), pause()];
    for pausing in [state_after(commands()), bound_after(commands())] {
        for seen in [BTreeMap::new(), seen(gone()), seen(lease_lost())] {
            let planned = steps(&pausing, &seen);
            let [
                Step::Report {
                    report: Report::Failed { .. },
                    ..
                },
            ] = planned[..]
            else {
                panic!("{planned:?}");
            };
        }
    }
}

#[test]
fn what_is_left_of_a_paused_sandbox_is_stopped_and_forgotten() {
    for paused in [state_after(paused()), bound_after(paused())] {
        let seen_sealed = seen(ObservedState::Sealed(sealed()));
        assert_eq!(steps(&paused, &seen_sealed), [Step::Stop(ID)]);
        for left in [frozen("full"), ready(), ObservedState::Sealing] {
            assert_eq!(steps(&paused, &seen(left)), [Step::Stop(ID)]);
        }
        assert_eq!(steps(&paused, &seen(ObservedState::Releasing)), []);
        assert_eq!(steps(&paused, &seen(gone())), [Step::Forget(ID)]);
        assert_eq!(steps(&paused, &BTreeMap::new()), []);
    }
}

#[test]
fn a_resumed_sandbox_is_started_and_reported_once_what_was_paused_here_is_gone() {
    let resume = Command::ResumeSandbox {
        id: ID,
        snapshot: sealed().id,
        to: None,
        hints: vec![],
    };
    let resuming = state_after(paused().into_iter().chain([resume]));
    let anew = resuming.sandbox(ID).expect("it is known").epoch;
    assert!(anew > Epoch(3), "it goes on under another ownership");
    assert_eq!(steps(&resuming, &BTreeMap::new()), [Step::Start(ID)]);
    let old = seen(ObservedState::Sealed(sealed()));
    assert_eq!(steps(&resuming, &old), [Step::Stop(ID)]);
    assert_eq!(steps(&resuming, &seen(gone())), [Step::Forget(ID)]);
    let under_way = seen_under(anew, ObservedState::Starting, Duration::ZERO);
    assert_eq!(steps(&resuming, &under_way), []);
    let up = steps(&resuming, &seen_under(anew, ready(), Duration::ZERO));
    let [
        Step::Report {
            report: Report::Running(_),
            epoch,
            ..
        },
    ] = up[..]
    else {
        panic!("{up:?}");
    };
    assert_eq!(epoch, anew);
}

#[test]
fn a_sandbox_that_is_not_wanted_any_more_is_stopped_however_far_its_pause_is() {
    let stopping = state_after([running(), pause(), stop()]);
    for seen_as in [
        ready(),
        ObservedState::Sealing,
        ObservedState::Sealed(sealed()),
        frozen("full"),
    ] {
        assert_eq!(steps(&stopping, &seen(seen_as)), [Step::Stop(ID)]);
    }
}

#[test]
fn a_guest_that_is_being_paused_is_not_stopped_for_idleness() {
    let pausing = state_after([running(), pause()]);
    let idle = seen_under(Epoch(3), ready(), 2 * IDLE);
    assert_eq!(steps(&pausing, &idle), [SEAL]);
}

fn checkpoint() -> Command {
    checkpoint_of(SnapshotKind::Snapshot)
}

fn checkpoint_of(kind: SnapshotKind) -> Command {
    Command::CheckpointSandbox(CheckpointSandbox {
        id: ID,
        epoch: Epoch(3),
        checkpoint: Checkpoint {
            ask: SnapshotId([8; 16]),
            purpose: Purpose::Name {
                name: "mine".into(),
                kind,
                overwrite: false,
                metadata: BTreeMap::new(),
            },
        },
        hints: vec![],
    })
}

#[test]
fn for_a_base_the_disk_alone_is_sealed() {
    let snapshotting = state_after([running(), checkpoint_of(SnapshotKind::Base)]);
    let disk = Step::Seal {
        id: ID,
        pause: PAUSE,
        kind: SnapshotKind::Base,
    };
    assert_eq!(steps(&snapshotting, &seen(ready())), [disk]);
}

#[test]
fn a_guest_that_was_sealed_for_a_checkpoint_goes_on_once_the_cluster_knows() {
    let snapshotting = state_after([running(), checkpoint()]);
    assert_eq!(steps(&snapshotting, &seen(ready())), [SEAL]);
    let seen_sealed = seen(ObservedState::Sealed(sealed()));
    let told = Report::Sealed(sealed());
    let step = reported(told.clone());
    assert_eq!(steps(&snapshotting, &seen_sealed), [step]);
    let known = || state_after([running(), checkpoint(), report(told.clone())]);
    assert_eq!(steps(&known(), &seen_sealed), [Step::Thaw(ID)]);
    assert_eq!(steps(&known(), &seen(frozen("cut"))), [Step::Thaw(ID)]);
    let goes_on = reported(Report::Running(GuestVersions::default()));
    assert_eq!(steps(&known(), &seen(ready())), [goes_on]);
}

#[test]
fn a_checkpoint_that_failed_is_told_before_the_guest_goes_on() {
    let snapshotting = state_after([running(), checkpoint()]);
    let told = Report::Thawed {
        reason: "full".into(),
    };
    let step = reported(told.clone());
    assert_eq!(steps(&snapshotting, &seen(frozen("full"))), [step]);
    let known = state_after([running(), checkpoint(), report(told)]);
    assert_eq!(steps(&known, &seen(frozen("full"))), [Step::Thaw(ID)]);
}

#[test]
fn a_guest_that_vanished_during_its_checkpoint_is_lost_and_a_bound_one_starts_again_after_it() {
    let nothing = BTreeMap::new();
    let lost = steps(&state_after([running(), checkpoint()]), &nothing);
    assert!(
        matches!(
            &lost[..],
            [Step::Report {
                report: Report::Failed { .. },
                ..
            }]
        ),
        "{lost:?}"
    );
    let bound = steps(&bound_after([running(), checkpoint()]), &nothing);
    let [Step::Report { report: told, .. }] = &bound[..] else {
        panic!("{bound:?}");
    };
    let known = bound_after([running(), checkpoint(), report(told.clone())]);
    assert_eq!(steps(&known, &nothing), [Step::Start(ID)]);
}

#[test]
fn a_start_that_the_end_of_a_daemon_cut_short_begins_again() {
    let unfinished = || {
        seen(ObservedState::Gone(End::Unfinished {
            reason: "the daemon ended".into(),
        }))
    };
    let starting = state_after([]);
    assert_eq!(steps(&starting, &unfinished()), [Step::Forget(ID)]);
    assert_eq!(steps(&starting, &BTreeMap::new()), [Step::Start(ID)]);
    let unwanted = steps(&state_after([stop()]), &unfinished());
    assert!(
        matches!(&unwanted[..], [Step::Report { .. }]),
        "{unwanted:?}"
    );
}

#[test]
fn what_was_kept_of_a_boot_is_told_once_the_guest_is_known_to_run() {
    let mut kept = seen(ready());
    kept.get_mut(&ID).expect("it is seen").has_warm = true;
    let first = steps(&state_after([]), &kept);
    assert!(matches!(&first[..], [Step::Report { .. }]), "{first:?}");
    assert_eq!(
        steps(&state_after([running()]), &kept),
        [Step::TellWarm(ID)]
    );
}

fn any_state() -> impl Strategy<Value = ObservedState> {
    prop_oneof![
        Just(ObservedState::Starting),
        Just(ready()),
        Just(ObservedState::Sealing),
        Just(ObservedState::Sealed(sealed())),
        Just(frozen("full")),
        Just(ObservedState::Gone(End::Unfinished {
            reason: "cut".into()
        })),
        Just(ObservedState::Releasing),
        Just(gone()),
    ]
}

proptest! {
    /// A looks-again loop must come to rest: nothing is started that is here, and at most one
    /// step is planned for a sandbox.
    #[test]
    fn at_most_one_step_is_planned_for_a_sandbox_that_is_seen_under_its_epoch(
        state in any_state(), stopped: bool, ran: bool, pauses: bool, seals: bool, idle in 0_u64..200,
    ) {
        let mut commands = Vec::new();
        if ran {
            commands.push(running());
            commands.extend(pauses.then(pause));
            commands.extend((seals && !pauses).then(checkpoint));
        }
        if stopped {
            commands.push(stop());
        }
        let observed = seen_under(Epoch(3), state, Duration::from_secs(idle));
        let planned = steps(&state_after(commands), &observed);
        prop_assert!(planned.len() <= 1, "{planned:?}");
        prop_assert!(!planned.contains(&Step::Start(ID)), "{planned:?}");
    }
}
