//! A capsule from its create to its destroy, with nothing going wrong.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::world::World;

use crate::PATIENCE;

/// In how many looks at the list a process that ended must be gone from it: half a second of them on
/// a quiet machine, more on a busy one.
const GONE_LOOKS: u32 = 25;
/// What a command may add to its timeout before it must be answered.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);
/// More than any buffer on the way holds.
const BIG_BYTES: usize = 20 << 20;

#[test]
fn a_capsule_lives_from_create_to_destroy() {
    let world = World::new();
    let asked = json!({ "memory_mb": 256, "metadata": { "purpose": "test" } });
    let created = world.call("POST", "/v1/capsules", Some(&asked));
    assert_eq!(created.status, 201, "{}", created.json());
    let id = created.json()["id"].as_str().expect("an id").to_owned();
    is_described(&world, &id, &created.json());
    guest_is_as_promised(&world, &id);

    let deleted = world.about("DELETE", &id, "", None);
    assert_eq!((deleted.status, deleted.body.len()), (204, 0));
    assert_eq!(world.record(&id)["status"], "stopped");
    assert_eq!(world.about("DELETE", &id, "", None).status, 204);
    assert!(world.listed().is_empty());
    world.wait_only(&[]);
}

fn is_described(world: &World, id: &str, created: &Value) {
    let record = world.record(id);
    for seen in [created, &record] {
        assert_eq!(seen["status"], "running", "{seen}");
        assert_eq!(seen["template"], "minimal");
        assert_eq!(
            (&seen["vcpus"], &seen["memory_mb"]),
            (&json!(1), &json!(256))
        );
        assert_eq!(seen["metadata"]["purpose"], "test");
        assert_eq!(seen["node"], "test");
    }
    for label in ["kernel_version", "vmm_version", "agent_version"] {
        let version = record["metadata"][label].as_str().unwrap_or_default();
        assert!(!version.is_empty(), "no {label}: {record}");
    }
    assert_eq!(world.listed(), [id]);
    assert_eq!(world.about("POST", id, "/ping", None).status, 204);
    world.wait_only(&[id]);
}

fn guest_is_as_promised(world: &World, id: &str) {
    assert_eq!(world.output(id, "hostname"), id);
    let cmdline = world.output(id, "cat /proc/cmdline");
    assert!(!cmdline.contains("mitigations=off"), "{cmdline}");
    assert!(!cmdline.contains("nokaslr"), "{cmdline}");
    let xattr = "touch /root/x && python3 -c \
        'import os; os.setxattr(\"/root/x\", \"user.a\", b\"b\"); print(os.getxattr(\"/root/x\", \"user.a\"))'";
    assert_eq!(world.output(id, xattr), "b'b'");
    assert_eq!(world.output(id, "stat -fc %T /sys/fs/cgroup"), "cgroup2fs");
    assert_eq!(world.output(id, "su user -c 'sudo -n id -u'"), "0");
    assert_eq!(
        world.output(id, "for it in bash git curl python3 ip ps; do command -v $it > /dev/null || echo no $it; done"),
        ""
    );
}

#[test]
fn commands_run_as_asked_and_are_told_of_faithfully() {
    let world = World::new();
    let id = world.capsule();
    foreground(&world, &id);
    binary_output(&world, &id);
    directory_and_environment(&world, &id);
    timeouts_kill(&world, &id);
    background(&world, &id);
}

fn foreground(world: &World, id: &str) {
    let ran = world.exec(id, "echo out; echo err >&2; exit 42");
    assert_eq!(ran["sandbox_id"], id);
    assert_eq!(
        (&ran["stdout"], &ran["stderr"]),
        (&json!("out\n"), &json!("err\n"))
    );
    assert_eq!(
        (&ran["exit_code"], &ran["encoding"]),
        (&json!(42), &json!("utf-8"))
    );
    assert_eq!(world.exec(id, "no-such-command")["exit_code"], 127);
    assert_eq!(world.exec(id, "kill -9 $$")["exit_code"], -1);
}

