//! Requests that make no sense, and what each is answered: never a panic, a hang or half a capsule.

use serde_json::{Value, json};
use wrenn_cluster_tests::client::{Answer, form, form_type};
use wrenn_cluster_tests::world::World;

/// An id of the right shape that nobody has.
const NOBODY: &str = "cl-0000000000000000000000001";

fn invalid() -> (u16, String) {
    (400, "invalid_request".into())
}

fn not_found() -> (u16, String) {
    (404, "not_found".into())
}

/// A request with a body that need not be JSON.
fn post(world: &World, path: &str, body: &[u8]) -> Answer {
    let key = world.key();
    let headers = [
        ("X-API-Key", key.as_str()),
        ("Content-Type", "application/json"),
    ];
    world
        .send("POST", path, &headers, Some(body))
        .expect("an answer")
}

#[test]
fn bad_creates_are_refused_before_anything_is_made() {
    let world = World::new();
    for template in [
        "",
        "..",
        "../minimal",
        "a/b",
        "a\u{0}b",
        "a\nb",
        "-a",
        "a b",
        &"a".repeat(65),
    ] {
        refused_create(&world, &json!({ "template": template }), &invalid());
    }
    refused_create(&world, &json!({ "template": "no-such" }), &not_found());
    for bad in [
        json!({ "vcpus": 65 }),
        json!({ "vcpus": i64::MAX }),
        json!({ "vcpus": "two" }),
        json!({ "vcpus": 1.5 }),
        json!({ "memory_mb": 1 }),
        json!({ "memory_mb": i64::MAX }),
        json!({ "memory_mb": 1.0e300 }),
        json!({ "timeout_sec": -1 }),
        json!({ "timeout_sec": i64::MAX }),
        json!({ "metadata": { "a b": "c" } }),
        json!({ "metadata": { "kernel_version": "mine" } }),
        json!({ "metadata": { "k": "v".repeat(65) } }),
        json!({ "metadata": { "k": 1 } }),
        json!({ "template": 7 }),
        json!([]),
        json!("minimal"),
        json!(null),
    ] {
        refused_create(&world, &bad, &invalid());
    }
    // Sizes that are zero or negative mean the defaults, and a terabyte is a size; there is no
    // room for it here.
    let huge = json!({ "memory_mb": 1 << 20, "vcpus": 0 });
    refused_create(&world, &huge, &(503, "no_hosts_available".into()));
    unreadable_bodies(&world);
    world.wait_only(&[]);
}

fn refused_create(world: &World, request: &Value, expected: &(u16, String)) {
    let answer = world.call("POST", "/v1/capsules", Some(request));
    assert_eq!(
        &answer.refusal(),
        expected,
        "{request}: {}",
        answer.message()
    );
    assert_ne!(answer.message(), "", "{request}");
    assert!(world.listed().is_empty(), "{request} made something");
}

fn unreadable_bodies(world: &World) {
    for body in [
        &b""[..],
        b"{",
        b"{\"template\":",
        b"not json",
        b"\xff\xfe",
        b"{}{}",
        &b"[".repeat(100_000),
    ] {
        assert_eq!(post(world, "/v1/capsules", body).refusal(), invalid());
    }
    let large = format!("{{\"template\":\"{}\"}}", "a".repeat(2 << 20));
    let answer = post(world, "/v1/capsules", large.as_bytes());
    assert_eq!(answer.refusal(), (413, "too_large".into()));
    let head = format!(
        "POST /v1/capsules HTTP/1.1\r\nHost: x\r\nX-API-Key: {}\r\n",
        world.key()
    );
    for rest in [
        "Content-Length: 100\r\n\r\n{\"template\":",
        "Transfer-Encoding: chunked\r\n\r\n5\r\n{\"te",
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "Content-Length: -1\r\n\r\n",
    ] {
        let answer = world.send_raw(format!("{head}{rest}").as_bytes());
        // A body that breaks off may be answered or hung up on; it is never taken.
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{rest:?}: {answer}"
        );
    }
    for noise in [
        &b"\0\0\0\0"[..],
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\0",
        &[b'A'; 100_000],
    ] {
        let answer = world.send_raw(noise);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
    }
    assert_eq!(world.get("/healthz").map(|it| it.status), Some(200));
}

