//! A live cluster under faults: real daemons, real sockets, real disks, no guests.
//!
//! Where a test shows one of the invariants of the design, its name begins with the invariant's
//! number. `WRENN_LONG=1` keeps the faults of `linearizable` up for ten minutes instead of half a
//! minute; `WRENN_SEED=n` repeats one order of faults (of faults only: threads and disks have their own
//! mind).
//!
//! Needs root and nftables; `deploy/test faults` sees to all of it. Two things are shown only where
//! they can be: syncs are counted where strace is installed, and a slow disk needs the kernel's block
//! controller.

mod chance;
mod clock;
mod disks;
mod door;
mod hostile;
mod idle;
mod join;
mod linearizable;
mod mirrors;
mod restart;

use std::time::Duration;

use serde_json::Value;
use wrenn_cluster_tests::cluster::{ClusterWorld, wait_voters};
use wrenn_cluster_tests::world::World;

/// Longest that roles may take to settle: two replacements of voters are half a minute apart.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Three nodes that all vote.
fn three() -> ClusterWorld {
    all_vote(ClusterWorld::new(3))
}

/// The same, with no other cluster beside it: for tests of what is in time, or of what is used.
fn three_alone() -> ClusterWorld {
    all_vote(ClusterWorld::alone(3, |_, _| {}))
}

fn all_vote(cluster: ClusterWorld) -> ClusterWorld {
    wait_voters(cluster.client(1), 3);
    cluster
}

/// Ids in a list.
fn ids(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .filter_map(|item| item["id"].as_str().map(str::to_owned))
        .collect()
}

/// The tokens of `written` that a node does not have, once it has all that was acknowledged.
fn missing(world: &World, written: &[String]) -> Vec<String> {
    let listed = world.call("GET", "/v1/tokens?consistency=linearizable", None);
    assert_eq!(listed.status, 200, "{}\n{}", listed.json(), world.log());
    let known = ids(&listed.json());
    let absent = written.iter().filter(|id| !known.contains(id));
    absent.cloned().collect()
}
