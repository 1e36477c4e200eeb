//! Where a node keeps what, and the right to keep it there.
//!
//! ```text
//! <data>/version          layout version, written before anything else
//!        member.json      which node of which cluster this is; wiring's, as recovered.json
//!        lock             held by the daemon for its whole life
//!        identity/        the node's key
//!        raft/            log, vote, snapshots
//!        state/           applied state and node-local indexes
//!        net/             what the network pool must remember
//!        store/           chunks and manifests of snapshots; see `engine`
//!        templates/       root file systems in use, each under its digest
//!        pager.sock       where pagers ask for what is not on this node
//!        store.sock       where `wrenn store` asks a running daemon
//!        cache/           what can be computed again or done without (how busy guests were); may be
//!                         deleted while no daemon runs
//!        sandboxes/<id>/  shim.json shim.sock root.qcow2 console.log exit.json token
//! ```
//!
//! [`DataDir`] is the one holder of the lock: a second daemon over the same directory is refused.
//! The kernel drops the lock with the process, so a crash leaves nothing to clear. [`DataPaths`]
//! and [`SandboxPaths`] are only names; a shim, which lives beside the daemon, uses those.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::Flock;
use proto::ids::SandboxId;
use proto::version;

use super::durable;
use super::error::OpenDataDirError;
use super::manifest::ImageDigest;

const VERSION_FILE: &str = "version";
/// The oldest layout that is read, and taken over in place.
const OLDEST_READ: u32 = 1;
const LOCK_FILE: &str = "lock";
/// A new file system brings this directory along; one may be mounted for us.
const LOST_AND_FOUND: &str = "lost+found";
/// As much of a foreign version file as an error message shows.
const SHOWN_VERSION_CHARS: usize = 20;

/// A data directory that this process alone uses.
#[derive(Debug)]
pub struct DataDir {
    paths: DataPaths,
    /// Dropped, and with it released, last.
    _lock: Flock<File>,
}

impl DataDir {
    /// Opens the data directory at `root`, making it if there is none.
    ///
    /// What interrupted writes left behind at its top is removed.
    ///
    /// # Errors
    /// - [`OpenDataDirError::InUse`]: another process has it open.
    /// - [`OpenDataDirError::LaterVersion`]: a later wrenn wrote it.
    /// - [`OpenDataDirError::OtherVersion`]: what wrote it is not known.
    /// - [`OpenDataDirError::NotOurs`]: it holds something else.
    /// - [`OpenDataDirError::Disk`]: the disk failed.
    pub fn open(root: &Path) -> Result<Self, OpenDataDirError> {
        Self::open_within(root, durable::LOCK_LAG)
    }

    /// Opens it as [`Self::open`] does, but waits for nobody: where a daemon has it, one that is just
    /// starting again is not forestalled.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_if_free(root: &Path) -> Result<Self, OpenDataDirError> {
        Self::open_within(root, Duration::ZERO)
    }

    fn open_within(root: &Path, patience: Duration) -> Result<Self, OpenDataDirError> {
        let root = std::path::absolute(root).map_err(disk("find", root))?;
        make_root(&root)?;
        let paths = DataPaths { root };
        let lock = take_lock(&paths, patience)?;
        check_version(&paths)?;
        let root = &paths.root;
        fs::set_permissions(root, Permissions::from_mode(durable::PRIVATE_DIR))
            .map_err(disk("make private", root))?;
        durable::remove_leftovers(root).map_err(disk("clear leftovers in", root))?;
        for dir in paths.directories() {
            durable::create_dir(&dir).map_err(disk("create directory", &dir))?;
        }
        Ok(Self { paths, _lock: lock })
    }

    /// The names of what is in it.
    #[must_use]
    pub fn paths(&self) -> &DataPaths {
        &self.paths
    }
}

/// The names of what is in a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPaths {
    root: PathBuf,
}

impl DataPaths {
    /// Names below `root`, which should be absolute. Touches no disk.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The data directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The layout version.
    #[must_use]
    pub fn version_file(&self) -> PathBuf {
        self.root.join(VERSION_FILE)
    }

