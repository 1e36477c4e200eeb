//! How the agent, which is root, comes to a file for somebody who is not.
//!
//! Whoever may write in a directory may put a link there, and exchange it between any two looks. So
//! what is done for a user is done with that user's rights first: then a link leads no further than its
//! maker or the user could go. Clients may name files that are out of the user's reach as well; those are
//! reached with root's rights, one directory held open after the other, along links that are root's own and
//! no others. What is done for root follows links as root's programs do; in `/tmp` and the like the kernel
//! keeps others from leading it astray (`fs.protected_symlinks`, set at boot).

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, setfsgid, setfsuid, unlinkat};

use crate::users::User;

/// Mode of directories made on the way.
const DIRECTORY_MODE: u32 = 0o755;
/// Links along one path, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// Opens the file in question, with these flags and, where they make it, this mode.
pub type Opener<'a> = &'a dyn Fn(OFlag, Mode) -> io::Result<File>;

/// How a file was come to, so that it is left the same way.
#[derive(Debug)]
pub enum Way {
    /// By its path, with the user's own rights.
    Path(PathBuf),
    /// By its name in a directory that is held open, with root's.
    Held(OwnedFd, OsString),
}

impl Way {
    /// Removes what is there. Blocks.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn remove(&self, user: &User) -> io::Result<()> {
        match self {
            Self::Path(path) => as_user(user, || fs::remove_file(path)),
            Self::Held(directory, name) => {
                unlinkat(directory, &**name, UnlinkatFlags::NoRemoveDir)?;
                Ok(())
            }
        }
    }
}

/// Has `act` open a file for `user`. `make_way` makes missing directories before, which are then the user's.
/// Blocks.
///
/// # Errors
/// What `act` or the kernel said; `EACCES` also for a link that is not to be followed.
pub fn come_to<T>(
    path: &Path,
    user: &User,
    make_way: bool,
    act: impl Fn(Opener<'_>) -> io::Result<T>,
) -> io::Result<(T, Way)> {
    let directly = || {
        if let Some(parent) = path.parent().filter(|_| make_way) {
            make_directories(parent, user)?;
        }
        act(&|flags, mode| {
            let opened = nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, mode)?;
            Ok(opened.into())
        })
    };
    match as_user(user, directly) {
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied && user.uid != 0 => {}
        done => return Ok((done?, Way::Path(path.to_owned()))),
    }
    let (directory, name) = find(path, make_way.then_some(user))?;
    let done = act(&|flags, mode| {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = openat(&directory, &*name, flags, mode)?;
        Ok(opened.into())
    })?;
    Ok((done, Way::Held(directory, name)))
}

/// Removes a file for `user`. Blocks.
///
/// # Errors
/// As [`come_to`].
pub fn remove(path: &Path, user: &User) -> io::Result<()> {
    match Way::Path(path.to_owned()).remove(user) {
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied && user.uid != 0 => {
            let (directory, name) = find(path, None)?;
            Way::Held(directory, name).remove(user)
        }
        done => done,
    }
}

/// Does something with a user's rights to files. They are this thread's alone; without the right to take
/// them, which an agent outside a guest may lack, it goes on with its own. Groups other than the user's
/// first are left out: what only they allow is reached the other way.
fn as_user<T>(user: &User, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    /// Back to what it was, also where `act` panics.
    struct Back(Uid, Gid);
    impl Drop for Back {
        fn drop(&mut self) {
            setfsuid(self.0);
            setfsgid(self.1);
        }
    }
    if user.uid == 0 {
        return act();
    }
    let group = setfsgid(Gid::from_raw(user.gid));
    let _back = Back(setfsuid(Uid::from_raw(user.uid)), group);
    act()
}

/// The way to `path` with root's rights, along root's links only; missing directories are made where they
/// have an owner.
fn find(path: &Path, owner: Option<&User>) -> io::Result<(OwnedFd, OsString)> {
    let mut ahead = VecDeque::new();
    push_front(&mut ahead, path);
    let mut directory = root()?;
    let mut links = 0;
    while let Some(name) = ahead.pop_front() {
        let is_last = ahead.is_empty();
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let met = match openat(&directory, &*name, flags, Mode::empty()) {
            Ok(met) => File::from(met),
            Err(Errno::ENOENT) if is_last => return Ok((directory, name)),
            Err(Errno::ENOENT) => match owner {
                Some(owner) => File::from(make_directory(&directory, &name, owner)?),
                None => return Err(Errno::ENOENT.into()),
            },
            Err(err) => return Err(err.into()),
        };
        let about = met.metadata()?;
        if about.is_symlink() {
            links += 1;
            let target = link_target(&met, about.uid(), links)?;
            if target.is_absolute() {
                directory = root()?;
            }
            push_front(&mut ahead, &target);
        } else if is_last {
            return Ok((directory, name));
        } else if about.is_dir() {
            directory = met.into();
        } else {
            return Err(Errno::ENOTDIR.into());
        }
    }
    Err(Errno::EISDIR.into())
}

/// Where a link leads, if it is to be followed.
fn link_target(link: &File, owner: u32, links: usize) -> io::Result<PathBuf> {
    if owner != 0 {
        return Err(Errno::EACCES.into());
    }
    if links > MAX_LINKS {
        return Err(Errno::ELOOP.into());
    }
    Ok(readlinkat(link, "")?.into())
}

fn push_front(ahead: &mut VecDeque<OsString>, path: &Path) {
    for part in path.components().rev() {
        match part {
            Component::Normal(name) => ahead.push_front(name.to_owned()),
            Component::ParentDir => ahead.push_front("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
}

fn root() -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open("/", flags, Mode::empty())?)
}

/// Makes `path` and its missing parents, each owned by `user`.
///
/// # Errors
/// What the kernel said; `NotADirectory` when something else is in the way.
pub fn make_directories(path: &Path, user: &User) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(Errno::ENOTDIR.into()),
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
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = nix::fcntl::open(parent, flags, Mode::empty())?;
    match make_directory(&parent, name, user) {
        Err(_) if path.is_dir() => Ok(()),
        made => made.map(drop),
    }
}

/// Makes one directory, or takes the one that somebody has made meanwhile.
fn make_directory(parent: &OwnedFd, name: &OsStr, owner: &User) -> io::Result<OwnedFd> {
    let itself = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match mkdirat(parent, name, Mode::from_bits_truncate(DIRECTORY_MODE)) {
        Ok(()) => {}
        Err(Errno::EEXIST) => return Ok(openat(parent, name, itself, Mode::empty())?),
        Err(err) => return Err(err.into()),
    }
    let made = openat(parent, name, itself, Mode::empty())?;
    fchown(&made, Some(owner.uid), Some(owner.gid))?;
    Ok(made)
}
