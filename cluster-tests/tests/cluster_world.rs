//! The world of several daemons itself: what other tests take for granted.

use serde_json::{Value, json};
use wrenn_cluster_tests::cluster::{ClusterWorld, wait_voters};

/// Things that are made through each node in turn: a node that is behind is so by chance, and is met in a few.
const CREATES: u32 = 12;

/// One test, since worlds of several daemons take turns anyway and forming one takes longest.
#[test]
fn nodes_form_one_cluster_lose_each_other_and_find_each_other_again() {
    let mut cluster = ClusterWorld::new(3);
    let leader = cluster.wait_leader();
    let others: Vec<u16> = (1..=3).filter(|number| *number != leader).collect();
    wait_voters(cluster.client(others[0]), 3);
    what_one_node_made_every_node_knows(&cluster);

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

/// A client that is answered by one node may ask any other next, and nobody waits in between.
fn what_one_node_made_every_node_knows(cluster: &ClusterWorld) {
    for (maker, round) in (1..=3).cycle().zip(0..CREATES) {
        let made = |path: &str, body: Value| {
            let made = cluster.client(maker).call("POST", path, Some(&body));
            assert_eq!(made.status, 201, "{path}: {}", made.json());
            made.json()
        };
        let team = made("/v1/teams", json!({ "name": format!("team {round}") }));
        let team = team["id"].as_str().expect("an id").to_owned();
        for other in 1..=3 {
            let path = format!("/v1/teams/{team}");
            let shown = cluster.client(other).call("GET", &path, None);
            assert_eq!(shown.status, 200, "node {other}, made by {maker}");
        }
        let key = made("/v1/api-keys", json!({ "team_id": team }));
        let key = key["key"].as_str().expect("a key").to_owned();
        for other in 1..=3 {
            let sent = [("X-API-Key", key.as_str())];
            let me = cluster.client(other).send("GET", "/v1/me", &sent, None);
            let me = me.expect("an answer");
            assert_eq!(me.status, 200, "node {other}, made by {maker}");
            assert_eq!(me.json()["team"]["id"], team);
        }
    }
}
