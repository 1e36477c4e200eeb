//! Clients: they ask any node, and ask another one until they are answered.

use std::collections::BTreeMap;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::Mib;
use raft::command::{Answer, CheckpointSandbox, Command, Receipt, StopCause};
use raft::state::{Checkpoint, HostLoss, Phase, Purpose, SandboxSpec, SnapshotKind};

use super::{CLIENT_PATIENCE, Event, Pending, World, template};
use crate::sim::bugs::Bug;
use crate::sim::oracle::{Promise, Wish};

/// Names that clients give to snapshots.
const NAMES: u64 = 3;

impl World {
    /// A client asks for something, as long as faults fall.
    pub(super) fn client(&mut self) {
        if self.now >= self.faults_end.max(10_000) {
            return;
        }
        let created: Vec<SandboxId> = self
            .oracle
            .promises
            .iter()
            .filter_map(|promise| match promise {
                Promise::Created(id) => Some(*id),
                Promise::Stopped(_) | Promise::Nothing => None,
            })
            .collect();
        self.requests += 1;
        let request = self.requests;
        let pending = if !created.is_empty() && self.rng.chance(400) {
            let id = *self.rng.pick(&created);
            self.change(id)
        } else {
            self.new_sandbox(request)
        };
        self.pending.insert(request, pending);
        self.retry(request);
        let wait = self.rng.within(300, 2500);
        self.after(wait, Event::Client);
    }

    /// A checkpoint or a pause of what runs, a checkpoint or a resume of what rests, another holder for
    /// it; or a stop.
    fn change(&mut self, id: SandboxId) -> Pending {
        let state = self.oracle.newest();
        let known = state.sandbox(id);
        let nodes: Vec<NodeId> = state.nodes().map(|node| node.id).collect();
        let command = match known.map(|it| (it.phase, it.epoch, it.snapshot)) {
            Some((Phase::Running | Phase::Paused, epoch, _)) if self.rng.chance(250) => {
                self.checkpoint(id, epoch)
            }
            Some((Phase::Running, epoch, _)) if self.rng.chance(700) => Command::PauseSandbox {
                id,
                epoch,
                cause: StopCause::Asked,
                // Some in order to move.
                then_on: self.rng.chance(300).then(|| *self.rng.pick(&nodes)),
            },
            Some((Phase::Paused, _, Some(snapshot))) if self.rng.chance(400) => {
                Command::HoldSnapshot {
                    id: snapshot,
                    node: *self.rng.pick(&nodes),
                    holds: true,
                }
            }
            Some((Phase::Paused, _, Some(snapshot))) if self.rng.chance(800) => {
                Command::ResumeSandbox {
                    id,
                    snapshot,
                    to: None,
                    hints: Vec::new(),
                }
            }
            _ => {
                return Pending {
                    command: Command::StopSandbox {
                        id,
                        cause: StopCause::Asked,
                    },
                    promise: Promise::Stopped(id),
                };
            }
        };
        Pending {
            command,
            promise: Promise::Nothing,
        }
    }

    /// For a name, or for a fork.
    fn checkpoint(&mut self, id: SandboxId, epoch: Epoch) -> Command {
        let purpose = if self.rng.chance(500) {
            Purpose::Name {
                name: format!("kept-{}", self.rng.within(0, NAMES)),
                kind: SnapshotKind::Snapshot,
                overwrite: self.rng.chance(500),
                metadata: BTreeMap::new(),
            }
        } else {
            let fork = SandboxId(self.any_id());
            if let Some(of) = self.oracle.wishes.get(&id).cloned() {
                self.requests += 1;
                let request = self.requests;
                self.oracle.wishes.insert(fork, Wish { request, ..of });
            }
            Purpose::Fork { ids: vec![fork] }
        };
        let ask = SnapshotId(self.any_id());
        Command::CheckpointSandbox(CheckpointSandbox {
            id,
            epoch,
            checkpoint: Checkpoint { ask, purpose },
            hints: Vec::new(),
        })
    }

    fn any_id(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.rng.next().to_be_bytes());
        bytes
    }

    fn new_sandbox(&mut self, request: u64) -> Pending {
        let id = SandboxId(self.any_id());
        let on_host_loss = if self.rng.chance(700) {
            HostLoss::Restart
        } else {
            HostLoss::Wait
        };
        let memory = Mib(*self.rng.pick(&[128, 256, 512]));
        let mut spec = SandboxSpec {
            template: template().name,
            vcpus: 1,
            memory,
            disk: Mib(10),
            on_host_loss,
            ..SandboxSpec::default()
        };
        let state = self.oracle.newest();
        let named: Vec<_> = state.named_by(TeamId::default()).collect();
        if !named.is_empty() && self.rng.chance(300) {
            let from = *self.rng.pick(&named);
            spec.template.clone_from(&from.name);
            (spec.vcpus, spec.memory, spec.disk) = (from.vcpus, from.memory, from.disk);
        }
        let resources = spec.resources();
        self.oracle.wishes.insert(id, Wish { request, resources });
        if self.setup.bug == Some(Bug::ReservationsIgnored) {
            (spec.memory, spec.vcpus) = (Mib(0), 0);
        }
        Pending {
            command: Command::CreateSandbox {
                id,
                team: TeamId::default(),
                spec,
                hints: Vec::new(),
            },
            promise: Promise::Created(id),
        }
    }

    /// Asks some node, and another one after a while.
    pub(super) fn retry(&mut self, request: u64) {
        let Some(mut pending) = self.pending.get(&request).cloned() else {
            return;
        };
        if self.setup.bug == Some(Bug::CreateNotIdempotent)
            && let Promise::Created(id) = pending.promise
        {
            // The first wish stays: it is still the same request.
            let wish = self.oracle.wishes.get(&id).cloned();
            pending = self.new_sandbox(request);
            if let (Promise::Created(new), Some(wish)) = (pending.promise, wish) {
                self.oracle.wishes.insert(new, wish);
            }
            self.pending.insert(request, pending.clone());
        }
        let nodes: Vec<NodeId> = self.machines.keys().copied().collect();
        let node = *self.rng.pick(&nodes);
        let now = self.now;
        let awake = self
            .machines
            .get(&node)
            .is_some_and(|it| it.is_up && it.paused_until <= now);
        if awake {
            self.with(node, |daemon, context| {
                if let Some(daemon) = daemon {
                    daemon.ask(request, pending.command, context);
                }
            });
        }
        self.after(CLIENT_PATIENCE, Event::Retry(request));
    }

    pub(super) fn answered(&mut self, request: u64, answer: Answer) {
        let Some(pending) = self.pending.remove(&request) else {
            return;
        };
        match (pending.promise, answer) {
            (promise @ Promise::Stopped(_), Ok(_))
            | (promise @ Promise::Created(_), Ok(Receipt::Placed { .. } | Receipt::Done(_))) => {
                self.oracle.promises.push(promise);
            }
            _ => {}
        }
    }
}
