//! Pausing and resuming through the interface: what is answered when it works, takes long or fails,
//! and what it refuses.

use std::time::Duration;

use futures::FutureExt as _;
use http::Method;
use proto::ids::{NodeId, SandboxId, SnapshotId};
use raft::command::{Command, Report, StopCause};
use raft::state::{Phase, Sandbox, State};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::world::{Answer, Fate, HERE, OTHER_KEY, World, eventually, propose};

const UNKNOWN: &str = "cl-0000000000000000000000001";
/// A wait that a test can sit out.
const SHORT: Duration = Duration::from_millis(50);
/// A wait that nothing here takes.
const LONG: Duration = Duration::from_secs(20);

async fn act(world: &World, id: &str, act: &str) -> Answer {
    world
        .post(&format!("/v1/capsules/{id}/{act}"), json!({}))
        .await
}

async fn shown(world: &World, id: &str) -> Value {
    world
        .get(&format!("/v1/capsules/{id}"))
        .await
        .is(200)
        .json()
}

/// What an error answer says.
fn said(answer: &Answer) -> String {
    let message = answer.json()["error"]["message"].clone();
    message.as_str().unwrap().to_owned()
}

/// Has the node that runs a sandbox tell something of it.
async fn tell(world: &World, id: &str, report: Report) {
    let id: SandboxId = id.parse().unwrap();
    let epoch = world.proposer.view().state().sandbox(id).unwrap().epoch;
    let node = HERE;
    let told = Command::ReportSandbox {
        id,
        epoch,
        node,
        report,
    };
    propose(&world.proposer, told).await;
}

fn snapshot(world: &World, id: &str) -> SnapshotId {
    let state = world.proposer.view().state();
    state
        .sandbox(id.parse().unwrap())
        .unwrap()
        .snapshot
        .unwrap()
}

#[tokio::test]
async fn a_paused_capsule_takes_no_room_and_goes_on_when_it_is_resumed() {
    let world = World::new().await;
    let id = world.capsule().await;
    assert_eq!(world.exec(&id, "echo on").await["stdout"], "on\n");
    let paused = act(&world, &id, "pause").await.is(200).json();
    assert_eq!(
        (&paused["status"], &paused["replicas"]),
        (&json!("paused"), &json!(1))
    );
    let nodes = world.get("/v1/nodes").await.json();
    assert_eq!(nodes[0]["reserved"]["capsules"], 0, "{nodes}");
    assert_eq!(
        world.get("/v1/capsules").await.json()[0]["status"],
        "paused"
    );

    let resumed = act(&world, &id, "resume").await.is(200).json();
    assert_eq!(resumed["status"], "running");
    assert_eq!(resumed["started_at"], paused["started_at"]);
    assert_eq!(world.exec(&id, "echo on").await["stdout"], "on\n");
}

#[tokio::test]
async fn replicas_are_the_nodes_that_hold_what_a_capsule_goes_back_to() {
    let world = World::new().await;
    let id = world.capsule().await;
    assert_eq!(shown(&world, &id).await.get("replicas"), None);
    act(&world, &id, "pause").await.is(200);
    let other = world.join("other", 8).await;
    let hold = |node: NodeId, holds| Command::HoldSnapshot {
        id: snapshot(&world, &id),
        node,
        holds,
    };
    propose(&world.proposer, hold(other, true)).await;
    assert_eq!(shown(&world, &id).await["replicas"], 2);
    propose(&world.proposer, hold(HERE, false)).await;
    assert_eq!(shown(&world, &id).await["replicas"], 1);
}

#[tokio::test]
async fn only_what_runs_is_paused_and_only_what_is_paused_is_resumed() {
    let world = World::new().await;
    let id = world.capsule().await;
    act(&world, &id, "resume")
        .await
        .refused(409, "invalid_state");
    act(&world, &id, "pause").await.is(200);
    let again = act(&world, &id, "pause").await;
    again.refused(409, "invalid_state");
    assert!(said(&again).contains("is paused"), "{}", said(&again));
    let path = format!("/v1/capsules/{id}/exec");
    let ran = world.post(&path, json!({"cmd": "true"})).await;
    ran.refused(409, "invalid_state");
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    for asked in ["pause", "resume"] {
        act(&world, &id, asked).await.refused(409, "invalid_state");
        act(&world, UNKNOWN, asked).await.refused(404, "not_found");
    }
}

