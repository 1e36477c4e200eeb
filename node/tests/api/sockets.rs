//! Streams and terminals over WebSocket, spoken by a client of another library, at the node that owns the sandbox
//! and at another.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::world::{KEY, OTHER_KEY, PATIENCE, World};

/// A client's end.
struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    async fn open(world: &World, path: &str, key: Option<&str>) -> Result<Self, Error> {
        let url = format!("ws://{}{path}", world.address);
        let mut request = url.into_client_request().unwrap();
        if let Some(key) = key {
            let headers = request.headers_mut();
            headers.insert("x-api-key", key.parse().unwrap());
        }
        let stream = TcpStream::connect(world.address).await.unwrap();
        Ok(Self(client_async(request, stream).await?.0))
    }

    async fn to(world: &World, path: &str) -> Self {
        let opened = Self::open(world, path, Some(KEY)).await;
        opened.expect("an open WebSocket")
    }

    async fn say(&mut self, frame: Value) {
        let text = Message::text(frame.to_string());
        self.0.send(text).await.expect("sent");
    }

    async fn next(&mut self) -> Option<Message> {
        let next = time::timeout(PATIENCE, self.0.next());
        next.await.expect("in time").map(|it| it.expect("a frame"))
    }

    /// The next frame of JSON, past binary ones.
    async fn told(&mut self) -> Value {
        loop {
            match self.next().await.expect("another frame") {
                Message::Text(text) => return serde_json::from_str(&text).expect("JSON"),
                Message::Close(frame) => panic!("closed: {frame:?}"),
                _ => {}
            }
        }
    }

    /// All frames of JSON up to the end.
    async fn rest(&mut self) -> Vec<Value> {
        let mut all = Vec::new();
        while let Some(message) = self.next().await {
            if let Message::Text(text) = message {
                all.push(serde_json::from_str(&text).expect("JSON"));
            }
        }
        all
    }

    /// Reads what a terminal shows until it has shown `wanted`.
    async fn shown(&mut self, wanted: &str) -> String {
        let mut shown = Vec::new();
        loop {
            match self.next().await {
                Some(Message::Binary(bytes)) => shown.extend_from_slice(&bytes),
                Some(Message::Text(text)) => println!("{text}"),
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&shown)),
            }
            let text = String::from_utf8_lossy(&shown);
            if text.contains(wanted) {
                return text.into_owned();
            }
        }
    }
}

fn collected(frames: &[Value], stream: &str) -> String {
    let of = frames.iter().filter(|it| it["type"] == stream);
    of.map(|it| it["data"].as_str().expect("data")).collect()
}

fn sh(script: &str) -> Value {
    json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script]})
}

async fn both_ways() -> [World; 2] {
    [World::new().await, World::elsewhere().await.0]
}

