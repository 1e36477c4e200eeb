//! The cluster itself: its identity and what operators set for all nodes at once.

use std::time::Duration;

use proto::ids::ClusterId;
use proto::units::Stamp;
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::{array, some};

/// A cluster's identity and settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Made at its founding, or anew when it was recovered from a lost quorum.
    pub id: ClusterId,
    /// When it was founded.
    pub founded_at: Stamp,
    /// What operators set.
    pub settings: Settings,
    /// What it was before each recovery, the oldest first.
    pub former: Vec<Former>,
    /// Which lease times were in force before they were changed.
    pub outlived: Option<Outlived>,
}

/// The longest lease times that were in force shortly before the present ones. A leader that did not
/// see the change must not call a node lost whose lease was granted by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlived {
    /// As in [`Settings::lease_ttl`].
    pub lease_ttl: Duration,
    /// As in [`Settings::lease_grace`].
    pub lease_grace: Duration,
    /// When they were changed last.
    pub changed_at: Stamp,
}

impl Outlived {
    /// Within this time of one change the longest figures of all changes count. Far longer than any
    /// lease and its grace, and than the clocks of proposers are apart.
    const MERGED_WITHIN_MS: u64 = 24 * 3600 * 1000;

    /// What is outlived once `old` is replaced at `at`, after `known` was outlived before.
    pub(crate) fn by(known: Option<Self>, old: Settings, at: Stamp) -> Self {
        let recent =
            known.filter(|known| at.0.abs_diff(known.changed_at.0) < Self::MERGED_WITHIN_MS);
        let (ttl, grace) =
            recent.map_or_else(Default::default, |it| (it.lease_ttl, it.lease_grace));
        Self {
            lease_ttl: old.lease_ttl.max(ttl),
            lease_grace: old.lease_grace.max(grace),
            changed_at: at,
        }
    }
}

impl From<Outlived> for pb::Outlived {
    fn from(outlived: Outlived) -> Self {
        Self {
            lease_ttl_ms: millis(outlived.lease_ttl),
            lease_grace_ms: millis(outlived.lease_grace),
            changed_at_ms: outlived.changed_at.0,
        }
    }
}

impl From<pb::Outlived> for Outlived {
    fn from(wire: pb::Outlived) -> Self {
        Self {
            lease_ttl: Duration::from_millis(wire.lease_ttl_ms.into()),
            lease_grace: Duration::from_millis(wire.lease_grace_ms.into()),
            changed_at: Stamp(wire.changed_at_ms),
        }
    }
}

/// Settings are checked to be far below what this could cut off.
fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// A cluster that lost its quorum for good, and was recovered under another id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Former {
    /// Its id. Whoever still goes by it is of the past.
    pub id: ClusterId,
    /// Its last entry that went on to be the recovered cluster's.
    pub last: u64,
}

/// What operators set for all nodes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Most voters: 1, 3, 5 or 7.
    pub max_voters: u32,
    /// Most members that receive the log without voting; nodes past it are mirrors.
    pub max_learners: u32,
    /// How long a node's lease runs after it was asked for.
    pub lease_ttl: Duration,
    /// How long guests stay frozen after their lease before they are killed.
    pub lease_grace: Duration,
    /// On how many nodes each snapshot shall lie.
    pub replicas: u32,
    /// Requests a second that one node takes of one API key; 0 for what nodes take where nothing is said.
    pub key_rate: u32,
    /// How many of those may come at once after a pause.
    pub key_burst: u32,
}

/// One node and its disk may be lost.
const DEFAULT_REPLICAS: u32 = 2;

impl Default for Settings {
    /// The figures of the lease are reasoned about in the node's `cluster/lease.rs`.
    fn default() -> Self {
        Self {
            max_voters: 5,
            max_learners: 32,
            lease_ttl: Duration::from_secs(10),
            lease_grace: Duration::from_secs(60),
            replicas: DEFAULT_REPLICAS,
            key_rate: 0,
            key_burst: 0,
        }
    }
}

