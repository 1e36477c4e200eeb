//! The shim's side of listing what a guest has written: by the kernel's notes, by comparing, or, where
//! neither can be had, all that may differ.
//!
//! The notes are those of a process, and go with its memory when it ends. Linux 6.18 says so to whoever
//! asks then; the code of 6.7 lists nothing, without an error, and a snapshot by such a list would have
//! the guest's pages as they were before it ran. So a list counts only if the VMM still has its guest's
//! memory afterwards; else it is as if there were no notes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Instant;

use super::{Pager, Shared};
use crate::pager::dirty::{DirtyError, Evidence, Tracker, may_differ};
use crate::pager::page_map::{PageMap, PageMapError};
use crate::pager::region::ImageOffset;
use crate::pager::source::{Daemon, ImageSource};
use crate::pager::target::AttachError;
use crate::pager::uffd::Tracking;

/// Why written pages cannot be listed. The next snapshot has to be a full one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListWrittenError {
    /// The VMM cannot be looked into.
    #[error("look into the VMM")]
    Target(#[from] AttachError),
    /// Its page map cannot be opened.
    #[error("open the page map of the VMM")]
    Pagemap {
        /// What the kernel said.
        source: io::Error,
    },
    /// The image cannot be read to compare with it.
    #[error("read the page map")]
    Map(#[from] PageMapError),
    /// The pages cannot be listed.
    #[error("list the written pages")]
    Dirty(#[from] DirtyError),
}

impl Pager {
    /// The bytes of the image that may have changed since the guest was resumed, or since
    /// [`Pager::rearm`]. The guest must stand still; a pager need not be there. Where the kernel does
    /// not tell, all that exists is compared, which is given up at `deadline`.
    ///
    /// # Errors
    /// See [`ListWrittenError`].
    pub fn written_since_parent(
        &self,
        deadline: Instant,
    ) -> Result<Vec<Range<ImageOffset>>, ListWrittenError> {
        let shared = &self.shared;
        let written = shared.tracker()?.written_since_parent(deadline)?;
        if shared.tracking == Tracking::WriteProtect {
            shared.check_mapped()?;
        }
        Ok(written)
    }

    /// The bytes of the image that can have changed at all: of every page that exists, or did once. A
    /// superset of [`Self::written_since_parent`] that needs nothing but the memory itself.
    ///
    /// # Errors
    /// [`ListWrittenError::Dirty`].
    pub fn may_differ(&self) -> Result<Vec<Range<ImageOffset>>, ListWrittenError> {
        let shared = &self.shared;
        Ok(may_differ(shared.memory.as_fd(), &shared.table)?)
    }

    /// Has only later writes count, after a snapshot whose guest goes on. The guest must stand
    /// still since its written pages were listed. Refused where writes are found by comparing: the
    /// next list of such a guest is relative to the same image as before.
    ///
    /// # Errors
    /// See [`ListWrittenError`].
    pub fn rearm(&self) -> Result<(), ListWrittenError> {
        Ok(self.shared.tracker()?.rearm()?)
    }
}

impl Shared {
    fn tracker(&self) -> Result<Tracker<'_>, ListWrittenError> {
        let evidence = match self.tracking {
            Tracking::WriteProtect => {
                let path = format!("/proc/{}/pagemap", self.target.pid());
                let pagemap = File::open(path);
                Evidence::Notes(pagemap.map_err(|source| ListWrittenError::Pagemap { source })?)
            }
            Tracking::Compare => {
                let map = PageMap::read(&self.spec.pages)?;
                let daemon = Daemon::new(self.spec.daemon.clone(), self.spec.sandbox.clone());
                Evidence::Parent(Box::new(ImageSource::new(map, Box::new(daemon))))
            }
        };
        if self.target.has_ended() {
            return Err(AttachError::Ended.into());
        }
        Ok(Tracker {
            memory: self.memory.as_fd(),
            layout: &self.layout,
            table: &self.table,
            evidence,
        })
    }

    /// That the VMM has its guest's memory, and had it until now.
    fn check_mapped(&self) -> Result<(), AttachError> {
        self.target
            .layout(self.memory.as_fd(), self.region)
            .map(drop)
    }
}
