//! Events through the interface: what is told, and how a client that lost its stream goes on.

use http::Method;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use raft::command::{Command, Verdict};
use serde_json::{Value, json};

use crate::world::{ADMIN_KEY, Fate, KEY, OTHER_KEY, PATIENCE, World, full};

/// A stream of events, as a client reads it.
struct Stream {
    body: Incoming,
    text: String,
}

/// One message of it.
#[derive(Debug)]
struct Message {
    id: Option<String>,
    data: Value,
}

impl Stream {
    async fn open(world: &World, last: Option<&str>) -> Self {
        let mut request = world
            .request(Method::GET, "/v1/events/stream")
            .header("x-api-key", KEY);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = world.open(request.body(full("")).unwrap()).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            body: response.into_body(),
            text: String::new(),
        }
    }

    /// What comes up to the next empty line; `None` at the end.
    async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let rest = self.text.split_off(end + 2);
                return Some(std::mem::replace(&mut self.text, rest));
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame());
            let frame = frame.await.expect("in time")?.ok()?;
            let data = frame.into_data().unwrap();
            self.text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }

    async fn next(&mut self) -> Message {
        let block = self.block().await.expect("a message");
        let field = |name: &str| {
            let lines = block.lines();
            lines
                .filter_map(|it| it.strip_prefix(name))
                .next()
                .map(str::to_owned)
        };
        let data: Value = serde_json::from_str(&field("data: ").expect("data")).unwrap();
        assert_eq!(field("event: ").as_deref(), data["event"].as_str());
        Message {
            id: field("id: "),
            data,
        }
    }

    /// The next messages, up to the one of this kind.
    async fn until(&mut self, kind: &str) -> Message {
        loop {
            let message = self.next().await;
            if message.data["event"] == kind {
                return message;
            }
        }
    }
}

#[tokio::test]
async fn a_stream_begins_with_connected_and_tells_a_life_in_order() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, None).await;
    assert_eq!(stream.next().await.data["event"], "connected");
    let id = world.capsule().await;
    let created = stream.until("capsule.create").await.data;
    assert_eq!(created["outcome"], "success");
    assert_eq!(created["resource"], json!({"id": id, "type": "capsule"}));
    assert_eq!(created["actor"]["type"], "system");
    assert_eq!(
        (&created["sandbox"]["id"], &created["sandbox"]["status"]),
        (&json!(id), &json!("running"))
    );
    assert!(created["timestamp"].as_str().unwrap().ends_with('Z'));
    for act in ["pause", "resume"] {
        world
            .post(&format!("/v1/capsules/{id}/{act}"), json!({}))
            .await
            .is(200);
    }
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    let mut told = Vec::new();
    while told.last().map(String::as_str) != Some("capsule.destroy") {
        let message = stream.next().await.data;
        if message["event"] != "capsule.state.changed" {
            told.push(message["event"].as_str().unwrap().to_owned());
        } else {
            assert!(message.get("outcome").is_none(), "{message}");
            assert!(message["metadata"]["to"].is_string(), "{message}");
        }
    }
    assert_eq!(told, ["capsule.pause", "capsule.resume", "capsule.destroy"]);
}

#[tokio::test]
async fn a_failed_start_is_told_with_its_reason() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, None).await;
    *world.guests.start.lock().unwrap() = Some(Fate::Break("no kernel"));
    world
        .post("/v1/capsules", json!({}))
        .await
        .refused(502, "agent_error");
    let failed = stream.until("capsule.create").await.data;
    assert_eq!(
        (&failed["outcome"], &failed["error"]),
        (&json!("error"), &json!("no kernel"))
    );
    assert_eq!(failed["metadata"]["reason"], "cleanup_after_create_error");
}

