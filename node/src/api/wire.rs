//! The JSON shapes of the public interface, and the one place where a sandbox becomes a capsule.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use proto::ids::NodeId;
use proto::units::Stamp;
use raft::state::{
    GuestVersions, HostLoss, IdleAction, Named, Phase, Sandbox, Snapshot, SnapshotKind, State,
    Template,
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::guest::{FileEntry, FileKind};
use crate::relay::{LocalFacts, MemoryFacts, Transfer, Waiting};

/// Labels that the server sets and clients may not.
pub(super) const RESERVED_KEYS: [&str; 4] = [
    "kernel_version",
    "vmm_version",
    "agent_version",
    "envd_version",
];

/// The status of a capsule whose host cannot be reached. What it was doing goes on there, or not.
const MISSING: &str = "missing";

/// A capsule as clients see it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Capsule {
    /// Its id for life.
    #[schema(example = "cl-0000000000000000000000001")]
    pub(super) id: String,
    /// `starting`, `running`, `pausing`, `paused`, `resuming`, `snapshotting`, `stopping`, `stopped`, `error`, or
    /// `missing` while its host cannot be reached.
    #[schema(value_type = String)]
    pub(super) status: &'static str,
    /// Since when its host has been missing.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) missing_since: Option<Timestamp>,
    /// What becomes of it when its host is lost: `wait` or `restart`.
    #[schema(value_type = String)]
    pub(super) on_host_loss: &'static str,
    /// Its template, by the name it was asked for under.
    pub(super) template: String,
    /// Virtual processors.
    pub(super) vcpus: u32,
    /// Memory in MiB.
    pub(super) memory_mb: u32,
    /// Seconds without activity after which it is paused, or ends; 0 means never.
    pub(super) timeout_sec: u64,
    /// What happens then: `pause` or `destroy`.
    #[schema(value_type = String)]
    pub(super) timeout_action: &'static str,
    /// Who may visit its ports: `private` (a key of the team, or a link) or `public`.
    #[schema(value_type = String)]
    pub(super) ports: &'static str,
    /// Whether a visit to one of its ports resumes it.
    pub(super) auto_resume: bool,
    /// Size of its root disk in MiB.
    pub(super) disk_size_mb: u32,
    /// What that disk occupies on its host, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) disk_used_mb: Option<u64>,
    /// When it was asked for.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) created_at: Option<Timestamp>,
    /// When its guest first answered.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) started_at: Option<Timestamp>,
    /// When somebody last used it.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) last_active_at: Option<Timestamp>,
    /// When its record last changed.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) last_updated: Option<Timestamp>,
    /// The client's labels and the server's.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) metadata: BTreeMap<String, String>,
    /// Name of the node that owns it.
    pub(super) node: String,
    /// Id of the node that owns it.
    pub(super) node_id: String,
    /// How many nodes hold all of what it was last paused as; of a capsule that never was, nothing
    /// is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replicas: Option<usize>,
    /// What it was last paused as; of a capsule that never was, nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) snapshot: Option<Rest>,
    /// Why it ended or broke.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) reason: String,
    /// What its guest came from: `cold` (it booted), `warm` (one that had just booted), `fork` (another
    /// capsule's snapshot) or `resumed` (its own).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) start: Option<String>,
    /// How long each stage of its start took, in milliseconds.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) start_ms: BTreeMap<String, f64>,
    /// Of one that was resumed, how its memory has come so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<MemoryShape>,
    /// How far what it is resumed from has come to its host, while it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) transfer: Option<Transferred>,
    /// What its guest stands still for, while it does: memory that no host gives it now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) waits_for: Option<WaitsFor>,
}

/// What a capsule's guest stands still for.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct WaitsFor {
    /// The hosts that would have it and cannot be reached.
    nodes: Vec<String>,
    /// Why it cannot be had.
    reason: String,
    /// Since when.
    #[schema(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// When it is given up, and the capsule goes back to its last pause.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
}

impl From<Waiting> for WaitsFor {
    fn from(waiting: Waiting) -> Self {
        Self {
            nodes: waiting.nodes,
            reason: waiting.why,
            since: timestamp(waiting.since),
            until: timestamp(waiting.until),
        }
    }
}

/// How far a snapshot has come to a host.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct Transferred {
    /// Bytes that are there.
    bytes_done: u64,
    /// Bytes in all.
    bytes_total: u64,
    /// Hosts that give some of it at the moment.
    sources: u32,
}

impl From<Transfer> for Transferred {
    fn from(transfer: Transfer) -> Self {
        Self {
            bytes_done: transfer.bytes_done,
            bytes_total: transfer.bytes_total,
            sources: transfer.sources,
        }
    }
}

