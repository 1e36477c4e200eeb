//! Why a sandbox could not get, or give back, what it needs on this host.

use std::io;

use super::snapshot::SnapshotError;
use crate::guest::{GuestError, RestoreError};
use crate::net::NetError;
use crate::shim::error::{CallShimError, SpawnShimError, SweepError};
use crate::store::CreateOverlayError;
use crate::store::fetch::FetchError;

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
    /// What it goes on from is not all here, or damaged.
    #[error("put the sandbox together from its snapshot")]
    Snapshot {
        /// What is missing.
        #[from]
        source: SnapshotError,
    },
    /// What it goes on from could not be had from those who have it.
    #[error("fetch the sandbox's snapshot")]
    Fetch {
        /// What came of it.
        #[from]
        source: FetchError,
    },
    /// Its guest was brought back and is not itself.
    #[error("bring the guest back")]
    Restore {
        /// What the agent, or its silence, says.
        #[from]
        source: RestoreError,
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
    /// It has no network, by which its guest would be reached.
    #[error("it has no network")]
    NoNetwork,
    /// Its guest did not come up.
    #[error("wait for the guest")]
    Guest {
        /// What the agent, or its silence, says.
        #[from]
        source: GuestError,
    },
}
