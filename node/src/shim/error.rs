//! What can go wrong between the daemon and a shim, sorted by who must act.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use proto::ids::SandboxId;

use crate::base::remedy::Remedy;
use crate::pager::memory::CreateMemoryError;
use crate::shim::lease::ReadLeaseError;
use crate::shim::protocol::FrameError;
use crate::shim::restore::RestoreError;
use crate::shim::state::StateFileError;
use crate::vmm::cgroup::CgroupError;
use crate::vmm::{SpawnVmmError, VmmError};

/// Why a file of a sandbox's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadFileError {
    /// It is not there.
    #[error("there is no {name}")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// The disk refused.
    #[error("read {name}")]
    Disk {
        /// Its name.
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what we write.
    #[error("understand {name}")]
    Malformed {
        /// Its name.
        name: &'static str,
        /// What was expected.
        source: serde_json::Error,
    },
    /// Another release wrote it.
    #[error("{name} has version {found}, and this release knows version {known}")]
    UnknownVersion {
        /// Its name.
        name: &'static str,
        /// The version in the file.
        found: u32,
        /// The version we know.
        known: u32,
    },
    /// One of its words means nothing to us.
    #[error("{name}: {field} cannot be {value:?}")]
    BadValue {
        /// The file's name.
        name: &'static str,
        /// Which word.
        field: &'static str,
        /// What it says.
        value: String,
    },
}

/// Why a shim gave up before its guest ran. Reported in words to whoever started it.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RunShimError {
    /// The directory is not there or not writable.
    #[error("use the sandbox directory {dir:?}")]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A shim runs there already.
    #[error("another shim owns the sandbox directory {dir:?}")]
    Taken {
        /// The directory.
        dir: PathBuf,
    },
    /// What to run cannot be read.
    #[error("learn what to run")]
    Spec(#[from] ReadFileError),
    /// The guest's memory cannot be had.
    #[error("get memory for the guest")]
    Memory(#[from] CreateMemoryError),
    /// The VMM did not come up.
    #[error("start the VMM")]
    Vmm(#[from] SpawnVmmError),
    /// The guest may only run under the node's lease, and there is none.
    #[error("learn the node's lease")]
    Lease(#[from] ReadLeaseError),
    /// As `Lease`: there was one, and it has ended.
    #[error("the node's lease has ended: no guest may start under it")]
    LeaseEnded,
    /// What the guest shall go on from is not fit for it.
    #[error("look at the saved guest")]
    State(#[from] StateFileError),
    /// It was, and could not be brought back all the same.
    #[error("restore the guest (the VMM said: {complaint})")]
    Restore {
        /// The end of what the VMM wrote to its standard error.
        complaint: String,
        /// Which step failed, and why.
        source: RestoreError,
    },
    /// The process could not be set up.
    #[error("{doing}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a shim was not started.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SpawnShimError {
    /// `shim.json` could not be written, or the directory is not there.
    #[error("write what the shim in {dir:?} shall run")]
    Write {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process could not be made.
    #[error("start {program:?} as a shim")]
    Start {
        /// Our own executable.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The shim itself says why.
    #[error("the shim gave up: {reason}")]
    GaveUp {
        /// In the shim's words.
        reason: String,
    },
    /// It did not report in time. It may still come up: sweep the directory.
    #[error("the shim did not come up within {waited:?}")]
    TimedOut {
        /// How long we waited.
        waited: Duration,
    },
    /// It came up, and then did not answer.
    #[error("greet the new shim")]
    Greet(#[source] CallShimError),
}

impl SpawnShimError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Write { .. } | Self::Start { .. } => Remedy::CallOperator,
            Self::GaveUp { .. } | Self::TimedOut { .. } | Self::Greet(_) => Remedy::RetryLater,
        }
    }
}

/// Why a shim did not answer as asked.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CallShimError {
    /// Nobody listens, and no exit was recorded: it was killed, or never ran.
    #[error("no shim runs in {dir:?}")]
    Gone {
        /// The directory.
        dir: PathBuf,
    },
    /// This node could not reach it; whether it runs is not known.
    #[error("connect to the shim in {dir:?}")]
    Connect {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It runs, and does not answer in time.
    #[error("the shim in {dir:?} did not answer within {waited:?}")]
    TimedOut {
        /// The directory.
        dir: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// It answered with something else than an answer.
    #[error("understand the shim in {dir:?}")]
    Frame {
        /// The directory.
        dir: PathBuf,
        /// What came instead.
        source: FrameError,
    },
    /// Its answer belongs to another question.
    #[error("the shim in {dir:?} gave an answer to another question")]
    WrongAnswer {
        /// The directory.
        dir: PathBuf,
    },
    /// It speaks a protocol of another release.
    #[error("the shim in {dir:?} speaks version {found}, and this release version {known}")]
    UnknownVersion {
        /// The directory.
        dir: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// It runs another sandbox than its directory is for.
    #[error("the shim in {dir:?} runs {found}")]
    WrongSandbox {
        /// The directory.
        dir: PathBuf,
        /// What it runs.
        found: SandboxId,
    },
    /// It understood, and could not.
    #[error("the shim in {dir:?} failed: {message}")]
    Failed {
        /// The directory.
        dir: PathBuf,
        /// In the shim's words.
        message: String,
    },
    /// Its files cannot be used.
    #[error("read the files of the shim in {dir:?}")]
    Files {
        /// The directory.
        dir: PathBuf,
        /// Which, and why.
        source: ReadFileError,
    },
}

impl CallShimError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Gone { .. } => Remedy::NotThere,
            Self::Connect { .. } | Self::TimedOut { .. } | Self::Failed { .. } => {
                Remedy::RetryLater
            }
            Self::Frame { .. }
            | Self::WrongAnswer { .. }
            | Self::UnknownVersion { .. }
            | Self::WrongSandbox { .. }
            | Self::Files { .. } => Remedy::CallOperator,
        }
    }
}

/// Why the processes of a directory could not be swept.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The directory is not there.
    #[error("use the sandbox directory {dir:?}")]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The list of processes cannot be read.
    #[error("list the processes of this host")]
    List {
        /// What the kernel said.
        source: io::Error,
    },
    /// A process could not be killed.
    #[error("kill process {pid}")]
    Kill {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The end of a killed process could not be waited for.
    #[error("wait for the end of process {pid}")]
    Wait {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A killed process is still there.
    #[error("process {pid} was killed and has not ended within {waited:?}")]
    Lingers {
        /// The process.
        pid: u32,
        /// How long we waited.
        waited: Duration,
    },
    /// The control group of its VMM is still there.
    #[error("remove the VMM's control group")]
    Group {
        /// What stands in the way.
        source: CgroupError,
    },
}

/// Why a shim could not carry out a `Stop`.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The VMM could not be killed.
    #[error("end the VMM")]
    Vmm(#[from] VmmError),
    /// It was killed, and the kernel has not let go of it.
    #[error("the VMM was killed and has not ended within {waited:?}")]
    Lingers {
        /// How long we waited.
        waited: Duration,
    },
}
