//! One file written in place.
//!
//! Order, as watchers see it: create, change of owner, write. An existing file is given to its new
//! owner first and truncated then. Pieces are gathered to [`FLUSH_BYTES`] and handed to a thread
//! that may block. If the upload fails, a file that was not there before is removed again, so that
//! a full disk is not kept full by the half of it; an old file keeps what was written so far.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::StatusCode;
use bytes::{Bytes, BytesMut};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use tokio::task::spawn_blocking;

use super::metadata::{self, Metadata};
use crate::http::error::ApiError;
use crate::log::chain;
use crate::users::User;

/// Bytes gathered before they are written; also what one upload holds in memory.
const FLUSH_BYTES: usize = 256 * 1024;
/// Mode of directories made on the way.
const DIRECTORY_MODE: u32 = 0o755;
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
            WriteError::NoSpace { .. } => Self::new(StatusCode::INSUFFICIENT_STORAGE, chain(&err)),
            WriteError::Io { .. } => Self::internal(err),
        }
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct Writing {
    path: PathBuf,
    file: Arc<File>,
    pending: BytesMut,
    /// Remove the file again unless the upload is completed.
    remove_on_failure: bool,
}

impl Writing {
    /// Opens `path` for `user`: makes its parents, gives it to the user and empties it.
    ///
    /// # Errors
    /// [`WriteError`] says whether the path or the disk is at fault.
    pub async fn open(path: PathBuf, user: User, metadata: Metadata) -> Result<Self, WriteError> {
        let open = move || {
            let (file, created) = open_for(&path, &user, &metadata)?;
            let pending = BytesMut::new();
            Ok(Self {
                path,
                file: Arc::new(file),
                pending,
                remove_on_failure: created,
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
        self.remove_on_failure = false;
        let file = self.file.clone();
        blocking(move || Ok(metadata::read(&file))).await
    }

    async fn flush(&mut self) -> Result<(), WriteError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (file, piece, path) = (
            self.file.clone(),
            self.pending.split().freeze(),
            self.path.clone(),
        );
        let write = move || {
            (&*file)
                .write_all(&piece)
                .map_err(|err| WriteError::new(&path, err))
        };
        blocking(write).await
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if self.remove_on_failure {
            remove_new(&self.path);
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

/// Opens `path` for `user` as an upload does: the open file, emptied, and whether it is new. Blocks.
///
/// # Errors
/// [`WriteError`] says whether the path or the disk is at fault.
pub fn open_for(path: &Path, user: &User, metadata: &Metadata) -> Result<(File, bool), WriteError> {
    open(path, user, metadata).map_err(|err| WriteError::new(path, err))
}

/// Removes a file that was begun and not finished.
pub fn remove_new(path: &Path) {
    // If it is gone already, so much the better.
    let _ = fs::remove_file(path);
}

fn open(path: &Path, user: &User, metadata: &Metadata) -> io::Result<(File, bool)> {
    if let Some(parent) = path.parent() {
        make_directories(parent, user)?;
    }
    let mut options = OpenOptions::new();
    options
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let (file, created) = match options.open(path) {
        Ok(file) => (file, false),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let created = options.clone().mode(FILE_MODE).create_new(true).open(path);
            match created {
                Ok(file) => (file, true),
                // A dangling link, or somebody else made it in this instant: make or take it.
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                    (options.mode(FILE_MODE).create(true).open(path)?, false)
                }
                Err(err) => return Err(err),
            }
        }
        Err(err) => return Err(err),
    };
    let kept = prepare(&file, user, metadata);
    if kept.is_err() && created {
        let _ = fs::remove_file(path);
    }
    kept.map(|()| (file, created))
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

/// Makes `path` and its missing parents, each owned by `user`.
///
/// # Errors
/// What the kernel said; `NotADirectory` when something else is in the way.
pub fn make_directories(path: &Path, user: &User) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        Err(_) => {}
    }
    if let Some(parent) = path.parent() {
        make_directories(parent, user)?;
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    // Held open, so that a name that is exchanged in between gives nothing else away.
    let parent = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_PATH)
        .open(parent)?;
    match mkdirat(&parent, name, Mode::from_bits_truncate(DIRECTORY_MODE)) {
        Ok(()) => {}
        // Somebody else made it in this instant.
        Err(Errno::EEXIST) if path.is_dir() => return Ok(()),
        Err(err) => return Err(err.into()),
    }
    let itself = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(&parent, name, itself, Mode::empty())?;
    fchown(made, Some(user.uid), Some(user.gid))
}
