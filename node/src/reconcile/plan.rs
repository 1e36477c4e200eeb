//! Desired and observed in, steps out. Pure.
//!
//! | record on this node | observed here | step |
//! |---|---|---|
//! | wanted running, `starting` | nothing | start |
//! | wanted running, `starting` | ready | report running |
//! | wanted running, `running` | nothing | report failed: its VMM is gone; one that is bound to the lease: start |
//! | wanted running, `running` | ready, idle too long | stop for idleness |
//! | wanted stopped | starting or ready | stop |
//! | wanted stopped | nothing | report stopped |
//! | not ended | gone | report how it ended; one that is wanted and lost its lease: forget |
//! | ended, another epoch or owner, or no record | gone | forget |
//! | ended, another epoch or owner, or no record | anything else | stop |
//!
//! A guest bound to the lease (`on_host_loss: restart`) is killed when the lease has lapsed. If its
//! node is back before the cluster gave the sandbox out, the node is still the owner under the same
//! epoch and starts it again. Whoever carries that out holds a lease first, and a node that was
//! judged lost holds none before it has applied what became of its sandboxes.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use raft::command::Report;
use raft::state::{Desired, HostLoss, Phase, Sandbox, State};

use crate::sandbox::{End, Observed, ObservedState};

/// As much of a reason as is told to the cluster. It quotes what VMM and guest said, and a report
/// larger than the log takes would be refused for ever.
const REASON_CHARS: usize = 4096;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start a sandbox here.
    Start(SandboxId),
    /// End a sandbox here.
    Stop(SandboxId),
    /// Drop what is remembered of a sandbox that is gone from here.
    Forget(SandboxId),
    /// Tell the cluster what was seen.
    Report {
        /// Of which sandbox.
        id: SandboxId,
        /// Under which ownership.
        epoch: Epoch,
        /// What was seen.
        report: Report,
    },
    /// Ask the cluster to stop a sandbox that nobody used for too long.
    StopIdle(SandboxId),
    /// Forget records that ended before an instant.
    Prune {
        /// Everything that ended earlier goes.
        ended_before: Stamp,
    },
}

impl Step {
    /// The sandbox it is about.
    #[must_use]
    pub const fn sandbox(&self) -> Option<SandboxId> {
        match self {
            Self::Start(id) | Self::Stop(id) | Self::Forget(id) | Self::StopIdle(id) => Some(*id),
            Self::Report { id, .. } => Some(*id),
            Self::Prune { .. } => None,
        }
    }
}

/// What to do now, and when to look again if nothing changes until then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps, at most one per sandbox.
    pub steps: Vec<Step>,
    /// The next inactivity timeout or prune.
    pub look_again_in: Option<Duration>,
}

/// What the plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    /// This node.
    pub here: NodeId,
    /// The wall clock, for pruning only.
    pub now: Stamp,
    /// How long a record of an ended sandbox is kept.
    pub ended_retention: Duration,
    /// Whether this node is the one that prunes.
    pub prunes: bool,
}

/// Compares the records with what runs here.
#[must_use]
pub fn plan(at: Circumstances, state: &State, observed: &BTreeMap<SandboxId, Observed>) -> Plan {
    let mut plan = Plan::default();
    for sandbox in state.sandboxes_on(at.here) {
        let seen = observed.get(&sandbox.id);
        // What is here under another epoch goes first, below: one id has one driver.
        if seen.is_none_or(|seen| seen.epoch == sandbox.epoch) {
            plan.steps
                .extend(for_record(sandbox, seen, &mut plan.look_again_in));
        }
    }
    let is_ours = |known: &&Sandbox| known.owner == at.here && known.phase.holds_resources();
    for (id, seen) in observed {
        let record = state.sandbox(*id).filter(is_ours);
        if record.is_none_or(|known| known.epoch != seen.epoch) {
            plan.steps.extend(without_record(*id, seen));
        }
    }
    if at.prunes {
        plan.steps.extend(prune(at, state, &mut plan.look_again_in));
    }
    plan
}

