//! Sandboxes: what is wanted of each, who owns it, and what the owner last reported.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{NodeId, SandboxId, SnapshotId, TeamId};
use proto::units::{Mib, Stamp};
use proto::wire::raft as pb;

use super::named::Checkpoint;
use super::nodes::Resources;
use super::rows::BadRow;
use crate::wire::{array, optional, some};

/// A sandbox's replicated record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// For its whole life.
    pub id: SandboxId,
    /// Whose it is.
    pub team: TeamId,
    /// What was asked for.
    pub spec: SandboxSpec,
    /// What the cluster wants of it.
    pub desired: Desired,
    /// Where it stands.
    pub phase: Phase,
    /// Why it ended or broke; empty otherwise.
    pub reason: String,
    /// The node that may run it.
    pub owner: NodeId,
    /// The owner's fencing token.
    pub epoch: Epoch,
    /// When it was asked for.
    pub created_at: Stamp,
    /// When its guest was first ready.
    pub started_at: Option<Stamp>,
    /// When this record last changed.
    pub updated_at: Stamp,
    /// What runs it, known once it is running.
    pub versions: GuestVersions,
    /// What it was sealed as last: what it rests as while it is paused.
    pub snapshot: Option<SnapshotId>,
    /// The entry that asked for its last pause or checkpoint; 0 before the first. A seal made for an
    /// earlier one counts for nothing: the guest has gone on since.
    pub pause: u64,
    /// While it is being paused in order to move: where it shall go on.
    pub bound_for: Option<NodeId>,
    /// What its guest was made from as another one, until it is paused itself: its pages may still
    /// come from there. Not what it falls back to.
    pub origin: Option<SnapshotId>,
    /// What it is being sealed for while it is [`Phase::Snapshotting`]; `None` once it is sealed, and
    /// its guest is about to go on.
    pub checkpoint: Option<Checkpoint>,
    /// Its owner has not been let begin under this epoch: no guest of it has executed anything, and
    /// none does before the owner has asked. While the owner cannot be reached it may be given out
    /// again.
    pub not_begun: bool,
    /// Hosts on which the resume that is under way failed: what they could not do another one may.
    pub failed_on: BTreeSet<NodeId>,
    /// Whoever resumes it named the host: no other will do.
    pub host_named: bool,
}

impl Sandbox {
    /// The snapshots it needs: what it goes back to, and what its guest was made from.
    pub fn snapshots(&self) -> impl Iterator<Item = SnapshotId> + use<> {
        self.snapshot.into_iter().chain(self.origin)
    }
}

/// What a sandbox asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxSpec {
    /// Name of its template.
    pub template: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Mib,
    /// Root disk.
    pub disk: Mib,
    /// It does not stay up for longer than this without activity; `None` keeps it.
    pub idle_timeout: Option<Duration>,
    /// What becomes of it then.
    pub on_idle: IdleAction,
    /// The client's own labels.
    pub metadata: BTreeMap<String, String>,
    /// What becomes of it when its node is lost.
    pub on_host_loss: HostLoss,
    /// Only nodes with all of these tags may run it.
    pub node_tags: BTreeMap<String, String>,
    /// Only this node may run it.
    pub on_node: Option<NodeId>,
    /// Whether its ports may be visited without a key.
    pub ports_open: bool,
    /// Whether a visit resumes it.
    pub wakes: bool,
    /// What its template was called when it was asked for; empty where that is its name.
    pub asked_template: String,
}

/// What becomes of a running sandbox that nobody uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdleAction {
    /// It is paused.
    #[default]
    Pause,
    /// It ends.
    Destroy,
}

/// What becomes of a running sandbox when its node is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostLoss {
    /// It waits for its node. Nobody else ever runs it without a person saying so, and so its
    /// guest goes on even while the node has lost the cluster.
    #[default]
    Wait,
    /// It is started anew, from its template, on another node. Its guest is bound to the node's
    /// lease: frozen when that runs out, killed before the cluster gives the sandbox out again.
    Restart,
}

impl SandboxSpec {
    /// Its template, by the name it was asked for under.
    #[must_use]
    pub fn template_as_asked(&self) -> &str {
        match self.asked_template.as_str() {
            "" => &self.template,
            asked => asked,
        }
    }

