//! Capsules through the interface: their lives, what is told of them, and who may see them.

use std::time::Duration;

use http::Method;
use proto::ids::{NodeId, SandboxId};
use proto::units::Stamp;
use raft::command::{Command, Report};
use serde_json::json;

use crate::world::{Fate, KEY, OTHER_KEY, World, eventually, propose};

const UNKNOWN: &str = "cl-0000000000000000000000001";

#[tokio::test]
async fn a_created_capsule_runs_and_is_described_in_full() {
    let world = World::new().await;
    let body = json!({
        "template": "minimal-ubuntu", "vcpus": 2, "memory_mb": 1024, "timeout_sec": 5,
        "metadata": {"owner": "tests"}, "some_later_field": {"x": 1},
    });
    let made = world.post("/v1/capsules", body).await;
    let capsule = made.is(201).json();
    assert_eq!(capsule["status"], "running");
    assert_eq!(capsule["template"], "minimal-ubuntu", "as it was asked for");
    assert_eq!(
        (&capsule["vcpus"], &capsule["memory_mb"]),
        (&json!(2), &json!(1024))
    );
    assert_eq!(capsule["disk_size_mb"], 5120);
    assert_eq!(
        (&capsule["timeout_sec"], &capsule["timeout_action"]),
        (&json!(60), &json!("pause"))
    );
    assert_eq!(
        (&capsule["node"], &capsule["node_id"]),
        (&json!("here"), &json!("node-1"))
    );
    assert_eq!(capsule["created_at"], "2023-11-14T22:13:20Z");
    assert_eq!(capsule["started_at"], "2023-11-14T22:13:20Z");
    let labels = json!({
        "owner": "tests", "kernel_version": "6.1", "vmm_version": "fake 1",
        "agent_version": "0.6.7", "envd_version": "0.6.7",
    });
    assert_eq!(capsule["metadata"], labels);
    assert!(capsule.get("reason").is_none() && capsule.get("disk_used_mb").is_none());

    let id = capsule["id"].as_str().expect("an id");
    let id_bytes: SandboxId = id.parse().expect("an id");
    let active = Stamp(1_700_000_001_000);
    world.guests.active.lock().unwrap().insert(id_bytes, active);
    let shown = world
        .get(&format!("/v1/capsules/{id}"))
        .await
        .is(200)
        .json();
    assert_eq!(shown["disk_used_mb"], 4);
    assert_eq!(shown["last_active_at"], "2023-11-14T22:13:21Z");
}

#[tokio::test]
async fn an_ended_capsule_is_still_shown_but_no_longer_listed() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}");
    world.delete(&path).await.is(204);
    assert_eq!(world.get(&path).await.is(200).json()["status"], "stopped");
    world.delete(&path).await.is(204);
    assert_eq!(world.get("/v1/capsules").await.json(), json!([]));
    for (method, rest) in [(Method::POST, "ping"), (Method::GET, "processes")] {
        let path = format!("{path}/{rest}");
        world
            .ask(method, &path, KEY, "")
            .await
            .refused(409, "invalid_state");
    }
}

#[tokio::test]
async fn the_list_is_newest_first() {
    let world = World::new().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(world.capsule().await);
        // Two of them share their millisecond.
        world
            .clock
            .advance(Duration::from_millis(u64::from(ids.len() == 1)));
    }
    ids.reverse();
    let all = world.get("/api/v1/capsules").await.is(200).json();
    let listed: Vec<_> = all
        .as_array()
        .expect("a list")
        .iter()
        .map(|it| it["id"].clone())
        .collect();
    assert_eq!(listed, ids);
}

