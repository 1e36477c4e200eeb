//! Visits to the ports of capsules, with real programs behind them, at the node that owns the sandbox and at
//! another.

use std::convert::Infallible;
use std::future;

use bytes::Bytes;
use futures::future::join_all;
use futures::{SinkExt as _, StreamExt as _, stream};
use http::response::Parts;
use http::{HeaderMap, Method, Request, Response, Version};
use http_body_util::{BodyDataStream, BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::world::{ADMIN_KEY, Answer, Body, KEY, OTHER_KEY, PATIENCE, World, full, streamed};

/// What a client of HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A program in the guest: answers with what it saw, or what `/path` asks for.
async fn program() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let served = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(answer));
            tokio::spawn(served);
        }
    });
    port
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let answer = match parts.uri.path() {
        "/events" => {
            // One event, and then silence: it must come at once.
            let event = stream::iter([Bytes::from_static(b"data: one\n\n")]);
            Response::builder()
                .header("content-type", "text/event-stream")
                .body(streamed(event.chain(stream::pending())))
        }
        "/moved/" => Response::builder()
            .status(302)
            .header("location", "/there/")
            .body(full(String::new())),
        _ => {
            let body = body.collect().await.unwrap().to_bytes();
            let headers: Vec<(String, String)> = parts
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or("?").into()))
                .collect();
            let seen = json!({
                "method": parts.method.as_str(), "uri": parts.uri.to_string(), "headers": headers,
                "body": String::from_utf8_lossy(&body),
            });
            Response::builder()
                .header("connection", "X-Hop")
                .header("x-hop", "1")
                .body(full(seen.to_string()))
        }
    };
    Ok(answer.unwrap())
}

fn header<'a>(seen: &'a Value, name: &str) -> Option<&'a str> {
    let headers = seen["headers"].as_array().unwrap();
    headers
        .iter()
        .find(|it| it[0] == name)
        .map(|it| it[1].as_str().unwrap())
}

async fn visit(world: &World, host: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = world.request(Method::GET, path).header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    world.send(request.body(full(String::new())).unwrap()).await
}

