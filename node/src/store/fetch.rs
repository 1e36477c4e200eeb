//! Fetching a snapshot from nodes that have it.
//!
//! One holder after the other is asked for whatever is missing by then, so that one that dies, stalls
//! or sends wrong bytes costs what it still owed. Nothing from a peer is believed: the snapshot is
//! signed by a node that may seal and hashes to the name it was asked for by, each manifest and each
//! chunk to its own. What has arrived counts only when all of it is here and durable.

use std::fmt;
use std::io;
use std::time::Duration;

use futures::future::BoxFuture;
use proto::ids::{NodeId, NodeKey};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time;
use tracing::{info, warn};

use super::chunk::{CHUNK_BYTES, ChunkId};
use super::engine::{Kept, Store};
use super::error::{DecodeManifestError, DecodeSnapshotError, SealError};
use super::manifest::Manifest;
use super::seal::Seal;
use super::serve::{NAMES_AT_ONCE, blocking, header_for};
use super::snapshot::{MAX_SIGNED_BYTES, SignedSnapshot, SnapshotDigest};
use crate::base::chain::chain;

/// Longest a peer may keep silent while it owes something: a disk that is slow, not one that hangs.
const STALL: Duration = Duration::from_secs(20);
/// Largest manifest that is taken in: that of an image of 100 GiB without a hole.
const MAX_MANIFEST_BYTES: u32 = 64 << 20;

/// A stream to a peer.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// Who has snapshots, and the way to them. Joined in wiring.
pub trait Holders: fmt::Debug + Send + Sync + 'static {
    /// The nodes to ask for a snapshot, the likeliest first, without this one.
    fn holders(&self, digest: SnapshotDigest) -> Vec<NodeId>;

    /// Opens a stream to the store of `node`.
    fn open(&self, node: NodeId, header: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>>;

    /// Whether a node with this key seals, or sealed, for this cluster.
    fn may_seal(&self, key: &NodeKey) -> bool;
}

/// A node that knows no other.
#[derive(Clone, Copy, Debug)]
pub struct NoHolders;

impl Holders for NoHolders {
    fn holders(&self, _: SnapshotDigest) -> Vec<NodeId> {
        Vec::new()
    }

    fn open(&self, _: NodeId, _: Vec<u8>) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        Box::pin(async { Err(io::ErrorKind::NotConnected.into()) })
    }

    fn may_seal(&self, _: &NodeKey) -> bool {
        false
    }
}