#[tokio::test]
async fn another_teams_capsule_does_not_exist() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}");
    for (method, rest, body) in [
        (Method::GET, "", ""),
        (Method::DELETE, "", ""),
        (Method::POST, "/ping", ""),
        (Method::GET, "/logs", ""),
        (Method::POST, "/exec", r#"{"cmd":"true"}"#),
        (Method::GET, "/processes", ""),
        (Method::DELETE, "/processes/1", ""),
        (Method::POST, "/files/read", r#"{"path":"/etc/passwd"}"#),
        (Method::POST, "/files/list", r#"{"path":"/"}"#),
        (Method::POST, "/files/mkdir", r#"{"path":"/x"}"#),
        (Method::POST, "/files/remove", r#"{"path":"/x"}"#),
        (Method::POST, "/files/write", ""),
        (Method::POST, "/files/stream/write", ""),
        (Method::POST, "/files/stream/read", r#"{"path":"/x"}"#),
    ] {
        let path = format!("{path}{rest}");
        let answer = world.ask(method, &path, OTHER_KEY, body).await;
        answer.refused(404, "not_found");
    }
    let listed = world.ask(Method::GET, "/v1/capsules", OTHER_KEY, "").await;
    assert_eq!(listed.json(), json!([]));
    assert_eq!(world.get(&path).await.json()["status"], "running");
}

#[tokio::test]
async fn a_slow_start_is_answered_as_starting() {
    let world = World::with_waits(Duration::from_millis(50), Duration::from_millis(50)).await;
    *world.guests.start.lock().unwrap() = Some(Fate::Hang);
    let made = world.post("/v1/capsules", json!({})).await;
    let capsule = made.is(202).json();
    assert_eq!(
        (&capsule["status"], &capsule["started_at"]),
        (&json!("starting"), &json!(null))
    );
    let exec = format!("/v1/capsules/{}/exec", capsule["id"].as_str().unwrap());
    world
        .post(&exec, json!({"cmd": "true"}))
        .await
        .refused(409, "invalid_state");
}

#[tokio::test]
async fn a_create_that_is_not_waited_for_is_answered_at_once() {
    let patience = Duration::from_secs(600);
    let world = World::with_waits(patience, patience).await;
    *world.guests.start.lock().unwrap() = Some(Fate::Hang);
    let made = world.post("/v1/capsules?wait=false", json!({})).await;
    assert_eq!(made.is(202).json()["status"], "starting");
}

#[tokio::test]
async fn a_failed_start_tells_why_and_leaves_a_record() {
    let world = World::new().await;
    *world.guests.start.lock().unwrap() = Some(Fate::Break("the kernel panicked"));
    let made = world.post("/v1/capsules", json!({})).await;
    made.refused(502, "agent_error");
    assert!(String::from_utf8_lossy(&made.body).contains("the kernel panicked"));
    let state = world.proposer.view().state();
    let id = state.sandboxes().next().expect("a record").id;
    let shown = world
        .get(&format!("/v1/capsules/{id}"))
        .await
        .is(200)
        .json();
    assert_eq!(
        (&shown["status"], &shown["reason"]),
        (&json!("error"), &json!("the kernel panicked"))
    );
    // Destroying what is broken succeeds silently.
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    assert_eq!(world.get("/v1/capsules").await.json(), json!([]));
}

#[tokio::test]
async fn a_slow_stop_is_answered_as_under_way() {
    let world = World::with_waits(Duration::from_secs(20), Duration::from_millis(50)).await;
    let id = world.capsule().await;
    *world.guests.stop.lock().unwrap() = Some(Fate::Hang);
    let path = format!("/v1/capsules/{id}");
    world.delete(&path).await.is(202);
    assert_eq!(world.get(&path).await.json()["status"], "stopping");
}

#[tokio::test]
async fn a_request_beyond_what_is_free_names_what_lacks_and_makes_nothing() {
    let world = World::new().await;
    let body = json!({"memory_mb": 1 << 20, "vcpus": 1});
    let answer = world.post("/v1/capsules", body).await;
    answer.refused(503, "no_hosts_available");
    assert!(String::from_utf8_lossy(&answer.body).contains("memory"));
    assert_eq!(world.proposer.view().state().sandboxes().count(), 0);
}

#[tokio::test]
async fn unknown_templates_and_capsules_are_not_found() {
    let world = World::new().await;
    let body = json!({"template": "no-such"});
    world
        .post("/v1/capsules", body)
        .await
        .refused(404, "not_found");
    world
        .get(&format!("/v1/capsules/{UNKNOWN}"))
        .await
        .refused(404, "not_found");
    world
        .delete(&format!("/v1/capsules/{UNKNOWN}"))
        .await
        .refused(404, "not_found");
    world
        .get(&format!("/v1/capsules/{UNKNOWN}/logs"))
        .await
        .refused(404, "not_found");
    assert_eq!(world.proposer.view().state().sandboxes().count(), 0);
}

#[tokio::test]
async fn a_ping_counts_as_activity() {
    let world = World::new().await;
    let id = world.capsule().await;
    world
        .post(&format!("/v1/capsules/{id}/ping"), json!(null))
        .await
        .is(204);
    let touched = world.guests.touched.lock().unwrap().clone();
    assert_eq!(touched, [id.parse().expect("an id")]);
}

#[tokio::test]
async fn a_create_whose_client_goes_away_goes_on() {
    let world = World::with_waits(Duration::from_secs(60), Duration::from_secs(1)).await;
    *world.guests.start.lock().unwrap() = Some(Fate::Hang);
    let starting = eventually(async || {
        let listed = world.get("/v1/capsules").await.json();
        (listed[0]["status"] == "starting").then_some(())
    });
    tokio::select! {
        answer = world.post("/v1/capsules", json!({})) => panic!("it was answered: {answer:?}"),
        () = starting => {}
    }
    let listed = world.get("/v1/capsules").await.json();
    assert_eq!(listed[0]["status"], "starting");
}

#[tokio::test]
async fn a_capsule_whose_guest_died_says_so_until_the_record_does() {
    let world = World::new().await;
    let id = world.capsule().await;
    world.cut_off(&id);
    let exec = format!("/v1/capsules/{id}/exec");
    let body = json!({"cmd": "true"});
    world
        .post(&exec, body.clone())
        .await
        .refused(502, "agent_error");

    let sandbox: SandboxId = id.parse().expect("an id");
    let epoch = world
        .proposer
        .view()
        .state()
        .sandbox(sandbox)
        .expect("a record")
        .epoch;
    let report = Report::Failed {
        reason: "its VMM ended".into(),
    };
    let (id, node) = (sandbox, NodeId(1));
    propose(
        &world.proposer,
        Command::ReportSandbox {
            id,
            epoch,
            node,
            report,
        },
    )
    .await;
    world.post(&exec, body).await.refused(409, "invalid_state");
}

#[tokio::test]
async fn the_console_log_is_served_from_its_end() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/logs");
    world.get(&path).await.refused(404, "not_found");
    *world.guests.console.lock().unwrap() = Some(b"one\ntwo\xff\nthree\n".to_vec());
    assert_eq!(
        world.get(&path).await.is(200).body,
        &b"one\ntwo\xff\nthree\n"[..]
    );
    let tail = world.get(&format!("{path}?tail=1")).await;
    assert_eq!(tail.is(200).body, "three\n");
    assert!(
        tail.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
    world
        .get(&format!("{path}?tail=-1"))
        .await
        .refused(400, "invalid_request");
}

#[tokio::test]
async fn nodes_show_what_is_taken() {
    let world = World::new().await;
    world.capsule().await;
    let nodes = world.get("/v1/nodes").await.is(200).json();
    let node = &nodes[0];
    assert_eq!(
        (&node["id"], &node["name"]),
        (&json!("node-1"), &json!("here"))
    );
    assert_eq!(
        (&node["leader"], &node["alive"], &node["role"]),
        (&json!(true), &json!(true), &json!("voter"))
    );
    assert_eq!(
        (&node["capsules"], &node["reserved"]["memory_mb"]),
        (&json!(1), &json!(512))
    );
}

#[tokio::test]
async fn templates_are_listed_by_kind() {
    let world = World::new().await;
    let all = world.get("/v1/snapshots").await.is(200).json();
    assert_eq!(
        (&all[0]["name"], &all[0]["type"]),
        (&json!("minimal"), &json!("base"))
    );
    assert_eq!(
        (&all[0]["platform"], &all[0]["protected"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(world.get("/v1/snapshots?type=base").await.json(), all);
    assert_eq!(
        world.get("/v1/snapshots?type=snapshot").await.json(),
        json!([])
    );
    world
        .get("/v1/snapshots?type=x")
        .await
        .refused(400, "invalid_request");
}

#[tokio::test]
async fn metrics_count_capsules_and_answers() {
    let world = World::new().await;
    let id = world.capsule().await;
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    world.get("/v1/none").await.is(404);
    let request = world.request(Method::GET, "/metrics");
    let metrics = world
        .send(request.body(crate::world::full("")).unwrap())
        .await;
    let text = String::from_utf8(metrics.is(200).body.to_vec()).expect("text");
    for line in [
        "wrenn_sandboxes{phase=\"stopped\"} 1",
        "wrenn_sandboxes{phase=\"running\"} 0",
        "wrenn_api_requests_total{class=\"2xx\"} 2",
        "wrenn_api_requests_total{class=\"4xx\"} 1",
    ] {
        assert!(
            text.lines().any(|it| it == line),
            "{line} is not in\n{text}"
        );
    }
    assert!(text.contains("process_resident_memory_bytes "));
}

#[tokio::test]
async fn a_long_run_keeps_the_capsule_active_to_its_end() {
    let world = World::new().await;
    let id = world.capsule().await;
    world.exec(&id, "true").await;
    // Once when the guest was asked for, once as it started, once at the end.
    let touches = eventually(async || {
        let count = world.guests.touched.lock().unwrap().len();
        (count >= 3).then_some(count)
    });
    assert!(touches.await >= 3);
}