#[tokio::test]
async fn what_another_node_has_acknowledged_is_not_refused_here() {
    let world = World::new().await;
    let id = world.capsule().await;
    happens_elsewhere(&world, &id, |sandbox| {
        let (id, epoch, cause) = (sandbox.id, sandbox.epoch, StopCause::Asked);
        let then_on = None;
        let asked = Command::PauseSandbox {
            id,
            epoch,
            cause,
            then_on,
        };
        (asked, Phase::Paused)
    });
    act(&world, &id, "resume").await.is(200);
    act(&world, &id, "pause").await.is(200);
    happens_elsewhere(&world, &id, |sandbox| {
        let snapshot = sandbox.snapshot.unwrap();
        let (id, to, hints) = (sandbox.id, None, Vec::new());
        let asked = Command::ResumeSandbox {
            id,
            snapshot,
            to,
            hints,
        };
        (asked, Phase::Running)
    });
    assert_eq!(world.exec(&id, "echo on").await["stdout"], "on\n");
}

/// Something that this node hears of once it catches up with the cluster.
fn happens_elsewhere(world: &World, id: &str, what: impl FnOnce(&Sandbox) -> (Command, Phase)) {
    let id: SandboxId = id.parse().unwrap();
    let proposer = world.proposer.clone();
    let (asked, then) = what(proposer.view().state().sandbox(id).unwrap());
    let happens = async move {
        propose(&proposer, asked).await;
        let is_so = |state: &State| (state.sandbox(id)?.phase == then).then_some(());
        let deadline = Instant::now() + LONG;
        proposer.view().wait_for(deadline, is_so).await.unwrap();
    };
    *world.cluster.unheard.lock().unwrap() = Some(happens.boxed());
}

#[tokio::test]
async fn a_capsule_of_another_team_is_not_there_to_be_paused() {
    let world = World::new().await;
    let id = world.capsule().await;
    for asked in ["pause", "resume"] {
        let path = format!("/v1/capsules/{id}/{asked}");
        let answer = world.ask(Method::POST, &path, OTHER_KEY, "").await;
        answer.refused(404, "not_found");
    }
    assert_eq!(shown(&world, &id).await["status"], "running");
}

#[tokio::test]
async fn what_takes_long_is_answered_as_under_way_and_not_begun_twice() {
    let world = World::with_waits(LONG, SHORT).await;
    let id = world.capsule().await;
    *world.guests.pause.lock().unwrap() = Some(Fate::Hang);
    for _ in 0..2 {
        let under_way = act(&world, &id, "pause").await.is(202).json();
        assert_eq!(under_way["status"], "pausing");
    }
    act(&world, &id, "resume")
        .await
        .refused(409, "invalid_state");
    *world.guests.pause.lock().unwrap() = None;
    // The played reconciler looks again at the next change.
    world.join("other", 8).await;
    eventually(async || (shown(&world, &id).await["status"] == "paused").then_some(())).await;

    *world.guests.start.lock().unwrap() = Some(Fate::Hang);
    let epoch = || {
        let state = world.proposer.view().state();
        state.sandbox(id.parse().unwrap()).unwrap().epoch
    };
    let under_way = act(&world, &id, "resume").await.is(202).json();
    assert_eq!(under_way["status"], "resuming");
    let given = epoch();
    act(&world, &id, "resume").await.is(202);
    assert_eq!(epoch(), given, "it was given out twice");
}

#[tokio::test]
async fn a_pause_that_fails_says_why_and_the_capsule_runs_on() {
    let world = World::new().await;
    let id = world.capsule().await;
    *world.guests.pause.lock().unwrap() = Some(Fate::Break("the disk is full"));
    let failed = act(&world, &id, "pause").await;
    failed.refused(502, "agent_error");
    assert!(said(&failed).contains("runs on: the disk is full"));
    assert_eq!(shown(&world, &id).await["status"], "running");
    assert_eq!(world.exec(&id, "echo on").await["stdout"], "on\n");
    *world.guests.pause.lock().unwrap() = None;
    let paused = act(&world, &id, "pause").await.is(200).json();
    assert_eq!(paused.get("reason"), None, "{paused}");
}

/// It rests as it did before: not what was asked for, and what it did since is lost.
#[tokio::test]
async fn a_capsule_whose_guest_is_lost_while_it_is_paused_again_is_not_called_paused() {
    let world = World::new().await;
    let id = world.capsule().await;
    act(&world, &id, "pause").await.is(200);
    act(&world, &id, "resume").await.is(200);
    let before = snapshot(&world, &id);
    *world.guests.pause.lock().unwrap() = Some(Fate::Hang);
    let lose = async {
        eventually(async || (shown(&world, &id).await["status"] == "pausing").then_some(())).await;
        let reason = "the hypervisor is gone".into();
        tell(&world, &id, Report::Failed { reason }).await;
    };
    let (failed, ()) = tokio::join!(act(&world, &id, "pause"), lose);
    failed.refused(502, "agent_error");
    assert!(said(&failed).contains("the hypervisor is gone"));
    let rests = shown(&world, &id).await;
    assert_eq!(rests["status"], "paused");
    assert!(rests["reason"].as_str().unwrap().contains("last paused"));
    assert_eq!(snapshot(&world, &id), before);
    act(&world, &id, "resume").await.is(200);
}