/// How the memory of a resumed capsule has come so far.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct MemoryShape {
    /// Bytes of it that its host holds.
    resident_bytes: u64,
    /// Bytes that came from the host's own store.
    local_bytes: u64,
    /// Bytes that came from other nodes.
    peer_bytes: u64,
    /// Page faults that were served.
    faults: u64,
    /// Of them, for what was not on the host.
    peer_faults: u64,
    /// Half of the faults took so many microseconds at most.
    fault_p50_us: f64,
    /// 99 of 100 took so many microseconds at most.
    fault_p99_us: f64,
}

impl From<MemoryFacts> for MemoryShape {
    fn from(facts: MemoryFacts) -> Self {
        Self {
            resident_bytes: facts.resident_bytes,
            local_bytes: facts.local_bytes,
            peer_bytes: facts.peer_bytes,
            faults: facts.faults,
            peer_faults: facts.peer_faults,
            fault_p50_us: facts.fault_p50.as_secs_f64() * 1e6,
            fault_p99_us: facts.fault_p99.as_secs_f64() * 1e6,
        }
    }
}

impl Capsule {
    /// The sandbox as a capsule in a list, last used at `active` where that is known.
    pub(super) fn of(state: &State, sandbox: &Sandbox, active: Option<Stamp>) -> Self {
        let spec = &sandbox.spec;
        let owner = state.node(sandbox.owner);
        let active = active.or(sandbox.started_at);
        let live = sandbox.phase.holds_resources();
        let rest = sandbox.snapshot.and_then(|id| state.snapshot(id));
        let missing_since = owner
            .filter(|_| live)
            .and_then(|owner| owner.liveness.since());
        let mut metadata = spec.metadata.clone();
        metadata.extend(version_labels(&sandbox.versions));
        Self {
            id: sandbox.id.to_string(),
            status: missing_since.map_or_else(|| status(sandbox.phase), |_| MISSING),
            missing_since: missing_since.and_then(timestamp),
            on_host_loss: match spec.on_host_loss {
                HostLoss::Wait => "wait",
                HostLoss::Restart => "restart",
            },
            template: spec.template_as_asked().to_owned(),
            vcpus: spec.vcpus,
            memory_mb: spec.memory.0,
            timeout_sec: spec.idle_timeout.unwrap_or_default().as_secs(),
            timeout_action: match spec.on_idle {
                IdleAction::Pause => "pause",
                IdleAction::Destroy => "destroy",
            },
            ports: if spec.ports_open { "public" } else { "private" },
            auto_resume: spec.wakes,
            disk_size_mb: spec.disk.0,
            disk_used_mb: None,
            created_at: timestamp(sandbox.created_at),
            started_at: sandbox.started_at.and_then(timestamp),
            last_active_at: active.and_then(timestamp),
            last_updated: timestamp(sandbox.updated_at),
            metadata,
            node: owner.map_or_else(|| sandbox.owner.to_string(), |node| node.name.clone()),
            node_id: sandbox.owner.to_string(),
            replicas: rest.map(|it| it.holders.len()),
            snapshot: rest.map(|it| Rest::of(state, it)),
            reason: sandbox.reason.clone(),
            start: None,
            start_ms: BTreeMap::new(),
            memory: None,
            transfer: None,
            waits_for: None,
        }
    }

    /// The same with what its host told of it.
    pub(super) fn in_detail(state: &State, sandbox: &Sandbox, facts: Option<LocalFacts>) -> Self {
        let facts = facts.unwrap_or_default();
        let used = facts.disk_used_bytes;
        let in_ms = |(stage, took): (String, Duration)| (stage, took.as_secs_f64() * 1000.0);
        Self {
            disk_used_mb: used.map(|bytes| bytes.div_ceil(proto::units::MIB_BYTES)),
            start: facts.start,
            start_ms: facts.start_stages.into_iter().map(in_ms).collect(),
            memory: facts.memory.map(Into::into),
            transfer: facts.transfer.map(Into::into),
            waits_for: facts.waiting.map(Into::into),
            ..Self::of(state, sandbox, facts.last_active)
        }
    }
}

/// The word for a phase. Clients know exactly these.
pub(super) const fn status(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Error => "error",
        Phase::Pausing => "pausing",
        Phase::Paused => "paused",
        Phase::Resuming => "resuming",
        Phase::Snapshotting => "snapshotting",
    }
}

/// What a capsule was paused as.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Rest {
    /// Its id.
    id: String,
    /// When it was sealed.
    #[schema(value_type = Option<String>, format = DateTime)]
    sealed_at: Option<Timestamp>,
    /// Bytes of guest memory in it, holes left out.
    memory_bytes: u64,
    /// Bytes of the disk's changes in it, holes left out.
    disk_bytes: u64,
    /// Bytes that the pause had to store anew.
    new_bytes: u64,
    /// How long the pause took, in milliseconds: `quiesce` until the guest stood still, `save` its
    /// devices, `store` all of it durably.
    pause_ms: BTreeMap<&'static str, u32>,
    /// Names of the nodes that hold all of it.
    holders: Vec<String>,
}

