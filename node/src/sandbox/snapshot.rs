//! Sealing a guest, letting it go on, and bringing one back.
//!
//! ```text
//! seal     quiesce (agent) > save (shim: vCPUs stopped, device state) > memory, disk and state into
//!          the store > manifest, signed > durable. Whatever fails leaves the guest frozen.
//! thaw     vCPUs go on > agent undoes the quiesce and sets the clock
//! restore  disk and state from the store > VMM with the saved state > vCPUs go on > agent is told
//!          who and when it is, before anybody else gets to it
//! ```
//!
//! Memory and disk are read while the guest stands still: of the memory the pages that the shim lists,
//! which are those that were written since the guest was resumed, or all that exist of one that was
//! booted, and the whole disk file. What is written is whatever chunk is new. The memory of a guest
//! that is brought back comes while it runs ([`super::paging`]).

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{SandboxId, SnapshotId};
use proto::units::{MIB_BYTES, Mib};
use raft::state::{Needs, SealTimes, Sealed};
use tokio::task;
use tokio::time::Instant;
use tracing::{info, warn};

use super::coming::{Coming, NotWholeError, Source};
use super::driver::{Driver, start_failed};
use super::error::AcquireError;
use super::fork;
use super::paging;
use super::phase::Event;
use super::record::ReadyFacts;
use super::resources::{Held, blocking};
use super::spec::{Host, Origin, StartSpec, StartTimings};
use crate::base::chain::chain;
use crate::base::clock::{Clock as _, SystemClock};
use crate::base::fault;
use crate::guest::{Generation, Guest, GuestError, Quiesce, QuiesceError, Restore};
use crate::net::slot::{GATEWAY_ADDR, GUEST_ADDR, GUEST_MAC, GUEST_PREFIX};
use crate::pager::page_map::PageMapError;
use crate::pager::region::Region;
use crate::shim::dirty::{Basis, DirtyList, DirtyListError};
use crate::shim::error::{CallShimError, ReadFileError};
use crate::shim::saved::Saved;
use crate::shim::spec::{MemoryImage, RestoreSpec, ShimSpec};
use crate::shim::state::StateFile;
use crate::store::disk::rebase;
use crate::store::error::RebaseError;
use crate::store::fetch::FetchError;
use crate::store::snapshot::{GuestFacts, MachineFacts};
use crate::store::{
    AssembleError, Content, DecodeSnapshotError, ImageDigest, ImageRef, Kept, Manifest,
    ReadManifestError, SandboxPaths, SealError, SignedSnapshot, SnapshotDigest, SnapshotManifest,
    Store,
};
use crate::vmm::{Hardware, VmmSpec};

