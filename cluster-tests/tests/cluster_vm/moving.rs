//! A running capsule moves to another node in one call, whoever dies meanwhile.

use nix::sys::signal::Signal;
use serde_json::json;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, signal};

use crate::{MEMORY_MB, PATIENCE, led_to, name, wait_voters};

/// Where the capsule is at first.
const FROM: u16 = 1;
/// Where it goes.
const TO: u16 = 2;
/// The node that is neither.
const THIRD: u16 = 3;

#[test]
fn a_capsule_moves_with_its_memory_and_goes_on_though_the_asked_node_dies() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let id = led_to(&cluster, FROM, &json!({ "memory_mb": MEMORY_MB }));
    let world = cluster.client(TO);
    world.output(
        &id,
        "mkdir -p /dev/shm; echo kept > /dev/shm/kept; echo kept > /root/kept",
    );

    let goal = json!({ "node": name(TO) });
    let moved = cluster
        .client(THIRD)
        .about("POST", &id, "/migrate", Some(&goal));
    assert!(matches!(moved.status, 200 | 202), "{}", moved.json());
    runs_on(world, &id, TO);
    let again = world.about("POST", &id, "/migrate", Some(&goal));
    assert_eq!(again.status, 200, "it is there: {}", again.json());

    // Whoever asked hears nothing more; the capsule goes on all the same.
    let path = format!("/v1/capsules/{id}/migrate");
    let goal = json!({ "node": name(FROM) });
    std::thread::scope(|scope| {
        let asked = cluster.client(THIRD);
        scope.spawn(move || asked.try_call("POST", &path, Some(&goal)));
        let world = cluster.client(TO);
        let moves = wait_for(PATIENCE, || {
            (world.record(&id)["status"] != "running").then_some(())
        });
        assert!(moves.is_some(), "it is on its way");
        signal(asked.pid(), Signal::SIGKILL);
    });
    cluster.kill(THIRD);
    runs_on(cluster.client(TO), &id, FROM);
    cluster.client(TO).destroy(&id);
    cluster.start(THIRD);
}

/// It comes to run on a node, with what it had.
fn runs_on(world: &World, id: &str, number: u16) {
    let there = wait_for(PATIENCE, || {
        let record = world.record(id);
        (record["status"] == "running" && record["node"] == name(number)).then_some(())
    });
    assert!(there.is_some(), "{}\n{}", world.record(id), world.log());
    assert_eq!(
        world.output(id, "cat /dev/shm/kept /root/kept"),
        "kept\nkept"
    );
}
