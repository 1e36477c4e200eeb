//! Bringing a guest back from its snapshot.
//!
//! ```text
//! disk and state from the store > VMM with the saved state > vCPUs go on > agent is told who and when
//! it is, before anybody else gets to it
//! ```
//!
//! Its memory comes while it runs ([`super::paging`]). How it was sealed is in [`super::sealing`].

use std::io;
use std::path::Path;

use proto::ids::SandboxId;
use tokio::time::Instant;
use tracing::{info, warn};

use super::coming::{Coming, Source};
use super::driver::{Driver, start_failed};
use super::error::AcquireError;
use super::fork;
use super::paging;
use super::phase::Event;
use super::record::ReadyFacts;
use super::resources::{Held, blocking};
use super::spec::{Host, Origin, StartSpec, StartTimings};
use crate::base::fault;
use crate::guest::{Generation, Restore};
use crate::pager::page_map::PageMapError;
use crate::shim::spec::{MemoryImage, RestoreSpec};
use crate::shim::state::StateFile;
use crate::store::disk::rebase;
use crate::store::error::RebaseError;
use crate::store::fetch::FetchError;
use crate::store::snapshot::Running;
use crate::store::{
    AssembleError, ImageDigest, ImageRef, ReadManifestError, SandboxPaths, SnapshotDigest,
    SnapshotManifest, Store,
};
use crate::vmm::{self, Hardware};

/// The largest device state that is taken in, and room for an overlay's tables: ours has half a MiB
/// and grows with the processors.
const STATE_MOST: u64 = 64 << 20;
/// A full overlay is larger than its disk by less than one part in so many.
const OVERLAY_SHARE: u64 = 1024;
/// The saved device state, and memory where no pager serves, in the sandbox's directory, from which it
/// is started.
const STATE: &str = "resume-state";
const MEMORY: &str = "resume-memory";

