//! Nodes leave: one dies and comes back, dies for good and is declared dead, and one is cordoned,
//! drained and removed in order, with the command line as a person would use it.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::witness::vmms;
use crate::{MEMORY_MB, PATIENCE, name, on_node, others, told_of, wait_state, wait_voters};

/// How soon after its daemon a node's capsules must be told of as before.
const BACK_SOON: Duration = Duration::from_secs(10);

#[test]
fn nodes_die_return_and_leave_and_their_capsules_are_told_of_faithfully() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let leader = cluster.wait_leader();
    let [stays, dies] = others(&cluster, leader)[..] else {
        panic!("three nodes")
    };
    let id = cluster.client(stays).capsule_with(&on_node(dies));
    cluster.client(stays).output(&id, "echo kept > /root/file");

    owner_dies_and_returns(&mut cluster, stays, dies, &id);
    owner_dies_for_good(&mut cluster, stays, dies, &id);
    leader_leaves_in_order(&mut cluster, stays, leader);
    cluster.client(stays).wait_only(&[]);
}

/// Runs `wrenn node …` against a node.
fn order(world: &World, arguments: &[&str]) -> Output {
    Command::new(wrenn())
        .args([
            "--json",
            "--url",
            &world.url(),
            "--api-key",
            &world.key(),
            "node",
        ])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the wrenn binary runs")
}

/// What it prints when it succeeds.
fn answer(world: &World, arguments: &[&str]) -> Value {
    let output = order(world, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{arguments:?}: {said}\n{}",
        world.log()
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// What it says when it fails.
fn failure(world: &World, arguments: &[&str]) -> String {
    let output = order(world, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The guest outlives the daemon; the others say that they miss its host, and then that it is back.
fn owner_dies_and_returns(cluster: &mut ClusterWorld, stays: u16, dies: u16, id: &str) {
    let before = vmms(&cluster.client(dies).data(), id);
    assert_eq!(before.len(), 1);
    cluster.kill(dies);
    let world = cluster.client(stays);
    let told = wait_state(world, dies, "missing");
    assert!(told["since"].is_string(), "{told}");
    let record = world.record(id);
    assert_eq!(
        (&record["status"], &record["node"]),
        (&json!("missing"), &json!(name(dies)))
    );
    assert_eq!(record["missing_since"], told["since"]);
    let refused = world.run(id, &json!({ "cmd": "true" }));
    assert_eq!(refused.refusal(), (503, "host_unavailable".into()));
    assert!(
        refused.message().contains(&name(dies)),
        "{}",
        refused.message()
    );

    cluster.start(dies);
    let (world, began) = (cluster.client(stays), Instant::now());
    let back = wait_for(BACK_SOON, || {
        (world.record(id)["status"] == "running").then_some(())
    });
    assert!(
        back.is_some(),
        "{}\n{}",
        world.record(id),
        cluster.client(dies).log()
    );
    println!(
        "a capsule is told of as running {:?} after its daemon is ready",
        began.elapsed()
    );
    assert_eq!(world.output(id, "cat /root/file"), "kept");
    assert_eq!(vmms(&cluster.client(dies).data(), id), before);
}

/// Only a person can know that a host is dead; nobody is believed while it lives.
fn owner_dies_for_good(cluster: &mut ClusterWorld, stays: u16, dies: u16, id: &str) {
    let (world, gone) = (cluster.client(stays), name(dies));
    let has_some = failure(world, &["remove", &gone]);
    assert!(
        has_some.contains("1 capsule") && has_some.contains("drain"),
        "{has_some}"
    );
    let lives = failure(world, &["remove", "--force", &gone]);
    assert!(lives.contains("is alive"), "{lives}");

    cluster.lose(dies);
    let world = cluster.client(stays);
    let _missing = wait_state(world, dies, "missing");
    let has_some = failure(world, &["remove", &gone]);
    assert!(has_some.contains("--force"), "{has_some}");
    let removed = answer(world, &["remove", "--force", &gone]);
    assert_eq!(removed["removed"], gone);
    for number in others(cluster, dies) {
        let ended = cluster.client(number).wait_ended(id);
        assert_eq!(ended["status"], "error", "{ended}");
        let reason = ended["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("was declared dead"), "{ended}");
        assert_eq!(cluster.client(number).listed(), Vec::<String>::new());
    }
    // Two voters bear no more losses than one.
    wait_voters(cluster, &others(cluster, dies), 1);
}

/// The leader itself, so that leadership and vote go over as well.
fn leader_leaves_in_order(cluster: &mut ClusterWorld, stays: u16, leaves: u16) {
    let world = cluster.client(stays);
    let node = name(leaves);
    let id = world.capsule_with(&on_node(leaves));
    assert_eq!(answer(world, &["cordon", &node])["cordoned"], true);
    cordoned_takes_nothing(world, leaves);
    assert_eq!(world.output(&id, "echo here"), "here");

    let waits = failure(world, &["drain", &node, "--timeout", "2s"]);
    assert!(waits.contains("still has 1 capsule"), "{waits}");
    assert_eq!(world.record(&id)["status"], "running");
    assert_eq!(answer(world, &["uncordon", &node])["draining"], false);

    let drained = answer(
        world,
        &["drain", &node, "--stop-capsules", "--timeout", "60s"],
    );
    assert_eq!(
        (&drained["drained"], &drained["capsules"]),
        (&json!(true), &json!([]))
    );
    assert_eq!(world.record(&id)["status"], "stopped");
    cluster.client(leaves).wait_only(&[]);
    // It is the only voter of two nodes by now, and goes once the other has its vote.
    let removed = wait_for(2 * PATIENCE, || {
        let removed = world.call("DELETE", &format!("/v1/nodes/{node}"), None);
        if removed.status == 204 {
            return Some(());
        }
        assert!(removed.message().contains("votes"), "{}", removed.message());
        None
    });
    assert!(
        removed.is_some(),
        "{}\n{}",
        told_of(world, leaves),
        cluster.logs()
    );
    is_out(cluster, stays, leaves);
}

fn cordoned_takes_nothing(world: &World, number: u16) {
    let refused = world.call("POST", "/v1/capsules", Some(&on_node(number)));
    assert_eq!(refused.refusal(), (503, "no_hosts_available".into()));
    assert!(
        refused.message().contains("cordoned"),
        "{}",
        refused.message()
    );
}

/// Nobody knows it any more, it knows that, and the rest goes on.
fn is_out(cluster: &mut ClusterWorld, stays: u16, gone: u16) {
    let world = cluster.client(stays);
    let nodes = world.call("GET", "/v1/nodes", None).json();
    assert_eq!(nodes.as_array().map(Vec::len), Some(1), "{nodes}");
    wait_voters(cluster, &[stays], 1);
    let asked = json!({ "memory_mb": MEMORY_MB });
    let there = cluster
        .client(gone)
        .try_call("POST", "/v1/capsules", Some(&asked));
    assert!(
        there.is_none_or(|it| it.status >= 400),
        "a node that was removed creates"
    );
    let made = world.call("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 60 })));
    assert_eq!(made.status, 201, "{}", made.json());
}
