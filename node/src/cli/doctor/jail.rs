//! Which parts of a VMM's jail work on this host, found out by making them.

use std::fs;

use super::{Check, Verdict, chain};
use crate::vmm::cgroup::{NoGroups, missing_limits};
use crate::vmm::confinement::{NoOwnUser, own_users};

/// What gives the groups of version 2 their controllers.
const UNIFIED: &str = "boot with systemd.unified_cgroup_hierarchy=1";
/// The same in a container.
const UNTANGLED: &str = "in a container, move its processes into a group below the top one first: a group with \
                         processes gives its children no limits";

/// Whether VMMs can have users and root directories of their own.
pub(super) fn users() -> Check {
    let name = "vmm users";
    let Err(err) = own_users() else {
        let seen = "each VMM has a user and a root directory of its own";
        return Check::ok(name, seen);
    };
    let action = match &err {
        NoOwnUser::Rights(_) => "give the node these capabilities",
        NoOwnUser::Refused(_) => "let the node mount file systems in a namespace of its own",
    };
    let seen = format!(
        "VMMs run as root, without its capabilities: {}",
        chain(&err)
    );
    Check::new(name, Verdict::Warn, seen, action)
}

/// Whether control groups limit what VMMs use.
pub(super) fn limits() -> Check {
    let offered = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    told(missing_limits(), offered.contains(" - cgroup "))
}

fn told(missing: Result<Vec<&'static str>, NoGroups>, version_1: bool) -> Check {
    let name = "vmm limits";
    let seen = match missing {
        Ok(missing) if missing.is_empty() => {
            let seen =
                "each VMM has a control group with limits for memory, threads and processors";
            return Check::ok(name, seen);
        }
        Ok(missing) => format!(
            "each VMM has a control group, which does not limit: {}",
            missing.join(", ")
        ),
        Err(err) => format!("VMMs have no control groups of their own: {}", chain(&err)),
    };
    let action = if version_1 { UNIFIED } else { UNTANGLED };
    Check::new(name, Verdict::Warn, seen, action)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::cgroup::NoCgroups;

    #[test]
    fn what_is_not_limited_is_named_with_what_to_do() {
        let all = told(Ok(Vec::new()), true);
        assert!(all.verdict == Verdict::Ok, "{}", all.detail);
        let some = told(Ok(vec!["memory", "pids"]), true);
        assert!(some.verdict == Verdict::Warn && some.detail.contains("memory, pids"));
        assert_eq!(some.action, UNIFIED);
        let none = told(Err(NoCgroups.into()), false);
        assert!(none.detail.contains("not mounted") && none.action == UNTANGLED);
    }
}
