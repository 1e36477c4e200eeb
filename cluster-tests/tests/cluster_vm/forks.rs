//! What starts from another capsule has all of its memory and disk, and nothing of what makes it this
//! one: snapshots with a name, forks, and guests that skip their boot.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::{Answer, wait_for};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{WARM_CREATE, World};

use crate::{MEMORY_MB, PATIENCE, led_to, name, wait_voters};

/// Size of each file in the guest: many chunks, and quickly made under emulation.
const FILE_KIB: u32 = 1536;
/// Where the capsule is made that everything else comes from.
const ORIGIN: u16 = 1;
/// Through which node everything is asked.
const ASKED: u16 = 2;
/// The node that is neither.
const THIRD: u16 = 3;

#[test]
fn what_starts_from_another_capsule_goes_on_where_it_was_as_somebody_else() {
    let cluster = ClusterWorld::with(3, |_, world| has_room(world));
    wait_voters(&cluster, &[1, 2, 3], 3);
    let world = cluster.client(ASKED);
    let origin = led_to(&cluster, ORIGIN, &json!({ "memory_mb": MEMORY_MB }));
    let contents = Contents::make(world, &origin, FILE_KIB);

    let kept = taken(&cluster, &origin, "kept");
    assert_eq!(
        (&kept["type"], &kept["memory_mb"]),
        (&json!("snapshot"), &json!(MEMORY_MB))
    );
    contents.are_there(world, &origin);
    let started = made_from(&cluster, "kept", THIRD);
    contents.are_there(world, &started);

    let forks = forked(&cluster, &origin, 2);
    for fork in &forks {
        contents.are_there(world, fork);
    }
    contents.are_there(world, &origin);
    let all: Vec<&String> = [&origin, &started].into_iter().chain(&forks).collect();
    nothing_is_shared(world, &all);

    asked_again_at_any_node(&cluster, &origin, &forks);

    // Emulated guests that wait for a processor for seconds lose track of the time.
    for fork in &forks {
        world.destroy(fork);
    }
    apart_from_now_on(world, &origin, &started);
    the_name_goes_and_its_guests_stay(&cluster, &started, &contents);
    world.destroy(&started);
    a_paused_capsule_gives_as_well(&cluster, &origin, &contents);
}

#[test]
fn the_second_capsule_of_a_kind_skips_its_boot_and_shares_nothing() {
    let cluster = ClusterWorld::with(2, |_, world| {
        has_room(world);
        world.environment.push((WARM_CREATE.into(), "true".into()));
    });
    wait_voters(&cluster, &[1, 2], 1);
    let world = cluster.client(ASKED);
    let request = json!({ "memory_mb": MEMORY_MB });
    let first = world.capsule_with(&request);
    assert_eq!(world.record(&first)["start"], "cold", "{}", cluster.logs());
    // The cluster is told of it a moment after the first one runs.
    let warm = wait_for(PATIENCE, || {
        let id = world.capsule_with(&request);
        let is_warm = world.record(&id)["start"] == "warm";
        if !is_warm {
            world.destroy(&id);
        }
        is_warm.then_some(id)
    });
    let warm = warm.unwrap_or_else(|| panic!("none starts warm\n{}", cluster.logs()));
    let other = made_on(&cluster, 1, &request);
    let another = made_on(&cluster, 2, &request);
    for id in [&other, &another] {
        assert_eq!(world.record(id)["start"], "warm", "{}", cluster.logs());
    }
    nothing_is_shared(world, &[&first, &warm, &other, &another]);
    for id in [&first, &warm] {
        assert_eq!(world.output(id, "id -un; pwd"), "root\n/root");
    }
    // Another size is another guest.
    let larger = world.capsule_with(&json!({ "memory_mb": 2 * MEMORY_MB }));
    assert_eq!(world.record(&larger)["start"], "cold");
    let paused = world.about("POST", &warm, "/pause", None);
    assert_eq!(paused.status, 200, "{}", paused.json());
    let resumed = world.about("POST", &warm, "/resume", None);
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    world.wait_status(&warm, "running");
    assert_eq!(world.output(&warm, "hostname"), warm);
}

/// What its capsules would take if they filled their disks, which they do not.
fn has_room(world: &mut World) {
    let disk = ("WRENN_DISK_MIB".into(), "65536".into());
    world.environment.push(disk);
}

/// Keeps a capsule under a name; it goes on, or stays paused.
fn taken(cluster: &ClusterWorld, id: &str, name: &str) -> Value {
    let world = cluster.client(ASKED);
    let before = world.record(id)["status"].clone();
    let body = json!({ "sandbox_id": id, "name": name });
    let made = world.call("POST", "/v1/snapshots", Some(&body));
    assert_eq!(made.status, 201, "{}\n{}", made.json(), cluster.logs());
    assert_eq!(world.record(id)["status"], before);
    made.json()
}

/// A capsule that starts from a name, on one node.
fn made_from(cluster: &ClusterWorld, template: &str, number: u16) -> String {
    made_on(cluster, number, &json!({ "template": template }))
}

fn made_on(cluster: &ClusterWorld, number: u16, request: &Value) -> String {
    let mut request = request.clone();
    request["on_node"] = name(number).into();
    let world = cluster.client(ASKED);
    let id = world.capsule_with(&request);
    assert_eq!(world.record(&id)["node"], name(number));
    id
}

