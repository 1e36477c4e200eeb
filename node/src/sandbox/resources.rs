//! What a sandbox holds on this host: acquired in order, released in reverse.
//!
//! ```text
//! directory + record -> network slot -> root disk -> shim and VMM -> guest set up
//! ```
//!
//! Each step first makes sure that the thing can be found again (the record names the slot, the
//! directory holds the disk and the shim's files), then makes it. Releasing works from whatever
//! is known, half-made or whole, and may be repeated; the directory goes last, since it is what a
//! later daemon would look at.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::units::Mib;
use tokio::task;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::coming::Source;
use super::error::AcquireError;
use super::paging::Admitted;
use super::record::{ReadyFacts, Record};
use super::spec::{Host, StartSpec, StartTimings};
use crate::base::chain::chain;
use crate::base::fault;
use crate::guest::{AgentSetup, CutDial, Guest, TcpDial};
use crate::net::slot::GUEST_MAC;
use crate::net::{NetError, Slot, tap};
use crate::shim::client::{self, ShimClient};
use crate::shim::error::CallShimError;
use crate::shim::lease;
use crate::shim::spec::{RestoreSpec, ShimSpec};
use crate::shim::sweep::kill_leftovers;
use crate::store::{ImageDigest, Kept, Overlay, SandboxPaths};
use crate::vmm::cmdline::GuestArgs;
use crate::vmm::{Confinement, NetworkSpec, VmmSpec};

/// The guest agent's port.
const AGENT_PORT: u16 = 49983;
/// Who runs processes that name nobody, until somebody decides otherwise.
const FIRST_USER: &str = "root";
/// A sandbox's disk goes with it, so its guest is not asked to flush: the VMM is ended at once.
const STOP_GRACE: Duration = Duration::ZERO;
/// As much of the agent's version as is kept; ours is far shorter.
const VERSION_CHARS: usize = 64;

/// What one sandbox holds.
#[derive(Debug)]
pub(super) struct Held {
    /// Its directory.
    pub(super) paths: SandboxPaths,
    /// Its record, as last saved.
    pub(super) record: Record,
    /// Its shim, once the VMM runs.
    pub(super) shim: Option<ShimClient>,
    /// Keeps what it was sealed as, with which memory, if any, until it goes on or ends.
    pub(super) kept: Option<(Option<ImageDigest>, Kept)>,
    /// Keeps the memory that it was last sealed with where it went on.
    pub(super) last_seal: Option<Kept>,
    /// That memory was found to be lost: the next list is not to be of changes to it.
    pub(super) relists: bool,
    /// Keeps what it goes on from.
    pub(super) source: Option<Source>,
    /// Has its pager answered.
    pub(super) paged: Option<Admitted>,
    /// Breaks every stream to its guest, once it is being released.
    gone: CancellationToken,
}

impl Held {
    /// What a record names, without a shim.
    pub(super) fn found(paths: SandboxPaths, record: Record) -> Self {
        Self {
            paths,
            record,
            shim: None,
            kept: None,
            last_seal: None,
            relists: false,
            source: None,
            paged: None,
            gone: CancellationToken::new(),
        }
    }

    /// What is left after a sweep of its slot.
    pub(super) fn swept(mut self) -> Self {
        self.record.slot = None;
        self
    }

    /// Takes over the slot that the record names.
    pub(super) async fn adopt_slot(&self, host: &Host) -> Result<(), AcquireError> {
        if let Some(slot) = &self.record.slot {
            host.slots.adopt(slot.serial, slot.index).await?;
        }
        Ok(())
    }

    /// Step 1: the directory and a record that says nothing is held yet.
    pub(super) async fn create(host: &Host, spec: &StartSpec) -> Result<Self, AcquireError> {
        let paths = host.data.sandbox(spec.id);
        let record = Record::new(spec.id, spec.epoch, &spec.template);
        let held = Self::found(paths, record);
        let (paths, record) = (held.paths.clone(), held.record.clone());
        blocking_io(move || {
            paths.create()?;
            record.save(paths.dir())
        })
        .await?;
        fault::point("create.record");
        Ok(held)
    }