    /// What the daemon holds locked.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.root.join(LOCK_FILE)
    }

    /// The node's key.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    /// Raft's log, vote and snapshots.
    #[must_use]
    pub fn raft(&self) -> PathBuf {
        self.root.join("raft")
    }

    /// Applied state and node-local indexes; rebuilt from raft on any doubt.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// What the network pool must remember.
    #[must_use]
    pub fn net(&self) -> PathBuf {
        self.root.join("net")
    }

    /// Chunks and manifests.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Root file systems in use, each under its digest.
    #[must_use]
    pub fn templates(&self) -> PathBuf {
        self.root.join("templates")
    }

    /// The root file system of this digest.
    #[must_use]
    pub fn template_image(&self, digest: ImageDigest) -> PathBuf {
        self.templates().join(format!("{digest}.raw"))
    }

    /// What can be computed again.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Where the daemon answers pagers. May be too long to bind as it is: go through the directory's
    /// descriptor.
    #[must_use]
    pub fn pager_socket(&self) -> PathBuf {
        self.root.join("pager.sock")
    }

    /// Where the daemon answers questions about its store; as [`Self::pager_socket`].
    #[must_use]
    pub fn store_socket(&self) -> PathBuf {
        self.root.join("store.sock")
    }

    /// All sandboxes of this node.
    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// One sandbox.
    #[must_use]
    pub fn sandbox(&self, id: SandboxId) -> SandboxPaths {
        SandboxPaths::new(self.sandboxes().join(id.to_string()))
    }

    /// The sandboxes that have a directory here, whatever state they are in.
    ///
    /// Names that are no sandbox ids are left out: whoever put them there may still want them.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn sandboxes_present(&self) -> io::Result<Vec<SandboxId>> {
        let mut present = Vec::new();
        for entry in fs::read_dir(self.sandboxes())? {
            let name = entry?.file_name();
            present.extend(
                name.to_str()
                    .and_then(|name| name.parse::<SandboxId>().ok()),
            );
        }
        present.sort_unstable();
        Ok(present)
    }

    /// Every directory that exists in an open data directory.
    fn directories(&self) -> [PathBuf; 8] {
        [
            self.identity(),
            self.raft(),
            self.state(),
            self.net(),
            self.store(),
            self.templates(),
            self.cache(),
            self.sandboxes(),
        ]
    }
}

/// The names of what belongs to one sandbox. The shim gets only these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxPaths {
    dir: PathBuf,
}

impl SandboxPaths {
    /// Names below `dir`. Touches no disk.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Makes the directory; fine if it is there.
    ///
    /// # Errors
    /// The disk refused.
    pub fn create(&self) -> io::Result<()> {
        durable::create_dir(&self.dir)
    }

    /// Removes the directory with all that is in it; fine if it is gone.
    ///
    /// # Errors
    /// The disk refused; some of it may be gone then.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
            _ => Ok(()),
        }
    }

    /// The sandbox's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the shim says about itself, for a daemon that comes back.
    #[must_use]
    pub fn shim_record(&self) -> PathBuf {
        self.dir.join("shim.json")
    }

    /// The shim's socket. May be too long to bind as it is: go through the directory's descriptor.
    #[must_use]
    pub fn shim_socket(&self) -> PathBuf {
        self.dir.join("shim.sock")
    }

    /// The sandbox's own writes to its root disk.
    #[must_use]
    pub fn overlay(&self) -> PathBuf {
        self.dir.join("root.qcow2")
    }

    /// What the guest wrote to its serial console, bounded.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// How the VMM ended, once it has.
    #[must_use]
    pub fn exit_record(&self) -> PathBuf {
        self.dir.join("exit.json")
    }

    /// The secret that envd asks of its callers.
    #[must_use]
    pub fn token(&self) -> PathBuf {
        self.dir.join("token")
    }
}

/// Makes the directory itself, and those above it as anyone would.
fn make_root(root: &Path) -> Result<(), OpenDataDirError> {
    if let Some(above) = root.parent() {
        fs::create_dir_all(above).map_err(disk("create directory", above))?;
    }
    durable::create_dir(root).map_err(disk("create directory", root))
}

fn take_lock(paths: &DataPaths, patience: Duration) -> Result<Flock<File>, OpenDataDirError> {
    let path = paths.lock_file();
    let lock = durable::lock(&path, patience).map_err(disk("lock", &path))?;
    lock.ok_or_else(|| OpenDataDirError::InUse {
        path: paths.root.clone(),
    })
}

/// Refuses a directory that is not ours; marks a new one, and one of a layout that this program
/// goes on with. Runs under the lock, before anything else: from then on an older program must not
/// open it any more.
fn check_version(paths: &DataPaths) -> Result<(), OpenDataDirError> {
    let path = paths.version_file();
    let found = match fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => return mark_new(paths),
        Err(err) => return Err(disk("read", &path)(err)),
    };
    match found.parse::<u32>() {
        Ok(version::DATA_DIR) => Ok(()),
        Ok(OLDEST_READ..version::DATA_DIR) => mark(paths),
        Ok(later) if later > version::DATA_DIR => Err(OpenDataDirError::LaterVersion {
            path: paths.root.clone(),
            found: later,
            ours: version::DATA_DIR,
        }),
        Ok(_) | Err(_) => Err(OpenDataDirError::OtherVersion {
            path: paths.root.clone(),
            found: found.chars().take(SHOWN_VERSION_CHARS).collect(),
            ours: version::DATA_DIR,
        }),
    }
}

