//! Desired and observed in, steps out. Pure.
//!
//! | record on this node | observed here | step |
//! |---|---|---|
//! | wanted running, `starting` | nothing | start |
//! | wanted running, `starting`, not begun | on its way up | ask whether it may begin |
//! | wanted running, `starting`, begun | on its way up, and does not know | let begin |
//! | wanted running, `starting` | ready | report running |
//! | wanted running, `running` | ready, was sealed when it had booted | tell of that |
//! | wanted running, `running` | nothing | report failed: its VMM is gone; one that is bound to the lease: start |
//! | wanted running, `running` | ready, idle nearly too long, to be paused then | have its guest give memory back |
//! | wanted running, `running` | ready, idle too long | ask for a pause, or a stop, for idleness |
//! | wanted running, `resuming` | nothing, on its way up, ready | as `starting`, from what it rests as |
//! | wanted paused, `pausing` | ready | seal |
//! | wanted paused, `pausing` | sealed | report sealed |
//! | wanted paused, `pausing` | frozen: it could not be sealed | report thawed |
//! | wanted paused, `pausing` | nothing | report failed: its VMM is gone |
//! | wanted running, `running` | frozen | thaw |
//! | wanted running, `snapshotting` | ready, sealed, frozen | as `pausing`; once the cluster knows: thaw, then report running |
//! | wanted running, `snapshotting` | nothing | report failed; one that is bound to the lease: report thawed |
//! | wanted running, `starting`, or not begun | gone, its start was cut short | forget |
//! | wanted stopped | starting or ready | stop |
//! | wanted stopped | nothing | report stopped |
//! | not ended | gone | report how it ended; one that is wanted and lost its lease: forget |
//! | ended, another epoch or owner, or no record | gone | forget |
//! | ended, another epoch or owner, or no record | anything else | stop |
//!
//! A guest executes its first instruction only once the record says, under its epoch, that it was let:
//! until then the cluster may give the sandbox to another node as soon as this one cannot be reached.
//! Everything else of a start goes on meanwhile.
//!
//! A guest that was frozen to be sealed thaws only after the cluster has taken the report that it
//! does: a seal that was reported, or may have been, may be resumed elsewhere at any moment. One that
//! is paused is like no record at all: what is left of it here is released.
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
use raft::state::{Desired, HostLoss, IdleAction, Phase, Sandbox, SnapshotKind, State};

use crate::sandbox::{End, Observed, ObservedState};

