//! After a quorum is lost for good: one survivor becomes the only voter.
//!
//! Offline, on a stopped node, by order of a person who has looked at all survivors with
//! [`inspect`] and picked the most advanced. What the cluster acknowledged was on a majority;
//! where a majority is gone, an acknowledged change may be gone with it, and entries that were never
//! acknowledged may become valid. The other survivors must be stopped, and must either be wiped and
//! join anew or be named in `keep`: one that runs on under the old membership would be a second
//! cluster.
//!
//! ```text
//! log       ... | last |
//! recover   ... | last | vote for ourselves in a new term | membership: voter = this node |
//! start     elects itself: its own vote is a majority; everything in the log is applied
//! ```
//!
//! The term lies above everything seen here, so whatever the old leaders may still send is refused.
//! A crash before the membership is durable leaves the old one and a vote that harms nobody; after
//! it the new one. Recovering twice is harmless.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::EntryPayload;
use proto::ids::NodeId;

use super::config::SEGMENT_BYTES;
use super::open::{claim, off_runtime, open_log};
use super::{GroupConfig, OpenError};
use crate::derived;
use crate::disk::{Disk, RealDisk};
use crate::fault::FaultCell;
use crate::identity::Home;
use crate::log::{Log, LogOptions};
use crate::snapshot::Snapshots;
use crate::types::{
    CommittedLeader, DiskId, Entry, Leader, LogId, Membership, Node, SnapshotMeta,
    StoredMembership, Vote,
};

/// A place in the log. Of two survivors the one with the higher term is more advanced, or, in the
/// same term, the one with the higher index: this type sorts that way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The term of the entry's leader.
    pub term: u64,
    /// The entry's index.
    pub index: u64,
}

impl From<LogId> for Position {
    fn from(id: LogId) -> Self {
        Self {
            term: id.leader_id.term,
            index: id.index,
        }
    }
}

/// What a stopped node's folder says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// The last entry, or the last one the state is known to cover. Compare survivors by this.
    pub last: Position,
    /// The highest term this node took part in.
    pub term: u64,
    /// The disk's identity.
    pub disk: DiskId,
    /// The voters of the newest membership found; in a half-done change, of both sets.
    pub voters: BTreeSet<NodeId>,
    /// All its members.
    pub members: BTreeMap<NodeId, Node>,
}

/// What a recovery did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The last entry before.
    pub before: Position,
    /// The last entry now: the new membership.
    pub after: Position,
}

