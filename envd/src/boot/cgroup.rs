//! Groups the workload is placed in, so that it cannot starve or take down the agent.
//!
//! ```text
//! wrenn            memory and tasks of all together; frozen and thawed as one
//! ├── user         weights
//! │   ├── c1 c2 …  a command each: whatever one starts, the others keep their share of the CPU
//! │   └── shared   for commands beyond the limit of groups
//! ├── pty          the same, for terminals
//! └── socat
//! ```
//!
//! A command's group is removed when the command has ended, or, where something it left behind lives
//! on, at some later start. Best effort throughout: a kernel without a controller, or an agent without the right to make
//! groups, places processes nowhere and works all the same.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::log;

/// Where the cgroup file system is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Our part of the tree.
const SUBTREE: &str = "wrenn";
/// Says what a group divides among those in it.
const CONTROL: &str = "cgroup.subtree_control";
/// What is divided among the groups.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];
/// Of the processes and threads that the kernel allows, the workload gets so many eighths: the agent
/// must be able to start a thread, and a process that ends the others.
const WORKLOAD_TASKS_EIGHTHS: u64 = 6;
/// The kernel's limit of processes and threads.
const MAX_TASKS: &str = "/proc/sys/kernel/threads-max";
/// The kernel's limit of process ids, which may be the lower one.
const MAX_PIDS: &str = "/proc/sys/kernel/pid_max";
/// Memory kept for the agent and the kernel: an eighth, at most this much.
const MAX_RESERVE_BYTES: u64 = 128 * 1024 * 1024;
/// Freezes a group and everything below it when 1 is written to it.
const FREEZE: &str = "cgroup.freeze";
/// What the kernel tells of a group, such as whether all of it is frozen.
const EVENTS: &str = "cgroup.events";
/// What is divided among the commands of a group. Memory is not: it is the group's.
const COMMAND_CONTROLLER: &str = "+cpu";
/// Groups of commands that have ended, but not all that they started. Each costs the kernel some KiB;
/// past this many, commands share one.
const MAX_LEFT: usize = 256;
/// Where commands go for which there is no group of their own.
const SHARED: &str = "shared";
/// The file a process writes itself into to join.
const PROCS: &str = "cgroup.procs";
/// Ends all of a group at once when 1 is written to it, however often its processes fork.
const KILL: &str = "cgroup.kill";
/// How often it is looked whether everything has come to a stop. Mostly it has at the first look.
const FROZEN_POLL: Duration = Duration::from_millis(1);

/// A kind of workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Commands.
    User,
    /// Terminals: someone is waiting for each key.
    Terminal,
    /// Port forwarders.
    Forwarder,
}

impl Group {
    const ALL: [Self; 3] = [Self::User, Self::Terminal, Self::Forwarder];

    fn directory(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Terminal => "pty",
            Self::Forwarder => "socat",
        }
    }

    /// Control files and their values, given the guest's memory.
    fn settings(self, memory_bytes: u64) -> Vec<(&'static str, String)> {
        let workload = workload_bytes(memory_bytes);
        let (cpu, io) = match self {
            Self::User => (50, 10),
            Self::Terminal => (200, 50),
            Self::Forwarder => (150, 50),
        };
        let mut settings = vec![
            ("cpu.weight", cpu.to_string()),
            ("io.weight", format!("default {io}")),
        ];
        match self {
            Self::User | Self::Terminal => {
                settings.push(("memory.high", workload.to_string()));
                settings.push(("memory.max", workload.to_string()));
            }
            Self::Forwarder => {
                settings.push(("memory.min", (5 << 20).to_string()));
                settings.push(("memory.low", (8 << 20).to_string()));
            }
        }
        settings
    }
}

/// The groups, if they could be made.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    subtree: Option<PathBuf>,
    commands: Arc<Commands>,
}

/// The groups of single commands.
#[derive(Debug, Default)]
struct Commands {
    made: AtomicU64,
    /// Groups that could not be removed yet.
    left: Mutex<Vec<PathBuf>>,
}

/// The group that one command is placed in; dropping it, once the command has ended, removes it.
#[derive(Debug)]
pub struct Place {
    directory: PathBuf,
    /// Whether it is this command's alone.
    is_own: bool,
    commands: Arc<Commands>,
}

impl Place {
    /// The file a process writes itself into to join.
    #[must_use]
    pub fn procs_file(&self) -> PathBuf {
        self.directory.join(PROCS)
    }