/// Longest the agent may take to bring a guest to a stop: its disk's caches are written out.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest the vCPUs may stand still before the devices are saved.
const SAVE_TIMEOUT: Duration = Duration::from_secs(20);
/// After how long of running the agent lets its workload go on by itself, if nobody says so: far
/// longer than anything may take between the quiesce and the stop of the vCPUs, or after a thaw.
const UNDO_AFTER: Duration = Duration::from_secs(180);
/// The largest device state that is taken in, and room for an overlay's tables: ours has half a MiB
/// and grows with the processors.
const STATE_MOST: u64 = 64 << 20;
/// A full overlay is larger than its disk by less than one part in so many.
const OVERLAY_SHARE: u64 = 1024;
/// The saved device state, and memory where no pager serves, in the sandbox's directory, from which it
/// is started.
const STATE: &str = "resume-state";
const MEMORY: &str = "resume-memory";
/// Longest a guest that goes on may take to say so.
const UNDO_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a guest was not sealed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub(super) enum SealGuestError {
    /// It cannot be sealed at all.
    #[error("{0}")]
    Unfit(&'static str),
    /// What it goes on from is not all here yet, and the snapshot would lack what is not.
    #[error("wait for the rest of the snapshot that it goes on from")]
    NotWhole(#[from] NotWholeError),
    /// Its agent could not be reached.
    #[error("reach the guest's agent")]
    Guest(#[from] GuestError),
    /// Its agent did not bring it to a stop.
    #[error("bring the guest to a stop")]
    Quiesce(#[from] QuiesceError),
    /// Its devices could not be saved.
    #[error("save the guest's devices")]
    Save(#[from] CallShimError),
    /// Which pages it wrote is not known.
    #[error("find out what the guest wrote")]
    Dirty(#[from] DirtyListError),
    /// Its memory, disk or device state could not be opened.
    #[error("open the guest's {what}")]
    Open {
        /// Which.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// What its VMM was started with cannot be read.
    #[error("read how the guest was started")]
    Spec(#[from] ReadFileError),
    /// The store did not take it.
    #[error("store the snapshot")]
    Store(#[from] SealError),
    /// The snapshot it is a change of cannot be read.
    #[error("read the snapshot before")]
    Parent(#[from] ReadManifestError),
    /// What is known of it cannot be written down.
    #[error("describe the snapshot")]
    Describe(#[from] DecodeSnapshotError),
    /// The work was cut short.
    #[error("finish sealing")]
    Cut(#[source] task::JoinError),
}

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
    /// It is of another sandbox.
    #[error("the snapshot is of {0}")]
    Another(SandboxId),
    /// The image below its disk is not on this host.
    #[error("this host does not have the image {0} below the disk")]
    NoBase(ImageDigest),
}

/// What a seal takes from a sandbox.
struct Job {
    store: Store,
    host: Arc<Host>,
    paths: SandboxPaths,
    saved: Saved,
    facts: Facts,
    pause: u64,
    /// Of the steps that came before.
    took: SealTimes,
}

/// What is known of it beside its bytes.
pub(super) struct Facts {
    sandbox: SandboxId,
    epoch: Epoch,
    base: ImageDigest,
    parent: Option<SnapshotDigest>,
    hardware: Hardware,
    vmm_version: String,
    accelerator: String,
    agent: String,
    token: String,
}

impl Driver {
    /// Freezes the guest and seals it. Whatever fails, the guest stands still until it is told.
    pub(super) async fn seal(&self, held: &mut Held, pause: u64) -> Event {
        let began = Instant::now();
        match self.try_seal(held, pause).await {
            Ok((sealed, kept)) => {
                info!(took = ?began.elapsed(), new_bytes = sealed.new_bytes, "sealed");
                held.kept = Some(kept);
                Event::Sealed(Box::new(sealed))
            }
            Err(err) => {
                let reason = chain(&err);
                warn!(reason, "could not be sealed");
                Event::SealFailed { reason }
            }
        }
    }

    async fn try_seal(&self, held: &Held, pause: u64) -> Result<(Sealed, Kept), SealGuestError> {
        let ready = held.record.ready.as_ref();
        let ready = ready.ok_or(SealGuestError::Unfit("it is not ready"))?;
        let facts = held.facts(&self.host, &ready.agent, &held.record.token)?;
        let guest = self.guest(held)?;
        self.seal_as(held, &guest, facts, pause).await
    }

    /// Seals a guest whose agent is reached by `guest`.
    pub(super) async fn seal_as(
        &self,
        held: &Held,
        guest: &Guest,
        facts: Facts,
        pause: u64,
    ) -> Result<(Sealed, Kept), SealGuestError> {
        let shim = held
            .shim
            .as_ref()
            .ok_or(SealGuestError::Unfit("it has no VMM"))?;
        self.await_source(held).await?;
        let quiesce = Quiesce {
            epoch: facts.epoch,
            // Memory and disk are of one instant: what the guest has not written out is in memory.
            freeze_disk: false,
            // Freed pages keep their bytes until they are reported free.
            reclaim: false,
            undo_after: UNDO_AFTER,
        };
        let mark = Instant::now();
        let quiesced = guest
            .quiesce(&quiesce, Instant::now() + QUIESCE_TIMEOUT)
            .await?;
        let quiesce = mark.elapsed();
        fault::point("seal.quiesced");
        let saved = shim.save(SAVE_TIMEOUT).await?;
        fault::point("seal.saved");
        let took = SealTimes {
            quiesce_ms: millis(quiesce),
            save_ms: millis(mark.elapsed().saturating_sub(quiesce)),
            store_ms: 0,
        };
        info!(?quiesced, stood_still = ?saved.state_took, "stands still");
        let job = Job {
            store: self.host.keeping.store.clone(),
            host: Arc::clone(&self.host),
            paths: held.paths.clone(),
            saved,
            facts,
            pause,
            took,
        };
        let sealed = task::spawn_blocking(move || job.run()).await;
        sealed.map_err(SealGuestError::Cut)?
    }

    fn guest(&self, held: &Held) -> Result<Guest, SealGuestError> {
        let guest = held.guest().ok().flatten();
        guest.ok_or(SealGuestError::Unfit("it has no network"))
    }

    /// Lets a guest that stands still go on.
    pub(super) async fn thaw(&self, held: &mut Held) -> Event {
        held.kept = None;
        let still = |reason: String| Event::ThawFailed { reason };
        let Some(shim) = &held.shim else {
            return still("it has no VMM".into());
        };
        // A shim of a release that could not save has stopped nothing.
        let could_save = !shim.known_status().hardware.machine.is_empty();
        if could_save && let Err(err) = shim.thaw().await {
            let reason = format!("its guest does not go on: {}", chain(&err));
            warn!(reason, "will try again");
            return still(reason);
        }
        match self.guest(held) {
            Ok(guest) => {
                self.undo_quiesce(held, &guest).await;
                Event::Thawed
            }
            Err(err) => still(chain(&err)),
        }
    }

    /// Tells a guest whose processors go on that it goes on.
    pub(super) async fn undo_quiesce(&self, held: &Held, guest: &Guest) {
        let deadline = Instant::now() + UNDO_TIMEOUT;
        if let Err(err) = guest.undo_quiesce(held.record.epoch(), deadline).await {
            // Its watchdog lets the workload go on by itself.
            warn!(err = chain(&err), "the guest was not told that it goes on");
        }
    }
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

    /// Waits until all of what the guest goes on from is here, unless it is to end before. The guest
    /// runs on meanwhile.
    async fn await_source(&self, held: &Held) -> Result<(), SealGuestError> {
        let Some(source) = &held.source else {
            return Ok(());
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(SealGuestError::Unfit("it is to end")),
            () = self.detach.cancelled() => Err(SealGuestError::Unfit("the host's daemon is ending")),
            whole = source.whole() => Ok(whole?),
        }
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
        let began = Instant::now();
        if let Some(shim) = &held.shim {
            shim.thaw().await?;
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
                guest.set_up(&held.agent_setup()).await?;
            }
        }
        held.mark_ready().await;
        self.drop_files(held).await;
        timings.guest = began.elapsed();
        let answered = Instant::now();
        let facts = held.ready_facts(&returning.agent);
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
        check_sizes(manifest, spec)?;
        let image = |image: ImageRef, what, path: &Path| {
            let assemble = |source| SnapshotError::Assemble { what, source };
            let manifest = store.image(&image.digest)?;
            store
                .assemble(&manifest, image.len_bytes, path)
                .map_err(assemble)
        };
        let base = host.data.template_image(manifest.base);
        if !base.exists() {
            return Err(SnapshotError::NoBase(manifest.base));
        }
        image(manifest.disk, "disk", &paths.overlay())?;
        rebase(&paths.overlay(), &base, spec.disk)?;
        let state = paths.dir().join(STATE);
        image(manifest.device_state, "device state", &state)?;
        let memory = match &host.paging {
            Some(_) => {
                paging::describe(store, manifest, paths.dir())?;
                MemoryImage::Paged {
                    daemon: host.data.pager_socket(),
                }
            }
            None => {
                let memory = paths.dir().join(MEMORY);
                image(manifest.memory, "memory", &memory)?;
                MemoryImage::Flat(memory)
            }
        };
        let hashed = |source| SnapshotError::Hash { source };
        let digest = blake3::hash(&std::fs::read(&state).map_err(hashed)?);
        let machine = &manifest.machine;
        Ok(Self {
            restore: RestoreSpec {
                state: StateFile {
                    path: state,
                    bytes: manifest.device_state.len_bytes,
                    digest,
                },
                hardware: Hardware {
                    machine: machine.machine_type.clone(),
                    cpu: machine.cpu_model.clone(),
                },
                memory,
            },
            base: manifest.base,
            token: manifest.guest.token.clone(),
            agent: manifest.guest.agent.clone(),
        })
    }
}

impl Held {
    /// What a snapshot of it says beside its bytes.
    pub(super) fn facts(
        &self,
        host: &Host,
        agent: &str,
        token: &str,
    ) -> Result<Facts, SealGuestError> {
        let unfit = SealGuestError::Unfit;
        let shim = self.shim.as_ref().ok_or(unfit("it has no VMM"))?;
        let status = shim.known_status();
        let base = self.record.base.as_deref().and_then(|it| it.parse().ok());
        let base = base.ok_or(unfit("it was started by a release that could not pause"))?;
        if status.hardware.machine.is_empty() {
            return Err(unfit("it was started by a release that could not pause"));
        }
        Ok(Facts {
            sandbox: status.sandbox,
            epoch: self.record.epoch(),
            base,
            parent: self.record.parent.as_deref().and_then(|it| it.parse().ok()),
            hardware: status.hardware.clone(),
            vmm_version: status.vmm_version.clone(),
            accelerator: host.accelerator.name().to_owned(),
            agent: agent.to_owned(),
            token: token.to_owned(),
        })
    }
}

impl Job {
    /// Reads everything into the store. Blocks.
    fn run(self) -> Result<(Sealed, Kept), SealGuestError> {
        let mark = Instant::now();
        let opened = |what| move |source| SealGuestError::Open { what, source };
        let seal = self.store.begin();
        let memory = self.saved.memory.open().map_err(opened("memory"))?;
        let bytes = self.saved.memory.bytes;
        let memory = match self.saved.memory.basis {
            Basis::Zeros => seal.image(&memory, bytes)?,
            Basis::Parent => {
                let parent = self.parent_memory()?;
                let dirty = DirtyList::read(
                    self.paths.dir(),
                    Region::new(Mib(u32::try_from(bytes / MIB_BYTES).unwrap_or(u32::MAX))),
                )?;
                seal.image_changed(&parent, &memory, bytes, dirty.ranges())?
            }
        };
        let overlay = File::open(self.paths.overlay()).map_err(opened("disk"))?;
        let length = overlay.metadata().map_err(opened("disk"))?.len();
        let disk = seal.image(&overlay, length)?;
        let state = &self.saved.state;
        let state_file = File::open(&state.path).map_err(opened("device state"))?;
        let state = seal.image(&state_file, state.bytes)?;
        let memory_bytes = data_bytes(&memory.manifest);
        let disk_bytes = data_bytes(&disk.manifest);
        let images = [memory.image, disk.image, state.image];
        let working_set = paging::seal_working_set(&seal, self.paths.dir())?;
        let spec = ShimSpec::read(self.paths.dir())?;
        let signed = self.signed(images, working_set, &spec.vmm)?;
        let new_bytes = seal.tally().written_bytes;
        fault::point("seal.stored");
        let kept = seal.finish(Some(&signed))?;
        fault::point("seal.finished");
        let machine = &signed.manifest().machine;
        let sealed = Sealed {
            id: SnapshotId(rand::random()),
            digest: signed.digest().0,
            memory_bytes,
            disk_bytes,
            new_bytes,
            needs: Needs {
                vmm: machine.driver.clone(),
                machine: machine.machine_type.clone(),
                cpu: machine.cpu_model.clone(),
                base: signed.manifest().base.0,
            },
            pause: self.pause,
            took: SealTimes {
                store_ms: millis(mark.elapsed()),
                ..self.took
            },
        };
        Ok((sealed, kept))
    }

    fn parent_memory(&self) -> Result<Manifest, SealGuestError> {
        let none = SealGuestError::Unfit("what its memory is a change of is not known");
        let parent = self.facts.parent.ok_or(none)?;
        let parent = self.store.snapshot(&parent)?;
        Ok(self.store.image(&parent.manifest().memory.digest)?)
    }

    fn signed(
        &self,
        images: [ImageRef; 3],
        working_set: Option<ImageRef>,
        vmm: &VmmSpec,
    ) -> Result<SignedSnapshot, SealGuestError> {
        let facts = &self.facts;
        let [memory, disk, device_state] = images;
        let manifest = SnapshotManifest {
            sandbox: facts.sandbox,
            epoch: facts.epoch,
            created_at: SystemClock.now(),
            parent: facts.parent,
            memory,
            disk,
            device_state,
            working_set,
            base: facts.base,
            machine: MachineFacts {
                driver: "qemu".into(),
                driver_version: facts.vmm_version.clone(),
                machine_type: facts.hardware.machine.clone(),
                cpu_model: facts.hardware.cpu.clone(),
                accelerator: facts.accelerator.clone(),
                vcpus: vmm.vcpus.into(),
                memory: vmm.memory,
            },
            guest: GuestFacts {
                kernel: self.host.kernel_release.clone(),
                initramfs: proto::version::PRODUCT.to_owned(),
                agent: facts.agent.clone(),
                mac: GUEST_MAC,
                address: GUEST_ADDR,
                prefix: GUEST_PREFIX,
                gateway: GATEWAY_ADDR,
                token: facts.token.clone(),
            },
        };
        Ok(SignedSnapshot::sign(manifest, &self.host.keeping.identity)?)
    }
}

/// Refuses what cannot be a snapshot of the sandbox `spec`: its sealer may be anybody's host.
fn check_sizes(manifest: &SnapshotManifest, spec: &StartSpec) -> Result<(), SnapshotError> {
    let most_disk = spec.disk.bytes() + spec.disk.bytes() / OVERLAY_SHARE + STATE_MOST;
    for (what, bytes, fits) in [
        (
            "memory",
            manifest.memory.len_bytes,
            manifest.memory.len_bytes == spec.memory.bytes(),
        ),
        (
            "disk",
            manifest.disk.len_bytes,
            manifest.disk.len_bytes <= most_disk,
        ),
        (
            "device state",
            manifest.device_state.len_bytes,
            manifest.device_state.len_bytes <= STATE_MOST,
        ),
    ] {
        if !fits {
            return Err(SnapshotError::Size { what, bytes });
        }
    }
    Ok(())
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// How much of an image is no hole.
fn data_bytes(manifest: &Manifest) -> u64 {
    let data = manifest.extents().iter();
    data.filter(|extent| extent.content != Content::Hole)
        .map(|extent| extent.len_bytes)
        .sum()
}
