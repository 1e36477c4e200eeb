//! One watched directory, and with `recursive` every directory below it.
//!
//! Everything here may block. The kernel's queue is read to its end each time; what it says is put
//! in the clients' words and buffered until it is taken.
//!
//! **New directories.** A directory may be filled before it is watched. So it is watched first and
//! listed afterwards, and then the queue is read on: what is in the list and not in the queue was
//! there before the watch, and is told of as if it had happened now. What is in both is left to
//! the queue. So each thing is told once.
//!
//! **Moves.** The two halves of a move inside the tree follow each other in the queue and have one
//! cookie; the directories below keep their watches and change their paths. Without a second half
//! a directory has left the tree, and is watched no more.

use std::collections::{HashSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags as Mask, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::statfs::{self, FsType};

use super::event::{Event, Kind, WANTED, kinds, name_of};
use super::table::Table;
use crate::files::entry::Entry;
use crate::users::Accounts;

/// Events that wait to be taken. At some hundred bytes each this bounds one watcher at some tens of
/// MiB, with entries at twice that; the kernel's own queue holds a quarter of it.
const MAX_WAITING: usize = 65_536;
/// Directories of one watcher. Each costs the kernel about 1 KiB.
const MAX_DIRECTORIES: usize = 65_536;
/// Reads of the kernel's queue in one go, of 4 KiB each: more than the queue ever holds, so that a
/// writer who is as fast as we are cannot keep us here.
const MAX_READS: usize = 4096;
/// File systems whose changes the kernel does not see when others make them.
const NETWORK: [FsType; 5] = [
    statfs::NFS_SUPER_MAGIC,
    statfs::SMB_SUPER_MAGIC,
    FsType(0xFF53_4D42), // CIFS
    FsType(0xFE53_4D42), // SMB 2 and later
    statfs::FUSE_SUPER_MAGIC,
];

/// What is to be watched, and how.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The directory, absolute.
    pub root: PathBuf,
    /// With everything below it.
    pub recursive: bool,
    /// With a description of what is there after each event.
    pub entries: bool,
    /// Even where the kernel sees only this machine's changes.
    pub network: bool,
}

/// Why a directory is not watched.
#[derive(Debug, thiserror::Error)]
pub enum OpenWatcherError {
    /// Nothing is there.
    #[error("path '{}' does not exist", .0.display())]
    Missing(PathBuf),
    /// Something else is there.
    #[error("path '{}' is not a directory", .0.display())]
    NotDirectory(PathBuf),
    /// Links that lead to themselves.
    #[error("path '{}' is a loop of links", .0.display())]
    Loop(PathBuf),
    /// Others may change it unseen.
    #[error("path '{}' is on a network file system", .0.display())]
    Network(PathBuf),
    /// The kernel or we have no room for more.
    #[error("no more directories can be watched: {0}")]
    TooMany(&'static str),
    /// Something else failed.
    #[error("watch '{}'", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl OpenWatcherError {
    fn new(path: &Path, err: io::Error) -> Self {
        let path = path.to_owned();
        match err.raw_os_error() {
            Some(libc::ENOENT) => Self::Missing(path),
            Some(libc::ENOTDIR) => Self::NotDirectory(path),
            Some(libc::ELOOP) => Self::Loop(path),
            Some(libc::EMFILE | libc::ENFILE) => Self::TooMany("too many watchers"),
            Some(libc::ENOSPC) => Self::TooMany("the kernel's limit is reached"),
            _ => Self::Io { path, source: err },
        }
    }
}

/// Why a watcher can tell no more. It stays so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchBrokenError {
    /// The kernel's queue ran over.
    #[error("events were lost: more happened than the kernel keeps")]
    KernelOverflow,
    /// Nobody took the events.
    #[error("events were lost: {MAX_WAITING} were waiting to be asked for")]
    NotCollected,
    /// A new directory could not be watched.
    #[error("events may be lost: a new directory could not be watched")]
    NotFollowed,
    /// The directory's file system is gone.
    #[error("the watched file system was unmounted")]
    Unmounted,
    /// The kernel's queue cannot be read.
    #[error("the kernel's events cannot be read")]
    Unreadable,
}

/// One watcher.
#[derive(Debug)]
pub struct Watcher {
    wish: Wish,
    kernel: Inotify,
    table: Table<WatchDescriptor>,
    /// Read and not looked at yet.
    raw: VecDeque<InotifyEvent>,
    /// To be taken.
    waiting: Vec<Event>,
    broken: Option<WatchBrokenError>,
    /// Read once per collection, where entries are wanted.
    accounts: Option<Accounts>,
}

