//! What a move comes to in the state that it meets.
//!
//! What it is about it names by a number: here that is looked up among what there is, likely things
//! first, so that most moves hit something and some miss.

use proptest::sample::Index;
use proto::epoch::Epoch;
use proto::ids::{KeyId, NodeId};
use proto::units::{Mib, Stamp};
use wrenn_raft::command::{
    CheckpointSandbox, Command, DropNamed, Proposal, Report, StopCause, Verdict,
};
use wrenn_raft::placement::LoadHint;
use wrenn_raft::state::{
    Checkpoint, HostLoss, Key, Liveness, Named, Node, Phase, Sandbox, SandboxSpec, Sealed, Settings,
};

use super::super::{
    World, bound, cordon, fork, mark, name, redeem, remove, sandbox_id, snapshot_id, template,
    token_id, warm,
};
use super::{
    Asked, FORKS, Move, NAMES, TEMPLATES, machine_of, machine_says, tag_of, team, token_of,
};

impl World {
    /// The proposal a move comes to here, if it means anything.
    pub fn proposal(&self, (pause, what): (i64, Move)) -> Option<Proposal> {
        let at = Stamp(self.now.0.saturating_add_signed(pause));
        let command = self.command(what)?;
        Some(Proposal { at, command })
    }

    fn any_node(&self, pick: Index) -> Option<&Node> {
        let nodes: Vec<&Node> = self.state.nodes().collect();
        (!nodes.is_empty()).then(|| *pick.get(&nodes))
    }

    fn command(&self, what: Move) -> Option<Command> {
        Some(match what {
            Move::Found => Command::FoundCluster {
                id: self.state.cluster()?.id,
                settings: Settings::default(),
            },
            Move::PutSettings(max_voters) => Command::PutSettings(Settings {
                max_voters,
                ..Settings::default()
            }),
            Move::Template(n, digest) => {
                Command::PutTemplate(template(TEMPLATES[usize::from(n)], digest))
            }
            Move::Key { n, revoke: true } => Command::RevokeKey(KeyId(mark(b'k', n))),
            Move::Key { n, revoke: false } => Command::PutKey(any_key(n)),
            Move::PutToken(n) => Command::PutToken(token_of(n)),
            Move::RevokeToken(n) => Command::RevokeToken(token_id(n)),
            Move::Redeem { token, machine } => redeem(token, machine_says(machine, 8, 3, 1)),
            Move::Create { n, spec, busy } => self.create_command(n, &spec, &busy),
            Move::Stop { n, idle } => Command::StopSandbox {
                id: sandbox_id(n),
                cause: if idle {
                    StopCause::Idle
                } else {
                    StopCause::Asked
                },
            },
            Move::Report {
                sandbox,
                epoch_back,
                by,
                what,
            } => self.report_command(sandbox, epoch_back, by, what)?,
            Move::Prune { before_ms } => Command::PruneSandboxes {
                ended_before: Stamp(self.now.0.saturating_sub(before_ms)),
            },
            Move::ResumeFails(pick) => {
                let known = self.any_sandbox(pick, &[Phase::Resuming])?;
                Command::ReportSandbox {
                    id: known.id,
                    epoch: known.epoch,
                    node: known.owner,
                    report: Report::Failed {
                        reason: "no memory".into(),
                    },
                }
            }
            Move::People(what) => self.people_command(&what)?,
            Move::Build(what) => self.build_command(&what)?,
            other => match self.pausing_command(&other) {
                Some(command) => command?,
                None => self.node_command(other)?,
            },
        })
    }

