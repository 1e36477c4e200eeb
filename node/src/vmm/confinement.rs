//! How far a VMM is shut off from its host, and how far this host lets us.
//!
//! | what | where it is not to be had |
//! |---|---|
//! | a user of its own, without capabilities, in a root directory of its own ([`super::root`]), with its own IPC and host name | it keeps root's id and the host's files ([`super::jail`] says what it may do with them) |
//! | a control group of its own ([`super::cgroup`]) | nothing bounds the memory that it takes beside its guest's; its threads are bounded by its user's limit |
//!
//! Users come from a range that nobody else gives out, one for each network slot: slots of nodes on
//! one host do not overlap, so neither do users. The two belong together: a user of its own can
//! reach its files only where a root of its own has them, and such a root is worth little to root.
//!
//! A user namespace is not among this. What it would take away, the capabilities of its user, a VMM
//! does not have; and the pager, which has to trace it, would have to come from outside of it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::base::chain::chain;
use crate::vmm::VmmSpec;
use crate::vmm::cgroup::{self, Limits};
use crate::vmm::jail::{Allowed, Jail, JailError};
use crate::vmm::root::RootPlan;

/// The first user of sandboxes: the beginning of the range that systemd's table of users leaves
/// unused, above those of containers.
pub const FIRST_USER: u32 = 0x7000_0000;
/// The user of guests that are no sandbox's (the probe's): the one after the last slot's.
pub const PROBE_USER: u32 = FIRST_USER + u16::MAX as u32 + 1;
/// What it takes to give a VMM a user and a root of its own: the bits of these capabilities, and what
/// they are called.
const CAPABILITIES: [(u32, &str); 7] = [
    (0, "CAP_CHOWN"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (18, "CAP_SYS_CHROOT"),
    // To look into a VMM that is of another user.
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (27, "CAP_MKNOD"),
];

/// How far one VMM is shut off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// The user that it runs as, in a root directory of its own; `None` for root, in the host's.
    pub user: Option<u32>,
    /// The control group that is made for it; `None` for its parent's.
    pub group: Option<PathBuf>,
}

/// How far this host lets us shut off VMMs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostConfinement {
    /// Whether they can have users and roots of their own.
    pub own_users: bool,
    /// The control group below which they get theirs.
    pub groups: Option<PathBuf>,
}

/// Why VMMs share root's user here.
#[derive(Debug, thiserror::Error)]
pub enum NoOwnUser {
    /// The daemon itself may not.
    #[error("the node lacks {}", .0.join(", "))]
    Rights(Vec<&'static str>),
    /// It was tried.
    #[error("{0}")]
    Refused(String),
}

impl HostConfinement {
    /// Finds out, by trying; `tag` tells this node from others of the host.
    #[must_use]
    pub fn of_this_host(tag: &str) -> Self {
        Self {
            own_users: own_users().is_ok(),
            groups: cgroup::group_of_node(tag).ok(),
        }
    }

    /// The confinement of the sandbox called `name` whose network slot has `index`.
    #[must_use]
    pub fn of_sandbox(&self, name: &str, index: u16) -> Confinement {
        let user = FIRST_USER + u32::from(index);
        Confinement {
            user: self.own_users.then_some(user),
            group: self.groups.as_ref().map(|groups| groups.join(name)),
        }
    }
}

impl Confinement {
    /// Of a guest that is no sandbox's: as a sandbox's, without a group.
    #[must_use]
    pub fn of_probe() -> Self {
        Self {
            user: own_users().is_ok().then_some(PROBE_USER),
            group: None,
        }
    }

    /// Makes of `jail` one for the VMM of `spec`, which meets us in the directory `meeting` and may
    /// write and run what `rules` allow, by the names in its root; [`super::root::MEETING`] there.
    ///
    /// # Errors
    /// See [`JailError`].
    pub fn apply(
        &self,
        mut jail: Jail,
        spec: &VmmSpec,
        meeting: Option<&Path>,
        rules: Option<Vec<(PathBuf, Allowed)>>,
    ) -> Result<Jail, JailError> {
        let limits = Limits::for_guest(spec.memory, spec.vcpus);
        if let Some(group) = &self.group {
            jail = jail.in_group(group, limits)?;
        }
        match self.user {
            None => jail.under(rules.as_deref()),
            Some(owner) => {
                // A guest that was saved needs neither, and they may be gone.
                let images = [&spec.kernel, &spec.initramfs].into_iter();
                let plan = RootPlan {
                    owner,
                    program: spec.program.clone(),
                    readable: images.filter(|image| image.exists()).cloned().collect(),
                    disk: spec.root_disk.clone(),
                    meeting: meeting.map(Path::to_owned),
                    rules,
                };
                jail.in_root(&plan, limits.tasks)
            }
        }
    }
}

/// Whether a VMM can have a user and a root of its own here, by making such a root.
///
/// # Errors
/// See [`NoOwnUser`].
pub fn own_users() -> Result<(), NoOwnUser> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_in(&status);
    if !missing.is_empty() {
        return Err(NoOwnUser::Rights(missing));
    }
    let plan = RootPlan {
        owner: PROBE_USER,
        program: "/bin/sh".into(),
        ..RootPlan::default()
    };
    let built = plan.build().map(drop);
    built.map_err(|err| NoOwnUser::Refused(chain(&err)))
}

fn missing_in(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let bits = bits.unwrap_or(0);
    let missing = CAPABILITIES.iter().filter(|(bit, _)| bits >> bit & 1 == 0);
    missing.map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_its_user_and_the_probe_has_none_of_theirs() {
        let host = HostConfinement {
            own_users: true,
            groups: Some("/groups/wrenn/a".into()),
        };
        let first = host.of_sandbox("cl-1", 0);
        assert_eq!(first.user, Some(0x7000_0000));
        assert_eq!(first.group, Some("/groups/wrenn/a/cl-1".into()));
        let last = host.of_sandbox("cl-2", u16::MAX).user.expect("one");
        assert!(last < PROBE_USER);
    }

    #[test]
    fn a_host_without_either_confines_as_ever() {
        let nothing = HostConfinement::default().of_sandbox("cl-1", 3);
        assert_eq!(nothing, Confinement::default());
    }

    #[test]
    fn each_missing_capability_is_named() {
        assert!(missing_in("CapEff:\t000001ffffffffff\n").is_empty());
        assert_eq!(
            missing_in("CapEff:\t000001fffff7ffff\n"),
            ["CAP_SYS_PTRACE"]
        );
        assert_eq!(missing_in("").len(), CAPABILITIES.len());
    }
}
