//! The control group that one VMM runs in (version 2).
//!
//! ```text
//! <mount>/wrenn/<node's tag>/<sandbox>      memory.max  pids.max  cpu.weight  cgroup.kill
//! ```
//!
//! Beside the daemon's own unit, not below it: a group that has both processes and limited
//! children is not allowed, and a unit that is restarted must not meet our guests. A group is made
//! right before its VMM, which is put into it between `fork` and `exec`, and removed when the VMM
//! was reaped; the two levels above come and go with the first and the last of them, so nobody owns
//! them. The shim, which has to outlive its guest's excesses, stays outside.
//!
//! A limit that the host has no controller for is not set ([`missing_limits`] tells which); the
//! group is there all the same, and ends whatever is in it as one.
//!
//! A crash leaves an empty group, or one whose VMM the kernel is killing. Its path stands in the
//! sandbox's `shim.json`, so that the sweep of the directory takes it along; [`sweep`] takes those
//! that no directory names.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use proto::units::Mib;

/// The group of all nodes of this host.
const TOP: &str = "wrenn";
/// Levels above a group that come and go with it: the node's, and [`TOP`].
const LEVELS: usize = 2;
/// What a VMM may hold beside its guest's memory: its own code and heap, the translations of QEMU
/// (64 MiB), the tables of its disk (32 MiB), and the page cache that it works with. Twice what we
/// have seen: past it the kernel ends the guest.
const ALLOWANCE: Mib = Mib(256);
/// One part in so many of the guest's memory goes into page tables and the like (one in 512 for the
/// tables alone).
const TABLES_SHARE: u64 = 64;
/// Threads beside the virtual processors: QEMU keeps up to 64 for its disk, and the kernel counts its
/// own workers for asynchronous I/O as well.
const TASKS: u32 = 256;
/// The weight of one virtual processor, which is what a group has by itself.
const WEIGHT: u32 = 100;
/// The kernel's largest.
const MAX_WEIGHT: u32 = 10_000;
/// How often making a group is tried while others remove the levels above it.
const TRIES: usize = 16;
/// Longest a group may take to empty once all in it were killed: freeing the memory of a large guest
/// takes a while.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two looks at it.
const EMPTY_PAUSE: Duration = Duration::from_millis(5);

/// Why a control group was not made or removed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {path:?}")]
pub struct CgroupError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn failed(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> CgroupError {
    move |source| CgroupError {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// What a group holds its VMM to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory of all kinds, the guest's included.
    pub memory_bytes: u64,
    /// Threads.
    pub tasks: u32,
    /// Its share of busy processors.
    pub cpu_weight: u32,
}

impl Limits {
    /// What the VMM of a guest with `memory` and `vcpus` needs, with room.
    #[must_use]
    pub fn for_guest(memory: Mib, vcpus: u8) -> Self {
        let (guest, vcpus) = (memory.bytes(), u32::from(vcpus));
        Self {
            memory_bytes: guest + guest / TABLES_SHARE + ALLOWANCE.bytes(),
            tasks: TASKS + vcpus,
            cpu_weight: (WEIGHT * vcpus).clamp(WEIGHT, MAX_WEIGHT),
        }
    }

    /// The files and what is written into them.
    fn files(self) -> [(&'static str, &'static str, String); 4] {
        [
            ("memory", "memory.max", self.memory_bytes.to_string()),
            // A guest whose VMM has lost a thread is no guest.
            ("memory", "memory.oom.group", "1".to_owned()),
            ("pids", "pids.max", self.tasks.to_string()),
            ("cpu", "cpu.weight", self.cpu_weight.to_string()),
        ]
    }
}

/// The controllers of [`Limits`].
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// The controllers that groups of ours do not get on this host, by name; found out by making one.
///
/// # Errors
/// There can be no groups at all.
pub fn missing_limits() -> Result<Vec<&'static str>, NoGroups> {
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let number = TRIED.fetch_add(1, Ordering::Relaxed);
    let name = format!("probe-{}-{number}", std::process::id());
    let group = Group::create(
        &group_of_node("probe")?.join(name),
        Limits::for_guest(Mib(1), 1),
    )?;
    let lacks = |name: &&str| {
        let files = Limits::for_guest(Mib(1), 1).files().into_iter();
        let mut files = files.filter(|(controller, ..)| controller == name);
        files.all(|(_, file, _)| !group.dir.join(file).exists())
    };
    Ok(CONTROLLERS.into_iter().filter(lacks).collect())
}

/// Why there are no control groups for VMMs.
#[derive(Debug, thiserror::Error)]
pub enum NoGroups {
    /// They are not mounted.
    #[error(transparent)]
    Mount(#[from] NoCgroups),
    /// None could be made.
    #[error(transparent)]
    Refused(#[from] CgroupError),
}

/// There are no control groups of version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("control groups of version 2 are not mounted")]
pub struct NoCgroups;

/// The group of the node tagged `tag`, below which its sandboxes have theirs. It need not exist.
///
/// # Errors
/// [`NoCgroups`].
pub fn group_of_node(tag: &str) -> Result<PathBuf, NoCgroups> {
    Ok(mount_point()?.join(TOP).join(tag))
}

/// Where version 2 is mounted.
fn mount_point() -> Result<PathBuf, NoCgroups> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_point_in(&mounts).ok_or(NoCgroups)
}

fn mount_point_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let is_ours = kind.split(' ').next() == Some("cgroup2");
        is_ours.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// A group that was made for a VMM, removed when dropped.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    procs: File,
}

impl Group {
    /// Makes `dir` a group with `limits`; what another VMM left of it goes.
    ///
    /// # Errors
    /// The kernel refused, or something in it does not die.
    pub fn create(dir: &Path, limits: Limits) -> Result<Self, CgroupError> {
        remove(dir)?;
        make(dir)?;
        for (_, file, value) in limits.files() {
            let path = dir.join(file);
            // One that is not there has no controller here.
            if path.exists() {
                fs::write(&path, value).map_err(failed("set the limit", &path))?;
            }
        }
        let procs = dir.join("cgroup.procs");
        let opened = OpenOptions::new().write(true).open(&procs);
        Ok(Self {
            dir: dir.to_owned(),
            procs: opened.map_err(failed("open the group", &procs))?,
        })
    }

    /// Puts the calling process into it. Makes one system call.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn join(&self) -> Result<(), Errno> {
        nix::unistd::write(self.procs.as_fd(), b"0").map(drop)
    }

    /// Removes it, with whatever is in it. Doing so again is no error.
    ///
    /// # Errors
    /// As [`remove`].
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove(&self.dir)
    }

    /// How often the kernel has ended what was in it for want of memory.
    #[must_use]
    pub fn out_of_memory(&self) -> u64 {
        let events = fs::read_to_string(self.dir.join("memory.events")).unwrap_or_default();
        count_in(&events, "oom_kill")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What cannot be removed now is in the directory's spec, and the sweep tries again.
        let _tried = remove(&self.dir);
    }
}

