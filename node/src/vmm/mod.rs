//! Hypervisor drivers behind one trait.
//!
//! A VMM is one child process that runs one guest. This room starts it inside the sandbox's
//! network namespace with as few rights as it can do with ([`jail`]), talks to it, ends it and
//! reaps it ([`process`]). [`probe`] finds out which accelerator really runs a guest here.
//!
//! Everything is synchronous: the shim that calls it has no async runtime. A VMM dies with the
//! *thread* that started it (`PR_SET_PDEATHSIG`), so that thread must outlive the guest.
//!
//! A guest can be kept: [`Vmm::save_state`] stops it and writes its *device state*, which is all of
//! it but its memory (a memfd that is not the VMM's) and its disk (flushed, and left alone from
//! then on). [`spawn_incoming`] builds the same [`Hardware`] around a memory and a disk and waits
//! for that state; other namespaces, taps and paths do not matter to it.
//!
//! What a crash leaves: nothing. A caller that is killed takes its VMM with it; files named in
//! the [`VmmSpec`] belong to whoever made them.

pub mod cgroup;
pub mod check;
pub mod child;
pub mod cloud_hypervisor;
pub mod cmdline;
pub mod confinement;
pub mod error;
pub mod fake;
pub mod hardware;
pub mod jail;
pub mod probe;
pub mod process;
pub mod processor;
pub mod qemu;
pub mod root;
pub mod tiny;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ChildStderr;
use std::time::{Duration, Instant};

use proto::units::Mib;

use crate::pager::post_copy::Questions;

pub use cloud_hypervisor::version::UnknownVersion;
pub use confinement::Confinement;
pub use error::{ForeignStateError, SpawnVmmError, VmmError};
pub use hardware::Hardware;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// The CPU itself, through `/dev/kvm`.
    Kvm,
    /// Translation in the VMM: slow, and works everywhere.
    Tcg,
}

impl Accelerator {
    /// The name by which files, logs and QEMU know it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// The accelerator called `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg]
            .into_iter()
            .find(|known| known.name() == name)
    }
}

/// Which hypervisor runs a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Driver {
    /// QEMU: works everywhere.
    #[default]
    Qemu,
    /// Cloud Hypervisor: needs KVM.
    CloudHypervisor,
}

impl Driver {
    /// The name by which files, the cluster and people know it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// The driver called `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Qemu, Self::CloudHypervisor]
            .into_iter()
            .find(|known| known.name() == name)
    }
}

/// The guest's one network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSpec {
    /// The namespace the VMM runs in, as a path that can be opened (`/run/netns/…`).
    pub netns: PathBuf,
    /// The tap in that namespace.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
}

/// One guest, as a driver starts it. All paths are absolute and valid UTF-8.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmSpec {
    /// Which hypervisor it is.
    pub driver: Driver,
    /// The hypervisor's executable.
    pub program: PathBuf,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs with the guest agent.
    pub initramfs: PathBuf,
    /// Kernel arguments for the agent ([`cmdline::GuestArgs`]); the driver adds its own.
    pub cmdline: String,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory, at least [`MIN_MEMORY`].
    pub memory: Mib,
    /// A qcow2 overlay; `None` for a guest without a disk (the probe).
    pub root_disk: Option<PathBuf>,
    /// `None` for a guest without a network (the probe).
    pub network: Option<NetworkSpec>,
    /// How far the VMM is shut off from its host.
    pub confinement: Confinement,
}

/// More would not find an interrupt on the machine type we use, and no host we know has them.
pub const MAX_VCPUS: u8 = 64;
/// The kernel and its initramfs do not unpack in less.
pub const MIN_MEMORY: Mib = Mib(64);

/// How a VMM process ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmmExit {
    /// The exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The VMM's own word for the reason, such as `guest-shutdown`; empty if it gave none.
    pub reason: String,
}

/// One running VMM. Methods may be called from any thread, and none waits past its deadline.
pub trait Vmm: Send + Sync {
    /// The process id. It stays reserved until [`Vmm::wait`] has seen the end.
    fn pid(&self) -> u32;

