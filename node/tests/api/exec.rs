//! Commands and processes through the interface, run by the real agent.

use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proto::ids::SandboxId;
use raft::command::{Command, Report};
use serde_json::{Value, json};

use crate::world::{World, eventually, propose};

async fn post(world: &World, id: &str, body: Value) -> crate::world::Answer {
    world.post(&format!("/v1/capsules/{id}/exec"), body).await
}

async fn processes(world: &World, id: &str) -> Vec<Value> {
    let all = world.get(&format!("/v1/capsules/{id}/processes")).await;
    let all = all.is(200).json();
    all["processes"].as_array().expect("an array").clone()
}

#[tokio::test]
async fn both_streams_and_a_non_zero_exit_code_are_delivered() {
    let world = World::new().await;
    let id = world.capsule().await;
    let ran = world.exec(&id, "echo out; echo err >&2; exit 42").await;
    assert_eq!(
        (&ran["stdout"], &ran["stderr"]),
        (&json!("out\n"), &json!("err\n"))
    );
    assert_eq!(
        (&ran["exit_code"], &ran["encoding"]),
        (&json!(42), &json!("utf-8"))
    );
    assert_eq!(
        (&ran["sandbox_id"], &ran["cmd"]),
        (&json!(id), &json!("/bin/sh"))
    );
    assert!(ran["duration_ms"].is_u64());
    assert_eq!(world.exec(&id, "true").await["exit_code"], 0);
    assert_eq!(world.exec(&id, "kill -9 $$").await["exit_code"], -1);
}

#[tokio::test]
async fn directory_and_variables_reach_a_foreground_command() {
    let world = World::new().await;
    let id = world.capsule().await;
    let body = json!({
        "cmd": "/bin/sh", "args": ["-c", "pwd; echo $A"], "cwd": "/usr", "envs": {"A": "b c"},
    });
    let ran = post(&world, &id, body).await.is(200).json();
    assert_eq!(ran["stdout"], "/usr\nb c\n");
    let body = json!({"cmd": "pwd", "cwd": "/no/such/directory"});
    post(&world, &id, body)
        .await
        .refused(400, "invalid_request");
}

#[tokio::test]
async fn output_that_is_no_text_comes_in_base64() {
    let world = World::new().await;
    let id = world.capsule().await;
    let ran = world.exec(&id, r"printf '\377\000a'; echo text >&2").await;
    assert_eq!(ran["encoding"], "base64");
    let decode = |key: &str| STANDARD.decode(ran[key].as_str().unwrap()).expect("base64");
    assert_eq!(decode("stdout"), b"\xff\0a");
    assert_eq!(decode("stderr"), b"text\n");
}

