//! What can go wrong with a VMM, sorted by who must act.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::base::remedy::Remedy;
use crate::vmm::cloud_hypervisor::api::ApiError;
use crate::vmm::cloud_hypervisor::kept::KeptError;
use crate::vmm::cloud_hypervisor::offload::OffloadError;
use crate::vmm::cloud_hypervisor::version::UnknownVersion;
use crate::vmm::jail::JailError;
use crate::vmm::qemu::qmp::QmpError;

/// Longest name of hardware that is told: ours are shorter.
const NAME_CHARS: usize = 64;

/// A [`VmmSpec`](crate::vmm::VmmSpec) that no driver can start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A number is outside what the machine can be built with.
    #[error("{what} must be between {least} and {most}, not {found}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// The smallest that works.
        least: u64,
        /// The largest that works.
        most: u64,
        /// What was asked for.
        found: u64,
    },
    /// A path cannot be handed to the VMM.
    #[error("the path {path:?} of the {what} must be absolute and valid UTF-8")]
    Path {
        /// What lies there.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A word would change its meaning inside a kernel command line or an option list.
    #[error("{what} {value:?} has a character that is not allowed")]
    Word {
        /// What it stands for.
        what: &'static str,
        /// The word.
        value: String,
    },
    /// The kernel would cut the line off silently.
    #[error("the kernel command line has {found} bytes, more than {most}")]
    LineTooLong {
        /// Its length.
        found: usize,
        /// The kernel's limit.
        most: usize,
    },
    /// The guest was saved on virtual hardware that this release cannot build.
    #[error("this release has no {what} {name:?}")]
    UnknownHardware {
        /// Which part of it.
        what: &'static str,
        /// Its name in the snapshot.
        name: String,
    },
    /// The guest was saved with the host's own processor, which is another one here.
    #[error("the guest needs the processor {wanted:?}, and this host has {found:?}")]
    OtherProcessor {
        /// Where it ran.
        wanted: String,
        /// What is here.
        found: String,
    },
}

impl SpecError {
    /// Virtual hardware that this release cannot build. Its name may come from a peer, so it is cut.
    pub(super) fn unknown(what: &'static str, name: &str) -> Self {
        Self::UnknownHardware {
            what,
            name: name.chars().take(NAME_CHARS).collect(),
        }
    }
}

/// How a conversation with a VMM failed, in the words of its driver.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum TalkError {
    /// With QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// With Cloud Hypervisor.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// With Cloud Hypervisor, about the guest that is to be handed to it.
    #[error(transparent)]
    Offload(#[from] OffloadError),
    /// Cloud Hypervisor is another release than we know.
    #[error(transparent)]
    Version(#[from] UnknownVersion),
    /// Cloud Hypervisor has not mapped the memory that it was given.
    #[error("the VMM has mapped {found} of {wanted} bytes of the guest's memory")]
    HalfMapped {
        /// How much it has.
        found: u64,
        /// How much there is.
        wanted: u64,
    },
    /// A socket for it could not be made, or nobody came to it.
    #[error("{doing}")]
    Socket {
        /// What we were doing.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl TalkError {
    /// Whether the VMM closed the conversation, as one does that ends.
    #[must_use]
    pub fn is_end(&self) -> bool {
        matches!(
            self,
            Self::Qmp(QmpError::Closed { .. }) | Self::Api(ApiError::Closed { .. })
        )
    }
}

/// Why a VMM could not be started.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SpawnVmmError {
    /// What was asked for cannot be built.
    #[error("build the virtual machine")]
    Spec(#[source] SpecError),
    /// The network namespace of the sandbox cannot be entered.
    #[error("open the network namespace {path:?}")]
    Netns {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no jail to put it into.
    #[error("make the VMM's jail")]
    Jail(#[from] JailError),
    /// The process could not be made.
    #[error("start {program:?}")]
    Start {
        /// The executable.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process started and ended, or fell silent, before the guest ran.
    #[error("{program:?} did not come up: {complaint}")]
    NotUp {
        /// The executable.
        program: PathBuf,
        /// The end of what it wrote to its standard error.
        complaint: String,
        /// How the conversation broke off.
        source: TalkError,
    },
    /// What is there of the saved guest is not one of this machine.
    #[error("read the saved guest")]
    Saved(#[source] KeptError),
}

impl SpawnVmmError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Spec(_) | Self::Saved(_) => Remedy::FixRequest,
            Self::Netns { .. } | Self::NotUp { .. } => Remedy::RetryLater,
            Self::Start { .. } | Self::Jail(_) => Remedy::CallOperator,
        }
    }
}

/// Why a device state was not written, or not taken in.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum MoveStateError {
    /// The conversation about it failed; a VMM that cannot read a state ends, and so it looks.
    #[error("lead the VMM through it")]
    Talk(#[from] TalkError),
    /// The hand-over failed.
    #[error("hand the guest over")]
    Offload(#[from] OffloadError),
    /// What was handed over is not what it should be.
    #[error("take the guest's documents for what they are")]
    Kept(#[from] KeptError),
    /// The file refused.
    #[error("move the state's bytes")]
    File(#[source] io::Error),
    /// The VMM still asks for pages of its guest, which runs.
    #[error("not all of the guest's memory had come within {waited:?}")]
    PagesMissing {
        /// How long we waited.
        waited: Duration,
    },
    /// The VMM tried, and says why it could not.
    #[error("the VMM gave up: {reason}")]
    GaveUp {
        /// In its words.
        reason: String,
    },
    /// The VMM was not done in time.
    #[error("it was not done within {waited:?}")]
    TimedOut {
        /// How long we waited.
        waited: Duration,
    },
}

/// Why a file is not a device state for the hardware at hand, told from its first bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForeignStateError {
    /// It does not begin like one.
    #[error("it is no device state, or its beginning is damaged")]
    NotAState,
    /// A VMM with another format wrote it.
    #[error("it has version {found} of the format, and this release knows {known}")]
    UnknownVersion {
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// It is of another machine.
    #[error("it is of a machine {found:?}, and the guest is said to have been a {wanted:?}")]
    OtherMachine {
        /// What it says.
        found: String,
        /// What it was taken for.
        wanted: String,
    },
}

/// Why a running VMM did not do as told.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The management conversation failed.
    #[error("tell the VMM to {verb}")]
    Told {
        /// What it was told.
        verb: &'static str,
        /// How it failed.
        source: TalkError,
    },
    /// The device state could not be written.
    #[error("have the VMM write its device state")]
    Save(#[source] MoveStateError),
    /// The device state could not be taken in.
    #[error("have the VMM take in a device state")]
    Load(#[source] MoveStateError),
    /// The process could not be signalled.
    #[error("kill VMM process {pid}")]
    Kill {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process could not be stopped, or let go on.
    #[error("send {signal} to VMM process {pid}")]
    Signal {
        /// The signal.
        signal: Signal,
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The end of the process could not be awaited.
    #[error("wait for VMM process {pid}")]
    Wait {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

impl From<QmpError> for MoveStateError {
    fn from(err: QmpError) -> Self {
        Self::Talk(err.into())
    }
}

impl From<ApiError> for MoveStateError {
    fn from(err: ApiError) -> Self {
        Self::Talk(err.into())
    }
}

impl VmmError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Told { .. } | Self::Load(_) => Remedy::BlameGuest,
            Self::Save(_) => Remedy::RetryLater,
            Self::Kill { .. } | Self::Signal { .. } | Self::Wait { .. } => Remedy::CallOperator,
        }
    }
}
