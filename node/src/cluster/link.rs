//! Raft's network over the mesh.
//!
//! Calls go over the control lane, snapshots over the bulk lane as a stream:
//!
//! ```text
//! sender    header = raft's request | length (u64) | the file > FIN
//! receiver  file into the spool directory > raft > length (u32) | raft's answer > FIN
//! ```
//!
//! Each request begins with the sender's [`lineage`], so that nodes of a cluster that was recovered
//! and such that still live before that never mix.
//!
//! Whoever is heard speaks under its own name: the sender that raft's request names is the node whose
//! key was proven ([`speaker`]).
//!
//! Raft runs on a runtime of its own that has no sockets; everything here is carried out on the
//! daemon's, so that a connection dialled for raft outlives raft's runtime.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto::ids::{NodeId, NodeKey};
use raft::group::Group;
use raft::link::{Link, LinkError};
use raft::snapshot::SnapshotFile;
use raft::state::State;
use raft::types::Node;
use tokio::fs::File;
use tokio::io::{self, AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::time::{self, Instant};
use tokio_util::task::AbortOnDropHandle;
use transport::streams::{Inbound, StreamHandler};
use transport::{Call, Handler, Lane, RpcError, Service};

use super::calls;
use super::feed::Feed;
use super::lineage;
use super::mesh::{Mesh, MeshError};
use super::roster::Contact;
use super::seldom::Seldom;
use super::speaker;

/// Longest a receiver may take from the first byte of a snapshot to its answer.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);
/// Largest snapshot that is taken in: far above 100,000 sandboxes, far below any disk.
const MAX_SNAPSHOT_BYTES: u64 = 8 << 30;
/// Largest answer to a snapshot: a vote.
const MAX_ANSWER_BYTES: u32 = 64 << 10;
/// Longest opening of a snapshot's stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Raft's network, sending end.
#[derive(Clone, Debug)]
pub struct MeshLink {
    mesh: Mesh,
    runtime: Handle,
}

impl MeshLink {
    /// A link over `mesh` that works on the present runtime.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self {
            mesh,
            runtime: Handle::current(),
        }
    }

    /// How raft's member is reached: at the newest addresses, but only under the key that raft's
    /// own membership has.
    fn contact(&self, to: NodeId, node: &Node) -> Option<Contact> {
        let key = NodeKey(node.key);
        if let Some(contact) = self.mesh.roster().nodes.get(&to) {
            return Some(*contact).filter(|contact| contact.key == key);
        }
        let control: SocketAddr = node.address.parse().ok()?;
        Some(Contact {
            id: to,
            key,
            control,
            bulk: control,
        })
    }

    async fn on_runtime<T: Send + 'static>(
        &self,
        to: NodeId,
        work: impl Future<Output = Result<T, LinkError>> + Send + 'static,
    ) -> Result<T, LinkError> {
        let task = AbortOnDropHandle::new(self.runtime.spawn(work));
        task.await.unwrap_or(Err(LinkError::Unreachable(to)))
    }
}

impl Link for MeshLink {
    async fn call(
        &self,
        to: NodeId,
        node: &Node,
        request: Vec<u8>,
        within: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        let contact = self.contact(to, node).ok_or(LinkError::Unreachable(to))?;
        let mesh = self.mesh.clone();
        let call = async move {
            let deadline = Instant::now() + within;
            let request = lineage::stamped(&mesh.roster(), &request);
            let called = mesh.call_contact(contact, calls::RAFT, request.into(), deadline);
            match called.await {
                Ok(answer) => Ok(answer.into()),
                Err(err) => Err(link_error(to, &err)),
            }
        };
        self.on_runtime(to, call).await
    }

    async fn send_snapshot(
        &self,
        to: NodeId,
        _node: &Node,
        request: Vec<u8>,
        file: SnapshotFile,
    ) -> Result<Vec<u8>, LinkError> {
        let mesh = self.mesh.clone();
        let send = async move {
            let sent = time::timeout(SNAPSHOT_TIMEOUT, send(&mesh, to, request, file.path));
            match sent.await {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(err)) => {
                    tracing::warn!(%to, %err, "could not send a snapshot");
                    Err(LinkError::Unreachable(to))
                }
                Err(_) => Err(LinkError::TimedOut(to)),
            }
        };
        self.on_runtime(to, send).await
    }
}

async fn send(mesh: &Mesh, to: NodeId, request: Vec<u8>, path: PathBuf) -> io::Result<Vec<u8>> {
    let file = File::open(&path).await?;
    let length = file.metadata().await?.len();
    let deadline = Instant::now() + OPEN_TIMEOUT;
    let request = lineage::stamped(&mesh.roster(), &request);
    let opened = mesh.open(to, Lane::Bulk, Service::SNAPSHOT, request.into(), deadline);
    let mut stream = opened.await.map_err(io::Error::other)?;
    stream.write_u64(length).await?;
    io::copy(&mut file.take(length), &mut stream).await?;
    stream.shutdown().await?;
    read_short(&mut stream).await
}

