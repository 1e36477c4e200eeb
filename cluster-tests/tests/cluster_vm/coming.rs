//! A guest runs before its memory is on its node, and a holder that dies meanwhile is done without.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::signal;

use crate::{PATIENCE, led_to, name, wait_state, wait_voters};

/// Where the capsule is made, and so a holder; it dies.
const DIES: u16 = 1;
/// Enough that not all of it is there as soon as the guest is.
const MEMORY_MB: u32 = 512;
/// KiB of each file in the guest.
const FILE_KIB: u32 = 48 << 10;

#[test]
fn i3_a_holder_that_dies_while_a_guests_memory_comes_is_done_without() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let id = led_to(&cluster, DIES, &json!({ "memory_mb": MEMORY_MB }));
    let contents = Contents::make(cluster.client(DIES), &id, FILE_KIB);
    let paused = cluster.client(DIES).about("POST", &id, "/pause", None);
    assert!(matches!(paused.status, 200 | 202), "{}", paused.json());
    let lacks = lacking(&cluster, &id);

    let route = format!("/resume?node={}", name(lacks));
    let resumed = cluster.client(lacks).about("POST", &id, &route, None);
    // Whoever has all of it says so, and nobody can be given more while both stand still.
    let stays = (1..=cluster.len()).find(|number| ![DIES, lacks].contains(number));
    let stays = cluster.client(stays.expect("three nodes")).pid();
    for holder in [cluster.client(DIES).pid(), stays] {
        signal(holder, Signal::SIGSTOP);
    }
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    let world = cluster.client(lacks);
    let half = world.record(&id);
    let holders = half["snapshot"]["holders"].as_array();
    let holders = holders.expect("some hold it");
    assert!(!holders.contains(&Value::from(name(lacks))), "{half}");
    signal(cluster.client(DIES).pid(), Signal::SIGKILL);
    signal(stays, Signal::SIGCONT);
    let running = world.wait_status(&id, "running");
    assert_eq!(running["node"], name(lacks));
    let came = &running["memory"];
    println!("as it runs: {came}, under way: {}", running["transfer"]);
    assert!(came["peer_bytes"].as_u64() > Some(0), "{running}");

    contents.are_there(world, &id);
    let whole = wait_for(PATIENCE, || {
        let record = world.record(&id);
        let holders = record["snapshot"]["holders"].as_array()?.clone();
        holders.contains(&Value::from(name(lacks))).then_some(())
    });
    assert!(whole.is_some(), "{}\n{}", world.record(&id), cluster.logs());
    world.destroy(&id);
    cluster.kill(DIES);
    cluster.start(DIES);
    let _back = wait_state(cluster.client(lacks), DIES, "alive");
}

/// The node that has no copy, once the two others have one.
fn lacking(cluster: &ClusterWorld, id: &str) -> u16 {
    let world = cluster.client(DIES);
    let holders = wait_for(PATIENCE, || {
        let record = world.record(id);
        let holders = record["snapshot"]["holders"].as_array()?.clone();
        (record["status"] == "paused" && holders.len() == 2).then_some(holders)
    });
    let holders = holders.expect("two copies");
    let lacks = |number: &u16| !holders.contains(&Value::from(name(*number)));
    (1..=cluster.len()).find(lacks).expect("three nodes")
}