/// Something found in a directory that has just been watched.
struct Found {
    name: OsString,
    is_directory: bool,
    has_content: bool,
}

impl Watcher {
    /// Begins to watch.
    ///
    /// # Errors
    /// [`OpenWatcherError`] says whether the path or a limit is at fault.
    pub fn open(wish: Wish) -> Result<Self, OpenWatcherError> {
        let refuse = |err: io::Error| OpenWatcherError::new(&wish.root, err);
        let found = fs::metadata(&wish.root).map_err(refuse)?;
        if !found.is_dir() {
            return Err(OpenWatcherError::NotDirectory(wish.root));
        }
        if !wish.network && is_network(&wish.root).map_err(|err| refuse(err.into()))? {
            return Err(OpenWatcherError::Network(wish.root));
        }
        let kernel = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let kernel = kernel.map_err(|err| refuse(err.into()))?;
        let root = kernel.add_watch(&wish.root, WANTED | Mask::IN_ONLYDIR);
        let root = root.map_err(|err| refuse(err.into()))?;
        let mut watcher = Self {
            wish,
            kernel,
            table: Table::default(),
            raw: VecDeque::new(),
            waiting: Vec::new(),
            broken: None,
            accounts: None,
        };
        watcher.table.insert(root, PathBuf::new());
        if watcher.wish.recursive {
            watcher.follow(root, PathBuf::new(), false);
        }
        match watcher.broken {
            Some(_) => Err(OpenWatcherError::TooMany("the tree has too many")),
            None => Ok(watcher),
        }
    }

