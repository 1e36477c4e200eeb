//! A capsule that lives on one node is used through all of them, and nobody can tell which is its
//! own: the same answers, the same refusals, the same end of what a client left alone.

use std::env;
use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use wrenn_cluster_tests::client::{Answer, wait_for};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::flow::{MemoryWatch, download, upload};
use crate::{PATIENCE, on_node, wait_voters};

/// Where the capsule is asked for, where it lives, and a node that is neither.
const ASKED: u16 = 1;
const OWNER: u16 = 2;
const RELAY: u16 = 3;
/// How much goes through a relay: more than any buffer holds, and bearable under emulation.
const FLOW_MIB: u64 = 192;
/// The same where time is no matter.
const LONG_FLOW_MIB: u64 = 1024;
/// What fills a node's buffers before its memory is watched.
const WARM_UP_MIB: u64 = 8;
/// A node on the way that keeps what it passes on grows by more than this.
const GROWTH_MIB: u64 = 64;
/// How long a process is watched whose client has gone away: many times what its end takes.
const WATCHED: Duration = Duration::from_secs(5);

#[test]
fn a_capsule_is_the_same_through_every_node() {
    let cluster = ClusterWorld::new(3);
    wait_voters(&cluster, &[1, 2, 3], 3);
    let id = cluster.client(ASKED).capsule_with(&on_node(OWNER));
    assert_eq!(cluster.client(RELAY).record(&id)["node"], "node2");

    commands(&cluster, &id);
    processes(&cluster, &id);
    files(&cluster, &id);
    refusals(&cluster, &id);
    a_client_that_goes_away_leaves_the_same(&cluster, &id);
    large_files_flow_through(&cluster, &id);

    cluster.client(OWNER).wait_only(&[&id]);
    cluster.client(RELAY).destroy(&id);
    for number in [ASKED, OWNER, RELAY] {
        let world = cluster.client(number);
        assert_eq!(world.wait_ended(&id)["status"], "stopped");
        assert_eq!(world.about("DELETE", &id, "", None).status, 204);
        assert_eq!(world.listed(), Vec::<String>::new());
        world.wait_only(&[]);
    }
}

/// What all nodes answer, which is the same.
fn same(cluster: &ClusterWorld, ask: impl Fn(&World) -> Answer) -> Answer {
    let [first, second, third] = [ASKED, OWNER, RELAY].map(|number| {
        let mut answer = ask(cluster.client(number));
        if let Value::Object(mut fields) = answer.json() {
            fields.remove("duration_ms");
            answer.body = Value::from(fields).to_string().into_bytes();
        }
        answer
    });
    assert_eq!(first, second);
    assert_eq!(third, second);
    second
}

fn commands(cluster: &ClusterWorld, id: &str) {
    let line = |line: &str| {
        let request = json!({ "cmd": "/bin/sh", "args": ["-c", line] });
        same(cluster, |world| world.run(id, &request)).json()
    };
    let ran = line("echo out; echo err >&2; exit 42");
    assert_eq!(
        (&ran["stdout"], &ran["stderr"]),
        (&json!("out\n"), &json!("err\n"))
    );
    assert_eq!(
        (&ran["exit_code"], &ran["encoding"]),
        (&json!(42), &json!("utf-8"))
    );
    assert_eq!(line(r"printf 'a\377'")["stdout"], "Yf8=");
    assert_eq!(line("kill -9 $$")["exit_code"], -1);
    let long = line("head -c 3000000 /dev/zero | tr '\\0' x");
    assert_eq!(long["stdout"].as_str().map(str::len), Some(3_000_000));
}

/// Started through one node, listed by all, ended through another.
fn processes(cluster: &ClusterWorld, id: &str) {
    let request = json!({ "cmd": "sleep", "args": ["1000"], "background": true, "tag": "kept" });
    let started = cluster.client(RELAY).run(id, &request);
    assert_eq!(started.status, 202, "{}", started.json());
    let listed = same(cluster, |world| world.about("GET", id, "/processes", None)).json();
    assert_eq!(listed["processes"][0]["pid"], started.json()["pid"]);
    let ended = cluster
        .client(ASKED)
        .about("DELETE", id, "/processes/kept", None);
    assert_eq!(ended.status, 204, "{}", ended.json());
    let gone = wait_for(PATIENCE, || {
        let left = cluster
            .client(RELAY)
            .about("GET", id, "/processes", None)
            .json();
        (left["processes"] == json!([])).then_some(())
    });
    assert!(gone.is_some(), "the process is still listed");
}

