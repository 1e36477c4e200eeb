//! The directory of a sandbox: names, durable writing, and a socket whose path may be long.
//!
//! The path of a unix socket has at most 107 bytes, a data directory may have more. Sockets are
//! therefore named through a descriptor of their directory, `/proc/self/fd/<n>/shim.sock`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// What to run, written by the daemon.
pub const SPEC: &str = "shim.json";
/// Where the shim answers.
pub const SOCKET: &str = "shim.sock";
/// Held locked by a living shim.
pub const LOCK: &str = "shim.lock";
/// The shim's own complaints, and the VMM's.
pub const LOG: &str = "shim.log";
/// How the VMM ended.
pub const EXIT: &str = "exit.json";
/// The guest's serial console.
pub const CONSOLE: &str = "console.log";
/// The device state of a saved guest, in the VMM's own format.
pub const STATE: &str = "state";
/// Which pages of a saved guest's memory were written ([`super::dirty`]).
pub const DIRTY: &str = "dirty";

/// The largest file we write here ourselves is a few KiB; a larger one is not ours.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// A file under way to its place: until it is kept nobody finds it there, and dropped it is gone.
#[derive(Debug)]
pub struct Draft {
    file: File,
    temporary: PathBuf,
    place: PathBuf,
    kept: bool,
}

impl Draft {
    /// An empty file that shall become `name` in `dir`.
    ///
    /// # Errors
    /// The disk refused.
    pub fn create(dir: &Path, name: &str) -> io::Result<Self> {
        let temporary = format!(".{name}.new");
        // Whoever still holds the file of an earlier attempt must not write into this one.
        remove(dir, &temporary)?;
        let temporary = dir.join(temporary);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        Ok(Self {
            file,
            temporary,
            place: dir.join(name),
            kept: false,
        })
    }

    /// The file, to be written.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Brings what was written to the disk. It has its name only after [`Self::keep`].
    ///
    /// # Errors
    /// The disk refused.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives a synced file its name; that is durable after [`sync_dir`].
    ///
    /// # Errors
    /// The disk refused; what was in its place stands.
    pub fn keep(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.place)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort: the next draft of the name removes it as well.
            let _gone = fs::remove_file(&self.temporary);
        }
    }
}

/// Makes the names in `dir` durable.
///
/// # Errors
/// The disk refused.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Writes `name` in `dir` so that after a crash there is the old content or the new, never a mix.
///
/// # Errors
/// The disk refused; the old content stands.
pub fn write_durably(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let mut draft = Draft::create(dir, name)?;
    draft.file().write_all(content)?;
    draft.sync()?;
    draft.keep()?;
    sync_dir(dir)
}

/// Reads `name` in `dir`; `None` if it is not there.
///
/// # Errors
/// The disk refused, or the file is larger than any of ours.
pub fn read(dir: &Path, name: &str) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(dir.join(name)) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(err),
    };
    let mut content = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(Some(content))
}

/// Removes `name` in `dir`, if it is there.
///
/// # Errors
/// The disk refused.
pub fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

/// Takes the right to be the shim of `dir`; `None` if another process has it.
///
/// # Errors
/// The disk refused.
pub fn lock(dir: &Path) -> io::Result<Option<Flock<File>>> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(dir.join(LOCK))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// The shim socket of a directory, by a path that is always short enough.
#[derive(Debug)]
pub struct SocketPath {
    /// Kept open: the path goes through it.
    _dir: File,
    path: PathBuf,
}

impl SocketPath {
    /// The socket in `dir`.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let dir = File::open(dir)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()));
        Ok(Self { _dir: dir, path })
    }

    /// The path, valid in this process and as long as `self` lives.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_durable_write_replaces_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        write_durably(dir.path(), SPEC, b"old").expect("first");
        write_durably(dir.path(), SPEC, b"new").expect("second");
        assert_eq!(
            read(dir.path(), SPEC).expect("readable"),
            Some(b"new".to_vec())
        );
        assert_eq!(fs::read_dir(dir.path()).expect("listable").count(), 1);
    }

    #[test]
    fn a_draft_that_is_not_kept_leaves_the_old_content_and_nothing_else() {
        let dir = tempfile::tempdir().expect("tempdir");
        write_durably(dir.path(), STATE, b"old").expect("first");
        let mut stale = Draft::create(dir.path(), STATE).expect("created");
        let mut draft = Draft::create(dir.path(), STATE).expect("created again");
        stale.file().write_all(b"late").expect("written");
        draft.file().write_all(b"new").expect("written");
        drop((stale, draft));
        let content = read(dir.path(), STATE).expect("readable");
        assert_eq!(content, Some(b"old".to_vec()));
        assert_eq!(fs::read_dir(dir.path()).expect("listable").count(), 1);
    }

    #[test]
    fn a_file_larger_than_any_of_ours_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = File::create(dir.path().join(SPEC)).expect("create");
        file.set_len(1 << 40).expect("sparse");
        assert!(read(dir.path(), SPEC).is_err());
    }

    #[test]
    fn a_directory_has_one_lock() {
        let dir = tempfile::tempdir().expect("tempdir");
        let held = lock(dir.path()).expect("first");
        assert!(held.is_some());
        assert!(lock(dir.path()).expect("second").is_none());
        drop(held);
        assert!(lock(dir.path()).expect("third").is_some());
    }
}
