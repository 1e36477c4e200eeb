//! Whatever is sent, the real agent refuses it with the right code, keeps its size and goes on.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Duration;

use buffa::Message as _;
use bytes::Bytes;
use common::{BOTH, Codec, Envd, basic, by_pid, by_tag, command, full, shell, soon, streamed};
use futures::{StreamExt, stream};
use http::{Method, Request};
use proto::envd::{filesystem as files, process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Resident memory of an agent that has been through a test; built without optimisation and by the
/// allocator of the C library it idles at some 15 MiB.
const SOUND_MIB: u64 = 96;

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % bound.max(1)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let byte = |_| u8::try_from(self.below(256)).expect("a byte");
        (0..length).map(byte).collect()
    }

    /// A damaged copy: a bit, a byte, a piece or the end is not what it was.
    fn damage(&mut self, sound: &[u8]) -> Vec<u8> {
        let mut bytes = sound.to_vec();
        for _ in 0..=self.below(4) {
            let place = self.below(bytes.len());
            match self.below(5) {
                0 if !bytes.is_empty() => bytes[place] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[place] = self.bytes(1)[0],
                2 => bytes.truncate(place),
                3 => {
                    let piece = self.below(16);
                    let piece = self.bytes(piece);
                    bytes.splice(place..place, piece);
                }
                _ => bytes.extend_from_slice(&sound[self.below(sound.len())..]),
            }
        }
        bytes
    }
}

/// Sends `bytes` and reads until the agent closes, or says nothing more for a moment.
async fn raw(envd: &Envd, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(&envd.address).await.expect("connected");
    // The agent may have closed in the middle of it.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = vec![0; 64 * 1024];
    let mut filled = 0;
    let read = async {
        while let Ok(read @ 1..) = stream.read(&mut answer[filled..]).await {
            filled += read;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), read).await;
    answer.truncate(filled);
    answer
}