/// Makes the group and the levels above it, with all controllers that there are.
fn make(dir: &Path) -> Result<(), CgroupError> {
    for tried in 1.. {
        for level in levels(dir).into_iter().rev() {
            make_level(level)?;
        }
        match fs::create_dir(dir) {
            // The last neighbour went, and took the level above with it.
            Err(err) if err.kind() == io::ErrorKind::NotFound && tried < TRIES => {}
            made => return made.map_err(failed("make the group", dir)),
        }
    }
    Ok(())
}

fn make_level(level: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(level) {
        Err(err)
            if ![io::ErrorKind::AlreadyExists, io::ErrorKind::NotFound].contains(&err.kind()) =>
        {
            return Err(failed("make the group", level)(err));
        }
        _ => {}
    }
    for of in level.parent().into_iter().chain([level]) {
        for controller in CONTROLLERS {
            // One that is not to be had, or is not ours to give on, is told by `doctor`.
            let _as_far_as_there =
                fs::write(of.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// The levels above `dir` that come and go with it, the nearest first.
fn levels(dir: &Path) -> Vec<&Path> {
    dir.ancestors().skip(1).take(LEVELS).collect()
}

/// Ends whatever is in the group `dir`, and removes it and the levels above that are empty. One that
/// is not there is no error.
///
/// # Errors
/// The kernel refused, or something in it does not die.
pub fn remove(dir: &Path) -> Result<(), CgroupError> {
    let give_up = Instant::now() + EMPTY_TIMEOUT;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => break,
            Err(err) if err.kind() == io::ErrorKind::NotFound => break,
            // Busy: something is in it still, or is just leaving.
            Err(err) if err.raw_os_error() == Some(libc::EBUSY) && Instant::now() < give_up => {
                // Before 5.14 there is no such file; the sweep by command line has killed them then.
                let _killed = fs::write(dir.join("cgroup.kill"), "1");
                thread::sleep(EMPTY_PAUSE);
            }
            Err(err) => return Err(failed("remove the group", dir)(err)),
        }
    }
    for level in levels(dir) {
        // The first one that has others in it ends this.
        if fs::remove_dir(level).is_err() {
            break;
        }
    }
    Ok(())
}

/// Removes every group below `node` whose name is not in `keep`, with all that runs in it. Returns the
/// names of those that it removed.
///
/// # Errors
/// The first refusal, after all were tried.
pub fn sweep(node: &Path, keep: &BTreeSet<String>) -> Result<Vec<String>, CgroupError> {
    let entries = match fs::read_dir(node) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.map_err(failed("list the groups in", node))?,
    };
    let mut removed = Vec::new();
    let mut first_refusal = Ok(());
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !keep.contains(&name) {
            let done = remove(&entry.path());
            if done.is_ok() {
                removed.push(name);
            }
            first_refusal = first_refusal.and(done);
        }
    }
    first_refusal.map(|()| removed)
}