/// As much of a reason as is told to the cluster. It quotes what VMM and guest said, and a report
/// larger than the log takes would be refused for ever.
const REASON_CHARS: usize = 4096;
/// How long before a pause for idleness a guest gives back what only caches its disk. It reports
/// free pages to the host two seconds later, and some more it may be slow.
const RECLAIM_AHEAD: Duration = Duration::from_secs(6);

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start a sandbox here.
    Start(SandboxId),
    /// Let a guest execute its first instruction.
    Begin(SandboxId),
    /// End a sandbox here.
    Stop(SandboxId),
    /// Seal a sandbox here.
    Seal {
        /// Which one.
        id: SandboxId,
        /// For which pause ([`Sandbox::pause`]).
        pause: u64,
        /// What of it.
        kind: SnapshotKind,
    },
    /// Let a guest that could not be sealed go on.
    Thaw(SandboxId),
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
    /// Have a guest give memory back that a pause need not seal.
    Reclaim(SandboxId),
    /// Ask the cluster to pause, or stop, a sandbox that nobody used for too long.
    PutAway(SandboxId),
    /// Tell the cluster what a guest was sealed as when it had just booted.
    TellWarm(SandboxId),
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
            Self::Start(id)
            | Self::Begin(id)
            | Self::Stop(id)
            | Self::Thaw(id)
            | Self::Forget(id)
            | Self::Reclaim(id)
            | Self::PutAway(id)
            | Self::TellWarm(id) => Some(*id),
            Self::Report { id, .. } | Self::Seal { id, .. } => Some(*id),
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
    let wanted = record.desired != Desired::Stopped;
    let runs = record.desired == Desired::Running;
    let goes_on = runs && record.checkpoint.is_none();
    let is_bound = record.spec.on_host_loss == HostLoss::Restart;
    let Some(seen) = seen else {
        return match record.phase {
            _ if !wanted => report(Report::Stopped {
                reason: String::new(),
            }),
            Phase::Starting | Phase::Resuming => Some(Step::Start(id)),
            // First the checkpoint is over, then it begins again.
            Phase::Snapshotting if is_bound => report(Report::Thawed {
                reason: "it ended while a snapshot of it was taken".into(),
            }),
            _ if is_bound && runs => Some(Step::Start(id)),
            _ => report(Report::Failed {
                reason: "its VMM was gone when the host's daemon looked".into(),
            }),
        };
    };
    match &seen.state {
        // It ended for want of a lease, and is still ours: it begins again with the next one.
        ObservedState::Gone(End::LeaseLost { .. }) if runs && is_bound => Some(Step::Forget(id)),
        // Whoever began it told nobody, or nothing of it has run: it may begin again.
        ObservedState::Gone(End::Unfinished { .. })
            if runs && (record.phase == Phase::Starting || record.not_begun) =>
        {
            Some(Step::Forget(id))
        }
        ObservedState::Gone(end) => report(ended_report(end)),
        ObservedState::Releasing => None,
        _ if !wanted => Some(Step::Stop(id)),
        ObservedState::Starting if !seen.let_begin && record.not_begun => report(Report::Begins),
        ObservedState::Starting if !seen.let_begin => Some(Step::Begin(id)),
        ObservedState::Starting | ObservedState::Sealing => None,
        ObservedState::Ready(versions) => match record.phase {
            Phase::Starting | Phase::Resuming => report(Report::Running(versions.clone())),
            Phase::Snapshotting if record.checkpoint.is_none() => {
                report(Report::Running(versions.clone()))
            }
            Phase::Pausing | Phase::Snapshotting => Some(Step::Seal {
                id,
                pause: record.pause,
                kind: sealed_kind(record),
            }),
            _ if seen.has_warm => Some(Step::TellWarm(id)),
            _ => idle(record, seen, look_again_in),
        },
        // While it is `running` again, or is paused anew, the report that it was not sealed came
        // first.
        ObservedState::Sealed(_) if goes_on => Some(Step::Thaw(id)),
        ObservedState::Sealed(sealed) if sealed.pause != record.pause => Some(Step::Thaw(id)),
        ObservedState::Sealed(sealed) => report(Report::Sealed(sealed.clone())),
        ObservedState::Frozen { .. } if goes_on => Some(Step::Thaw(id)),
        ObservedState::Frozen { reason } => report(Report::Thawed {
            reason: bounded(reason),
        }),
    }
}

/// What of a sandbox is to be sealed: a pause keeps all of it.
fn sealed_kind(record: &Sandbox) -> SnapshotKind {
    let asked = record.checkpoint.as_ref().map(|it| it.purpose.kind());
    asked.unwrap_or_default()
}

/// A pause or a stop for idleness and what comes before it, or the wait until then.
fn idle(record: &Sandbox, seen: &Observed, look_again_in: &mut Option<Duration>) -> Option<Step> {
    let timeout = record.spec.idle_timeout?;
    let left = timeout.saturating_sub(seen.idle_for);
    if left.is_zero() {
        return Some(Step::PutAway(record.id));
    }
    let reclaims = record.spec.on_idle == IdleAction::Pause && !seen.reclaimed;
    let wait = left.saturating_sub(if reclaims {
        RECLAIM_AHEAD
    } else {
        Duration::ZERO
    });
    if wait.is_zero() {
        return Some(Step::Reclaim(record.id));
    }
    sooner(look_again_in, wait);
    None
}

/// The step for something that runs here although the cluster does not say so.
fn without_record(id: SandboxId, seen: &Observed) -> Option<Step> {
    match seen.state {
        ObservedState::Gone(_) => Some(Step::Forget(id)),
        ObservedState::Releasing => None,
        ObservedState::Starting
        | ObservedState::Ready(_)
        | ObservedState::Sealing
        | ObservedState::Sealed(_)
        | ObservedState::Frozen { .. } => Some(Step::Stop(id)),
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

fn bounded(reason: &str) -> String {
    reason.chars().take(REASON_CHARS).collect()
}

fn ended_report(end: &End) -> Report {
    match end {
        End::Stopped { reason } => Report::Stopped {
            reason: bounded(reason),
        },
        End::Failed { reason } | End::Unfinished { reason } | End::LeaseLost { reason } => {
            let reason = bounded(reason);
            Report::Failed { reason }
        }
    }
}

#[cfg(test)]
mod tests;