    /// Ends everything the command has started, also what has gone into sessions of its own. A group that is
    /// shared with other commands is left alone.
    pub fn kill(&self) {
        if !self.is_own {
            return;
        }
        if let Err(err) = fs::write(self.directory.join(KILL), "1") {
            log!("kill {}: {err}", self.directory.display());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_own && fs::remove_dir(&self.directory).is_err() {
            self.commands
                .lock()
                .push(std::mem::take(&mut self.directory));
        }
    }
}

impl Commands {
    /// Removes what can be removed by now; tells how many groups are left.
    fn sweep(&self) -> usize {
        let mut left = self.lock();
        left.retain(|directory| fs::remove_dir(directory).is_err());
        left.len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<PathBuf>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Groups {
    /// No groups: every process stays where the agent is.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Makes the groups under `root`.
    #[must_use]
    pub fn create(root: &Path) -> Self {
        let subtree = root.join(SUBTREE);
        match create(root, &subtree) {
            Ok(()) => Self {
                subtree: Some(subtree),
                commands: Arc::default(),
            },
            Err(err) => {
                log!(
                    "processes will not be grouped: create {}: {err}",
                    subtree.display()
                );
                Self::none()
            }
        }
    }

    /// A place for one command of the kind `group`, if there are groups at all.
    #[must_use]
    pub fn place(&self, group: Group) -> Option<Place> {
        let group = self.subtree.as_ref()?.join(group.directory());
        let number = self.commands.made.fetch_add(1, Ordering::Relaxed) + 1;
        let own = group.join(format!("c{number}"));
        let is_own = self.commands.sweep() < MAX_LEFT && fs::create_dir(&own).is_ok();
        let directory = if is_own { own } else { group.join(SHARED) };
        Some(Place {
            directory,
            is_own,
            commands: Arc::clone(&self.commands),
        })
    }

    /// Freezes every process in the groups; `false` where there are none. Processes come to a stop
    /// at their next return from the kernel ([`Self::await_frozen`]); those started into a frozen
    /// group stop before their first instruction.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn freeze(&self) -> io::Result<bool> {
        let Some(subtree) = &self.subtree else {
            return Ok(false);
        };
        fs::write(subtree.join(FREEZE), "1").map(|()| true)
    }

    /// Lets every process in the groups run.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn thaw(&self) -> io::Result<()> {
        match &self.subtree {
            Some(subtree) => fs::write(subtree.join(FREEZE), "0"),
            None => Ok(()),
        }
    }

    /// Waits until every process in the groups has come to a stop; `false` when some have not
    /// within `limit`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn await_frozen(&self, limit: Duration) -> io::Result<bool> {
        let Some(subtree) = &self.subtree else {
            return Ok(true);
        };
        let began = Instant::now();
        loop {
            if is_frozen(&fs::read_to_string(subtree.join(EVENTS))?) {
                return Ok(true);
            }
            if began.elapsed() > limit {
                return Ok(false);
            }
            thread::sleep(FROZEN_POLL);
        }
    }
}

/// Reads the kernel's `cgroup.events`. Pure.
fn is_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

fn create(root: &Path, subtree: &Path) -> io::Result<()> {
    enable_controllers(root);
    fs::create_dir_all(subtree)?;
    enable_controllers(subtree);
    let memory = memory_bytes();
    // All groups together, too: each by itself may have all that is there for any of them.
    let together = workload_bytes(memory).to_string();
    let tasks = workload_tasks(limit(MAX_TASKS).min(limit(MAX_PIDS))).to_string();
    for (file, value) in [("memory.max", together), ("pids.max", tasks)] {
        let _ = fs::write(subtree.join(file), value);
    }
    for group in Group::ALL {
        let directory = subtree.join(group.directory());
        fs::create_dir_all(&directory)?;
        for (file, value) in group.settings(memory) {
            // A missing controller has no such file.
            let _ = fs::write(directory.join(file), value);
        }
        fs::create_dir_all(directory.join(SHARED))?;
        let _ = fs::write(directory.join(CONTROL), COMMAND_CONTROLLER);
    }
    Ok(())
}

/// One at a time: a controller the kernel lacks must not keep the others off.
fn enable_controllers(directory: &Path) {
    for controller in CONTROLLERS {
        let _ = fs::write(directory.join(CONTROL), format!("+{controller}"));
    }
}