/// Waits until nothing that was started is left.
async fn no_process(world: &World, id: &str) {
    let deadline = time::Instant::now() + PATIENCE;
    loop {
        let answer = world.get(&format!("/v1/capsules/{id}/processes")).await;
        if answer.json()["processes"] == json!([]) {
            return;
        }
        assert!(time::Instant::now() < deadline, "{}", answer.json());
        time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_command_tells_pid_output_and_code_here_and_through_another_node() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let mut socket = Socket::to(&world, &format!("/api/v1/capsules/{id}/exec/stream")).await;
        socket
            .say(sh("printf 'a\\342\\202\\254'; echo no >&2; exit 42"))
            .await;
        let frames = socket.rest().await;
        assert_eq!(frames[0]["type"], "start");
        assert!(frames[0]["pid"].as_u64().is_some_and(|pid| pid > 0));
        assert_eq!(collected(&frames, "stdout"), "a\u{20ac}");
        assert_eq!(collected(&frames, "stderr"), "no\n");
        let last = frames.last().expect("an end");
        assert_eq!(*last, json!({"type": "exit", "exit_code": 42}));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_of_zero_is_told_and_bytes_that_are_no_text_are_replaced() {
    let world = World::new().await;
    let id = world.capsule().await;
    let mut socket = Socket::to(&world, &format!("/v1/capsules/{id}/exec/stream")).await;
    socket.say(sh("printf 'x\\377y'")).await;
    let frames = socket.rest().await;
    assert_eq!(collected(&frames, "stdout"), "x\u{fffd}y");
    assert_eq!(frames.last().unwrap()["exit_code"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_ends_with_a_stop_or_with_its_client() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let path = format!("/v1/capsules/{id}/exec/stream");
        let mut stopped = Socket::to(&world, &path).await;
        stopped.say(sh("sleep 1000")).await;
        assert_eq!(stopped.told().await["type"], "start");
        stopped.say(json!({"type": "stop"})).await;
        let frames = stopped.rest().await;
        assert_eq!(frames.last().expect("an end")["type"], "exit");
        no_process(&world, &id).await;

        let mut left = Socket::to(&world, &path).await;
        left.say(sh("sleep 1000")).await;
        assert_eq!(left.told().await["type"], "start");
        drop(left);
        no_process(&world, &id).await;
    }
}

/// Whether a process of the guest, which is this host, lives and is no zombie.
fn is_running(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_started_ends_with_it() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let path = format!("/v1/capsules/{id}/exec/stream");
        for says_stop in [true, false] {
            let mut socket = Socket::to(&world, &path).await;
            socket.say(sh("sleep 1000 & echo $!; sleep 1000")).await;
            assert_eq!(socket.told().await["type"], "start");
            let told = socket.told().await;
            let child = told["data"].as_str().expect("a pid").trim().to_owned();
            assert!(is_running(&child));
            if says_stop {
                socket.say(json!({"type": "stop"})).await;
                let frames = socket.rest().await;
                assert_eq!(frames.last().expect("an end")["type"], "exit");
            } else {
                drop(socket);
            }
            let deadline = time::Instant::now() + PATIENCE;
            while is_running(&child) {
                assert!(time::Instant::now() < deadline, "{child} lives on");
                time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_too_large_is_refused_before_it_has_come() {
    let world = World::new().await;
    let id = world.capsule().await;
    let mut socket = Socket::to(&world, &format!("/v1/capsules/{id}/exec/stream")).await;
    // The head of a whole text frame of 2 MiB, masked; nothing follows it.
    let mut head = vec![0x81, 0xff];
    head.extend((2_u64 << 20).to_be_bytes());
    head.extend([0; 4]);
    socket.0.get_mut().write_all(&head).await.expect("sent");
    let told = socket.told().await;
    assert_eq!(
        (&told["type"], &told["fatal"]),
        (&json!("error"), &json!(true))
    );
    let why = told["data"].as_str().expect("words");
    assert!(why.contains("1048576 bytes at most"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_a_key_wait_among_themselves_and_keep_nobody_else_out() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/exec/stream");
    let strangers = (0..65).map(|_| Socket::open(&world, &path, None));
    let opened = futures::future::join_all(strangers).await;
    let refused: Vec<&Error> = opened.iter().filter_map(|it| it.as_ref().err()).collect();
    let [Error::Http(answer)] = refused[..] else {
        panic!("64 may wait: {refused:?}");
    };
    assert_eq!(answer.status(), 503);
    let mut known = Socket::to(&world, &path).await;
    known.say(sh("echo in")).await;
    assert_eq!(collected(&known.rest().await, "stdout"), "in\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_comes_and_goes_and_the_process_stays() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let started = world
            .post(
                &format!("/v1/capsules/{id}/exec"),
                json!({"cmd": "/bin/sh", "args": ["-c", "read line; echo late; exit 3"],
                       "background": true, "tag": "mine"}),
            )
            .await
            .is(202)
            .json();
        let by_tag = format!("/v1/capsules/{id}/processes/mine/stream");
        let mut first = Socket::to(&world, &by_tag).await;
        assert_eq!(first.told().await["pid"], started["pid"]);
        drop(first);
        // Nothing to read: it ends by itself, and one who watches by number is told.
        let by_pid = format!("/v1/capsules/{id}/processes/{}/stream", started["pid"]);
        let mut second = Socket::to(&world, &by_pid).await;
        let frames = second.rest().await;
        assert!(matches!(frames.len(), 1..), "{frames:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_is_told_in_an_error_frame_after_the_upgrade() {
    let world = World::new().await;
    let id = world.capsule().await;
    let nobody = "cl-0000000000000000000000001";
    for (path, first) in [
        (format!("/v1/capsules/{nobody}/exec/stream"), sh("true")),
        (
            format!("/v1/capsules/{nobody}/pty"),
            json!({"type": "start"}),
        ),
        (
            format!("/v1/capsules/{id}/processes/nobody/stream"),
            json!({}),
        ),
        (
            format!("/v1/capsules/{id}/pty"),
            json!({"type": "connect", "tag": "pty-0"}),
        ),
        (
            format!("/v1/capsules/{id}/exec/stream"),
            json!({"type": "stop"}),
        ),
        (format!("/v1/capsules/{id}/pty"), json!(7)),
    ] {
        let mut socket = Socket::to(&world, &path).await;
        socket.say(first).await;
        let frames = socket.rest().await;
        assert_eq!(frames.len(), 1, "{path}: {frames:?}");
        assert_eq!(frames[0]["type"], "error", "{path}");
        assert_eq!(frames[0]["fatal"], true);
        assert!(frames[0]["data"].as_str().is_some_and(|it| !it.is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_known_key_gets_in_and_it_may_come_with_the_first_frame() {
    let world = World::new().await;
    let id = world.capsule().await;
    let path = format!("/v1/capsules/{id}/exec/stream");
    let unknown = "wrn_000000000000000000000000000000ff";
    let refused = Socket::open(&world, &path, Some(unknown)).await;
    assert!(matches!(refused, Err(Error::Http(answer)) if answer.status() == 401));
    let malformed = Socket::open(&world, "/v1/capsules/x/pty", Some(KEY)).await;
    assert!(matches!(malformed, Err(Error::Http(answer)) if answer.status() == 400));

    let mut late = Socket::open(&world, &path, None).await.expect("open");
    late.say(json!({"type": "auth", "token": KEY})).await;
    late.say(sh("echo in")).await;
    assert_eq!(collected(&late.rest().await, "stdout"), "in\n");

    for first in [json!({"type": "auth", "token": unknown}), sh("echo in")] {
        let mut nobody = Socket::open(&world, &path, None).await.expect("open");
        nobody.say(first).await;
        let frames = nobody.rest().await;
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0]["type"], "error");
    }
    let mut other = Socket::open(&world, &path, Some(OTHER_KEY)).await.unwrap();
    other.say(sh("echo in")).await;
    let frames = other.rest().await;
    assert!(frames[0]["data"].as_str().unwrap().contains("no capsule"));
    world.get(&path).await.refused(400, "invalid_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_takes_input_resizes_and_is_found_again_by_its_tag() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let path = format!("/v1/capsules/{id}/pty");
        let mut first = Socket::to(&world, &path).await;
        let start = json!({"type": "start", "cmd": "/bin/sh", "cols": 100, "rows": 30,
                           "envs": {"PS1": "$ "}});
        first.say(start).await;
        let started = first.told().await;
        assert_eq!(started["type"], "started");
        let tag = started["tag"].as_str().expect("a tag").to_owned();
        assert!(tag.starts_with("pty-"), "{tag}");
        let typed = Message::binary(&b"stty size; echo m''ark\n"[..]);
        first.0.send(typed).await.unwrap();
        let shown = first.shown("mark").await;
        assert!(shown.contains("30 100"), "{shown}");
        drop(first);

        let mut again = Socket::to(&world, &path).await;
        again.say(json!({"type": "connect", "tag": tag})).await;
        let found = again.told().await;
        assert_eq!(
            (&found["pid"], &found["tag"]),
            (&started["pid"], &started["tag"])
        );
        again
            .say(json!({"type": "resize", "cols": 40, "rows": 10}))
            .await;
        // "stty size; exit 5" in base64, as older clients type.
        again
            .say(json!({"type": "input", "data": "c3R0eSBzaXplOyBleGl0IDUK"}))
            .await;
        again.shown("10 40").await;
        let frames = again.rest().await;
        assert_eq!(frames, [json!({"type": "exit", "exit_code": 5})]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_killed_when_told_and_complains_of_frames_it_does_not_know() {
    let world = World::new().await;
    let id = world.capsule().await;
    let mut socket = Socket::to(&world, &format!("/v1/capsules/{id}/pty")).await;
    socket
        .say(json!({"type": "start", "cmd": "/bin/sleep", "args": ["1000"]}))
        .await;
    assert_eq!(socket.told().await["type"], "started");
    for unknown in [
        json!({"type": "dance"}),
        json!([]),
        json!({"type": "resize", "cols": 0, "rows": 1}),
    ] {
        socket.say(unknown).await;
        let complaint = socket.told().await;
        assert_eq!(complaint["type"], "error");
        assert_eq!(complaint["fatal"], false);
    }
    socket.say(json!({"type": "pong"})).await;
    socket.say(json!({"type": "kill"})).await;
    let frames = socket.rest().await;
    assert_eq!(frames, [json!({"type": "exit", "exit_code": -1})]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_node_says_so_and_leaves_the_processes() {
    let world = World::new().await;
    let id = world.capsule().await;
    let mut socket = Socket::to(&world, &format!("/v1/capsules/{id}/exec/stream")).await;
    socket.say(sh("sleep 1000")).await;
    let pid = socket.told().await["pid"].as_u64().expect("a pid");
    world.stop_sessions().await;
    let close = loop {
        match socket.next().await {
            Some(Message::Close(frame)) => break frame.expect("a reason"),
            Some(_) => {}
            None => panic!("closed without a word"),
        }
    };
    assert_eq!(u16::from(close.code), 1001);
    world
        .delete(&format!("/v1/capsules/{id}/processes/{pid}"))
        .await
        .is(204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_a_pause_cuts_off_ends_with_the_reason() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let path = format!("/v1/capsules/{id}");
        let mut command = Socket::to(&world, &format!("{path}/exec/stream")).await;
        command.say(sh("exec sleep 1000")).await;
        let mut terminal = Socket::to(&world, &format!("{path}/pty")).await;
        terminal
            .say(json!({"type": "start", "cmd": "/bin/sh"}))
            .await;
        assert_eq!(command.told().await["type"], "start");
        assert_eq!(terminal.told().await["type"], "started");
        let paused = world.post(&format!("{path}/pause"), json!({})).await;
        paused.is(200);
        world.guests.gone.cancel();
        for mut cut in [command, terminal] {
            let frames = cut.rest().await;
            let last = frames.last().expect("a last word");
            assert_eq!(last["type"], "error", "{last}");
            let why = last["data"].as_str().expect("words");
            assert!(why.contains("was paused while"), "{why}");
        }
    }
}
