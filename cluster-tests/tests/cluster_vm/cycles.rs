//! Many pauses and resumes of one capsule, on another node each time, with writes in between: memory
//! and disk are the same each time, and the stores hold no more than what was ever different.
//!
//! Six cycles; `WRENN_LONG=1` does fifty, and waits until what nobody needs any more is collected.

use std::env;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, path::Path};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, wrenn};

use crate::pausing::{act, order};
use crate::{MEMORY_MB, led_to, name, others};

/// Pauses and resumes.
const CYCLES: u32 = 6;
/// The same where time is no matter.
const LONG_CYCLES: u32 = 50;
/// Through which node everything is asked.
const ASKED: u16 = 1;
/// KiB of each file, and how much of it is written anew in each cycle.
const FILE_KIB: u32 = 4096;
const WRITTEN_KIB: u32 = 256;
/// What a store may take beyond its chunks: heads of records and manifests.
const SLACK_BYTES: u64 = 16 << 20;
/// How long after its last use something is collected, and as much again.
const COLLECTED: Duration = Duration::from_secs(150);

#[test]
fn memory_and_disk_are_the_same_through_many_hops_and_stores_do_not_grow_beyond_them() {
    let long = env::var_os("WRENN_LONG").is_some();
    let cycles = if long { LONG_CYCLES } else { CYCLES };
    let mut cluster = ClusterWorld::new(3);
    let id = led_to(&cluster, ASKED, &json!({ "memory_mb": MEMORY_MB }));
    let mut contents = Contents::make(cluster.client(ASKED), &id, FILE_KIB);
    let (mut host, mut sealed) = (ASKED, 0);
    for cycle in 1..=cycles {
        let began = Instant::now();
        contents.rewrite(cluster.client(ASKED), &id, WRITTEN_KIB, cycle);
        let snapshot = paused(&cluster, &id);
        let new = snapshot["new_bytes"].as_u64().expect("a figure");
        sealed += new;
        let paused_in = began.elapsed();
        host = resumed_on(&cluster, &id, host % 3 + 1);
        contents.are_there(cluster.client(ASKED), &id);
        println!(
            "cycle {cycle}: {} KiB new, paused in {paused_in:?}, all in {:?}",
            new >> 10,
            began.elapsed()
        );
    }
    let snapshot = paused(&cluster, &id);
    sealed += snapshot["new_bytes"].as_u64().expect("a figure");
    if long {
        wait_collected(&cluster);
    }
    for number in 1..=3 {
        cluster.client(number).wait_only(&[]);
        cluster.stop(number);
        holds_no_more_than(&cluster.client(number).data(), sealed);
    }
}

/// Pauses a capsule; returns what of.
fn paused(cluster: &ClusterWorld, id: &str) -> Value {
    let answer = act(cluster.client(ASKED), id, "pause");
    let said = answer.json();
    assert_eq!(answer.status, 200, "{said}\n{}", cluster.logs());
    said["snapshot"].clone()
}

/// Resumes a capsule on one node, whether it holds a copy or not.
fn resumed_on(cluster: &ClusterWorld, id: &str, number: u16) -> u16 {
    let world = cluster.client(ASKED);
    for other in others(cluster, number) {
        order(world, other, "cordon");
    }
    let answer = act(world, id, "resume");
    let taken = matches!(answer.status, 200 | 202);
    assert!(taken, "{}\n{}", answer.json(), cluster.logs());
    let running = world.wait_status(id, "running");
    assert_eq!(running["node"], name(number), "{running}");
    for other in others(cluster, number) {
        order(world, other, "uncordon");
    }
    number
}

/// Waits until each node keeps no other snapshot than the capsule's last, and is done with the collection
/// that dropped the others: their chunks go after them.
fn wait_collected(cluster: &ClusterWorld) {
    let kept = |world: &World| {
        let dir = world.data().join("store/snapshots");
        fs::read_dir(dir).map_or(0, Iterator::count)
    };
    let done = |world: &World| world.log().matches("collected=Collected").count();
    let worlds = [1, 2, 3].map(|number| cluster.client(number));
    // Of collections that ended while there was more to drop.
    let mut done_before = worlds.map(done);
    let collected = wait_for(COLLECTED, || {
        let mut is_over = true;
        for (world, done_before) in worlds.iter().zip(&mut done_before) {
            let done_now = done(world);
            let has_more = kept(world) > 1;
            if has_more {
                *done_before = done_now;
            }
            is_over &= !has_more && done(world) > *done_before;
        }
        is_over.then_some(())
    });
    let kept = worlds.map(kept);
    assert!(collected.is_some(), "{kept:?} are kept\n{}", cluster.logs());
}

/// A stopped node's store is sound. Its packs take at most twice what is needed, since two who fetch
/// the same at once may both write it; and what is needed was sealed once.
fn holds_no_more_than(data: &Path, sealed: u64) {
    let checked = store(data, "check");
    assert_eq!(checked["sound"], true, "{checked}");
    let stats = store(data, "stats");
    println!("{stats}");
    let figure = |name: &str| stats[name].as_u64().expect("a figure");
    let needed = figure("pack_bytes") - figure("garbage_bytes");
    assert!(
        needed <= sealed + SLACK_BYTES,
        "more than {sealed}: {stats}"
    );
    assert!(figure("pack_bytes") <= 2 * needed + SLACK_BYTES, "{stats}");
}

/// What `wrenn store` says of a node's store.
pub(crate) fn store(data: &Path, what: &str) -> Value {
    let told = Command::new(wrenn())
        .args(["store", what, "--json", "--data-dir"])
        .arg(data)
        .output()
        .expect("the wrenn binary runs");
    let said = String::from_utf8_lossy(&told.stderr);
    assert!(told.status.success(), "{said}");
    serde_json::from_slice(&told.stdout).expect("JSON")
}