    /// Step 2: a network slot.
    pub(super) async fn take_slot(&mut self, host: &Host) -> Result<(), AcquireError> {
        let slot = host.slots.take().await?;
        fault::point("create.slot-taken");
        // Not yet in the record: a crash here leaves a slot that nobody names, and it is swept.
        self.record.slot = Some(slot);
        self.save().await?;
        fault::point("create.slot-recorded");
        Ok(())
    }

    /// Step 3: the copy-on-write root disk.
    pub(super) async fn make_disk(
        &mut self,
        host: &Host,
        base: ImageDigest,
        size: Mib,
    ) -> Result<(), AcquireError> {
        // Saved with the next change; without it the sandbox could only not be paused.
        self.record.base = Some(base.to_string());
        let (path, base) = (self.paths.overlay(), host.data.template_image(base));
        blocking(move || Overlay { base: &base, size }.create(&path)).await??;
        fault::point("create.disk");
        Ok(())
    }

    /// Step 4: the shim, and in it the VMM. Returns what the VMM alone took.
    pub(super) async fn start_vmm(
        &mut self,
        host: &Host,
        spec: &StartSpec,
        restore: Option<RestoreSpec>,
    ) -> Result<Duration, AcquireError> {
        let confinement = self.confinement(host);
        if let Some(slot) = self.record.slot.clone() {
            let user = confinement.user;
            blocking(move || tap::give_to(&slot, user)).await??;
        }
        let network = self.record.slot.as_ref().map(|slot| NetworkSpec {
            netns: slot.netns_path.clone(),
            tap: slot.tap.clone(),
            mac: GUEST_MAC,
        });
        let vmm = VmmSpec {
            driver: host.vmm_driver,
            program: host.vmm_program.clone(),
            accelerator: host.accelerator,
            kernel: host.kernel.clone(),
            initramfs: host.initramfs.clone(),
            cmdline: GuestArgs::default().to_string(),
            vcpus: spec.vcpus,
            memory: spec.memory,
            root_disk: Some(self.paths.overlay()),
            network,
            confinement,
        };
        let shim = ShimSpec {
            sandbox: spec.id,
            epoch: spec.epoch,
            lease: spec.lease_bound.then(|| lease::file_in(host.data.root())),
            vmm,
            restore,
        };
        let client = client::spawn(self.paths.dir(), &shim, &host.wrenn).await?;
        let vmm_start = client.known_status().vmm_start;
        self.shim = Some(client);
        fault::point("create.vmm");
        Ok(vmm_start)
    }

    /// How far its VMM is shut off from the host. One without a slot has no user of its own.
    fn confinement(&self, host: &Host) -> Confinement {
        let slot = self.record.slot.as_ref();
        let of = |slot: &Slot| host.confinement.of_sandbox(&self.record.id, slot.index.0);
        slot.map(of).unwrap_or_default()
    }

    /// Step 5: the guest answers and has been told who it is.
    pub(super) async fn set_up_guest(
        &mut self,
        host: &Host,
        guest: &Guest,
        timings: &mut StartTimings,
    ) -> Result<ReadyFacts, AcquireError> {
        let began = Instant::now();
        let health = guest.wait_ready(began + host.boot_timeout).await?;
        timings.guest += began.elapsed();
        let answered = Instant::now();
        if self.record.disk.is_some() {
            self.take_identity(host, guest).await?;
        }
        // A guest that was sealed has its name from its restore.
        guest.set_up(&self.first_setup()).await?;
        if self.record.disk.is_some() {
            guest.set_defaults(&guest.kept_defaults().await?).await?;
        }
        let facts = self.ready_facts(host, &health.version);
        self.record.ready = Some(facts.clone());
        self.save().await?;
        timings.setup = answered.elapsed();
        fault::point("create.guest");
        Ok(facts)
    }

    /// What is told of a guest that is ready.
    pub(super) fn ready_facts(&self, host: &Host, agent: &str) -> ReadyFacts {
        let vmm = self.shim.as_ref().map_or_else(String::new, |shim| {
            let (status, driver) = (shim.known_status(), host.vmm_driver.name());
            format!("{driver} {} ({})", status.vmm_version, status.accelerator)
        });
        ReadyFacts {
            vmm,
            agent: printable(agent),
        }
    }