    /// A descriptor that becomes readable when the kernel has something to tell.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn readable(&self) -> io::Result<OwnedFd> {
        self.kernel.as_fd().try_clone_to_owned()
    }

    /// Buffers all that has happened until now.
    pub fn collect(&mut self) {
        self.read_kernel();
        while let Some(event) = self.raw.pop_front() {
            if self.broken.is_some() {
                self.raw.clear();
                break;
            }
            self.digest(&event);
        }
        self.accounts = None;
    }

    /// Takes what is buffered.
    ///
    /// # Errors
    /// [`WatchBrokenError`] once nothing is left of a watcher that broke.
    pub fn take(&mut self) -> Result<Vec<Event>, WatchBrokenError> {
        match self.broken {
            Some(broken) if self.waiting.is_empty() => Err(broken),
            _ => Ok(std::mem::take(&mut self.waiting)),
        }
    }

    /// Whether nothing more will come.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    fn read_kernel(&mut self) {
        for _ in 0..MAX_READS {
            match self.kernel.read_events() {
                Ok(events) => self.raw.extend(events),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => return self.fail(WatchBrokenError::Unreadable),
            }
        }
    }

    fn digest(&mut self, event: &InotifyEvent) {
        let mask = event.mask;
        if mask.contains(Mask::IN_Q_OVERFLOW) {
            return self.fail(WatchBrokenError::KernelOverflow);
        }
        let Some(directory) = self.table.path(event.wd).map(Path::to_owned) else {
            // A watch that was given up has still had something to say.
            return;
        };
        if mask.contains(Mask::IN_IGNORED) {
            return self.table.forget(event.wd);
        }
        let is_root = directory.as_os_str().is_empty();
        if mask.contains(Mask::IN_UNMOUNT) && is_root {
            return self.fail(WatchBrokenError::Unmounted);
        }
        let path = match &event.name {
            Some(name) => directory.join(name),
            None if is_root => directory,
            // Its parent tells the same with a name.
            None => return,
        };
        for kind in kinds(mask) {
            self.tell(kind, &path);
        }
        if mask.contains(Mask::IN_ISDIR) && self.wish.recursive && event.name.is_some() {
            self.follow_directory(event, &path);
        }
    }

    /// Keeps the table right after something happened to the directory at `path`.
    fn follow_directory(&mut self, event: &InotifyEvent, path: &Path) {
        if event.mask.contains(Mask::IN_MOVED_FROM) {
            return match self.second_half(event.cookie) {
                Some(to) => self.table.rename(path, &to),
                None => self.leave(path),
            };
        }
        let appeared = event.mask.intersects(Mask::IN_CREATE | Mask::IN_MOVED_TO);
        if appeared && !self.table.knows(path) {
            // What was moved here with its content is one thing; what was made here was filled here.
            let tell_content = event.mask.contains(Mask::IN_CREATE);
            if let Some(watch) = self.watch(path) {
                self.follow(watch, path.to_owned(), tell_content);
            }
        }
    }

    /// Where the move of that cookie leads, if it leads into the tree.
    fn second_half(&mut self, cookie: u32) -> Option<PathBuf> {
        if self.raw.is_empty() {
            self.read_kernel();
        }
        let next = self.raw.front()?;
        let is_other_half = next.mask.contains(Mask::IN_MOVED_TO) && next.cookie == cookie;
        let directory = self.table.path(next.wd).filter(|_| is_other_half)?;
        Some(directory.join(next.name.as_ref()?))
    }

    fn leave(&mut self, path: &Path) {
        for watch in self.table.forget_below(path) {
            // It may be gone by itself.
            let _ = self.kernel.rm_watch(watch);
        }
    }

    /// Watches the directories below `path`, which is watched as `watch` already; tells of what was
    /// there before, if asked to.
    fn follow(&mut self, watch: WatchDescriptor, path: PathBuf, tell_content: bool) {
        let mut ahead = vec![(watch, path)];
        while let Some((watch, path)) = ahead.pop() {
            let found = list(&self.wish.root.join(&path));
            self.read_kernel();
            let (appeared, written) = self.queued(watch);
            for child in found {
                if appeared.contains(&child.name) {
                    continue;
                }
                let child_path = path.join(&child.name);
                if tell_content {
                    self.tell(Kind::Create, &child_path);
                    if child.has_content && !written.contains(&child.name) {
                        self.tell(Kind::Write, &child_path);
                    }
                }
                if child.is_directory
                    && let Some(watch) = self.watch(&child_path)
                {
                    ahead.push((watch, child_path));
                }
            }
        }
    }

    /// Which names in the directory of `watch` will appear, and be written, by what is queued.
    fn queued(&self, watch: WatchDescriptor) -> (HashSet<OsString>, HashSet<OsString>) {
        let (mut appeared, mut written) = (HashSet::new(), HashSet::new());
        for event in self.raw.iter().filter(|event| event.wd == watch) {
            let Some(name) = &event.name else { continue };
            if event.mask.intersects(Mask::IN_CREATE | Mask::IN_MOVED_TO) {
                appeared.insert(name.clone());
            }
            if event.mask.contains(Mask::IN_MODIFY) {
                written.insert(name.clone());
            }
        }
        (appeared, written)
    }

    fn watch(&mut self, path: &Path) -> Option<WatchDescriptor> {
        if self.broken.is_some() || self.table.len() >= MAX_DIRECTORIES {
            self.fail(WatchBrokenError::NotFollowed);
            return None;
        }
        let mask = WANTED | Mask::IN_ONLYDIR | Mask::IN_DONT_FOLLOW;
        match self.kernel.add_watch(&self.wish.root.join(path), mask) {
            Ok(watch) => {
                self.table.insert(watch, path.to_owned());
                Some(watch)
            }
            // Gone again, or something else by now; either is in the queue.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => None,
            Err(_) => {
                self.fail(WatchBrokenError::NotFollowed);
                None
            }
        }
    }

    fn tell(&mut self, kind: Kind, path: &Path) {
        if self.waiting.len() >= MAX_WAITING {
            return self.fail(WatchBrokenError::NotCollected);
        }
        let entry = (self.wish.entries && kind.leaves_an_entry()).then(|| {
            let accounts = self.accounts.get_or_insert_with(Accounts::read);
            // It may be gone by now.
            Entry::read(&self.wish.root.join(path), accounts).ok()
        });
        self.waiting.push(Event {
            name: name_of(path),
            kind,
            entry: entry.flatten(),
        });
    }

    fn fail(&mut self, broken: WatchBrokenError) {
        self.broken.get_or_insert(broken);
    }
}

fn is_network(path: &Path) -> nix::Result<bool> {
    let kind = statfs::statfs(path)?.filesystem_type();
    Ok(NETWORK.contains(&kind))
}

