//! What the interface does with requests that nobody should send.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::Method;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use proto::ids::KeyId;
use raft::command::Command;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::world::{ADMIN_KEY, KEY, World, full, streamed};

const ID: &str = "cl-0000000000000000000000001";

/// Every route that wants a key: method, path, and whether it reads JSON.
fn routes(id: &str) -> Vec<(Method, String, bool)> {
    let capsule = format!("/v1/capsules/{id}");
    let mut all = vec![
        (Method::POST, "/v1/capsules".into(), true),
        (Method::GET, "/v1/capsules".into(), false),
        (Method::GET, "/v1/nodes".into(), false),
        (Method::GET, "/v1/snapshots".into(), false),
        (Method::GET, capsule.clone(), false),
        (Method::DELETE, format!("{capsule}/processes/1"), false),
        (Method::GET, "/v1/tokens".into(), false),
        (Method::POST, "/v1/tokens".into(), true),
        (Method::DELETE, format!("/v1/tokens/{id}"), false),
        (Method::GET, "/v1/nodes/node-9".into(), false),
        (Method::DELETE, "/v1/nodes/node-9".into(), false),
        (Method::POST, "/v1/nodes/node-9/cordon".into(), false),
        (Method::POST, "/v1/nodes/node-9/uncordon".into(), false),
        (Method::POST, "/v1/nodes/node-9/drain".into(), true),
        (Method::PUT, "/v1/nodes/node-9/tags".into(), true),
        (Method::GET, "/v1/cluster".into(), false),
        (Method::PATCH, "/v1/cluster".into(), true),
    ];
    for (rest, json) in [
        ("ping", false),
        ("exec", true),
        ("files/read", true),
        ("files/list", true),
        ("files/mkdir", true),
        ("files/remove", true),
        ("files/stream/read", true),
        ("files/write", false),
        ("files/stream/write", false),
    ] {
        all.push((Method::POST, format!("{capsule}/{rest}"), json));
    }
    for rest in ["processes", "logs"] {
        all.push((Method::GET, format!("{capsule}/{rest}"), false));
    }
    all
}

