//! Damage that a start from a snapshot meets on this node's own disk: it is found as a whole, and
//! another holder's copy takes its place.
//!
//! The disk and the device state are put together before the guest starts, and one bad chunk would
//! fail that. Memory is not looked at here: its pager asks for what turns out damaged by itself.

use std::sync::Arc;
use std::time::Duration;

use tokio::time;
use tracing::warn;

use super::driver::Driver;
use super::error::AcquireError;
use super::resources::{Held, blocking};
use super::snapshot::{Returning, SnapshotError};
use super::spec::StartSpec;
use crate::base::chain::chain;
use crate::store::{AssembleError, Content, ReadChunkError, SnapshotDigest, Store};

/// Longest that fetching what was damaged may take: some chunks, not a whole snapshot.
const MEND_TIMEOUT: Duration = Duration::from_secs(60);

impl Driver {
    /// Makes the files of a sandbox; what is damaged on this disk comes from another holder.
    pub(super) async fn put_together(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &mut Held,
    ) -> Result<Returning, AcquireError> {
        match self.made_of_own(spec, from, held).await? {
            Err(err) if lacks_a_chunk(&err) => {
                warn!(err = chain(&err), "damaged on this disk; another is asked");
                self.mend(from, held).await?;
                Ok(self.made_of_own(spec, from, held).await??)
            }
            made => Ok(made?),
        }
    }

    /// Makes the files of what is in this node's store.
    async fn made_of_own(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &Held,
    ) -> Result<Result<Returning, SnapshotError>, AcquireError> {
        let (host, paths) = (Arc::clone(&self.host), held.paths.clone());
        let spec = spec.clone();
        blocking(move || Returning::put_together(&host, &paths, &spec, from)).await
    }

    async fn mend(&self, from: SnapshotDigest, held: &mut Held) -> Result<(), AcquireError> {
        let store = self.host.keeping.store.clone();
        blocking(move || forget_what_is_damaged(&store, from)).await??;
        if let Ok(source) = time::timeout(MEND_TIMEOUT, self.fetch(from)).await {
            held.source = Some(source?);
        }
        Ok(())
    }
}

/// Whether another holder may have what is not here.
const fn lacks_a_chunk(err: &SnapshotError) -> bool {
    let SnapshotError::Assemble { source, .. } = err else {
        return false;
    };
    matches!(
        source,
        AssembleError::Chunk(ReadChunkError::Corrupt { .. } | ReadChunkError::Missing { .. })
    )
}

/// Reads all that a sandbox is put together of before it starts: a chunk that turns out damaged is
/// forgotten, and can be fetched. Blocks.
fn forget_what_is_damaged(store: &Store, from: SnapshotDigest) -> Result<(), SnapshotError> {
    let signed = store.snapshot(&from)?;
    let manifest = signed.manifest();
    for image in [manifest.disk, manifest.device_state] {
        for extent in store.image(&image.digest)?.extents() {
            if let Content::Chunk { id, .. } = extent.content {
                // What it says is told by the next try.
                let _damaged = store.get(&id);
            }
        }
    }
    Ok(())
}
