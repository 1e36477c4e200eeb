//! Small files that survive a crash at any instruction: either the old bytes or the new ones.
//!
//! Write beside it, flush, rename over it, flush the directory. A crash leaves at most a file with
//! [`TEMP_SUFFIX`], which nobody reads and [`remove_leftovers`] clears at the next start.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{process, thread};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Ends the name of a file that is not finished.
pub const TEMP_SUFFIX: &str = ".unfinished";
/// Only the node's user reads what it keeps: there are keys and tokens among it.
pub const PRIVATE_FILE: u32 = 0o600;
/// The same for directories.
pub const PRIVATE_DIR: u32 = 0o700;
/// How long a lock may outlive its owner: a child that it was starting has a copy, until the child
/// runs a program of its own. That takes milliseconds, on a machine that is not out of breath.
pub const LOCK_LAG: Duration = Duration::from_secs(1);
/// How often a lock is tried meanwhile.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// Makes temporary names differ within this process; its id makes them differ between processes.
static NEXT_TEMP: AtomicU64 = AtomicU64::new(0);

/// Replaces the file at `path` by one that holds `bytes`, and returns once it would survive a
/// power cut.
///
/// # Errors
/// The first call that failed. The old file is then still there, whole.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temp = temp_beside(path);
    let written = write_new(&temp, bytes)
        .and_then(|()| fs::rename(&temp, path))
        .and_then(|()| sync_dir(parent(path)));
    if written.is_err() {
        // Best effort: the name says that it is rubbish.
        let _ = fs::remove_file(&temp);
    }
    written
}

/// Takes the file at `path` for this process alone, making it where there is none; `None` where
/// somebody else has it and keeps it for as long as `patience`: [`LOCK_LAG`], where the owner before
/// may have died.
///
/// # Errors
/// The disk refused.
pub fn lock(path: &Path, patience: Duration) -> io::Result<Option<Flock<File>>> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE_FILE)
        .open(path)?;
    let give_up = Instant::now() + patience;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= give_up => return Ok(None),
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(errno.into()),
        };
        thread::sleep(LOCK_RETRY);
    }
}

/// Makes the directory at `path`, private, with its entry flushed; fine if it is there already.
///
/// # Errors
/// It cannot be made, or something else has the name.
pub fn create_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(PRIVATE_DIR).create(path) {
        Ok(()) => sync_dir(parent(path)),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(err) => Err(err),
    }
}

/// Flushes a directory, so that the names made or removed in it stay so.
///
/// # Errors
/// It cannot be opened or flushed.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Removes what interrupted writes left in `dir`.
///
/// # Errors
/// The directory cannot be read, or a leftover cannot be removed.
pub fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let unfinished = entry.file_name().to_string_lossy().ends_with(TEMP_SUFFIX);
        if unfinished && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A name in the same directory that no other write uses.
#[must_use]
pub fn temp_beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let number = NEXT_TEMP.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}-{number}{TEMP_SUFFIX}", process::id()));
    parent(path).join(name)
}

fn write_new(temp: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        // A leftover of a process that had our id.
        .create(true)
        .truncate(true)
        .mode(PRIVATE_FILE)
        .open(temp)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The directory `path` is in; a bare name is in the current one.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note");
        write(&path, b"first").unwrap();
        write(&path, b"second").unwrap();

        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, PRIVATE_FILE);
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        // A directory that is not empty cannot be renamed over.
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("old"), b"old").unwrap();

        assert!(write(&path, b"new").is_err());
        assert_eq!(fs::read(path.join("old")).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_go_and_everything_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        write(&kept, b"x").unwrap();
        fs::write(temp_beside(&kept), b"half").unwrap();
        fs::create_dir(dir.path().join(format!("dir{TEMP_SUFFIX}"))).unwrap();

        remove_leftovers(dir.path()).unwrap();
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["dir.unfinished", "kept"]);
    }

    #[test]
    fn a_directory_is_made_once_and_a_file_of_its_name_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("made");
        create_dir(&made).unwrap();
        create_dir(&made).unwrap();
        let mode = fs::metadata(&made).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, PRIVATE_DIR);

        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(create_dir(&dir.path().join("file")).is_err());
    }
}
