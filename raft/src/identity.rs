//! The folder a group owns: its lock and its disk's identity.
//!
//! ```text
//! raft/lock      held while a process uses the folder
//! raft/disk-id   32 hex digits, made with the first segment
//! raft/log/      segments
//! raft/snap/     snapshots
//! ```
//!
//! The identity is written after the first segment. So of the two, either is missing only where
//! somebody removed it, except for one crash: a pristine log without an identity.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::disk::Disk;
use crate::types::DiskId;

/// A claimed folder; released when dropped.
pub(crate) struct Home {
    dir: PathBuf,
    _lock: Flock<File>,
}

/// Why a folder cannot be claimed.
#[derive(Debug)]
pub(crate) enum ClaimError {
    Taken,
    Io(io::Error),
}

impl Home {
    /// Creates the folder where it is missing, and locks it.
    pub(crate) fn claim(dir: &Path, disk: &dyn Disk) -> Result<Self, ClaimError> {
        create_folders(dir, disk).map_err(ClaimError::Io)?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let file = options.open(dir.join("lock")).map_err(ClaimError::Io)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self {
                dir: dir.to_owned(),
                _lock: lock,
            }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(ClaimError::Taken),
            Err((_, errno)) => Err(ClaimError::Io(errno.into())),
        }
    }

    pub(crate) fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    pub(crate) fn snapshot_dir(&self) -> PathBuf {
        self.dir.join("snap")
    }

    pub(crate) fn id_path(&self) -> PathBuf {
        self.dir.join("disk-id")
    }

    /// Whether there are segments.
    pub(crate) fn has_log(&self) -> io::Result<bool> {
        let mut entries = fs::read_dir(self.log_dir())?;
        Ok(entries.any(|entry| {
            entry.is_ok_and(|entry| entry.path().extension().is_some_and(|end| end == "seg"))
        }))
    }

    /// The identity, if one was written.
    pub(crate) fn disk_id(&self) -> io::Result<Option<DiskId>> {
        let text = match fs::read_to_string(self.id_path()) {
            Ok(text) => text,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(err),
        };
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "not 32 hex digits");
        let mut id = [0; 16];
        let digits = text.trim_end();
        if digits.len() != 2 * id.len() || !digits.is_ascii() {
            return Err(damaged());
        }
        for (byte, at) in id.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| damaged())?;
        }
        Ok(Some(DiskId(id)))
    }

    /// Makes an identity and writes it down durably.
    pub(crate) fn make_disk_id(&self, disk: &dyn Disk) -> io::Result<DiskId> {
        let mut id = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut id)?;
        let id = DiskId(id);
        let tmp = self.dir.join("disk-id.tmp");
        let file = disk.create(&tmp)?;
        file.write_at(format!("{id}\n").as_bytes(), 0)?;
        file.sync()?;
        disk.rename(&tmp, &self.id_path())?;
        disk.sync_dir(&self.dir)?;
        Ok(id)
    }
}

fn create_folders(dir: &Path, disk: &dyn Disk) -> io::Result<()> {
    fs::create_dir_all(dir.join("log"))?;
    fs::create_dir_all(dir.join("snap"))?;
    disk.sync_dir(dir)?;
    dir.parent().map_or(Ok(()), |parent| disk.sync_dir(parent))
}
