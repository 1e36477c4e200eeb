//! Joins the relay to the mesh: who a node id is, and how it is dialled.

use futures::future::BoxFuture;
use proto::ids::{NodeId, NodeKey};
use tokio::time::Instant;
use transport::Lane;

use crate::base::chain::chain;
use crate::cluster::{Mesh, MeshError};
use crate::relay::{PeerError, Ways};

/// The members of the cluster, as the relay finds them.
#[derive(Clone, Debug)]
pub(super) struct MeshWays(pub(super) Mesh);

impl Ways for MeshWays {
    fn connect(
        &self,
        to: NodeId,
        lane: Lane,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<NodeKey, PeerError>> {
        let mesh = self.0.clone();
        Box::pin(async move {
            let connected = mesh.connect(to, lane, deadline).await;
            connected.map_err(|err| match err {
                MeshError::NoSuchNode(_) | MeshError::Dial { .. } => {
                    PeerError::Unreachable(chain(&err))
                }
                MeshError::Call { source, .. } => source.into(),
            })
        })
    }

    fn node_of(&self, key: NodeKey) -> Option<NodeId> {
        self.0.node_of(&key)
    }
}
