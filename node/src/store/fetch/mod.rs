//! Fetching a snapshot from nodes that have it.
//!
//! ```text
//! opening    who is quickest of the holders gives the signed manifest and those of the images
//! run        what is missing, in batches, from several holders at once       (ledger, source)
//! incoming   a snapshot whose memory is still on its way: single chunks before all others (urgent)
//! ```
//!
//! Nothing from a peer is believed: the snapshot is signed by a node that may seal and hashes to the
//! name it was asked for by, each manifest and each chunk to its own. A holder that dies, stalls,
//! lies or lacks a chunk costs what it still owed, and the others give that.
//!
//! What has arrived is found again after a crash of either end, since only what is missing is asked
//! for; while a fetch is under way it is synced every 64 MiB. A snapshot counts as held
//! here when nothing of it is missing. While it is fetched it is held against collections; one whose
//! memory comes last has its manifests here before: they keep what has come.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, ready};
use proto::ids::{NodeId, NodeKey};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time;
use tracing::info;

use super::chunk::ChunkId;
use super::engine::{Kept, Store};
use super::error::{DecodeManifestError, DecodeSnapshotError, SealError};
use super::exchange::blocking;
use super::snapshot::SnapshotDigest;
use crate::base::remedy::Remedy;

mod incoming;
mod ledger;
mod opening;
pub mod progress;
mod run;
mod source;
mod urgent;

pub use incoming::Incoming;
pub use opening::Holding;
pub use urgent::{BringError, Came};

use ledger::Ledger;
use opening::{First, Opened};
use progress::Meter;
use run::{Patience, Run};

/// Longest a peer may keep silent while it owes something: a disk that is slow, not one that hangs.
/// A chunk has to come within it: whoever is slower than 3 KiB a second is no help.
const STALL: Duration = Duration::from_secs(20);
/// How often a fetch whose chunks the disk lost again begins anew.
const ATTEMPTS: usize = 3;

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

    /// Waits until [`Self::holders`] answers by all that the cluster has acknowledged; false where
    /// that cannot be had now. Nothing is given up by what may be an old list.
    fn renew(&self) -> BoxFuture<'_, bool> {
        Box::pin(ready(true))
    }

    /// What people call a node.
    fn name(&self, node: NodeId) -> String {
        node.to_string()
    }
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

impl FetchError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::NoHolder { .. } | Self::Cut(_) => Remedy::RetryLater,
            Self::Store(err) => err.remedy(),
        }
    }
}

/// What one holder did wrong.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("talk to it")]
    Stream(#[from] io::Error),
    #[error("it said nothing for {0:?}")]
    Stalled(Duration),
    #[error("it sent a snapshot manifest of {0} bytes, which is too long")]
    TooLong(u32),
    #[error(
        "the manifest of an image has {0} bytes, which is too long: images with more than some 100 GiB in use cannot be fetched"
    )]
    ManifestTooLong(u32),
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
    #[error("it sent wrong bytes for chunk {0}")]
    Wrong(ChunkId),
    #[error("store what it sent")]
    Store(#[from] SealError),
}

impl Failed {
    /// Whether a node that keeps to the rules would never do this. One that has a very large image
    /// has a very long manifest of it: that it is not taken in here is nobody's fault.
    fn is_lie(&self) -> bool {
        match self {
            Self::TooLong(_)
            | Self::Another
            | Self::Snapshot(_)
            | Self::Manifest(_)
            | Self::AnotherManifest
            | Self::Wrong(_) => true,
            Self::Stream(err) => err.kind() == io::ErrorKind::InvalidData,
            Self::ManifestTooLong(_) | Self::Stalled(_) | Self::Lacks(_) | Self::Store(_) => false,
        }
    }

    /// Whether it was reached and has no sound copy of what it was asked for.
    fn is_answer(&self) -> bool {
        matches!(self, Self::Lacks(_)) || self.is_lie()
    }
}

impl Store {
    /// Makes sure that all of a snapshot is here; it is kept as long as the answer lives.
    ///
    /// # Errors
    /// See [`FetchError`]; [`FetchError::NoHolder`] once every holder was tried. What has arrived is
    /// found again by the next try, until a collection.
    pub async fn fetch(
        &self,
        digest: SnapshotDigest,
        holders: &dyn Holders,
    ) -> Result<Kept, FetchError> {
        let (opened, first) = opening::open(self, digest, holders).await?;
        let meter = Meter::default();
        let (part, patience) = (Part::Whole, Patience::Bounded);
        self.fetch_part(&opened, first, part, holders, &meter, patience)
            .await
    }