/// Why a snapshot could not be fetched.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Nobody who has it could be asked, or could give all of it.
    #[error("no node that has snapshot {digest} could give all of it: {tried}")]
    NoHolder {
        /// Which.
        digest: SnapshotDigest,
        /// What came of each.
        tried: String,
    },
    /// This node's store does not take it.
    #[error("store the snapshot")]
    Store(#[from] SealError),
    /// The work was cut short.
    #[error("finish fetching")]
    Cut(#[source] io::Error),
}

/// What one holder did wrong.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("talk to it")]
    Stream(#[from] io::Error),
    #[error("it said nothing for {STALL:?}")]
    Stalled,
    #[error("it sent a part of {0} bytes, which is too long")]
    TooLong(u32),
    #[error("it sent another snapshot")]
    Another,
    #[error("read its snapshot")]
    Snapshot(#[from] DecodeSnapshotError),
    #[error("read a manifest of its")]
    Manifest(#[from] DecodeManifestError),
    #[error("it sent another manifest")]
    AnotherManifest,
    #[error("it does not have chunk {0}")]
    Lacks(ChunkId),
    #[error("store what it sent")]
    Store(#[from] SealError),
}

impl Store {
    /// Makes sure that all of a snapshot is here; it is kept as long as the answer lives.
    ///
    /// # Errors
    /// See [`FetchError`]. What has arrived is found again by the next try, until a collection.
    pub async fn fetch(
        &self,
        digest: SnapshotDigest,
        holders: &dyn Holders,
    ) -> Result<Kept, FetchError> {
        let store = self.clone();
        let here = blocking(move || store.has_all_of(digest)).await;
        if let Some(kept) = here.map_err(FetchError::Cut)? {
            return Ok(kept);
        }
        let mut tried = Vec::new();
        for node in holders.holders(digest) {
            let began = time::Instant::now();
            match self.fetch_from(node, digest, holders).await {
                Ok(kept) => {
                    info!(%digest, %node, took = ?began.elapsed(), "fetched a snapshot");
                    return Ok(kept);
                }
                Err(Failed::Store(err)) => return Err(err.into()),
                Err(err) => {
                    let why = chain(&err);
                    warn!(%digest, %node, why, "a snapshot could not be fetched from a holder");
                    tried.push(format!("{node}: {why}"));
                }
            }
        }
        let tried = match tried.is_empty() {
            true => "there is none".to_owned(),
            false => tried.join("; "),
        };
        Err(FetchError::NoHolder { digest, tried })
    }

    /// Keeps a snapshot of which nothing is missing here.
    fn has_all_of(&self, digest: SnapshotDigest) -> Option<Kept> {
        let signed = self.snapshot(&digest).ok()?;
        let kept = self.keep([super::Pin::Snapshot(digest)]);
        let images = signed.manifest().images();
        let whole = images.iter().all(|image| {
            let manifest = self.image(&image.digest);
            manifest.is_ok_and(|manifest| self.missing(&manifest).is_empty())
        });
        whole.then_some(kept)
    }

    async fn fetch_from(
        &self,
        node: NodeId,
        digest: SnapshotDigest,
        holders: &dyn Holders,
    ) -> Result<Kept, Failed> {
        let header = header_for(digest).to_vec();
        let mut wire = patiently(holders.open(node, header)).await?;
        let signed = read_part(&mut wire, to_u32(MAX_SIGNED_BYTES)).await?;
        let signed = SignedSnapshot::decode(&signed, |key| holders.may_seal(key))?;
        if signed.digest() != digest {
            return Err(Failed::Another);
        }
        let mut owed = Vec::new();
        let mut seal = self.begin();
        for image in signed.manifest().images() {
            let bytes = read_part(&mut wire, MAX_MANIFEST_BYTES).await?;
            let store = self.clone();
            let taken = blocking(move || {
                let manifest = Manifest::decode(&bytes)?;
                // From now on the chunks that are here are held.
                if seal.put_image(&manifest) != image.digest {
                    return Err(Failed::AnotherManifest);
                }
                Ok((store.missing(&manifest), seal))
            });
            let (missing, held) = taken.await??;
            owed.extend(missing);
            seal = held;
        }
        for names in owed.chunks(NAMES_AT_ONCE) {
            seal = fetch_chunks(&mut wire, names, seal).await?;
        }
        // All that it owed is here: one that is gone by now, or does not listen, has not failed.
        let goodbye = async {
            wire.write_u16(0).await?;
            wire.flush().await
        };
        let _unheard = patiently(goodbye).await;
        let finished = blocking(move || seal.finish(Some(&signed))).await?;
        Ok(finished?)
    }
}

/// Asks for some chunks and stores them.
async fn fetch_chunks(
    wire: &mut Box<dyn Wire>,
    names: &[ChunkId],
    seal: Seal,
) -> Result<Seal, Failed> {
    let count = u16::try_from(names.len()).map_err(io::Error::other)?;
    let ask = async {
        wire.write_u16(count).await?;
        for name in names {
            wire.write_all(&name.0).await?;
        }
        wire.flush().await
    };
    patiently(ask).await?;
    let mut chunks = Vec::with_capacity(names.len());
    for name in names {
        let chunk = read_part(wire, to_u32(CHUNK_BYTES)).await?;
        if chunk.is_empty() {
            return Err(Failed::Lacks(*name));
        }
        chunks.push((*name, chunk));
    }
    let stored = blocking(move || {
        for (name, chunk) in &chunks {
            seal.put_named(*name, chunk)?;
        }
        Ok::<_, SealError>(seal)
    });
    match stored.await? {
        // What it sent is not what it was asked for: its fault, not this store's.
        Err(SealError::NotTheChunk { chunk }) => Err(Failed::Lacks(chunk)),
        stored => Ok(stored?),
    }
}

async fn read_part(wire: &mut Box<dyn Wire>, most: u32) -> Result<Vec<u8>, Failed> {
    let length = patiently(wire.read_u32()).await?;
    if length > most {
        return Err(Failed::TooLong(length));
    }
    // Memory only for what has come, or is about to.
    let (mut part, whole) = (Vec::new(), length as usize);
    while part.len() < whole {
        let from = part.len();
        part.resize(whole.min(from + CHUNK_BYTES), 0);
        patiently(wire.read_exact(&mut part[from..])).await?;
    }
    Ok(part)
}

async fn patiently<T>(work: impl Future<Output = io::Result<T>>) -> Result<T, Failed> {
    match time::timeout(STALL, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Failed::Stalled),
    }
}

fn to_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