/// A whole request on the wire.
fn plain(method: &str, path: &str, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\
         content-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

fn call(method: &str, message: &Value) -> Vec<u8> {
    let json = "content-type: application/json\r\n";
    plain("POST", &format!("/{method}"), json, message.to_string())
}

/// Sound requests that change nothing, however they are damaged.
fn looks() -> Vec<Vec<u8>> {
    let start = json!({"process": {"cmd": "/bin/true", "args": ["x"], "envs": {"A": "1"}}});
    let start = start.to_string();
    let length = u32::try_from(start.len()).expect("short");
    let start = [&[0][..], &length.to_be_bytes(), start.as_bytes()].concat();
    let stream_type = "content-type: application/connect+json\r\n";
    let ranged = "range: bytes=1-3\r\naccept-encoding: gzip;q=0.5\r\n";
    let signal = json!({"process": {"pid": 4_000_000}, "signal": "SIGNAL_SIGKILL"});
    let input = json!({"process": {"tag": "x"}, "input": {"stdin": "AAAA"}});
    let update = json!({"process": {"pid": 1}, "pty": {"size": {"cols": 1, "rows": 1}}});
    let listing = json!({"path": "/etc/default", "depth": 2});
    vec![
        plain("GET", "/health", "", ""),
        plain("GET", "/metrics", "", ""),
        plain("GET", "/envs", "", ""),
        plain("GET", "/files?path=/etc/passwd&username=root", ranged, ""),
        plain("POST", "/process.Process/Start", stream_type, start),
        call("process.Process/List", &json!({})),
        call("process.Process/SendSignal", &signal),
        call("process.Process/SendInput", &input),
        call("process.Process/Update", &update),
        call(
            "filesystem.Filesystem/Stat",
            &json!({"path": "/etc/passwd"}),
        ),
        call("filesystem.Filesystem/ListDir", &listing),
        call(
            "filesystem.Filesystem/CreateWatcher",
            &json!({"path": "/etc"}),
        ),
        call(
            "filesystem.Filesystem/GetWatcherEvents",
            &json!({"watcherId": "w1"}),
        ),
    ]
}

/// As [`looks`], in the other codec: the frames that our own host sends.
fn frames() -> Vec<Vec<u8>> {
    let start = process::StartRequest {
        tag: Some("t".into()),
        ..command("/bin/true", &["x"])
    };
    let signal = process::SendSignalRequest {
        process: by_pid(4_000_000).into(),
        signal: process::Signal::SIGNAL_SIGTERM.into(),
        ..Default::default()
    };
    let connect = process::ConnectRequest {
        process: by_tag("none").into(),
        ..Default::default()
    };
    let listing = files::ListDirRequest {
        path: "/etc/default".into(),
        depth: 2,
        ..Default::default()
    };
    let watch = files::CreateWatcherRequest {
        path: "/etc".into(),
        recursive: true,
        ..Default::default()
    };
    let unary = |method: &str, message: &[u8]| {
        let proto = "content-type: application/proto\r\nconnect-protocol-version: 1\r\n";
        plain("POST", &format!("/{method}"), proto, message)
    };
    let streamed = |method: &str, message: &[u8]| {
        let proto = "content-type: application/connect+proto\r\nconnect-timeout-ms: 1000\r\n";
        let length = u32::try_from(message.len()).expect("short");
        let frame = [&[0][..], &length.to_be_bytes(), message].concat();
        plain("POST", &format!("/{method}"), proto, frame)
    };
    vec![
        streamed("process.Process/Start", &start.encode_to_bytes()),
        streamed("process.Process/Connect", &connect.encode_to_bytes()),
        streamed("process.Process/StreamInput", &connect.encode_to_bytes()),
        unary("process.Process/SendSignal", &signal.encode_to_bytes()),
        unary("filesystem.Filesystem/ListDir", &listing.encode_to_bytes()),
        unary(
            "filesystem.Filesystem/CreateWatcher",
            &watch.encode_to_bytes(),
        ),
    ]
}

/// Sound requests that might change something.
fn changes() -> Vec<Vec<u8>> {
    let octets = "content-type: application/octet-stream\r\nx-metadata-a: b\r\n";
    let form = "content-type: multipart/form-data; boundary=b\r\n";
    let part = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"/none/x\"\r\n\r\n\
                x\r\n--b--\r\n";
    let init = json!({"envVars": {"A": "1"}, "timestamp": "2026-01-01T00:00:00Z"});
    let order = json!({"source_paths": ["/none"], "destination": "/none/x"});
    let none = json!({"path": "/none/x"});
    let moved = json!({"source": "/none/a", "destination": "/none/x"});
    vec![
        plain("POST", "/files?path=/none/x", octets, "content"),
        plain("POST", "/files", form, part),
        call("files/compose", &order),
        call("init", &init),
        call("snapshot/reclaim", &json!({})),
        call("snapshot/undo", &json!({"epoch": 1, "wallClockNs": 1})),
        call("filesystem.Filesystem/MakeDir", &none),
        call("filesystem.Filesystem/Move", &moved),
        call("filesystem.Filesystem/Remove", &none),
    ]
}

/// The agent of these tests runs as root on the machine that tests. A damaged path may name
/// something that matters, so what might change anything is sent to an agent that demands a token,
/// and gets no further than that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_requests_are_refused_and_harm_nobody() {
    let (open, guarded) = (Envd::start(), Envd::start());
    let token = json!({"accessToken": "t"}).to_string();
    assert_eq!(guarded.post("/init", token).await.status, 204);
    let mut dice = Dice(7);
    for (envd, requests) in [(&open, looks()), (&open, frames()), (&guarded, changes())] {
        for number in 0..24 * requests.len() {
            let damaged = dice.damage(&requests[number % requests.len()]);
            let answer = raw(envd, &damaged).await;
            let Some(status) = answer.get(9..12).map(String::from_utf8_lossy) else {
                continue;
            };
            let damaged = String::from_utf8_lossy(&damaged);
            let fits = status.starts_with('2') || status.starts_with('4') || status == "501";
            assert!(fits, "{status} to {damaged:?}");
        }
        for _ in 0..50 {
            let length = dice.below(2000);
            raw(envd, &dice.bytes(length)).await;
        }
        envd.is_well(SOUND_MIB).await;
    }
}

