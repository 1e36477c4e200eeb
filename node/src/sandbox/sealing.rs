//! Sealing a guest, and letting it go on.
//!
//! ```text
//! seal     what it goes on from is all here > quiesce (agent) > save (shim: vCPUs stopped, device
//!          state) > memory, disk and state into the store > manifest, signed > durable. Whatever
//!          fails leaves the guest frozen.
//! thaw     vCPUs go on > agent undoes the quiesce and sets the clock
//! ```
//!
//! Memory and disk are read while the guest stands still: of the memory the pages that the shim lists,
//! which are those that were written since the guest was resumed or sealed, whichever was later, or all
//! that exist of one that was booted, and the whole disk file. What is written is whatever chunk is new.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::{SandboxId, SnapshotId};
use proto::units::{MIB_BYTES, Mib};
use raft::state::{Needs, SealTimes, Sealed, SnapshotKind};
use tokio::task;
use tokio::time::Instant;
use tracing::{info, warn};

use super::coming::NotWholeError;
use super::driver::Driver;
use super::paging;
use super::phase::{Event, SealFor};
use super::resources::Held;
use super::spec::Host;
use crate::base::chain::chain;
use crate::base::clock::{Clock as _, SystemClock};
use crate::base::fault;
use crate::guest::{Guest, GuestError, Quiesce, QuiesceError, Quiesced};
use crate::net::slot::{GATEWAY_ADDR, GUEST_ADDR, GUEST_MAC, GUEST_PREFIX};
use crate::pager::region::Region;
use crate::shim::dirty::{Basis, DirtyList, DirtyListError};
use crate::shim::error::{CallShimError, ReadFileError};
use crate::shim::saved::Saved;
use crate::shim::spec::ShimSpec;
use crate::store::snapshot::{GuestFacts, MachineFacts, Running};
use crate::store::{
    Content, DecodeSnapshotError, ImageDigest, ImageRef, Kept, Manifest, Pin, ReadManifestError,
    SandboxPaths, Seal, SealError, SignedSnapshot, SnapshotDigest, SnapshotManifest, Store,
};
use crate::vmm::{Hardware, VmmSpec, flushes_when_saved, settles_when_saved};

