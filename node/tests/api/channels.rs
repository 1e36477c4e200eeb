//! Notification channels: a real receiver, that fails first, is away, or is not to be gone to; and a
//! leader that goes away in the middle.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::world::{KEY, OTHER_KEY, World, eventually, full};

const SECRET: &str = "a-secret-of-the-test";

/// A receiver on a port of its own.
#[derive(Clone, Debug, Default)]
struct Receiver {
    got: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    /// What it answers first; 204 when there is nothing left.
    answers: Arc<Mutex<VecDeque<u16>>>,
}

impl Receiver {
    async fn start(answers: &[u16]) -> (Self, SocketAddr) {
        let receiver = Self {
            answers: Arc::new(Mutex::new(answers.iter().copied().collect())),
            ..Self::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serves = receiver.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serves = serves.clone();
                let answer = service_fn(move |request| serves.clone().take(request));
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), answer));
            }
        });
        (receiver, address)
    }

    async fn take(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        self.got.lock().unwrap().push((parts.headers, body));
        let status = self.answers.lock().unwrap().pop_front().unwrap_or(204);
        let mut response = Response::new(Full::new(Bytes::from("answer")));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        Ok(response)
    }

    /// Which deliveries came so far.
    fn ids(&self) -> Vec<String> {
        let got = self.got.lock().unwrap();
        let id = |(headers, _): &(HeaderMap, Bytes)| {
            headers["x-wrenn-delivery"].to_str().unwrap().to_owned()
        };
        got.iter().map(id).collect()
    }

    /// The bodies that came so far.
    fn bodies(&self) -> Vec<Value> {
        let got = self.got.lock().unwrap();
        got.iter()
            .map(|(_, body)| serde_json::from_slice(body).unwrap())
            .collect()
    }
}

/// Delivers as the leader does, until it is dropped.
fn lead(world: &World) -> DropGuard {
    let stop = CancellationToken::new();
    let (sender, leads) = watch::channel(true);
    let deliver = world.api_state().deliver(leads, stop.clone());
    tokio::spawn(async move {
        deliver.await;
        drop(sender);
    });
    stop.drop_guard()
}

async fn make(world: &World, address: SocketAddr, kinds: Value) -> Value {
    let body = json!({
        "name": "ours",
        "config": {"url": format!("http://{address}/hook?a=b"), "secret": SECRET},
        "events": kinds,
    });
    world.post("/v1/channels", body).await.is(201).json()
}

async fn shown(world: &World, channel: &Value) -> Value {
    let path = format!("/v1/channels/{}", channel["id"].as_str().unwrap());
    world.get(&path).await.is(200).json()
}

/// Whether a delivery is signed with the secret, by somebody else's arithmetic.
fn is_signed(headers: &HeaderMap, body: &[u8]) -> bool {
    let seconds = headers["x-wrenn-timestamp"].to_str().unwrap();
    let message = [seconds.as_bytes(), b".", body].concat();
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
    let signature = headers["x-wrenn-signature"].to_str().unwrap();
    let hex = signature.strip_prefix("sha256=").unwrap();
    let bytes: Vec<u8> = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect();
    ring::hmac::verify(&key, &message, &bytes).is_ok()
}

#[tokio::test]
async fn a_receiver_that_fails_first_gets_each_event_once_it_answers_and_in_order() {
    let world = World::allowing_loopback().await;
    let (receiver, address) = Receiver::start(&[500, 302]).await;
    let channel = make(
        &world,
        address,
        json!(["capsule.create", "capsule.destroy"]),
    )
    .await;
    let _leader = lead(&world);
    let id = world.capsule().await;
    world.delete(&format!("/v1/capsules/{id}")).await.is(204);
    let done = eventually(async || {
        let channel = shown(&world, &channel).await;
        (channel["delivered"] == 2).then_some(channel)
    });
    let done = done.await;
    assert_eq!(done.get("last_error"), None, "{done}");
    let kinds: Vec<Value> = receiver
        .bodies()
        .iter()
        .map(|it| it["event"].clone())
        .collect();
    let create = json!("capsule.create");
    assert_eq!(
        kinds,
        [
            create.clone(),
            create.clone(),
            create,
            json!("capsule.destroy")
        ]
    );
    let ids = receiver.ids();
    assert_eq!(
        (&ids[0], &ids[1]),
        (&ids[1], &ids[2]),
        "a delivery keeps its name"
    );
    assert_eq!(receiver.bodies()[3]["id"], ids[3]);
    assert_eq!(receiver.bodies()[3]["resource"]["id"], id);
    let got = receiver.got.lock().unwrap();
    assert!(got.iter().all(|(headers, body)| is_signed(headers, body)));
}

