//! What a root is made of: directories, links, and bind mounts of things of the host's.
//!
//! A thing is opened under its host's name first ([`Taken`]), and put into the new root second, when
//! something else may lie over that name already. It comes read-only unless it is to be written, and
//! not to be run unless it is a program; no set-user-id bit and no device counts in it.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::{RootError, step};

/// Where it is put together. Every host has it; what lies there is opened before, and hidden from
/// nobody else, since the mount is in a namespace of its own.
pub(super) const STAGE: &str = "/tmp";
/// The mode of directories here.
const DIR_MODE: u32 = 0o755;

/// What a VMM does with a thing of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Program,
    Read,
    Write,
}

/// Something of the host's, and where it goes.
#[derive(Debug)]
pub(super) enum Taken {
    /// A link that leads to the same place here.
    Link { to: PathBuf, name: PathBuf },
    /// A file or a directory, opened.
    File {
        file: File,
        is_dir: bool,
        name: PathBuf,
        used: Use,
    },
}

impl Taken {
    pub(super) fn link(name: &Path) -> Result<Self, RootError> {
        Ok(Self::Link {
            to: fs::read_link(name).map_err(step("read the link", name))?,
            name: name.to_owned(),
        })
    }

    pub(super) fn file(path: &Path, name: &Path, used: Use) -> Result<Self, RootError> {
        let mut only_named = File::options();
        only_named.read(true).custom_flags(libc::O_PATH);
        let file = only_named.open(path).map_err(step("open", path))?;
        let is_dir = file.metadata().map_err(step("look at", path))?.is_dir();
        Ok(Self::File {
            file,
            is_dir,
            name: name.to_owned(),
            used,
        })
    }

    pub(super) fn name(&self) -> &Path {
        match self {
            Self::Link { name, .. } | Self::File { name, .. } => name,
        }
    }

    /// The name under which everything below is the host's.
    fn covers(&self) -> Option<&Path> {
        match self {
            Self::Link { name, .. } => Some(name),
            Self::File { name, is_dir, .. } => is_dir.then_some(name.as_path()),
        }
    }

    pub(super) fn put(&self, all: &[Self]) -> Result<(), RootError> {
        match self {
            Self::Link { to, name } => {
                make_dir(name.parent().unwrap_or(name))?;
                symlink(to, place_of(name)).map_err(step("make the link", name))
            }
            Self::File {
                file,
                is_dir,
                name,
                used,
            } => {
                // Below another of these it is there already; nothing must be made in the host's.
                let mut others = all.iter().filter(|it| it.covers() != Some(name));
                let there = others.any(|it| it.covers().is_some_and(|dir| name.starts_with(dir)));
                if !there && *is_dir {
                    make_dir(name)?;
                } else if !there {
                    make_dir(name.parent().unwrap_or(name))?;
                    File::create(place_of(name)).map_err(step("make a place for", name))?;
                }
                bind(file, name, *used)
            }
        }
    }
}

/// Where `name` is while it is being put together.
pub(super) fn place_of(name: &Path) -> PathBuf {
    let mut below = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(word) => below.push(word),
            // Where the kernel comes to as well, since the directory before it is made.
            Component::ParentDir => drop(below.pop()),
            _ => {}
        }
    }
    Path::new(STAGE).join(below)
}

/// Makes the directory `name` here, and those above it.
pub(super) fn make_dir(name: &Path) -> Result<PathBuf, RootError> {
    let place = place_of(name);
    for dir in name.ancestors().collect::<Vec<_>>().into_iter().rev() {
        let dir = place_of(dir);
        match DirBuilder::new().mode(DIR_MODE).create(&dir) {
            Ok(()) => {
                // Whatever the process's umask is.
                let set = fs::set_permissions(&dir, Permissions::from_mode(DIR_MODE));
                set.map_err(step("open up", &dir))?;
            }
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
            Err(err) => return Err(step("make the directory", name)(err)),
        }
    }
    Ok(place)
}

fn bind(file: &File, name: &Path, used: Use) -> Result<(), RootError> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    let place = place_of(name);
    mount_at(Some(&source), &place, None, MsFlags::MS_BIND, None)?;
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if used != Use::Program {
        flags |= MsFlags::MS_NOEXEC;
    }
    if used != Use::Write {
        flags |= MsFlags::MS_RDONLY;
    }
    mount_at(None, &place, None, flags, None)
}

pub(super) fn mount_at(
    source: Option<&str>,
    place: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), RootError> {
    mount(source, place, kind, flags, options).map_err(step("mount", place))
}