    /// The hypervisor's version, such as `7.2.22`.
    fn version(&self) -> &str;

    /// The virtual hardware around the guest: what a snapshot of it has to name.
    fn hardware(&self) -> &Hardware;

    /// Stops the virtual CPUs.
    ///
    /// # Errors
    /// The VMM refused, died, or did not answer before `deadline`.
    fn pause(&self, deadline: Instant) -> Result<(), VmmError>;

    /// Lets the virtual CPUs run on, also after a save, whatever became of it.
    ///
    /// # Errors
    /// As [`Vmm::pause`].
    fn resume(&self, deadline: Instant) -> Result<(), VmmError>;

    /// Stops the virtual CPUs, flushes the disk, and writes the device state to `file` from its
    /// present position on. The guest's memory is not in it: it is its owner's to read.
    ///
    /// Afterwards the guest stands still until [`Vmm::resume`], and only then may it be saved again.
    /// Until then nothing writes to its disk, which the VMM has let go of. After an error it stands
    /// still or runs, and is told to resume all the same.
    ///
    /// A VMM that asks for pages ([`spawn_asking`]) cannot do this before it has asked for all of
    /// them. The guest runs while that is waited for.
    ///
    /// # Errors
    /// [`VmmError::Save`]: the VMM refused, could not, died, or was not done before `deadline`.
    /// What it was doing is called off.
    fn save_state(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), VmmError>;

    /// Takes in a device state from `file`, in a VMM made by [`spawn_incoming`] whose memory is
    /// in place, or will be when it is touched. Then the guest stands still until
    /// [`Vmm::resume`].
    ///
    /// # Errors
    /// [`VmmError::Load`]. The VMM is of no further use; it may have ended already.
    fn load_state(&self, file: BorrowedFd<'_>, deadline: Instant) -> Result<(), VmmError>;

    /// What a VMM made by [`spawn_asking`] will ask for pages on, once: whoever takes it must answer
    /// from before [`Vmm::load_state`] on. `None` of every other.
    fn take_questions(&self) -> Option<Questions> {
        None
    }

    /// Presses the guest's power button and does not wait for what the guest makes of it.
    ///
    /// # Errors
    /// As [`Vmm::pause`].
    fn shutdown(&self, deadline: Instant) -> Result<(), VmmError>;

    /// Asks the VMM to end, with its disks flushed and closed, whatever the guest is doing.
    ///
    /// # Errors
    /// As [`Vmm::pause`].
    fn quit(&self, deadline: Instant) -> Result<(), VmmError>;

    /// Stops the whole process, disk and network included, without its cooperation; it answers
    /// nothing until [`Vmm::thaw`]. Freezing a frozen VMM, or a dead one, is no error.
    ///
    /// # Errors
    /// The kernel refused the signal.
    fn freeze(&self) -> Result<(), VmmError>;

    /// Lets a frozen process go on. One that runs or is dead is left in peace.
    ///
    /// # Errors
    /// The kernel refused the signal.
    fn thaw(&self) -> Result<(), VmmError>;

    /// Kills the process at once, frozen or not. Killing a dead VMM is no error.
    ///
    /// # Errors
    /// The kernel refused the signal.
    fn kill(&self) -> Result<(), VmmError>;

    /// Waits until the process has ended, and reaps it. `None` when `deadline` came first.
    ///
    /// # Errors
    /// The kernel refused to tell.
    fn wait(&self, deadline: Instant) -> Result<Option<VmmExit>, VmmError>;
}

/// A VMM that has just been started, and the streams it writes.
pub struct Started {
    /// The running VMM.
    pub vmm: Box<dyn Vmm>,
    /// The guest's serial console. Must be read, or output is lost (the guest is never blocked).
    pub console: UnixStream,
    /// What the VMM itself complains about.
    pub stderr: ChildStderr,
    /// How long the VMM took from its spawn to its first answer.
    pub took: Duration,
}

/// Starts `spec` on the memory behind `ram`, and returns when the VMM answers.
///
/// `name` stands in the process's arguments: people see it in `ps`, and the sweeper knows the
/// process by it. The calling thread must outlive the guest. `ram` is a memfd of `spec.memory`.
///
/// # Errors
/// See [`SpawnVmmError`]. Nothing is left running.
pub fn spawn(
    spec: &VmmSpec,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    match spec.driver {
        Driver::Qemu => qemu::spawn::spawn(spec, None, name, ram, deadline),
        Driver::CloudHypervisor => cloud_hypervisor::spawn::boot(spec, name, ram, deadline),
    }
}

/// As [`spawn`], but the guest is one that was saved on `hardware`: it waits, without a kernel and
/// without touching its memory or its disk, for [`Vmm::load_state`]. `state` is what will be given
/// to that; its position is left where it is.
///
/// # Errors
/// See [`SpawnVmmError`]. Nothing is left running.
pub fn spawn_incoming(
    spec: &VmmSpec,
    hardware: &Hardware,
    state: BorrowedFd<'_>,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    match spec.driver {
        Driver::Qemu => qemu::spawn::spawn(spec, Some(hardware), name, ram, deadline),
        Driver::CloudHypervisor => {
            cloud_hypervisor::spawn::incoming(spec, hardware, state, name, ram, deadline)
        }
    }
}

