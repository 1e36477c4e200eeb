//! A real disk that counts what is done to it, and breaks on demand.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use wrenn_raft::disk::{Disk, LogFile, RealDisk};

/// What goes wrong next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Nothing.
    Never,
    /// Every write says that no space is left.
    Full,
    /// Every sync says that the medium failed.
    SyncFails,
    /// Every write waits for the next change, and then says that the medium failed.
    Hangs,
}

/// The counters and the fault, shared with every open file.
pub struct TestDisk {
    pub writes: AtomicU64,
    pub syncs: AtomicU64,
    broken: Mutex<Break>,
    changed: Condvar,
}

impl TestDisk {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            writes: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            broken: Mutex::new(Break::Never),
            changed: Condvar::new(),
        })
    }

    pub fn set(&self, broken: Break) {
        *self.broken.lock().unwrap() = broken;
        self.changed.notify_all();
    }

    fn hang(&self) -> io::Result<()> {
        let mut broken = self.broken.lock().unwrap();
        if *broken != Break::Hangs {
            return Ok(());
        }
        while *broken == Break::Hangs {
            broken = self.changed.wait(broken).unwrap();
        }
        Err(io::Error::from_raw_os_error(EIO))
    }

    fn check(&self, breaks: Break, errno: i32) -> io::Result<()> {
        if *self.broken.lock().unwrap() == breaks {
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(())
    }
}

/// The handle that the group gets.
pub struct Handle(pub Arc<TestDisk>);

struct TestFile {
    disk: Arc<TestDisk>,
    file: Arc<dyn LogFile>,
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl LogFile for TestFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.writes.fetch_add(1, Ordering::SeqCst);
        self.disk.check(Break::Full, ENOSPC)?;
        self.disk.hang()?;
        self.file.write_at(bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.syncs.fetch_add(1, Ordering::SeqCst);
        self.disk.check(Break::SyncFails, EIO)?;
        self.file.sync()
    }
}

impl Handle {
    fn wrap(&self, file: Arc<dyn LogFile>) -> Arc<dyn LogFile> {
        Arc::new(TestFile {
            disk: Arc::clone(&self.0),
            file,
        })
    }
}

impl Disk for Handle {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        RealDisk.create(path).map(|file| self.wrap(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        RealDisk.open(path).map(|file| self.wrap(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.syncs.fetch_add(1, Ordering::SeqCst);
        RealDisk.sync_dir(dir)
    }
}

/// Files in `dir` that end in `end`, by name.
pub fn files(dir: &Path, end: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|found| found == end));
    paths.sort();
    paths
}
