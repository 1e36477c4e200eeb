//! Every route that talks to a guest, asked of a node that does not own the sandbox.

use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use proto::units::Stamp;
use raft::command::{Command, Verdict};
use serde_json::json;
use wrenn_node::relay::{Transfer, Waiting};

use crate::world::{Fate, HERE, KEY, World, eventually, full};

#[tokio::test]
async fn commands_run_through_another_node_with_one_connection_and_one_question() {
    let (world, peers) = World::elsewhere().await;
    let id = world.capsule().await;
    for _ in 0..5 {
        let done = world.exec(&id, "echo out; echo err >&2; exit 3").await;
        assert_eq!(done["stdout"], "out\n");
        assert_eq!(done["stderr"], "err\n");
        assert_eq!(done["exit_code"], 3);
    }
    assert_eq!(peers.opened(), 1, "connections are used again");
    assert_eq!(peers.asked(), 1, "the guest's access is asked for once");

    let path = format!("/v1/capsules/{id}/exec");
    let sleep = json!({"cmd": "sleep", "args": ["600"], "background": true, "tag": "nap"});
    world.post(&path, sleep).await.is(202);
    let processes = format!("/v1/capsules/{id}/processes");
    let listed = world.get(&processes).await.is(200).json();
    assert_eq!(listed["processes"][0]["tag"], "nap");
    world.delete(&format!("{processes}/nap")).await.is(204);
    eventually(async || {
        let left = world.get(&processes).await.json();
        left["processes"].as_array()?.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn files_go_and_come_through_another_node_whole() {
    let (world, _) = World::elsewhere().await;
    let id = world.capsule().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("deep/file").display().to_string();
    let contents: Vec<u8> = (0..3_000_000_u32).map(|it| (it % 251) as u8).collect();
    let fields: [(&str, &[u8]); 2] = [("path", path.as_bytes()), ("file", &contents)];
    for route in ["write", "stream/write"] {
        let route = format!("/v1/capsules/{id}/files/{route}");
        world.form(&route, &fields).await.is(204);
        assert!(std::fs::read(&path).expect("there") == contents);
    }
    // The file before its path: it waits on the node that was asked.
    let swapped = [fields[1], fields[0]];
    let route = format!("/v1/capsules/{id}/files/write");
    world.form(&route, &swapped).await.is(204);

    let route = format!("/v1/capsules/{id}/files/read");
    let read = world.post(&route, json!({"path": path})).await;
    assert!(read.is(200).body == contents);
    let missing = json!({"path": "/no/such/file"});
    world.post(&route, missing).await.refused(404, "not_found");
    let shown = json!({"path": dir.path().join("deep")});
    let listed = world
        .post(&format!("/v1/capsules/{id}/files/list"), shown)
        .await;
    assert_eq!(listed.is(200).json()["entries"][0]["size"], 3_000_000);
}

#[tokio::test]
async fn a_download_whose_guest_dies_breaks_off() {
    let (world, _) = World::elsewhere().await;
    let id = world.capsule().await;
    let large = tempfile::NamedTempFile::new().expect("a file");
    large.as_file().set_len(1 << 30).expect("a GiB of nothing");
    let path = large.path().display().to_string();
    let route = format!("/v1/capsules/{id}/files/read");
    let request = world
        .request(Method::POST, &route)
        .header("x-api-key", KEY)
        .body(full(json!({"path": path}).to_string()))
        .unwrap();
    let mut body = world.open(request).await.into_body();
    let first = body.frame().await.expect("a frame").expect("data");
    assert!(first.into_data().is_ok_and(|data: Bytes| !data.is_empty()));

    world.guests.gone.cancel();
    let broken = eventually(async || match body.frame().await {
        Some(Ok(_)) => None,
        ended => Some(ended.is_some_and(|it| it.is_err())),
    });
    assert!(broken.await, "it ended as if it were whole");
}

#[tokio::test]
async fn what_only_the_owner_knows_is_shown_by_every_node() {
    let (world, peers) = World::elsewhere().await;
    let id = world.capsule().await;
    let used = Stamp(1_700_000_123_000);
    let parsed = id.parse().expect("an id");
    world.guests.active.lock().unwrap().insert(parsed, used);
    *world.guests.console.lock().unwrap() = Some(b"one\ntwo\n".to_vec());

    let transfer = Transfer {
        bytes_done: 5,
        bytes_total: 9,
        sources: 2,
    };
    *world.guests.transfer.lock().unwrap() = Some(transfer);
    *world.guests.waiting.lock().unwrap() = Some(Waiting {
        nodes: vec!["b".into()],
        why: "b is away".into(),
        since: used,
        until: Stamp(used.0 + 1000),
    });
    let shown = world
        .get(&format!("/v1/capsules/{id}"))
        .await
        .is(200)
        .json();
    let expected = json!({ "bytes_done": 5, "bytes_total": 9, "sources": 2 });
    assert_eq!(shown["transfer"], expected);
    let expected = json!({
        "nodes": ["b"],
        "reason": "b is away",
        "since": "2023-11-14T22:15:23Z",
        "until": "2023-11-14T22:15:24Z",
    });
    assert_eq!(shown["waits_for"], expected);
    *world.guests.transfer.lock().unwrap() = None;
    let shown = world
        .get(&format!("/v1/capsules/{id}"))
        .await
        .is(200)
        .json();
    assert!(shown.get("transfer").is_none());
    assert_eq!(shown["last_active_at"], "2023-11-14T22:15:23Z");
    assert_eq!(shown["disk_used_mb"], 4);
    let logs = world.get(&format!("/v1/capsules/{id}/logs?tail=1")).await;
    assert_eq!(logs.is(200).body, "two\n");

    for _ in 0..3 {
        world.capsule().await;
    }
    let before = peers.asked();
    let listed = world.get("/v1/capsules").await.is(200).json();
    assert_eq!(listed.as_array().map(Vec::len), Some(4));
    assert_eq!(listed[3]["last_active_at"], "2023-11-14T22:15:23Z");
    assert_eq!(peers.asked() - before, 1, "one question an owner");
}

#[tokio::test]
async fn a_ping_has_reached_the_owner_when_it_is_answered() {
    let (world, peers) = World::elsewhere().await;
    let id = world.capsule().await;
    let ping = format!("/v1/capsules/{id}/ping");
    world.ask(Method::POST, &ping, KEY, "").await.is(204);
    let touched = world.guests.touched.lock().unwrap().clone();
    assert_eq!(touched, [id.parse().expect("an id")]);
    peers.cut(HERE);
    let refused = world.ask(Method::POST, &ping, KEY, "").await;
    refused.refused(503, "host_unavailable");
}

#[tokio::test]
async fn a_host_that_cannot_be_reached_is_named_and_the_client_told_to_come_again() {
    let (world, peers) = World::elsewhere().await;
    let id = world.capsule().await;
    world.exec(&id, "true").await;
    let other = world.capsule().await;
    peers.cut(HERE);
    let exec = json!({"cmd": "true"});
    let refused = world
        .post(&format!("/v1/capsules/{other}/exec"), exec.clone())
        .await;
    refused.refused(503, "host_unavailable");
    assert_eq!(refused.json()["error"]["detail"], "host_unreachable");
    assert_eq!(refused.headers["retry-after"], "5");

    let state = world.proposer.view().state();
    let judge = Command::JudgeNode {
        node: HERE,
        incarnation: state.node(HERE).expect("a node").incarnation,
        verdict: Verdict::Missing,
    };
    crate::world::propose(&world.proposer, judge).await;
    let refused = world.post(&format!("/v1/capsules/{id}/exec"), exec).await;
    refused.refused(503, "host_unavailable");
    let told = refused.json()["error"]["message"].to_string();
    assert!(
        told.contains("here") && told.contains("since 2023-"),
        "{told}"
    );
    // What every node knows is shown all the same.
    world.get(&format!("/v1/capsules/{id}")).await.is(200);
    let listed = world.get("/v1/capsules").await.is(200).json();
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_not_taken_for_a_host_that_is_away() {
    let (world, _) = World::elsewhere().await;
    let id = world.capsule().await;
    world.cut_off(&id);
    let exec = json!({"cmd": "true"});
    let refused = world
        .post(&format!("/v1/capsules/{id}/exec"), exec.clone())
        .await;
    refused.refused(502, "agent_error");

    *world.guests.start.lock().unwrap() = Some(Fate::Hang);
    let listed = eventually(async || {
        let listed = world.get("/v1/capsules").await.json();
        let is_starting = listed[0]["status"] == "starting";
        is_starting.then(|| listed[0]["id"].as_str().expect("an id").to_owned())
    });
    let starting = tokio::select! {
        answer = world.post("/v1/capsules", json!({})) => panic!("its guest never comes up: {answer:?}"),
        starting = listed => starting,
    };
    let refused = world
        .post(&format!("/v1/capsules/{starting}/exec"), exec)
        .await;
    refused.refused(409, "invalid_state");
}
