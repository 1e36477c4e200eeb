//! Quiesce, undo and restore over real HTTP to the real agent. It runs outside a guest here, so its
//! machine is nobody's: what is seen is who is served, who waits and who is cut.

mod common;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::{Codec, Envd, by_tag, command, full, shell, soon};
use http::{Method, Request};
use proto::envd::process as wire;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TOKEN: &str = "x-access-token";
/// Long enough for a request to be answered that is not held back.
const A_WHILE: Duration = Duration::from_millis(300);

async fn post_as(envd: &Envd, path: &str, token: &str, body: &Value) -> (u16, Value) {
    let request = Request::post(path)
        .header(TOKEN, token)
        .body(full(body.to_string()))
        .expect("a request");
    let answer = envd.fetch(request).await;
    let json = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
    (answer.status, json)
}

async fn post(envd: &Envd, path: &str, body: Value) -> (u16, Value) {
    post_as(envd, path, "", &body).await
}

async fn quiesce(envd: &Envd) -> Value {
    let (status, done) = post(envd, "/snapshot/prepare", json!({ "epoch": 7 })).await;
    assert_eq!(status, 200, "{done}");
    done
}

fn order(epoch: u64, generation: u8) -> Value {
    json!({
        "epoch": epoch,
        "generation": format!("{generation:032x}"),
        "entropy": STANDARD.encode([7; 32]),
        "wallClockNs": 1_800_000_000_000_000_000_u64,
    })
}

/// A connection of our own, on which nothing is asked that we do not ask.
struct Raw(TcpStream);

impl Raw {
    async fn open(envd: &Envd) -> Self {
        Self(TcpStream::connect(&envd.address).await.expect("connected"))
    }

    async fn ask(&mut self, path: &str) {
        let text = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        self.0.write_all(text.as_bytes()).await.expect("sent");
    }