/// Why a sandbox could not be put together from a snapshot.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The snapshot, or one of its images, is not here or damaged.
    #[error("read the snapshot")]
    Read(#[from] ReadManifestError),
    /// A file could not be made of it.
    #[error("make the sandbox's {what}")]
    Assemble {
        /// Which file.
        what: &'static str,
        /// What is in the way.
        source: AssembleError,
    },
    /// Its disk could not be put on the image below it.
    #[error("put the sandbox's disk on its image")]
    Rebase(#[from] RebaseError),
    /// Its memory cannot be described to a pager.
    #[error("describe the sandbox's memory")]
    Pages(#[from] PageMapError),
    /// What was just made of it cannot be read.
    #[error("read the device state")]
    Hash {
        /// What the disk says.
        source: io::Error,
    },
    /// A part of it is larger than any of the sandbox's can be, or no memory of its.
    #[error("a {what} of {bytes} bytes is not the sandbox's")]
    Size {
        /// Which part.
        what: &'static str,
        /// How large.
        bytes: u64,
    },
    /// It has memory where a disk was wanted, or none where it was.
    #[error("the snapshot is of another kind than the cluster says")]
    OtherKind,
    /// It is of another sandbox.
    #[error("the snapshot is of {0}")]
    Another(SandboxId),
    /// The image below its disk is not on this host.
    #[error("this host does not have the image {0} below the disk")]
    NoBase(ImageDigest),
}

impl Driver {
    /// Every step of a start from a snapshot. `None` when the daemon is stopping.
    pub(super) async fn bring_back(
        &self,
        spec: &StartSpec,
        from: SnapshotDigest,
        held: &mut Held,
        asked: Instant,
    ) -> Option<Event> {
        let mut timings = StartTimings {
            record: asked.elapsed(),
            way: spec.origin.way(),
            ..StartTimings::default()
        };
        // It may take long, and nothing is acquired yet.
        match self.unless_over(None, self.fetch(from)).await {
            Ok(Ok(source)) => held.source = Some(source),
            Ok(Err(err)) => return Some(start_failed(&err.into())),
            Err(over) => return over,
        }
        fault::point("resume.fetched");
        let acquired: Result<Returning, AcquireError> = async {
            let mark = Instant::now();
            held.take_slot(&self.host).await?;
            timings.slot = mark.elapsed();
            let mark = Instant::now();
            let returning = self.put_together(spec, from, held).await?;
            held.record.base = Some(returning.base.to_string());
            held.record.parent = Some(from.to_string());
            held.save().await?;
            fault::point("resume.files");
            held.admit_pager(&self.host, spec.id, from);
            timings.disk = mark.elapsed();
            let mark = Instant::now();
            let restore = Some(returning.restore.clone());
            timings.vmm = held.start_vmm(&self.host, spec, restore).await?;
            timings.shim = mark.elapsed().saturating_sub(timings.vmm);
            Ok(returning)
        }
        .await;
        let returning = match acquired {
            Ok(returning) => returning,
            Err(err) => return Some(start_failed(&err)),
        };
        let shim = held.shim.clone();
        let restored = self.restore_guest(spec, &returning, held, &mut timings);
        let outcome = self.unless_over(shim.as_ref(), restored).await;
        let event = self.is_up(held, outcome);
        if matches!(event, Some(Event::GuestReady)) {
            if let Some(source) = &mut held.source {
                source.follow();
            }
            info!(?timings, "resumed");
            self.set_timings(timings);
        }
        event
    }

    /// As much of a snapshot as has to be here before its guest runs.
    pub(super) async fn fetch(&self, from: SnapshotDigest) -> Result<Source, FetchError> {
        let keeping = &self.host.keeping;
        if self.host.paging.is_none() {
            let whole = keeping.store.fetch(from, keeping.holders.as_ref());
            return whole.await.map(Source::Whole);
        }
        let coming = Coming::new(keeping, from);
        coming.open().await?;
        Ok(Source::coming(coming))
    }

    /// Lets the guest's processors go on and tells its agent who and when it is, before anybody else
    /// gets to it.
    async fn restore_guest(
        &self,
        spec: &StartSpec,
        returning: &Returning,
        held: &mut Held,
        timings: &mut StartTimings,
    ) -> Result<ReadyFacts, AcquireError> {
        let asked = Instant::now();
        self.shared.let_begin().await;
        timings.word = asked.elapsed();
        let began = Instant::now();
        if let Some(shim) = &held.shim {
            shim.thaw(false).await?;
        }
        fault::point("resume.thawed");
        // It still demands the token that it was sealed with.
        let guest = held.guest_by(&returning.token)?;
        let guest = guest.ok_or(AcquireError::NoNetwork)?;
        let restore = Restore {
            epoch: spec.epoch,
            generation: Generation::fresh(),
            token: held.record.token.clone(),
            sandbox_id: held.record.id.clone(),
            template: held.record.template.clone(),
            env: None,
            fork: fork::identity(spec),
        };
        let deadline = began + self.host.boot_timeout;
        let restored = guest.restore(&restore, deadline).await?;
        info!(?restored, "the guest is itself again");
        fault::point("resume.restored");
        if matches!(
            spec.origin,
            Origin::Fork {
                or_boots: Some(_),
                ..
            }
        ) {
            // It was sealed before it was told what every guest is told.
            if let Some(guest) = held.guest()? {
                guest.set_up(&held.fresh_setup()).await?;
            }
        }
        held.mark_ready().await;
        self.drop_files(held).await;
        timings.guest = began.elapsed();
        let answered = Instant::now();
        let facts = held.ready_facts(&self.host, &returning.agent);
        held.record.ready = Some(facts.clone());
        held.save().await?;
        fault::point("resume.ready");
        timings.setup = answered.elapsed();
        Ok(facts)
    }
}

impl Driver {
    /// Removes what a guest was started from, once it runs without. The map of its pages stays: a
    /// pager that takes over reads it.
    async fn drop_files(&self, held: &Held) {
        let dir = held.paths.dir().to_owned();
        let removed = blocking(move || {
            let files = [STATE, MEMORY].map(|name| dir.join(name));
            files
                .iter()
                .try_for_each(|file| match std::fs::remove_file(file) {
                    // Memory is there only where no pager can serve.
                    Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
                    _ => Ok(()),
                })
        });
        if let Ok(Err(err)) = removed.await {
            warn!(%err, "what the guest was started from stays until its end");
        }
    }
}

/// A sandbox whose files are in place again, and what is needed to start it.
pub(super) struct Returning {
    restore: RestoreSpec,
    base: ImageDigest,
    token: String,
    agent: String,
}

impl Returning {
    /// Makes the files of the sandbox `spec` from the snapshot `from`, of which nothing is believed
    /// that the record does not say. Blocks.
    pub(super) fn put_together(
        host: &Host,
        paths: &SandboxPaths,
        spec: &StartSpec,
        from: SnapshotDigest,
    ) -> Result<Self, SnapshotError> {
        let store = &host.keeping.store;
        let signed = store.snapshot(&from)?;
        let manifest = signed.manifest();
        if manifest.sandbox != spec.sealed_sandbox() {
            return Err(SnapshotError::Another(manifest.sandbox));
        }
        let running = manifest.running.ok_or(SnapshotError::OtherKind)?;
        check_sizes(running, spec)?;
        lay_out(host, paths, spec, manifest)?;
        let state = paths.dir().join(STATE);
        assemble(store, running.device_state, "device state", &state)?;
        let machine = &manifest.machine;
        let hardware = Hardware {
            machine: machine.machine_type.clone(),
            cpu: machine.cpu_model.clone(),
        };
        let memory = match &host.paging {
            Some(paging) if paging.watches() => {
                paging::describe(store, manifest, paths.dir())?;
                MemoryImage::Paged {
                    daemon: host.data.pager_socket(),
                }
            }
            Some(_) if vmm::asks_for_pages(&hardware) => {
                paging::describe(store, manifest, paths.dir())?;
                MemoryImage::Asked {
                    daemon: host.data.pager_socket(),
                }
            }
            _ => {
                let memory = paths.dir().join(MEMORY);
                assemble(store, running.memory, "memory", &memory)?;
                MemoryImage::Flat(memory)
            }
        };
        let hashed = |source| SnapshotError::Hash { source };
        let digest = blake3::hash(&std::fs::read(&state).map_err(hashed)?);
        Ok(Self {
            restore: RestoreSpec {
                state: StateFile {
                    path: state,
                    bytes: running.device_state.len_bytes,
                    digest,
                },
                hardware,
                memory,
            },
            base: manifest.base,
            token: manifest.guest.token.clone(),
            agent: manifest.guest.agent.clone(),
        })
    }
}

/// Puts the disk of a snapshot in its place, over the image below it. Its sealer may be anybody's host:
/// a disk that cannot be of the sandbox `spec` is refused. Blocks.
pub(super) fn lay_out(
    host: &Host,
    paths: &SandboxPaths,
    spec: &StartSpec,
    manifest: &SnapshotManifest,
) -> Result<(), SnapshotError> {
    let bytes = manifest.disk.len_bytes;
    if bytes > spec.disk.bytes() + spec.disk.bytes() / OVERLAY_SHARE + STATE_MOST {
        return Err(SnapshotError::Size {
            what: "disk",
            bytes,
        });
    }
    let base = host.data.template_image(manifest.base);
    if !base.exists() {
        return Err(SnapshotError::NoBase(manifest.base));
    }
    let overlay = paths.overlay();
    assemble(&host.keeping.store, manifest.disk, "disk", &overlay)?;
    Ok(rebase(&overlay, &base, spec.disk)?)
}

/// Makes a file of an image. Blocks.
fn assemble(
    store: &Store,
    image: ImageRef,
    what: &'static str,
    path: &Path,
) -> Result<(), SnapshotError> {
    let manifest = store.image(&image.digest)?;
    let made = store.assemble(&manifest, image.len_bytes, path);
    made.map_err(|source| SnapshotError::Assemble { what, source })
}

/// Refuses what cannot be of the sandbox `spec`: its sealer may be anybody's host.
fn check_sizes(running: Running, spec: &StartSpec) -> Result<(), SnapshotError> {
    let (memory, state) = (running.memory.len_bytes, running.device_state.len_bytes);
    for (what, bytes, fits) in [
        ("memory", memory, memory == spec.memory.bytes()),
        ("device state", state, state <= STATE_MOST),
    ] {
        if !fits {
            return Err(SnapshotError::Size { what, bytes });
        }
    }
    Ok(())
}
