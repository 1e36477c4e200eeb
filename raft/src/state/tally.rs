//! What follows from the sandboxes and names and is never stored: who holds how much, how many need
//! a snapshot, and shorter ways to some sandboxes than through all.
//!
//! Every sandbox is in `teams`, and besides in `held` if it holds resources and in `ended` if it has
//! ended; a paused one is in neither.

use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::Stamp;
use rpds::{RedBlackTreeMapSync, RedBlackTreeSetSync};

use super::usage::TeamLoad;
use super::{Resources, Sandbox};

/// Sums and orders over the sandboxes, kept in step by whoever puts and drops them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    reserved: RedBlackTreeMapSync<NodeId, Resources>,
    held: RedBlackTreeSetSync<(NodeId, SandboxId)>,
    ended: RedBlackTreeSetSync<(Stamp, SandboxId)>,
    teams: RedBlackTreeSetSync<(TeamId, SandboxId)>,
    /// How many sandboxes and names need each snapshot.
    uses: RedBlackTreeMapSync<SnapshotId, u32>,
    /// What of each team's runs.
    loads: RedBlackTreeMapSync<TeamId, TeamLoad>,
}

/// The ends of a range over all ids.
const FIRST: SandboxId = SandboxId([0; 16]);
const LAST: SandboxId = SandboxId([u8::MAX; 16]);

impl Tally {
    pub(super) fn add(&mut self, sandbox: &Sandbox) {
        self.teams.insert_mut((sandbox.team, sandbox.id));
        if sandbox.phase.runs_guest() {
            let load = self.load_of(sandbox.team).plus(TeamLoad::of(sandbox));
            self.loads.insert_mut(sandbox.team, load);
        }
        for id in sandbox.snapshots() {
            self.use_snapshot(id);
        }
        if sandbox.phase.holds_resources() {
            let sum = self.reserved(sandbox.owner).plus(sandbox.spec.resources());
            self.reserved.insert_mut(sandbox.owner, sum);
            self.held.insert_mut((sandbox.owner, sandbox.id));
        } else if sandbox.phase.is_ended() {
            self.ended.insert_mut((sandbox.updated_at, sandbox.id));
        }
    }

    pub(super) fn remove(&mut self, sandbox: &Sandbox) {
        self.teams.remove_mut(&(sandbox.team, sandbox.id));
        if sandbox.phase.runs_guest() {
            self.less_load(sandbox);
        }
        self.ended.remove_mut(&(sandbox.updated_at, sandbox.id));
        for id in sandbox.snapshots() {
            self.let_go_of_snapshot(id);
        }
        if !sandbox.phase.holds_resources() {
            return;
        }
        self.held.remove_mut(&(sandbox.owner, sandbox.id));
        let rest = self.reserved(sandbox.owner).less(sandbox.spec.resources());
        if rest == Resources::default() {
            self.reserved.remove_mut(&sandbox.owner);
        } else {
            self.reserved.insert_mut(sandbox.owner, rest);
        }
    }

    pub(super) fn use_snapshot(&mut self, id: SnapshotId) {
        let count = self.uses.get(&id).copied().unwrap_or_default();
        self.uses.insert_mut(id, count + 1);
    }

    pub(super) fn let_go_of_snapshot(&mut self, id: SnapshotId) {
        match self.uses.get(&id).copied() {
            Some(count @ 2..) => self.uses.insert_mut(id, count - 1),
            Some(_) | None => {
                self.uses.remove_mut(&id);
            }
        }
    }

    fn less_load(&mut self, sandbox: &Sandbox) {
        let rest = self.load_of(sandbox.team).less(TeamLoad::of(sandbox));
        if rest == TeamLoad::default() {
            self.loads.remove_mut(&sandbox.team);
        } else {
            self.loads.insert_mut(sandbox.team, rest);
        }
    }

    pub(super) fn load_of(&self, team: TeamId) -> TeamLoad {
        self.loads.get(&team).copied().unwrap_or_default()
    }

    pub(super) fn is_used(&self, id: SnapshotId) -> bool {
        self.uses.contains_key(&id)
    }

    pub(super) fn reserved(&self, node: NodeId) -> Resources {
        self.reserved.get(&node).copied().unwrap_or_default()
    }

    pub(super) fn held_by(&self, node: NodeId) -> impl Iterator<Item = SandboxId> {
        self.held
            .range((node, FIRST)..=(node, LAST))
            .map(|(_, id)| *id)
    }

    pub(super) fn of_team(&self, team: TeamId) -> impl Iterator<Item = SandboxId> {
        self.teams
            .range((team, FIRST)..=(team, LAST))
            .map(|(_, id)| *id)
    }

    /// The sandboxes that have ended, the earliest first.
    pub(super) fn ended(&self) -> impl Iterator<Item = (Stamp, SandboxId)> {
        self.ended.iter().copied()
    }
}
