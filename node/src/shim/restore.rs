//! Bringing back a saved guest, up to the point where it only has to be let go on.
//!
//! ```text
//! state file whole, of this hardware? > memory made > VMM up, waiting > memory in place > state loaded
//! ```
//!
//! Then the shim reports *up*, and the guest stands still until the daemon's `Thaw`: the daemon may
//! die in between, and the next one must find a guest of which it is certain that it has not run.
//! Before that nobody is told anything, and the first step that fails takes everything with it.
//! *Memory in place* may mean that a pager serves, and that none of it is here yet ([`super::paged`]).
//!
//! Nothing of the old host matters: namespace, tap, paths, console and descriptors are this one's.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::ids::SandboxId;

use crate::pager::handle::Pager;
use crate::pager::memory::GuestMemory;
use crate::shim::dirty::DirtyPages;
use crate::shim::paged::Paged;
use crate::shim::source::{Brought, Eager, MemoryLoss, MemorySource, MemorySourceError};
use crate::shim::spec::{MemoryImage, RestoreSpec};
use crate::shim::state::StateFileError;
use crate::vmm::{Hardware, Vmm, VmmError};

/// Longest time for the memory and the state to be in place, counted from the VMM's first answer. A
/// pager serves within milliseconds, and loading the state touches a few pages; each of those may
/// have to be brought from another node, of which one answer may take 20 s. A flat image comes at
/// 1 GiB/s where the disk can.
pub const RESTORE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the pager may take to end, after its VMM or when it is told to: it has nothing to clean up.
pub const PAGER_END_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a saved guest was not brought back.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Its memory is not to be had.
    #[error("bring back the guest's memory")]
    Memory(#[from] MemorySourceError),
    /// The VMM does not take its state.
    #[error("bring back the guest's devices")]
    Vmm(#[from] VmmError),
}

/// A saved guest that is fit to be brought back.
pub struct Restore {
    state: File,
    hardware: Hardware,
    asks: bool,
    source: Box<dyn MemorySource>,
}

/// A guest that is back and stands still.
pub struct Restored {
    /// Who knows what it writes.
    pub dirty: Box<dyn DirtyPages>,
    /// Who brings its memory, where not all of it is here.
    pub pager: Option<Arc<Pager>>,
    /// How long its memory took.
    pub memory: Duration,
    /// How long its state took.
    pub load: Duration,
}

impl Restore {
    /// Looks at what there is to bring back to `sandbox` in `dir`, before anything is started for
    /// it.
    ///
    /// # Errors
    /// See [`StateFileError`].
    pub fn open(
        spec: &RestoreSpec,
        sandbox: SandboxId,
        dir: &Path,
    ) -> Result<Self, StateFileError> {
        let source: Box<dyn MemorySource> = match &spec.memory {
            MemoryImage::Flat(image) => Box::new(Eager::new(image)),
            MemoryImage::Paged { daemon } | MemoryImage::Asked { daemon } => {
                Box::new(Paged::new(dir, daemon, sandbox))
            }
        };
        Ok(Self {
            state: spec.state.open(&spec.hardware)?,
            hardware: spec.hardware.clone(),
            asks: matches!(spec.memory, MemoryImage::Asked { .. }),
            source,
        })
    }

    /// What the VMM has to be built as.
    #[must_use]
    pub fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    /// Does what can be done before there is a VMM, while that is being started.
    pub fn begin(&self) {
        self.source.begin();
    }

    /// Whether the VMM has to ask for the memory by itself.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.asks
    }

    /// What it will be given.
    #[must_use]
    pub fn state(&self) -> BorrowedFd<'_> {
        self.state.as_fd()
    }

    /// Fills `vmm`, which waits, and whose memory is the empty `memory`. `loss` is what ends the
    /// guest should a part of that not come later.
    ///
    /// # Errors
    /// See [`RestoreError`]. The VMM is of no further use.
    pub fn fill(
        &self,
        vmm: &dyn Vmm,
        memory: &GuestMemory,
        loss: &MemoryLoss,
    ) -> Result<Restored, RestoreError> {
        let began = Instant::now();
        let deadline = began + RESTORE_TIMEOUT;
        let brought = self.source.prepare(vmm, memory, loss, deadline)?;
        let Brought { dirty, pager } = brought;
        let prepared = Instant::now();
        if let Err(err) = vmm.load_state(self.state.as_fd(), deadline) {
            // Whoever hears of it may rely on nothing of the guest being left. The VMM is not killed
            // yet: it may just be saying why.
            if let Some(pager) = pager {
                pager.end(Instant::now() + PAGER_END_TIMEOUT);
            }
            return Err(err.into());
        }
        Ok(Restored {
            dirty,
            pager,
            memory: prepared - began,
            load: prepared.elapsed(),
        })
    }
}
