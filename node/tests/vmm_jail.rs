//! What a VMM with a real guest is shut off from, seen from outside: users, files, groups.
//!
//! The one with QEMU is ignored unless asked for: it needs the guest kernel (see `shim_support`). The
//! one with Cloud Hypervisor says so if there is none (see `ch_world`).

mod ch_world;
mod shim_support;

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ch_world::{World, leave_out};
use nix::sys::signal::Signal;
use shim_support::debian::Netns;
use shim_support::{SOON, Sandbox, WRENN, eventually, runs, signal};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::shim::client;
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::vmm::cgroup::{Limits, missing_limits, remove};
use wrenn_node::vmm::confinement::{HostConfinement, own_users};
use wrenn_node::vmm::{self, Confinement, VmmSpec};

/// The names of what a VMM's root may hold.
const TOP: [&str; 12] = [
    "bin", "dev", "etc", "lib", "lib64", "meeting", "nix", "opt", "proc", "tmp", "usr", "work",
];

fn of_process(pid: u32, what: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{what}"))
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

/// What `/proc/<pid>/status` says of `name`.
fn status(pid: u32, name: &str) -> String {
    let status = text(&of_process(pid, "status"));
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name}"))
        .trim()
        .to_owned()
}

fn names_in(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).expect("listed").flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Whether all that `spec` asks for holds for the process `pid`.
fn assert_confined(pid: u32, spec: &VmmSpec) {
    let Confinement { user, group } = &spec.confinement;
    if let Some(user) = user {
        assert_user(pid, *user);
        assert_root(pid, spec, *user);
    }
    let Some(group) = group else { return };
    let inside = text(&of_process(pid, "cgroup"));
    let name = group.file_name().expect("named").to_str().expect("UTF-8");
    assert!(
        inside
            .lines()
            .any(|it| it.starts_with("0::") && it.ends_with(name)),
        "{inside}"
    );
    let limits = Limits::for_guest(spec.memory, spec.vcpus);
    let missing = missing_limits().expect("there are groups");
    for (controller, file, value) in [
        ("memory", "memory.max", limits.memory_bytes),
        ("pids", "pids.max", limits.tasks.into()),
        ("cpu", "cpu.weight", limits.cpu_weight.into()),
    ] {
        if missing.contains(&controller) {
            leave_out(&format!("this host has no {controller} controller for us"));
        } else {
            assert_eq!(text(&group.join(file)).trim(), value.to_string(), "{file}");
        }
    }
}