fn count_in(events: &str, name: &str) -> u64 {
    let mut fields = events.lines().filter_map(|line| line.split_once(' '));
    let field = fields.find(|(field, _)| *field == name);
    field.and_then(|(_, count)| count.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::vmm::jail::Jail;
    use crate::vmm::process::{OUT_OF_MEMORY, VmmProcess};

    const LIMITS: Limits = Limits {
        memory_bytes: 64 << 20,
        tasks: 8,
        cpu_weight: 200,
    };

    /// The group of a node that is this test's own, or nothing where there are none.
    fn node(test: &str) -> Option<PathBuf> {
        let node = group_of_node(&format!("test-{}-{test}", std::process::id()));
        if node.is_err() {
            eprintln!("SKIPPED: no control groups of version 2");
        }
        node.ok()
    }

    #[test]
    fn the_mount_is_found_among_those_of_version_1() {
        let mounts = "30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:27 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
                      32 30 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        let found = mount_point_in(mounts);
        assert_eq!(found, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point_in("garbage"), None);
    }

    #[test]
    fn a_group_holds_what_joins_it_ends_it_and_leaves_nothing() {
        let Some(node) = node("holds") else { return };
        let dir = node.join("one");
        let group = Group::create(&dir, LIMITS).expect("made");
        let mut sleeper = Command::new("/bin/sleep");
        let mut sleeper = sleeper.arg("600").spawn().expect("runs");
        let pid = sleeper.id().to_string();
        fs::write(dir.join("cgroup.procs"), &pid).expect("moved");
        let seen = fs::read_to_string(dir.join("cgroup.procs")).expect("read");
        assert_eq!(seen.trim(), pid);
        for (controller, file, value) in LIMITS.files() {
            let missing = missing_limits().expect("mounted");
            if !missing.contains(&controller) {
                let set = fs::read_to_string(dir.join(file)).expect(file);
                assert_eq!(set.trim(), value, "{file}");
            }
        }
        let reaped = thread::spawn(move || sleeper.wait());
        drop(group);
        assert!(!node.exists());
        reaped
            .join()
            .expect("joined")
            .expect("ended with its group");
    }

    #[test]
    fn what_takes_more_memory_than_its_group_may_is_ended_and_known_for_it() {
        let Some(node) = node("full") else { return };
        if missing_limits().expect("mounted").contains(&"memory") {
            eprintln!("SKIPPED: no memory controller for us");
            return;
        }
        let jail = Jail::new(None, &[]).in_group(&node.join("one"), LIMITS);
        let mut greedy = Command::new("/bin/dd");
        greedy.args(["if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]);
        let (child, group) = jail.expect("a group").start(&mut greedy).expect("runs");
        let child = VmmProcess::new(child, group).expect("taken");
        let exit = child.wait(Instant::now() + EMPTY_TIMEOUT).expect("asked");
        let exit = exit.expect("ended");
        assert_eq!(
            (exit.signal, exit.reason.as_str()),
            (Some(9), OUT_OF_MEMORY)
        );
        assert!(!node.exists());
    }

    #[test]
    fn a_group_that_a_crash_left_is_made_anew() {
        let Some(node) = node("anew") else { return };
        let dir = node.join("one");
        std::mem::forget(Group::create(&dir, LIMITS).expect("made"));
        let again = Group::create(&dir, LIMITS).expect("made again");
        assert_eq!(again.out_of_memory(), 0);
        drop(again);
        remove(&dir).expect("one that is gone is no error");
        assert!(!node.exists());
    }

    #[test]
    fn a_sweep_keeps_the_groups_of_those_that_live() {
        let Some(node) = node("sweep") else { return };
        let lives = node.join("lives");
        let group = Group::create(&lives, LIMITS).expect("made");
        std::mem::forget(Group::create(&node.join("dead"), LIMITS).expect("made"));
        let keep = BTreeSet::from(["lives".to_owned()]);
        assert_eq!(sweep(&node, &keep).expect("swept"), ["dead"]);
        assert!(lives.exists());
        drop(group);
        assert!(!node.exists());
        assert!(sweep(&node, &keep).expect("nothing there").is_empty());
    }

    #[test]
    fn limits_leave_room_above_the_guest() {
        let limits = Limits::for_guest(Mib(1024), 2);
        assert_eq!(limits.memory_bytes, (1024 + 16 + 256) << 20);
        assert_eq!((limits.tasks, limits.cpu_weight), (258, 200));
        assert_eq!(count_in("low 0\noom 2\noom_kill 1\n", "oom_kill"), 1);
    }
}
