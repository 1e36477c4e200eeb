//! Snapshots with a name and forks through the interface: what is made, what is refused, and whose
//! they are.

use std::time::Duration;

use http::Method;
use proto::ids::SandboxId;
use serde_json::{Value, json};

use crate::world::{Fate, KEY, OTHER_KEY, World};

const UNKNOWN: &str = "cl-0000000000000000000000001";

async fn take(world: &World, id: &str, name: &str) -> crate::world::Answer {
    let body = json!({ "sandbox_id": id, "name": name });
    world.post("/v1/snapshots", body).await
}

async fn status(world: &World, id: &str) -> Value {
    let path = format!("/v1/capsules/{id}");
    world.get(&path).await.is(200).json()["status"].clone()
}

#[tokio::test]
async fn a_running_capsule_is_kept_under_a_name_and_goes_on() {
    let world = World::new().await;
    let id = world.capsule().await;
    let made = take(&world, &id, "mine").await;
    let made = made.is(201).json();
    assert_eq!(
        (&made["name"], &made["type"], &made["vcpus"]),
        (&json!("mine"), &json!("snapshot"), &json!(1))
    );
    assert_eq!(made["memory_mb"], 512);
    assert_eq!(made["size_bytes"], 64 << 20);
    assert_eq!(
        (&made["platform"], &made["protected"]),
        (&json!(false), &json!(false))
    );
    assert_eq!(status(&world, &id).await, "running");
    let listed = world.get("/v1/snapshots?type=snapshot").await.json();
    assert_eq!(listed, json!([made]));
    let all = world.get("/v1/snapshots").await.json();
    assert_eq!(all.as_array().map(Vec::len), Some(2), "{all}");
    world.delete("/v1/snapshots/mine").await.is(204);
    world
        .delete("/v1/snapshots/mine")
        .await
        .refused(404, "not_found");
}

#[tokio::test]
async fn a_paused_capsule_is_named_and_stays_paused() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/pause");
    world.post(&path, json!({})).await.is(200);
    let body = json!({ "sandbox_id": id });
    let made = world.post("/v1/snapshots", body).await.is(201).json();
    let name = made["name"].as_str().expect("a name");
    let digits = name.strip_prefix("template-").expect("ours");
    assert!(digits.len() == 8 && digits.bytes().all(|it| it.is_ascii_hexdigit()));
    assert_eq!(status(&world, &id).await, "paused");
}

#[tokio::test]
async fn what_cannot_be_named_is_refused_by_its_own_code() {
    let world = World::new().await;
    let id = world.capsule().await;
    take(&world, &id, "a b")
        .await
        .refused(400, "invalid_request");
    take(&world, &id, "").await.refused(400, "invalid_request");
    take(&world, "cl-1", "x")
        .await
        .refused(400, "invalid_request");
    let nameless = world.post("/v1/snapshots", json!({ "name": "x" })).await;
    nameless.refused(400, "invalid_request");
    take(&world, UNKNOWN, "x").await.refused(404, "not_found");
    for name in ["minimal", "minimal-ubuntu", "minimal-arch"] {
        take(&world, &id, name).await.refused(403, "forbidden");
        let path = format!("/v1/snapshots/{name}");
        world.delete(&path).await.refused(403, "forbidden");
    }
    world
        .delete("/v1/snapshots/a%20b")
        .await
        .refused(400, "invalid_request");
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    take(&world, &id, "x").await.refused(409, "invalid_state");
}

#[tokio::test]
async fn a_name_is_replaced_only_where_that_was_asked_for() {
    let world = World::new().await;
    let id = world.capsule().await;
    let first = take(&world, &id, "mine").await.is(201).json();
    take(&world, &id, "mine").await.refused(409, "conflict");
    let body = json!({ "sandbox_id": id, "name": "mine", "metadata": { "n": "2" } });
    let second = world.post("/v1/snapshots?overwrite=true", body).await;
    let second = second.is(201).json();
    assert_ne!(first, second);
    let listed = world.get("/v1/snapshots?type=snapshot").await.json();
    assert_eq!(listed, json!([second]));
}

#[tokio::test]
async fn a_capsule_that_cannot_be_sealed_runs_on_and_nothing_is_named() {
    let world = World::new().await;
    let id = world.capsule().await;
    *world.guests.pause.lock().unwrap() = Some(Fate::Break("the disk is full"));
    let refused = take(&world, &id, "mine").await;
    refused.refused(502, "agent_error");
    assert!(String::from_utf8_lossy(&refused.body).contains("the disk is full"));
    assert_eq!(status(&world, &id).await, "running");
    let listed = world.get("/v1/snapshots?type=snapshot").await.json();
    assert_eq!(listed, json!([]));
}