fn assert_user(pid: u32, user: u32) {
    let ids = [user; 4].map(|id| id.to_string());
    for name in ["Uid:", "Gid:"] {
        let has = status(pid, name);
        assert!(has.split_whitespace().eq(&ids), "{name} {has}");
    }
    assert_eq!(status(pid, "Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&status(pid, set), 16), Ok(0), "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs:"), "1");
    // Cloud Hypervisor has one for each kind of thread, and none for the first.
    let threads = names_in(&of_process(pid, "task"));
    let filtered = |thread: &String| status(thread.parse().expect("a thread"), "Seccomp:") == "2";
    assert!(threads.iter().any(filtered), "its own filter");
    let limits = text(&of_process(pid, "limits"));
    for (name, value) in [("Max core file size", "0"), ("Max open files", "512")] {
        let line = limits
            .lines()
            .find(|line| line.starts_with(name))
            .expect(name);
        assert_eq!(
            line[name.len()..].split_whitespace().next(),
            Some(value),
            "{line}"
        );
    }
    let threads = limits
        .lines()
        .find(|it| it.starts_with("Max processes"))
        .expect("a limit");
    assert!(!threads.contains("unlimited"), "{threads}");
}

fn assert_root(pid: u32, spec: &VmmSpec, user: u32) {
    assert!(
        status(pid, "NSpid:").ends_with("\t1"),
        "the first of its namespace"
    );
    for namespace in ["ns/mnt", "ns/ipc", "ns/uts", "ns/pid"] {
        let theirs = fs::read_link(of_process(pid, namespace)).expect("a link");
        let ours = fs::read_link(Path::new("/proc/self").join(namespace)).expect("a link");
        assert_ne!(theirs, ours, "{namespace}");
    }
    let root = of_process(pid, "root");
    let mut top = names_in(&root);
    // The first directory of each file that it was given.
    let given = [
        Some(&spec.program),
        Some(&spec.kernel),
        spec.root_disk.as_ref(),
    ];
    for path in given.into_iter().flatten() {
        top.remove(
            path.iter()
                .nth(1)
                .expect("absolute")
                .to_str()
                .expect("UTF-8"),
        );
    }
    assert!(top.iter().all(|it| TOP.contains(&it.as_str())), "{top:?}");
    for secret in [
        "etc/passwd",
        "etc/shadow",
        "root",
        "home",
        "sys",
        "run",
        "bin/sh",
        "usr/bin/env",
    ] {
        assert!(!root.join(secret).exists(), "{secret}");
    }
    for device in ["dev/kvm", "dev/net/tun"] {
        if Path::new("/").join(device).exists() {
            assert_eq!(
                fs::metadata(root.join(device)).expect(device).uid(),
                user,
                "{device}"
            );
        }
    }
    let mounts = text(&of_process(pid, "mountinfo"));
    let disk = spec
        .root_disk
        .as_ref()
        .map(|disk| disk.to_str().expect("UTF-8"));
    for mount in mounts.lines() {
        let mut fields = mount.split(' ').skip(4);
        let (place, options) = (
            fields.next().expect("a place"),
            fields.next().expect("options"),
        );
        let writable = options.split(',').any(|it| it == "rw");
        let may_be = disk == Some(place) || ["/proc", "/meeting"].contains(&place);
        assert!(!writable || may_be, "{mount}");
        assert!(options.contains("nosuid"), "{mount}");
    }
    for fd in fs::read_dir(of_process(pid, "fd"))
        .expect("listed")
        .flatten()
    {
        let is_dir = fs::metadata(fd.path()).is_ok_and(|it| it.is_dir());
        assert!(!is_dir, "a way out: {:?}", fs::read_link(fd.path()));
    }
}

/// Whether somebody holds the other end of the tap.
fn has_carrier(netns: &Netns) -> bool {
    let spec = netns.spec();
    let name = spec.netns.file_name().expect("named");
    let mut command = Command::new("ip");
    command.arg("-n").arg(name).args(["-o", "link", "show"]);
    let told = command.arg(&spec.tap).output().expect("ip runs");
    String::from_utf8_lossy(&told.stdout).contains("LOWER_UP")
}

fn loudly_unless_possible() {
    if let Err(err) = own_users() {
        leave_out(&format!("users and roots of their own: {err}"));
    }
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn qemu_is_shut_off_from_its_host_and_leaves_nothing() {
    loudly_unless_possible();
    let netns = Netns::new("tap0");
    let sandbox = Sandbox::new();
    let mut spec = sandbox.spec("test.count");
    spec.vmm.root_disk = Some(sandbox.make_disk());
    spec.vmm.network = Some(netns.spec());
    let group = spec.vmm.confinement.group.clone();
    let is_there = || group.as_ref().is_some_and(|group| group.exists());
    let shim = client::spawn(&sandbox.dir, &spec, WRENN.as_ref())
        .await
        .expect("up");
    let vmm = shim.known_status().vmm_pid;
    assert_confined(vmm, &spec.vmm);
    sandbox.await_console("guest: disk");
    sandbox.await_console("guest: net");
    sandbox.await_console("guest: count 1.");
    // It is saved and goes on in there as anywhere.
    shim.save(SOON).await.expect("saved");
    shim.thaw(false).await.expect("goes on");
    assert_confined(vmm, &spec.vmm);
    assert_eq!(is_there(), group.is_some());
    shim.stop(Duration::ZERO).await.expect("stopped");
    assert!(!is_there(), "it went with its VMM");

    // A shim that is killed cannot clean up: whoever sweeps its directory does.
    let shim = client::spawn(&sandbox.dir, &spec, WRENN.as_ref())
        .await
        .expect("up again");
    let (pid, vmm) = (shim.known_status().shim_pid, shim.known_status().vmm_pid);
    signal(pid, Signal::SIGKILL);
    assert!(eventually(SOON, || !runs(vmm)), "its VMM dies with it");
    assert_eq!(is_there(), group.is_some());
    kill_leftovers(&sandbox.dir).expect("swept");
    assert!(!is_there(), "it was swept");
}

#[test]
fn cloud_hypervisor_is_shut_off_from_its_host_at_boot_and_when_it_takes_a_guest_in() {
    let Some(mut world) = World::new() else {
        return;
    };
    loudly_unless_possible();
    let host = HostConfinement::of_this_host(&format!("ch-{}", std::process::id()));
    world.spec.confinement = host.of_sandbox("first", 1);
    let (here, there) = (Netns::new("tap1"), Netns::new("tap2"));
    world.spec.network = Some(here.spec());
    let guest = world.boot();
    assert_confined(guest.vmm.pid(), &world.spec);
    assert!(has_carrier(&here), "it holds the tap");
    let saved = guest.save();
    // Another sandbox of this host: another user, who gets the disk, and another tap.
    world.spec.confinement = host.of_sandbox("second", 2);
    world.spec.network = Some(there.spec());
    assert!(!has_carrier(&there));
    let resumed = world.incoming(&saved, saved.copied());
    resumed
        .vmm
        .load_state(saved.state.as_fd(), ch_world::soon())
        .expect("loaded");
    resumed.vmm.resume(ch_world::soon()).expect("goes on");
    resumed.await_round(saved.round + 2);
    assert_confined(resumed.vmm.pid(), &world.spec);
    assert!(has_carrier(&there), "it holds the other tap");
    let second = world.spec.confinement.group.clone();
    drop(guest);
    drop(resumed);
    if let Some(second) = second {
        assert!(!second.parent().expect("of the node").exists());
    }
}

#[test]
fn a_vmm_whose_files_are_closed_to_its_user_is_refused_by_name() {
    if own_users().is_err() {
        return loudly_unless_possible();
    }
    let sandbox = Sandbox::new();
    let mut spec = sandbox.spec("").vmm;
    let closed = sandbox.dir.join("closed-kernel");
    fs::write(&closed, "").expect("written");
    fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("set");
    spec.kernel = closed;
    let memory = GuestMemory::create(spec.memory).expect("memory");
    let refused = vmm::spawn(&spec, "vmm-jail-test", memory.as_fd(), ch_world::soon());
    let refused = refused.err().expect("refused");
    let words = wrenn_node::base::chain::chain(&refused);
    assert!(
        words.contains("closed-kernel") && words.contains("chmod o+r"),
        "{words}"
    );
    let group = spec.confinement.group.expect("or there would be no test");
    assert!(!group.exists(), "nothing is left");
    remove(&group).expect("nothing to do");
}
