//! A majority is gone: what goes on without it, going on from a survivor, and coming back after a
//! power cut. Real daemons; one real guest.
//!
//! Needs root, QEMU and the guest images; `deploy/test lost-quorum` sees to all of it.

mod power_cut;
mod recover;
mod without;

use std::time::Duration;

use serde_json::{Value, json};
use wrenn_cluster_tests::cluster::{ClusterWorld, wait_voters};
use wrenn_cluster_tests::world::World;

/// Longest that roles may take to settle: two replacements of voters are half a minute apart.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Records that are written before a disaster.
const RECORDS: usize = 12;

/// Writes records through all of these nodes in turn; returns the ids of those acknowledged.
fn write_records(cluster: &ClusterWorld, through: &[u16]) -> Vec<String> {
    let mut written = Vec::new();
    for (_, number) in (0..RECORDS).zip(through.iter().cycle()) {
        written.push(write_record(cluster.client(*number)));
    }
    written
}

fn write_record(world: &World) -> String {
    let made = world.call("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 3600 })));
    assert_eq!(made.status, 201, "{}\n{}", made.json(), world.log());
    made.json()["id"].as_str().expect("an id").to_owned()
}

/// Ids in a list.
fn ids(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .filter_map(|item| item["id"].as_str().map(str::to_owned))
        .collect()
}

/// The records of `written` that a node does not have.
fn missing(world: &World, written: &[String]) -> Vec<String> {
    let known = ids(&world.call("GET", "/v1/tokens", None).json());
    let absent = written.iter().filter(|id| !known.contains(id));
    absent.cloned().collect()
}