/// The step for a sandbox that the cluster says is ours and has not ended.
fn for_record(
    record: &Sandbox,
    seen: Option<&Observed>,
    look_again_in: &mut Option<Duration>,
) -> Option<Step> {
    let id = record.id;
    let report = |report| {
        Some(Step::Report {
            id,
            epoch: record.epoch,
            report,
        })
    };
    let wanted = record.desired == Desired::Running;
    let is_bound = record.spec.on_host_loss == HostLoss::Restart;
    let Some(seen) = seen else {
        return match record.phase {
            _ if !wanted => report(Report::Stopped {
                reason: String::new(),
            }),
            Phase::Starting => Some(Step::Start(id)),
            _ if is_bound => Some(Step::Start(id)),
            _ => report(Report::Failed {
                reason: "its VMM was gone when the host's daemon looked".into(),
            }),
        };
    };
    match &seen.state {
        // It ended for want of a lease, and is still ours: it begins again with the next one.
        ObservedState::Gone(End::LeaseLost { .. }) if wanted && is_bound => Some(Step::Forget(id)),
        ObservedState::Gone(end) => report(ended_report(end)),
        ObservedState::Releasing => None,
        _ if !wanted => Some(Step::Stop(id)),
        ObservedState::Starting => None,
        ObservedState::Ready(versions) if record.phase == Phase::Starting => {
            report(Report::Running(versions.clone()))
        }
        ObservedState::Ready(_) => idle(record, seen, look_again_in),
    }
}

/// A stop for idleness, or the wait until one.
fn idle(record: &Sandbox, seen: &Observed, look_again_in: &mut Option<Duration>) -> Option<Step> {
    let timeout = record.spec.idle_timeout?;
    match timeout.checked_sub(seen.idle_for) {
        None | Some(Duration::ZERO) => Some(Step::StopIdle(record.id)),
        Some(left) => {
            sooner(look_again_in, left);
            None
        }
    }
}

/// The step for something that runs here although the cluster does not say so.
fn without_record(id: SandboxId, seen: &Observed) -> Option<Step> {
    match seen.state {
        ObservedState::Gone(_) => Some(Step::Forget(id)),
        ObservedState::Releasing => None,
        ObservedState::Starting | ObservedState::Ready(_) => Some(Step::Stop(id)),
    }
}

/// One prune for all records that are old enough, or the wait until the oldest is.
fn prune(at: Circumstances, state: &State, look_again_in: &mut Option<Duration>) -> Option<Step> {
    let (oldest, _) = state.ended_sandboxes().next()?;
    let retention_ms = u64::try_from(at.ended_retention.as_millis()).unwrap_or(u64::MAX);
    let ended_before = Stamp(at.now.0.saturating_sub(retention_ms));
    if oldest < ended_before {
        return Some(Step::Prune { ended_before });
    }
    // One millisecond more, since a record goes only when it is strictly older.
    sooner(
        look_again_in,
        oldest.since(ended_before) + Duration::from_millis(1),
    );
    None
}

fn sooner(look_again_in: &mut Option<Duration>, wait: Duration) {
    *look_again_in = Some(look_again_in.map_or(wait, |known| known.min(wait)));
}

fn ended_report(end: &End) -> Report {
    let bounded = |reason: &str| reason.chars().take(REASON_CHARS).collect();
    match end {
        End::Stopped { reason } => Report::Stopped {
            reason: bounded(reason),
        },
        End::Failed { reason } | End::LeaseLost { reason } => Report::Failed {
            reason: bounded(reason),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::ids::{NodeKey, TeamId};
    use proto::units::Mib;
    use raft::command::{Command, Proposal, StopCause};
    use raft::state::{GuestVersions, Node, Resources, SandboxSpec, Template};

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
        state_of(HostLoss::Wait, commands)
    }

    /// The same, with an `ID` that is bound to its node's lease.
    fn bound_after(commands: impl IntoIterator<Item = Command>) -> State {
        state_of(HostLoss::Restart, commands)
    }

    fn state_of(on_host_loss: HostLoss, commands: impl IntoIterator<Item = Command>) -> State {
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
                epoch,
                state,
                idle_for,
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
    fn an_idle_sandbox_is_stopped_when_its_timeout_has_passed_and_not_before() {
        let state = state_after([running()]);
        let nearly = seen_under(
            Epoch(3),
            ready(),
            IDLE.saturating_sub(Duration::from_secs(1)),
        );
        let waiting = plan(at(), &state, &nearly);
        assert_eq!(waiting.steps, []);
        assert_eq!(waiting.look_again_in, Some(Duration::from_secs(1)));
        let over = seen_under(Epoch(3), ready(), IDLE);
        assert_eq!(steps(&state, &over), [Step::StopIdle(ID)]);
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

    fn any_state() -> impl Strategy<Value = ObservedState> {
        prop_oneof![
            Just(ObservedState::Starting),
            Just(ready()),
            Just(ObservedState::Releasing),
            Just(gone()),
        ]
    }

    proptest! {
        /// A looks-again loop must come to rest: nothing is started that is here, and at most one
        /// step is planned for a sandbox.
        #[test]
        fn at_most_one_step_is_planned_for_a_sandbox_that_is_seen_under_its_epoch(
            state in any_state(), stopped: bool, ran: bool, idle in 0_u64..200,
        ) {
            let mut commands = Vec::new();
            if ran {
                commands.push(running());
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
}