/// Every value of `sound`, one after the other, replaced by values of other types.
fn wrong_types(sound: &Value) -> Vec<Value> {
    let others = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1e300),
        json!("\u{0}\u{10ffff}"),
        json!([[]]),
        json!({"x": {"y": []}}),
    ];
    let mut all: Vec<Value> = others.to_vec();
    if let Value::Object(fields) = sound {
        for (name, value) in fields {
            for wrong in wrong_types(value) {
                let mut changed = fields.clone();
                changed.insert(name.clone(), wrong);
                all.push(Value::Object(changed));
            }
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_the_wrong_type_are_the_callers_mistake() {
    let envd = Envd::start();
    for (method, sound) in [
        (
            "process.Process/SendSignal",
            json!({"process": {"pid": 4_000_000}, "signal": "SIGNAL_SIGTERM"}),
        ),
        (
            "process.Process/SendInput",
            json!({"process": {"tag": "x"}, "input": {"stdin": "AAAA"}}),
        ),
        (
            "process.Process/Update",
            json!({"process": {"tag": "x"}, "pty": {"size": {"cols": 1, "rows": 1}}}),
        ),
        (
            "process.Process/CloseStdin",
            json!({"process": {"tag": "x"}}),
        ),
        ("filesystem.Filesystem/Stat", json!({"path": "/none"})),
        (
            "filesystem.Filesystem/ListDir",
            json!({"path": "/none", "depth": 1}),
        ),
        (
            "filesystem.Filesystem/CreateWatcher",
            json!({"path": "/none", "recursive": true}),
        ),
        (
            "filesystem.Filesystem/GetWatcherEvents",
            json!({"watcherId": "w1"}),
        ),
        (
            "filesystem.Filesystem/RemoveWatcher",
            json!({"watcherId": "w1"}),
        ),
    ] {
        for body in wrong_types(&sound) {
            let request = Request::post(format!("/{method}"))
                .header("content-type", "application/json")
                .body(full(body.to_string()))
                .expect("a request");
            let answer = envd.fetch(request).await;
            let code = answer.json()["code"].clone();
            // A wrong value may leave a sound request, for something that is there or not.
            let fits = matches!(answer.status, 200 | 400 | 404);
            assert!(fits, "{method} {body}: {} {code}", answer.status);
        }
    }
    for (path, sound) in [
        (
            "/init",
            json!({"envVars": {"A": "1"}, "timestamp": "2026-01-01T00:00:00Z"}),
        ),
        (
            "/files/compose",
            json!({"source_paths": ["/none"], "destination": "/none/x"}),
        ),
        ("/snapshot/undo", json!({"epoch": 1, "wallClockNs": 1})),
        (
            "/snapshot/restore",
            json!({"generation": "x", "entropy": "AA", "wallClockNs": 1}),
        ),
    ] {
        for body in wrong_types(&sound) {
            let answer = envd.post(path, body.to_string()).await;
            let fits = matches!(answer.status, 200 | 204 | 400 | 404);
            assert!(fits, "{path} {body}: {}", answer.status);
        }
    }
    envd.is_well(SOUND_MIB).await;
}

#[tokio::test]
async fn what_is_too_large_is_told_so_before_it_is_held() {
    let envd = Envd::start();
    let large = vec![b' '; 5 * 1024 * 1024];
    for path in ["/init", "/snapshot/undo", "/files/compose"] {
        assert_eq!(envd.post(path, large.clone()).await.status, 413, "{path}");
    }
    // The head of a part without an end, and a body without a part.
    let piece = || Bytes::from(vec![b'a'; 64 * 1024]);
    for start in ["--b\r\ncontent-disposition: form-data; name=\"", "nothing"] {
        let pieces = stream::iter([Bytes::from(start)]).chain(stream::repeat_with(piece).take(200));
        let request = Request::post("/files?path=/none/x")
            .header("content-type", "multipart/form-data; boundary=b")
            .body(streamed(pieces))
            .expect("a request");
        assert_eq!(envd.fetch(request).await.status, 413, "{start}");
    }
    // A message that says it is larger than any may be, in both shapes of a call.
    let request = Request::post("/filesystem.Filesystem/Stat")
        .header("content-type", "application/json")
        .body(streamed(stream::repeat_with(piece).take(1100)))
        .expect("a request");
    assert_eq!(envd.fetch(request).await.status, 429);
    let request = Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .body(full(&b"\0\xff\xff\xff\xff{}"[..]))
        .expect("a request");
    let answer = envd.fetch(request).await;
    assert_eq!(answer.status, 200);
    let end = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(end.contains("resource_exhausted"), "{end}");
    let head = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(100_000));
    let answer = raw(&envd, head.as_bytes()).await;
    let refused = [&b"HTTP/1.1 414"[..], b"HTTP/1.1 431"];
    assert!(
        refused.iter().any(|it| answer.starts_with(it)),
        "{answer:?}"
    );
    envd.is_well(256).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_half_closed_clients_hold_nobody_up() {
    let envd = Envd::start();
    let mut held = Vec::new();
    for (number, part) in [
        "",
        "POST /in",
        "POST /init HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    ]
    .iter()
    .cycle()
    .take(150)
    .enumerate()
    {
        let mut stream = TcpStream::connect(&envd.address).await.expect("connected");
        stream.write_all(part.as_bytes()).await.expect("sent");
        if number % 2 == 0 {
            stream.shutdown().await.expect("closed");
        }
        held.push(stream);
    }
    envd.is_well(SOUND_MIB).await;
    let ran = envd.shell("echo on").await;
    assert_eq!(ran.out(), "on\n");
    // Half of them have been given up by both sides, and the agent has noticed.
    let descriptors = || {
        fs::read_dir(format!("/proc/{}/fd", envd.pid()))
            .expect("listed")
            .count()
    };
    soon(async {
        while descriptors() > 75 + 40 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    drop(held);
    soon(async {
        while descriptors() > 40 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn names_may_hold_anything_and_devices_are_no_files() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let name = "a\nb\t\u{1f600}%20'\"\\";
    let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let uri = format!("/files?path={}/{encoded}", dir.path().display());
    let request = Request::post(&uri)
        .header("content-type", "application/octet-stream")
        .body(full("content"))
        .expect("a request");
    let written = envd.fetch(request).await.json();
    assert_eq!(written[0]["name"], name);
    let read = envd.get(&uri).await;
    assert_eq!(read.text(), "content");
    for codec in BOTH {
        let request = files::ListDirRequest {
            path: dir.path().to_str().expect("text").to_owned(),
            ..Default::default()
        };
        let listed = envd
            .call(codec, "filesystem.Filesystem/ListDir", &request)
            .await;
        let listed: files::ListDirResponse = listed.expect("listed");
        assert_eq!(listed.entries[0].name, name);
    }
    // A name that is no text is shown with marks in its place, and breaks nothing.
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff\xfe");
    fs::write(dir.path().join(odd), "").expect("written");
    let request = files::ListDirRequest {
        path: dir.path().to_str().expect("text").to_owned(),
        ..Default::default()
    };
    let listed = envd
        .call(Codec::Proto, "filesystem.Filesystem/ListDir", &request)
        .await;
    let listed: files::ListDirResponse = listed.expect("listed");
    assert!(listed.entries.iter().any(|it| it.name.contains('\u{fffd}')));

    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("made");
    for device in [
        "/dev/zero",
        "/dev/tty",
        "/dev",
        pipe.to_str().expect("text"),
    ] {
        let path = format!("/files?path={device}");
        assert_eq!(envd.get(&path).await.status, 400, "{device}");
        let request = Request::post(&path)
            .header("content-type", "application/octet-stream")
            .body(full("x"))
            .expect("a request");
        assert_eq!(envd.fetch(request).await.status, 400, "{device}");
    }
    let up = envd.get("/files?path=/../../etc/./passwd").await;
    assert_eq!(up.body, fs::read("/etc/passwd").expect("there"));
    assert_eq!(envd.get("/files?path=a%00b").await.status, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_exchanged_meanwhile_gives_nothing_away() {
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let victim = dir.path().join("victim");
    fs::create_dir(&victim).expect("made");
    let (name, link) = (dir.path().join("name"), dir.path().join("link"));
    symlink(&victim, &link).expect("made");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Now nothing, now what was made, now a link to somebody else's.
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::rename(&link, &name);
                let _ = fs::rename(&name, &link);
                let _ = fs::remove_dir(&name);
            }
        });
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                let request = files::MakeDirRequest {
                    path: name.to_str().expect("text").to_owned(),
                    ..Default::default()
                };
                let headers = [("authorization", &*basic("nobody"))];
                for _ in 0..300 {
                    let method = "filesystem.Filesystem/MakeDir";
                    let _: Result<files::MakeDirResponse, _> = envd
                        .call_with(Codec::Proto, method, &request, &headers)
                        .await;
                }
            });
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(fs::metadata(&victim).expect("there").uid(), 0);
    envd.is_well(SOUND_MIB).await;
}

#[tokio::test]
async fn wrong_methods_types_and_paths_have_their_own_answers() {
    let envd = Envd::start();
    for (method, path, kind, status) in [
        (Method::GET, "/nowhere", "", 404),
        (Method::DELETE, "/health", "", 405),
        (Method::PUT, "/files", "", 405),
        (Method::POST, "/files?path=/none/x", "text/plain", 400),
        (
            Method::POST,
            "/files?path=/none/x",
            "multipart/form-data",
            400,
        ),
        (Method::GET, "/files?signature_expiration=soon", "", 400),
        (
            Method::POST,
            "/process.Process/None",
            "application/json",
            404,
        ),
        (Method::POST, "/process.Process/List", "text/plain", 415),
        (Method::OPTIONS, "/anything", "", 204),
    ] {
        let request = Request::builder()
            .method(&method)
            .uri(path)
            .header("content-type", kind)
            .body(full("{}"))
            .expect("a request");
        let answer = envd.fetch(request).await;
        let shown = format!("{method} {path} {kind}");
        // A method that no service has may be told as not implemented as well.
        let fits = answer.status == status || (status == 404 && answer.status == 501);
        assert!(fits, "{shown}: {}", answer.status);
    }
    let ran = envd.start_process(Codec::Json, shell("true"), &[]).await;
    ran.run().await.expect("it goes on");
}

/// The loopback is one peer like any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_peer_has_a_bounded_number_of_connections() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("known");
    setrlimit(Resource::RLIMIT_NOFILE, most.min(8192), most).expect("raised");
    let envd = Envd::start();
    let connect = || TcpStream::connect(&envd.address);
    let mut open = Vec::new();
    for _ in 0..envd::connections::MAX_PER_PEER {
        open.push(connect().await.expect("connected"));
    }
    let mut answer = Vec::new();
    let mut refused = connect().await.expect("accepted, and refused");
    soon(refused.read_to_end(&mut answer)).await.expect("read");
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 429 "), "{head}");
    assert!(
        head.contains(&format!("content-length: {}", body.len())),
        "{head}"
    );
    let body: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(body["code"], 429);
    drop(open);
    soon(async {
        while !matches!(raw(&envd, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await, ok if ok.starts_with(b"HTTP/1.1 200")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    envd.is_well(SOUND_MIB).await;
}