#[tokio::test]
async fn the_next_leader_goes_on_where_the_last_one_was_killed() {
    let world = World::allowing_loopback().await;
    let (receiver, address) = Receiver::start(&[204, 503]).await;
    let channel = make(&world, address, json!(["capsule.create"])).await;
    let first = lead(&world);
    let one = world.capsule().await;
    eventually(async || (shown(&world, &channel).await["delivered"] == 1).then_some(())).await;
    let two = world.capsule().await;
    eventually(async || (receiver.ids().len() == 2).then_some(())).await;
    drop(first);
    let _second = lead(&world);
    eventually(async || (shown(&world, &channel).await["delivered"] == 2).then_some(())).await;
    let capsules: Vec<Value> = receiver
        .bodies()
        .iter()
        .map(|it| it["resource"]["id"].clone())
        .collect();
    // The first leader may have tried more than once, on a machine that stood still.
    let (arrived, failed) = capsules.split_at(1);
    assert_eq!(arrived, [json!(one)], "nothing twice that arrived");
    assert!(failed.len() >= 2, "nothing is lost");
    assert!(failed.iter().all(|it| *it == json!(two)), "{failed:?}");
}

#[tokio::test]
async fn a_receiver_that_is_away_makes_no_other_wait_and_says_why() {
    let world = World::allowing_loopback().await;
    let (receiver, address) = Receiver::start(&[]).await;
    // Port 1 of loopback: nothing listens there.
    let away = make(&world, "127.0.0.1:1".parse().unwrap(), json!([])).await;
    make(&world, address, json!([])).await;
    let _leader = lead(&world);
    world.capsule().await;
    eventually(async || (receiver.ids().len() >= 3).then_some(())).await;
    let failed = eventually(async || {
        let away = shown(&world, &away).await;
        away["last_error"].as_str().map(str::to_owned)
    });
    assert!(failed.await.contains("could not be reached"));
    assert_eq!(shown(&world, &away).await["delivered"], 0);
}

#[tokio::test]
async fn nobody_but_the_operator_sends_a_node_to_private_addresses() {
    let world = World::new().await;
    for url in [
        "http://127.0.0.1:7320/v1/nodes",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://10.0.0.1/",
        "http://localhost/",
        "http://0.0.0.0/",
        "ftp://example.org/",
        "nonsense",
        "",
    ] {
        let body = json!({"name": "x", "config": {"url": url}});
        let refused = world.post("/v1/channels", body).await;
        refused.refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_channel_is_made_shown_changed_tried_and_taken_away_by_its_team_alone() {
    let world = World::allowing_loopback().await;
    let (receiver, address) = Receiver::start(&[]).await;
    let made = make(&world, address, json!([])).await;
    assert_eq!(
        (&made["provider"], &made["config"]["secret"]),
        (&json!("webhook"), &json!(SECRET))
    );
    let path = format!("/v1/channels/{}", made["id"].as_str().unwrap());
    let listed = world.get("/v1/channels").await.is(200).json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert!(listed[0]["config"].get("secret").is_none(), "{listed}");
    let change = json!({"name": "new", "enabled": false, "events": ["host.down"]});
    let changed = world
        .ask(Method::PATCH, &path, KEY, &change.to_string())
        .await;
    let changed = changed.is(200).json();
    assert_eq!(
        (&changed["name"], &changed["enabled"]),
        (&json!("new"), &json!(false))
    );
    assert_eq!(changed["events"], json!(["host.down"]));
    let config = json!({"url": format!("http://{address}/other")});
    let moved = world
        .ask(
            Method::PUT,
            &format!("{path}/config"),
            KEY,
            &config.to_string(),
        )
        .await;
    assert!(
        moved.is(200).json()["config"]["url"]
            .as_str()
            .unwrap()
            .ends_with("/other")
    );
    let tried = world
        .post("/v1/channels/test", json!({"id": made["id"]}))
        .await;
    assert_eq!(tried.is(200).json(), json!({"delivered": true}));
    assert_eq!(receiver.bodies()[0]["event"], "connected");
    for (method, path) in [(Method::GET, &path), (Method::PATCH, &path)] {
        let other = world.ask(method, path, OTHER_KEY, "{}").await;
        other.refused(404, "not_found");
    }
    let others = world.ask(Method::DELETE, &path, OTHER_KEY, "").await;
    others.is(204);
    world.get(&path).await.is(200);
    world.delete(&path).await.is(204);
    world.delete(&path).await.is(204);
    world.get(&path).await.refused(404, "not_found");
}

#[tokio::test]
async fn what_cannot_be_a_channel_is_refused_by_name() {
    let world = World::allowing_loopback().await;
    let config = json!({"url": "http://127.0.0.1:9/"});
    for (body, status) in [
        (json!({"name": "", "config": config}), 400),
        (json!({"name": "a\nb", "config": config}), 400),
        (
            json!({"name": "a", "config": config, "events": ["capsule.exploded"]}),
            400,
        ),
        (
            json!({"name": "a", "config": {"url": "http://127.0.0.1:9/", "secret": "short"}}),
            400,
        ),
        (
            json!({"name": "a", "config": config, "provider": "pigeon"}),
            400,
        ),
        (
            json!({"name": "a", "config": config, "provider": "slack"}),
            501,
        ),
        (json!({"name": "a", "config": config, "colour": 1}), 400),
    ] {
        let answer = world.post("/v1/channels", body.clone()).await;
        assert_eq!(answer.status, status, "{body}");
    }
    let request = world
        .request(Method::GET, "/v1/channels/none")
        .header("x-api-key", KEY);
    world
        .send(request.body(full("")).unwrap())
        .await
        .refused(400, "invalid_request");
}