impl Settings {
    /// Says what is wrong with settings that no cluster can work with.
    ///
    /// # Errors
    /// The broken rule, in words.
    pub fn check(&self) -> Result<(), String> {
        const LEAST_TTL: Duration = Duration::from_secs(1);
        const MOST_TTL: Duration = Duration::from_secs(600);
        /// Past this the clocks of two hosts could drift apart by more than a lease's margin.
        const MOST_GRACE: u32 = 9;
        /// Each learner costs the leader a stream; past this they belong behind mirrors.
        const MOST_LEARNERS: u32 = 64;
        /// More are no safer than the cluster's own records, which lie on as many voters.
        const MOST_REPLICAS: u32 = 7;
        /// Beyond what a node answers in a second; whoever wants more wants no limit.
        const MOST_RATE: u32 = 100_000;
        if !matches!(self.max_voters, 1 | 3 | 5 | 7) {
            return Err(format!(
                "max_voters is 1, 3, 5 or 7, not {}",
                self.max_voters
            ));
        }
        if self.max_learners > MOST_LEARNERS {
            return Err(format!("max_learners is at most {MOST_LEARNERS}"));
        }
        if self.lease_ttl < LEAST_TTL || self.lease_ttl > MOST_TTL {
            return Err("lease_ttl is 1 s to 10 min".into());
        }
        if self.lease_grace > self.lease_ttl * MOST_GRACE {
            return Err("lease_grace is at most nine times lease_ttl".into());
        }
        if !(1..=MOST_REPLICAS).contains(&self.replicas) {
            return Err(format!("replicas is 1 to {MOST_REPLICAS}"));
        }
        if self.key_rate > MOST_RATE || self.key_burst > MOST_RATE {
            return Err(format!("key_rate and key_burst are {MOST_RATE} at most"));
        }
        if (self.key_rate == 0) != (self.key_burst == 0) {
            return Err("key_rate and key_burst are set together, or both 0".into());
        }
        Ok(())
    }
}

impl From<&Cluster> for pb::ClusterRow {
    fn from(cluster: &Cluster) -> Self {
        Self {
            id: cluster.id.0.to_vec(),
            founded_at_ms: cluster.founded_at.0,
            settings: Some(cluster.settings.into()),
            former: cluster.former.iter().map(Into::into).collect(),
            outlived: cluster.outlived.map(Into::into),
        }
    }
}

impl TryFrom<pb::ClusterRow> for Cluster {
    type Error = BadRow;

    fn try_from(row: pb::ClusterRow) -> Result<Self, BadRow> {
        Ok(Self {
            id: ClusterId(array("cluster id", &row.id)?),
            founded_at: Stamp(row.founded_at_ms),
            settings: some("settings", row.settings)?.into(),
            former: row
                .former
                .into_iter()
                .map(Former::try_from)
                .collect::<Result<_, _>>()?,
            outlived: row.outlived.map(Into::into),
        })
    }
}

impl From<&Former> for pb::FormerCluster {
    fn from(former: &Former) -> Self {
        Self {
            id: former.id.0.to_vec(),
            last: former.last,
        }
    }
}

impl TryFrom<pb::FormerCluster> for Former {
    type Error = BadRow;

    fn try_from(row: pb::FormerCluster) -> Result<Self, BadRow> {
        Ok(Self {
            id: ClusterId(array("former cluster id", &row.id)?),
            last: row.last,
        })
    }
}

impl From<Settings> for pb::Settings {
    fn from(settings: Settings) -> Self {
        Self {
            max_voters: settings.max_voters,
            max_learners: settings.max_learners,
            lease_ttl_ms: millis(settings.lease_ttl),
            lease_grace_ms: millis(settings.lease_grace),
            replicas: settings.replicas,
            key_rate: settings.key_rate,
            key_burst: settings.key_burst,
        }
    }
}

impl From<pb::Settings> for Settings {
    fn from(wire: pb::Settings) -> Self {
        Self {
            max_voters: wire.max_voters,
            max_learners: wire.max_learners,
            lease_ttl: Duration::from_millis(wire.lease_ttl_ms.into()),
            lease_grace: Duration::from_millis(wire.lease_grace_ms.into()),
            replicas: match wire.replicas {
                0 => DEFAULT_REPLICAS,
                asked => asked,
            },
            key_rate: wire.key_rate,
            key_burst: wire.key_burst,
        }
    }
}