    /// Makes sure that everything of a snapshot but its memory is here and durable. The memory
    /// comes chunk by chunk, as the answer is asked for it.
    ///
    /// # Errors
    /// As [`Self::fetch`]. Where all that is here already, no holder is needed.
    pub async fn fetch_lazily(
        &self,
        digest: SnapshotDigest,
        holders: Arc<dyn Holders>,
    ) -> Result<Incoming, FetchError> {
        let (opened, first) = opening::open(self, digest, holders.as_ref()).await?;
        let meter = Meter::default();
        // A disk alone has no memory that could come later.
        let part = match opened.signed.manifest().running {
            Some(_) => Part::AllButMemory,
            None => Part::Whole,
        };
        let patience = Patience::Bounded;
        let fetched = self.fetch_part(&opened, first, part, holders.as_ref(), &meter, patience);
        let kept = fetched.await?;
        Ok(Incoming::new(
            self.clone(),
            holders,
            opened.signed,
            meter,
            kept,
        ))
    }

    /// Fetches what is missing of that part, makes it durable and keeps it.
    async fn fetch_part(
        &self,
        opened: &Opened,
        mut first: First,
        part: Part,
        holders: &dyn Holders,
        meter: &Meter,
        patience: Patience,
    ) -> Result<Kept, FetchError> {
        for _ in 0..ATTEMPTS {
            let owed = self.owed(opened, part).await?;
            if !owed.is_empty() {
                let digest = opened.signed.digest();
                meter.begin(opened.whole_bytes(), &self.owed(opened, Part::Whole).await?);
                let _shown = self.core.transfers.show(digest, meter);
                let run = Run {
                    store: self,
                    holders,
                    digest,
                    patience,
                    ledger: Ledger::new(owed),
                    meter,
                };
                let began = time::Instant::now();
                run.finish(first.take()).await?;
                let (took, progress) = (began.elapsed(), meter.now());
                info!(%digest, ?part, ?took, ?progress, "fetched of a snapshot");
            }
            if let Some(kept) = self.seal_fetched(opened, part).await? {
                return Ok(kept);
            }
        }
        Err(SealError::Lost.into())
    }

    /// Makes durable what was fetched, with its manifests, and keeps it. `None` where something is
    /// missing after all: it turned out damaged, or the disk lost it.
    async fn seal_fetched(&self, opened: &Opened, part: Part) -> Result<Option<Kept>, FetchError> {
        let (store, signed) = (self.clone(), opened.signed.clone());
        let manifests = Arc::clone(&opened.manifests);
        let sealed = blocking(move || {
            let seal = store.begin();
            for manifest in manifests.iter() {
                seal.put_image(manifest);
            }
            let mut counted = manifests.iter().skip(part.skips());
            if counted.any(|manifest| !store.missing(manifest).is_empty()) {
                return Ok(None);
            }
            match seal.finish(Some(&signed)) {
                Err(SealError::Lost) => Ok(None),
                finished => finished.map(Some),
            }
        });
        Ok(sealed.await.map_err(FetchError::Cut)??)
    }

    /// What is missing of a snapshot, each chunk once: memory last, in its order.
    async fn owed(&self, opened: &Opened, part: Part) -> Result<Vec<ledger::Owed>, FetchError> {
        let (store, manifests) = (self.clone(), Arc::clone(&opened.manifests));
        let owed = blocking(move || opening::missing(&store, &manifests, part));
        owed.await.map_err(FetchError::Cut)
    }
}

/// How much of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    AllButMemory,
}

impl Part {
    /// How many of the images, of which memory is the first, are none of it.
    const fn skips(self) -> usize {
        match self {
            Self::Whole => 0,
            Self::AllButMemory => 1,
        }
    }
}

/// Does a piece of work that a peer has its share in, as long as one may take.
async fn patiently<T>(
    limit: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> Result<T, Failed> {
    match time::timeout(limit, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Failed::Stalled(limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_of_an_image_that_is_too_large_to_fetch_has_not_lied() {
        let too_large = Failed::ManifestTooLong(u32::MAX);
        assert!(!too_large.is_lie() && !too_large.is_answer());
        assert!(Failed::TooLong(u32::MAX).is_lie());
    }
}
