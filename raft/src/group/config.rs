//! How a group is set up.

use std::path::PathBuf;
use std::time::Duration;

use openraft::{Config, SnapshotPolicy};
use proto::ids::NodeId;

use super::OpenError;
use crate::types::Node;

/// Entries openraft purges at once: each purge costs a sync.
const PURGE_ENTRIES: u64 = 1000;
/// The usual size of a log segment: large enough that switching is rare, small enough to be read
/// into memory at a start.
pub(super) const SEGMENT_BYTES: u32 = 64 * 1024 * 1024;

/// When a member believes that the leader is gone.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Time between two heartbeats.
    pub heartbeat: Duration,
    /// Shortest silence after which a member stands for election.
    pub election_min: Duration,
    /// Longest one. A failover takes about this plus a random time between the two.
    pub election_max: Duration,
}

impl Default for Timeouts {
    /// For a LAN: a failover in about 0.9 s. Shorter ones are too tight for a host that also
    /// boots guests.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(300),
            election_max: Duration::from_millis(500),
        }
    }
}

/// How a group is laid out.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// Log, snapshots, identity. This is the truth: it must be on a disk that keeps its word.
    pub dir: PathBuf,
    /// The derived state; may be deleted while the node is down.
    pub state_dir: PathBuf,
    /// This member.
    pub node_id: NodeId,
    /// What the membership shall say about it.
    pub node: Node,
    /// Election timing.
    pub timeouts: Timeouts,
    /// Size of one log segment.
    pub segment_bytes: u32,
    /// Most bytes of log entries kept in memory for members that lag.
    pub cache_bytes: usize,
    /// Entries between two snapshots. Twice as many stay in the log behind the newest, so that a
    /// short absence costs no snapshot and the older snapshot stays usable.
    pub snapshot_entries: u64,
}

impl GroupConfig {
    /// The usual layout.
    #[must_use]
    pub fn new(
        dir: impl Into<PathBuf>,
        state_dir: impl Into<PathBuf>,
        node_id: NodeId,
        node: Node,
    ) -> Self {
        Self {
            dir: dir.into(),
            state_dir: state_dir.into(),
            node_id,
            node,
            timeouts: Timeouts::default(),
            segment_bytes: SEGMENT_BYTES,
            cache_bytes: 8 * 1024 * 1024,
            snapshot_entries: 5000,
        }
    }
}

/// openraft's own settings.
pub(super) fn raft_config(config: &GroupConfig) -> Result<Config, OpenError> {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let wanted = Config {
        cluster_name: "wrenn".into(),
        heartbeat_interval: millis(config.timeouts.heartbeat),
        election_timeout_min: millis(config.timeouts.election_min),
        election_timeout_max: millis(config.timeouts.election_max),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_entries),
        max_in_snapshot_log_to_keep: config.snapshot_entries.saturating_mul(2),
        purge_batch_size: PURGE_ENTRIES.min(config.snapshot_entries),
        enable_pre_vote: Some(true),
        // Entries go out to the others while this member still writes them, so a quorum may have
        // what a crash takes from this disk. Leading on in the same term would give the places of
        // those entries to others, which nobody could tell apart: acknowledged writes are lost and
        // the members differ for ever.
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    wanted
        .validate()
        .map_err(|err| OpenError::Config(err.to_string()))
}
