//! What a sandbox needs to start, and what all sandboxes of this node share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Mib;
use transport::Identity;

use super::paging::Paging;
use super::warm::WarmStarts;
use crate::net::SlotPool;
use crate::store::fetch::Holders;
use crate::store::{DataPaths, ImageDigest, SnapshotDigest, Store};
use crate::vmm::confinement::HostConfinement;
use crate::vmm::{Accelerator, Driver};

/// What one sandbox is started from.
#[derive(Clone, Debug)]
pub struct StartSpec {
    /// For its whole life.
    pub id: SandboxId,
    /// The ownership under which this node runs it.
    pub epoch: Epoch,
    /// Name of its template, told to the guest.
    pub template: String,
    /// What it starts from.
    pub origin: Origin,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: Mib,
    /// Root disk.
    pub disk: Mib,
    /// Whether its guest is to be kept as it is when it has booted, for others to start from.
    pub keep_warm: bool,
    /// Whether its guest may execute its first instruction at once; otherwise it waits for
    /// [`Registry::begin`](super::Registry::begin), and nobody minds if it is dropped before.
    pub let_begin: bool,
    /// Whether it may run only under this node's lease, because the cluster may give its
    /// ownership out again without this node's word. The lease must have been written before.
    pub lease_bound: bool,
}

/// What a sandbox starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Its guest boots on a new disk over this image.
    Image(ImageDigest),
    /// Its guest boots on a copy of a disk that was sealed alone.
    Disk {
        /// What it was sealed as.
        from: SnapshotDigest,
        /// Which sandbox that was.
        of: SandboxId,
    },
    /// Its guest goes on where it was sealed.
    Snapshot(SnapshotDigest),
    /// Its guest goes on where another one was sealed, as somebody else.
    Fork {
        /// What it was sealed as.
        from: SnapshotDigest,
        /// Which sandbox that was.
        of: SandboxId,
        /// The image on which it boots if it cannot: set where the fork is only the quicker start.
        or_boots: Option<ImageDigest>,
    },
}

impl StartSpec {
    /// Whose snapshot it starts from.
    #[must_use]
    pub const fn sealed_sandbox(&self) -> SandboxId {
        match self.origin {
            Origin::Fork { of, .. } | Origin::Disk { of, .. } => of,
            Origin::Image(_) | Origin::Snapshot(_) => self.id,
        }
    }
}

/// What keeping snapshots takes.
#[derive(Clone, Debug)]
pub struct Keeping {
    /// Where they are.
    pub store: Store,
    /// Who else has them.
    pub holders: Arc<dyn Holders>,
    /// By which they are signed.
    pub identity: Arc<Identity>,
}

/// What all sandboxes of this node share.
#[derive(Debug)]
pub struct Host {
    /// Where their directories lie.
    pub data: DataPaths,
    /// Where their network slots come from.
    pub slots: SlotPool,
    /// How snapshots are kept.
    pub keeping: Keeping,
    /// How the memory of guests comes that were resumed; `None` where no pager can serve, and it is
    /// copied whole before they run.
    pub paging: Option<Paging>,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Its release, for the record.
    pub kernel_release: String,
    /// Initramfs with the guest agent.
    pub initramfs: PathBuf,
    /// Which hypervisor runs guests.
    pub vmm_driver: Driver,
    /// Its executable.
    pub vmm_program: PathBuf,
    /// What executes guest code.
    pub accelerator: Accelerator,
    /// How far VMMs are shut off from this host.
    pub confinement: HostConfinement,
    /// This program, for starting shims.
    pub wrenn: PathBuf,
    /// Which guests start from one that had just booted.
    pub warm: WarmStarts,
    /// Longest a guest may take from its VMM's start to its agent's answer.
    pub boot_timeout: Duration,
}

/// How long the parts of one start took, from the ask to the guest's readiness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartTimings {
    /// Directory and record written.
    pub record: Duration,
    /// Network slot taken.
    pub slot: Duration,
    /// Root disk overlay made.
    pub disk: Duration,
    /// Waited, with nothing else left to do, for the cluster's word that the guest may begin.
    pub word: Duration,
    /// Shim started, without its VMM.
    pub shim: Duration,
    /// VMM started, from its spawn to its first answer.
    pub vmm: Duration,
    /// Guest booted (its agent answers).
    pub guest: Duration,
    /// Agent told who it is, and that it is ready recorded.
    pub setup: Duration,
    /// Sealed as it had booted, for others to start from.
    pub kept: Duration,
    /// What it came from.
    pub way: StartWay,
}

/// What a guest came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartWay {
    /// It booted.
    #[default]
    Cold,
    /// It went on where another one had just booted.
    Warm,
    /// It went on where another one was sealed on purpose.
    Fork,
    /// It went on where it was sealed.
    Resumed,
}

impl StartWay {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Fork => "fork",
            Self::Resumed => "resumed",
        }
    }
}

impl Origin {
    /// What a guest that started from it came from.
    #[must_use]
    pub const fn way(self) -> StartWay {
        match self {
            Self::Image(_) | Self::Disk { .. } => StartWay::Cold,
            Self::Snapshot(_) => StartWay::Resumed,
            Self::Fork { or_boots: None, .. } => StartWay::Fork,
            Self::Fork {
                or_boots: Some(_), ..
            } => StartWay::Warm,
        }
    }
}

impl StartTimings {
    /// From the ask to the guest's readiness.
    #[must_use]
    pub fn total(&self) -> Duration {
        let Self {
            record,
            slot,
            disk,
            word,
            shim,
            vmm,
            guest,
            setup,
            kept,
            way: _,
        } = *self;
        record + slot + disk + word + shim + vmm + guest + setup + kept
    }
}
