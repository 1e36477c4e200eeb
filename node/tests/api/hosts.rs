//! The routes of hosts: nodes and join tokens by the names that clients of other servers know.

use http::Method;
use proto::ids::{HostId, NodeId, NodeKey, TeamId};
use raft::command::{Command, Verdict};
use raft::state::Node;
use serde_json::{Value, json};

use crate::world::{KEY, OTHER_KEY, World, propose};

const NONE: Value = Value::Null;

fn host_of(node: NodeId) -> String {
    HostId::from(node).to_string()
}

/// Asks for a host and lets a node in by its token, as one that runs the join command does.
async fn joined(world: &World, wanted: Value, key: u8) -> (String, NodeId) {
    let made = world.admin(Method::POST, "/v1/hosts", wanted).await;
    let pending = made.is(201).json()["host"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let token = pending.parse::<HostId>().unwrap().token();
    let node = Node {
        name: format!("host{key}"),
        key: NodeKey([key; 32]),
        cluster_address: format!("10.0.0.{key}:7321"),
        ..Node::default()
    };
    propose(&world.proposer, Command::RedeemToken { token, node }).await;
    let path = format!("/v1/nodes/host{key}");
    let node = world.admin(Method::GET, &path, NONE).await.is(200).json();
    (pending, node["id"].as_str().unwrap().parse().unwrap())
}

#[tokio::test]
async fn a_host_is_pending_until_a_node_joins_by_its_token() {
    let world = World::new().await;
    let wanted = json!({"type": "regular", "provider": "metal", "availability_zone": "a"});
    let made = world.admin(Method::POST, "/v1/hosts", wanted).await;
    let made = made.is(201).json();
    let token = made["registration_token"].as_str().unwrap();
    assert_eq!(
        made["join_command"],
        format!("wrenn node start --join {token} --tag provider=metal --tag zone=a")
    );
    let host = &made["host"];
    assert_eq!(host["status"], "pending");
    assert_eq!(host["type"], "regular");
    assert_eq!(host["availability_zone"], "a");
    assert!(host["created_by"].as_str().unwrap().starts_with("key-"));
    assert_eq!(host["created_at"], "2023-11-14T22:13:20Z");

    let path = format!("/v1/hosts/{}", host["id"].as_str().unwrap());
    let shown = world.admin(Method::GET, &path, NONE).await.is(200).json();
    assert_eq!(
        (&shown["id"], &shown["status"]),
        (&host["id"], &json!("pending"))
    );
    world.get(&path).await.refused(404, "not_found");

    let (pending, node) = joined(&world, json!({}), 8).await;
    for name in [pending, host_of(node), node.to_string(), "host8".into()] {
        let shown = world.get(&format!("/v1/hosts/{name}")).await.is(200).json();
        assert_eq!(shown["id"], host_of(node), "{name}");
        assert_eq!(shown["status"], "online");
        assert_eq!(shown["node"], node.to_string());
        assert_eq!(shown["created_by"], host["created_by"]);
    }
    let listed = world.admin(Method::GET, "/v1/hosts", NONE).await.json();
    let status = |it: &Value| it["status"].as_str().unwrap().to_owned();
    let listed: Vec<_> = listed.as_array().unwrap().iter().map(status).collect();
    assert_eq!(listed, ["online", "online", "pending"]);
    let seen = world.get("/v1/hosts").await.json();
    assert_eq!(seen.as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_host_shows_what_it_offers_and_how_it_is() {
    let world = World::new().await;
    let host = world.get("/v1/hosts/here").await.is(200).json();
    assert_eq!(host["cpu_cores"], 64);
    assert_eq!(host["memory_mb"], 16_384);
    assert_eq!(host["disk_gb"], 97);
    assert_eq!(host["address"], "127.0.0.1:1");
    assert_eq!(host["last_heartbeat_at"], "2023-11-14T22:13:20Z");
    assert_eq!(host["updated_at"], host["last_heartbeat_at"]);
    world
        .admin(Method::POST, "/v1/nodes/here/drain", NONE)
        .await
        .is(200);
    let draining = world.get("/v1/hosts/here").await.json();
    assert_eq!(draining["status"], "draining");
    let verdict = Command::JudgeNode {
        node: NodeId(1),
        incarnation: 1,
        verdict: Verdict::Missing,
    };
    propose(&world.proposer, verdict).await;
    let away = world.get("/v1/hosts/here").await.json();
    assert_eq!(away["status"], "unreachable");
}

#[tokio::test]
async fn a_host_of_one_team_is_that_teams_and_no_others() {
    let world = World::new().await;
    let team = TeamId([1; 16]).to_string();
    let wanted = json!({"type": "byoc", "team_id": team});
    let made = world.admin(Method::POST, "/v1/hosts", wanted.clone()).await;
    let pending = made.is(201).json()["host"].clone();
    assert_eq!(pending["team_id"], team);
    let (_, node) = joined(&world, wanted, 9).await;
    for id in [pending["id"].as_str().unwrap(), &host_of(node)] {
        let path = format!("/v1/hosts/{id}");
        let theirs = world.ask(Method::GET, &path, KEY, "").await.is(200).json();
        assert_eq!(theirs["type"], "byoc");
        let others = world.ask(Method::GET, &path, OTHER_KEY, "").await;
        others.refused(404, "not_found");
    }
}

#[tokio::test]
async fn a_pending_host_gets_a_new_token_and_a_joined_one_has_its_key() {
    let world = World::new().await;
    let team = TeamId([1; 16]).to_string();
    let wanted = json!({"type": "byoc", "team_id": team});
    let old = world.admin(Method::POST, "/v1/hosts", wanted).await.json();
    let path = format!("/v1/hosts/{}", old["host"]["id"].as_str().unwrap());
    let renewed = world
        .admin(Method::POST, &format!("{path}/token"), NONE)
        .await;
    let renewed = renewed.is(201).json();
    assert_ne!(renewed["registration_token"], old["registration_token"]);
    assert_eq!(renewed["host"]["team_id"], team);
    let gone = world.admin(Method::GET, &path, NONE).await;
    gone.refused(404, "not_found");
    let tokens = world.admin(Method::GET, "/v1/tokens", NONE).await.json();
    let states = tokens.as_array().unwrap().iter();
    let mut states: Vec<_> = states.map(|it| it["state"].as_str().unwrap()).collect();
    states.sort_unstable();
    assert_eq!(states, ["open", "revoked"]);
    let joined = world
        .admin(Method::POST, "/v1/hosts/here/token", NONE)
        .await;
    joined.refused(409, "invalid_state");
}

#[tokio::test]
async fn a_host_with_capsules_goes_only_by_force_which_ends_them() {
    let world = World::new().await;
    let (pending, other) = joined(&world, json!({}), 8).await;
    let id = world.capsule().await;
    let preview = world
        .admin(Method::GET, "/v1/hosts/here/delete-preview", NONE)
        .await;
    let preview = preview.is(200).json();
    assert_eq!(preview["capsule_ids"], json!([id]));
    assert_eq!(preview["sandbox_ids"], json!([id]));
    assert_eq!(preview["host"]["id"], host_of(NodeId(1)));
    let kept = world.admin(Method::DELETE, "/v1/hosts/here", NONE).await;
    kept.refused(409, "host_has_sandboxes");
    assert_eq!(kept.json()["capsule_ids"], json!([id]));
    assert_eq!(kept.json()["sandbox_ids"], json!([id]));
    let running = world.get(&format!("/v1/capsules/{id}")).await.json();
    assert_eq!(running["status"], "running", "a refusal ends nothing");
    // What rests there counts as well, since nobody else has a copy of it.
    world
        .post(&format!("/v1/capsules/{id}/pause"), json!({}))
        .await
        .is(200);
    let kept = world.admin(Method::DELETE, "/v1/hosts/here", NONE).await;
    kept.refused(409, "host_has_sandboxes");

    {
        let mut standing = world.cluster.standing.lock().unwrap();
        standing.voters = [other].into();
    }
    let path = format!("/v1/hosts/{}?force=true", host_of(NodeId(1)));
    world.admin(Method::DELETE, &path, NONE).await.is(204);
    let ended = world.get(&format!("/v1/capsules/{id}")).await.json();
    assert_eq!(ended["status"], "stopped");
    world.get("/v1/hosts/here").await.refused(404, "not_found");
    let path = format!("/v1/hosts/{pending}?force=true");
    let last = world.admin(Method::DELETE, &path, NONE).await;
    last.refused(409, "invalid_state");
    let still = world.get(&format!("/v1/hosts/{pending}")).await.json();
    assert_eq!(still["status"], "online", "a refusal drains nothing");
}

#[tokio::test]
async fn a_host_that_cannot_be_reached_goes_by_force_and_its_capsules_start_nowhere_else() {
    let world = World::new().await;
    joined(&world, json!({}), 8).await;
    let made = world
        .post("/v1/capsules", json!({"on_host_loss": "restart"}))
        .await;
    let id = made.is(201).json()["id"].as_str().unwrap().to_owned();
    *world.guests.stop.lock().unwrap() = Some(crate::world::Fate::Hang);
    let verdict = Command::JudgeNode {
        node: NodeId(1),
        incarnation: 1,
        verdict: Verdict::Missing,
    };
    propose(&world.proposer, verdict).await;
    let path = "/v1/hosts/here?force=true";
    world.admin(Method::DELETE, path, NONE).await.is(204);
    let ended = world.get(&format!("/v1/capsules/{id}")).await.json();
    assert!(
        matches!(ended["status"].as_str(), Some("error" | "stopped")),
        "{ended}"
    );
}

#[tokio::test]
async fn a_pending_host_that_is_deleted_lets_nobody_in() {
    let world = World::new().await;
    let made = world
        .admin(Method::POST, "/v1/hosts", json!({}))
        .await
        .json();
    let id = made["host"]["id"].as_str().unwrap();
    let path = format!("/v1/hosts/{id}");
    let preview = world
        .admin(Method::GET, &format!("{path}/delete-preview"), NONE)
        .await;
    assert_eq!(preview.is(200).json()["capsule_ids"], json!([]));
    world.admin(Method::DELETE, &path, NONE).await.is(204);
    world
        .admin(Method::DELETE, &path, NONE)
        .await
        .refused(404, "not_found");
    let token = id.parse::<HostId>().unwrap().token();
    let node = Node::default();
    let refused = world.proposer.propose(Command::RedeemToken { token, node });
    refused.await.expect_err("withdrawn");
}

#[tokio::test]
async fn tags_of_a_host_are_tags_of_its_node() {
    let world = World::new().await;
    let tags = "/v1/hosts/here/tags";
    for tag in ["zone=a", "gpu", "disk=ssd", "zone=b"] {
        let added = world.admin(Method::POST, tags, json!({"tag": tag})).await;
        added.is(204);
    }
    let listed = world.get(tags).await.is(200).json();
    assert_eq!(listed, json!(["disk=ssd", "gpu", "zone=b"]));
    let node = world.get("/v1/nodes/here").await.json();
    assert_eq!(
        node["tags"],
        json!({"disk": "ssd", "gpu": "true", "zone": "b"})
    );
    let host = world.get("/v1/hosts/here").await.json();
    assert_eq!(host["availability_zone"], "b");
    for gone in ["zone=a", "disk=ssd", "gpu", "nothing"] {
        let path = format!("{tags}/{}", gone.replace('=', "%3D"));
        world.admin(Method::DELETE, &path, NONE).await.is(204);
    }
    let listed = world.get(tags).await.json();
    assert_eq!(listed, json!(["zone=b"]), "another value is another tag");
    for bad in [
        json!({}),
        json!({"tag": ""}),
        json!({"tag": "a b"}),
        json!({"tag": "a="}),
    ] {
        let refused = world.admin(Method::POST, tags, bad).await;
        refused.refused(400, "invalid_request");
    }
    let made = world
        .admin(Method::POST, "/v1/hosts", json!({}))
        .await
        .json();
    let pending = format!("/v1/hosts/{}/tags", made["host"]["id"].as_str().unwrap());
    assert_eq!(
        world.admin(Method::GET, &pending, NONE).await.json(),
        json!([])
    );
    let early = world
        .admin(Method::POST, &pending, json!({"tag": "a"}))
        .await;
    early.refused(409, "invalid_state");
}

#[tokio::test]
async fn what_is_no_host_is_told_so_and_only_an_administrator_changes_one() {
    let world = World::new().await;
    let wrong = world.get("/v1/hosts/host-1").await;
    wrong.refused(400, "invalid_request");
    let nobody = world.get("/v1/hosts/host-00000000000000000000000zz").await;
    nobody.refused(404, "not_found");
    for bad in [
        json!({"type": "byoc"}),
        json!({"type": "regular", "team_id": TeamId([1; 16]).to_string()}),
        json!({"type": "byoc", "team_id": "us"}),
        json!({"type": "metal"}),
        json!({"availability_zone": "a b"}),
        json!({"name": "x"}),
    ] {
        let refused = world.admin(Method::POST, "/v1/hosts", bad).await;
        refused.refused(400, "invalid_request");
    }
    for (method, path) in [
        (Method::POST, "/v1/hosts"),
        (Method::DELETE, "/v1/hosts/here"),
        (Method::GET, "/v1/hosts/here/delete-preview"),
        (Method::POST, "/v1/hosts/here/token"),
        (Method::POST, "/v1/hosts/here/tags"),
        (Method::DELETE, "/v1/hosts/here/tags/a"),
    ] {
        let refused = world.ask(method, path, KEY, "{}").await;
        refused.refused(403, "forbidden");
    }
    for path in [
        "register",
        "auth/refresh",
        "sandbox-events",
        "here/heartbeat",
    ] {
        let path = format!("/v1/hosts/{path}");
        let later = world.admin(Method::POST, &path, json!({})).await;
        later.refused(501, "not_implemented");
        assert!(String::from_utf8_lossy(&later.body).contains("wrenn node start --join"));
    }
}