impl Rest {
    fn of(state: &State, snapshot: &Snapshot) -> Self {
        let sealed = &snapshot.sealed;
        let took = sealed.took;
        let name = |id: &NodeId| state.node(*id).map_or(id.to_string(), |it| it.name.clone());
        let steps = [
            ("quiesce", took.quiesce_ms),
            ("save", took.save_ms),
            ("store", took.store_ms),
        ];
        Self {
            id: sealed.id.to_string(),
            sealed_at: timestamp(snapshot.sealed_at),
            memory_bytes: sealed.memory_bytes,
            disk_bytes: sealed.disk_bytes,
            new_bytes: sealed.new_bytes,
            pause_ms: steps.into_iter().collect(),
            holders: snapshot.holders.iter().map(name).collect(),
        }
    }
}

/// An instant with its offset; `None` for one past the year 9999, which only a bad clock makes.
pub(super) fn timestamp(stamp: Stamp) -> Option<Timestamp> {
    let ms = i64::try_from(stamp.0).ok()?;
    Timestamp::from_millisecond(ms).ok()
}

fn version_labels(versions: &GuestVersions) -> impl Iterator<Item = (String, String)> {
    [
        ("kernel_version", &versions.kernel),
        ("vmm_version", &versions.vmm),
        ("agent_version", &versions.agent),
        ("envd_version", &versions.agent),
    ]
    .into_iter()
    .filter(|(_, version)| !version.is_empty())
    .map(|(key, version)| (key.to_owned(), version.clone()))
}

/// A template as clients see it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct TemplateShape {
    /// Unique in the cluster.
    pub(super) name: String,
    /// `base` is a disk image alone, `snapshot` has memory too.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    pub(super) kind: &'static str,
    /// Processors that capsules of it are given; `null` leaves the choice to the create.
    pub(super) vcpus: Option<u32>,
    /// Memory in MiB that capsules of it are given; `null` leaves the choice to the create.
    pub(super) memory_mb: Option<u32>,
    /// Bytes of data in it.
    pub(super) size_bytes: u64,
    /// When it was first put.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) created_at: Option<Timestamp>,
    /// Whether it belongs to the platform and not to a team.
    pub(super) platform: bool,
    /// Whether it can be removed.
    pub(super) protected: bool,
    /// Labels.
    pub(super) metadata: BTreeMap<String, String>,
}

impl From<&Named> for TemplateShape {
    fn from(named: &Named) -> Self {
        Self {
            name: named.name.clone(),
            kind: named.kind.word(),
            vcpus: (named.kind == SnapshotKind::Snapshot).then_some(named.vcpus),
            memory_mb: (named.kind == SnapshotKind::Snapshot).then_some(named.memory.0),
            size_bytes: named.size_bytes,
            created_at: timestamp(named.created_at),
            platform: false,
            protected: false,
            metadata: named.metadata.clone(),
        }
    }
}

impl From<&Template> for TemplateShape {
    fn from(template: &Template) -> Self {
        Self {
            name: template.name.clone(),
            kind: SnapshotKind::Base.word(),
            vcpus: None,
            memory_mb: None,
            size_bytes: template.size_bytes,
            created_at: timestamp(template.created_at),
            platform: true,
            protected: true,
            metadata: BTreeMap::new(),
        }
    }
}

/// A directory entry as clients see it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct FileEntryShape {
    /// Its last path element.
    pub(super) name: String,
    /// Its absolute path.
    pub(super) path: String,
    /// `file`, `directory` or `symlink`.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    pub(super) kind: &'static str,
    /// Bytes.
    pub(super) size: i64,
    /// Permission bits.
    pub(super) mode: u32,
    /// Permission bits as `ls` shows them.
    pub(super) permissions: String,
    /// Name of its owner.
    pub(super) owner: String,
    /// Name of its group.
    pub(super) group: String,
    /// Unix seconds.
    pub(super) modified_at: i64,
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) symlink_target: Option<String>,
}

impl From<FileEntry> for FileEntryShape {
    fn from(entry: FileEntry) -> Self {
        Self {
            // The agent tells what a link leads to; here a link is a link.
            kind: match (entry.kind, &entry.symlink_target) {
                (_, Some(_)) | (FileKind::Symlink, None) => "symlink",
                (FileKind::File, None) => "file",
                (FileKind::Directory, None) => "directory",
            },
            name: entry.name,
            path: entry.path,
            size: entry.size_bytes,
            mode: entry.mode,
            permissions: entry.permissions,
            owner: entry.owner,
            group: entry.group,
            modified_at: entry.modified_at,
            symlink_target: entry.symlink_target,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_carry_their_offset() {
        let shown = timestamp(Stamp(1_700_000_000_123)).map(|it| it.to_string());
        assert_eq!(shown.as_deref(), Some("2023-11-14T22:13:20.123Z"));
    }

    #[test]
    fn an_instant_beyond_the_calendar_is_left_out() {
        assert_eq!(timestamp(Stamp(u64::MAX)), None);
        assert_eq!(timestamp(Stamp(i64::MAX as u64)), None);
    }
}