async fn both_ways() -> [World; 2] {
    [World::new().await, World::elsewhere().await.0]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_reaches_the_program_as_it_was_and_its_answer_comes_back() {
    for world in both_ways().await {
        let (id, port) = (world.capsule().await, program().await);
        let host = format!("{port}-{id}.localhost:99");
        let request = world
            .request(Method::PUT, "/v1/capsules//x/?q=%20&q")
            .header("host", &host)
            .header("x-api-key", KEY)
            .header("cookie", "a=1")
            .body(streamed(stream::iter([
                Bytes::from_static(b"two "),
                Bytes::from_static(b"pieces"),
            ])))
            .unwrap();
        let answer = world.send(request).await;
        assert_eq!(answer.is(200).headers.get("x-hop"), None);
        let seen = answer.json();
        assert_eq!(seen["method"], "PUT");
        assert_eq!(seen["uri"], "/v1/capsules//x/?q=%20&q");
        assert_eq!(seen["body"], "two pieces");
        assert_eq!(header(&seen, "host"), Some(&*host));
        assert_eq!(header(&seen, "cookie"), Some("a=1"));
        assert_eq!(header(&seen, "x-forwarded-for"), Some("127.0.0.1"));
        assert_eq!(
            header(&seen, "x-api-key"),
            None,
            "the key is not the guest's"
        );

        let named = [
            ("wrenn-capsule-id", &*id),
            ("wrenn-capsule-port", &*port.to_string()),
            ("x-api-key", KEY),
        ];
        visit(&world, "somewhere", "/", &named).await.is(200);
        let moved = visit(&world, &host, "/moved/", &[("x-api-key", KEY)]).await;
        assert_eq!(moved.is(302).headers["location"], "/there/");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_private_until_its_team_opens_it_or_gives_a_link() {
    let world = World::new().await;
    let (id, port) = (world.capsule().await, program().await);
    let host = format!("{port}-{id}.localhost");
    for headers in [
        &[][..],
        &[("x-api-key", OTHER_KEY)],
        &[("x-api-key", ADMIN_KEY)],
        &[("wrenn-link", "x")],
    ] {
        let refused = visit(&world, &host, "/", headers).await;
        assert_eq!(
            refused.is(401).headers["content-type"],
            "text/plain; charset=utf-8"
        );
    }
    visit(
        &world,
        &host,
        "/",
        &[("authorization", &format!("Bearer {KEY}"))],
    )
    .await
    .is(200);

    let links = format!("/v1/capsules/{id}/links");
    let made = world
        .post(&links, json!({"port": port, "expires_in_sec": 60}))
        .await
        .is(201)
        .json();
    let token = made["token"].as_str().unwrap();
    let url = made["url"].as_str().unwrap();
    assert!(
        url.starts_with(&format!("http://{port}-{id}.localhost:")),
        "{url}"
    );
    let by_link = format!("/a?wrenn_link={token}&b=1");
    let seen = visit(&world, &host, &by_link, &[]).await.is(200).json();
    assert_eq!(seen["uri"], "/a?b=1");
    visit(&world, &host, "/", &[("wrenn-link", token)])
        .await
        .is(200);

    // A browser is given a cookie and a clean address, and comes again with the cookie.
    let html = [("accept", "text/html,*/*")];
    let sent = visit(&world, &host, &format!("//evil.example/{by_link}"), &html).await;
    assert_eq!(sent.is(302).headers["location"], "/evil.example//a?b=1");
    let cookie = sent.headers["set-cookie"].to_str().unwrap();
    let cookie = cookie.split(';').next().unwrap();
    let seen = visit(&world, &host, "/", &[("cookie", &format!("x=1; {cookie}"))])
        .await
        .is(200)
        .json();
    assert_eq!(header(&seen, "cookie"), Some("x=1"));

    let other_port = format!("{}-{id}.localhost", port ^ 1);
    visit(&world, &other_port, &by_link, &[]).await.is(401);
    world.clock.advance(std::time::Duration::from_secs(61));
    visit(&world, &host, &by_link, &[]).await.is(401);

    let capsule = format!("/v1/capsules/{id}");
    assert_eq!(world.get(&capsule).await.json()["ports"], "private");
    let opened = world
        .ask(Method::PATCH, &capsule, KEY, r#"{"ports":"public"}"#)
        .await;
    assert_eq!(opened.is(200).json()["ports"], "public");
    visit(&world, &host, "/", &[]).await.is(200);
    world
        .ask(Method::PATCH, &capsule, OTHER_KEY, "{}")
        .await
        .refused(404, "not_found");
    world
        .ask(Method::PATCH, &capsule, KEY, r#"{"ports":"ajar"}"#)
        .await
        .refused(400, "invalid_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capsule_that_is_visited_too_often_is_rested_and_no_other_nor_by_those_who_may_not_come_in()
 {
    let world = World::served(|state| state.with_visits(1, 3)).await;
    let (id, other, port) = (
        world.capsule().await,
        world.capsule().await,
        program().await,
    );
    let host = format!("{port}-{id}.localhost");
    let key = [("x-api-key", KEY)];
    for _ in 0..5 {
        visit(&world, &host, "/", &[]).await.is(401);
    }
    for _ in 0..3 {
        visit(&world, &host, "/", &key).await.is(200);
    }
    let refused = visit(&world, &host, "/", &key).await;
    assert_eq!(refused.is(429).headers["retry-after"], "1");
    assert_eq!(refused.headers["content-type"], "text/plain; charset=utf-8");
    let elsewhere = format!("{port}-{other}.localhost");
    visit(&world, &elsewhere, "/", &key).await.is(200);
    world.get(&format!("/v1/capsules/{id}")).await.is(200);
    world.boot_clock.advance(time::Duration::from_secs(1));
    visit(&world, &host, "/", &key).await.is(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_visited_is_told_in_plain_text() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let closed = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().port()
        };
        let nobody = "cl-0000000000000000000000001";
        for (host, status, words) in [
            (format!("{closed}-{id}.x"), 502, "is not open"),
            (format!("80-{nobody}.x"), 404, "was not found"),
            (format!("0-{id}.x"), 400, "is not a port"),
            (format!("70000-{id}.x"), 400, "is not a port"),
            ("80-cl-x.x".into(), 400, "id"),
        ] {
            let answer = visit(&world, &host, "/", &[("x-api-key", KEY)]).await;
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            assert_eq!(answer.status, status, "{host}: {text}");
            assert!(text.contains(words), "{host}: {text}");
        }
        world
            .post(&format!("/v1/capsules/{id}/pause"), json!({}))
            .await
            .is(200);
        let paused = visit(&world, &format!("80-{id}.x"), "/", &[("x-api-key", KEY)]).await;
        assert_eq!(paused.status, 409);
        for body in [
            json!({}),
            json!({"port": 0}),
            json!({"port": 70000}),
            json!({"port": 1, "expires_in_sec": 0}),
            json!({"port": 1, "expires_in_sec": 604_801}),
        ] {
            world
                .post(&format!("/v1/capsules/{id}/links"), body)
                .await
                .refused(400, "invalid_request");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visit_wakes_a_paused_capsule_whose_team_wants_that() {
    let world = World::new().await;
    let port = program().await;
    let made = world
        .post(
            "/v1/capsules",
            json!({"auto_resume": true, "ports": "public"}),
        )
        .await
        .is(201)
        .json();
    assert_eq!(made["auto_resume"], true);
    let id = made["id"].as_str().unwrap();
    world
        .post(&format!("/v1/capsules/{id}/pause"), json!({}))
        .await
        .is(200);
    visit(&world, &format!("{port}-{id}.localhost"), "/", &[])
        .await
        .is(200);
    let now = world.get(&format!("/v1/capsules/{id}")).await.json();
    assert_eq!(now["status"], "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_as_they_are_sent() {
    for world in both_ways().await {
        let (id, port) = (world.capsule().await, program().await);
        let request = world
            .request(Method::GET, "/events")
            .header("host", format!("{port}-{id}.localhost"))
            .header("x-api-key", KEY)
            .body(full(String::new()))
            .unwrap();
        let mut body = world.open(request).await.into_body();
        let frame = time::timeout(PATIENCE, body.frame())
            .await
            .expect("in time")
            .unwrap()
            .unwrap();
        assert_eq!(frame.data_ref().unwrap(), "data: one\n\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_goes_through() {
    for world in both_ways().await {
        let id = world.capsule().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
            while let Some(Ok(message)) = socket.next().await {
                if !message.is_close() {
                    socket.send(message).await.unwrap();
                }
            }
        });
        let mut request = format!("ws://{port}-{id}.localhost:1/socket")
            .into_client_request()
            .unwrap();
        request
            .headers_mut()
            .insert("x-api-key", KEY.parse().unwrap());
        let stream = TcpStream::connect(world.address).await.unwrap();
        let (mut socket, _) = tokio_tungstenite::client_async(request, stream)
            .await
            .expect("open");
        let sent = Message::binary(vec![7; 300_000]);
        socket.send(sent.clone()).await.unwrap();
        let echoed = time::timeout(PATIENCE, socket.next())
            .await
            .expect("in time")
            .unwrap();
        assert_eq!(echoed.unwrap(), sent);
        world.stop_sessions().await;
        let cut = time::timeout(PATIENCE, socket.next())
            .await
            .expect("in time");
        assert!(matches!(cut, None | Some(Err(_))), "{cut:?}");
    }
}

/// A connection of HTTP/2 that begins with it, as to a server that is known to speak it.
async fn http2(world: &World) -> SendRequest<Body> {
    let stream = TcpStream::connect(world.address).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

/// A request of HTTP/2 to `host`, with the key.
fn to(host: &str, method: Method, path: &str) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(format!("http://{host}{path}"))
        .version(Version::HTTP_2)
        .header("x-api-key", KEY)
}

async fn whole(answer: Response<Incoming>) -> (Parts, Bytes, Option<HeaderMap>) {
    let (parts, body) = answer.into_parts();
    let collected = time::timeout(PATIENCE, body.collect()).await;
    let collected = collected.expect("in time").unwrap();
    let trailers = collected.trailers().cloned();
    (parts, collected.to_bytes(), trailers)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_of_http_2_reaches_a_program_of_http_1_and_the_interface() {
    for world in both_ways().await {
        let (id, port) = (world.capsule().await, program().await);
        let host = format!("{port}-{id}.localhost:99");
        let mut sender = http2(&world).await;
        let request = to(&host, Method::PUT, "/x/?q=%20")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .header("te", "trailers")
            .body(streamed(stream::iter([
                Bytes::from_static(b"two "),
                Bytes::from_static(b"pieces"),
            ])))
            .unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.version(), Version::HTTP_2);
        let (parts, body, _) = whole(answer).await;
        assert_eq!(parts.status, 200, "{body:?}");
        assert_eq!(parts.headers.get("x-hop"), None);
        assert_eq!(parts.headers.get("connection"), None);
        let seen: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(seen["method"], "PUT");
        assert_eq!(seen["uri"], "/x/?q=%20");
        assert_eq!(seen["body"], "two pieces");
        assert_eq!(header(&seen, "host"), Some(&*host));
        assert_eq!(header(&seen, "x-forwarded-host"), Some(&*host));
        assert_eq!(header(&seen, "cookie"), Some("a=1; b=2"));
        assert_eq!(header(&seen, "te"), None);
        assert_eq!(header(&seen, "x-api-key"), None);

        // The interface, on the same connection and at the same time.
        let here = world.address.to_string();
        let asked = (0..20).map(|_| {
            let request = to(&here, Method::GET, &format!("/v1/capsules/{id}"));
            let sent = sender.send_request(request.body(full("")).unwrap());
            async { whole(sent.await.unwrap()).await }
        });
        for (parts, body, _) in join_all(asked).await {
            assert_eq!(parts.status, 200);
            let shown: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(shown["id"], id);
        }
        let tunnel = Request::builder()
            .method(Method::CONNECT)
            .uri(format!("{port}-{id}.localhost:80"))
            .header("x-api-key", KEY);
        let refused = sender.send_request(tunnel.body(full("")).unwrap()).await;
        assert_eq!(refused.unwrap().status(), 405);
        let socket = to(&here, Method::GET, &format!("/v1/capsules/{id}/pty"));
        let refused = sender.send_request(socket.body(full("")).unwrap()).await;
        let (parts, body, _) = whole(refused.unwrap()).await;
        let refusal: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(parts.status, 400, "{refusal}");
        assert_eq!(refusal["error"]["code"], "invalid_request");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_as_they_are_sent_over_http_2() {
    for world in both_ways().await {
        let (id, port) = (world.capsule().await, program().await);
        let mut sender = http2(&world).await;
        let request = to(&format!("{port}-{id}.localhost"), Method::GET, "/events");
        let answer = sender.send_request(request.body(full("")).unwrap()).await;
        let mut body = answer.unwrap().into_body();
        let frame = time::timeout(PATIENCE, body.frame()).await;
        let frame = frame.expect("in time").unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap(), "data: one\n\n");
    }
}

/// A program of gRPC's kind: speaks nothing but HTTP/2, answers piece by piece while it is still being sent to, and
/// says behind the last piece how it went.
async fn echo_with_trailers() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = async |request: Request<Incoming>| {
        let asked = request.headers();
        assert_eq!(asked["te"], "trailers");
        assert_eq!(asked.get("connection"), None);
        let authority = request.uri().authority().unwrap().to_string();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        trailers.insert("x-authority", authority.parse().unwrap());
        let last = stream::iter([Ok(Frame::trailers(trailers))]);
        let pieces = BodyDataStream::new(request.into_body());
        let pieces = pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece.unwrap())));
        let answer = Response::builder().header("content-type", "application/grpc");
        Ok::<_, Infallible>(answer.body(StreamBody::new(pieces.chain(last))).unwrap())
    };
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service_fn(echo));
            tokio::spawn(served);
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_grpc_goes_both_ways_at_once_and_ends_with_its_trailers() {
    for world in both_ways().await {
        let (id, port) = (world.capsule().await, echo_with_trailers().await);
        let host = format!("{port}-{id}.localhost");
        let mut sender = http2(&world).await;
        for _ in 0..3 {
            let (pieces, sent) = futures::channel::mpsc::unbounded();
            let request = to(&host, Method::POST, "/service/Call")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(streamed(sent))
                .unwrap();
            pieces.unbounded_send(Bytes::from_static(b"first")).unwrap();
            let answer = time::timeout(PATIENCE, sender.send_request(request)).await;
            let answer = answer.expect("in time").unwrap();
            assert_eq!(answer.status(), 200);
            let mut body = answer.into_body();
            let mut next = async || {
                let frame = time::timeout(PATIENCE, body.frame()).await;
                frame.expect("in time").unwrap().unwrap()
            };
            assert_eq!(next().await.data_ref().unwrap(), "first");
            pieces
                .unbounded_send(Bytes::from_static(b"second"))
                .unwrap();
            assert_eq!(next().await.data_ref().unwrap(), "second");
            drop(pieces);
            let trailers = next().await.into_trailers().unwrap();
            assert_eq!(trailers["grpc-status"], "0");
            assert_eq!(trailers["x-authority"], host);
        }
        // A program that does not speak it is said to have broken off.
        let other = format!("{}-{id}.localhost", program().await);
        let request = to(&other, Method::POST, "/service/Call")
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers")
            .body(full("x"))
            .unwrap();
        let (parts, body, _) = whole(sender.send_request(request).await.unwrap()).await;
        assert_eq!(parts.status, 502, "{body:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offer_to_change_to_http_2_is_answered_in_http_1() {
    let world = World::new().await;
    let (id, port) = (world.capsule().await, program().await);
    let offer = [
        ("x-api-key", KEY),
        ("connection", "Upgrade, HTTP2-Settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAMAAABkAAQAoAAAAAIAAAAA"),
    ];
    let answer = visit(&world, &format!("{port}-{id}.localhost"), "/", &offer).await;
    let seen = answer.is(200).json();
    for name in ["connection", "upgrade", "http2-settings"] {
        assert_eq!(header(&seen, name), None);
    }
}

#[tokio::test]
async fn a_connection_that_asks_for_nothing_is_closed_whatever_it_began_with() {
    let world = World::new().await;
    let mut silent = Vec::new();
    // Nothing; less than tells the versions apart; all of a preface and no more; and a whole greeting.
    let greeting = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    for sent in [&b""[..], b"PR", PREFACE, &greeting] {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(sent).await.unwrap();
        silent.push(stream);
    }
    // One that was asked something, and is idle since.
    let mut sender = http2(&world).await;
    let request = to("localhost", Method::GET, "/healthz");
    whole(
        sender
            .send_request(request.body(full("")).unwrap())
            .await
            .unwrap(),
    )
    .await;
    // All have been accepted, as one that came later was answered. From here on time stands still but for timers.
    time::pause();
    for mut stream in silent {
        let mut last = Vec::new();
        let read = time::timeout(PATIENCE * 2, stream.read_to_end(&mut last)).await;
        assert!(read.is_ok(), "it is still open");
    }
    let closed = time::timeout(PATIENCE * 2, future::poll_fn(|cx| sender.poll_ready(cx))).await;
    assert!(closed.is_ok());
}