fn mark_new(paths: &DataPaths) -> Result<(), OpenDataDirError> {
    for entry in fs::read_dir(&paths.root).map_err(disk("read directory", &paths.root))? {
        let entry = entry.map_err(disk("read directory", &paths.root))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let known = [LOCK_FILE, LOST_AND_FOUND].contains(&name.as_str());
        if !known && !name.ends_with(durable::TEMP_SUFFIX) {
            return Err(OpenDataDirError::NotOurs {
                path: paths.root.clone(),
                example: name,
            });
        }
    }
    mark(paths)
}

/// Says durably that the directory is of this program's layout.
fn mark(paths: &DataPaths) -> Result<(), OpenDataDirError> {
    let path = paths.version_file();
    durable::write(&path, format!("{}\n", version::DATA_DIR).as_bytes())
        .map_err(disk("write", &path))
}

fn disk<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> OpenDataDirError + 'a {
    move |source| OpenDataDirError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("above/data");
        (dir, root)
    }

    #[test]
    fn a_new_directory_gets_its_version_and_all_its_parts_private() {
        let (_dir, root) = fresh();
        let data = DataDir::open(&root).unwrap();

        let version = fs::read_to_string(data.paths().version_file()).unwrap();
        assert_eq!(version, format!("{}\n", version::DATA_DIR));
        for path in data.paths().directories().iter().chain([&root]) {
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", path.display());
        }
    }

    #[test]
    fn a_second_opener_is_refused_until_the_first_is_gone() {
        let (_dir, root) = fresh();
        let first = DataDir::open(&root).unwrap();
        let refused = DataDir::open(&root).unwrap_err();
        assert!(matches!(refused, OpenDataDirError::InUse { .. }));

        drop(first);
        DataDir::open(&root).unwrap();
    }

    #[test]
    fn an_unknown_version_is_refused_by_name_and_left_alone() {
        let (_dir, root) = fresh();
        drop(DataDir::open(&root).unwrap());
        for other in ["0\n", "", "one", "-1", "\u{1}\u{fffd}"] {
            fs::write(root.join("version"), other).unwrap();
            let refused = DataDir::open(&root).unwrap_err();
            assert!(matches!(refused, OpenDataDirError::OtherVersion { .. }));
            assert_eq!(fs::read_to_string(root.join("version")).unwrap(), other);
        }
    }

    #[test]
    fn a_later_version_is_refused_as_such_and_left_alone() {
        let (_dir, root) = fresh();
        drop(DataDir::open(&root).unwrap());
        let later = format!("{}\n", version::DATA_DIR + 1);
        fs::write(root.join("version"), &later).unwrap();
        let refused = DataDir::open(&root).unwrap_err();
        let said = refused.to_string();
        assert!(said.contains("was written by a later version"), "{said}");
        assert_eq!(fs::read_to_string(root.join("version")).unwrap(), later);
    }

    #[test]
    fn a_directory_of_version_1_is_taken_over_in_place() {
        let (_dir, root) = fresh();
        drop(DataDir::open(&root).unwrap());
        fs::write(root.join("version"), "1\n").unwrap();
        fs::write(root.join("raft/log"), b"what was there").unwrap();
        drop(DataDir::open(&root).unwrap());
        let version = fs::read_to_string(root.join("version")).unwrap();
        assert_eq!(version, format!("{}\n", version::DATA_DIR));
        assert_eq!(fs::read(root.join("raft/log")).unwrap(), b"what was there");
        DataDir::open(&root).unwrap();
    }

    #[test]
    fn a_directory_of_other_files_is_not_taken_over() {
        let (_dir, root) = fresh();
        fs::create_dir_all(&root).unwrap();
        fs::set_permissions(&root, Permissions::from_mode(0o755)).unwrap();
        fs::write(root.join("thesis.tex"), b"").unwrap();

        let refused = DataDir::open(&root).unwrap_err();
        assert!(refused.to_string().contains("thesis.tex"), "{refused}");
        let mode = fs::metadata(&root).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn a_crash_before_the_version_was_written_does_not_matter() {
        let (_dir, root) = fresh();
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("lock"), b"").unwrap();
        fs::write(root.join(".version.7-0.unfinished"), b"").unwrap();

        DataDir::open(&root).unwrap();
        assert!(!root.join(".version.7-0.unfinished").exists());
    }

    #[test]
    fn only_sandbox_ids_are_sandboxes() {
        let (_dir, root) = fresh();
        let data = DataDir::open(&root).unwrap();
        let id = SandboxId([7; 16]);
        data.paths().sandbox(id).create().unwrap();
        fs::create_dir(data.paths().sandboxes().join("lost+found")).unwrap();

        assert_eq!(data.paths().sandboxes_present().unwrap(), [id]);
        data.paths().sandbox(id).remove().unwrap();
        data.paths().sandbox(id).remove().unwrap();
        assert!(data.paths().sandboxes_present().unwrap().is_empty());
    }
}
