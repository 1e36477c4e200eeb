//! What can go wrong with a VMM, sorted by who must act.

use std::io;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::base::remedy::Remedy;
use crate::vmm::qemu::qmp::QmpError;

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
        source: QmpError,
    },
}

impl SpawnVmmError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Spec(_) => Remedy::FixRequest,
            Self::Netns { .. } | Self::NotUp { .. } => Remedy::RetryLater,
            Self::Start { .. } => Remedy::CallOperator,
        }
    }
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
        source: QmpError,
    },
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

impl VmmError {
    /// Who must act next.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Told { .. } => Remedy::BlameGuest,
            Self::Kill { .. } | Self::Signal { .. } | Self::Wait { .. } => Remedy::CallOperator,
        }
    }
}
