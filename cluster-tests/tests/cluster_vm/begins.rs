//! What a host is given in the seconds in which it is dead and nobody knows goes on elsewhere as soon
//! as it is missing: it has not asked whether the guest may begin, and never gets that word.

use std::time::{Duration, Instant};

use serde_json::json;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::World;

use crate::durability::{STAYS, paused};
use crate::pausing::order;
use crate::witness::vmms;
use crate::{MEMORY_MB, PATIENCE, led_to, name, others, shorten_leases, wait_state, wait_voters};

/// KiB of each file in the guest.
const FILE_KIB: u32 = 1024;
/// What each host offers to root disks.
const DISK_MIB: u32 = 16 << 10;
/// Missing soon, and lost only long after: that is not what gives these out again.
const LEASE: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(36));

#[test]
fn i1_what_a_dead_host_was_given_begins_elsewhere_and_never_there() {
    let mut cluster = ClusterWorld::with(3, |_, world| {
        // However full this machine's disk is.
        world.environment = vec![("WRENN_DISK_MIB".to_owned(), DISK_MIB.to_string())];
    });
    wait_voters(&cluster, &[1, 2, 3], 3);
    shorten_leases(cluster.client(STAYS), LEASE.0, LEASE.1);
    // An election would only take time.
    let dies = if cluster.wait_leader() == 3 { 2 } else { 3 };
    let id = led_to(&cluster, dies, &json!({ "memory_mb": MEMORY_MB }));
    let contents = Contents::make(cluster.client(STAYS), &id, FILE_KIB);
    tell_word(cluster.client(STAYS), &id);
    paused(&cluster, &id, &[]);

    cluster.kill(dies);
    let route = format!("/resume?node={}", name(dies));
    let resumed = cluster.client(STAYS).about("POST", &id, &route, None);
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    runs_elsewhere(&cluster, &id, dies);
    contents.are_there(cluster.client(STAYS), &id);
    is_not_there(&mut cluster, &id, dies);

    cluster.kill(dies);
    let id = created_on(&cluster, dies);
    runs_elsewhere(&cluster, &id, dies);
    is_not_there(&mut cluster, &id, dies);
}

/// The node is back, and nothing of the capsule runs there; it runs on where it is.
fn is_not_there(cluster: &mut ClusterWorld, id: &str, number: u16) {
    cluster.start(number);
    let _alive = wait_state(cluster.client(STAYS), number, "alive");
    cluster.client(number).wait_only(&[]);
    let world = cluster.client(STAYS);
    assert_eq!(vmms(&cluster.client(number).data(), id), Vec::<u32>::new());
    assert_eq!(world.record(id)["status"], "running");
    world.destroy(id);
}

/// Creates a capsule that is given to a node for want of another; nobody waits for it.
fn created_on(cluster: &ClusterWorld, number: u16) -> String {
    let world = cluster.client(STAYS);
    for other in others(cluster, number) {
        order(world, other, "cordon");
    }
    let request = json!({ "memory_mb": MEMORY_MB });
    let made = world.call("POST", "/v1/capsules?wait=false", Some(&request));
    assert!(made.status < 300, "{}", made.json());
    for other in others(cluster, number) {
        order(world, other, "uncordon");
    }
    let made = made.json();
    assert_eq!(made["node"], name(number), "{made}");
    made["id"].as_str().expect("an id").to_owned()
}

/// Waits until the capsule runs on another node.
fn runs_elsewhere(cluster: &ClusterWorld, id: &str, dead: u16) {
    let began = Instant::now();
    let world = cluster.client(STAYS);
    let runs = wait_for(PATIENCE, || {
        let record = world.record(id);
        (record["status"] == "running" && record["node"] != name(dead)).then_some(record)
    });
    let record = runs.unwrap_or_else(|| panic!("{}\n{}", world.record(id), cluster.logs()));
    println!(
        "on {} after {:?}: {}",
        record["node"],
        began.elapsed(),
        record["start_ms"]
    );
}

/// Shows what the cluster's word costs a start.
fn tell_word(world: &World, id: &str) {
    let stages = &world.record(id)["start_ms"];
    println!(
        "a create waits {} ms for the word: {stages}",
        stages["word"]
    );
    assert!(stages["word"].as_f64() < Some(5000.0), "{stages}");
}