async fn read_short(stream: &mut (impl io::AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await?;
    if length > MAX_ANSWER_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut answer = vec![0; length as usize];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

fn link_error(to: NodeId, err: &MeshError) -> LinkError {
    match err {
        MeshError::NoSuchNode(_) | MeshError::Dial { .. } => LinkError::Unreachable(to),
        MeshError::Call { source, .. } => match source {
            RpcError::Deadline => LinkError::TimedOut(to),
            RpcError::Lost { .. } | RpcError::NotConnected { .. } => LinkError::Broken(to),
            // A peer that is starting, stopping or busy: asking again at once would not help.
            _ => LinkError::Unreachable(to),
        },
    }
}

/// The request in `bytes`, if it is of this cluster and `peer` made it in its own name.
fn hear<'a>(
    group: &Group<State>,
    mesh: &Mesh,
    peer: NodeKey,
    bytes: &'a [u8],
) -> Result<&'a [u8], Unheard> {
    let roster = mesh.roster();
    let request = lineage::read(&roster, bytes)?;
    let state = group.state();
    speaker::check(&roster, mesh.here(), &state.borrow().state, &peer, request)?;
    Ok(request)
}

/// Why a request does not get to raft.
#[derive(Debug, thiserror::Error)]
enum Unheard {
    #[error(transparent)]
    Foreign(#[from] lineage::Foreign),
    #[error(transparent)]
    FalseSpeaker(#[from] speaker::FalseSpeaker),
}

/// Raft's network, receiving end: calls.
pub(super) struct RaftCalls {
    /// Who answers.
    pub(super) group: Group<State>,
    /// Which cluster it belongs to.
    pub(super) mesh: Mesh,
    /// Told of every word of the leader.
    pub(super) feed: Feed,
    /// Whether a refusal was said aloud: who lies, or lives before a recovery, does it each second.
    pub(super) complained: AtomicBool,
}

impl Handler for RaftCalls {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        if call.method != calls::RAFT {
            return Err(RpcError::NotServed {
                method: call.method,
            });
        }
        let heard = hear(&self.group, &self.mesh, call.peer, &call.body);
        let request = heard.map_err(|why| {
            if !self.complained.swap(true, Ordering::Relaxed) {
                let peer = call.peer;
                tracing::warn!(%peer, %why, "refused a request of raft; further ones go unmentioned");
            }
            RpcError::rejected(why.to_string())
        })?;
        let answer = self.group.serve(request).await;
        self.feed.heard(&self.group, raft::link::sender(request));
        Ok(answer.into())
    }
}

/// Raft's network, receiving end: snapshots.
pub(super) struct SnapshotStreams {
    /// Where to.
    pub(super) group: Group<State>,
    /// Which cluster it belongs to.
    pub(super) mesh: Mesh,
    /// Where the bytes lie until raft has taken them over.
    pub(super) spool: PathBuf,
    /// Whether a snapshot that was not for this node has been mentioned.
    pub(super) complained: AtomicBool,
    /// How often one that did not arrive is mentioned.
    pub(super) failures: Seldom,
}

impl StreamHandler for SnapshotStreams {
    async fn open(&self, inbound: Inbound) {
        if let Err(err) = time::timeout(SNAPSHOT_TIMEOUT, self.receive(inbound))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            && let Some(left_out) = self.failures.is_due()
        {
            tracing::warn!(%err, left_out, "could not take a snapshot in");
        }
    }
}

impl SnapshotStreams {
    async fn receive(&self, inbound: Inbound) -> io::Result<()> {
        let header = inbound.header.clone();
        let request = match hear(&self.group, &self.mesh, inbound.peer, &header) {
            Ok(request) => request,
            Err(why) => {
                // Told to the sender, who can send thousands of them; here once is enough.
                if !self.complained.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%why, "a peer's snapshot is not for this node; further ones go unmentioned");
                }
                inbound.refuse(why.to_string()).await;
                return Ok(());
            }
        };
        let mut stream = inbound.accept().await.map_err(io::Error::other)?;
        if let Some(refusal) = self.group.refuse_snapshot(request) {
            return answer(&mut stream, &refusal).await;
        }
        let length = stream.read_u64().await?;
        if length > MAX_SNAPSHOT_BYTES {
            return Err(io::Error::other(format!("a snapshot of {length} bytes")));
        }
        let spool = self.spool.clone();
        let made = tokio::task::spawn_blocking(move || {
            tempfile::Builder::new()
                .prefix(".snapshot-")
                .tempfile_in(spool)
        });
        let (file, path) = made.await.map_err(io::Error::other)??.into_parts();
        let mut file = File::from_std(file);
        let copied = io::copy(&mut (&mut stream).take(length), &mut file).await?;
        if copied != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.flush().await?;
        let reply = self.group.serve_snapshot(request, path.to_path_buf());
        let reply = reply.await;
        answer(&mut stream, &reply).await
    }
}

async fn answer(stream: &mut (impl io::AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_u32(length).await?;
    stream.write_all(bytes).await?;
    stream.shutdown().await
}
