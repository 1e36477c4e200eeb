//! The routes about nodes, join tokens and the cluster itself.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http::Method;
use proto::ids::NodeId;
use raft::command::{Command, Verdict};
use serde_json::{Value, json};
use wrenn_node::cluster::liveness::{Hint, Report};

use crate::world::{Fate, KEY, OTHER_KEY, World, propose};

const NONE: Value = Value::Null;

fn heard(node: NodeId, age_secs: u64) -> Hint {
    Hint {
        report: Report {
            node,
            running: 3,
            applied: 42,
            ..Report::default()
        },
        age: Duration::from_secs(age_secs),
    }
}

async fn judge(world: &World, node: NodeId, verdict: Verdict) {
    let known = world.proposer.view().state().node(node).cloned();
    let command = Command::JudgeNode {
        node,
        incarnation: known.expect("a node").incarnation,
        verdict,
    };
    propose(&world.proposer, command).await;
}

#[tokio::test]
async fn a_token_is_told_once_and_its_secret_never_again() {
    let world = World::new().await;
    let wanted = json!({"ttl_sec": 60, "uses": 2});
    let made = world.admin(Method::POST, "/v1/tokens", wanted).await;
    let made = made.is(201).json();
    let token = made["token"].as_str().unwrap();
    assert_eq!(
        made["join_command"],
        format!("wrenn node start --join {token}")
    );
    assert_eq!(made["role"], "member");
    assert_eq!(made["uses_left"], 2);
    assert_eq!(made["expires_at"], "2023-11-14T22:14:20Z");

    let listed = world.admin(Method::GET, "/v1/tokens", NONE).await;
    assert!(!String::from_utf8_lossy(&listed.body).contains("secret-of"));
    assert_eq!(listed.json()[0]["state"], "open");

    world.clock.advance(Duration::from_secs(61));
    let expired = world.admin(Method::GET, "/v1/tokens", NONE).await;
    assert_eq!(expired.json()[0]["state"], "expired");

    let path = format!("/v1/tokens/{}", made["id"].as_str().unwrap());
    for _ in 0..2 {
        world.admin(Method::DELETE, &path, NONE).await.is(204);
    }
    let revoked = world.admin(Method::GET, "/v1/tokens", NONE).await;
    assert_eq!(revoked.json()[0]["state"], "revoked");
    let unknown = "/v1/tokens/tok-0000000000000000000000001";
    let unknown = world.admin(Method::DELETE, unknown, NONE).await;
    unknown.refused(404, "not_found");
}

#[tokio::test]
async fn terms_that_no_token_can_have_are_refused() {
    let world = World::new().await;
    let team = "team-0000000000000000000000001";
    for bad in [
        json!({"role": "voter"}),
        json!({"role": "host"}),
        json!({"role": "member", "team": team}),
        json!({"role": "host", "team": "us"}),
        json!({"ttl_sec": 0}),
        json!({"ttl_sec": u64::MAX}),
        json!({"uses": 0}),
        json!({"uses": 1001}),
        json!({"tll_sec": 5}),
    ] {
        let answer = world.admin(Method::POST, "/v1/tokens", bad).await;
        answer.refused(400, "invalid_request");
    }
    let host = json!({"role": "host", "team": team});
    let host = world.admin(Method::POST, "/v1/tokens", host).await;
    assert_eq!(host.is(201).json()["team"], team);
}

#[tokio::test]
async fn only_an_administrator_changes_the_cluster() {
    let world = World::new().await;
    for (method, path) in [
        (Method::POST, "/v1/tokens"),
        (Method::GET, "/v1/tokens"),
        (Method::DELETE, "/v1/tokens/tok-0000000000000000000000001"),
        (Method::POST, "/v1/nodes/here/cordon"),
        (Method::POST, "/v1/nodes/here/uncordon"),
        (Method::POST, "/v1/nodes/here/drain"),
        (Method::PUT, "/v1/nodes/here/tags"),
        (Method::DELETE, "/v1/nodes/here"),
        (Method::PATCH, "/v1/cluster"),
    ] {
        let answer = world.ask(method.clone(), path, KEY, "{}").await;
        answer.refused(403, "forbidden");
        let stranger = world.ask(method, path, "wrn_x", "{}").await;
        stranger.refused(401, "unauthorized");
    }
}