/// Why nothing was recovered, or inspected. Unless it says [`Self::Write`], nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// There is no group in the folder.
    #[error("there is no raft group in {}", .0.display())]
    Nothing(PathBuf),
    /// The order makes no sense.
    #[error("cannot recover: {0}")]
    Refused(&'static str),
    /// The folder cannot be opened: in use, damaged, or failing.
    #[error("open the stopped node's log")]
    Open(#[from] OpenError),
    /// The disk refused. Either the old or the new membership holds; try again.
    #[error("write the new membership")]
    Write(#[source] io::Error),
}

/// What is on disk, open, and where it ends.
struct Survivor {
    log: Log,
    disk_id: DiskId,
    snapshots: Snapshots,
    /// The derived copy, if it is ahead of the log.
    copy: Option<derived::Loaded>,
    last: Option<LogId>,
    membership: StoredMembership,
    /// Released last.
    home: Home,
}

/// Makes this stopped node the only voter, with `keep` as learners. Blocks.
///
/// `config` is the node's usual one: folders, id, and its own record. At its next start it elects
/// itself and applies everything in its log.
///
/// # Errors
/// [`RecoverError`]; also while the folder is in use.
pub fn recover(
    config: &GroupConfig,
    keep: BTreeMap<NodeId, Node>,
) -> Result<Recovered, RecoverError> {
    if keep.contains_key(&config.node_id) {
        return Err(RecoverError::Refused(
            "the survivor is named among the kept",
        ));
    }
    if keep.values().any(|node| node.disk == DiskId::default()) {
        return Err(RecoverError::Refused(
            "the disk of a kept member is not known",
        ));
    }
    off_runtime(|| {
        let survivor = Survivor::open(&config.dir, &config.state_dir)?;
        let recovered = survivor.recover(config, keep);
        survivor.log.stop();
        recovered
    })
}

/// Reads a stopped node's folder, to compare survivors. Blocks.
///
/// `dir` and `state_dir` are those of its [`GroupConfig`].
///
/// # Errors
/// [`RecoverError`]; also while the folder is in use.
pub fn inspect(dir: &Path, state_dir: &Path) -> Result<Inspected, RecoverError> {
    off_runtime(|| {
        let survivor = Survivor::open(dir, state_dir)?;
        let inspected = survivor.inspect();
        survivor.log.stop();
        Ok(inspected)
    })
}

impl Survivor {
    fn open(dir: &Path, state_dir: &Path) -> Result<Self, RecoverError> {
        // Looked at first: opening would make an empty group out of a mistyped path.
        if !dir.join("disk-id").exists() {
            return Err(RecoverError::Nothing(dir.to_owned()));
        }
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let home = claim(dir, disk.as_ref())?;
        let options = LogOptions {
            segment_bytes: SEGMENT_BYTES,
            cache_bytes: 0,
        };
        let (log, disk_id) = open_log(&home, options, &disk, &FaultCell::new())?;
        let (snapshots, newest) =
            Snapshots::open(&home.snapshot_dir(), disk).map_err(OpenError::Snapshots)?;
        let covered = newest.map(|loaded| loaded.meta);
        let copy = copy_ahead(state_dir, log.last());
        let mut last = log.last();
        for covers in [
            covered.as_ref().and_then(|meta| meta.last_log_id),
            copy.as_ref().and_then(|copy| copy.position.applied),
        ] {
            if index(covers) > index(last) {
                last = covers;
            }
        }
        let mut survivor = Self {
            log,
            disk_id,
            snapshots,
            copy,
            last,
            membership: StoredMembership::default(),
            home,
        };
        survivor.membership = survivor.newest_membership(covered)?;
        Ok(survivor)
    }

    /// The newest of the memberships in the snapshot, the copy and the log.
    fn newest_membership(
        &self,
        covered: Option<SnapshotMeta>,
    ) -> Result<StoredMembership, RecoverError> {
        let mut newest = covered.map(|meta| meta.last_membership).unwrap_or_default();
        let copied = self.copy.as_ref().map(|copy| &copy.position.membership);
        if let Some(copied) = copied.filter(|copied| copied.log_id() > newest.log_id()) {
            newest = copied.clone();
        }
        let mut next = self.log.purged().map_or(0, |id| id.index + 1);
        loop {
            let entries = self.log.read_now(next..u64::MAX).map_err(|source| {
                let dir = self.home.log_dir();
                OpenError::Disk(dir, source)
            })?;
            let Some(last) = entries.last() else {
                return Ok(newest);
            };
            next = last.log_id.index + 1;
            for entry in entries {
                if let EntryPayload::Membership(membership) = entry.payload {
                    newest = StoredMembership::new(Some(entry.log_id), membership);
                }
            }
        }
    }

    fn term(&self) -> u64 {
        let voted = self.log.vote().map_or(0, |vote| vote.leader_id.term);
        let last = self.last.map_or(0, |last| last.leader_id.term);
        voted.max(last)
    }

    fn inspect(&self) -> Inspected {
        let membership = self.membership.membership();
        let members = membership.nodes();
        Inspected {
            last: self.last.map_or_else(Position::default, Position::from),
            term: self.term(),
            disk: self.disk_id,
            voters: membership.voter_ids().map(NodeId).collect(),
            members: members
                .map(|(&id, node)| (NodeId(id), node.clone()))
                .collect(),
        }
    }

    fn recover(
        &self,
        config: &GroupConfig,
        keep: BTreeMap<NodeId, Node>,
    ) -> Result<Recovered, RecoverError> {
        let Some(last) = self.last else {
            return Err(RecoverError::Nothing(config.dir.clone()));
        };
        let id = config.node_id.0;
        let known = self.membership.membership().get_node(&id);
        if known.is_none_or(|known| known.disk != self.disk_id) {
            return Err(RecoverError::Refused("this node is no member under its id"));
        }
        let own = Node {
            disk: self.disk_id,
            ..config.node.clone()
        };
        let mut nodes: BTreeMap<u64, Node> =
            keep.into_iter().map(|(id, node)| (id.0, node)).collect();
        nodes.insert(id, own);
        let membership = Membership::new(vec![BTreeSet::from([id])], nodes)
            .map_err(|_| RecoverError::Refused("the membership would have no voter"))?;
        let leader = CommittedLeader {
            term: self.term() + 1,
            node_id: id,
        };
        let entry = Entry {
            log_id: LogId::new(leader, last.index + 1),
            payload: EntryPayload::Membership(membership),
        };
        let after = Position::from(entry.log_id);
        self.write(last, entry).map_err(RecoverError::Write)?;
        tracing::warn!(node = %config.node_id, ?after, "this node is the only voter now");
        Ok(Recovered {
            before: last.into(),
            after,
        })
    }

    fn write(&self, last: LogId, entry: Entry) -> io::Result<()> {
        if self.log.last() != Some(last) {
            self.cover(last)?;
        }
        // Not a leader's vote: until the membership is in the log, this node has no right to lead.
        let vote = Vote {
            leader_id: Leader {
                term: entry.log_id.leader_id.term,
                node_id: entry.log_id.leader_id.node_id,
            },
            committed: false,
        };
        self.log.write_now(vote, vec![entry])
    }

    /// Where the state is ahead of the log (see `store.rs`), the log has to begin behind it.
    fn cover(&self, last: LogId) -> io::Result<()> {
        let is_last = |copy: &&derived::Loaded| copy.position.applied == Some(last);
        if let Some(copy) = self.copy.as_ref().filter(is_last) {
            let meta = SnapshotMeta {
                last_log_id: copy.position.applied,
                last_membership: copy.position.membership.clone(),
            };
            let written = self.snapshots.write(&meta, copy.rows.iter().cloned());
            written.map_err(|fault| io::Error::other(fault.to_string()))?;
        }
        self.log.covered_by_snapshot(last.index);
        self.log.purge_now(last)
    }
}

/// The derived copy in `dir`, if it is whole and ahead of the log, which ends with `last`.
fn copy_ahead(dir: &Path, last: Option<LogId>) -> Option<derived::Loaded> {
    // Opening would make one.
    let copy = dir.join("db").exists().then(|| derived::load(dir).ok())??;
    (index(copy.position.applied) > index(last)).then_some(copy)
}

fn index(id: Option<LogId>) -> Option<u64> {
    id.map(|id| id.index)
}