#[tokio::test]
async fn a_resume_that_fails_says_why_and_the_capsule_stays_paused() {
    let world = World::new().await;
    let id = world.capsule().await;
    act(&world, &id, "pause").await.is(200);
    *world.guests.start.lock().unwrap() = Some(Fate::Break("no network slot"));
    let failed = act(&world, &id, "resume").await;
    failed.refused(502, "agent_error");
    assert!(said(&failed).contains("stays paused: on here: no network slot"));
    assert_eq!(shown(&world, &id).await["status"], "paused");
    *world.guests.start.lock().unwrap() = None;
    let resumed = act(&world, &id, "resume").await.is(200).json();
    assert_eq!(resumed.get("reason"), None, "{resumed}");
}

#[tokio::test]
async fn a_paused_capsule_that_nobody_can_take_says_what_lacks_and_stays() {
    let world = World::new().await;
    let id = world.capsule().await;
    act(&world, &id, "pause").await.is(200);
    let holds = Command::HoldSnapshot {
        id: snapshot(&world, &id),
        node: HERE,
        holds: false,
    };
    propose(&world.proposer, holds).await;
    let refused = act(&world, &id, "resume").await;
    refused.refused(503, "no_hosts_available");
    assert!(said(&refused).contains("snapshot"), "{}", said(&refused));
    assert_eq!(shown(&world, &id).await["status"], "paused");
}

#[tokio::test]
async fn a_paused_capsule_is_destroyed_at_once_with_what_was_kept_of_it() {
    let world = World::new().await;
    let id = world.capsule().await;
    act(&world, &id, "pause").await.is(200);
    *world.guests.stop.lock().unwrap() = Some(Fate::Hang);
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    assert_eq!(shown(&world, &id).await["status"], "stopped");
    assert_eq!(world.proposer.view().state().snapshots().count(), 0);
}

#[tokio::test]
async fn what_a_capsule_was_paused_as_is_shown_with_sizes_times_and_holders() {
    let world = World::new().await;
    let id = world.capsule().await;
    let paused = act(&world, &id, "pause").await.is(200).json();
    let rest = &paused["snapshot"];
    for number in ["memory_bytes", "disk_bytes", "new_bytes"] {
        assert!(rest[number].is_u64(), "{rest}");
    }
    for step in ["quiesce", "save", "store"] {
        assert!(rest["pause_ms"][step].is_u64(), "{rest}");
    }
    assert_eq!(rest["holders"].as_array().map(Vec::len), Some(1), "{rest}");
    assert!(rest["sealed_at"].is_string(), "{rest}");
    assert_eq!(shown(&world, &id).await["snapshot"], *rest);
}

#[tokio::test]
async fn a_capsule_is_paused_after_its_timeout_unless_it_asks_to_end_then() {
    let world = World::new().await;
    let created = world.post("/v1/capsules", json!({"timeout_sec": 60})).await;
    assert_eq!(created.json()["timeout_action"], "pause");
    let asked = json!({"timeout_sec": 60, "timeout_action": "destroy"});
    let created = world.post("/v1/capsules", asked).await;
    assert_eq!(created.json()["timeout_action"], "destroy");
    let asked = json!({"timeout_action": "explode"});
    let refused = world.post("/v1/capsules", asked).await;
    refused.refused(400, "invalid_request");
}

#[tokio::test]
async fn a_capsule_moves_to_another_node_in_one_call() {
    let world = World::new().await;
    let id = world.capsule().await;
    let goal = json!({"node": "nowhere"});
    let path = format!("/v1/capsules/{id}/migrate");
    world.post(&path, goal).await.refused(404, "not_found");
    let here = shown(&world, &id).await["node"].clone();
    let there_already = world.post(&path, json!({"node": here})).await;
    assert_eq!(there_already.is(200).json()["status"], "running");

    // It does not offer what the guest needs: the capsule is not even paused.
    world.join("other", 8).await;
    let refused = world.post(&path, json!({"node": "other"})).await;
    refused.refused(503, "no_hosts_available");
    assert_eq!(shown(&world, &id).await["status"], "running");
    act(&world, &id, "pause").await.is(200);
    let refused = world.post(&path, json!({"node": "other"})).await;
    refused.refused(409, "invalid_state");
    let refused = world
        .post(&format!("/v1/capsules/{id}/resume?node=other"), json!({}))
        .await;
    refused.refused(503, "no_hosts_available");
    assert_eq!(shown(&world, &id).await["status"], "paused");
}
