//! Desired and observed in, steps out. Pure.
//!
//! | record on this node | observed here | step |
//! |---|---|---|
//! | wanted running, `starting` | nothing | start |
//! | wanted running, `starting` | ready | report running |
//! | wanted running, `running` | nothing | report failed: its VMM is gone |
//! | wanted running, `running` | ready, idle too long | stop for idleness |
//! | wanted stopped | starting or ready | stop |
//! | wanted stopped | nothing | report stopped |
//! | not ended | gone | report how it ended |
//! | ended, another epoch or owner, or no record | gone | forget |
//! | ended, another epoch or owner, or no record | anything else | stop |

use std::collections::BTreeMap;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use raft::command::Report;
use raft::state::{Desired, Phase, Sandbox, State};

use crate::sandbox::{End, Observed, ObservedState};

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
    for sandbox in state.sandboxes().filter(|sandbox| sandbox.owner == at.here) {
        let seen = observed
            .get(&sandbox.id)
            .filter(|seen| seen.epoch == sandbox.epoch);
        plan.steps
            .extend(for_record(sandbox, seen, &mut plan.look_again_in));
    }
    for (id, seen) in observed {
        let record = state.sandbox(*id).filter(|known| known.owner == at.here);
        if record.is_none_or(|known| known.epoch != seen.epoch) {
            plan.steps.extend(without_record(*id, seen));
        }
    }
    if at.prunes {
        plan.steps.extend(prune(at, state, &mut plan.look_again_in));
    }
    plan
}

/// The step for a sandbox that the cluster says is ours.
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
    let Some(seen) = seen else {
        return match (record.desired, record.phase) {
            (_, Phase::Stopped | Phase::Error) => None,
            (Desired::Stopped, _) => report(Report::Stopped {
                reason: String::new(),
            }),
            (Desired::Running, Phase::Starting) => Some(Step::Start(id)),
            (Desired::Running, Phase::Running | Phase::Stopping) => report(Report::Failed {
                reason: "its VMM was gone when the host's daemon looked".into(),
            }),
        };
    };
    let ended = !record.phase.holds_resources();
    match &seen.state {
        ObservedState::Gone(_) if ended => Some(Step::Forget(id)),
        ObservedState::Gone(end) => report(ended_report(end)),
        ObservedState::Releasing => None,
        _ if ended || record.desired == Desired::Stopped => Some(Step::Stop(id)),
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
    let ended = state
        .sandboxes()
        .filter(|sandbox| !sandbox.phase.holds_resources());
    let oldest = ended.map(|sandbox| sandbox.updated_at).min()?;
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
    match end.clone() {
        End::Stopped { reason } => Report::Stopped { reason },
        End::Failed { reason } => Report::Failed { reason },
    }
}
