//! Damage that a start from a snapshot meets on this node's own disk: it is found as a whole, and
//! another holder's copy takes its place.
//!
//! The disk and the device state are put together before the guest starts, and one bad chunk would
//! fail that. Memory is not looked at then: its pager asks for what turns out damaged by itself. All of
//! it is read once a warm start has failed, or what is made anew would be made of the same bad chunks.

use std::sync::Arc;
use std::time::Duration;

use tokio::time;
use tracing::warn;

use super::driver::Driver;
use super::error::AcquireError;
use super::resources::{Held, blocking};
use super::snapshot::{Returning, SnapshotError};
use super::spec::{Host, StartSpec};
use crate::base::chain::chain;
use crate::store::{AssembleError, Content, ReadChunkError, SandboxPaths, SnapshotDigest, Store};

/// Longest that fetching what was damaged may take: some chunks, not a whole snapshot.
const MEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Makes files of a sandbox of what is in this node's store. Blocks.
pub(super) type Make<T> =
    fn(&Host, &SandboxPaths, &StartSpec, SnapshotDigest) -> Result<T, SnapshotError>;

impl Driver {
    /// Makes the files of a sandbox; what is damaged on this disk comes from another holder.
    pub(super) async fn put_together(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &mut Held,
    ) -> Result<Returning, AcquireError> {
        self.mended(spec, from, held, Returning::put_together).await
    }

    /// Makes something of a snapshot.
    pub(super) async fn mended<T: Send + 'static>(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &mut Held,
        make: Make<T>,
    ) -> Result<T, AcquireError> {
        match self.made_of_own(spec, from, held, make).await? {
            Err(err) if lacks_a_chunk(&err) => {
                warn!(err = chain(&err), "damaged on this disk; another is asked");
                self.mend(from, held).await?;
                Ok(self.made_of_own(spec, from, held, make).await??)
            }
            made => Ok(made?),
        }
    }

    /// Makes it of what is in this node's store.
    async fn made_of_own<T: Send + 'static>(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &Held,
        make: Make<T>,
    ) -> Result<Result<T, SnapshotError>, AcquireError> {
        let (host, paths) = (Arc::clone(&self.host), held.paths.clone());
        let spec = spec.clone();
        blocking(move || make(&host, &paths, &spec, from)).await
    }

    async fn mend(&self, from: SnapshotDigest, held: &mut Held) -> Result<(), AcquireError> {
        let store = self.host.keeping.store.clone();
        blocking(move || forget_what_is_damaged(&store, from, false)).await??;
        if let Ok(source) = time::timeout(MEND_TIMEOUT, self.fetch(from)).await {
            held.source = Some(source?);
        }
        Ok(())
    }
}

impl Driver {
    /// Forgets whatever is damaged of a snapshot here, so that nothing is made of it again.
    pub(super) async fn look_for_damage(&self, of: SnapshotDigest) {
        let store = self.host.keeping.store.clone();
        let looked = blocking(move || forget_what_is_damaged(&store, of, true)).await;
        if let Ok(Err(err)) = looked {
            warn!(err = chain(&err), "did not look at all of it");
        }
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

/// Reads all that a sandbox is put together of before it starts, and its memory where `memory` says so: a
/// chunk that turns out damaged is forgotten, and can be fetched. Blocks.
fn forget_what_is_damaged(
    store: &Store,
    from: SnapshotDigest,
    memory: bool,
) -> Result<(), SnapshotError> {
    let signed = store.snapshot(&from)?;
    let manifest = signed.manifest();
    let running = manifest.running;
    let memory = running.filter(|_| memory).map(|it| it.memory);
    let state = running.map(|it| it.device_state);
    for image in [Some(manifest.disk), state, memory].into_iter().flatten() {
        for extent in store.image(&image.digest)?.extents() {
            if let Content::Chunk { id, .. } = extent.content {
                // What it says is told by the next try.
                let _damaged = store.get(&id);
            }
        }
    }
    Ok(())
}