    /// What placement counts for it.
    #[must_use]
    pub const fn resources(&self) -> Resources {
        Resources {
            vcpus: self.vcpus,
            memory: self.memory,
            disk: self.disk,
            sandboxes: 1,
        }
    }
}

/// What the cluster wants of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// Its guest answers.
    Running,
    /// Nothing of it is left on any node.
    Stopped,
    /// It rests as a snapshot, and nothing of it runs.
    Paused,
}

/// Where a sandbox stands, as its owner last reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Given out; the guest does not answer yet.
    Starting,
    /// The guest answers.
    Running,
    /// A stop was asked for; the owner still holds resources.
    Stopping,
    /// Ended, everything released.
    Stopped,
    /// Broke, everything released; the reason is in the record.
    Error,
    /// A pause was asked for; the guest is frozen, and goes on if it cannot be sealed.
    Pausing,
    /// It rests as its snapshot, everything else released.
    Paused,
    /// Given out again; the guest does not answer yet.
    Resuming,
    /// A checkpoint was asked for; the guest is frozen, and goes on whatever comes of it.
    Snapshotting,
}

impl Phase {
    /// Whether its node must keep room for it.
    #[must_use]
    pub const fn holds_resources(self) -> bool {
        match self {
            Self::Starting
            | Self::Running
            | Self::Stopping
            | Self::Pausing
            | Self::Resuming
            | Self::Snapshotting => true,
            Self::Stopped | Self::Error | Self::Paused => false,
        }
    }

    /// Whether its guest counts as running: from its first answer until it is sealed, is told to stop
    /// or is lost.
    #[must_use]
    pub const fn runs_guest(self) -> bool {
        matches!(self, Self::Running | Self::Pausing | Self::Snapshotting)
    }

    /// Whether it is over: nothing leads out of this.
    #[must_use]
    pub const fn is_ended(self) -> bool {
        matches!(self, Self::Stopped | Self::Error)
    }
}

/// What runs a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestVersions {
    /// Release of the guest kernel.
    pub kernel: String,
    /// Hypervisor and its version.
    pub vmm: String,
    /// Version of the guest agent.
    pub agent: String,
}

impl From<&Sandbox> for pb::SandboxRow {
    fn from(sandbox: &Sandbox) -> Self {
        Self {
            id: sandbox.id.0.to_vec(),
            team: sandbox.team.0.to_vec(),
            spec: Some((&sandbox.spec).into()),
            desired: match sandbox.desired {
                Desired::Running => pb::Desired::Running,
                Desired::Stopped => pb::Desired::Stopped,
                Desired::Paused => pb::Desired::Paused,
            }
            .into(),
            phase: pb::Phase::from(sandbox.phase).into(),
            reason: sandbox.reason.clone(),
            owner: sandbox.owner.0,
            epoch: sandbox.epoch.0,
            created_at_ms: sandbox.created_at.0,
            started_at_ms: sandbox.started_at.unwrap_or_default().0,
            updated_at_ms: sandbox.updated_at.0,
            versions: Some((&sandbox.versions).into()),
            snapshot: sandbox.snapshot.map(|id| id.0.to_vec()).unwrap_or_default(),
            pause: sandbox.pause,
            bound_for: sandbox.bound_for.map_or(0, |node| node.0),
            origin: sandbox.origin.map(|id| id.0.to_vec()).unwrap_or_default(),
            checkpoint: sandbox.checkpoint.as_ref().map(Into::into),
            not_begun: sandbox.not_begun,
            failed_on: sandbox.failed_on.iter().map(|node| node.0).collect(),
            host_named: sandbox.host_named,
        }
    }
}

impl TryFrom<pb::SandboxRow> for Sandbox {
    type Error = BadRow;