#[tokio::test]
async fn a_node_shows_its_part_and_what_was_heard_of_it() {
    let world = World::new().await;
    let other = world.join("other", 8).await;
    {
        let mut standing = world.cluster.standing.lock().unwrap();
        standing.learners.insert(other);
    }
    world.cluster.loads.lock().unwrap().push(heard(other, 2));
    let shown = world.get("/v1/nodes").await;
    assert_eq!(shown.headers["x-wrenn-node"], "node-1");
    let nodes = shown.json();
    let by_name = |name: &str| {
        let mut all = nodes.as_array().unwrap().iter();
        all.find(|node| node["name"] == name).unwrap().clone()
    };
    let (here, other_node) = (by_name("here"), by_name("other"));
    assert_eq!(
        (&here["role"], &here["leader"]),
        (&json!("voter"), &json!(true))
    );
    assert_eq!(other_node["role"], "learner");
    assert_eq!(other_node["address"], "10.0.0.8:7321");
    assert_eq!(other_node["state"], "alive");
    assert_eq!(other_node["last_seen"], "2023-11-14T22:13:18Z");
    assert_eq!(other_node["load"]["applied_index"], 42);

    *world.cluster.loads.lock().unwrap() = vec![heard(other, 5)];
    let suspect = world.get(&format!("/v1/nodes/{other}")).await.json();
    assert_eq!(
        (&suspect["state"], &suspect["alive"]),
        (&json!("suspect"), &json!(false))
    );
    judge(&world, other, Verdict::Missing).await;
    let missing = world.get("/v1/nodes/other").await.json();
    assert_eq!(missing["state"], "missing");
    assert_eq!(missing["since"], "2023-11-14T22:13:20Z");
    world
        .get("/v1/nodes/nobody")
        .await
        .refused(404, "not_found");
}

#[tokio::test]
async fn a_host_of_one_team_is_shown_to_that_team_alone() {
    let world = World::new().await;
    let team = proto::ids::TeamId([1; 16]);
    let wanted = json!({"role": "host", "team": team.to_string()});
    let made = world.admin(Method::POST, "/v1/tokens", wanted).await;
    let token = made.json()["id"].as_str().unwrap().parse().unwrap();
    let node = raft::state::Node {
        name: "byoc".into(),
        key: proto::ids::NodeKey([9; 32]),
        ..raft::state::Node::default()
    };
    propose(&world.proposer, Command::RedeemToken { token, node }).await;

    let shown = world.ask(Method::GET, "/v1/nodes/byoc", KEY, "").await;
    assert_eq!(shown.is(200).json()["role"], "host");
    let hidden = world
        .ask(Method::GET, "/v1/nodes/byoc", OTHER_KEY, "")
        .await;
    hidden.refused(404, "not_found");
    world
        .admin(Method::GET, "/v1/nodes/byoc", NONE)
        .await
        .is(200);
}

#[tokio::test]
async fn a_cordoned_node_takes_nothing_and_the_refusal_says_so() {
    let world = World::new().await;
    let cordoned = world
        .admin(Method::POST, "/v1/nodes/here/cordon", NONE)
        .await;
    assert_eq!(cordoned.is(200).json()["cordoned"], true);
    let refused = world.post("/v1/capsules", json!({})).await;
    refused.refused(503, "no_hosts_available");
    assert!(String::from_utf8_lossy(&refused.body).contains("1 host is cordoned"));

    world
        .admin(Method::POST, "/v1/nodes/node-1/uncordon", NONE)
        .await
        .is(200);
    world.capsule().await;
}

#[tokio::test]
async fn a_capsule_goes_where_its_request_says() {
    let world = World::new().await;
    let zone = json!({"node_tags": {"zone": "a"}});
    let refused = world.post("/v1/capsules", zone.clone()).await;
    refused.refused(503, "no_hosts_available");
    assert!(String::from_utf8_lossy(&refused.body).contains("without the tags"));
    let tags = json!({"zone": "a", "disk": "ssd"});
    let tagged = world
        .admin(Method::PUT, "/v1/nodes/here/tags", tags.clone())
        .await;
    assert_eq!(tagged.is(200).json()["tags"], tags);
    let made = world.post("/v1/capsules", zone).await;
    assert_eq!(made.is(201).json()["on_host_loss"], "wait");

    world.join("other", 8).await;
    let pinned = json!({"on_node": "here", "on_host_loss": "restart"});
    let made = world.post("/v1/capsules", pinned).await;
    assert_eq!(made.is(201).json()["node"], "here");
    assert_eq!(made.json()["on_host_loss"], "restart");
    let pinned = world
        .post("/v1/capsules", json!({"on_node": "other"}))
        .await;
    pinned.refused(503, "no_hosts_available");
    let unknown = world
        .post("/v1/capsules", json!({"on_node": "nobody"}))
        .await;
    unknown.refused(404, "not_found");
    let bad = world
        .admin(Method::PUT, "/v1/nodes/here/tags", json!({"a b": "c"}))
        .await;
    bad.refused(400, "invalid_request");
}

#[tokio::test]
async fn a_drain_waits_for_capsules_or_stops_them() {
    let world = World::new().await;
    let id = world.capsule().await;
    let patient = json!({"timeout_sec": 0});
    let waiting = world
        .admin(Method::POST, "/v1/nodes/here/drain", patient)
        .await;
    let left = waiting.is(202).json();
    assert_eq!(left["drained"], false);
    assert_eq!(left["capsules"], json!([id]));
    assert_eq!(left["node"]["draining"], true);

    let stop = json!({"stop_capsules": true});
    let done = world
        .admin(Method::POST, "/v1/nodes/here/drain", stop)
        .await;
    assert_eq!(done.is(200).json()["drained"], true);
    let uncordoned = world
        .admin(Method::POST, "/v1/nodes/here/uncordon", NONE)
        .await;
    assert_eq!(uncordoned.json()["draining"], false);
    let long = json!({"timeout_sec": 601});
    let long = world
        .admin(Method::POST, "/v1/nodes/here/drain", long)
        .await;
    long.refused(400, "invalid_request");
}