fn files(cluster: &ClusterWorld, id: &str) {
    let contents = b"\0\xff binary\r\n--0123\r\n";
    for number in [ASKED, OWNER, RELAY] {
        let path = format!("/srv/new/through {number}");
        for route in ["files/write", "files/stream/write"] {
            let written = cluster.client(number).upload(id, route, &path, contents);
            assert_eq!(written.status, 204, "{}", written.json());
        }
        let read = same(cluster, |world| file(world, id, "read", &path));
        assert_eq!(
            (read.status, read.body.as_slice()),
            (200, contents.as_slice())
        );
    }
    let listed = same(cluster, |world| file(world, id, "list", "/srv/new")).json();
    assert_eq!(
        listed["entries"].as_array().map(Vec::len),
        Some(3),
        "{listed}"
    );
    assert_eq!(
        file(cluster.client(RELAY), id, "remove", "/srv/new").status,
        204
    );
    assert_eq!(
        same(cluster, |world| file(world, id, "list", "/srv/new")).status,
        404
    );
}

fn file(world: &World, id: &str, call: &str, path: &str) -> Answer {
    let body = json!({ "path": path });
    world.about("POST", id, &format!("/files/{call}"), Some(&body))
}

/// What is wrong is wrong everywhere, in the same words.
fn refusals(cluster: &ClusterWorld, id: &str) {
    for (call, path, status) in [
        ("read", "/no/such/file", 404),
        ("read", "/etc", 400),
        ("read", "relative", 400),
        ("mkdir", "/etc", 409),
    ] {
        let answer = same(cluster, |world| file(world, id, call, path));
        assert_eq!(answer.status, status, "{call} {path}: {}", answer.json());
    }
    let nobody = "cl-0000000000000000000000001";
    let answer = same(cluster, |world| {
        world.run(nobody, &json!({ "cmd": "true" }))
    });
    assert_eq!(answer.refusal(), (404, "not_found".into()));
    let late = json!({ "cmd": "sleep", "args": ["4711"], "timeout_sec": 1 });
    let answer = same(cluster, |world| world.run(id, &late));
    assert_eq!(
        answer.refusal(),
        (502, "agent_error".into()),
        "{}",
        answer.message()
    );
    let left = cluster.client(OWNER).exec(id, "pgrep -f '[4]711'");
    assert_eq!(left["exit_code"], 1, "{left}");
}

/// Whether a command ends when its client does is not for the node to say that was asked.
fn a_client_that_goes_away_leaves_the_same(cluster: &ClusterWorld, id: &str) {
    let ends = |number: u16, seconds: &str| {
        let client = begin_exec(cluster.client(number), id, seconds);
        let owner = cluster.client(OWNER);
        let pattern = format!("pgrep -f '^[s]leep {seconds}'");
        let runs = || owner.exec(id, &pattern)["exit_code"] == 0;
        assert!(wait_for(PATIENCE, || runs().then_some(())).is_some());
        client.shutdown(Shutdown::Both).expect("it is connected");
        drop(client);
        let ended = wait_for(WATCHED, || (!runs()).then_some(())).is_some();
        let _killed = owner.exec(id, &format!("pkill -f '^[s]leep {seconds}'"));
        ended
    };
    let locally = ends(OWNER, "5001");
    println!("a command whose client has gone away ends: {locally}");
    assert_eq!(ends(RELAY, "5002"), locally);
    assert_eq!(ends(ASKED, "5003"), locally);
}

/// A command that is under way, and the connection of its client.
pub(crate) fn begin_exec(world: &World, id: &str, seconds: &str) -> TcpStream {
    let body = json!({ "cmd": "sleep", "args": [seconds], "timeout_sec": 600 }).to_string();
    let (key, length) = (world.key(), body.len());
    let address = world.url().replace("http://", "");
    let mut stream = TcpStream::connect(address).expect("the API listens");
    write!(
        stream,
        "POST /v1/capsules/{id}/exec HTTP/1.1\r\nHost: test\r\nX-API-Key: {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .expect("the API takes requests");
    stream
}

/// Neither the node in between nor the owner keeps what it passes on.
fn large_files_flow_through(cluster: &ClusterWorld, id: &str) {
    let long = env::var_os("WRENN_LONG").is_some();
    let mib = if long { LONG_FLOW_MIB } else { FLOW_MIB };
    let (owner, relay) = (cluster.client(OWNER), cluster.client(RELAY));
    upload(relay, id, "/root/large", WARM_UP_MIB);
    download(relay, id, "/root/large", WARM_UP_MIB);

    let memory = MemoryWatch::of(&[owner.pid(), relay.pid()]);
    let up = upload(relay, id, "/root/large", mib);
    let up_growth = memory.growth_mib();
    let memory = MemoryWatch::of(&[owner.pid(), relay.pid()]);
    let down = download(relay, id, "/root/large", mib);
    let down_growth = memory.growth_mib();
    println!(
        "{mib} MiB through another node: up {up:?}, growth of owner and relay {up_growth:?} MiB; \
         down {down:?}, growth {down_growth:?} MiB"
    );
    for growth in up_growth.into_iter().chain(down_growth) {
        assert!(
            growth < GROWTH_MIB,
            "a node on the way grew by {growth} MiB"
        );
    }
    assert_eq!(
        file(cluster.client(ASKED), id, "remove", "/root/large").status,
        204
    );
}
