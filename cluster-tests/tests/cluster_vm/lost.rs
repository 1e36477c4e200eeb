//! A guest whose memory nobody can give any more is ended with a reason, and never left hanging: all
//! copies are damaged while their holder lives, or the last holder dies with its disk.
//!
//! Snapshots have one copy here, and the third node is there for the quorum.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, signal};

use crate::damage::flip;
use crate::pausing::act;
use crate::{PATIENCE, led_to, name, wait_voters};

/// The node whose packs are damaged while it lives.
const ROTS: u16 = 1;
/// The one that runs guests whose snapshots the others have.
const RUNS: u16 = 2;
/// The one that dies with its disk.
const DIES: u16 = 3;
/// Enough that not all of it is there as soon as the guest is.
const MEMORY_MB: u32 = 512;
/// KiB of each file in the guest.
const FILE_KIB: u32 = 16 << 10;
/// How long a guest waits here for a holder that is away: minutes in earnest.
const AWAY: Duration = Duration::from_secs(8);

#[test]
fn i3_a_guest_whose_memory_nobody_has_any_more_is_ended_with_a_reason() {
    let shorten = format!("holder-away={}", AWAY.as_millis());
    let mut cluster = ClusterWorld::with(3, |_, world| {
        let variable = "WRENN_FAULT_SHORTEN".to_owned();
        world.environment = vec![(variable, shorten.clone())];
    });
    wait_voters(&cluster, &[ROTS, RUNS, DIES], 3);
    let one = cluster
        .client(RUNS)
        .call("PATCH", "/v1/cluster", Some(&json!({ "replicas": 1 })));
    assert_eq!(one.status, 200, "{}", one.json());

    let id = half_way(&cluster, ROTS);
    flip(&cluster.client(ROTS).data());
    signal(cluster.client(ROTS).pid(), Signal::SIGCONT);
    touch_all(cluster.client(RUNS), &id);
    let reason = ended(&cluster, &id);
    says(&reason, &["no host has a sound copy", &name(ROTS)]);
    let world = cluster.client(RUNS);
    let unheld = wait_for(PATIENCE, || {
        (world.record(&id)["replicas"] == 0).then_some(())
    });
    assert!(unheld.is_some(), "{}", world.record(&id));
    let refused = act(world, &id, "resume");
    assert_eq!(refused.status, 503, "{}", refused.json());
    says(&refused.json().to_string(), &["no host holds its snapshot"]);
    world.destroy(&id);

    let id = half_way(&cluster, DIES);
    cluster.lose(DIES);
    let world = cluster.client(RUNS);
    touch_all(world, &id);
    waits_for(world, &id, DIES);
    let reason = ended(&cluster, &id);
    let back = format!("try again once {} can be reached", name(DIES));
    says(&reason, &[back.as_str()]);
    let refused = act(world, &id, "resume");
    assert_eq!(refused.status, 503, "{}", refused.json());
    says(&refused.json().to_string(), &[&name(DIES)]);
    world.destroy(&id);
    cluster.client(RUNS).wait_only(&[]);
}

/// A capsule that [`RUNS`], while some of its memory is only at `holder`, which stands still.
fn half_way(cluster: &ClusterWorld, holder: u16) -> String {
    let id = led_to(cluster, holder, &json!({ "memory_mb": MEMORY_MB }));
    let _contents = Contents::make(cluster.client(holder), &id, FILE_KIB);
    let paused = act(cluster.client(holder), &id, "pause");
    assert_eq!(paused.status, 200, "{}", paused.json());
    let world = cluster.client(RUNS);
    let route = format!("/resume?node={}", name(RUNS));
    let resumed = world.about("POST", &id, &route, None);
    signal(cluster.client(holder).pid(), Signal::SIGSTOP);
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    let running = world.wait_status(&id, "running");
    assert_eq!(running["node"], name(RUNS));
    println!("as {} stands still: {}", name(holder), running["memory"]);
    let holders = &running["snapshot"]["holders"];
    assert_eq!(holders, &json!([name(holder)]), "some is only there");
    id
}

/// Has the guest read all that was in its memory, in the background.
fn touch_all(world: &World, id: &str) {
    let touch = json!({ "cmd": "/bin/sh", "args": ["-c", "sha256sum /dev/shm/random"], "background": true });
    // One that cannot even start a process any more stands still already.
    let _answer = world.try_call("POST", &format!("/v1/capsules/{id}/exec"), Some(&touch));
}

/// Waits until the capsule says that it waits for a node, and since and until when.
fn waits_for(world: &World, id: &str, number: u16) {
    let seen = wait_for(PATIENCE, || {
        let record = world.record(id);
        (record["waits_for"]["nodes"] == json!([name(number)])).then_some(record)
    });
    let seen = seen.unwrap_or_else(|| panic!("{}\n{}", world.record(id), world.log()));
    let told = &seen["waits_for"];
    println!("waits: {told}");
    assert_eq!(seen["status"], "running");
    assert!(told["since"].as_str() < told["until"].as_str(), "{told}");
}

/// Waits until the capsule rests again; returns why.
fn ended(cluster: &ClusterWorld, id: &str) -> String {
    let world = cluster.client(RUNS);
    let rests = |record: &Value| record["status"] == "paused";
    let record = wait_for(PATIENCE, || Some(world.record(id)).filter(rests));
    let record = record.unwrap_or_else(|| panic!("{}\n{}", world.record(id), cluster.logs()));
    let reason = record["reason"].as_str().unwrap_or_default().to_owned();
    println!("ended: {reason}");
    says(&reason, &["memory-lost", "what it did since is lost"]);
    reason
}

fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "not {word:?} in {text:?}");
    }
}