    /// `None` for a move about something else.
    fn pausing_command(&self, what: &Move) -> Option<Option<Command>> {
        Some(match what {
            Move::Pause {
                sandbox,
                epoch_back,
                then_on,
            } => self
                .any_sandbox(*sandbox, &[Phase::Running])
                .map(|known| Command::PauseSandbox {
                    id: known.id,
                    epoch: Epoch(known.epoch.0.saturating_sub(*epoch_back)),
                    // Whichever: the record alone tells them apart.
                    cause: match epoch_back % 2 {
                        0 => StopCause::Asked,
                        _ => StopCause::Idle,
                    },
                    then_on: then_on.and_then(|it| self.any_node(it)).map(|it| it.id),
                }),
            Move::Resume {
                sandbox,
                other,
                busy,
            } => self
                .any_sandbox(*sandbox, &[Phase::Paused])
                .and_then(|known| {
                    let other = other.map(snapshot_id);
                    Some(Command::ResumeSandbox {
                        id: known.id,
                        snapshot: other.or(known.snapshot)?,
                        to: None,
                        hints: self.hints(busy),
                    })
                }),
            Move::Hold {
                snapshot,
                node,
                holds,
            } => self.hold_command(*snapshot, *node, *holds),
            Move::Checkpoint { .. }
            | Move::DropName { .. }
            | Move::CreateFrom { .. }
            | Move::Warm { .. }
            | Move::RetireWarm { .. } => self.naming_command(what),
            _ => return None,
        })
    }

    fn naming_command(&self, what: &Move) -> Option<Command> {
        match what {
            Move::Checkpoint {
                sandbox,
                epoch_back,
                ask,
                named,
                overwrite,
            } => {
                let known = self.any_sandbox(*sandbox, &[Phase::Running, Phase::Paused])?;
                let purpose = if *named {
                    name(&format!("name-{}", ask % NAMES), *overwrite)
                } else {
                    let first = FORKS + ask / 2;
                    fork(first..=first + ask % 2)
                };
                Some(Command::CheckpointSandbox(CheckpointSandbox {
                    id: known.id,
                    epoch: Epoch(known.epoch.0.saturating_sub(*epoch_back)),
                    checkpoint: Checkpoint {
                        ask: snapshot_id(*ask),
                        purpose,
                    },
                    hints: vec![],
                }))
            }
            Move::DropName { named, other } => {
                let known = self.any_named(*named)?;
                Some(Command::DropNamed(DropNamed {
                    team: known.team,
                    name: known.name.clone(),
                    snapshot: other.map_or(known.snapshot, snapshot_id),
                }))
            }
            Move::CreateFrom {
                n,
                named,
                other_shape,
            } => {
                let Some(known) = self.any_named(*named) else {
                    return Some(Self::create_as_usual(*n));
                };
                Some(Command::CreateSandbox {
                    id: sandbox_id(*n),
                    team: known.team,
                    spec: SandboxSpec {
                        template: known.name.clone(),
                        vcpus: known.vcpus + u32::from(*other_shape),
                        memory: known.memory,
                        disk: known.disk,
                        ..bound(1)
                    },
                    hints: vec![],
                })
            }
            Move::Warm { n, node, memory } => {
                let node = self.any_node(*node)?;
                Some(Command::PutWarm(warm(*n, node.id, *memory)))
            }
            Move::RetireWarm { warm } => {
                let all: Vec<_> = self.state.warm().map(|it| it.sealed.id).collect();
                (!all.is_empty()).then(|| Command::RetireWarm(*warm.get(&all)))
            }
            _ => None,
        }
    }

    /// What most people ask for, and so what is kept warm.
    fn create_as_usual(n: u8) -> Command {
        Command::CreateSandbox {
            id: sandbox_id(n),
            team: team(n),
            spec: bound(256),
            hints: vec![],
        }
    }

    fn any_named(&self, pick: Index) -> Option<&Named> {
        let all: Vec<_> = self.state.all_named().collect();
        (!all.is_empty()).then(|| *pick.get(&all))
    }

    fn hold_command(&self, snapshot: Index, node: Index, holds: bool) -> Option<Command> {
        let all: Vec<_> = self.state.snapshots().collect();
        let known = (!all.is_empty()).then(|| *snapshot.get(&all))?;
        Some(Command::HoldSnapshot {
            id: known.sealed.id,
            node: self.any_node(node)?.id,
            holds,
        })
    }