/// Whether a process of the guest, which is this host, lives and is no zombie.
fn is_running(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

#[tokio::test]
async fn a_command_that_writes_more_than_is_kept_is_killed_with_what_it_started() {
    let world = World::new().await;
    let id = world.capsule().await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; yes", file.display());
    let body = json!({"cmd": "/bin/sh", "args": ["-c", script], "timeout_sec": 60});
    let answer = post(&world, &id, body).await;
    answer.refused(502, "agent_error");
    let told = answer.json();
    let message = told["error"]["message"].as_str().expect("words");
    assert!(message.contains("more than 16777216 bytes"), "{message}");
    assert_eq!(processes(&world, &id).await, Vec::<Value>::new());
    let child = std::fs::read_to_string(&file).expect("its pid");
    eventually(async || (!is_running(child.trim())).then_some(())).await;
}

#[tokio::test]
async fn a_command_past_its_deadline_is_killed_and_says_so() {
    let world = World::new().await;
    let id = world.capsule().await;
    let began = Instant::now();
    let body = json!({"cmd": "sleep", "args": ["1000"], "timeout_sec": 1});
    let answer = post(&world, &id, body).await;
    answer.refused(502, "agent_error");
    assert_eq!(answer.json()["error"]["detail"], "deadline_exceeded");
    assert!(
        began.elapsed().as_secs() < 11,
        "it took {:?}",
        began.elapsed()
    );
    eventually(async || processes(&world, &id).await.is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_command_that_does_not_exist_exits_127() {
    let world = World::new().await;
    let id = world.capsule().await;
    let body = json!({"cmd": "/no/such/program"});
    let answer = post(&world, &id, body).await;
    assert_eq!(answer.is(200).json()["exit_code"], 127);
}

#[tokio::test]
async fn a_background_process_is_listed_under_its_tag_until_it_is_killed() {
    let world = World::new().await;
    let id = world.capsule().await;
    let body = json!({
        "cmd": "/bin/sh", "args": ["-c", "test \"$A\" = b && exec sleep 1000"], "envs": {"A": "b"},
        "background": true, "tag": "mine",
    });
    let started = post(&world, &id, body).await.is(202).json();
    let pid = started["pid"].as_u64().expect("a pid");
    assert!(pid > 0);
    assert_eq!(
        (&started["tag"], &started["sandbox_id"]),
        (&json!("mine"), &json!(id))
    );
    let listed = processes(&world, &id).await;
    assert_eq!(
        (listed[0]["pid"].as_u64(), &listed[0]["tag"]),
        (Some(pid), &json!("mine"))
    );

    let path = format!("/v1/capsules/{id}/processes/mine?signal=SIGTERM");
    world.delete(&path).await.is(204);
    eventually(async || processes(&world, &id).await.is_empty().then_some(())).await;
    world.delete(&path).await.refused(404, "not_found");
}

#[tokio::test]
async fn a_process_is_killed_by_its_number_whatever_the_signal_is_called() {
    let world = World::new().await;
    let id = world.capsule().await;
    let body = json!({"cmd": "sleep", "args": ["1000"], "background": true});
    let started = post(&world, &id, body).await.is(202).json();
    assert!(started["tag"].as_str().unwrap().starts_with("proc-"));
    let path = format!(
        "/v1/capsules/{id}/processes/{}?signal=NONSENSE",
        started["pid"]
    );
    world.delete(&path).await.is(204);
    eventually(async || processes(&world, &id).await.is_empty().then_some(())).await;
    let path = format!("/v1/capsules/{id}/processes/999999");
    world.delete(&path).await.refused(404, "not_found");
}

#[tokio::test]
async fn an_idle_capsule_has_an_empty_list_of_processes() {
    let world = World::new().await;
    let id = world.capsule().await;
    let all = world.get(&format!("/v1/capsules/{id}/processes")).await;
    assert_eq!(all.is(200).json(), json!({"processes": []}));
}

#[tokio::test]
async fn bad_commands_are_refused_before_the_guest_sees_them() {
    let world = World::new().await;
    let id = world.capsule().await;
    for body in [
        json!({}),
        json!({"cmd": ""}),
        json!({"cmd": 1}),
        json!({"cmd": "a\0"}),
        json!({"cmd": "a", "args": "b"}),
        json!({"cmd": "a", "args": [1]}),
        json!({"cmd": "a", "envs": {"A": 1}}),
        json!({"cmd": "a", "envs": {"A=": "b"}}),
        json!({"cmd": "a", "timeout_sec": -1}),
        json!({"cmd": "a", "timeout_sec": 1.5}),
        json!({"cmd": "a", "timeout_sec": 1_000_000_000}),
        json!({"cmd": "a", "background": "yes"}),
        json!({"cmd": "a", "background": true, "tag": "\u{7}"}),
        json!([]),
        json!("text"),
    ] {
        let answer = post(&world, &id, body.clone()).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (400, "invalid_request"),
            "{body}"
        );
    }
}

/// A command that waits for ever, cut off once `then` is through. The answer.
async fn cut_off(world: &World, id: &str, then: impl AsyncFnOnce()) -> crate::world::Answer {
    let body = json!({"cmd": "sleep", "args": ["1000"], "timeout_sec": 600});
    let runs = async || {
        let listed = world.get(&format!("/v1/capsules/{id}/processes")).await;
        let listed = listed.is(200).json()["processes"].clone();
        listed
            .as_array()
            .is_some_and(|it| !it.is_empty())
            .then_some(())
    };
    let cut = async {
        eventually(runs).await;
        then().await;
        world.guests.gone.cancel();
    };
    tokio::join!(post(world, id, body), cut).0
}

#[tokio::test]
async fn a_command_that_a_pause_cuts_off_says_so() {
    let (elsewhere, _peers) = World::elsewhere().await;
    for world in [World::new().await, elsewhere] {
        let id = world.capsule().await;
        let path = format!("/v1/capsules/{id}/pause");
        let answer = cut_off(&world, &id, async || {
            world.post(&path, json!({})).await.is(200);
        });
        let answer = answer.await;
        answer.refused(409, "invalid_state");
        assert_eq!(answer.json()["error"]["detail"], "capsule_paused");
        let told = answer.json()["error"]["message"].to_string();
        assert!(
            told.contains("paused while the request was under way"),
            "{told}"
        );
    }
}

#[tokio::test]
async fn a_command_that_the_end_of_its_capsule_cuts_off_says_so() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}");
    let answer = cut_off(&world, &id, async || {
        world.delete(&path).await.is(204);
    });
    let answer = answer.await;
    answer.refused(409, "invalid_state");
    assert_eq!(answer.json()["error"]["detail"], "capsule_ended");
}

#[tokio::test]
async fn a_command_whose_guest_breaks_says_what_the_record_says_a_moment_later() {
    let world = World::new().await;
    let id = world.capsule().await;
    let report = async || {
        // After the connections broke, as it is where a guest breaks by itself.
        world.guests.gone.cancel();
        tokio::task::yield_now().await;
        let id: SandboxId = id.parse().unwrap();
        let known = world.proposer.view().state().sandbox(id).cloned().unwrap();
        let report = Report::Failed {
            reason: "its VMM was killed by signal 9".into(),
        };
        let (epoch, node) = (known.epoch, known.owner);
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
    };
    let answer = cut_off(&world, &id, report).await;
    answer.refused(502, "agent_error");
    let told = answer.json()["error"]["message"].to_string();
    assert!(
        told.contains("broke while") && told.contains("signal 9"),
        "{told}"
    );
}

#[tokio::test]
async fn a_command_whose_capsule_has_gone_on_elsewhere_says_where() {
    let world = World::new().await;
    let id = world.capsule().await;
    let answer = cut_off(&world, &id, async || {
        for act in ["pause", "resume"] {
            let path = format!("/v1/capsules/{id}/{act}");
            world.post(&path, json!({})).await.is(200);
        }
    });
    let answer = answer.await;
    answer.refused(503, "host_unavailable");
    assert_eq!(answer.json()["error"]["detail"], "capsule_moved");
    assert!(!answer.headers.contains_key("retry-after"));
}
