//! The commands about sandboxes.

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use super::Applied;
use super::snapshots::resumed;
use crate::command::{Receipt, Refusal, Report, StopCause};
use crate::placement::{self, Lack, LoadHint, Source};
use crate::state::{
    Desired, GuestVersions, HostLoss, Liveness, Phase, RowKey, Sandbox, SandboxSpec, State,
};

/// What is said of a sandbox whose guest is lost, and which was paused before.
const AS_PAUSED: &str = "it is as it was when it was last paused";

/// A sandbox as it is asked for.
pub(super) struct NewSandbox {
    pub(super) id: SandboxId,
    pub(super) team: TeamId,
    pub(super) spec: SandboxSpec,
}

impl State {
    pub(super) fn create_sandbox(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        new: NewSandbox,
        hints: &[LoadHint],
    ) -> Applied {
        let NewSandbox { id, team, spec } = new;
        if let Some(known) = self.sandbox(id) {
            let same = known.team == team && known.spec == spec;
            let placed = Receipt::Placed {
                node: known.owner,
                epoch: known.epoch,
            };
            let taken = Refusal::IdTaken(id.to_string());
            return Applied::untouched(if same { Ok(placed) } else { Err(taken) });
        }
        if self.template(&spec.template).is_none() {
            return Applied::untouched(Err(Refusal::NoSuchTemplate(spec.template)));
        }
        let owner = match placement::place(self, team, &spec, Source::Template, hints) {
            Ok(owner) => owner,
            Err(lack) => return Applied::untouched(Err(Refusal::NoRoom(lack))),
        };
        self.put_sandbox(Sandbox {
            id,
            team,
            spec,
            desired: Desired::Running,
            phase: Phase::Starting,
            reason: String::new(),
            owner,
            epoch,
            created_at: at,
            started_at: None,
            updated_at: at,
            versions: GuestVersions::default(),
            snapshot: None,
            pause: 0,
            bound_for: None,
        });
        Applied::touched(Receipt::Placed { node: owner, epoch }, RowKey::Sandbox(id))
    }

