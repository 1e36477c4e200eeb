//! Going on from one survivor after a quorum is lost for good.
//!
//! ```text
//! offline   survey > plan > recovered.json (new id, who is lost) > raft: this node is the only voter
//! start     leads alone, nobody let in > RecoverCluster > member.json > recovered.json goes > as ever
//! leader    the leases of the lost run out, 12 s to 72 s later > RemoveNode for each
//! ```
//!
//! The order makes a crash harmless anywhere: with an order that raft never carried out the node
//! does not start, and one it did is finished before the node hears anybody, so nobody of the old
//! cluster is ever spoken to as one of ours. Nothing is taken away: the log keeps the old
//! membership and everything before it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use proto::ids::{ClusterId, NodeId};
use raft::command::{Command, Proposal};
use raft::group::{self, Group, GroupConfig, Position, ProposeError, RecoverError};
use raft::state::State;
use serde::{Deserialize, Serialize};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::member::{Member, MemberFileError};
use super::membership::Belonging;
use super::{FOUNDER, RunError, disk};
use crate::base::chain::chain;
use crate::base::clock::{Clock as _, SystemClock};
use crate::cluster::recovery::{Plan, Refused, Survey, plan};
use crate::cluster::{Roster, View};
use crate::store::{DataDir, DataPaths, OpenDataDirError, durable};

/// What a recovery leaves for the next start.
const RECOVERY_FILE: &str = "recovered.json";
/// Layout of that file.
const FORMAT: u32 = 1;
/// Longest the only voter may take for one entry: its own disk is all it waits for.
const ENTRY_TIMEOUT: time::Duration = time::Duration::from_secs(30);