/// Longest the agent may take to bring a guest to a stop: its disk's caches are written out.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest a save may take; the vCPUs stand still for that long, or less where a VMM waits for pages.
const SAVE_TIMEOUT: Duration = Duration::from_secs(20);
/// After how long of running the agent lets its workload go on by itself, if nobody says so: far
/// longer than anything may take between the quiesce and the stop of the vCPUs, or after a thaw.
const UNDO_AFTER: Duration = Duration::from_secs(180);
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
    /// Its VMM keeps the disk's tables in memory until the guest flushes, and the guest may write
    /// after its flush: the file may lack what the guest believes to be in it.
    #[error("the disk is not closed to writes, and guest or VMM may hold back a part of it")]
    DiskOpen,
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
    /// What its memory is a change of was lost since: the next try does without.
    #[error("what its memory was last sealed as is damaged or lost: try again")]
    LastSealLost,
    /// What is known of it cannot be written down.
    #[error("describe the snapshot")]
    Describe(#[from] DecodeSnapshotError),
    /// The work was cut short.
    #[error("finish sealing")]
    Cut(#[source] task::JoinError),
}

/// What a seal takes from a sandbox.
struct Job {
    store: Store,
    host: Arc<Host>,
    paths: SandboxPaths,
    saved: Saved,
    facts: Facts,
    what: SealFor,
    /// Of the steps that came before.
    took: SealTimes,
}

/// What became of it.
pub(super) struct Done {
    pub(super) sealed: Sealed,
    /// The image of the memory, where that was sealed.
    pub(super) memory: Option<ImageDigest>,
    /// Keeps all of it.
    pub(super) kept: Kept,
}

/// What is known of it beside its bytes.
pub(super) struct Facts {
    sandbox: SandboxId,
    epoch: Epoch,
    base: ImageDigest,
    parent: Option<SnapshotDigest>,
    last_seal: Option<ImageDigest>,
    hardware: Hardware,
    vmm_version: String,
    accelerator: String,
    agent: String,
    token: String,
}

impl Driver {
    /// Freezes the guest and seals it. Whatever fails, the guest stands still until it is told.
    pub(super) async fn seal(&self, held: &mut Held, what: SealFor) -> Event {
        let began = Instant::now();
        match self.try_seal(held, what).await {
            Ok(done) => {
                let new_bytes = done.sealed.new_bytes;
                info!(took = ?began.elapsed(), new_bytes, "sealed");
                held.kept = Some((done.memory, done.kept));
                Event::Sealed(Box::new(done.sealed))
            }
            Err(err) => {
                held.relists |= matches!(err, SealGuestError::LastSealLost);
                let reason = chain(&err);
                warn!(reason, "could not be sealed");
                Event::SealFailed { reason }
            }
        }
    }

    async fn try_seal(&self, held: &Held, what: SealFor) -> Result<Done, SealGuestError> {
        let ready = held.record.ready.as_ref();
        let ready = ready.ok_or(SealGuestError::Unfit("it is not ready"))?;
        let facts = held.facts(&self.host, &ready.agent, &held.record.token)?;
        let guest = self.guest(held)?;
        self.seal_as(held, &guest, facts, what).await
    }

    /// Seals a guest whose agent is reached by `guest`.
    pub(super) async fn seal_as(
        &self,
        held: &Held,
        guest: &Guest,
        facts: Facts,
        what: SealFor,
    ) -> Result<Done, SealGuestError> {
        let shim = held
            .shim
            .as_ref()
            .ok_or(SealGuestError::Unfit("it has no VMM"))?;
        self.await_source(held).await?;
        let relists = held.relists || self.has_lost_last_seal(&facts).await;
        let mark = Instant::now();
        let quiesced = bring_to_stop(guest, &facts, what.kind).await?;
        let quiesce = mark.elapsed();
        fault::point("seal.quiesced");
        let saved = match relists {
            true => shim.save_since_resume(SAVE_TIMEOUT).await?,
            false => shim.save(SAVE_TIMEOUT).await?,
        };
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
            what,
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
        fault::point("thaw.asked");
        let sealed = self.note_seal(held).await;
        fault::point("thaw.noted");
        let still = |reason: String| Event::ThawFailed { reason };
        let Some(shim) = &held.shim else {
            return still("it has no VMM".into());
        };
        // A shim of a release that could not save has stopped nothing.
        let could_save = !shim.known_status().hardware.machine.is_empty();
        if could_save && let Err(err) = shim.thaw(sealed).await {
            let reason = format!("its guest does not go on: {}", chain(&err));
            warn!(reason, "will try again");
            return still(reason);
        }
        fault::point("thaw.vmm");
        match self.guest(held) {
            Ok(guest) => {
                self.undo_quiesce(held, &guest).await;
                Event::Thawed
            }
            Err(err) => still(chain(&err)),
        }
    }

    /// Notes what the guest was sealed as, so that its next seal can be a change of that. Says whether
    /// the shim may begin a new list of what is written.
    ///
    /// The note comes first: if only it is made, the list is longer than it has to be.
    async fn note_seal(&self, held: &mut Held) -> bool {
        let Some((Some(memory), _kept)) = held.kept.take() else {
            return false;
        };
        let status = held.shim.as_ref().map(|it| it.known_status());
        let begins_anew =
            status.is_some_and(|it| it.paging.is_some() && settles_when_saved(&it.hardware));
        if !begins_anew {
            return false;
        }
        // Its disk may be collected with the snapshot.
        let kept = self.host.keeping.store.keep([Pin::Image(memory)]);
        let before = held.record.last_seal.replace(memory.to_string());
        if let Err(err) = held.save().await {
            warn!(
                err = chain(&err),
                "its next seal reads more than was written since this one"
            );
            held.record.last_seal = before;
            return false;
        }
        held.last_seal = Some(kept);
        held.relists = false;
        true
    }

    /// Whether the memory that the guest was last sealed with is not all here any more.
    async fn has_lost_last_seal(&self, facts: &Facts) -> bool {
        let Some(memory) = facts.last_seal else {
            return false;
        };
        let store = self.host.keeping.store.clone();
        let whole = task::spawn_blocking(move || whole_image(&store, memory).is_ok()).await;
        !whole.unwrap_or(false)
    }

    /// Tells a guest whose processors go on that it goes on.
    pub(super) async fn undo_quiesce(&self, held: &Held, guest: &Guest) {
        let deadline = Instant::now() + UNDO_TIMEOUT;
        if let Err(err) = guest.undo_quiesce(held.record.epoch(), deadline).await {
            // Its watchdog lets the workload go on by itself.
            warn!(err = chain(&err), "the guest was not told that it goes on");
        }
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
            last_seal: self
                .record
                .last_seal
                .as_deref()
                .and_then(|it| it.parse().ok()),
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
    fn run(self) -> Result<Done, SealGuestError> {
        let mark = Instant::now();
        let opened = |what| move |source| SealGuestError::Open { what, source };
        let seal = self.store.begin();
        let running = match self.what.kind {
            SnapshotKind::Snapshot => Some(self.running(&seal)?),
            SnapshotKind::Base => None,
        };
        let overlay = File::open(self.paths.overlay()).map_err(opened("disk"))?;
        let length = overlay.metadata().map_err(opened("disk"))?.len();
        let disk = seal.image(&overlay, length)?;
        let disk_bytes = data_bytes(&disk.manifest);
        let memory_bytes = running.map_or(0, |(_, bytes)| bytes);
        let running = running.map(|(running, _)| running);
        let working_set = match running {
            Some(_) => paging::seal_working_set(&seal, self.paths.dir())?,
            None => None,
        };
        let spec = ShimSpec::read(self.paths.dir())?;
        let signed = self.signed((running, disk.image), working_set, &spec.vmm)?;
        let new_bytes = seal.tally().written_bytes;
        fault::point("seal.stored");
        let kept = seal.finish(Some(&signed))?;
        fault::point("seal.finished");
        let machine = &signed.manifest().machine;
        let sealed = Sealed {
            id: SnapshotId(rand::random()),
            digest: signed.digest().0,
            kind: self.what.kind,
            memory_bytes,
            disk_bytes,
            new_bytes,
            needs: Needs {
                vmm: machine.driver.clone(),
                machine: machine.machine_type.clone(),
                cpu: machine.cpu_model.clone(),
                base: signed.manifest().base.0,
            },
            pause: self.what.pause,
            took: SealTimes {
                store_ms: millis(mark.elapsed()),
                ..self.took
            },
        };
        Ok(Done {
            sealed,
            memory: running.map(|it| it.memory.digest),
            kept,
        })
    }

    /// Seals what makes the guest go on; with how much of its memory is no hole.
    fn running(&self, seal: &Seal) -> Result<(Running, u64), SealGuestError> {
        let opened = |what| move |source| SealGuestError::Open { what, source };
        let memory = self.saved.memory.open().map_err(opened("memory"))?;
        let bytes = self.saved.memory.bytes;
        let memory = match self.saved.memory.rest_is_zero {
            true => seal.image(&memory, bytes)?,
            false => {
                let dirty = DirtyList::read(
                    self.paths.dir(),
                    Region::new(Mib(u32::try_from(bytes / MIB_BYTES).unwrap_or(u32::MAX))),
                )?;
                let parent = self.memory_before(dirty.basis())?;
                seal.image_changed(&parent, &memory, bytes, dirty.ranges())?
            }
        };
        let state = &self.saved.state;
        let state_file = File::open(&state.path).map_err(opened("device state"))?;
        let running = Running {
            memory: memory.image,
            device_state: seal.image(&state_file, state.bytes)?.image,
        };
        Ok((running, data_bytes(&memory.manifest)))
    }

    /// What the pages hold that are not listed.
    fn memory_before(&self, basis: Basis) -> Result<Manifest, SealGuestError> {
        if basis == Basis::LastSeal {
            let memory = self.facts.last_seal.ok_or(SealGuestError::LastSealLost)?;
            // Nobody completes this one, as is done with what the guest was resumed from.
            return whole_image(&self.store, memory);
        }
        let none = SealGuestError::Unfit("what its memory is a change of is not known");
        let parent = self.facts.parent.ok_or(none)?;
        let parent = self.store.snapshot(&parent)?;
        let none = SealGuestError::Unfit("what it was resumed from has no memory");
        let running = parent.manifest().running.ok_or(none)?;
        Ok(self.store.image(&running.memory.digest)?)
    }

    fn signed(
        &self,
        (running, disk): (Option<Running>, ImageRef),
        working_set: Option<ImageRef>,
        vmm: &VmmSpec,
    ) -> Result<SignedSnapshot, SealGuestError> {
        let facts = &self.facts;
        let manifest = SnapshotManifest {
            sandbox: facts.sandbox,
            epoch: facts.epoch,
            created_at: SystemClock.now(),
            parent: facts.parent,
            running,
            disk,
            working_set,
            base: facts.base,
            machine: MachineFacts {
                driver: vmm.driver.name().to_owned(),
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

/// The image of a memory whose chunks are all here. Blocks.
fn whole_image(store: &Store, memory: ImageDigest) -> Result<Manifest, SealGuestError> {
    match store.image(&memory) {
        Ok(image) if store.missing(&image).is_empty() => Ok(image),
        _ => Err(SealGuestError::LastSealLost),
    }
}

/// Has the agent write out what the guest holds back, and stop its work.
async fn bring_to_stop(
    guest: &Guest,
    facts: &Facts,
    kind: SnapshotKind,
) -> Result<Quiesced, SealGuestError> {
    let quiesce = how_to_stop(facts.epoch, &facts.hardware, kind);
    let deadline = Instant::now() + QUIESCE_TIMEOUT;
    let quiesced = guest.quiesce(&quiesce, deadline).await?;
    check_disk(&quiesce, quiesced)
}

/// Memory and disk are of one instant: what the guest has not written out is in memory. So its disk
/// need not be closed, unless its VMM would not write out all that the guest has: then the guest's
/// own flush, and no write after it, is what makes the file whole. A disk alone has no memory beside it:
/// all of it is written out, and its file system is left as after an unmount.
fn how_to_stop(epoch: Epoch, hardware: &Hardware, kind: SnapshotKind) -> Quiesce {
    Quiesce {
        epoch,
        freeze_disk: kind == SnapshotKind::Base || !flushes_when_saved(hardware),
        // Freed pages keep their bytes until they are reported free.
        reclaim: false,
        undo_after: UNDO_AFTER,
    }
}

/// Refuses a guest whose disk was to be closed to writes and is not: its agent may be of a release
/// that cannot, or somebody else's.
fn check_disk(asked: &Quiesce, quiesced: Quiesced) -> Result<Quiesced, SealGuestError> {
    if asked.freeze_disk && !quiesced.disk_frozen {
        return Err(SealGuestError::DiskOpen);
    }
    Ok(quiesced)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Workload;
    use crate::vmm::{Accelerator, Driver, hardware_of};

    fn quiesced(disk_frozen: bool) -> Quiesced {
        Quiesced {
            workload: Workload::Frozen,
            disk_frozen,
            streams: 0,
            unfinished: 0,
            still_for: Duration::ZERO,
            took: Duration::ZERO,
        }
    }

    /// QEMU writes out its tables when it saves; Cloud Hypervisor only when the guest flushes.
    #[test]
    fn a_disk_whose_tables_its_vmm_holds_back_is_closed_before_it_is_sealed() {
        for (driver, version, closed) in [
            (Driver::Qemu, "7.2", false),
            (Driver::CloudHypervisor, "v53.0", true),
        ] {
            let hardware = hardware_of(driver, version, Accelerator::Kvm).expect("known");
            let alone = how_to_stop(Epoch(3), &hardware, SnapshotKind::Base);
            assert!(alone.freeze_disk, "nothing else is left of the guest");
            let asked = how_to_stop(Epoch(3), &hardware, SnapshotKind::Snapshot);
            assert_eq!(asked.freeze_disk, closed, "{hardware}");
            check_disk(&asked, quiesced(true)).expect("closed is never wrong");
            let open = check_disk(&asked, quiesced(false));
            assert_eq!(matches!(open, Err(SealGuestError::DiskOpen)), closed);
        }
    }
}
