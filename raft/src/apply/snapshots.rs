//! The commands about pausing, resuming and who holds what.
//!
//! Each names the run or the snapshot that it means, so that one whose answer was lost can be
//! proposed again: by then somebody may have resumed the sandbox, or paused it anew.

use std::collections::BTreeSet;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::Stamp;

use super::Applied;
use super::named::BEING_SEALED;
use crate::command::{Receipt, Refusal, StopCause};
use crate::placement::{self, Lack, LoadHint, Source};
use crate::state::{
    Desired, GuestVersions, Needs, Phase, RowKey, Sandbox, SandboxSpec, Sealed, Snapshot,
    SnapshotKind, State,
};

/// Hosts that a resume is tried on, one after the other, unless its client named one: what is the matter
/// with one is rarely so with the next, and what three cannot do is the snapshot's own fault.
const RESUME_HOSTS: usize = 3;

impl State {
    pub(super) fn pause_sandbox(
        &mut self,
        at: Stamp,
        index: u64,
        (id, epoch): (SandboxId, Epoch),
        (cause, then_on): (StopCause, Option<NodeId>),
    ) -> Applied {
        let Some(known) = self.sandbox(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if known.epoch != epoch {
            let newest = known.epoch;
            return Applied::untouched(Err(Refusal::Fenced { newest }));
        }
        let not_now = match known.phase {
            Phase::Running => None,
            Phase::Pausing | Phase::Paused => return Applied::untouched(Ok(Receipt::Done(0))),
            Phase::Starting | Phase::Resuming => {
                Some("it does not run yet: try again once it does")
            }
            Phase::Snapshotting => Some(BEING_SEALED),
            Phase::Stopping | Phase::Stopped | Phase::Error => Some("it is stopped for good"),
        };
        if let Some(why) = not_now {
            return Applied::untouched(Err(Refusal::Unfit(why.into())));
        }
        if let Some(to) = then_on
            && let Err(refusal) = self.could_go_on(known, to)
        {
            return Applied::untouched(Err(refusal));
        }
        self.put_sandbox(Sandbox {
            desired: Desired::Paused,
            phase: Phase::Pausing,
            pause: index,
            bound_for: then_on,
            reason: cause.in_words().to_owned(),
            updated_at: at,
            ..known.clone()
        });
        Applied::touched(Receipt::Done(1), RowKey::Sandbox(id))
    }

    pub(super) fn resume_sandbox(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        id: SandboxId,
        (from, to): (SnapshotId, Option<NodeId>),
        hints: &[LoadHint],
    ) -> Applied {
        let Some(known) = self.sandbox(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        let not_now = match known.phase {
            Phase::Paused if known.snapshot == Some(from) => None,
            Phase::Paused => Some("it was paused anew meanwhile: look again"),
            Phase::Pausing => Some("it is being paused: try again once it is"),
            Phase::Starting | Phase::Running | Phase::Resuming | Phase::Snapshotting => {
                let placed = Receipt::Placed {
                    node: known.owner,
                    epoch: known.epoch,
                };
                return Applied::untouched(Ok(placed));
            }
            Phase::Stopping | Phase::Stopped | Phase::Error => Some("it is stopped for good"),
        };
        if let Some(why) = not_now {
            return Applied::untouched(Err(Refusal::Unfit(why.into())));
        }
        let placed = self.place_from(known.team, &known.spec, (from, to), hints);
        let owner = match placed {
            Ok(owner) => owner,
            Err(refusal) => return Applied::untouched(Err(refusal)),
        };
        let placed = (owner, self.asks_first(owner));
        self.put_sandbox(Sandbox {
            host_named: to.is_some(),
            ..resumed(at, epoch, placed, known.clone())
        });
        Applied::touched(Receipt::Placed { node: owner, epoch }, RowKey::Sandbox(id))
    }

    /// A resume failed: another host may manage, or else it rests as before. Whoever says so has ended
    /// what there was of it, and a workload is frozen until its guest is reported running.
    pub(super) fn resume_elsewhere(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        known: Sandbox,
        why: &str,
    ) -> Vec<RowKey> {
        let host = self.node(known.owner).map(|it| it.name.as_str());
        let why = format!("on {}: {why}", host.unwrap_or("a host that was removed"));
        let reason = match known.reason.as_str() {
            "" => why,
            before => format!("{before}; {why}"),
        };
        let mut failed_on = known.failed_on.clone();
        failed_on.insert(known.owner);
        let paused = Sandbox {
            desired: Desired::Paused,
            phase: Phase::Paused,
            reason: reason.clone(),
            updated_at: at,
            failed_on: BTreeSet::new(),
            ..known
        };
        // Off its node first: its own reservation must not stand in its way.
        let touched = self.put_next(paused.clone());
        let placed = match paused.snapshot {
            Some(from) if !paused.host_named && failed_on.len() < RESUME_HOSTS => {
                let spec = &paused.spec;
                self.place_besides(paused.team, spec, (from, None), &[], &failed_on)
            }
            _ => return touched,
        };
        if let Ok(owner) = placed {
            let placed = (owner, self.asks_first(owner));
            self.put_sandbox(Sandbox {
                failed_on,
                reason,
                ..resumed(at, epoch, placed, paused)
            });
        }
        touched
    }

    /// Where a sandbox can go on, or start as another one, from a snapshot.
    pub(super) fn place_from(
        &self,
        team: TeamId,
        spec: &SandboxSpec,
        (from, to): (SnapshotId, Option<NodeId>),
        hints: &[LoadHint],
    ) -> Result<NodeId, Refusal> {
        self.place_besides(team, spec, (from, to), hints, &BTreeSet::new())
    }

    /// The same, but not where it failed.
    fn place_besides(
        &self,
        team: TeamId,
        spec: &SandboxSpec,
        (from, to): (SnapshotId, Option<NodeId>),
        hints: &[LoadHint],
        failed_on: &BTreeSet<NodeId>,
    ) -> Result<NodeId, Refusal> {
        let snapshot = self
            .snapshot(from)
            .ok_or_else(|| Refusal::NoSuchSnapshot(from.to_string()))?;
        let holders = snapshot.holders.iter().filter_map(|id| self.node(*id));
        if !holders.clone().any(|node| node.liveness.is_alive()) {
            let names: Vec<&str> = holders.map(|node| node.name.as_str()).collect();
            let why = if names.is_empty() {
                "no host holds its snapshot any more".to_owned()
            } else {
                format!(
                    "no host that holds its snapshot is reachable: {}",
                    names.join(", ")
                )
            };
            return Err(Refusal::NoRoom(Lack(why)));
        }
        let source = Source::Snapshot {
            snapshot,
            to,
            failed_on,
        };
        placement::place(self, team, spec, source, hints).map_err(Refusal::NoRoom)
    }

    pub(super) fn hold_snapshot(&mut self, id: SnapshotId, node: NodeId, holds: bool) -> Applied {
        let Some(known) = self.snapshot(id) else {
            return Applied::untouched(Err(Refusal::NoSuchSnapshot(id.to_string())));
        };
        if self.node(node).is_none() {
            return Applied::untouched(Err(Refusal::NoSuchNode(node.to_string())));
        }
        if known.holders.contains(&node) == holds {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        let mut next = known.clone();
        if holds {
            next.holders.insert(node);
        } else {
            next.holders.remove(&node);
        }
        self.put_snapshot(next);
        let mut touched = vec![RowKey::Snapshot(id)];
        // From what nobody has nothing is started, and another is made in its place.
        touched.extend(self.retire_warm());
        touched.sort_unstable();
        touched.dedup();
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// Takes over what the owner sealed: the sandbox rests as that from now on. `None` where it is
    /// no news, or nobody waits for it any more.
    pub(super) fn seal_sandbox(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        known: &Sandbox,
        sealed: Sealed,
    ) -> Option<Vec<RowKey>> {
        if known.phase != Phase::Pausing || known.pause != sealed.pause {
            return None;
        }
        let id = sealed.id;
        if self.snapshot(id).is_some() || sealed.kind == SnapshotKind::Base {
            // An id stands for one snapshot, and nothing goes on from a disk: a sealer that gives one
            // twice, or only that, is not believed.
            return None;
        }
        self.put_snapshot(sealed_by_owner(at, known, sealed));
        let paused = Sandbox {
            phase: Phase::Paused,
            snapshot: Some(id),
            // All that its guest had from there is in what it was just sealed as.
            origin: None,
            updated_at: at,
            bound_for: None,
            ..known.clone()
        };
        // Off its node first: its own reservation must not stand in its way.
        let mut touched = self.put_next(paused.clone());
        touched.push(RowKey::Snapshot(id));
        if let Some(to) = known.bound_for {
            let moved = self.go_on((at, epoch), paused, to);
            self.put_sandbox(moved);
        }
        Some(touched)
    }

    /// A sandbox that was paused in order to move: resumed there, or else wherever it can be.
    fn go_on(&self, (at, epoch): (Stamp, Epoch), paused: Sandbox, to: NodeId) -> Sandbox {
        let Some(from) = paused.snapshot else {
            return paused;
        };
        let place = |to| {
            let owner = self.place_from(paused.team, &paused.spec, (from, to), &[])?;
            Ok::<_, Refusal>((owner, self.asks_first(owner)))
        };
        let there = place(Some(to));
        let why = match there {
            Ok(placed) => return resumed(at, epoch, placed, paused),
            Err(refusal) => format!("it could not be moved: {refusal}"),
        };
        let next = match place(None) {
            Ok(placed) => resumed(at, epoch, placed, paused),
            Err(_) => paused,
        };
        Sandbox {
            reason: why,
            ..next
        }
    }

    /// Whether a sandbox that runs could go on at `to`, as far as can be told before it is sealed: a
    /// seal shows what its node shows guests.
    fn could_go_on(&self, sandbox: &Sandbox, to: NodeId) -> Result<(), Refusal> {
        let owner = self
            .node(sandbox.owner)
            .ok_or_else(|| Refusal::NoSuchNode(sandbox.owner.to_string()))?;
        let made_from = sandbox.snapshots().find_map(|id| self.snapshot(id));
        let template = self.template(&sandbox.spec.template).map(|it| it.digest);
        let base = made_from.map(|it| it.sealed.needs.base).or(template);
        let sealed = Sealed {
            needs: Needs {
                vmm: owner.vmm.clone(),
                machine: owner.machine.clone(),
                cpu: owner.cpu.clone(),
                base: base.unwrap_or_default(),
            },
            ..Sealed::default()
        };
        let snapshot = sealed_by_owner(sandbox.updated_at, sandbox, sealed);
        let source = Source::Snapshot {
            snapshot: &snapshot,
            to: Some(to),
            failed_on: &BTreeSet::new(),
        };
        let placed = placement::place(self, sandbox.team, &sandbox.spec, source, &[]);
        placed.map(drop).map_err(Refusal::NoRoom)
    }

    /// Drops those of these records that nobody needs any more.
    pub(super) fn forget_snapshots(
        &mut self,
        ids: impl IntoIterator<Item = SnapshotId>,
    ) -> Vec<RowKey> {
        let mut touched = Vec::new();
        for id in ids {
            if self.snapshot(id).is_some() && !self.is_needed(id) {
                self.drop_snapshot(id);
                touched.push(RowKey::Snapshot(id));
            }
        }
        touched
    }

    /// A node that is no more holds nothing.
    pub(super) fn forget_holder(&mut self, node: NodeId) -> Vec<RowKey> {
        let held = self.snapshots().filter(|it| it.holders.contains(&node));
        let held: Vec<Snapshot> = held.cloned().collect();
        let mut touched = Vec::new();
        for mut snapshot in held {
            snapshot.holders.remove(&node);
            touched.push(RowKey::Snapshot(snapshot.sealed.id));
            self.put_snapshot(snapshot);
        }
        touched
    }
}

/// The record of what a sandbox's owner has sealed.
pub(super) fn sealed_by_owner(at: Stamp, known: &Sandbox, sealed: Sealed) -> Snapshot {
    Snapshot {
        sealed,
        team: known.team,
        sandbox: known.id,
        epoch: known.epoch,
        sealed_by: known.owner,
        sealed_at: at,
        holders: BTreeSet::from([known.owner]),
        warm: None,
    }
}

/// The record of a sandbox that is given out again, to go on from its snapshot: by whom, and whether
/// that node asks first.
pub(super) fn resumed(
    at: Stamp,
    epoch: Epoch,
    (owner, not_begun): (NodeId, bool),
    known: Sandbox,
) -> Sandbox {
    Sandbox {
        not_begun,
        desired: Desired::Running,
        phase: Phase::Resuming,
        reason: String::new(),
        failed_on: BTreeSet::new(),
        host_named: false,
        owner,
        epoch,
        updated_at: at,
        versions: GuestVersions::default(),
        ..known
    }
}
