//! One node of three is left: its own capsules go on, it answers what it knows, and it changes
//! nothing.

use std::time::{Duration, Instant};

use serde_json::json;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::{ClusterWorld, shorten_leases};
use wrenn_cluster_tests::world::World;

use crate::recover::{give_up, recover};
use crate::{missing, wait_voters, write_record, write_records};

/// Longest a change may take to be refused: what a proposal waits for a quorum, and a busy machine.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(15);
/// A lease and its grace.
const LEASE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// Longer than both: whatever lived by it is dead by then.
const PAST_LEASES: Duration = Duration::from_secs(30);

#[test]
fn a_survivor_serves_its_own_without_a_quorum_and_everything_after_its_recovery() {
    let mut cluster = ClusterWorld::with(3, |number, world| {
        world.arguments = vec!["--tag".into(), format!("site=s{number}")];
    });
    wait_voters(cluster.client(3), 3);
    shorten_leases(cluster.client(3), LEASE.0, LEASE.1);
    let written = write_records(&cluster, &[1, 2, 3]);
    let asked = json!({ "memory_mb": 256, "node_tags": { "site": "s3" } });
    let capsule = cluster.client(1).capsule_with(&asked);
    cluster.client(3).output(&capsule, "echo kept > /root/file");

    cluster.lose(1);
    cluster.lose(2);
    serves_its_own(cluster.client(3), &capsule);
    refuses_changes(cluster.client(3), &capsule);

    recover(&mut cluster, 3, &[1, 2]);
    cluster.start(3);
    let survivor = cluster.client(3);
    assert_eq!(survivor.output(&capsule, "cat /root/file"), "kept");
    assert_eq!(survivor.record(&capsule)["status"], "running");
    assert_eq!(missing(survivor, &written), Vec::<String>::new());
    write_record(survivor);
    give_up(&cluster, 3, 2);

    for _ in 0..2 {
        cluster.admit(3);
    }
    let seen = wait_voters(cluster.client(3), 3);
    assert_eq!(seen["nodes"], 3, "{seen}");
    assert_eq!(missing(cluster.client(5), &written), Vec::<String>::new());
    assert_eq!(cluster.client(4).output(&capsule, "cat /root/file"), "kept");
    cluster.client(5).destroy(&capsule);
}

fn serves_its_own(world: &World, capsule: &str) {
    let begun = Instant::now();
    let over = wait_for(PAST_LEASES + Duration::from_secs(10), || {
        assert_eq!(world.output(capsule, "cat /root/file"), "kept");
        assert_eq!(world.listed(), [capsule]);
        (begun.elapsed() > PAST_LEASES).then_some(())
    });
    assert!(over.is_some());
}

fn refuses_changes(world: &World, capsule: &str) {
    let begun = Instant::now();
    let create = world.call("POST", "/v1/capsules", Some(&json!({ "memory_mb": 256 })));
    assert_eq!(
        create.refusal(),
        (503, "no_quorum".into()),
        "{}",
        create.message()
    );
    assert!(begun.elapsed() < REFUSAL_TIMEOUT, "{:?}", begun.elapsed());
    let begun = Instant::now();
    let destroy = world.about("DELETE", capsule, "", None);
    assert_eq!(
        destroy.refusal(),
        (503, "no_quorum".into()),
        "{}",
        destroy.message()
    );
    assert!(begun.elapsed() < REFUSAL_TIMEOUT, "{:?}", begun.elapsed());
    let begun = Instant::now();
    let read = world.call("GET", "/v1/capsules?consistency=linearizable", None);
    assert_eq!(
        read.refusal(),
        (503, "no_quorum".into()),
        "{}",
        read.message()
    );
    assert!(begun.elapsed() < REFUSAL_TIMEOUT, "{:?}", begun.elapsed());
    assert_eq!(world.output(capsule, "cat /root/file"), "kept");
}