    /// The next answer's head and whatever came with it.
    async fn heard(&mut self) -> String {
        let mut buffer = [0; 4096];
        let length = soon(self.0.read(&mut buffer)).await.expect("not reset");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    /// Whether the agent has ended it, in whichever way.
    async fn has_ended(&mut self) -> bool {
        matches!(soon(self.0.read(&mut [0; 16])).await, Ok(0) | Err(_))
    }
}

#[tokio::test]
async fn an_old_hosts_prepare_closes_idle_connections_and_holds_nothing() {
    let envd = Envd::start();
    let mut idle = Raw::open(&envd).await;
    idle.ask("/health").await;
    assert!(idle.heard().await.starts_with("HTTP/1.1 200"));
    assert_eq!(envd.post("/snapshot/prepare", "").await.status, 204);
    assert!(idle.has_ended().await);
    assert_eq!(envd.get("/envs").await.status, 200);
}

#[tokio::test]
async fn work_waits_while_quiesced_and_is_served_after_the_undo() {
    let envd = Envd::start();
    let done = quiesce(&envd).await;
    assert_eq!(done["workload"], "free", "there are no groups here");
    assert_eq!(done["diskFrozen"], false);
    assert!(done["tookUs"].as_u64() > Some(0), "{done}");

    let mut held = Raw::open(&envd).await;
    held.ask("/envs").await;
    let early = tokio::time::timeout(A_WHILE, held.0.readable()).await;
    assert!(early.is_err(), "held back");
    let health = envd.get("/health").await;
    assert_eq!(health.status, 200, "control is not");
    assert_eq!(health.header("connection"), Some("close"));

    let (status, undone) = post(&envd, "/snapshot/undo", json!({ "epoch": 7 })).await;
    assert_eq!((status, &undone["undone"]), (200, &json!(true)));
    assert!(held.heard().await.starts_with("HTTP/1.1 200"));
    let (status, undone) = post(&envd, "/snapshot/undo", json!({})).await;
    assert_eq!((status, &undone["undone"]), (200, &json!(false)));
}

#[tokio::test]
async fn a_client_that_has_only_connected_is_never_reset() {
    let envd = Envd::start();
    let mut fresh = Raw::open(&envd).await;
    quiesce(&envd).await;
    post(&envd, "/snapshot/undo", json!({})).await;
    fresh.ask("/health").await;
    assert!(fresh.heard().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn streams_outlive_a_pause_that_failed() {
    let envd = Envd::start();
    let line = "while read line; do echo got $line; done";
    let request = wire::StartRequest {
        stdin: Some(true),
        tag: Some("reader".to_owned()),
        ..shell(line)
    };
    let mut stream = envd.start_process(Codec::Proto, request, &[]).await;
    let pid = stream.pid().await;
    let done = quiesce(&envd).await;
    assert!(done["streams"].as_u64() >= Some(1), "{done}");
    assert_eq!(done["unfinished"], 0);
    assert_eq!(quiesce(&envd).await["unfinished"], 0, "twice is once");
    post(&envd, "/snapshot/undo", json!({})).await;
    feed(&envd, pid, b"on\n").await;
    stream.until("got on").await;
}

async fn feed(envd: &Envd, pid: u32, data: &[u8]) {
    use wire::__buffa::oneof::process_input::Input;
    let input = wire::ProcessInput {
        input: Some(Input::Stdin(data.to_vec())),
        ..Default::default()
    };
    let request = wire::SendInputRequest {
        process: common::by_pid(pid).into(),
        input: input.into(),
        ..Default::default()
    };
    let sent = envd
        .call(Codec::Proto, "process.Process/SendInput", &request)
        .await;
    let _: wire::SendInputResponse = sent.expect("fed");
}

#[tokio::test]
async fn a_restore_cuts_what_is_older_and_serves_what_is_newer() {
    let envd = Envd::start();
    let request = wire::StartRequest {
        tag: Some("lives".to_owned()),
        ..command("sleep", &["1000"])
    };
    let mut stream = envd.start_process(Codec::Json, request, &[]).await;
    stream.pid().await;
    let mut idle = Raw::open(&envd).await;
    quiesce(&envd).await;
    let mut held = Raw::open(&envd).await;
    held.ask("/envs").await;

    let (status, done) = post(&envd, "/snapshot/restore", order(8, 1)).await;
    assert_eq!((status, &done["applied"]), (200, &json!(true)), "{done}");
    assert_eq!(done["held"], false, "nothing could be frozen");
    assert!(done["cut"].as_u64() >= Some(3), "{done}");
    // A reset, not a close: nothing of it may linger in the guest.
    let end = soon(idle.0.read(&mut [0; 16])).await;
    let end = end.expect_err("an idle connection of the past life");
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(held.has_ended().await, "a held request is not carried out");

    assert_eq!(envd.get("/envs").await.status, 200);
    let mut again = envd.connect(Codec::Json, by_tag("lives")).await;
    again.pid().await;
}

#[tokio::test]
async fn a_repeated_restore_changes_nothing_and_an_older_epoch_is_refused() {
    let envd = Envd::start();
    quiesce(&envd).await;
    let (_, first) = post(&envd, "/snapshot/restore", order(8, 1)).await;
    let mut fresh = Raw::open(&envd).await;
    fresh.ask("/health").await;
    assert!(fresh.heard().await.starts_with("HTTP/1.1 200"));
    let (status, second) = post(&envd, "/snapshot/restore", order(8, 1)).await;
    assert_eq!(
        (status, &first["applied"], &second["applied"]),
        (200, &json!(true), &json!(false))
    );
    fresh.ask("/health").await;
    assert!(fresh.heard().await.starts_with("HTTP/1.1 200"), "not cut");

    let (status, refused) = post(&envd, "/snapshot/restore", order(7, 2)).await;
    assert_eq!((status, &refused["code"]), (409, &json!(409)));
    for path in ["/snapshot/prepare", "/snapshot/undo"] {
        assert_eq!(post(&envd, path, json!({ "epoch": 7 })).await.0, 409);
    }
    assert_eq!(envd.get("/envs").await.status, 200, "nothing is held");
    let (status, _) = post(&envd, "/snapshot/restore", order(8, 2)).await;
    assert_eq!(status, 200, "another life under the same owner");
}

#[tokio::test]
async fn a_restore_brings_a_new_token_and_may_be_told_again_with_the_old_one() {
    let envd = Envd::start();
    envd.post("/init", json!({ "accessToken": "old" }).to_string())
        .await;
    let mut body = order(8, 1);
    body["accessToken"] = json!("new");
    body["envVars"] = json!({ "A": "1" });
    let status = post_as(&envd, "/snapshot/restore", "wrong", &body).await.0;
    assert_eq!(status, 401);
    let status = post_as(&envd, "/snapshot/restore", "old", &body).await.0;
    assert_eq!(status, 200);
    // The answer was lost: the host tells it again, and knows no better token than the old one.
    let (status, again) = post_as(&envd, "/snapshot/restore", "old", &body).await;
    assert_eq!((status, &again["applied"]), (200, &json!(false)));
    let mut forged = order(9, 3);
    forged["accessToken"] = json!("guessed");
    let status = post_as(&envd, "/snapshot/restore", "old", &forged).await.0;
    assert_eq!(status, 401);

    for (token, status) in [("old", 401), ("new", 200)] {
        let request = Request::builder()
            .method(Method::GET)
            .uri("/envs")
            .header(TOKEN, token)
            .body(full(""))
            .expect("a request");
        assert_eq!(envd.fetch(request).await.status, status, "{token}");
    }
    for path in ["/snapshot/prepare", "/snapshot/undo"] {
        assert_eq!(post_as(&envd, path, "old", &json!({})).await.0, 401);
    }
}

#[tokio::test]
async fn a_host_that_dies_costs_the_guest_only_the_time_it_was_given() {
    let envd = Envd::start();
    let wish = json!({ "undoAfterMs": 200 });
    assert_eq!(post(&envd, "/snapshot/prepare", wish).await.0, 200);
    // Held until the watchdog goes off, and then served.
    assert_eq!(envd.get("/envs").await.status, 200);
}

#[tokio::test]
async fn init_ends_a_pause_for_hosts_that_know_no_restore() {
    let envd = Envd::start();
    let mut old = Raw::open(&envd).await;
    quiesce(&envd).await;
    assert_eq!(envd.post("/init", "{}").await.status, 204);
    assert!(old.has_ended().await);
    assert_eq!(envd.get("/envs").await.status, 200);
}

#[tokio::test]
async fn an_init_after_a_restore_counts_even_if_the_new_hosts_clock_is_behind() {
    let envd = Envd::start();
    let at = |time: &str, value: &str| json!({"timestamp": time, "envVars": {"A": value}});
    let init = async |body: Value| envd.post("/init", body.to_string()).await.status;
    assert_eq!(init(at("2030-01-01T00:00:00Z", "old")).await, 204);
    let mut body = order(8, 1);
    body["wallClockNs"] = json!(1_700_000_000_000_000_000_u64);
    assert_eq!(post(&envd, "/snapshot/restore", body).await.0, 200);
    assert_eq!(init(at("2024-01-01T00:00:00Z", "new")).await, 204);
    assert_eq!(envd.get("/envs").await.json()["A"], "new");
}

#[tokio::test]
async fn malformed_orders_change_nothing() {
    let envd = Envd::start();
    for path in ["/snapshot/prepare", "/snapshot/undo", "/snapshot/restore"] {
        for body in ["{", "[]", "7", r#"{"epoch":-1}"#, r#"{"epoch":"x"}"#, "\0"] {
            let answer = envd.post(path, body).await;
            assert_eq!(answer.status, 400, "{path} {body}");
        }
    }
    assert_eq!(envd.post("/snapshot/restore", "").await.status, 400);
    assert_eq!(envd.get("/envs").await.status, 200);
}
