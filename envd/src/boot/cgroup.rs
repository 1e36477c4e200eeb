//! Groups the workload is placed in, so that it cannot starve or take down the agent.
//!
//! Best effort throughout: a kernel without a controller, or an agent without the right to make
//! groups, places processes nowhere and works all the same.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::log;

/// Where the cgroup file system is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Our part of the tree.
const SUBTREE: &str = "wrenn";
/// What is divided among the groups.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];
/// Memory kept for the agent and the kernel: an eighth, at most this much.
const MAX_RESERVE_BYTES: u64 = 128 * 1024 * 1024;

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
        let workload = memory_bytes - (memory_bytes / 8).min(MAX_RESERVE_BYTES);
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

    /// The file a process writes itself into to join `group`.
    #[must_use]
    pub fn procs_file(&self, group: Group) -> Option<PathBuf> {
        Some(
            self.subtree
                .as_ref()?
                .join(group.directory())
                .join("cgroup.procs"),
        )
    }
}

fn create(root: &Path, subtree: &Path) -> io::Result<()> {
    enable_controllers(root);
    fs::create_dir_all(subtree)?;
    enable_controllers(subtree);
    let memory = memory_bytes();
    for group in Group::ALL {
        let directory = subtree.join(group.directory());
        fs::create_dir_all(&directory)?;
        for (file, value) in group.settings(memory) {
            // A missing controller has no such file.
            let _ = fs::write(directory.join(file), value);
        }
    }
    Ok(())
}

/// One at a time: a controller the kernel lacks must not keep the others off.
fn enable_controllers(directory: &Path) {
    for controller in CONTROLLERS {
        let _ = fs::write(
            directory.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
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
    fn groups_that_cannot_be_made_place_nobody() {
        let groups = Groups::create(Path::new("/proc/no/such/place"));
        assert_eq!(groups.procs_file(Group::User), None);
    }
}
