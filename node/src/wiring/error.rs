//! Why a node does not run.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use proto::ids::{ClusterId, NodeId};
use raft::group::{BootstrapError, OpenError};
use transport::identity::IdentityError;

use super::member::MemberFileError;
use crate::cluster::ProposeError;
use crate::cluster::join::JoinError;
use crate::net::NetError;
use crate::store::{OpenDataDirError, OpenStoreError};
use crate::template::OpenCatalogError;
use crate::vmm::UnknownVersion;
use crate::vmm::probe::ProbeError;

/// Why a node could not start, or stopped by itself.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The data directory cannot be used.
    #[error("open the data directory")]
    Data(#[from] OpenDataDirError),
    /// The guest images are not there.
    #[error("open the guest images")]
    Images(#[from] OpenCatalogError),
    /// No hypervisor runs a guest here.
    #[error("find out how to run guests")]
    Probe(#[from] ProbeError),
    /// The hypervisor is a release that we do not know.
    #[error("use this hypervisor")]
    VmmVersion(#[from] UnknownVersion),
    /// The hypervisor asked for does not run guests here.
    #[error("the accelerator {wanted} does not run guests here: {why}")]
    Accelerator {
        /// What the configuration asks for.
        wanted: &'static str,
        /// How it failed.
        why: String,
    },
    /// The node's key cannot be used.
    #[error("load the node's key")]
    Identity(#[from] IdentityError),
    /// The store of snapshots cannot be opened.
    #[error("open the store of snapshots")]
    Store(#[from] OpenStoreError),
    /// The replicated log cannot be used.
    #[error("open the replicated log")]
    Raft(#[from] OpenError),
    /// What this node remembers of its membership cannot be used.
    #[error("find out which cluster this node belongs to")]
    Member(#[from] MemberFileError),
    /// The log of this node cannot be looked at.
    #[error("look at this node's log")]
    Inspect(#[from] raft::group::RecoverError),
    /// The cluster did not let this node in.
    #[error("join the cluster")]
    Join(#[from] JoinError),
    /// The token is for another cluster than the one this node belongs to.
    #[error(
        "this data directory belongs to the cluster {ours}, the join token is for {theirs}; use \
         another --data-dir, or remove this one if nothing in it is wanted"
    )]
    OtherCluster {
        /// The one it belongs to.
        ours: ClusterId,
        /// The one it was to join.
        theirs: ClusterId,
    },
    /// The node was let in, and nothing came of it.
    #[error("joined as {node}, but the cluster's state did not arrive within {waited:?}")]
    NoState {
        /// Its id.
        node: NodeId,
        /// How long was waited.
        waited: Duration,
    },
    /// A recovery was ordered, and the log does not have it.
    #[error(
        "a recovery of this node was begun and not finished: run `wrenn node recover` again, or, to \
         go on in the old cluster, remove {}", .0.display()
    )]
    HalfRecovered(PathBuf),
    /// This node has founded its cluster, and has no log any more.
    #[error(
        "this node founded its cluster and its log in {} is gone: restore it; or, if other nodes \
         are left, remove this one there, remove the data directory and join with a new token",
        .0.display()
    )]
    LogLost(PathBuf),
    /// The cluster took this node out.
    #[error(
        "this node was removed from its cluster; its capsules are ended. To use the host again, \
         remove the data directory and join with a new token"
    )]
    Removed,
    /// The cluster of one could not be formed.
    #[error("form the cluster")]
    Bootstrap(#[from] BootstrapError),
    /// The node could not tell the cluster about itself.
    #[error("tell the cluster about this node")]
    Announce(#[from] ProposeError),
    /// The network could not be prepared.
    #[error("prepare the network")]
    Network(#[from] NetError),
    /// Another node of this host has the network slots.
    #[error("another node of this host uses the slots from {base} on; give each its own slot_base")]
    SlotsTaken {
        /// Where the range begins.
        base: u16,
    },
    /// The address for other nodes cannot be used.
    #[error("listen for other nodes")]
    Transport(#[from] transport::StartError),
    /// The API's address cannot be used.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// A file or a directory of the node's own cannot be used.
    #[error("{what}")]
    Disk {
        /// What was tried.
        what: &'static str,
        /// What the disk says.
        source: io::Error,
    },
    /// A part of the node broke; its log says which.
    #[error("the node cannot go on: {0}")]
    Broke(String),
    /// Processes of the node cannot be ended.
    #[error("end the processes of {dir:?}")]
    Processes {
        /// The sandbox's directory.
        dir: PathBuf,
        /// What stands in the way.
        source: crate::shim::error::SweepError,
    },
}
