//! The world of several daemons itself: what other tests take for granted.

use serde_json::json;
use wrenn_cluster_tests::cluster::{ClusterWorld, wait_voters};

/// One test, since worlds of several daemons take turns anyway and forming one takes longest.
#[test]
fn nodes_form_one_cluster_lose_each_other_and_find_each_other_again() {
    let mut cluster = ClusterWorld::new(3);
    let leader = cluster.wait_leader();
    let others: Vec<u16> = (1..=3).filter(|number| *number != leader).collect();
    wait_voters(cluster.client(others[0]), 3);

    cluster.isolate(leader);
    let next = cluster.wait_leader_among(&others);
    assert_ne!(next, leader);
    let alone = cluster
        .client(leader)
        .call("GET", "/v1/capsules?consistency=linearizable", None);
    assert_eq!(alone.refusal(), (503, "no_quorum".into()));
    assert_eq!(
        cluster
            .client(leader)
            .call("GET", "/v1/capsules", None)
            .status,
        200
    );
    cluster.heal();
    cluster.wait_members(3);

    cluster.pause(next);
    let third = others
        .iter()
        .copied()
        .find(|number| *number != next)
        .expect("a third");
    let _leader = cluster.wait_leader_among(&[leader, third]);
    cluster.resume(next);
    cluster.wait_members(3);

    // A power cut, and everybody comes back in the wrong order.
    for number in 1..=3 {
        cluster.kill(number);
    }
    cluster.start_all(&[3, 2, 1]);
    cluster.wait_members(3);
    let made = cluster
        .client(3)
        .call("POST", "/v1/tokens", Some(&json!({})));
    assert_eq!(made.status, 201, "{}", made.json());
    cluster.stop(2);
}