/// Why nothing was recovered, or looked at. Unless it is [`Self::Raft`] or [`Self::File`], nothing
/// was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecoverNodeError {
    /// No node keeps its state there.
    #[error("{} is no data directory of a node", .0.display())]
    NoNode(PathBuf),
    /// It is in use, or not ours.
    #[error("open the data directory; the node must be stopped")]
    Data(#[from] OpenDataDirError),
    /// What the node remembers of its membership cannot be used.
    #[error("find out which node this is")]
    Member(#[from] MemberFileError),
    /// The log cannot be read, or the new membership cannot be written.
    #[error("use this node's log")]
    Raft(#[from] RecoverError),
    /// The order makes no sense.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Something has changed between the look and the deed.
    #[error("the log has changed since it was looked at; look again")]
    Changed,
    /// The order cannot be written down.
    #[error("write {}", .0.display())]
    File(PathBuf, #[source] io::Error),
}

/// An order that was carried out on raft and has to be told to the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Order {
    format: u32,
    /// What the cluster is called from now on.
    cluster: String,
    /// The last entry that goes on.
    last: u64,
    /// Ids of the lost.
    lost: Vec<u64>,
}

/// Looks at a stopped node. Blocks.
///
/// # Errors
/// [`RecoverNodeError`]; nothing was changed.
pub fn survey(data_dir: &Path) -> Result<Survey, RecoverNodeError> {
    let data = open(data_dir)?;
    survey_open(data.paths())
}

/// Makes this stopped node the only voter and gives up `lost`; `expected` is the last entry as a
/// person has seen it. Returns the new id of the cluster. Blocks.
///
/// # Errors
/// [`RecoverNodeError`].
pub fn recover(
    data_dir: &Path,
    lost: &BTreeSet<NodeId>,
    expected: Position,
) -> Result<ClusterId, RecoverNodeError> {
    let data = open(data_dir)?;
    let paths = data.paths();
    let survey = survey_open(paths)?;
    let plan = plan(&survey, lost)?;
    if plan.last != expected {
        return Err(RecoverNodeError::Changed);
    }
    let cluster = ClusterId(rand::random());
    let order = Order {
        format: FORMAT,
        cluster: cluster.to_string(),
        last: plan.last.index,
        lost: lost.iter().map(|id| id.0).collect(),
    };
    order.save(paths)?;
    order.carry_out(paths, &survey, &plan)?;
    Ok(cluster)
}

/// Opens the directory of a node, which must be there already, and keeps the daemon out.
fn open(data_dir: &Path) -> Result<DataDir, RecoverNodeError> {
    let paths = DataPaths::new(data_dir);
    if !paths.version_file().exists() {
        return Err(RecoverNodeError::NoNode(data_dir.to_owned()));
    }
    Ok(DataDir::open(data_dir)?)
}

fn survey_open(paths: &DataPaths) -> Result<Survey, RecoverNodeError> {
    let member = Member::load(paths.root())?;
    let log = group::inspect(&paths.raft(), &paths.state())?;
    Ok(Survey {
        node: member.as_ref().map_or(FOUNDER, |member| member.node),
        cluster: member.map(|it| it.roster.cluster).unwrap_or_default(),
        log,
    })
}

impl Order {
    fn file(paths: &DataPaths) -> PathBuf {
        paths.root().join(RECOVERY_FILE)
    }

    fn save(&self, paths: &DataPaths) -> Result<(), RecoverNodeError> {
        let bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        let path = Self::file(paths);
        durable::write(&path, &bytes).map_err(|err| RecoverNodeError::File(path, err))
    }

    fn load(paths: &DataPaths) -> Result<Option<(Self, ClusterId)>, RunError> {
        let bytes = match std::fs::read(Self::file(paths)) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(disk("read the recovery's order")(err)),
        };
        let order: Option<Self> = serde_json::from_slice(&bytes).ok();
        let order = order.filter(|order| order.format == FORMAT);
        order
            .and_then(|order| order.cluster.parse().ok().map(|cluster| (order, cluster)))
            .map(Some)
            .ok_or_else(|| {
                let why = format!("{RECOVERY_FILE} is damaged; run the recovery again");
                disk("read the recovery's order")(io::Error::new(io::ErrorKind::InvalidData, why))
            })
    }

    fn remove(paths: &DataPaths) -> Result<(), RunError> {
        std::fs::remove_file(Self::file(paths))
            .and_then(|()| durable::sync_dir(paths.root()))
            .map_err(disk("put the recovery's order away"))
    }

    fn carry_out(
        &self,
        paths: &DataPaths,
        survey: &Survey,
        plan: &Plan,
    ) -> Result<(), RecoverNodeError> {
        let mut keep: BTreeMap<_, _> = survey.log.members.clone();
        keep.retain(|id, _| plan.kept.contains_key(id));
        // The plan has this node among the members.
        let own = survey.log.members.get(&survey.node).cloned();
        let own = own.ok_or(Refused::NoMember(survey.node))?;
        let config = GroupConfig::new(paths.raft(), paths.state(), survey.node, own);
        group::recover(&config, keep)?;
        Ok(())
    }
}

/// Finishes a recovery that was ordered while the node was stopped, if there is one: before this
/// node hears or is heard by anybody.
pub(super) async fn finish(
    group: &Group<State>,
    paths: &DataPaths,
    belonging: &mut Belonging,
) -> Result<(), RunError> {
    let Some((order, cluster)) = Order::load(paths)? else {
        return Ok(());
    };
    let metrics = group.metrics();
    let mut voters = metrics.members.iter().filter(|(_, member)| member.voter);
    let alone = voters.next().is_some_and(|(id, _)| *id == belonging.node);
    if !alone || voters.next().is_some() {
        return Err(RunError::HalfRecovered(Order::file(paths)));
    }
    group.bootstrap().await?;
    let recover = Command::RecoverCluster {
        id: cluster,
        last: order.last,
        lost: order.lost.iter().copied().map(NodeId).collect(),
    };
    propose(group, recover).await?;
    let (state, applied) = {
        let seen = group.state();
        let seen = seen.borrow();
        (seen.state.clone(), seen.applied.unwrap_or(0))
    };
    belonging.told = Roster::of(&state, applied);
    remember(paths, belonging.node, &belonging.told)?;
    Order::remove(paths)?;
    info!(%cluster, lost = ?order.lost, "the cluster was recovered from this node");
    Ok(())
}

async fn propose(group: &Group<State>, command: Command) -> Result<(), RunError> {
    let proposal = Proposal {
        at: SystemClock.now(),
        command,
    };
    let deadline = (Instant::now() + ENTRY_TIMEOUT).into_std();
    let proposed = group.propose(proposal.encode(), deadline).await;
    let proposed = proposed.map_err(|err: ProposeError| RunError::Broke(chain(&err)))?;
    raft::wire::decode_answer(&proposed.answer).map_err(|err| RunError::Broke(chain(&err)))?;
    Ok(())
}

fn remember(paths: &DataPaths, node: NodeId, roster: &Roster) -> Result<(), MemberFileError> {
    let roster = roster.clone();
    Member { node, roster }.save(paths.root())
}

/// Writes the membership down anew whenever the cluster goes by another id than this node
/// remembers: it was founded, or recovered by another node. So an older one is refused from the
/// first moment of the next start.
pub(super) async fn keep_remembering(
    mut view: View,
    paths: DataPaths,
    belonging: (NodeId, ClusterId),
    stop: CancellationToken,
) {
    let (node, mut known) = belonging;
    let keep = async {
        loop {
            // In this order: the state may be newer than the index, never older.
            let applied = view.applied();
            let state = view.state();
            if state.cluster().is_some_and(|cluster| cluster.id != known) {
                let roster = Roster::of(&state, applied);
                match remember(&paths, node, &roster) {
                    Ok(()) => known = roster.cluster,
                    Err(err) => warn!(err = chain(&err), "could not write the membership down"),
                }
            }
            if !view.changed().await {
                return;
            }
        }
    };
    stop.run_until_cancelled(keep).await;
}
