//! Invariant I3 where disks die and come back: what the cluster acknowledged last is what a capsule
//! goes on from, whoever is left to hold it.

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::World;

use crate::cycles::store;
use crate::pausing::{act, order};
use crate::{MEMORY_MB, PATIENCE, led_to, name, others, wait_state, wait_voters};

/// Where the capsule is made, and through which node everything is asked: it stays.
pub(crate) const STAYS: u16 = 1;
/// KiB of each file: many chunks, and quickly made under emulation.
const FILE_KIB: u32 = 8192;
/// KiB that are written anew between two pauses.
const WRITTEN_KIB: u32 = 1024;

#[test]
fn i3_the_newest_pause_outlives_a_disk_that_dies_and_an_old_copy_that_returns() {
    let mut cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let id = led_to(&cluster, STAYS, &json!({ "memory_mb": MEMORY_MB }));
    let mut contents = Contents::make(cluster.client(STAYS), &id, FILE_KIB);

    let holders = paused(&cluster, &id, &[]);
    let returns = *holders
        .iter()
        .find(|it| **it != STAYS)
        .expect("two hold it");
    let third = 6 - STAYS - returns;
    cluster.kill(returns);
    let _missing = wait_state(cluster.client(STAYS), returns, "missing");
    resumed_on(&cluster, &id, STAYS);
    contents.are_there(cluster.client(STAYS), &id);
    contents.rewrite(cluster.client(STAYS), &id, WRITTEN_KIB, 1);
    let holders = paused(&cluster, &id, &[returns]);
    assert_eq!(
        holders,
        [STAYS, third],
        "the one that is away counts for nothing"
    );

    cluster.start(returns);
    let _alive = wait_state(cluster.client(STAYS), returns, "alive");
    assert_eq!(
        held_by(&cluster, &id),
        [STAYS, third],
        "an old copy is none"
    );
    // It takes room until it is collected, and nobody needs it.
    let _dropped = store(&cluster.client(returns).data(), "gc");
    let kept = store(&cluster.client(returns).data(), "stats");
    assert_eq!(kept["snapshots"], 0, "{kept}");
    resumed_on(&cluster, &id, returns);
    contents.are_there(cluster.client(STAYS), &id);
    contents.rewrite(cluster.client(STAYS), &id, WRITTEN_KIB, 2);
    let holders = paused(&cluster, &id, &[]);
    assert!(holders.contains(&returns), "{holders:?}");

    cluster.lose(returns);
    let _missing = wait_state(cluster.client(STAYS), returns, "missing");
    let host = resumed_anywhere(&cluster, &id);
    assert_ne!(host, returns);
    contents.are_there(cluster.client(STAYS), &id);
    is_copied_again(&cluster, &id, returns);

    cluster.client(STAYS).destroy(&id);
    for number in others(&cluster, returns) {
        cluster.client(number).wait_only(&[]);
    }
}

/// Pauses a capsule and waits until two nodes other than `away` hold it; returns who does.
pub(crate) fn paused(cluster: &ClusterWorld, id: &str, away: &[u16]) -> Vec<u16> {
    let world = cluster.client(STAYS);
    let answer = act(world, id, "pause");
    assert_eq!(answer.status, 200, "{}\n{}", answer.json(), cluster.logs());
    let copied = wait_for(PATIENCE, || {
        let mut holders = held_by(cluster, id);
        holders.retain(|holder| !away.contains(holder));
        (holders.len() >= 2).then_some(holders)
    });
    copied.unwrap_or_else(|| panic!("{}\n{}", world.record(id), cluster.logs()))
}

/// Numbers of the nodes that hold what a capsule was paused as last.
fn held_by(cluster: &ClusterWorld, id: &str) -> Vec<u16> {
    let record = cluster.client(STAYS).record(id);
    let holders = record["snapshot"]["holders"].as_array().cloned();
    let holders = holders.unwrap_or_default();
    (1..=cluster.len())
        .filter(|number| holders.contains(&Value::from(name(*number))))
        .collect()
}

/// Resumes a capsule on one node.
pub(crate) fn resumed_on(cluster: &ClusterWorld, id: &str, number: u16) {
    let world = cluster.client(STAYS);
    for other in others(cluster, number) {
        order(world, other, "cordon");
    }
    assert_eq!(resumed_anywhere(cluster, id), number);
    for other in others(cluster, number) {
        order(world, other, "uncordon");
    }
}

/// Resumes a capsule on whichever node can; returns which.
fn resumed_anywhere(cluster: &ClusterWorld, id: &str) -> u16 {
    let world = cluster.client(STAYS);
    let answer = wait_for(PATIENCE, || {
        let answer = act(world, id, "resume");
        (answer.status != 503).then_some(answer)
    });
    let answer = answer.unwrap_or_else(|| panic!("nobody can\n{}", cluster.logs()));
    let taken = matches!(answer.status, 200 | 202);
    assert!(taken, "{}\n{}", answer.json(), cluster.logs());
    let running = world.wait_status(id, "running");
    let host = (1..=cluster.len()).find(|number| running["node"] == name(*number));
    host.expect("a node of the cluster")
}

/// A holder that is gone for good is replaced, and forgotten.
fn is_copied_again(cluster: &ClusterWorld, id: &str, lost: u16) {
    let world: &World = cluster.client(STAYS);
    let left = others(cluster, lost);
    let repaired = wait_for(PATIENCE, || {
        let holders = held_by(cluster, id);
        left.iter().all(|it| holders.contains(it)).then_some(())
    });
    assert!(
        repaired.is_some(),
        "{}\n{}",
        world.record(id),
        cluster.logs()
    );
    let path = format!("/v1/nodes/{}?force=true", name(lost));
    let removed = world.call("DELETE", &path, None);
    assert!(matches!(removed.status, 200 | 204), "{}", removed.json());
    assert_eq!(held_by(cluster, id), left);
    assert_eq!(world.record(id)["replicas"], 2);
}