    fn node_command(&self, what: Move) -> Option<Command> {
        Some(match what {
            Move::Restart {
                node,
                incarnation,
                room,
                held,
            } => {
                let known = self.any_node(node)?;
                Command::AdmitNode(Node {
                    id: known.id,
                    ..machine_says(machine_of(known), room, held, incarnation)
                })
            }
            Move::StrangerSays { id, machine } => Command::AdmitNode(Node {
                id: NodeId(id),
                ..machine_says(machine, 8, 3, 1)
            }),
            Move::Change {
                node,
                cordoned,
                draining,
                tagged,
            } => {
                let known = self.any_node(node)?;
                let tag = ("machine".to_owned(), tag_of(machine_of(known)));
                Command::ChangeNode {
                    node: known.id,
                    cordoned,
                    draining,
                    tags: tagged.map(|tagged| tagged.then_some(tag).into_iter().collect()),
                }
            }
            Move::Judge {
                node,
                verdict,
                stale,
            } => {
                let known = self.any_node(node)?;
                Command::JudgeNode {
                    node: known.id,
                    incarnation: known.incarnation + u64::from(stale),
                    verdict: verdict.unwrap_or(match known.liveness {
                        Liveness::Alive => Verdict::Missing,
                        Liveness::Missing { .. } => Verdict::Lost,
                        Liveness::Lost { .. } => Verdict::Missing,
                    }),
                }
            }
            Move::Remove {
                node,
                declared_dead,
            } => remove(self.any_node(node)?.id, declared_dead),
            Move::RemoveAgain { id } => remove(NodeId(id), true),
            _ => cordon(NodeId(u64::MAX)),
        })
    }

    fn create_command(&self, n: u8, asked: &Asked, busy: &[u32]) -> Command {
        let tag = asked.tag.and_then(|pick| self.any_node(pick));
        let tag = tag.map(|node| ("machine".to_owned(), tag_of(machine_of(node))));
        let pin = asked.pin.and_then(|pick| self.any_node(pick));
        Command::CreateSandbox {
            id: sandbox_id(n),
            team: team(asked.team),
            spec: SandboxSpec {
                template: TEMPLATES[usize::from(asked.template)].into(),
                vcpus: asked.vcpus,
                memory: Mib(asked.memory),
                disk: Mib(5120),
                metadata: [("of", n % 3), ("by", n % 2)]
                    .map(|(key, n)| (key.into(), n.to_string()))
                    .into(),
                on_host_loss: if asked.bound {
                    HostLoss::Restart
                } else {
                    HostLoss::Wait
                },
                node_tags: tag.into_iter().collect(),
                on_node: pin.map(|node| node.id),
                ..SandboxSpec::default()
            },
            hints: self.hints(busy),
        }
    }

    fn hints(&self, busy: &[u32]) -> Vec<LoadHint> {
        let nodes = self.state.nodes().map(|node| node.id);
        let hints = nodes.zip(busy).map(|(node, busy_permille)| LoadHint {
            node,
            busy_permille: *busy_permille,
        });
        hints.collect()
    }

    /// One of those in such a phase, so that most moves hit something; any where there are none.
    fn any_sandbox(&self, pick: Index, likely: &[Phase]) -> Option<&Sandbox> {
        let all: Vec<&Sandbox> = self.state.sandboxes().collect();
        let some: Vec<&Sandbox> = all
            .iter()
            .copied()
            .filter(|it| likely.contains(&it.phase))
            .collect();
        let among = if some.is_empty() { all } else { some };
        (!among.is_empty()).then(|| *pick.get(&among))
    }

    fn report_command(
        &self,
        pick: Index,
        epoch_back: u64,
        by: Option<Index>,
        report: Report,
    ) -> Option<Command> {
        let likely: &[Phase] = match &report {
            Report::Sealed(_) | Report::Thawed { .. } => &[Phase::Pausing, Phase::Snapshotting],
            Report::Begins | Report::Running(_) => &[Phase::Starting, Phase::Resuming],
            Report::Stopped { .. } | Report::Failed { .. } => &[],
        };
        let known = self.any_sandbox(pick, likely)?;
        let report = match report {
            Report::Sealed(sealed) => Report::Sealed(Sealed {
                pause: known.pause.saturating_sub(epoch_back),
                ..sealed
            }),
            other => other,
        };
        let stranger = by.and_then(|pick| self.any_node(pick));
        Some(Command::ReportSandbox {
            id: known.id,
            epoch: Epoch(known.epoch.0.saturating_sub(epoch_back)),
            node: stranger.map_or(known.owner, |node| node.id),
            report,
        })
    }
}

fn any_key(n: u8) -> Key {
    Key {
        id: KeyId(mark(b'k', n)),
        team: team(n),
        name: format!("key-{n}"),
        hash: mark(b'h', n),
        shown: "wrn_".into(),
        ..Key::default()
    }
}