fn binary_output(world: &World, id: &str) {
    // One stray byte in either stream encodes both.
    let ran = world.exec(id, r"printf 'a\377'; printf b >&2");
    assert_eq!(
        (&ran["stdout"], &ran["stderr"]),
        (&json!("Yf8="), &json!("Yg=="))
    );
    assert_eq!(ran["encoding"], "base64");
    let long = world.exec(id, "head -c 3000000 /dev/zero | tr '\\0' x");
    assert_eq!(long["stdout"].as_str().map(str::len), Some(3_000_000));
}

fn directory_and_environment(world: &World, id: &str) {
    let line = "pwd > /tmp/said; echo $COLOUR >> /tmp/said; cat /tmp/said";
    let mut request = json!({
        "cmd": "/bin/sh", "args": ["-c", line], "cwd": "/usr/share", "envs": { "COLOUR": "blue" },
    });
    let ran = world.run(id, &request);
    assert_eq!(ran.json()["stdout"], "/usr/share\nblue\n");
    world.output(id, "rm /tmp/said");
    request["background"] = json!(true);
    assert_eq!(world.run(id, &request).status, 202);
    let said = || {
        let said = world.exec(id, "cat /tmp/said")["stdout"].clone();
        (said == "/usr/share\nblue\n").then_some(())
    };
    assert!(
        wait_for(PATIENCE, said).is_some(),
        "the background lacks cwd or envs"
    );
}

fn timeouts_kill(world: &World, id: &str) {
    let request = json!({ "cmd": "sleep", "args": ["4711"], "timeout_sec": 1 });
    let began = Instant::now();
    let answer = world.run(id, &request);
    assert!(began.elapsed() < Duration::from_secs(1) + TIMEOUT_GRACE);
    assert_eq!(
        answer.refusal(),
        (502, "agent_error".into()),
        "{}",
        answer.message()
    );
    assert_eq!(world.exec(id, "pgrep -f '[4]711'")["exit_code"], 1);
}

fn background(world: &World, id: &str) {
    let start = |tag: Option<&str>| {
        let mut request = json!({ "cmd": "sleep", "args": ["1000"], "background": true });
        request["tag"] = json!(tag);
        let answer = world.run(id, &request);
        assert_eq!(answer.status, 202, "{}", answer.json());
        answer.json()
    };
    let (by_pid, by_tag) = (start(None), start(Some("mine")));
    let pids = || -> Vec<Value> {
        let list = world.about("GET", id, "/processes", None).json();
        let list = list["processes"].as_array().expect("an array").clone();
        list.into_iter()
            .map(|process| process["pid"].clone())
            .collect()
    };
    assert_eq!(pids().len(), 2);
    let kill = |selector: &str| {
        let answer = world.about("DELETE", id, &format!("/processes/{selector}"), None);
        assert_eq!(answer.status, 204, "{}", answer.json());
    };
    for (selector, pid) in [
        (by_pid["pid"].to_string(), &by_pid["pid"]),
        ("mine".into(), &by_tag["pid"]),
    ] {
        kill(&selector);
        let mut looks = 0;
        let gone = wait_for(PATIENCE, || {
            looks += 1;
            (!pids().contains(pid)).then_some(looks)
        });
        let looks = gone.expect("it is gone");
        assert!(looks <= GONE_LOOKS, "{selector} was listed {looks} times");
    }
    let again = world.about("DELETE", id, "/processes/mine", None);
    assert_eq!(again.refusal(), (404, "not_found".into()));
}

#[test]
fn files_come_back_as_they_were_written() {
    let world = World::new();
    let id = world.capsule();
    small_files(&world, &id);
    directories(&world, &id);
    big_file(&world, &id);
    bad_paths(&world, &id);
    capsules_are_apart(&world, &id);
}

fn file(world: &World, id: &str, call: &str, path: &str) -> wrenn_cluster_tests::client::Answer {
    world.about(
        "POST",
        id,
        &format!("/files/{call}"),
        Some(&json!({ "path": path })),
    )
}

