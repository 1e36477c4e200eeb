//! Several nodes with real guests: any node serves every capsule, none runs twice, none is promised
//! more than there is, and nodes come, go and break without harm to what they run.
//!
//! Needs root, QEMU and the guest images; `deploy/test cluster-vm` sees to all of it. One cluster
//! for each file, since forming one and booting guests takes longest; every world checks at its end
//! that it left nothing on the host. `WRENN_LONG=1` moves a whole gibibyte where 192 MiB do otherwise.

mod any_node;
mod bases;
mod begins;
mod builds;
mod clones;
mod coming;
mod concurrent;
mod cycles;
mod damage;
mod drain;
mod durability;
mod fencing;
mod flow;
mod forks;
mod imports;
mod lost;
mod moving;
mod passed_over;
mod pausing;
mod rolling;
mod witness;

use std::time::Duration;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::{self, ClusterWorld, shorten_leases};
use wrenn_cluster_tests::world::World;

/// Longest that something soon to come may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// A guest that is small and boots.
const MEMORY_MB: u32 = 256;

/// What a request for a small capsule that stays on one node says.
fn on_node(number: u16) -> Value {
    json!({ "memory_mb": MEMORY_MB, "on_node": name(number) })
}

/// A running capsule that is on a node for want of another, and not bound to it.
fn led_to(cluster: &ClusterWorld, number: u16, request: &Value) -> String {
    let world = cluster.client(number);
    let bar = |act: &str| {
        for other in others(cluster, number) {
            let path = format!("/v1/nodes/{}/{act}", name(other));
            assert_eq!(world.call("POST", &path, None).status, 200);
        }
    };
    bar("cordon");
    let id = world.capsule_with(request);
    bar("uncordon");
    assert_eq!(world.record(&id)["node"], name(number));
    id
}

/// What a node is called.
fn name(number: u16) -> String {
    format!("node{number}")
}

/// All nodes but one.
fn others(cluster: &ClusterWorld, number: u16) -> Vec<u16> {
    (1..=cluster.len())
        .filter(|other| *other != number)
        .collect()
}

/// Waits until so many nodes vote, as each of them sees it.
fn wait_voters(cluster: &ClusterWorld, numbers: &[u16], count: usize) {
    for number in numbers {
        cluster::wait_voters(cluster.client(*number), count);
    }
}

/// What one node tells of another.
fn told_of(world: &World, number: u16) -> Value {
    let path = format!("/v1/nodes/{}", name(number));
    world.call("GET", &path, None).json()
}

/// Waits until a node tells of another that it is in a state.
fn wait_state(world: &World, number: u16, state: &str) -> Value {
    let told = wait_for(PATIENCE, || {
        let told = told_of(world, number);
        (told["state"] == state).then_some(told)
    });
    told.unwrap_or_else(|| panic!("{} is not {state}\n{}", name(number), world.log()))
}
