//! Why a sandbox could not get, or give back, what it needs on this host.

use std::io;

use crate::guest::GuestError;
use crate::net::NetError;
use crate::shim::error::{CallShimError, SpawnShimError, SweepError};
use crate::store::CreateOverlayError;

/// Why a step of a sandbox's start or release failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// Its directory or record could not be written or removed.
    #[error("keep the sandbox's record on disk")]
    Record {
        /// What the disk says.
        source: io::Error,
    },
    /// It has no network.
    #[error("set up the sandbox's network")]
    Network {
        /// What the kernel says.
        #[from]
        source: NetError,
    },
    /// It has no disk.
    #[error("make the sandbox's root disk")]
    Disk {
        /// What the store says.
        #[from]
        source: CreateOverlayError,
    },
    /// Its VMM did not start.
    #[error("start the sandbox's VMM")]
    Vmm {
        /// What the shim says.
        #[from]
        source: SpawnShimError,
    },
    /// Its shim does not do as it is told.
    #[error("call the sandbox's shim")]
    Shim {
        /// What went wrong.
        #[from]
        source: CallShimError,
    },
    /// Processes of it are left and cannot be ended.
    #[error("end the sandbox's processes")]
    Sweep {
        /// What stands in the way.
        #[from]
        source: SweepError,
    },
    /// Its guest did not come up.
    #[error("wait for the guest")]
    Guest {
        /// What the agent, or its silence, says.
        #[from]
        source: GuestError,
    },
}
