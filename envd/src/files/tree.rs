//! Making, listing, moving and removing files and directories. Blocking; callers run it where that
//! is allowed.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};

use super::entry::{Entry, Kind};
use super::reach::make_directories;
use crate::users::{Accounts, User};

/// Most entries of one listing: some hundred megabytes at the very most.
const MAX_ENTRIES: usize = 200_000;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Nothing is there.
    #[error("path '{}' does not exist", .0.display())]
    Missing(PathBuf),
    /// A directory is there already.
    #[error("directory '{}' already exists", .0.display())]
    Exists(PathBuf),
    /// Something else than a directory is there.
    #[error("path '{}' is not a directory", .0.display())]
    NotDirectory(PathBuf),
    /// Links that lead to themselves.
    #[error("path '{}' is a loop of links", .0.display())]
    Loop(PathBuf),
    /// The request makes no sense for these paths.
    #[error("'{}' cannot be replaced, moved or removed like this", .path.display())]
    Refused {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The listing would not end.
    #[error("directory '{}' holds more than {MAX_ENTRIES} entries", .0.display())]
    TooMany(PathBuf),
    /// Blocks, inodes or the quota have run out.
    #[error("no space left for '{}'", .0.display())]
    NoSpace(PathBuf),
    /// Something else failed.
    #[error("access '{}'", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl TreeError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT) => Self::Missing(path),
            Some(libc::ENOTDIR) => Self::NotDirectory(path),
            Some(libc::ELOOP) => Self::Loop(path),
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace(path),
            Some(
                libc::EISDIR
                | libc::EEXIST
                | libc::ENOTEMPTY
                | libc::EINVAL
                | libc::EBUSY
                | libc::ENAMETOOLONG,
            ) => Self::Refused { path, source },
            _ => Self::Io { path, source },
        }
    }
}

/// Describes what is at `path`.
///
/// # Errors
/// [`TreeError::Missing`] above all.
pub fn stat(path: &Path, accounts: &Accounts) -> Result<Entry, TreeError> {
    Entry::read(path, accounts).map_err(|err| match err.raw_os_error() {
        // A path through a file leads nowhere.
        Some(libc::ENOTDIR) => TreeError::Missing(path.to_owned()),
        _ => TreeError::new(path, err),
    })
}

/// Lists what is below `path`, `depth` levels deep: each directory before its content, by name.
///
/// # Errors
/// [`TreeError`] about `path` itself; what vanishes meanwhile is left out.
pub fn list(path: &Path, depth: u32, accounts: &Accounts) -> Result<Vec<Entry>, TreeError> {
    let root = fs::metadata(path).map_err(|err| TreeError::new(path, err))?;
    if !root.is_dir() {
        return Err(TreeError::NotDirectory(path.to_owned()));
    }
    let mut entries = Vec::new();
    // What is still to be described, the next one last.
    let mut ahead = children(path).map_err(|err| TreeError::new(path, err))?;
    ahead.reverse();
    let mut ahead: Vec<_> = ahead.into_iter().map(|child| (child, 1)).collect();
    while let Some((child, level)) = ahead.pop() {
        let Ok(entry) = Entry::read(&child, accounts) else {
            continue;
        };
        if entries.len() == MAX_ENTRIES {
            return Err(TreeError::TooMany(path.to_owned()));
        }
        let is_real_directory = entry.kind == Kind::Directory && entry.symlink_target.is_none();
        entries.push(entry);
        if is_real_directory && level < depth.max(1) {
            let below = children(&child).unwrap_or_default();
            ahead.extend(
                below
                    .into_iter()
                    .rev()
                    .map(|grandchild| (grandchild, level + 1)),
            );
        }
    }
    Ok(entries)
}

/// Paths in a directory, by name.
fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let names = fs::read_dir(path)?.filter_map(|child| Some(child.ok()?.file_name()));
    let mut names: Vec<_> = names.collect();
    names.sort();
    Ok(names.into_iter().map(|name| path.join(name)).collect())
}

