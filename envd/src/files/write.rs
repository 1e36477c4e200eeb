//! One file written in place.
//!
//! Order, as watchers see it: create, change of owner, write. An existing file is given to its new
//! owner first and truncated then. Pieces are gathered to [`FLUSH_BYTES`] and handed to a thread
//! that may block. If the upload fails, a file that was not there before is removed again, so that
//! a full disk is not kept full by the half of it; an old file keeps what was written so far.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::StatusCode;
use bytes::{Bytes, BytesMut};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::task::spawn_blocking;

use super::metadata::{self, Metadata};
use super::reach::{self, Opener, Way};
use crate::http::error::ApiError;
use crate::log::chain;
use crate::users::User;

/// Bytes gathered before they are written; also what one upload holds in memory.
const FLUSH_BYTES: usize = 256 * 1024;
/// Mode of new files before the umask.
const FILE_MODE: u32 = 0o666;

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The path is a directory.
    #[error("path '{}' is a directory", .0.display())]
    IsDirectory(PathBuf),
    /// The path leads through something that is no directory.
    #[error("path '{}' leads through a file", .0.display())]
    NotDirectory(PathBuf),
    /// The path is something whose content is not ours to replace: a device, a pipe, a socket.
    #[error("path '{}' is not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// Neither the user nor root on the user's behalf may go there.
    #[error("path '{}' is out of the user's reach, or leads through another's link", .0.display())]
    OutOfReach(PathBuf),
    /// Blocks, inodes or the quota have run out.
    #[error("no space left for '{}'", .path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else failed.
    #[error("write '{}'", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl WriteError {
    /// What went wrong with the file at `path`.
    #[must_use]
    pub fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace { path, source },
            Some(libc::EISDIR) => Self::IsDirectory(path),
            Some(libc::ENOTDIR) => Self::NotDirectory(path),
            Some(libc::EACCES) => Self::OutOfReach(path),
            // Opened without blocking, a pipe nobody reads says so.
            Some(libc::ENXIO) => Self::NotRegular(path),
            _ => Self::Io { path, source },
        }
    }
}

impl From<WriteError> for ApiError {
    fn from(err: WriteError) -> Self {
        match err {
            WriteError::IsDirectory(_)
            | WriteError::NotDirectory(_)
            | WriteError::NotRegular(_) => Self::bad_request(chain(&err)),
            WriteError::OutOfReach(_) => Self::new(StatusCode::FORBIDDEN, chain(&err)),
            WriteError::NoSpace { .. } => Self::new(StatusCode::INSUFFICIENT_STORAGE, chain(&err)),
            WriteError::Io { .. } => Self::internal(err),
        }
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct Writing {
    path: PathBuf,
    user: User,
    opened: Arc<Opened>,
    pending: BytesMut,
    /// Whether what is there is wanted.
    is_complete: bool,
}

impl Writing {
    /// Opens `path` for `user`: makes its parents, gives it to the user and empties it.
    ///
    /// # Errors
    /// [`WriteError`] says whether the path or the disk is at fault.
    pub async fn open(path: PathBuf, user: User, metadata: Metadata) -> Result<Self, WriteError> {
        let open = move || {
            let opened = open_for(&path, &user, &metadata)?;
            Ok(Self {
                path,
                user,
                opened: Arc::new(opened),
                pending: BytesMut::new(),
                is_complete: false,
            })
        };
        blocking(open).await
    }

    /// The file's absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a piece.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`] or [`WriteError::Io`].
    pub async fn push(&mut self, piece: Bytes) -> Result<(), WriteError> {
        self.pending.extend_from_slice(&piece);
        if self.pending.len() < FLUSH_BYTES {
            return Ok(());
        }
        self.flush().await
    }

    /// Writes what is left and returns the metadata now on disk.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`] or [`WriteError::Io`].
    pub async fn complete(mut self) -> Result<Metadata, WriteError> {
        self.flush().await?;
        self.is_complete = true;
        let opened = self.opened.clone();
        blocking(move || Ok(metadata::read(&opened.file))).await
    }

    async fn flush(&mut self) -> Result<(), WriteError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (opened, piece, path) = (
            self.opened.clone(),
            self.pending.split().freeze(),
            self.path.clone(),
        );
        let write = move || {
            (&opened.file)
                .write_all(&piece)
                .map_err(|err| WriteError::new(&path, err))
        };
        blocking(write).await
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.is_complete {
            self.opened.give_up(&self.user);
        }
    }
}

/// Runs disk work where it may block. If the runtime is stopping, so is everything.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WriteError> + Send + 'static,
) -> Result<T, WriteError> {
    let stopped = |err| WriteError::Io {
        path: PathBuf::new(),
        source: io::Error::other(err),
    };
    spawn_blocking(work).await.map_err(stopped)?
}

/// A file that was opened as an upload does it.
#[derive(Debug)]
pub struct Opened {
    /// The file, empty and the user's.
    pub file: File,
    /// Of a file that was not there before, how to remove it again.
    pub new: Option<Way>,
}

impl Opened {
    /// Removes a file that was begun and not finished, if it is a new one.
    pub fn give_up(&self, user: &User) {
        if let Some(way) = &self.new {
            // If it is gone already, so much the better.
            let _ = way.remove(user);
        }
    }
}

/// Opens `path` for `user` as an upload does. Blocks.
///
/// # Errors
/// [`WriteError`] says whether the path or the disk is at fault.
pub fn open_for(path: &Path, user: &User, metadata: &Metadata) -> Result<Opened, WriteError> {
    open(path, user, metadata).map_err(|err| WriteError::new(path, err))
}

fn open(path: &Path, user: &User, metadata: &Metadata) -> io::Result<Opened> {
    let ((file, is_new), way) = reach::come_to(path, user, true, open_or_make)?;
    let opened = Opened {
        file,
        new: is_new.then_some(way),
    };
    let kept = prepare(&opened.file, user, metadata);
    if kept.is_err() {
        opened.give_up(user);
    }
    kept.map(|()| opened)
}

/// The file and whether it is new.
fn open_or_make(open: Opener<'_>) -> io::Result<(File, bool)> {
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let mode = Mode::from_bits_truncate(FILE_MODE);
    match open(flags, mode) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => {}
        opened => return Ok((opened?, false)),
    }
    match open(flags | OFlag::O_CREAT | OFlag::O_EXCL, mode) {
        // A dangling link, or somebody else made it in this instant: make or take it.
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
            Ok((open(flags | OFlag::O_CREAT, mode)?, false))
        }
        made => Ok((made?, true)),
    }
}

fn prepare(file: &File, user: &User, metadata: &Metadata) -> io::Result<()> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::from_raw_os_error(libc::ENXIO));
    }
    // Even if the owner is right already: watchers count on the event.
    fchown(file, Some(user.uid), Some(user.gid))?;
    if file.metadata()?.len() > 0 {
        file.set_len(0)?;
    }
    metadata::replace(file, metadata)
}