/// As [`spawn_incoming`], for a host on which nobody may watch over the VMM's page faults: it does so
/// itself, and asks for each page ([`Vmm::take_questions`]).
///
/// # Errors
/// See [`SpawnVmmError`]; also where the driver has no such way. Nothing is left running.
pub fn spawn_asking(
    spec: &VmmSpec,
    hardware: &Hardware,
    state: BorrowedFd<'_>,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    match spec.driver {
        Driver::Qemu => Err(SpawnVmmError::Spec(error::SpecError::unknown(
            "driver that asks for pages",
            spec.driver.name(),
        ))),
        Driver::CloudHypervisor => {
            cloud_hypervisor::spawn::asking(spec, hardware, state, name, ram, deadline)
        }
    }
}

/// What guests get that are started here now, by `driver` of `version`.
///
/// # Errors
/// The driver has no such version, or one that is too old.
pub fn hardware_of(
    driver: Driver,
    version: &str,
    accelerator: Accelerator,
) -> Result<Hardware, UnknownVersion> {
    match driver {
        Driver::Qemu => Ok(qemu::machine::of_new_guests(accelerator)),
        Driver::CloudHypervisor => {
            let known = cloud_hypervisor::version::known(version)?;
            Ok(cloud_hypervisor::machine::of_new_guests(known.version))
        }
    }
}

/// Whether a guest on `hardware` can be brought back by a VMM that asks for its pages
/// ([`spawn_asking`]).
#[must_use]
pub fn asks_for_pages(hardware: &Hardware) -> bool {
    cloud_hypervisor::machine::is_ours(hardware)
}

/// Whether the VMM of a guest on `hardware` writes out all that the guest has written to its disk
/// when the guest is saved. Cloud Hypervisor keeps changed tables of a qcow2 image in its memory
/// until the guest asks for a flush, and nobody else can ask for one.
#[must_use]
pub fn flushes_when_saved(hardware: &Hardware) -> bool {
    !cloud_hypervisor::machine::is_ours(hardware)
}

/// Whether nothing that the guest has asked its disk for is under way any more when a guest on
/// `hardware` is saved. What Cloud Hypervisor has handed to the kernel may still come into the guest's
/// memory after that, where no list of written pages would have it.
#[must_use]
pub fn settles_when_saved(hardware: &Hardware) -> bool {
    !cloud_hypervisor::machine::is_ours(hardware)
}

/// Whether a file that begins with `head` can be the device state of a guest on `hardware`. Finds
/// the wrong file before a VMM is started for it; damage further on is what digests are for.
///
/// # Errors
/// See [`ForeignStateError`].
pub fn check_state(head: &[u8], hardware: &Hardware) -> Result<(), ForeignStateError> {
    if cloud_hypervisor::machine::is_ours(hardware) {
        return cloud_hypervisor::kept::check(head, hardware);
    }
    qemu::state::check(head, hardware)
}
