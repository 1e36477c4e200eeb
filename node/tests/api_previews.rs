//! Visits to the ports of capsules, with real programs behind them, at the node that owns the sandbox and at
//! another.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod api_world;

use std::convert::Infallible;

use api_world::{ADMIN_KEY, Answer, Body, KEY, OTHER_KEY, PATIENCE, World, full, streamed};
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _, stream};
use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::time;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

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
