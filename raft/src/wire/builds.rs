//! The commands about builds, as bytes.

use proto::ids::{BuildId, NodeId, SandboxId};
use proto::wire::raft as pb;

use super::{array, optional, some};
use crate::command::{BuildChange, BuildEnd, Command};
use crate::state::{BadRow, BuildStatus};

pub(super) fn build_to_wire(change: &BuildChange) -> pb::proposal::Command {
    use pb::build_change::Change as Wire;
    let change = match change {
        BuildChange::Start(build) => Wire::Start(build.as_ref().into()),
        BuildChange::Claim { id, attempt, node } => Wire::Claim(pb::ClaimBuild {
            id: id.0.to_vec(),
            attempt: *attempt,
            node: node.0,
        }),
        BuildChange::Progress {
            id,
            attempt,
            phase,
            step,
            sandbox,
            log,
        } => Wire::Progress(pb::BuildProgress {
            id: id.0.to_vec(),
            attempt: *attempt,
            phase: phase.clone(),
            step: *step,
            sandbox: sandbox.map(|id| id.0.to_vec()).unwrap_or_default(),
            log: log.clone(),
        }),
        BuildChange::End(end) => Wire::End(pb::BuildEnd {
            id: end.id.0.to_vec(),
            attempt: end.attempt,
            status: end.status.to_wire().into(),
            error: end.error.clone(),
            default_user: end.default_user.clone(),
            default_env: end.default_env.clone(),
            log: end.log.clone(),
        }),
        BuildChange::Cancel(id) => Wire::Cancel(pb::CancelBuild { id: id.0.to_vec() }),
    };
    pb::proposal::Command::Build(pb::BuildChange {
        change: Some(change),
    })
}

pub(super) fn build_from_wire(wire: pb::BuildChange) -> Result<Command, BadRow> {
    use pb::build_change::Change as Wire;
    let id = |bytes: &[u8]| array("build id", bytes).map(BuildId);
    let change = match some("change of a build", wire.change)? {
        Wire::Start(row) => BuildChange::Start(Box::new(row.try_into()?)),
        Wire::Claim(it) => BuildChange::Claim {
            id: id(&it.id)?,
            attempt: it.attempt,
            node: NodeId(it.node),
        },
        Wire::Progress(it) => BuildChange::Progress {
            id: id(&it.id)?,
            attempt: it.attempt,
            phase: it.phase,
            step: it.step,
            sandbox: optional("sandbox id", &it.sandbox)?.map(SandboxId),
            log: it.log,
        },
        Wire::End(it) => BuildChange::End(BuildEnd {
            id: id(&it.id)?,
            attempt: it.attempt,
            status: BuildStatus::from_wire(it.status())?,
            error: it.error,
            default_user: it.default_user,
            default_env: it.default_env,
            log: it.log,
        }),
        Wire::Cancel(it) => BuildChange::Cancel(id(&it.id)?),
    };
    Ok(Command::Build(change))
}
