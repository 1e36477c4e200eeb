//! Booting a guest from a disk that was sealed alone: from a template that was built.
//!
//! ```text
//! disk from the store, over the image below it > VMM > agent answers > it is somebody else than the guest
//! that was sealed > set up as any other > told the defaults that lie on the disk
//! ```
//!
//! The disk is the sandbox's own from then on, and nothing else of the snapshot is needed: its processors
//! and memory are what was asked for, and any hypervisor will do. As that disk has booted before, it has a
//! machine id and keys of its own; they are renewed as a fork's are.

use tokio::time::Instant;
use tracing::info;

use super::driver::Driver;
use super::error::AcquireError;
use super::resources::Held;
use super::snapshot::{SnapshotError, lay_out};
use super::spec::{Host, StartSpec};
use crate::base::fault;
use crate::guest::{Fork, Generation, Guest, Restore};
use crate::store::{ImageDigest, SandboxPaths, SnapshotDigest};

/// What a guest boots on.
#[derive(Clone, Copy, Debug)]
pub(super) enum RootDisk {
    /// A new disk over this image.
    New(ImageDigest),
    /// A copy of the disk that was sealed as this.
    Sealed(SnapshotDigest),
}

impl Driver {
    /// Makes the root disk of what was sealed.
    pub(super) async fn lay_out_disk(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &mut Held,
    ) -> Result<(), AcquireError> {
        let base = self.mended(spec, from, held, made_of).await?;
        held.record.base = Some(base.to_string());
        held.record.disk = Some(from.to_string());
        held.save().await?;
        // All that is needed of the snapshot is in the file.
        held.source = None;
        fault::point("create.disk");
        Ok(())
    }
}

/// Makes the disk; the image below it. Blocks.
fn made_of(
    host: &Host,
    paths: &SandboxPaths,
    spec: &StartSpec,
    from: SnapshotDigest,
) -> Result<ImageDigest, SnapshotError> {
    let signed = host.keeping.store.snapshot(&from)?;
    let manifest = signed.manifest();
    if manifest.sandbox != spec.sealed_sandbox() {
        return Err(SnapshotError::Another(manifest.sandbox));
    }
    if manifest.running.is_some() {
        // Its disk may lack what was in memory.
        return Err(SnapshotError::OtherKind);
    }
    lay_out(host, paths, spec, manifest)?;
    Ok(manifest.base)
}

impl Held {
    /// Makes a guest that has booted from another one's disk somebody else. May be repeated.
    pub(super) async fn take_identity(
        &self,
        host: &Host,
        guest: &Guest,
    ) -> Result<(), AcquireError> {
        let order = Restore {
            epoch: self.record.epoch(),
            generation: Generation::fresh(),
            token: self.record.token.clone(),
            sandbox_id: self.record.id.clone(),
            template: self.record.template.clone(),
            env: None,
            fork: Some(Fork::named(self.record.id.clone())),
        };
        let deadline = Instant::now() + host.boot_timeout;
        let restored = guest.restore(&order, deadline).await?;
        info!(?restored, "the guest is another one than was sealed");
        Ok(())
    }
}