/// Makes a directory and its parents, owned by `user`.
///
/// # Errors
/// [`TreeError::Exists`] for a directory, [`TreeError::NotDirectory`] for anything else there.
pub fn make(path: &Path, user: &User) -> Result<(), TreeError> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(TreeError::Exists(path.to_owned())),
        Ok(_) => return Err(TreeError::NotDirectory(path.to_owned())),
        Err(_) => {}
    }
    make_directories(path, user).map_err(|err| TreeError::new(path, err))
}

/// Moves `source` to `destination`, whose parents are made, across file systems if need be.
///
/// # Errors
/// [`TreeError::Missing`] for the source, [`TreeError::Refused`] when the destination is in the way.
pub fn rename(source: &Path, destination: &Path, user: &User) -> Result<(), TreeError> {
    fs::symlink_metadata(source).map_err(|err| TreeError::new(source, err))?;
    if let Some(parent) = destination.parent() {
        make_directories(parent, user).map_err(|err| TreeError::new(parent, err))?;
    }
    match fs::rename(source, destination) {
        Err(err) if err.kind() == io::ErrorKind::CrossesDevices => {
            let copied = copy(source, destination);
            if copied.is_err() {
                // Half a copy is worth nothing; the source is untouched.
                let _ = remove(destination);
            }
            copied.map_err(|err| TreeError::new(destination, err))?;
            remove(source)
        }
        moved => moved.map_err(|err| TreeError::new(destination, err)),
    }
}

/// Copies with owner and rights. Files, directories and links are copied, nothing else can be.
fn copy(source: &Path, destination: &Path) -> io::Result<()> {
    let stat = fs::symlink_metadata(source)?;
    if stat.is_dir() {
        match fs::create_dir(destination) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists && is_empty(destination) => {}
            made => made?,
        }
        for child in children(source)? {
            copy(
                &child,
                &destination.join(child.file_name().unwrap_or_default()),
            )?;
        }
        lchown(destination, Some(stat.uid()), Some(stat.gid()))?;
        return fs::set_permissions(destination, stat.permissions());
    }
    if stat.is_symlink() {
        symlink(fs::read_link(source)?, destination)?;
    } else if stat.is_file() {
        fs::copy(source, destination)?;
    } else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    lchown(destination, Some(stat.uid()), Some(stat.gid()))
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

/// Removes whatever is at `path`; nothing there is fine.
///
/// # Errors
/// [`TreeError::Refused`] for what is in use, as a mount point is.
pub fn remove(path: &Path) -> Result<(), TreeError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(err) => Err(err),
    };
    match removed {
        Err(err) if matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(()),
        other => other.map_err(|err| TreeError::new(path, err)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing_is_depth_first_by_name_and_follows_no_inner_link() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        for made in ["b/inner", "a", "b/z"] {
            fs::create_dir_all(root.join(made)).expect("made");
        }
        fs::write(root.join("b/inner/f"), "").expect("written");
        symlink(root.join("b"), root.join("link")).expect("made");
        let names = |depth| {
            let entries = list(root, depth, &Accounts::default()).expect("a directory");
            let relative = |e: Entry| e.path.strip_prefix(root).expect("below").to_owned();
            entries.into_iter().map(relative).collect::<Vec<_>>()
        };
        assert_eq!(names(0), ["a", "b", "link"].map(PathBuf::from));
        assert_eq!(
            names(2),
            ["a", "b", "b/inner", "b/z", "link"].map(PathBuf::from)
        );
        let all = ["a", "b", "b/inner", "b/inner/f", "b/z", "link"];
        assert_eq!(names(9), all.map(PathBuf::from));
        let through = list(&root.join("link"), 1, &Accounts::default()).expect("followed");
        assert_eq!(through[0].path, root.join("link/inner"));
    }

    #[test]
    fn copied_tree_is_the_same_tree() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("d")).expect("made");
        fs::write(from.join("d/f"), "content").expect("written");
        symlink("d/f", from.join("l")).expect("made");
        copy(&from, &to).expect("copied");
        assert_eq!(fs::read_to_string(to.join("l")).expect("there"), "content");
        assert_eq!(
            fs::read_link(to.join("l")).expect("a link"),
            Path::new("d/f")
        );
    }

    #[test]
    fn removing_what_is_not_there_is_success() {
        assert!(remove(Path::new("/no/such/thing")).is_ok());
        assert!(remove(Path::new("/etc/passwd/below/a/file")).is_ok());
    }
}