fn small_files(world: &World, id: &str) {
    let contents = b"\0\xff binary\r\n--0123\r\n";
    for path in ["/tmp/new/parents/a b", "/tmp/\u{fc}"] {
        assert_eq!(world.upload(id, "files/write", path, contents).status, 204);
        let read = file(world, id, "read", path);
        assert_eq!(
            (read.status, read.body.as_slice()),
            (200, contents.as_slice())
        );
    }
    assert_eq!(
        world
            .upload(id, "files/write", "/tmp/new/parents/a b", b"")
            .status,
        204
    );
    assert!(
        file(world, id, "read", "/tmp/new/parents/a b")
            .body
            .is_empty()
    );
}

fn directories(world: &World, id: &str) {
    let made = file(world, id, "mkdir", "/srv/one/two");
    assert_eq!(
        (made.status, &made.json()["entry"]["type"]),
        (200, &json!("directory"))
    );
    assert_eq!(file(world, id, "mkdir", "/srv/one/two").status, 409);
    world.output(
        id,
        "ln -s /etc/hostname /srv/one/link; echo hello > /srv/one/hello",
    );
    let listed = world.about(
        "POST",
        id,
        "/files/list",
        Some(&json!({ "path": "/srv/one", "depth": 1 })),
    );
    let listed = listed.json();
    let mut seen: Vec<_> = listed["entries"]
        .as_array()
        .expect("an array")
        .iter()
        .map(|entry| {
            (
                entry["name"].as_str(),
                entry["type"].as_str(),
                entry["size"].as_u64(),
            )
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen[0], (Some("hello"), Some("file"), Some(6)), "{listed}");
    assert_eq!((seen[1].0, seen[1].1), (Some("link"), Some("symlink")));
    assert_eq!((seen[2].0, seen[2].1), (Some("two"), Some("directory")));
    assert_eq!(file(world, id, "remove", "/srv/one").status, 204);
    assert_eq!(world.exec(id, "test -e /srv/one")["exit_code"], 1);
}

fn big_file(world: &World, id: &str) {
    // A sequence without a period that fits any buffer.
    let mut state = 1_u32;
    let big: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(BIG_BYTES)
    .collect();
    assert_eq!(
        world
            .upload(id, "files/stream/write", "/tmp/big", &big)
            .status,
        204
    );
    let crc = world.output(
        id,
        "python3 -c 'import zlib; print(zlib.crc32(open(\"/tmp/big\", \"rb\").read()))'",
    );
    assert_eq!(crc, crc32(&big).to_string(), "the guest has other bytes");
    let read = file(world, id, "stream/read", "/tmp/big");
    assert_eq!(read.status, 200);
    assert!(
        read.body == big,
        "{} other bytes came back",
        read.body.len()
    );
}

/// The CRC that zlib computes.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, step)
}

fn bad_paths(world: &World, id: &str) {
    for (call, path, status) in [
        ("read", "/no/such/file", 404),
        ("list", "/no/such/dir", 404),
        ("stream/read", "/no/such/file", 404),
        ("read", "/etc", 400),
        ("stream/read", "/etc", 400),
        ("list", "/etc/hostname", 400),
        ("read", "relative", 400),
        ("mkdir", "", 400),
    ] {
        let answer = file(world, id, call, path);
        assert_eq!(answer.status, status, "{call} {path:?}: {}", answer.json());
    }
    for route in ["files/write", "files/stream/write"] {
        let answer = world.upload(id, route, "/etc", b"x");
        assert_eq!(
            answer.status,
            400,
            "{route} to a directory: {}",
            answer.json()
        );
    }
}

fn capsules_are_apart(world: &World, id: &str) {
    let other = world.capsule();
    world.output(id, "echo secret > /root/mine; sync");
    assert_eq!(world.exec(&other, "test -e /root/mine")["exit_code"], 1);
    assert_eq!(world.exec(&other, "test -e /tmp/big")["exit_code"], 1);
    world.destroy(&other);
    assert_eq!(world.output(id, "cat /root/mine"), "secret");
    world.wait_only(&[id]);
}
