//! The memory of a guest that a pager brings, page by page, while the guest runs.
//!
//! ```text
//! prepare   pager up, the VMM's page faults are its own > (state loaded, guest goes on) > …
//! list      what the kernel noted as written since, or, should it not tell, all that may differ
//! sealed    the kernel's notes begin anew
//! end       the VMM's: the pager goes with it; or the pager's last word: the guest is ended
//! ```
//!
//! A page that nobody has touched is not in the memory, and reads there as zero. So what is not
//! listed is always as in a snapshot ([`Basis::Parent`], [`Basis::LastSeal`]), and never "zero": a list
//! of all that exists would lose whatever was not touched.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use proto::ids::SandboxId;

use crate::base::chain::chain;
use crate::pager::dirty::DirtyError;
use crate::pager::handle::{ListWrittenError, OURSELVES, Pager, PagerEnd, PagerSpec, Waiting};
use crate::pager::memory::GuestMemory;
use crate::pager::region::ImageOffset;
use crate::shim::console::BoundedLog;
use crate::shim::dirty::{Basis, DirtyList, DirtyPages, ListDirtyError};
use crate::shim::files;
use crate::shim::source::{Brought, MemoryLoss, MemorySource, MemorySourceError};
use crate::vmm::Vmm;

/// Has a pager bring the memory.
pub struct Paged {
    dir: PathBuf,
    daemon: PathBuf,
    sandbox: SandboxId,
    /// Started before the VMM, and for it.
    waiting: Mutex<Option<Waiting>>,
}

impl Paged {
    /// A source by the page map in `dir`, the directory of `sandbox`; `daemon` is where the daemon
    /// answers for chunks that are not on this node.
    #[must_use]
    pub fn new(dir: &Path, daemon: &Path, sandbox: SandboxId) -> Self {
        Self {
            dir: dir.to_owned(),
            daemon: daemon.to_owned(),
            sandbox,
            waiting: Mutex::new(None),
        }
    }
}

impl Paged {
    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemorySource for Paged {
    fn begin(&self) {
        *self.waiting() = Waiting::start(Path::new(OURSELVES), &self.dir).ok();
    }

    fn prepare(
        &self,
        vmm: &dyn Vmm,
        memory: &GuestMemory,
        loss: &MemoryLoss,
        deadline: Instant,
    ) -> Result<Brought, MemorySourceError> {
        let sandbox = self.sandbox.to_string();
        let spec = PagerSpec::new(&self.dir, vmm.pid(), self.daemon.clone(), sandbox);
        let loss = loss.clone();
        let on_end = move |end| {
            if let PagerEnd::Failed { reason } = end {
                loss.end_guest(&reason);
            }
        };
        let waiting = self.waiting().take();
        let waiting = waiting.map_or_else(|| Waiting::start(&spec.program, &self.dir), Ok)?;
        let questions = vmm.take_questions();
        let pager = Pager::start_by(waiting, spec, questions, memory, deadline, on_end)?;
        let pager = Arc::new(pager);
        let written = Written {
            pager: Arc::clone(&pager),
            dir: self.dir.clone(),
            since_seal: AtomicBool::new(false),
        };
        Ok(Brought {
            dirty: Box::new(written),
            pager: Some(pager),
        })
    }
}

/// Knows which pages a guest has written since a pager began to bring them, or since its last seal.
struct Written {
    pager: Arc<Pager>,
    dir: PathBuf,
    /// The kernel's notes were begun anew with that seal.
    since_seal: AtomicBool,
}

impl DirtyPages for Written {
    fn list(&self, memory: &GuestMemory, deadline: Instant) -> Result<DirtyList, ListDirtyError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let pages = self.pager.written_since_parent(deadline - left / 2);
        let pages = pages.or_else(|err| {
            self.log(&format!(
                "which pages were written is not known, and all that exist are taken for written: {}",
                chain(&err)
            ));
            self.pager.may_differ()
        });
        let pages = pages.map_err(unlisted)?;
        let basis = match self.since_seal.load(Ordering::Relaxed) {
            true => Basis::LastSeal,
            false => Basis::Parent,
        };
        list_of(basis, memory, pages)
    }

    fn list_since_resume(
        &self,
        memory: &GuestMemory,
        _: Instant,
    ) -> Result<DirtyList, ListDirtyError> {
        let pages = self.pager.may_differ().map_err(unlisted)?;
        list_of(Basis::Parent, memory, pages)
    }

    fn sealed(&self) {
        let rearmed = self.pager.rearm();
        let begun = match &rearmed {
            // A part of the notes may have been begun anew; the others have what was noted before as well.
            Ok(()) | Err(ListWrittenError::Dirty(DirtyError::Kernel { .. })) => true,
            // Among them that writes are found by comparing: with what the guest was resumed from.
            Err(_) => false,
        };
        if begun {
            self.since_seal.store(true, Ordering::Relaxed);
        }
        if let Err(err) = rearmed
            && !matches!(err, ListWrittenError::Dirty(DirtyError::NothingToRearm))
        {
            self.log(&format!(
                "the next list is longer than what will be written: {}",
                chain(&err)
            ));
        }
    }
}

impl Written {
    fn log(&self, line: &str) {
        BoundedLog::new(&self.dir, files::LOG).append(format!("{line}\n").as_bytes());
    }
}

fn list_of(
    basis: Basis,
    memory: &GuestMemory,
    pages: Vec<Range<ImageOffset>>,
) -> Result<DirtyList, ListDirtyError> {
    let bytes = |run: Range<ImageOffset>| run.start.0..run.end.0;
    let ranges = pages.into_iter().map(bytes).collect();
    Ok(DirtyList::new(basis, memory.region(), ranges)?)
}

fn unlisted(err: ListWrittenError) -> ListDirtyError {
    ListDirtyError::Kernel(std::io::Error::other(err))
}