    pub(super) fn stop_sandbox(&mut self, at: Stamp, id: SandboxId, cause: StopCause) -> Applied {
        let Some(known) = self.sandbox(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if known.desired == Desired::Stopped || known.phase.is_ended() {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let reason = cause.in_words().to_owned();
        // Its guest was killed with the lease, or there is none: nobody would report the end.
        let phase = if known.phase == Phase::Paused || self.guest_is_dead(&known) {
            Phase::Stopped
        } else {
            Phase::Stopping
        };
        let touched = self.put_next(Sandbox {
            desired: Desired::Stopped,
            phase,
            reason,
            updated_at: at,
            ..known
        });
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// Puts the next record of a sandbox. What has ended rests on nothing any more.
    fn put_next(&mut self, mut next: Sandbox) -> Vec<RowKey> {
        let mut touched = vec![RowKey::Sandbox(next.id)];
        if next.phase != Phase::Pausing {
            next.bound_for = None;
        }
        if next.phase.is_ended() {
            touched.extend(self.forget_snapshot(next.snapshot.take()));
        }
        self.put_sandbox(next);
        touched
    }

    /// Whether the guest is certainly not running, although its owner cannot be asked.
    fn guest_is_dead(&self, sandbox: &Sandbox) -> bool {
        let owner = self.node(sandbox.owner);
        let lost = owner.is_none_or(|node| matches!(node.liveness, Liveness::Lost { .. }));
        lost && sandbox.spec.on_host_loss == HostLoss::Restart
    }

    /// Decides about what a node had, now that nobody else will: bound sandboxes of a lost node
    /// are given out again, wanted or not; where `all`, the others are given up.
    pub(super) fn settle_sandboxes(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        node: NodeId,
        all: bool,
        why: &str,
    ) -> Vec<RowKey> {
        let held: Vec<Sandbox> = self.sandboxes_on(node).cloned().collect();
        let mut touched = Vec::new();
        for sandbox in held {
            let dead = self.guest_is_dead(&sandbox);
            if dead || all {
                touched.extend(self.settle(at, epoch, sandbox, dead, why));
            }
        }
        touched
    }

    fn settle(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        sandbox: Sandbox,
        dead: bool,
        why: &str,
    ) -> Vec<RowKey> {
        // Off its node first: its own reservation must not stand in its way.
        self.drop_sandbox(sandbox.id);
        let wanted = sandbox.desired;
        let known = Sandbox {
            updated_at: at,
            ..sandbox
        };
        let next = if wanted == Desired::Stopped {
            Sandbox {
                phase: Phase::Stopped,
                ..known
            }
        } else if dead && (wanted == Desired::Running || known.snapshot.is_none()) {
            match self.place_again(&known) {
                Ok(owner) if known.snapshot.is_some() => resumed(at, epoch, owner, known),
                Ok(owner) => Sandbox {
                    desired: Desired::Running,
                    owner,
                    epoch,
                    phase: Phase::Starting,
                    started_at: None,
                    versions: GuestVersions::default(),
                    ..known
                },
                Err(lack) => {
                    let why = format!("{why}; it could not be started elsewhere: {lack}");
                    self.given_up(known, why)
                }
            }
        } else {
            self.given_up(known, why.to_owned())
        };
        self.put_next(next)
    }

    /// Another node for what was lost: from what it was sealed as last, or else from its template.
    fn place_again(&self, known: &Sandbox) -> Result<NodeId, Lack> {
        let Some(from) = known.snapshot else {
            return placement::place(self, known.team, &known.spec, Source::Template, &[]);
        };
        self.place_resumed(known, from, None, &[])
            .map_err(|refusal| match refusal {
                Refusal::NoRoom(lack) => lack,
                other => Lack(other.to_string()),
            })
    }

    /// The record of a sandbox whose host is no more: it rests as it was sealed last, where anybody
    /// still has that, or has ended.
    fn given_up(&self, known: Sandbox, why: String) -> Sandbox {
        let rests_on = known.snapshot.and_then(|id| self.snapshot(id));
        // One that is away may be back; one that is removed is no holder any more.
        let is_held = rests_on.is_some_and(|it| !it.holders.is_empty());
        let (desired, phase, reason) = if is_held {
            let reason = format!("{why}; {AS_PAUSED}");
            (Desired::Paused, Phase::Paused, reason)
        } else {
            (Desired::Stopped, Phase::Error, why)
        };
        Sandbox {
            desired,
            phase,
            reason,
            ..known
        }
    }

    pub(super) fn report_sandbox(
        &mut self,
        (at, index): (Stamp, u64),
        id: SandboxId,
        epoch: Epoch,
        node: NodeId,
        report: Report,
    ) -> Applied {
        let Some(known) = self.sandbox(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if known.epoch != epoch || known.owner != node {
            return Applied::untouched(Err(Refusal::Fenced {
                newest: known.epoch,
            }));
        }
        let known = known.clone();
        let touched = match report {
            Report::Sealed(sealed) => self.seal_sandbox(at, Epoch(index), &known, sealed),
            report => after_report(at, &known, report).map(|next| self.put_next(next)),
        };
        let Some(touched) = touched else {
            return Applied::untouched(Ok(Receipt::Done(0)));
        };
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    pub(super) fn prune_sandboxes(&mut self, ended_before: Stamp) -> Applied {
        let gone: Vec<SandboxId> = self
            .ended_sandboxes()
            .take_while(|(ended_at, _)| *ended_at < ended_before)
            .map(|(_, id)| id)
            .collect();
        for id in &gone {
            self.drop_sandbox(*id);
        }
        let count = u64::try_from(gone.len()).unwrap_or(u64::MAX);
        let touched = gone.into_iter().map(RowKey::Sandbox).collect();
        Applied {
            answer: Ok(Receipt::Done(count)),
            touched,
        }
    }
}

/// The record after its owner's report, or `None` where the report says nothing new.
fn after_report(at: Stamp, known: &Sandbox, report: Report) -> Option<Sandbox> {
    let next = |desired, phase, reason| {
        Some(Sandbox {
            desired,
            phase,
            reason,
            updated_at: at,
            ..known.clone()
        })
    };
    let ended = |phase, reason: String| {
        // The first reason explains more than a later one: an idle stop stays an idle stop.
        let stopped = known.desired == Desired::Stopped && !known.reason.is_empty();
        let reason = if stopped {
            known.reason.clone()
        } else {
            reason
        };
        next(Desired::Stopped, phase, reason)
    };
    match (known.phase, report) {
        (Phase::Stopped | Phase::Error | Phase::Paused, _) => None,
        (Phase::Stopping, Report::Running(_)) => None,
        (Phase::Running, Report::Running(versions)) if versions == known.versions => None,
        // The guest of a sandbox that is being paused runs until it is frozen.
        (Phase::Pausing, Report::Running(_)) => None,
        (Phase::Starting | Phase::Running | Phase::Resuming, Report::Running(versions)) => {
            Some(Sandbox {
                phase: Phase::Running,
                started_at: known.started_at.or(Some(at)),
                updated_at: at,
                versions,
                ..known.clone()
            })
        }
        (Phase::Pausing, Report::Thawed { reason }) => {
            next(Desired::Running, Phase::Running, reason)
        }
        (_, Report::Thawed { .. } | Report::Sealed(_)) => None,
        // What it rests on is still there.
        (Phase::Resuming, Report::Failed { reason }) => {
            next(Desired::Paused, Phase::Paused, reason)
        }
        (Phase::Running | Phase::Pausing, Report::Failed { reason })
            if known.snapshot.is_some() =>
        {
            next(
                Desired::Paused,
                Phase::Paused,
                format!("{reason}; {AS_PAUSED}"),
            )
        }
        (_, Report::Stopped { reason }) => ended(Phase::Stopped, reason),
        (Phase::Stopping, Report::Failed { reason }) => ended(Phase::Stopped, reason),
        (_, Report::Failed { reason }) => ended(Phase::Error, reason),
    }
}
