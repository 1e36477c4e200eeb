//! How one file, directory or link is described to clients.
//!
//! Of a link, type and mode are those of what it leads to, everything else is its own. A link that
//! leads nowhere has no type, and clients leave it out.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::metadata;
use crate::users::Accounts;

/// What kind of thing an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A device, a pipe, a socket, or a link that leads nowhere.
    Other,
}

/// One described entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Last part of the path.
    pub name: String,
    /// What it is, links followed.
    pub kind: Kind,
    /// Absolute path.
    pub path: PathBuf,
    /// Size in bytes, of a link itself.
    pub size_bytes: u64,
    /// Permission bits, links followed.
    pub mode: u32,
    /// As in a long listing, of a link itself.
    pub permissions: String,
    /// Owner's name.
    pub owner: String,
    /// Group's name.
    pub group: String,
    /// Last change of the content.
    pub modified: SystemTime,
    /// Where a link leads, or its own path when nowhere.
    pub symlink_target: Option<PathBuf>,
    /// The user's pairs.
    pub metadata: metadata::Metadata,
}

/// Permission bits as clients know them.
const PERMISSION_BITS: u32 = 0o777;

impl Entry {
    /// Describes what is at `path`.
    ///
    /// # Errors
    /// What the kernel said to looking at it.
    pub fn read(path: &Path, accounts: &Accounts) -> io::Result<Self> {
        let own = fs::symlink_metadata(path)?;
        let target = own.is_symlink().then(|| fs::canonicalize(path).ok());
        let followed = match &target {
            None => Some(own.clone()),
            Some(target) => target.as_ref().and_then(|target| fs::metadata(target).ok()),
        };
        let name = path.file_name().unwrap_or(path.as_os_str());
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            kind: followed.as_ref().map_or(Kind::Other, kind),
            path: path.to_owned(),
            size_bytes: own.len(),
            mode: followed.as_ref().unwrap_or(&own).permissions().mode() & PERMISSION_BITS,
            permissions: permissions(&own),
            owner: accounts.user_name(own.uid()),
            group: accounts.group_name(own.gid()),
            modified: own.modified().unwrap_or(UNIX_EPOCH),
            symlink_target: target.map(|target| target.unwrap_or_else(|| path.to_owned())),
            metadata: if own.is_file() || own.is_dir() {
                pairs(path)
            } else {
                Default::default()
            },
        })
    }
}

fn kind(stat: &Metadata) -> Kind {
    match stat.file_type() {
        kind if kind.is_file() => Kind::File,
        kind if kind.is_dir() => Kind::Directory,
        _ => Kind::Other,
    }
}

fn pairs(path: &Path) -> metadata::Metadata {
    let mut options = File::options();
    options
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOATIME);
    options
        .open(path)
        .map(|file| metadata::read(&file))
        .unwrap_or_default()
}

/// Letters for the kind and the special bits, then the nine permissions, as existing clients
/// expect them: links begin with `L`, and a directory like `/tmp` with `dt`.
fn permissions(stat: &Metadata) -> String {
    let (kind, mode) = (stat.file_type(), stat.permissions().mode());
    let letters = [
        (kind.is_dir(), "d"),
        (kind.is_symlink(), "L"),
        (kind.is_block_device() || kind.is_char_device(), "D"),
        (kind.is_fifo(), "p"),
        (kind.is_socket(), "S"),
        (mode & libc::S_ISUID != 0, "u"),
        (mode & libc::S_ISGID != 0, "g"),
        (kind.is_char_device(), "c"),
        (mode & libc::S_ISVTX != 0, "t"),
    ];
    let mut text: String = letters
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, l)| *l)
        .collect();
    if text.is_empty() {
        text.push('-');
    }
    for (bit, letter) in (0..9_u32).rev().zip("rwxrwxrwx".chars()) {
        text.push(if mode & (1 << bit) == 0 { '-' } else { letter });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn link_shows_its_targets_type_and_its_own_rights() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, link, lost) = (
            dir.path().join("f"),
            dir.path().join("l"),
            dir.path().join("x"),
        );
        fs::write(&file, "12345").expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("set");
        symlink(&file, &link).expect("made");
        symlink("nowhere", &lost).expect("made");
        let read = |path: &Path| Entry::read(path, &Accounts::default()).expect("there");

        let entry = read(&file);
        assert_eq!(
            (entry.kind, entry.mode, entry.size_bytes),
            (Kind::File, 0o644, 5)
        );
        assert_eq!(
            (entry.permissions.as_str(), entry.symlink_target),
            ("-rw-r--r--", None)
        );
        let entry = read(&link);
        assert_eq!((entry.kind, entry.mode), (Kind::File, 0o644));
        assert_eq!(entry.permissions, "Lrwxrwxrwx");
        assert_eq!(
            entry.symlink_target,
            Some(fs::canonicalize(&file).expect("there"))
        );
        let entry = read(&lost);
        assert_eq!(
            (entry.kind, entry.symlink_target),
            (Kind::Other, Some(lost))
        );
    }

    #[test]
    fn special_bits_and_kinds_have_letters() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).expect("set");
        let stat = fs::metadata(dir.path()).expect("there");
        assert_eq!(permissions(&stat), "dtrwxrwxrwx");
        let null = fs::metadata("/dev/null").expect("there");
        assert!(permissions(&null).starts_with("Dc"));
    }
}
