//! The archive of a build on the node that is asked: received, judged, and kept until the build takes it.
//!
//! ```text
//! part of a form > .RANDOM > (a zip file: > .RANDOM.tar) > judged > ID, kept
//!                          > (a root file system: > .RANDOM.rootfs) ---^
//! ```
//!
//! Whatever has no lasting name yet is removed when its owner is dropped; what a crash leaves is swept. The owner is whoever
//! works on it: a client that goes away meanwhile takes neither the file nor its place among the uploads.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::ids::BuildId;
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task;

use super::error::{ApiError, Code};
use super::form::Form;
use super::state::ApiState;
use crate::base::chain::chain;
use crate::build::archive_path;
use crate::template::archive::zip::{self, RepackError};
use crate::template::archive::{self, ArchiveError, Contents, Limits};
use crate::template::import::{ImportError, Imported, import};

/// An archive that was received, under a name that nobody knows yet.
pub(super) struct Archive {
    path: PathBuf,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Archive {
    pub(super) async fn receive(
        api: &ApiState,
        form: &mut Form,
        most: u64,
    ) -> Result<Self, ApiError> {
        let permit = api.spools.clone().try_acquire_owned().map_err(|_| {
            ApiError::new(
                Code::Overloaded,
                "too many uploads at once: try again later",
            )
        })?;
        let dir = api.archives();
        fs::create_dir_all(&dir).await.map_err(|err| failed(&err))?;
        let path = dir.join(format!(".{:032x}", rand::random::<u128>()));
        // Dropped, it removes its file.
        let archive = Self {
            path,
            _permit: Arc::new(permit),
        };
        let mut file = File::create(&archive.path)
            .await
            .map_err(|err| failed(&err))?;
        let mut seen = 0;
        while let Some(data) = form.chunk().await? {
            seen += data.len() as u64;
            if seen > most {
                let why = format!("an archive may have {most} bytes at most");
                return Err(ApiError::new(Code::TooLarge, why));
            }
            file.write_all(&data).await.map_err(|err| failed(&err))?;
        }
        file.sync_all().await.map_err(|err| failed(&err))?;
        Ok(archive)
    }

    /// What is in it.
    pub(super) async fn contents(&self) -> Result<Contents, ApiError> {
        let (path, permit) = (self.path.clone(), self._permit.clone());
        let work = move || {
            let _permit = permit;
            read_contents(&path)
        };
        let read = task::spawn_blocking(work).await;
        let read = read.map_err(|err| failed(&io::Error::other(err)))?;
        read.map_err(|err| refused(&err))
    }

    /// It, as the guest unpacks it: a zip file becomes a tar file, which takes its place.
    pub(super) async fn into_tar(self) -> Result<Self, ApiError> {
        let made = self.beside("tar");
        let work = move || -> Result<Self, RepackError> {
            let is_zip = repack(&self.path, &made.path)?;
            Ok(if is_zip { made } else { self })
        };
        let repacked = task::spawn_blocking(work).await;
        match repacked.map_err(|err| failed(&io::Error::other(err)))? {
            Ok(tar) => Ok(tar),
            Err(RepackError::Archive(err)) => Err(refused(&err)),
            Err(RepackError::Write(err)) => Err(failed(&err)),
        }
    }

    /// Makes a root file system of it, which takes its place.
    pub(super) async fn import(self) -> Result<(Self, Imported), ApiError> {
        let made = self.beside("rootfs");
        let work = move || import(&self.path, &made.path).map(|imported| (made, imported));
        let imported = task::spawn_blocking(work).await;
        let imported = imported.map_err(|err| failed(&io::Error::other(err)))?;
        imported.map_err(|err| match err {
            err if err.is_too_large() => ApiError::new(Code::TooLarge, err.to_string()),
            ImportError::Write(err) => failed(&err),
            err => ApiError::invalid(chain(&err)),
        })
    }

    /// The owner of what is to be made of this, under the same permit.
    fn beside(&self, extension: &str) -> Self {
        Self {
            path: self.path.with_extension(extension),
            _permit: self._permit.clone(),
        }
    }

    /// Gives it the name under which the build finds it.
    pub(super) async fn keep(self, dir: &Path, id: BuildId) -> Result<(), ApiError> {
        let kept = fs::rename(&self.path, archive_path(dir, id)).await;
        kept.map_err(|err| failed(&err))
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        // It has its lasting name by now, or nobody will ask for it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes a tar file of a zip file; whether it was one.
fn repack(from: &Path, to: &Path) -> Result<bool, RepackError> {
    let is_zip = zip::is_zip(from).map_err(ArchiveError::from)?;
    if is_zip {
        zip::repack(from, to, Limits::BUILD)?;
    }
    Ok(is_zip)
}

fn read_contents(path: &Path) -> Result<Contents, ArchiveError> {
    Contents::read(archive::open(path)?)
}

impl ApiState {
    /// Where the archives of builds lie on this node.
    pub(super) fn archives(&self) -> PathBuf {
        self.spool_dir.join(crate::build::ARCHIVES)
    }
}

fn refused(err: &ArchiveError) -> ApiError {
    match err {
        ArchiveError::TooLarge { .. } => ApiError::new(Code::TooLarge, err.to_string()),
        err => ApiError::invalid(chain(err)),
    }
}

/// This node could not.
fn failed(err: &io::Error) -> ApiError {
    ApiError::new(Code::InternalError, format!("keep the archive: {err}"))
}