/// What the workload may have of a guest's memory. Pure.
fn workload_bytes(memory_bytes: u64) -> u64 {
    memory_bytes - (memory_bytes / 8).min(MAX_RESERVE_BYTES)
}

/// How many of the tasks there may be are the workload's. Pure.
fn workload_tasks(tasks: u64) -> u64 {
    tasks / 8 * WORKLOAD_TASKS_EIGHTHS
}

fn limit(file: &str) -> u64 {
    let limit = fs::read_to_string(file).unwrap_or_default();
    limit.trim().parse().unwrap_or(u64::MAX)
}

fn memory_bytes() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_of_memory_is_kept_back_and_no_more_than_the_cap() {
        let limit = |memory: u64| {
            let settings = Group::User.settings(memory);
            let found = settings.into_iter().find(|(file, _)| *file == "memory.max");
            found.expect("limited").1.parse::<u64>().expect("a number")
        };
        assert_eq!(limit(512 << 20), 448 << 20);
        assert_eq!(limit(8 << 30), (8 << 30) - (128 << 20));
    }

    #[test]
    fn groups_that_cannot_be_made_place_nobody_and_freeze_nobody() {
        let groups = Groups::create(Path::new("/proc/no/such/place"));
        assert!(groups.place(Group::User).is_none());
        assert!(!groups.freeze().expect("nothing to do"));
        assert!(groups.await_frozen(Duration::ZERO).expect("nothing to do"));
        groups.thaw().expect("nothing to do");
    }

    #[test]
    fn each_command_has_a_group_that_goes_with_it_or_later() {
        let root = tempfile::tempdir().expect("a directory");
        let groups = Groups::create(root.path());
        let [one, other] = [0; 2].map(|_| groups.place(Group::User).expect("a place"));
        assert_ne!(one.procs_file(), other.procs_file());
        let (gone, kept) = (one.directory.clone(), other.directory.clone());
        // A directory that cannot be removed, like a group in which something lives.
        fs::write(other.procs_file(), "").expect("written");
        drop((one, other));
        assert!(!gone.exists() && kept.exists());
        fs::remove_file(kept.join(PROCS)).expect("removed");
        let third = groups.place(Group::Terminal).expect("a place");
        assert!(!kept.exists(), "removed at the next start");
        assert!(
            third
                .procs_file()
                .starts_with(root.path().join("wrenn/pty"))
        );
    }

    #[test]
    fn a_group_is_killed_whole_and_a_shared_one_never() {
        let root = tempfile::tempdir().expect("a directory");
        let groups = Groups::create(root.path());
        let mut place = groups.place(Group::User).expect("a place");
        place.kill();
        let word = place.directory.join(KILL);
        assert_eq!(fs::read_to_string(&word).expect("written"), "1");
        fs::remove_file(&word).expect("removed");
        place.is_own = false;
        place.kill();
        assert!(!word.exists());
    }

    #[test]
    fn commands_share_a_group_where_too_many_are_left_behind() {
        let root = tempfile::tempdir().expect("a directory");
        let groups = Groups::create(root.path());
        let places: Vec<_> = (0..MAX_LEFT)
            .map(|_| groups.place(Group::User).expect("a place"))
            .collect();
        for place in &places {
            fs::write(place.procs_file(), "").expect("written");
        }
        drop(places);
        let shared = groups.place(Group::User).expect("a place");
        assert!(shared.directory.ends_with(SHARED));
        drop(shared);
        assert!(root.path().join("wrenn/user").join(SHARED).exists());
    }

    #[test]
    fn all_groups_are_frozen_by_one_word_and_the_kernels_answer_is_awaited() {
        let root = tempfile::tempdir().expect("a directory");
        let groups = Groups::create(root.path());
        let file = |name: &str| root.path().join(SUBTREE).join(name);
        fs::write(file(EVENTS), "populated 1\nfrozen 0\n").expect("written");
        assert!(groups.freeze().expect("asked"));
        assert_eq!(fs::read_to_string(file(FREEZE)).expect("read"), "1");
        assert!(!groups.await_frozen(Duration::ZERO).expect("asked"));
        fs::write(file(EVENTS), "populated 1\nfrozen 1\n").expect("written");
        assert!(groups.await_frozen(Duration::ZERO).expect("asked"));
        groups.thaw().expect("asked");
        assert_eq!(fs::read_to_string(file(FREEZE)).expect("read"), "0");
    }
}
