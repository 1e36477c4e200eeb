//! The commands about checkpoints, names and what is kept warm, as bytes.

use proto::epoch::Epoch;
use proto::ids::{SandboxId, SnapshotId, TeamId};
use proto::wire::raft as pb;

use super::{array, hint_to_wire, hints_from_wire, some};
use crate::command::{CheckpointSandbox, Command, DropNamed};
use crate::state::{BadRow, Snapshot};

pub(super) fn checkpoint_to_wire(asked: &CheckpointSandbox) -> pb::proposal::Command {
    pb::proposal::Command::CheckpointSandbox(pb::CheckpointSandbox {
        id: asked.id.0.to_vec(),
        epoch: asked.epoch.0,
        checkpoint: Some((&asked.checkpoint).into()),
        hints: asked.hints.iter().map(hint_to_wire).collect(),
    })
}

pub(super) fn checkpoint_from_wire(
    wire: pb::CheckpointSandbox,
) -> Result<CheckpointSandbox, BadRow> {
    Ok(CheckpointSandbox {
        id: SandboxId(array("sandbox id", &wire.id)?),
        epoch: Epoch(wire.epoch),
        checkpoint: some("checkpoint", wire.checkpoint)?.try_into()?,
        hints: hints_from_wire(wire.hints),
    })
}

pub(super) fn unnamed_to_wire(which: &DropNamed) -> pb::proposal::Command {
    pb::proposal::Command::DropNamed(pb::DropNamed {
        team: which.team.0.to_vec(),
        name: which.name.clone(),
        snapshot: which.snapshot.0.to_vec(),
    })
}

pub(super) fn unnamed_from_wire(wire: pb::DropNamed) -> Result<DropNamed, BadRow> {
    Ok(DropNamed {
        team: TeamId(array("team id", &wire.team)?),
        name: wire.name,
        snapshot: SnapshotId(array("snapshot id", &wire.snapshot)?),
    })
}

pub(super) fn warm_to_wire(snapshot: &Snapshot) -> pb::proposal::Command {
    pb::proposal::Command::PutWarm(pb::PutWarm {
        snapshot: Some(snapshot.into()),
    })
}

pub(super) fn retired_to_wire(id: SnapshotId) -> pb::proposal::Command {
    pb::proposal::Command::RetireWarm(pb::RetireWarm { id: id.0.to_vec() })
}

pub(super) fn retired_from_wire(wire: &pb::RetireWarm) -> Result<Command, BadRow> {
    let id = SnapshotId(array("snapshot id", &wire.id)?);
    Ok(Command::RetireWarm(id))
}
