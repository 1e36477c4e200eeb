//! The commands about checkpoints: snapshots that get a name, that others start from, or that are kept
//! warm.
//!
//! ```text
//! Running -> Snapshotting -> Running     the owner seals it; the report makes the name, or the forks,
//!                                        and the guest goes on
//! Paused                     Paused      what it rests as is there already: both are made at once
//! ```
//!
//! A fork is placed by the entry that makes it, beside what is reserved by then. One for which there
//! is no room begins and ends in `Error`, so that its client finds out which one and why.

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::Stamp;

use super::Applied;
use super::sandboxes::{NewSandbox, new_sandbox};
use super::snapshots::sealed_by_owner;
use crate::command::{CheckpointSandbox, DropNamed, Receipt, Refusal};
use crate::placement::LoadHint;
use crate::state::{
    Checkpoint, Desired, Named, Phase, Purpose, RowKey, Sandbox, SandboxSpec, Sealed, Snapshot,
    SnapshotKind, State, Warm,
};

/// Why a sandbox cannot be sealed again just now.
pub(super) const BEING_SEALED: &str = "a snapshot of it is being taken: try again once it is done";

impl State {
    pub(super) fn checkpoint_sandbox(
        &mut self,
        at: Stamp,
        index: u64,
        asked: CheckpointSandbox,
    ) -> Applied {
        let CheckpointSandbox {
            id,
            epoch,
            checkpoint,
            hints,
        } = asked;
        let Some(known) = self.sandbox(id).cloned() else {
            return Applied::untouched(Err(Refusal::NoSuchSandbox(id.to_string())));
        };
        if self.knows_checkpoint(known.team, id, &checkpoint) {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        if known.epoch != epoch {
            let newest = known.epoch;
            return Applied::untouched(Err(Refusal::Fenced { newest }));
        }
        if let Err(refusal) = self.may_be_made(known.team, &checkpoint.purpose) {
            return Applied::untouched(Err(refusal));
        }
        let touched = match (known.phase, known.snapshot) {
            (Phase::Running, _) => self.put_next(Sandbox {
                phase: Phase::Snapshotting,
                pause: index,
                checkpoint: Some(checkpoint),
                reason: String::new(),
                updated_at: at,
                ..known
            }),
            (Phase::Paused, Some(from)) => {
                self.carry_out(at, Epoch(index), &known, checkpoint, from, &hints)
            }
            (phase, _) => {
                return Applied::untouched(Err(Refusal::Unfit(not_now(phase).into())));
            }
        };
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    /// Whether a checkpoint of a sandbox of `team` is under way, or what it asks for is there.
    #[must_use]
    pub fn knows_checkpoint(&self, team: TeamId, id: SandboxId, checkpoint: &Checkpoint) -> bool {
        let under_way = self.sandbox(id).filter(|it| it.team == team);
        let under_way = under_way.and_then(|it| it.checkpoint.as_ref());
        let is_there = match &checkpoint.purpose {
            Purpose::Name { name, .. } => self
                .named(team, name)
                .is_some_and(|it| it.ask == checkpoint.ask),
            Purpose::Fork { ids } => ids.iter().any(|id| self.sandbox(*id).is_some()),
        };
        is_there || under_way.is_some_and(|it| it.ask == checkpoint.ask)
    }

    fn may_be_made(&self, team: TeamId, purpose: &Purpose) -> Result<(), Refusal> {
        match purpose {
            Purpose::Name {
                name, overwrite, ..
            } => {
                if self.template(name).is_some() {
                    let why = format!("the template {name:?} is the platform's");
                    return Err(Refusal::Unfit(why));
                }
                if !overwrite && self.named(team, name).is_some() {
                    return Err(Refusal::NameTaken(name.clone()));
                }
                Ok(())
            }
            // Another fork that asked for the same ids may have been sealed first.
            Purpose::Fork { ids } => match ids.iter().find(|id| self.sandbox(**id).is_some()) {
                Some(taken) => Err(Refusal::IdTaken(taken.to_string())),
                None => Ok(()),
            },
        }
    }

    /// Takes over what the owner sealed for a checkpoint; the guest goes on. `None` where it is no
    /// news, or nobody waits for it any more.
    pub(super) fn seal_checkpoint(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        known: Sandbox,
        sealed: Sealed,
    ) -> Option<Vec<RowKey>> {
        let id = sealed.id;
        if known.pause != sealed.pause || self.snapshot(id).is_some() {
            return None;
        }
        let checkpoint = known.checkpoint.clone()?;
        if sealed.kind == SnapshotKind::Base && checkpoint.purpose.kind() != SnapshotKind::Base {
            // What nobody could go on from is not what was asked for; the sealer is not believed.
            return None;
        }
        let mut touched = vec![RowKey::Snapshot(id)];
        // Somebody else may have taken the name since it was asked for.
        let fits = self.may_be_made(known.team, &checkpoint.purpose);
        let reason = fits.err().map(|why| why.to_string()).unwrap_or_default();
        let is_made = reason.is_empty();
        // It is running again once its owner says that its guest goes on.
        touched.extend(self.put_next(Sandbox {
            checkpoint: None,
            reason,
            updated_at: at,
            ..known.clone()
        }));
        if is_made {
            self.put_snapshot(sealed_by_owner(at, &known, sealed));
            touched.extend(self.carry_out(at, epoch, &known, checkpoint, id, &[]));
        }
        Some(touched)
    }

    /// Makes what a checkpoint is for, of a snapshot that is on record.
    fn carry_out(
        &mut self,
        at: Stamp,
        epoch: Epoch,
        known: &Sandbox,
        checkpoint: Checkpoint,
        from: SnapshotId,
        hints: &[LoadHint],
    ) -> Vec<RowKey> {
        let mut touched = match checkpoint.purpose {
            Purpose::Name { name, metadata, .. } => {
                let named = Named {
                    metadata,
                    ask: checkpoint.ask,
                    ..self.name_for(at, known, name, from)
                };
                self.give_name(named)
            }
            Purpose::Fork { ids } => {
                let mut touched = Vec::new();
                for id in ids {
                    touched.push(RowKey::Sandbox(id));
                    let fork = self.fork(at, epoch, known, (id, from), hints);
                    self.put_sandbox(fork);
                }
                touched
            }
        };
        // Of forks none may have found room.
        touched.extend(self.forget_snapshots([from]));
        touched
    }

    fn name_for(&self, at: Stamp, known: &Sandbox, name: String, from: SnapshotId) -> Named {
        let sealed = self.snapshot(from).map(|it| &it.sealed);
        Named {
            team: known.team,
            name,
            snapshot: from,
            // What it is, whatever was asked for.
            kind: sealed.map_or(SnapshotKind::Snapshot, |it| it.kind),
            ask: from,
            template: known.spec.template.clone(),
            vcpus: known.spec.vcpus,
            memory: known.spec.memory,
            disk: known.spec.disk,
            size_bytes: sealed.map_or(0, |it| it.memory_bytes.saturating_add(it.disk_bytes)),
            created_at: at,
            metadata: std::collections::BTreeMap::new(),
        }
    }

    fn give_name(&mut self, named: Named) -> Vec<RowKey> {
        let before = self.named(named.team, &named.name).map(|it| it.snapshot);
        let mut touched = vec![RowKey::Named(named.team, named.name.clone())];
        self.put_named(named);
        touched.extend(self.forget_snapshots(before));
        touched
    }

    /// A sandbox that starts from what `of` was sealed as, or the record of why it cannot.
    fn fork(
        &self,
        at: Stamp,
        epoch: Epoch,
        of: &Sandbox,
        (id, from): (SandboxId, SnapshotId),
        hints: &[LoadHint],
    ) -> Sandbox {
        let (team, spec) = (of.team, of.spec.clone());
        let placed = self.place_from(team, &spec, (from, None), hints);
        let fork = Sandbox {
            epoch,
            ..new_sandbox(at, NewSandbox { id, team, spec })
        };
        match placed {
            Ok(owner) => Sandbox {
                owner,
                origin: Some(from),
                not_begun: self.asks_first(owner),
                ..fork
            },
            Err(refusal) => Sandbox {
                owner: of.owner,
                desired: Desired::Stopped,
                phase: Phase::Error,
                reason: refusal.to_string(),
                ..fork
            },
        }
    }

    pub(super) fn drop_name(&mut self, which: &DropNamed) -> Applied {
        let DropNamed {
            team,
            name,
            snapshot,
        } = which;
        let named = self.named(*team, name);
        if named.is_none_or(|it| it.snapshot != *snapshot) {
            return Applied::untouched(Ok(Receipt::Done(0)));
        }
        self.drop_named(*team, name);
        let mut touched = vec![RowKey::Named(*team, name.clone())];
        touched.extend(self.forget_snapshots([*snapshot]));
        Applied {
            answer: Ok(Receipt::Done(1)),
            touched,
        }
    }

    pub(super) fn put_warm(&mut self, at: Stamp, mut snapshot: Snapshot) -> Applied {
        let id = snapshot.sealed.id;
        if let Some(known) = self.snapshot(id) {
            let same = known.sealed == snapshot.sealed;
            let taken = Refusal::IdTaken(id.to_string());
            return Applied::untouched(if same {
                Ok(Receipt::Done(0))
            } else {
                Err(taken)
            });
        }
        snapshot.sealed_at = at;
        if let Err(why) = self.may_keep_warm(&snapshot) {
            return Applied::untouched(Err(Refusal::Unfit(why.into())));
        }
        self.put_snapshot(snapshot);
        Applied::touched(Receipt::Done(1), RowKey::Snapshot(id))
    }

    /// Each is made once, by a node that may start others from it and has it.
    fn may_keep_warm(&self, snapshot: &Snapshot) -> Result<(), &'static str> {
        let needs = &snapshot.sealed.needs;
        let Some(maker) = self.node(snapshot.sealed_by) else {
            return Err("its maker is no node of the cluster");
        };
        if snapshot.holders.iter().ne([&maker.id]) || snapshot.team != TeamId::default() {
            return Err("it is not its maker's to give");
        }
        if snapshot.sealed.kind == SnapshotKind::Base || !snapshot.is_warm_for(maker) {
            return Err("its maker could not start anything from it");
        }
        if !self.templates().any(|it| it.digest == needs.base) {
            return Err("its template has changed meanwhile");
        }
        let is_same = |it: &&Snapshot| {
            &it.sealed.needs == needs && it.warm == snapshot.warm && !it.holders.is_empty()
        };
        match self.warm().find(is_same) {
            Some(_) => Err("another host has made one already"),
            None => Ok(()),
        }
    }

    /// What the sandbox `id` may start from on `owner` instead of booting. Nothing starts from itself, as
    /// it was when its id was used before.
    pub(super) fn warm_for(
        &self,
        id: SandboxId,
        owner: NodeId,
        spec: &SandboxSpec,
    ) -> Option<SnapshotId> {
        let node = self.node(owner)?;
        let base = self.template(&spec.template)?.digest;
        let fits = |it: &&Snapshot| {
            it.sealed.needs.base == base && it.warm.as_ref().is_some_and(|warm| warm.fits(spec))
        };
        let alive = |id: &NodeId| self.node(*id).is_some_and(|it| it.liveness.is_alive());
        self.warm()
            .filter(fits)
            .filter(|it| it.is_warm_for(node) && it.holders.iter().any(alive))
            .filter(|it| it.sandbox != id)
            .min_by_key(|it| (!it.holders.contains(&owner), it.sealed.id))
            .map(|it| it.sealed.id)
    }

    /// Keeps nothing warm from which nobody starts any more: its template is another, or no node that
    /// could is left, or nobody has it.
    pub(super) fn retire_warm(&mut self) -> Vec<RowKey> {
        let is_of_use = |it: &Snapshot| {
            let base = &it.sealed.needs.base;
            self.templates().any(|template| template.digest == *base)
                && self.nodes().any(|node| it.is_warm_for(node))
                && !it.holders.is_empty()
        };
        let over = self.warm().filter(|it| !is_of_use(it)).cloned();
        let over: Vec<Snapshot> = over.collect();
        over.into_iter().map(|it| self.retire(it)).collect()
    }

    /// A node could not start anything from it.
    pub(super) fn give_up_warm(&mut self, id: SnapshotId) -> Applied {
        let is_kept = |it: &&Snapshot| it.warm.as_ref().is_some_and(|warm| !warm.retired);
        let Some(known) = self.snapshot(id).filter(is_kept).cloned() else {
            return Applied::untouched(Ok(Receipt::Done(0)));
        };
        Applied::touched(Receipt::Done(1), self.retire(known))
    }

    fn retire(&mut self, snapshot: Snapshot) -> RowKey {
        let id = snapshot.sealed.id;
        let warm = snapshot.warm.clone();
        let warm = warm.map(|warm| Warm {
            retired: true,
            ..warm
        });
        self.put_snapshot(Snapshot { warm, ..snapshot });
        self.forget_snapshots([id]);
        RowKey::Snapshot(id)
    }
}

const fn not_now(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting | Phase::Resuming => "it does not run yet: try again once it does",
        Phase::Pausing => "it is being paused: try again once it is",
        Phase::Snapshotting => BEING_SEALED,
        Phase::Running | Phase::Paused => "it rests on nothing",
        Phase::Stopping | Phase::Stopped | Phase::Error => "it is stopped for good",
    }
}