#[tokio::test]
async fn while_a_snapshot_is_taken_the_capsule_says_so() {
    let short = Duration::from_millis(50);
    let world = World::with_waits(short, short).await;
    let id = world.capsule().await;
    *world.guests.pause.lock().unwrap() = Some(Fate::Hang);
    let answer = take(&world, &id, "mine").await;
    answer.refused(503, "host_unavailable");
    assert_eq!(status(&world, &id).await, "snapshotting");
    let path = format!("/v1/capsules/{id}/pause");
    world
        .post(&path, json!({}))
        .await
        .refused(409, "invalid_state");
    take(&world, &id, "x").await.refused(409, "invalid_state");
}

#[tokio::test]
async fn a_capsule_of_a_snapshot_has_its_shape() {
    let world = World::new().await;
    let body = json!({ "vcpus": 2, "memory_mb": 1024 });
    let made = world.post("/v1/capsules", body).await.is(201).json();
    let id = made["id"].as_str().expect("an id");
    take(&world, id, "mine").await.is(201);
    let body = json!({ "template": "mine", "vcpus": 1, "memory_mb": 256 });
    let fork = world.post("/v1/capsules", body).await.is(201).json();
    assert_eq!(
        (&fork["template"], &fork["vcpus"], &fork["memory_mb"]),
        (&json!("mine"), &json!(2), &json!(1024))
    );
    let state = world.proposer.view().state();
    let fork: SandboxId = fork["id"].as_str().unwrap().parse().unwrap();
    assert!(state.sandbox(fork).unwrap().origin.is_some());
}

#[tokio::test]
async fn a_capsule_whose_snapshot_does_not_start_is_in_error_for_a_reason() {
    let world = World::new().await;
    let id = world.capsule().await;
    take(&world, &id, "mine").await.is(201);
    *world.guests.start.lock().unwrap() = Some(Fate::Break("its memory is damaged"));
    let refused = world
        .post("/v1/capsules", json!({ "template": "mine" }))
        .await;
    refused.refused(502, "agent_error");
    assert!(String::from_utf8_lossy(&refused.body).contains("its memory is damaged"));
}

#[tokio::test]
async fn another_teams_snapshots_do_not_exist() {
    let world = World::new().await;
    let id = world.capsule().await;
    take(&world, &id, "mine").await.is(201);
    let ask = async |method, path: &str, body: &str| world.ask(method, path, OTHER_KEY, body).await;
    let listed = ask(Method::GET, "/v1/snapshots?type=snapshot", "").await;
    assert_eq!(listed.json(), json!([]));
    let gone = ask(Method::DELETE, "/v1/snapshots/mine", "").await;
    gone.refused(404, "not_found");
    let body = json!({ "template": "mine" }).to_string();
    let made = ask(Method::POST, "/v1/capsules", &body).await;
    made.refused(404, "not_found");
    let body = json!({ "sandbox_id": id, "name": "mine" }).to_string();
    let taken = ask(Method::POST, "/v1/snapshots", &body).await;
    taken.refused(404, "not_found");
    let path = format!("/v1/capsules/{id}/fork");
    let forked = ask(Method::POST, &path, "").await;
    forked.refused(404, "not_found");
    // The name is free for them.
    let own = world
        .ask(Method::POST, "/v1/capsules", OTHER_KEY, "{}")
        .await;
    let own = own.is(201).json();
    let body = json!({ "sandbox_id": own["id"], "name": "mine" }).to_string();
    let taken = ask(Method::POST, "/v1/snapshots", &body).await;
    taken.is(201);
    assert_eq!(
        world.get("/v1/snapshots?type=snapshot").await.json()[0]["name"],
        "mine"
    );
}