#[tokio::test]
async fn a_node_with_capsules_goes_only_when_it_is_declared_dead() {
    let world = World::new().await;
    let last = world.admin(Method::DELETE, "/v1/nodes/here", NONE).await;
    last.refused(409, "invalid_state");
    let other = world.join("other", 8).await;
    let id = world.capsule().await;

    let refused = world.admin(Method::DELETE, "/v1/nodes/here", NONE).await;
    refused.refused(409, "invalid_state");
    assert!(String::from_utf8_lossy(&refused.body).contains("1 capsule"));
    judge(&world, NodeId(1), Verdict::Missing).await;
    let gone = world.get(&format!("/v1/capsules/{id}")).await.json();
    assert_eq!(gone["status"], "missing");
    assert_eq!(gone["missing_since"], "2023-11-14T22:13:20Z");
    let dead = "/v1/nodes/here?force=true";
    world.admin(Method::DELETE, dead, NONE).await.is(204);
    let ended = world.get(&format!("/v1/capsules/{id}")).await.json();
    assert_eq!(ended["status"], "error");
    assert!(ended["missing_since"].is_null());

    // By id, doing so again succeeds; a name means nothing any more.
    world
        .admin(Method::DELETE, "/v1/nodes/node-1", NONE)
        .await
        .is(204);
    let name = world.admin(Method::DELETE, "/v1/nodes/here", NONE).await;
    name.refused(404, "not_found");
    let last = format!("/v1/nodes/{other}");
    world
        .admin(Method::DELETE, &last, NONE)
        .await
        .refused(409, "invalid_state");
}

#[tokio::test]
async fn settings_change_one_by_one_and_only_to_what_works() {
    let world = World::new().await;
    let cluster = world.get("/v1/cluster").await.json();
    assert_eq!(cluster["term"], 7);
    assert_eq!(cluster["leader"], "node-1");
    assert_eq!(cluster["quorum"], true);
    assert_eq!(cluster["voters"], json!(["node-1"]));

    let wanted = json!({"max_voters": 3});
    let changed = world.admin(Method::PATCH, "/v1/cluster", wanted).await;
    let settings = changed.is(200).json()["settings"].clone();
    assert_eq!(settings["max_voters"], 3);
    assert_eq!(
        settings["lease_ttl_sec"],
        cluster["settings"]["lease_ttl_sec"]
    );
    for bad in [
        json!({"max_voters": 2}),
        json!({"lease_ttl_sec": 1}),
        json!({"lease_ttl_sec": u64::MAX}),
        json!({"voters": 3}),
    ] {
        let answer = world.admin(Method::PATCH, "/v1/cluster", bad).await;
        answer.refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_linearizable_read_needs_a_quorum_and_a_local_one_does_not() {
    let world = World::new().await;
    let id = world.capsule().await;
    world.cluster.quorum.store(false, Ordering::Relaxed);
    for path in [
        "/v1/capsules".to_owned(),
        format!("/v1/capsules/{id}"),
        "/v1/nodes".into(),
        "/v1/nodes/here".into(),
        "/v1/snapshots".into(),
        "/v1/cluster".into(),
    ] {
        let local = world.get(&path).await;
        let applied = local.is(200).headers["x-wrenn-applied-index"].to_str();
        assert!(applied.unwrap().parse::<u64>().unwrap() > 0, "{path}");
        let newest = world.get(&format!("{path}?consistency=linearizable")).await;
        newest.refused(503, "no_quorum");
        let typo = world.get(&format!("{path}?consistency=strong")).await;
        typo.refused(400, "invalid_request");
    }
    world.cluster.quorum.store(true, Ordering::Relaxed);
    world
        .get("/v1/capsules?consistency=linearizable")
        .await
        .is(200);
}

#[tokio::test]
async fn a_create_on_a_missing_host_is_shown_as_missing_while_it_starts() {
    let world = World::with_waits(Duration::ZERO, Duration::ZERO).await;
    *world.guests.start.lock().unwrap() = Some(Fate::Hang);
    let made = world.post("/v1/capsules", json!({})).await.is(202).json();
    judge(&world, NodeId(1), Verdict::Missing).await;
    let listed = world.get("/v1/capsules").await.json();
    assert_eq!(listed[0]["id"], made["id"]);
    assert_eq!(listed[0]["status"], "missing");
    let refused = world.post("/v1/capsules", json!({})).await;
    refused.refused(503, "no_hosts_available");
    assert!(String::from_utf8_lossy(&refused.body).contains("not reachable"));
}