#[test]
fn bad_names_and_routes_are_refused_by_name() {
    let world = World::new();
    for id in [
        "x",
        "cl-",
        "cl-..",
        "..%2f..%2fetc",
        "cl-%00",
        &format!("{NOBODY}0"),
        &NOBODY.to_uppercase(),
    ] {
        for (method, rest) in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/ping"),
            ("GET", "/processes"),
        ] {
            let answer = world.about(method, id, rest, None);
            assert_eq!(
                answer.refusal(),
                invalid(),
                "{method} {id}{rest}: {}",
                answer.message()
            );
        }
    }
    for (method, rest, body) in [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/ping", None),
        ("GET", "/processes", None),
        ("DELETE", "/processes/1", None),
        ("POST", "/exec", Some(json!({ "cmd": "true" }))),
        (
            "POST",
            "/files/read",
            Some(json!({ "path": "/etc/hostname" })),
        ),
        ("POST", "/files/remove", Some(json!({ "path": "/" }))),
    ] {
        let answer = world.about(method, NOBODY, rest, body.as_ref());
        assert_eq!(
            answer.refusal(),
            not_found(),
            "{method} {rest}: {}",
            answer.message()
        );
    }
    assert_eq!(
        world.call("GET", "/v1/no-such-route", None).refusal(),
        not_found()
    );
    assert_eq!(world.call("PATCH", "/v1/capsules", None).status, 405);
    let known = world.key();
    let unknown = format!("wrn_{}", "0".repeat(32));
    for key in ["", "x", &known[..known.len() - 1], &unknown] {
        let answer = world.send("GET", "/v1/capsules", &[("X-API-Key", key)], None);
        assert_eq!(
            answer.expect("an answer").refusal(),
            (401, "unauthorized".into()),
            "{key}"
        );
    }
    let keyless = world.get("/v1/capsules").expect("an answer");
    assert_eq!(keyless.refusal(), (401, "unauthorized".into()));
}

#[test]
fn bad_commands_and_files_leave_the_capsule_usable() {
    let world = World::new();
    let id = world.capsule();
    bad_commands(&world, &id);
    bad_files(&world, &id);
    bad_forms(&world, &id);
    assert_eq!(world.output(&id, "echo usable"), "usable");
    assert_eq!(world.listed(), std::slice::from_ref(&id));
    world.wait_only(&[&id]);
}

fn bad_commands(world: &World, id: &str) {
    for request in [
        json!({}),
        json!({ "cmd": "" }),
        json!({ "cmd": "a\u{0}b" }),
        json!({ "cmd": "true", "args": "-c" }),
        json!({ "cmd": "true", "args": ["a\u{0}"] }),
        json!({ "cmd": "true", "envs": { "A=B": "c" } }),
        json!({ "cmd": "true", "timeout_sec": -1 }),
        json!({ "cmd": "true", "timeout_sec": i64::MAX }),
        json!({ "cmd": "true", "cwd": "/no/such/directory" }),
        json!({ "cmd": "true", "background": true, "tag": "a\nb" }),
    ] {
        let answer = world.run(id, &request);
        assert_eq!(
            answer.refusal(),
            invalid(),
            "{request}: {}",
            answer.message()
        );
    }
    let absent = world.run(id, &json!({ "cmd": "no-such-program" }));
    let refused = absent.status >= 400 && absent.status != 500;
    assert!(
        refused || absent.json()["exit_code"] == 127,
        "{}",
        absent.json()
    );
    for selector in ["4294967295", "4294967296", "no-such-tag", "%00", "..%2f"] {
        let answer = world.about("DELETE", id, &format!("/processes/{selector}"), None);
        let (status, _) = answer.refusal();
        assert!(matches!(status, 400 | 404), "{selector}: {}", answer.json());
    }
}

fn bad_files(world: &World, id: &str) {
    let long = format!("/{}", "a".repeat(5000));
    for call in ["read", "list", "mkdir", "remove", "stream/read"] {
        for path in ["", "relative", "../etc/passwd", "/a\u{0}b", &long] {
            let request = json!({ "path": path });
            let answer = world.about("POST", id, &format!("/files/{call}"), Some(&request));
            assert_eq!(
                answer.refusal(),
                invalid(),
                "{call} {path:?}: {}",
                answer.message()
            );
        }
        let answer = world.about(
            "POST",
            id,
            &format!("/files/{call}"),
            Some(&json!({ "path": 1 })),
        );
        assert_eq!(answer.refusal(), invalid());
    }
    // What a directory is not, and what is not there.
    for (call, path, expected) in [
        ("read", "/etc", invalid()),
        ("list", "/etc/hostname", invalid()),
        ("read", "/no/such", not_found()),
        ("list", "/no/such", not_found()),
    ] {
        let answer = world.about(
            "POST",
            id,
            &format!("/files/{call}"),
            Some(&json!({ "path": path })),
        );
        assert_eq!(answer.refusal(), expected, "{call} {path}");
    }
}

fn bad_forms(world: &World, id: &str) {
    let (kind, whole) = form("/tmp/made", b"contents");
    for route in ["files/write", "files/stream/write"] {
        for (kind, body) in [
            ("application/json", &b"{}"[..]),
            ("multipart/form-data", &whole),
            (&form_type(), b""),
            (&form_type(), b"no form at all"),
            (&form_type(), &whole[..whole.len() / 2]),
            (&form_type(), &whole[..whole.len() - 10]),
        ] {
            let answer = world.send_form(id, route, kind, body);
            assert_eq!(answer.refusal(), invalid(), "{route}: {}", answer.message());
        }
        let (_, to_nowhere) = form("relative", b"");
        assert_eq!(
            world.send_form(id, route, &kind, &to_nowhere).refusal(),
            invalid()
        );
        // What broke off is no file.
        assert_eq!(
            world.exec(id, "test -e /tmp/made")["exit_code"],
            1,
            "{route}"
        );
    }
    let large = vec![0; (100 << 20) + 1];
    let answer = world.upload(id, "files/write", "/tmp/large", &large);
    assert_eq!(answer.refusal(), (413, "too_large".into()));
}