    /// Tells a guest that was frozen what time it is. The rest of what it is told it knows. One
    /// that cannot be told is used with the clock it has, which its kernel mostly keeps right.
    pub(super) async fn set_guest_clock(&self) {
        let told = match self.guest() {
            Ok(Some(guest)) => guest.set_up(&self.agent_setup()).await,
            Ok(None) | Err(_) => return,
        };
        if let Err(err) = told {
            warn!(
                err = chain(&err),
                "the guest's clock may be wrong after its thaw"
            );
        }
    }

    /// The same with the name that the guest goes by, until somebody in it changes that.
    fn first_setup(&self) -> AgentSetup {
        AgentSetup {
            hostname: Some(self.record.id.clone()),
            ..self.fresh_setup()
        }
    }

    /// What a guest is told before anybody has decided anything in it.
    pub(super) fn fresh_setup(&self) -> AgentSetup {
        AgentSetup {
            default_user: Some(FIRST_USER.into()),
            ..self.agent_setup()
        }
    }

    /// What a guest is told that may have been told before.
    pub(super) fn agent_setup(&self) -> AgentSetup {
        AgentSetup {
            token: self.record.token.clone(),
            sandbox_id: self.record.id.clone(),
            template: self.record.template.clone(),
            hostname: None,
            default_user: None,
        }
    }

    /// A client of the guest's agent, of no use any more once the release has begun: the slot's
    /// address will be another guest's.
    pub(super) fn guest(&self) -> Result<Option<Guest>, AcquireError> {
        self.guest_by(&self.record.token)
    }

    /// The same, for an agent that still demands another token.
    pub(super) fn guest_by(&self, token: &str) -> Result<Option<Guest>, AcquireError> {
        let Some(slot) = &self.record.slot else {
            return Ok(None);
        };
        let dial = TcpDial(SocketAddr::from((slot.guest_addr, AGENT_PORT)));
        let dial = CutDial::new(dial, self.gone.clone());
        Ok(Some(Guest::new(Arc::new(dial), token)?))
    }

    /// Gives everything back, newest first. May be repeated until it succeeds.
    pub(super) async fn release(&mut self, host: &Host) -> Result<(), AcquireError> {
        self.gone.cancel();
        if let Some(shim) = &self.shim {
            match shim.stop(STOP_GRACE).await {
                Ok(_) | Err(CallShimError::Gone { .. }) => {}
                Err(err) => warn!(%err, "the shim does not stop; it is killed"),
            }
        }
        let dir = self.paths.dir().to_owned();
        blocking(move || {
            if dir.exists() {
                kill_leftovers(&dir).map(drop)
            } else {
                Ok(())
            }
        })
        .await??;
        self.shim = None;
        fault::point("release.vmm");
        if let Some(slot) = self.record.slot.clone() {
            match host.slots.release(slot).await {
                // Not held: it was gone already, as after a reboot, or when it could not be
                // adopted. Refusing to go on would keep the sandbox for ever.
                Ok(()) | Err(NetError::NotHeld(_)) => self.record.slot = None,
                Err(err) => return Err(err.into()),
            }
        }
        fault::point("release.slot");
        let paths = self.paths.clone();
        blocking_io(move || paths.remove()).await
    }

    pub(super) async fn save(&self) -> Result<(), AcquireError> {
        let (dir, record) = (self.paths.dir().to_owned(), self.record.clone());
        blocking_io(move || record.save(&dir)).await
    }
}

/// A guest's word for its version, in bounds: it goes into the replicated record.
fn printable(version: &str) -> String {
    let plain = version.chars().filter(|it| !it.is_control());
    plain.take(VERSION_CHARS).collect()
}

/// Runs blocking work off the runtime's workers.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AcquireError> {
    let joined = task::spawn_blocking(work).await;
    joined.map_err(|err| AcquireError::Record {
        source: io::Error::other(err),
    })
}

async fn blocking_io<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, AcquireError> {
    blocking(work)
        .await?
        .map_err(|source| AcquireError::Record { source })
}
