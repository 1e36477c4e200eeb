//! Which cluster this node belongs to, and as whom: remembered, joined, or founded.
//!
//! ```text
//! member.json there        that one; a token for the same cluster is not needed any more
//! a log without it         a cluster of one that an earlier version founded
//! neither, and a token     join: make the disk's identity, ask, write member.json
//! neither                  found: choose an id, write member.json
//! ```
//!
//! The file is written before raft opens under the id, and joining again with the same key finds
//! the same id, so a crash anywhere in between is harmless.

use proto::ids::{ClusterId, NodeId};
use proto::units::Stamp;
use proto::version;
use raft::group::{RecoverError, inspect, prepare};
use raft::state::Node;
use tokio::task;
use tracing::info;
use transport::{Identity, Transport};

use super::member::Member;
use super::{FOUNDER, RunError};
use crate::base::clock::{Clock, SystemClock};
use crate::cluster::Roster;
use crate::cluster::join::join;
use crate::cluster::token::{JoinTicket, TokenRole};
use crate::config::Config;
use crate::store::DataPaths;

/// What a node starts with.
pub(super) struct Belonging {
    pub(super) node: NodeId,
    /// Whom it knew when it joined; nobody for a founder.
    pub(super) told: Roster,
    /// It is new: its state has to arrive before it can serve.
    pub(super) is_new: bool,
}

impl Belonging {
    /// Whether this node founded its cluster.
    pub(super) fn is_founder(&self) -> bool {
        self.node == FOUNDER
    }
}

/// Finds out, joins or founds.
pub(super) async fn establish(
    config: &Config,
    paths: &DataPaths,
    identity: &Identity,
    transport: &Transport,
) -> Result<Belonging, RunError> {
    let ticket = config.join.as_deref().map(JoinTicket::from_text);
    let ticket = ticket
        .transpose()
        .map_err(crate::cluster::join::JoinError::from)?;
    if let Some(member) = Member::load(paths.root())? {
        let ours = member.roster.cluster;
        // The token that a service unit still names may be from before a recovery.
        let is_ours = |id| id == ours || member.roster.former.contains(&id);
        if let Some(ticket) = ticket.filter(|ticket| !is_ours(ticket.cluster)) {
            return Err(RunError::OtherCluster {
                ours,
                theirs: ticket.cluster,
            });
        }
        return Ok(Belonging {
            node: member.node,
            told: member.roster,
            is_new: false,
        });
    }
    let has_log = has_log(paths).await?;
    match ticket {
        Some(ticket) if !has_log => join_by(&ticket, config, paths, identity, transport).await,
        Some(ticket) => Err(RunError::OtherCluster {
            ours: ClusterId::default(),
            theirs: ticket.cluster,
        }),
        None => found(paths, !has_log),
    }
}

/// Whether there is a log with anything in it: that of a cluster of one that has no file yet.
async fn has_log(paths: &DataPaths) -> Result<bool, RunError> {
    let (raft, state) = (paths.raft(), paths.state());
    if !raft.join("log").exists() {
        return Ok(false);
    }
    let inspected = task::spawn_blocking(move || inspect(&raft, &state)).await;
    match inspected.map_err(|err| RunError::Broke(err.to_string()))? {
        Ok(inspected) => Ok(!inspected.members.is_empty()),
        // A crash while the folder was made left it without an identity; making it goes on.
        Err(RecoverError::Nothing(_)) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

fn found(paths: &DataPaths, is_new: bool) -> Result<Belonging, RunError> {
    let member = Member {
        node: FOUNDER,
        roster: Roster {
            cluster: ClusterId(rand::random()),
            ..Roster::default()
        },
    };
    member.save(paths.root())?;
    if is_new {
        info!(cluster = %member.roster.cluster, "founding a cluster");
    }
    Ok(Belonging {
        node: member.node,
        told: member.roster,
        is_new: false,
    })
}

async fn join_by(
    ticket: &JoinTicket,
    config: &Config,
    paths: &DataPaths,
    identity: &Identity,
    transport: &Transport,
) -> Result<Belonging, RunError> {
    let role = match ticket.role {
        TokenRole::Member => "member",
        TokenRole::Host => "host",
    };
    info!(cluster = %ticket.cluster, role, "joining");
    let dir = paths.raft();
    let disk = task::spawn_blocking(move || prepare(&dir)).await;
    let disk = disk.map_err(|err| RunError::Broke(err.to_string()))??;
    let node = Node {
        name: config.name.clone(),
        key: identity.key(),
        api_url: config.public_url.clone(),
        cluster_address: config.advertise.to_string(),
        bulk_address: config.advertise_bulk.to_string(),
        disk: disk.0,
        tags: config.tags.clone(),
        version: version::PRODUCT.to_owned(),
        admitted_at: Stamp::default(),
        // What it runs guests with is told once that is known.
        ..Node::default()
    };
    let clock: &dyn Clock = &SystemClock;
    let joined = join(transport, ticket, &node, clock).await?;
    let member = Member {
        node: joined.node,
        roster: joined.roster,
    };
    member.save(paths.root())?;
    info!(node = %member.node, "joined");
    Ok(Belonging {
        node: member.node,
        told: member.roster,
        is_new: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Making the first segment takes seconds on a slow disk.
    #[tokio::test]
    async fn a_crash_while_the_log_was_made_leaves_no_log() {
        let root = tempfile::tempdir().expect("a directory");
        let paths = DataPaths::new(root.path());
        std::fs::create_dir_all(paths.raft().join("log")).expect("made");
        assert!(!has_log(&paths).await.expect("looked at"));
        prepare(&paths.raft()).expect("made whole");
        assert!(!has_log(&paths).await.expect("looked at"));
    }
}
