//! A host that turns out unable to go on from a snapshot is passed over: the next one is tried, each
//! one's reason is told, and where none can the capsule rests as it did.
//!
//! Every host has its own copy of the guest kernel, and cannot start a guest while that is closed to
//! the users of its VMMs.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use serde_json::json;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, images};

use crate::durability::{STAYS, paused};
use crate::pausing::act;
use crate::{MEMORY_MB, led_to, name, wait_voters};

/// KiB of each file in the guest.
const FILE_KIB: u32 = 512;
/// What a host says whose kernel is closed.
const REFUSAL: &str = "can be read by root only";
/// Modes of a kernel that guests are started with, and of one that none is.
const OPEN: u32 = 0o644;
const CLOSED: u32 = 0o600;
/// All hosts.
const HOSTS: [u16; 3] = [1, 2, 3];

#[test]
fn i3_a_host_that_cannot_go_on_is_passed_over_and_nothing_is_lost_where_none_can() {
    let cluster = ClusterWorld::with(3, |_, world| {
        world.images = own_images(world);
    });
    wait_voters(&cluster, &HOSTS, 3);
    let id = led_to(&cluster, STAYS, &json!({ "memory_mb": MEMORY_MB }));
    let contents = Contents::make(cluster.client(STAYS), &id, FILE_KIB);
    let holders = paused(&cluster, &id, &[]);
    let third = HOSTS.into_iter().find(|host| !holders.contains(host));
    let third = third.expect("two of three hold it");

    for host in HOSTS {
        set_kernel(cluster.client(host), CLOSED);
    }
    fails_on(&cluster, &id, "/resume", &HOSTS);
    // Whoever names a host means that host.
    let route = format!("/resume?node={}", name(holders[1]));
    fails_on(&cluster, &id, &route, &holders[1..]);

    set_kernel(cluster.client(third), OPEN);
    let resumed = act(cluster.client(STAYS), &id, "resume");
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    let running = cluster.client(STAYS).wait_status(&id, "running");
    assert_eq!(running["node"], name(third));
    for host in holders {
        let told = running["reason"].to_string();
        assert!(told.contains(&format!("on {}: ", name(host))), "{running}");
    }
    contents.are_there(cluster.client(STAYS), &id);
    cluster.client(STAYS).destroy(&id);
}

/// A resume fails on just these hosts, and each one's reason is told; the capsule rests as it did.
fn fails_on(cluster: &ClusterWorld, id: &str, route: &str, hosts: &[u16]) {
    let world = cluster.client(STAYS);
    let before = world.record(id);
    let failed = world.about("POST", id, route, None);
    assert_eq!(failed.status, 502, "{}\n{}", failed.json(), cluster.logs());
    assert!(failed.message().contains(REFUSAL), "{}", failed.json());
    let record = world.record(id);
    assert_eq!(record["status"], "paused", "{record}");
    assert_eq!(record["snapshot"]["id"], before["snapshot"]["id"]);
    let reason = record["reason"].as_str().unwrap_or_default();
    for host in HOSTS {
        let told = reason.contains(&format!("on {}: ", name(host)));
        assert_eq!(told, hosts.contains(&host), "{reason}");
        cluster.client(host).wait_only(&[]);
    }
}

/// The images of one host: those of all, but for the kernel, which is a copy.
fn own_images(world: &World) -> PathBuf {
    let (shared, own) = (images(), world.dir().join("images"));
    let link = |what: &str| {
        let path = own.join(what);
        fs::create_dir_all(path.parent().expect("below")).expect("made");
        symlink(shared.join(what), path).expect("linked");
    };
    link("initramfs");
    link("templates");
    link("kernel/release");
    link("kernel/modules");
    let kernel = Path::new("kernel/vmlinuz");
    fs::copy(shared.join(kernel), own.join(kernel)).expect("copied");
    own
}

fn set_kernel(world: &World, mode: u32) {
    let kernel = world.images.join("kernel/vmlinuz");
    fs::set_permissions(kernel, Permissions::from_mode(mode)).expect("its own");
}
