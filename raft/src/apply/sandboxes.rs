//! The commands about sandboxes.

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, TeamId};
use proto::units::Stamp;

use super::Applied;
use crate::command::{Receipt, Refusal, Report, StopCause};
use crate::placement::{self, LoadHint};
use crate::state::{
    Desired, GuestVersions, HostLoss, Liveness, Phase, RowKey, Sandbox, SandboxSpec, State,
};

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
        let owner = match placement::place(self, team, &spec, hints) {
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
        });
        Applied::touched(Receipt::Placed { node: owner, epoch }, RowKey::Sandbox(id))
    }

    pub(super) fn stop_sandbox(&mut self, at: Stamp, id: SandboxId, cause: StopCause) -> Applied {
        let Some(known) = self.sandbox(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if known.desired == Desired::Stopped || !known.phase.holds_resources() {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let reason = match cause {
            StopCause::Asked => String::new(),
            StopCause::Idle => "inactivity timeout passed".into(),
        };
        // Its guest was killed with the lease: nobody is left who would report the end.
        let phase = if self.guest_is_dead(known) {
            Phase::Stopped
        } else {
            Phase::Stopping
        };
        self.put_sandbox(Sandbox {
            desired: Desired::Stopped,
            phase,
            reason,
            updated_at: at,
            ..known.clone()
        });
        Applied::touched(Receipt::Done(1), RowKey::Sandbox(id))
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
        let held = self
            .sandboxes()
            .filter(|sandbox| sandbox.owner == node && sandbox.phase.holds_resources())
            .cloned()
            .collect::<Vec<_>>();
        let mut touched = Vec::new();
        for sandbox in held {
            let dead = self.guest_is_dead(&sandbox);
            if dead || all {
                touched.push(RowKey::Sandbox(sandbox.id));
                self.settle(at, epoch, sandbox, dead, why);
            }
        }
        touched
    }

    fn settle(&mut self, at: Stamp, epoch: Epoch, sandbox: Sandbox, dead: bool, why: &str) {
        let (id, wanted) = (sandbox.id, sandbox.desired == Desired::Running);
        // Off its node first: its own reservation must not stand in its way.
        self.drop_sandbox(id);
        let mut next = Sandbox {
            updated_at: at,
            ..sandbox
        };
        let place = (dead && wanted).then(|| placement::place(self, next.team, &next.spec, &[]));
        match place {
            Some(Ok(owner)) => {
                next.owner = owner;
                next.epoch = epoch;
                next.phase = Phase::Starting;
                next.started_at = None;
                next.versions = GuestVersions::default();
            }
            Some(Err(lack)) => {
                next.desired = Desired::Stopped;
                next.phase = Phase::Error;
                next.reason = format!("{why}; it could not be started elsewhere: {lack}");
            }
            None => {
                let phase = if wanted { Phase::Error } else { Phase::Stopped };
                next.desired = Desired::Stopped;
                next.phase = phase;
                if next.reason.is_empty() && wanted {
                    next.reason = why.to_owned();
                }
            }
        }
        self.put_sandbox(next);
    }

    pub(super) fn report_sandbox(
        &mut self,
        at: Stamp,
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
        let Some(next) = after_report(at, known, report) else {
            return Applied::untouched(Ok(Receipt::Done(0)));
        };
        self.put_sandbox(next);
        Applied::touched(Receipt::Done(1), RowKey::Sandbox(id))
    }

    pub(super) fn prune_sandboxes(&mut self, ended_before: Stamp) -> Applied {
        let gone: Vec<SandboxId> = self
            .sandboxes()
            .filter(|sandbox| !sandbox.phase.holds_resources())
            .filter(|sandbox| sandbox.updated_at < ended_before)
            .map(|sandbox| sandbox.id)
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
    let ended = |phase, reason: String| {
        // The first reason explains more than a later one: an idle stop stays an idle stop.
        let reason = if known.reason.is_empty() {
            reason
        } else {
            known.reason.clone()
        };
        let desired = Desired::Stopped;
        Some(Sandbox {
            desired,
            phase,
            reason,
            updated_at: at,
            ..known.clone()
        })
    };
    match (known.phase, report) {
        (Phase::Stopped | Phase::Error, _) => None,
        (Phase::Stopping, Report::Running(_)) => None,
        (Phase::Running, Report::Running(versions)) if versions == known.versions => None,
        (Phase::Starting | Phase::Running, Report::Running(versions)) => Some(Sandbox {
            phase: Phase::Running,
            started_at: known.started_at.or(Some(at)),
            updated_at: at,
            versions,
            ..known.clone()
        }),
        (_, Report::Stopped { reason }) => ended(Phase::Stopped, reason),
        (Phase::Stopping, Report::Failed { reason }) => ended(Phase::Stopped, reason),
        (_, Report::Failed { reason }) => ended(Phase::Error, reason),
    }
}