#[tokio::test]
async fn a_client_that_lost_its_stream_goes_on_at_another_node_from_what_it_saw() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, None).await;
    let first = world.capsule().await;
    let seen = stream.until("capsule.create").await;
    let last = seen.id.expect("an id");
    drop(stream);
    let second = world.capsule().await;
    let elsewhere = world.another_node().await;
    let request = http::Request::builder()
        .uri(format!("http://{elsewhere}/v1/events/stream"))
        .header("x-api-key", KEY)
        .header("last-event-id", last);
    let response = world.open(request.body(full("")).unwrap()).await;
    let mut again = Stream {
        body: response.into_body(),
        text: String::new(),
    };
    let hello = again.next().await.data;
    assert!(
        hello.get("metadata").is_none(),
        "nothing was missed: {hello}"
    );
    let next = again.next().await.data;
    assert_eq!(next["resource"]["id"], second, "and not {first}");
    assert_eq!(
        again.until("capsule.create").await.data["resource"]["id"],
        second
    );
}

#[tokio::test]
async fn an_id_that_is_none_is_refused_and_an_empty_one_is_none() {
    let world = World::new().await;
    let request = world
        .request(Method::GET, "/v1/events/stream")
        .header("x-api-key", KEY)
        .header("last-event-id", "yesterday");
    let refused = world.send(request.body(full("")).unwrap()).await;
    refused.refused(400, "invalid_request");
    let mut stream = Stream::open(&world, Some("")).await;
    assert_eq!(stream.next().await.data["event"], "connected");
    world
        .ask(Method::GET, "/v1/events/stream", "", "")
        .await
        .refused(401, "unauthorized");
}

#[tokio::test]
async fn a_stream_ends_when_the_node_stops() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, None).await;
    stream.next().await;
    world.stop_sessions().await;
    assert_eq!(stream.block().await, None);
}

#[tokio::test]
async fn silence_is_broken_by_a_comment() {
    let world = World::new().await;
    let mut stream = Stream::open(&world, None).await;
    stream.next().await;
    tokio::time::pause();
    let comment = stream.block().await.expect("a sign of life");
    assert!(comment.starts_with(':'), "{comment}");
    tokio::time::resume();
}

#[tokio::test]
async fn the_list_goes_page_by_page_and_is_the_teams_own() {
    let world = World::new().await;
    let id = world.capsule().await;
    let first = world.get("/v1/events?limit=1").await.is(200).json();
    assert_eq!(first["events"][0]["metadata"]["to"], "starting");
    assert_eq!(first["missed"], false);
    let after = first["last_event_id"].as_str().unwrap();
    let next = world
        .get(&format!("/v1/events?after={after}"))
        .await
        .is(200)
        .json();
    let kinds: Vec<_> = next["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["event"])
        .collect();
    assert_eq!(kinds, ["capsule.state.changed", "capsule.create"]);
    assert_eq!(next["events"][1]["resource"]["id"], id);
    let other = world.ask(Method::GET, "/v1/events", OTHER_KEY, "").await;
    assert_eq!(other.is(200).json()["events"], json!([]));
    for bad in ["limit=0", "limit=1001", "limit=x", "after=1", "after=-1-0"] {
        world
            .get(&format!("/v1/events?{bad}"))
            .await
            .refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn hosts_that_come_and_go_are_told_to_the_platform() {
    let world = World::new().await;
    let node = world.join("second", 2).await;
    let incarnation = world
        .proposer
        .view()
        .state()
        .node(node)
        .unwrap()
        .incarnation;
    let missed = Command::JudgeNode {
        node,
        incarnation,
        verdict: Verdict::Missing,
    };
    crate::world::propose(&world.proposer, missed).await;
    let told = world
        .ask(Method::GET, "/v1/events", ADMIN_KEY, "")
        .await
        .json();
    let told: Vec<_> = told["events"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|it| it["resource"]["id"] == node.to_string())
        .map(|it| it["event"].as_str().unwrap())
        .collect();
    assert_eq!(told, ["host.up", "host.down"]);
}