#[tokio::test]
async fn forks_run_beside_the_capsule_they_come_from() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/fork");
    let forks = world
        .post(&path, json!({ "count": 3 }))
        .await
        .is(201)
        .json();
    let forks = forks.as_array().expect("a list").clone();
    assert_eq!(forks.len(), 3);
    for fork in &forks {
        assert_eq!(fork["status"], "running");
        assert_ne!(fork["id"], json!(id));
    }
    assert_eq!(status(&world, &id).await, "running");
    let one = world.ask(Method::POST, &path, KEY, "").await.is(201).json();
    assert_eq!(one.as_array().map(Vec::len), Some(1), "{one}");
    for count in [0, -1, 17, i64::MAX] {
        let refused = world.post(&path, json!({ "count": count })).await;
        refused.refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn forks_without_room_are_named_and_the_others_stay() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/fork");
    let mut seen = Vec::new();
    loop {
        let answer = world.post(&path, json!({ "count": 16 })).await;
        if answer.status != 201 {
            answer.refused(503, "no_hosts_available");
            break;
        }
        seen.extend(answer.json().as_array().unwrap().clone());
    }
    let word = |fork: &Value| fork["status"].as_str().unwrap().to_owned();
    let (run, broke): (Vec<_>, Vec<_>) = seen.iter().partition(|it| word(it) == "running");
    assert!(!run.is_empty() && !broke.is_empty(), "{seen:?}");
    for fork in broke {
        assert_eq!(fork["status"], "error");
        let why = fork["reason"].as_str().expect("a reason");
        assert!(why.contains("no host can take this capsule"), "{why}");
    }
}

#[tokio::test]
async fn a_request_that_comes_again_to_another_node_makes_nothing_new() {
    let world = World::new().await;
    let nodes = [world.address, world.another_node().await];
    let again = async |path: &str, key: &str, body: Value| {
        let mut answers = Vec::new();
        for node in nodes.into_iter().chain(nodes) {
            let answer = world.post_again(node, path, (key, KEY), body.clone());
            answers.push(answer.await.is(201).json());
        }
        for other in &answers[1..] {
            assert_eq!(other, &answers[0], "{path}");
        }
        answers.swap_remove(0)
    };
    let id = again("/v1/capsules", "k", json!({})).await["id"].clone();
    let id = id.as_str().expect("an id").to_owned();
    let forks = again(
        &format!("/v1/capsules/{id}/fork"),
        "k",
        json!({ "count": 2 }),
    )
    .await;
    assert_eq!(forks.as_array().map(Vec::len), Some(2));
    let nameless = again("/v1/snapshots", "k", json!({ "sandbox_id": id })).await;
    let named = again(
        "/v1/snapshots",
        "k",
        json!({ "sandbox_id": id, "name": "n" }),
    )
    .await;
    assert_ne!(nameless["name"], named["name"]);
    let listed = world.get("/v1/capsules").await.json();
    assert_eq!(listed.as_array().map(Vec::len), Some(3), "{listed}");

    // What the capsule has come to meanwhile makes no difference.
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    again("/v1/snapshots", "k", json!({ "sandbox_id": id })).await;
    let ended = again("/v1/capsules", "k", json!({})).await;
    assert_eq!(
        (&ended["id"], &ended["status"]),
        (&json!(id), &json!("stopped"))
    );
}

#[tokio::test]
async fn a_key_stands_for_one_request_of_one_api_key() {
    let world = World::new().await;
    let post = async |path: &str, keys: (&str, &str), body: Value| {
        world.post_again(world.address, path, keys, body).await
    };
    let first = post("/v1/capsules", ("k", KEY), json!({})).await;
    let id = first.is(201).json()["id"].as_str().unwrap().to_owned();
    let other = post("/v1/capsules", ("k", KEY), json!({ "vcpus": 2 })).await;
    other.refused(409, "conflict");
    let of_another = post("/v1/capsules", ("k", OTHER_KEY), json!({})).await;
    assert_ne!(of_another.is(201).json()["id"], json!(id));
    let next = post("/v1/capsules", ("l", KEY), json!({})).await;
    assert_ne!(next.is(201).json()["id"], json!(id));

    let fork = format!("/v1/capsules/{id}/fork");
    post(&fork, ("k", KEY), json!({ "count": 2 })).await.is(201);
    for count in [1, 3] {
        let other = post(&fork, ("k", KEY), json!({ "count": count })).await;
        other.refused(409, "conflict");
    }
    let bad = post("/v1/capsules", ("a b", KEY), json!({})).await;
    bad.refused(400, "invalid_request");
}

#[tokio::test]
async fn a_checkpoint_that_failed_is_tried_anew_when_its_request_comes_again() {
    let world = World::new().await;
    let id = world.capsule().await;
    let body = json!({ "sandbox_id": id, "name": "n" });
    let take = async || {
        let keys = ("k", KEY);
        world
            .post_again(world.address, "/v1/snapshots", keys, body.clone())
            .await
    };
    *world.guests.pause.lock().unwrap() = Some(Fate::Break("the disk is full"));
    take().await.refused(502, "agent_error");
    *world.guests.pause.lock().unwrap() = None;
    let made = take().await.is(201).json();
    assert_eq!(take().await.is(201).json(), made);
}