fn forked(cluster: &ClusterWorld, id: &str, count: usize) -> Vec<String> {
    let world = cluster.client(ASKED);
    let ids = fork_ids(world, id, count);
    assert_eq!(ids.len(), count);
    for fork in &ids {
        world.wait_status(fork, "running");
        assert_eq!(world.record(fork)["start"], "fork");
    }
    assert_eq!(world.record(id)["status"], "running");
    ids
}

/// The ids of the forks that a request makes, the same one whichever node it is sent to.
fn fork_ids(world: &World, id: &str, count: usize) -> Vec<String> {
    let made = again(
        world,
        &format!("/v1/capsules/{id}/fork"),
        &json!({ "count": count }),
    );
    assert!(matches!(made.status, 201 | 202), "{}", made.json());
    let made = made.json();
    let ids = made.as_array().expect("a list").iter();
    ids.map(|fork| fork["id"].as_str().expect("an id").to_owned())
        .collect()
}

/// A request that may come again: its key is the same everywhere.
fn again(world: &World, path: &str, body: &Value) -> Answer {
    let key = world.key();
    let headers = [
        ("X-API-Key", key.as_str()),
        ("Content-Type", "application/json"),
        ("Idempotency-Key", "once"),
    ];
    let sent = world.send("POST", path, &headers, Some(body.to_string().as_bytes()));
    sent.expect("an answer")
}

/// Requests that come again, at other nodes, make nothing new.
fn asked_again_at_any_node(cluster: &ClusterWorld, origin: &str, forks: &[String]) {
    let before = cluster.client(ASKED).listed().len();
    for node in [ORIGIN, THIRD] {
        assert_eq!(fork_ids(cluster.client(node), origin, forks.len()), forks);
    }
    let body = json!({ "sandbox_id": origin, "name": "again" });
    let made = again(cluster.client(ASKED), "/v1/snapshots", &body);
    assert_eq!(made.status, 201, "{}\n{}", made.json(), cluster.logs());
    let same = again(cluster.client(THIRD), "/v1/snapshots", &body);
    assert_eq!((same.status, same.json()), (201, made.json()));
    let gone = cluster
        .client(THIRD)
        .call("DELETE", "/v1/snapshots/again", None);
    assert_eq!(gone.status, 204);
    assert_eq!(cluster.client(ASKED).listed().len(), before);
}

/// Names, machine ids and random numbers of all of them differ.
fn nothing_is_shared(world: &World, ids: &[&String]) {
    for id in ids {
        assert_eq!(world.output(id, "hostname"), **id);
        assert_eq!(world.output(id, "cat /etc/hostname"), **id);
    }
    for (what, line) in [
        (
            "kernel's random numbers",
            "head -c 32 /dev/urandom | sha256sum",
        ),
        ("random ids", "cat /proc/sys/kernel/random/uuid"),
    ] {
        let seen: BTreeSet<String> = ids.iter().map(|id| world.output(id, line)).collect();
        assert_eq!(seen.len(), ids.len(), "two share the {what}: {seen:?}");
    }
    // Of those that were sealed; one that booted has what its template gave it.
    let machine_ids: Vec<String> = ids[1..]
        .iter()
        .map(|id| world.output(id, "cat /etc/machine-id"))
        .collect();
    let different: BTreeSet<&String> = machine_ids.iter().collect();
    assert_eq!(different.len(), machine_ids.len(), "{machine_ids:?}");
}

/// What one writes the other does not see.
fn apart_from_now_on(world: &World, one: &str, other: &str) {
    world.output(
        one,
        "echo mine > /root/mine; echo mine > /dev/shm/mine; sync",
    );
    let ran = world.exec(other, "ls /root/mine /dev/shm/mine");
    assert_ne!(ran["exit_code"], 0, "{ran}");
}

fn the_name_goes_and_its_guests_stay(cluster: &ClusterWorld, id: &str, contents: &Contents) {
    let world = cluster.client(ASKED);
    let route = "/v1/snapshots/kept";
    assert_eq!(world.call("DELETE", route, None).status, 204);
    assert_eq!(world.call("DELETE", route, None).status, 404);
    let refused = world.call("POST", "/v1/capsules", Some(&json!({ "template": "kept" })));
    assert_eq!(refused.refusal(), (404, "not_found".into()));
    let paused = world.about("POST", id, "/pause", None);
    assert_eq!(paused.status, 200, "{}\n{}", paused.json(), cluster.logs());
    let resumed = world.about("POST", id, "/resume", None);
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    world.wait_status(id, "running");
    contents.are_there(world, id);
    assert_eq!(world.output(id, "hostname"), id);
}

fn a_paused_capsule_gives_as_well(cluster: &ClusterWorld, id: &str, contents: &Contents) {
    let world = cluster.client(ASKED);
    let paused = world.about("POST", id, "/pause", None);
    assert_eq!(paused.status, 200, "{}\n{}", paused.json(), cluster.logs());
    let _kept = taken(cluster, id, "rests");
    let started = made_from(cluster, "rests", ORIGIN);
    contents.are_there(world, &started);
    assert_eq!(world.output(&started, "cat /root/mine"), "mine");
    world.destroy(id);
    assert_eq!(world.output(&started, "cat /dev/shm/mine"), "mine");
}