#[tokio::test]
async fn every_route_wants_a_key_that_is_known() {
    let world = World::new().await;
    let keys = [
        None,
        Some(""),
        Some("wrn_"),
        Some("wrn_00000000000000000000000000000003"),
        Some("WRN_00000000000000000000000000000001"),
        Some("' OR 1=1 --"),
    ];
    for (method, path, _) in routes(ID) {
        for key in keys {
            for prefix in ["", "/api"] {
                let mut request = world.request(method.clone(), &format!("{prefix}{path}"));
                if let Some(key) = key {
                    request = request.header("x-api-key", key);
                }
                let answer = world.send(request.body(full("{}")).unwrap()).await;
                assert_eq!(
                    (answer.status, answer.code().as_str()),
                    (401, "unauthorized"),
                    "{method} {path} {key:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_bearer_token_is_as_good_and_a_revoked_key_no_good() {
    let world = World::new().await;
    let ask = async || {
        let request = world
            .request(Method::GET, "/v1/capsules")
            .header("authorization", format!("Bearer {KEY}"));
        world.send(request.body(full("")).unwrap()).await
    };
    ask().await.is(200);
    let revoke = Command::RevokeKey(KeyId([1; 16]));
    crate::world::propose(&world.proposer, revoke).await;
    ask().await.refused(401, "unauthorized");
}

#[tokio::test]
async fn signs_of_life_and_the_description_are_open() {
    let world = World::new().await;
    for path in ["/healthz", "/health", "/metrics", "/openapi.json"] {
        let request = world.request(Method::GET, path);
        world.send(request.body(full("")).unwrap()).await.is(200);
    }
    let health = world.get("/health").await.json();
    assert_eq!(
        (&health["status"], &health["version"]),
        (&json!("ok"), &json!("1.2.3"))
    );
}

#[tokio::test]
async fn the_description_has_every_route_that_is_served() {
    let world = World::new().await;
    let description = world.get("/openapi.json").await.json();
    for (method, path, _) in routes("{id}") {
        let path = path.replace("processes/1", "processes/{selector}");
        let path = path.replace("node-9", "{node}");
        let operation = &description["paths"][&path][method.as_str().to_lowercase()];
        assert!(
            operation["responses"]["default"].is_object(),
            "{method} {path}"
        );
        assert!(
            operation["security"][0]["api_key"].is_array(),
            "{method} {path}"
        );
    }
    assert!(description["components"]["schemas"]["Capsule"]["properties"]["node"].is_object());
}

#[tokio::test]
async fn unknown_routes_and_wrong_methods_have_the_envelope() {
    let world = World::new().await;
    for path in [
        "/",
        "/v1",
        "/v2/capsules",
        "/api/nothing",
        "/v1/capsules/",
        "/v1/capsules/a/b/c/d",
    ] {
        world.get(path).await.refused(404, "not_found");
    }
    for (method, path) in [
        (Method::PUT, "/v1/capsules"),
        (Method::DELETE, "/v1/nodes"),
        (Method::POST, "/healthz"),
        (Method::PUT, &format!("/api/v1/capsules/{ID}")),
    ] {
        let answer = world.ask(method, path, KEY, "").await;
        answer.refused(405, "method_not_allowed");
    }
}

#[tokio::test]
async fn routes_that_come_later_say_what_they_wait_for() {
    let world = World::new().await;
    for (method, path, word) in [
        (Method::POST, "/v1/me/password", "api-keys"),
        (Method::POST, "/auth/oauth/github", "api-keys"),
        (Method::POST, "/v1/hosts/register", "POST /v1/hosts"),
        (Method::PUT, "/api/v1/admin/teams/x/byoc", "/v1/nodes"),
    ] {
        let answer = world.ask(method, path, ADMIN_KEY, "").await;
        answer.refused(501, "not_implemented");
        assert!(
            String::from_utf8_lossy(&answer.body).contains(word),
            "{path}"
        );
    }
}

#[tokio::test]
async fn malformed_ids_are_refused() {
    let world = World::new().await;
    let long = "z".repeat(5000);
    let zs = format!("cl-{}", "z".repeat(25));
    for id in [
        "x",
        "cl-",
        "cl-1",
        "CL-0000000000000000000000001",
        "%00",
        "%ff",
        "..%2f..",
        "cl-%20",
        &zs,
        &long,
    ] {
        let answer = world.get(&format!("/v1/capsules/{id}")).await;
        answer.refused(400, "invalid_request");
    }
}

#[tokio::test]
async fn bodies_that_are_no_json_of_the_right_kind_are_refused_and_make_nothing() {
    let world = World::new().await;
    let deep = "[".repeat(100_000);
    for body in [
        "",
        "{",
        "nonsense",
        "null",
        "[]",
        "\"text\"",
        "{\"template\":",
        "{\"template\": 1}",
        "{\"vcpus\": \"2\"}",
        "{\"vcpus\": 1.5}",
        "{\"vcpus\": 1e30}",
        "{\"vcpus\": 99999999999999999999}",
        "{\"vcpus\": 100000}",
        "{\"memory_mb\": 9223372036854775807}",
        "{\"memory_mb\": 1}",
        "{\"timeout_sec\": -1}",
        "{\"timeout_sec\": 99999999999}",
        "{\"metadata\": {\"a\": 1}}",
        "{\"metadata\": []}",
        "{\"metadata\": {\"../x\": \"\"}}",
        "{\"template\": \"..\"}",
        "{\"template\": \"../../etc/passwd\"}",
        "{\"template\": \"a\\u0000b\"}",
        "{\"template\": \"a\\nb\"}",
        "{\"template\": \"\"}",
        "{} {}",
        &deep,
    ] {
        let answer = world.ask(Method::POST, "/v1/capsules", KEY, body).await;
        let shown: String = body.chars().take(60).collect();
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (400, "invalid_request"),
            "{shown}"
        );
    }
    assert_eq!(world.proposer.view().state().sandboxes().count(), 0);
}

#[tokio::test]
async fn a_json_body_past_the_limit_is_too_large_announced_or_not() {
    let world = World::new().await;
    let huge = format!("{{\"template\": \"{}\"}}", "a".repeat(2 << 20));
    let answer = world.ask(Method::POST, "/v1/capsules", KEY, &huge).await;
    answer.refused(413, "too_large");
    let pieces = stream::iter(std::iter::repeat_n(Bytes::from(vec![b' '; 64 << 10]), 64));
    let request = world
        .request(Method::POST, "/v1/capsules")
        .header("x-api-key", KEY);
    let answer = world.send(request.body(streamed(pieces)).unwrap()).await;
    answer.refused(413, "too_large");
    let fits = format!("{{\"x\": \"{}\"}}", "a".repeat(1_000_000));
    world
        .ask(Method::POST, "/v1/capsules", KEY, &fits)
        .await
        .is(201);
}

#[tokio::test]
async fn a_body_that_breaks_off_makes_nothing_and_harms_nobody() {
    let world = World::new().await;
    let mut raw = TcpStream::connect(world.address)
        .await
        .expect("a connection");
    let head = format!(
        "POST /v1/capsules HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-length: 100\r\n\r\n{{\"vcpus\""
    );
    raw.write_all(head.as_bytes()).await.expect("sent");
    raw.shutdown().await.expect("half closed");
    let mut answer = Vec::new();
    let read = tokio::time::timeout(crate::world::PATIENCE, raw.read_to_end(&mut answer));
    read.await.expect("in time").expect("an end");
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
        "{answer}"
    );
    assert_eq!(world.proposer.view().state().sandboxes().count(), 0);
    world.get("/healthz").await.is(200);
}

#[tokio::test]
async fn nonsense_on_the_wire_leaves_the_node_serving() {
    let world = World::new().await;
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/capsules HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        &[b'a'; 200_000],
    ] {
        let mut raw = TcpStream::connect(world.address)
            .await
            .expect("a connection");
        // The node may hang up in the middle.
        let _ = raw.write_all(bytes).await;
        let _ = raw.shutdown().await;
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), raw.read_to_end(&mut answer));
        let _reset = read.await.expect("the node hangs up");
        assert!(
            !answer.starts_with(b"HTTP/1.1 5"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    world.get("/healthz").await.is(200);
}

/// Statuses that random requests may get. None of them says that the node itself failed.
const DEFINED: [u16; 11] = [200, 201, 202, 204, 400, 404, 405, 409, 413, 502, 503];

#[test]
fn random_bytes_on_every_route_get_defined_answers() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let world = runtime.block_on(World::new());
    let id = runtime.block_on(world.capsule());
    let routes: Vec<_> = routes(&id)
        .into_iter()
        // Creating would fill the node, and the agent's paths are this machine's.
        .filter(|(_, path, _)| path != "/v1/capsules")
        .filter(|(_, path, _)| !path.ends_with("remove") && !path.ends_with("mkdir"))
        .collect();
    let body = prop_oneof![
        any::<Vec<u8>>(),
        "\\PC{0,200}".prop_map(String::into_bytes),
        "\\{\"(path|depth|args|envs|cmd)\": ?(\"/no-such/[a-z/.]{0,9}\"|[0-9\\-.]{1,9}|null|\\[\\]|\\{\\})\\}"
            .prop_map(String::into_bytes),
        Just(b"--xyz\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n".to_vec()),
    ];
    let types = proptest::sample::select(vec![
        "application/json",
        "multipart/form-data; boundary=xyz",
        "multipart/form-data; boundary=\"",
        "text/plain",
    ]);
    let mut runner = TestRunner::new(Config {
        cases: 300,
        ..Config::default()
    });
    let request = (0..routes.len(), body, types);
    let outcome = runner.run(&request, |(at, body, content_type)| {
        let (method, path, _) = &routes[at];
        let is_own = path.starts_with("/v1/capsules");
        let request = world
            .request(method.clone(), path)
            .header("x-api-key", if is_own { KEY } else { ADMIN_KEY })
            .header("content-type", content_type)
            .body(full(body))
            .expect("a request");
        let answer = runtime.block_on(world.send(request));
        prop_assert!(
            DEFINED.contains(&answer.status),
            "{method} {path}: {answer:?}"
        );
        if answer.status >= 400 {
            prop_assert!(!answer.code().is_empty());
        }
        Ok(())
    });
    outcome.expect("only defined answers");
}

#[test]
fn random_create_requests_keep_the_bounds_of_what_they_make() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let world = runtime.block_on(World::new());
    let number = || {
        prop_oneof![
            any::<i64>().prop_map(|it| json!(it)),
            (-5..300_i64).prop_map(|it| json!(it)),
            Just(json!(null)),
            Just(json!("x"))
        ]
    };
    let request = (number(), number(), number(), "\\PC{0,12}");
    let mut runner = TestRunner::new(Config {
        cases: 100,
        ..Config::default()
    });
    let outcome = runner.run(&request, |(vcpus, memory_mb, timeout_sec, label)| {
        let body = json!({"vcpus": vcpus, "memory_mb": memory_mb, "timeout_sec": timeout_sec, "metadata": {"k": label}});
        let answer = runtime.block_on(world.post("/v1/capsules", body));
        prop_assert!([201, 400, 503].contains(&answer.status), "{answer:?}");
        if answer.status == 201 {
            let capsule = answer.json();
            prop_assert!((1..=64).contains(&capsule["vcpus"].as_u64().unwrap()));
            prop_assert!(capsule["memory_mb"].as_u64().unwrap() >= 128);
            let path = format!("/v1/capsules/{}", capsule["id"].as_str().unwrap());
            prop_assert_eq!(runtime.block_on(world.delete(&path)).status, 204);
        }
        Ok(())
    });
    outcome.expect("only defined answers");
}