    fn try_from(row: pb::SandboxRow) -> Result<Self, BadRow> {
        let desired = match row.desired() {
            pb::Desired::Running => Desired::Running,
            pb::Desired::Stopped => Desired::Stopped,
            pb::Desired::Paused => Desired::Paused,
            pb::Desired::Unspecified => return Err(BadRow::Unknown("desired phase")),
        };
        let phase = row.phase().try_into()?;
        Ok(Self {
            id: SandboxId(array("sandbox id", &row.id)?),
            team: TeamId(array("team id", &row.team)?),
            spec: some("sandbox spec", row.spec)?.into(),
            desired,
            phase,
            reason: row.reason,
            owner: NodeId(row.owner),
            epoch: Epoch(row.epoch),
            created_at: Stamp(row.created_at_ms),
            started_at: (row.started_at_ms != 0).then_some(Stamp(row.started_at_ms)),
            updated_at: Stamp(row.updated_at_ms),
            versions: row.versions.unwrap_or_default().into(),
            snapshot: optional("snapshot id", &row.snapshot)?.map(SnapshotId),
            pause: row.pause,
            bound_for: (row.bound_for != 0).then_some(NodeId(row.bound_for)),
            origin: optional("snapshot id", &row.origin)?.map(SnapshotId),
            checkpoint: row.checkpoint.map(TryInto::try_into).transpose()?,
            not_begun: row.not_begun,
            failed_on: row.failed_on.into_iter().map(NodeId).collect(),
            host_named: row.host_named,
        })
    }
}

impl From<Phase> for pb::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting => Self::Starting,
            Phase::Running => Self::Running,
            Phase::Stopping => Self::Stopping,
            Phase::Stopped => Self::Stopped,
            Phase::Error => Self::Error,
            Phase::Pausing => Self::Pausing,
            Phase::Paused => Self::Paused,
            Phase::Resuming => Self::Resuming,
            Phase::Snapshotting => Self::Snapshotting,
        }
    }
}

impl TryFrom<pb::Phase> for Phase {
    type Error = BadRow;

    fn try_from(phase: pb::Phase) -> Result<Self, BadRow> {
        match phase {
            pb::Phase::Starting => Ok(Self::Starting),
            pb::Phase::Running => Ok(Self::Running),
            pb::Phase::Stopping => Ok(Self::Stopping),
            pb::Phase::Stopped => Ok(Self::Stopped),
            pb::Phase::Error => Ok(Self::Error),
            pb::Phase::Pausing => Ok(Self::Pausing),
            pb::Phase::Paused => Ok(Self::Paused),
            pb::Phase::Resuming => Ok(Self::Resuming),
            pb::Phase::Snapshotting => Ok(Self::Snapshotting),
            pb::Phase::Unspecified => Err(BadRow::Unknown("phase")),
        }
    }
}

impl From<&SandboxSpec> for pb::SandboxSpec {
    fn from(spec: &SandboxSpec) -> Self {
        let idle_s = spec.idle_timeout.unwrap_or_default().as_secs();
        Self {
            template: spec.template.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory.0,
            disk_mib: spec.disk.0,
            idle_timeout_s: u32::try_from(idle_s).unwrap_or(u32::MAX),
            destroy_when_idle: spec.on_idle == IdleAction::Destroy,
            metadata: spec.metadata.clone(),
            restart_on_host_loss: spec.on_host_loss == HostLoss::Restart,
            node_tags: spec.node_tags.clone(),
            on_node: spec.on_node.unwrap_or_default().0,
            ports_open: spec.ports_open,
            wakes: spec.wakes,
            asked_template: spec.asked_template.clone(),
        }
    }
}

impl From<pb::SandboxSpec> for SandboxSpec {
    fn from(row: pb::SandboxSpec) -> Self {
        let idle = Duration::from_secs(row.idle_timeout_s.into());
        Self {
            template: row.template,
            vcpus: row.vcpus,
            memory: Mib(row.memory_mib),
            disk: Mib(row.disk_mib),
            idle_timeout: (!idle.is_zero()).then_some(idle),
            on_idle: match row.destroy_when_idle {
                true => IdleAction::Destroy,
                false => IdleAction::Pause,
            },
            metadata: row.metadata,
            on_host_loss: if row.restart_on_host_loss {
                HostLoss::Restart
            } else {
                HostLoss::Wait
            },
            node_tags: row.node_tags,
            on_node: (row.on_node != 0).then_some(NodeId(row.on_node)),
            ports_open: row.ports_open,
            wakes: row.wakes,
            asked_template: row.asked_template,
        }
    }
}

impl From<&GuestVersions> for pb::GuestVersions {
    fn from(versions: &GuestVersions) -> Self {
        Self {
            kernel: versions.kernel.clone(),
            vmm: versions.vmm.clone(),
            agent: versions.agent.clone(),
        }
    }
}

impl From<pb::GuestVersions> for GuestVersions {
    fn from(row: pb::GuestVersions) -> Self {
        Self {
            kernel: row.kernel,
            vmm: row.vmm,
            agent: row.agent,
        }
    }
}
