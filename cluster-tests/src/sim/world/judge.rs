//! The judge's rounds: what must hold at every event, and what once the faults are over.

use std::collections::BTreeMap;

use node::cluster::autopilot;
use proto::ids::{NodeId, SandboxId};
use raft::state::{Desired, Phase};

use super::World;
use crate::sim::host::{Guest, GuestState};

impl World {
    /// At most one guest runs that takes itself for a sandbox, and none whose end was committed.
    pub(super) fn check_guests(&mut self, looked_at: NodeId) {
        let looked_at = self.machines.get(&looked_at);
        let idle = looked_at.is_none_or(|machine| machine.body.guests.is_empty());
        if idle && self.oracle.ended.is_empty() {
            return;
        }
        let mut running: BTreeMap<SandboxId, NodeId> = BTreeMap::new();
        for (node, machine) in &self.machines {
            for guest in machine.body.guests.values().filter(|guest| guest.runs()) {
                if let Some(other) = running.insert(guest.is, *node) {
                    let is = guest.is;
                    self.oracle
                        .accuse(format!("{is} runs on {other} and on {node}"));
                }
            }
        }
        for (id, epoch) in std::mem::take(&mut self.oracle.ended) {
            for (node, machine) in &self.machines {
                let guest = machine
                    .body
                    .guests
                    .get(&id)
                    .filter(|guest| guest.epoch == epoch);
                if guest.is_some_and(Guest::runs) {
                    self.oracle
                        .accuse(format!("{id} was reported ended and runs on {node}"));
                }
            }
        }
    }

    /// What must hold once the faults are over.
    pub(super) fn check_rest(&mut self) {
        let state = self.oracle.newest();
        for node in state.nodes().filter(|node| !node.liveness.is_alive()) {
            self.oracle
                .accuse(format!("{} is still {:?}", node.id, node.liveness));
        }
        for sandbox in state.sandboxes() {
            let guest = self
                .machines
                .get(&sandbox.owner)
                .and_then(|it| it.body.guests.get(&sandbox.id));
            let ready = guest.is_some_and(|it| {
                it.state == GuestState::Ready && it.runs() && it.epoch == sandbox.epoch
            });
            let well = match sandbox.phase {
                Phase::Running => sandbox.desired == Desired::Running && ready,
                Phase::Stopped | Phase::Error | Phase::Paused => !guest.is_some_and(Guest::runs),
                Phase::Starting
                | Phase::Stopping
                | Phase::Pausing
                | Phase::Resuming
                | Phase::Snapshotting => false,
            };
            if !well {
                let (id, phase, owner) = (sandbox.id, sandbox.phase, sandbox.owner);
                self.oracle
                    .accuse(format!("{id} is stuck in {phase:?} on {owner}: {guest:?}"));
            }
        }
        for (node, machine) in &self.machines {
            for (id, guest) in machine.body.guests.iter().filter(|(_, guest)| guest.runs()) {
                if state
                    .sandbox(*id)
                    .is_none_or(|it| it.owner != *node || it.epoch != guest.epoch)
                {
                    self.oracle
                        .accuse(format!("a guest of {id} is left over on {node}"));
                }
            }
        }
        self.check_members();
    }

    fn check_members(&mut self) {
        let leaders = self.machines.iter().filter(|(_, it)| {
            it.daemon
                .as_ref()
                .is_some_and(|daemon| daemon.replica.is_leader())
        });
        let Some((leader, _)) =
            leaders.max_by_key(|(_, it)| it.daemon.as_ref().map(|daemon| daemon.replica.disk.term))
        else {
            return self.oracle.accuse("nobody leads".into());
        };
        let picture = self.with(*leader, |daemon, context| {
            daemon.as_ref().map(|daemon| daemon.picture(context))
        });
        let Some(picture) = picture.flatten() else {
            return;
        };
        let nodes = usize::try_from(self.setup.nodes).unwrap_or(usize::MAX);
        let voters = picture.voters.len();
        let target = picture.settings.target_voters(nodes, voters);
        let learners = self.setup.max_learners.min(nodes - target.min(nodes));
        self.summary.members = (
            voters,
            picture.learners.len(),
            nodes - voters - picture.learners.len(),
        );
        if voters != target || picture.learners.len() != learners {
            let members = self.summary.members;
            self.oracle.accuse(format!(
                "{members:?} members, not {target} voters and {learners} learners"
            ));
        }
        if let Some(action) = autopilot::decide(&picture) {
            self.oracle
                .accuse(format!("the autopilot still wants {action:?}"));
        }
    }
}
