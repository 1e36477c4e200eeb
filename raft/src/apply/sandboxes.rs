//! The commands about sandboxes.

use std::collections::BTreeSet;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::Stamp;

use super::Applied;
use super::snapshots::resumed;
use crate::command::{Receipt, Refusal, Report, StopCause};
use crate::placement::{self, Lack, LoadHint, Source};
use crate::state::{
    Desired, GuestVersions, HostLoss, Liveness, Phase, RowKey, Sandbox, SandboxSpec, State,
};

/// What is said of a sandbox whose guest is lost, and which was paused before.
const AS_PAUSED: &str = "it is as it was when it was last paused, and what it did since is lost";

/// Whose report something is.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    /// Of which sandbox.
    pub(super) id: SandboxId,
    /// Under which ownership it was seen.
    pub(super) epoch: Epoch,
    /// Who saw it.
    pub(super) node: NodeId,
}

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
            // What may be changed later says nothing about what was asked for, and neither does by
            // which name: a release before this one did not keep that.
            let asked = SandboxSpec {
                ports_open: known.spec.ports_open,
                wakes: known.spec.wakes,
                asked_template: known.spec.asked_template.clone(),
                ..spec
            };
            let same = known.team == team && known.spec == asked;
            let placed = Receipt::Placed {
                node: known.owner,
                epoch: known.epoch,
            };
            let taken = Refusal::IdTaken(id.to_string());
            return Applied::untouched(if same { Ok(placed) } else { Err(taken) });
        }
        let (owner, origin) = match self.place_new(id, (team, &spec), hints) {
            Ok(placed) => placed,
            Err(refusal) => return Applied::untouched(Err(refusal)),
        };
        self.put_sandbox(Sandbox {
            owner,
            epoch,
            origin,
            not_begun: self.asks_first(owner),
            ..new_sandbox(at, NewSandbox { id, team, spec })
        });
        Applied::touched(Receipt::Placed { node: owner, epoch }, RowKey::Sandbox(id))
    }

    /// Where a new sandbox starts, and from which snapshot, if any: that of its name, or one of a
    /// guest that had just booted.
    fn place_new(
        &self,
        id: SandboxId,
        (team, spec): (TeamId, &SandboxSpec),
        hints: &[LoadHint],
    ) -> Result<(NodeId, Option<SnapshotId>), Refusal> {
        if let Some(named) = self.named(team, &spec.template) {
            if !named.fits(spec) {
                let why = format!(
                    "{:?} stands for another snapshot now: try again",
                    named.name
                );
                return Err(Refusal::Unfit(why));
            }
            let owner = self.place_from(team, spec, (named.snapshot, spec.on_node), hints)?;
            return Ok((owner, Some(named.snapshot)));
        }
        if self.template(&spec.template).is_none() {
            return Err(Refusal::NoSuchTemplate(spec.template.clone()));
        }
        let owner =
            placement::place(self, team, spec, Source::Template, hints).map_err(Refusal::NoRoom)?;
        Ok((owner, self.warm_for(id, owner, spec)))
    }

    pub(super) fn change_sandbox(
        &mut self,
        at: Stamp,
        id: SandboxId,
        ports_open: Option<bool>,
        wakes: Option<bool>,
    ) -> Applied {
        let Some(known) = self.sandbox(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        let spec = SandboxSpec {
            ports_open: ports_open.unwrap_or(known.spec.ports_open),
            wakes: wakes.unwrap_or(known.spec.wakes),
            ..known.spec.clone()
        };
        if spec == known.spec || known.phase.is_ended() {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let touched = self.put_next(Sandbox {
            spec,
            updated_at: at,
            ..known
        });
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// A link changes nothing here: the record of it is all there is.
    pub(super) fn link_sandbox(&self, id: SandboxId) -> Applied {
        let known = self.sandbox(id);
        let answer = known.map(|_| Receipt::Done(1));
        Applied::untouched(answer.ok_or_else(|| Refusal::NoSuchSandbox(id.to_string())))
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

    /// Puts the next record of a sandbox, and drops what nobody needs any more. What has ended rests on
    /// nothing.
    pub(super) fn put_next(&mut self, mut next: Sandbox) -> Vec<RowKey> {
        let mut touched = vec![RowKey::Sandbox(next.id)];
        let known = self.sandbox(next.id);
        let needed = known.into_iter().flat_map(Sandbox::snapshots);
        let needed: Vec<SnapshotId> = needed.chain(next.snapshots()).collect();
        if next.phase != Phase::Pausing {
            next.bound_for = None;
        }
        if next.phase.is_ended() {
            (next.snapshot, next.origin) = (None, None);
        }
        if next.phase != Phase::Snapshotting {
            next.checkpoint = None;
        }
        next.not_begun &= matches!(next.phase, Phase::Starting | Phase::Resuming);
        self.put_sandbox(next);
        touched.extend(self.forget_snapshots(needed));
        touched
    }

    /// Whether the guest is certainly not running, although its owner cannot be asked.
    fn guest_is_dead(&self, sandbox: &Sandbox) -> bool {
        let owner = self.node(sandbox.owner);
        let away = owner.is_none_or(|node| !node.liveness.is_alive());
        self.guest_was_killed(sandbox) || away && sandbox.not_begun
    }

    /// Whether the guest was killed because its owner has lost its lease.
    fn guest_was_killed(&self, sandbox: &Sandbox) -> bool {
        let owner = self.node(sandbox.owner);
        let lost = owner.is_none_or(|node| matches!(node.liveness, Liveness::Lost { .. }));
        lost && sandbox.spec.on_host_loss == HostLoss::Restart
    }

    /// Whether a guest on this node begins only once its owner was let.
    pub(super) fn asks_first(&self, owner: NodeId) -> bool {
        self.node(owner).is_some_and(|node| node.asks_first)
    }

    /// Gives those out again that a node which cannot be reached never began. Whoever nobody can take
    /// stays: the node may be back.
    pub(super) fn place_those_not_begun(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        node: NodeId,
    ) -> Vec<RowKey> {
        let held = self.sandboxes_on(node);
        let waits = |it: &&Sandbox| it.not_begun && it.desired == Desired::Running;
        let waits: Vec<Sandbox> = held.filter(waits).cloned().collect();
        let mut touched = Vec::new();
        for known in waits {
            // Its own reservation is on a node that nothing is placed on now.
            if let Ok((owner, origin)) = self.place_again(&known) {
                let next = Sandbox {
                    updated_at: at,
                    ..self.given_out_again(at, epoch, (owner, origin), known)
                };
                touched.extend(self.put_next(next));
            }
        }
        touched
    }

    /// The record of a sandbox that begins anew on another node: from what it was sealed as last, or
    /// else from its origin or template.
    fn given_out_again(
        &self,
        at: Stamp,
        epoch: Epoch,
        (owner, origin): (NodeId, Option<SnapshotId>),
        known: Sandbox,
    ) -> Sandbox {
        let not_begun = self.asks_first(owner);
        if known.snapshot.is_some() {
            return resumed(at, epoch, (owner, not_begun), known);
        }
        Sandbox {
            desired: Desired::Running,
            owner,
            epoch,
            phase: Phase::Starting,
            started_at: None,
            versions: GuestVersions::default(),
            origin,
            not_begun,
            ..known
        }
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
            if all || self.guest_was_killed(&sandbox) {
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
        let needed: Vec<SnapshotId> = sandbox.snapshots().collect();
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
                Ok(placed) => self.given_out_again(at, epoch, placed, known),
                Err(lack) => {
                    let why = format!("{why}; it could not be started elsewhere: {lack}");
                    self.given_up(known, why)
                }
            }
        } else {
            self.given_up(known, why.to_owned())
        };
        let mut touched = self.put_next(next);
        touched.extend(self.forget_snapshots(needed));
        touched
    }

    /// Another node for what was lost, and what it is made from there: from what it was sealed as last,
    /// or else anew, from its origin where that is more than a quicker boot.
    fn place_again(&self, known: &Sandbox) -> Result<(NodeId, Option<SnapshotId>), Lack> {
        let (team, spec) = (known.team, &known.spec);
        let is_warm = |id| self.snapshot(id).is_some_and(|it| it.warm.is_some());
        let origin = known.origin.filter(|id| !is_warm(*id));
        let placed = match (known.snapshot, origin) {
            (Some(from), _) => self.place_from(team, spec, (from, None), &[]),
            (None, Some(from)) => self.place_from(team, spec, (from, spec.on_node), &[]),
            (None, None) => {
                let owner = placement::place(self, team, spec, Source::Template, &[])?;
                return Ok((owner, self.warm_for(known.id, owner, spec)));
            }
        };
        placed
            .map(|owner| (owner, origin))
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
        at: Stamp,
        index: u64,
        seen: Seen,
        report: Report,
    ) -> Applied {
        let Seen { id, epoch, node } = seen;
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
            Report::Begins => return self.begin_sandbox(at, known),
            Report::Sealed(sealed) if known.phase == Phase::Snapshotting => {
                self.seal_checkpoint(at, Epoch(index), known, sealed)
            }
            Report::Sealed(sealed) => self.seal_sandbox(at, Epoch(index), &known, sealed),
            Report::Failed { reason } if known.phase == Phase::Resuming => {
                Some(self.resume_elsewhere(at, Epoch(index), known, &reason))
            }
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

    /// Lets a guest begin, once and for all under this epoch.
    fn begin_sandbox(&mut self, at: Stamp, known: Sandbox) -> Applied {
        let starts = matches!(known.phase, Phase::Starting | Phase::Resuming);
        if !starts || known.desired != Desired::Running {
            let why = "nothing of it is to begin here any more".into();
            return Applied::untouched(Err(Refusal::Unfit(why)));
        }
        if !known.not_begun {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let id = known.id;
        self.put_sandbox(Sandbox {
            not_begun: false,
            updated_at: at,
            ..known
        });
        Applied::touched(Receipt::Done(1), RowKey::Sandbox(id))
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

/// The record of a sandbox that begins its life, but for who runs it.
pub(super) fn new_sandbox(at: Stamp, new: NewSandbox) -> Sandbox {
    let NewSandbox { id, team, spec } = new;
    Sandbox {
        id,
        team,
        spec,
        desired: Desired::Running,
        phase: Phase::Starting,
        reason: String::new(),
        owner: NodeId::default(),
        epoch: Epoch::default(),
        created_at: at,
        started_at: None,
        updated_at: at,
        versions: GuestVersions::default(),
        snapshot: None,
        pause: 0,
        bound_for: None,
        origin: None,
        checkpoint: None,
        not_begun: false,
        failed_on: BTreeSet::new(),
        host_named: false,
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
        (Phase::Stopped | Phase::Error | Phase::Paused, _) | (_, Report::Begins) => None,
        (Phase::Stopping, Report::Running(_)) => None,
        (Phase::Running, Report::Running(versions)) if versions == known.versions => None,
        // The guest of a sandbox that is being paused runs until it is frozen.
        (Phase::Pausing, Report::Running(_)) => None,
        (Phase::Snapshotting, Report::Running(_)) if known.checkpoint.is_some() => None,
        (
            Phase::Starting | Phase::Running | Phase::Resuming | Phase::Snapshotting,
            Report::Running(versions),
        ) => Some(Sandbox {
            phase: Phase::Running,
            started_at: known.started_at.or(Some(at)),
            updated_at: at,
            versions,
            not_begun: false,
            ..known.clone()
        }),
        (Phase::Pausing | Phase::Snapshotting, Report::Thawed { reason }) => {
            next(Desired::Running, Phase::Running, reason)
        }
        (_, Report::Thawed { .. } | Report::Sealed(_)) => None,
        (Phase::Running | Phase::Pausing | Phase::Snapshotting, Report::Failed { reason })
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
