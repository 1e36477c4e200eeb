//! The commands about pausing, resuming and snapshots, as bytes.

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId};
use proto::wire::raft as pb;

use super::{array, cause_from_wire, cause_to_wire, hint_to_wire, hints_from_wire};
use crate::command::{Command, StopCause};
use crate::placement::LoadHint;
use crate::state::BadRow;

pub(super) fn paused_to_wire(
    (id, epoch): (SandboxId, Epoch),
    cause: StopCause,
    then_on: Option<NodeId>,
) -> pb::proposal::Command {
    pb::proposal::Command::PauseSandbox(pb::PauseSandbox {
        id: id.0.to_vec(),
        epoch: epoch.0,
        cause: cause_to_wire(cause).into(),
        then_on: node_to_wire(then_on),
    })
}

/// No node has the id 0.
fn node_to_wire(node: Option<NodeId>) -> u64 {
    node.map_or(0, |node| node.0)
}

fn node_from_wire(node: u64) -> Option<NodeId> {
    (node != 0).then_some(NodeId(node))
}

pub(super) fn resumed_to_wire(
    (id, snapshot): (SandboxId, SnapshotId),
    to: Option<NodeId>,
    hints: &[LoadHint],
) -> pb::proposal::Command {
    pb::proposal::Command::ResumeSandbox(pb::ResumeSandbox {
        id: id.0.to_vec(),
        snapshot: snapshot.0.to_vec(),
        hints: hints.iter().map(hint_to_wire).collect(),
        to: node_to_wire(to),
    })
}

pub(super) fn held_to_wire(id: SnapshotId, node: NodeId, holds: bool) -> pb::proposal::Command {
    pb::proposal::Command::HoldSnapshot(pb::HoldSnapshot {
        id: id.0.to_vec(),
        node: node.0,
        holds,
    })
}

pub(super) fn paused_from_wire(wire: &pb::PauseSandbox) -> Result<Command, BadRow> {
    Ok(Command::PauseSandbox {
        id: SandboxId(array("sandbox id", &wire.id)?),
        epoch: Epoch(wire.epoch),
        cause: match wire.cause() {
            pb::StopCause::Unspecified => StopCause::Asked,
            cause => cause_from_wire(cause)?,
        },
        then_on: node_from_wire(wire.then_on),
    })
}

pub(super) fn resumed_from_wire(wire: pb::ResumeSandbox) -> Result<Command, BadRow> {
    Ok(Command::ResumeSandbox {
        id: SandboxId(array("sandbox id", &wire.id)?),
        snapshot: SnapshotId(array("snapshot id", &wire.snapshot)?),
        to: node_from_wire(wire.to),
        hints: hints_from_wire(wire.hints),
    })
}

pub(super) fn held_from_wire(wire: &pb::HoldSnapshot) -> Result<Command, BadRow> {
    Ok(Command::HoldSnapshot {
        id: SnapshotId(array("snapshot id", &wire.id)?),
        node: NodeId(wire.node),
        holds: wire.holds,
    })
}
