//! What stops a group for good, and where it is written down.
//!
//! Storage threads find faults; openraft only carries text. So whoever finds one files it here
//! first, and whoever has to report it (a failed proposal, the daemon that waits for the group's
//! end) reads it here in full. The first fault wins: later ones are its echo.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use crate::machine::Unreadable;

/// Why this member can take no further part until a person has acted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// No space is left for the log. Entries refused by this were not acknowledged.
    #[error("the disk is full: {doing} {}", .path.display())]
    DiskFull {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// The disk refused an operation. It is not retried: after a failed sync the kernel has
    /// dropped the data, and a second sync would succeed without it.
    #[error("the disk failed: {doing} {}", .path.display())]
    Disk {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// An entry or a snapshot was written by a newer version.
    #[error("cannot apply the entry at {index}: upgrade this node")]
    Unreadable {
        /// The entry's position.
        index: u64,
        /// The decoder's words.
        source: Unreadable,
    },
    /// A storage thread ended without a word.
    #[error("the {0} thread died")]
    Died(&'static str),
    /// openraft stopped by itself.
    #[error("raft stopped: {0}")]
    Core(String),
}

impl Fault {
    /// The fault that `source` is, met while `doing` something to `path`.
    pub(crate) fn disk(doing: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            return Self::DiskFull {
                doing,
                path,
                source,
            };
        }
        Self::Disk {
            doing,
            path,
            source,
        }
    }
}

/// Where the first fault of a group is kept; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct FaultCell(Arc<watch::Sender<Option<Arc<Fault>>>>);

impl FaultCell {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Files `fault` unless there is one; returns the one that counts.
    pub(crate) fn file(&self, fault: Fault) -> Arc<Fault> {
        let fault = Arc::new(fault);
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert_with(|| Arc::clone(&fault));
            is_first
        });
        self.get().unwrap_or(fault)
    }

    /// The first fault, if any.
    pub(crate) fn get(&self) -> Option<Arc<Fault>> {
        self.0.borrow().clone()
    }

    /// Waits for the first fault.
    pub(crate) async fn wait(&self) -> Arc<Fault> {
        let mut watched = self.0.subscribe();
        loop {
            if let Some(fault) = watched.borrow_and_update().clone() {
                return fault;
            }
            if watched.changed().await.is_err() {
                // Cannot be: `self` holds the sender.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// `fault` in the form openraft's storage traits want.
pub(crate) fn as_io(fault: &Fault) -> io::Error {
    io::Error::other(fault.to_string())
}