/// What is in a directory now; nothing where it is gone.
fn list(directory: &Path) -> Vec<Found> {
    let Ok(children) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let children = children.filter_map(|child| {
        let child = child.ok()?;
        let stat = child.metadata().ok()?;
        Some(Found {
            name: child.file_name(),
            is_directory: stat.is_dir(),
            has_content: stat.is_file() && stat.len() > 0,
        })
    });
    children.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watcher(root: &Path, recursive: bool) -> Watcher {
        let wish = Wish {
            root: root.to_owned(),
            recursive,
            entries: false,
            network: false,
        };
        Watcher::open(wish).expect("watched")
    }

    fn told(watcher: &mut Watcher) -> Vec<(String, Kind)> {
        watcher.collect();
        let events = watcher.take().expect("not broken");
        let told = events.into_iter();
        told.map(|event| (event.name.to_string_lossy().into_owned(), event.kind))
            .collect()
    }

    fn expect(told: &[(String, Kind)], wanted: &[(&str, Kind)]) {
        let told: Vec<_> = told.iter().map(|(name, kind)| (&**name, *kind)).collect();
        assert_eq!(told, wanted);
    }

    #[test]
    fn a_file_put_into_a_new_directory_at_once_is_told_of_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut watcher = watcher(dir.path(), true);
        fs::create_dir_all(dir.path().join("a/b")).expect("made");
        fs::write(dir.path().join("a/b/f"), "x").expect("written");
        fs::write(dir.path().join("a/empty"), "").expect("written");
        let mut told = told(&mut watcher);
        told[1..].sort_by(|one, other| one.0.cmp(&other.0));
        expect(
            &told,
            &[
                ("a", Kind::Create),
                ("a/b", Kind::Create),
                ("a/b/f", Kind::Create),
                ("a/b/f", Kind::Write),
                ("a/empty", Kind::Create),
            ],
        );
        fs::write(dir.path().join("a/b/f"), "").expect("emptied");
        expect(&self::told(&mut watcher), &[("a/b/f", Kind::Write)]);
    }

    #[test]
    fn a_directory_that_moves_inside_the_tree_goes_on_being_watched_under_its_new_name() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("a/b")).expect("made");
        let mut watcher = watcher(dir.path(), true);
        fs::rename(dir.path().join("a"), dir.path().join("c")).expect("moved");
        fs::write(dir.path().join("c/b/f"), "").expect("written");
        expect(
            &told(&mut watcher),
            &[
                ("a", Kind::Rename),
                ("c", Kind::Create),
                ("c/b/f", Kind::Create),
            ],
        );
    }

    #[test]
    fn a_directory_that_leaves_the_tree_is_watched_no_more_and_one_that_comes_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let elsewhere = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("a/b")).expect("made");
        let mut watcher = watcher(dir.path(), true);
        fs::rename(dir.path().join("a"), elsewhere.path().join("a")).expect("moved");
        fs::write(elsewhere.path().join("a/b/f"), "").expect("written");
        expect(&told(&mut watcher), &[("a", Kind::Rename)]);
        assert_eq!(watcher.table.len(), 1);
        fs::rename(elsewhere.path().join("a"), dir.path().join("back")).expect("moved");
        expect(&told(&mut watcher), &[("back", Kind::Create)]);
        fs::remove_file(dir.path().join("back/b/f")).expect("removed");
        expect(&told(&mut watcher), &[("back/b/f", Kind::Remove)]);
    }

    #[test]
    fn the_watched_directory_itself_is_a_dot() {
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("d");
        fs::create_dir(&dir).expect("made");
        let mut watcher = watcher(&dir, false);
        fs::remove_dir(&dir).expect("removed");
        let told = told(&mut watcher);
        assert_eq!(told.last(), Some(&(".".to_owned(), Kind::Remove)));
        assert!(watcher.take().expect("not broken").is_empty());
    }

    #[test]
    fn what_nobody_takes_is_bounded_and_the_loss_is_told_after_the_rest() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut watcher = watcher(dir.path(), false);
        for _ in 0..=MAX_WAITING {
            watcher.tell(Kind::Write, Path::new("f"));
        }
        assert_eq!(watcher.take().expect("the rest").len(), MAX_WAITING);
        for _ in 0..2 {
            assert_eq!(watcher.take(), Err(WatchBrokenError::NotCollected));
        }
    }

    #[test]
    fn an_overflow_of_the_kernel_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut watcher = watcher(dir.path(), false);
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("a limit");
        let limit: usize = limit.trim().parse().expect("a number");
        let (one, other) = (dir.path().join("1"), dir.path().join("2"));
        fs::write(&one, "").expect("written");
        // Two names in turn, so that the kernel cannot make one event of many.
        for _ in 0..=limit / 2 {
            fs::rename(&one, &other).expect("moved");
            fs::rename(&other, &one).expect("moved");
        }
        watcher.collect();
        assert!(watcher.take().expect("what was kept").len() >= limit);
        assert_eq!(watcher.take(), Err(WatchBrokenError::KernelOverflow));
    }
}
