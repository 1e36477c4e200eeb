//! What happens when there is no more: of disk, slots, memory, or patience.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::contents::Contents;
use wrenn_cluster_tests::world::{World, images};

use crate::pause_crash::goes_on;

/// The shortest inactivity timeout there is.
const IDLE: Duration = Duration::from_secs(60);
/// What a stop may take after it on a busy machine.
const IDLE_GRACE: Duration = Duration::from_secs(30);
/// Bytes of a file that a guest of 256 MiB has written and still has in its memory.
const CACHED: u64 = 96 << 20;
/// Size of a data directory that holds a node and no more.
const SMALL_DISK_MIB: u32 = 96;

#[test]
fn a_full_disk_refuses_creates_and_harms_nobody() {
    let mut world = World::asleep();
    world.use_small_disk(SMALL_DISK_MIB);
    world.images = tiny_template(&world);
    world.arguments = vec!["--capacity-disk".into(), "100000".into()];
    world.start();
    let filler = world.data().join("filler");
    fill(&filler);

    for _ in 0..3 {
        let created = world.call("POST", "/v1/capsules", Some(&json!({ "memory_mb": 256 })));
        assert!(
            matches!(created.status, 500 | 502 | 503),
            "{}",
            created.json()
        );
        let message = created.message();
        assert!(message.contains("No space left on device"), "{message}");
        assert!(world.is_alive(), "{}", world.log());
        assert!(world.listed().is_empty());
        world.wait_only(&[]);
    }
    fs::remove_file(filler).expect("the filler");
    // With room again the node is as before: it counts what is left and finds it too little.
    let created = world.call("POST", "/v1/capsules", Some(&json!({ "memory_mb": 256 })));
    assert!(
        created.message().contains("MiB needed"),
        "{}",
        created.json()
    );
    world.wait_only(&[]);
    world.stop();
    world.start();
}

/// Images whose template has next to nothing in it, so that a small disk can hold it.
fn tiny_template(world: &World) -> std::path::PathBuf {
    let dir = world.dir().join("images");
    let template = dir.join("templates/minimal");
    fs::create_dir_all(&template).expect("a directory");
    for shared in ["kernel", "initramfs"] {
        symlink(images().join(shared), dir.join(shared)).expect("a link");
    }
    let rootfs = fs::File::create(template.join("rootfs.raw")).expect("a file");
    rootfs.set_len(64 << 20).expect("a hole");
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(template.join("rootfs.raw"))
        .status();
    assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4");
    let description = json!({ "name": "minimal", "disk_mib": 64 }).to_string();
    fs::write(template.join("template.json"), description).expect("a file");
    dir
}

/// Writes until the disk takes no more.
fn fill(path: &std::path::Path) {
    use std::io::Write as _;
    let mut file = fs::File::create(path).expect("a file");
    for piece in [1 << 16, 1 << 9, 1] {
        while file.write_all(&vec![0; piece]).is_ok() {}
    }
}

#[test]
fn creates_past_slots_or_memory_are_refused_by_name() {
    let mut world = World::asleep();
    world.slots = 2;
    world.arguments = vec!["--capacity-memory".into(), "700".into()];
    world.start();
    let create = |memory: u32| {
        let request = json!({ "memory_mb": memory });
        world.call("POST", "/v1/capsules", Some(&request))
    };
    let refused = |memory: u32, lack: &str| {
        let answer = create(memory);
        assert_eq!(
            answer.refusal(),
            (503, "no_hosts_available".into()),
            "{}",
            answer.json()
        );
        assert!(answer.message().contains(lack), "{}", answer.message());
    };
    refused(701, "memory (701 MiB wanted, 700 MiB free)");
    let first = world.capsule();
    refused(445, "memory (445 MiB wanted, 444 MiB free)");
    let second = world.capsule();
    refused(189, "memory (189 MiB wanted, 188 MiB free), capsule slots");
    let mut listed = world.listed();
    listed.sort();
    let mut both = [first.clone(), second];
    both.sort();
    assert_eq!(listed, both);

    // What one gives back another can have.
    world.destroy(&first);
    let third = world.capsule_with(&json!({ "memory_mb": 128 }));
    refused(128, "capsule slots (1 wanted, 0 free)");
    world.destroy(&third);
}

#[test]
fn creates_at_once_are_promised_no_more_than_there_is() {
    const ROOM: u16 = 3;
    const CALLERS: usize = 8;
    let mut world = World::asleep();
    world.slots = ROOM;
    world.start();
    let world = world;
    let answers: Vec<_> = thread::scope(|scope| {
        let create = || world.call("POST", "/v1/capsules", Some(&json!({ "memory_mb": 128 })));
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(create)).collect();
        callers
            .into_iter()
            .map(|caller| caller.join().expect("an answer"))
            .collect()
    });
    let made = answers.iter().filter(|it| matches!(it.status, 201 | 202));
    let ids: Vec<String> = made
        .map(|it| it.json()["id"].as_str().expect("an id").to_owned())
        .collect();
    assert_eq!(ids.len(), usize::from(ROOM), "{answers:?}");
    for refused in answers.iter().filter(|it| !matches!(it.status, 201 | 202)) {
        assert_eq!(refused.refusal(), (503, "no_hosts_available".into()));
    }
    for id in &ids {
        world.wait_status(id, "running");
        assert_eq!(world.output(id, "hostname"), *id);
    }
    thread::scope(|scope| {
        for id in &ids {
            scope.spawn(|| world.destroy(id));
        }
    });
    world.wait_only(&[]);
}

#[test]
fn an_idle_capsule_is_paused_a_used_one_is_not_and_one_that_asked_to_end_ends() {
    let world = World::new();
    // Shorter timeouts than the shortest are raised to it.
    let request = json!({ "memory_mb": 256, "timeout_sec": 1 });
    let asked = Instant::now();
    let idle = world.capsule_with(&request);
    world.output(&idle, "mkdir -p /dev/shm; echo kept > /dev/shm/kept");
    // In memory too, where only its pages on the disk are worth keeping.
    let write = format!("head -c {CACHED} /dev/urandom > /root/big; sync; sha256sum /root/big");
    let sum = world.output(&idle, &write);
    let to_end = json!({ "memory_mb": 256, "timeout_sec": 60, "timeout_action": "destroy" });
    let to_end = world.capsule_with(&to_end);
    // Last: from here on it is used all the time.
    let used = world.capsule_with(&request);
    assert_eq!(world.record(&used)["timeout_sec"], IDLE.as_secs());
    for (id, status) in [(&idle, "paused"), (&to_end, "stopped")] {
        let at_rest = wait_for(IDLE + IDLE_GRACE + Duration::from_secs(60), || {
            assert_eq!(world.about("POST", &used, "/ping", None).status, 204);
            let record = world.record(id);
            let moves = ["running", "pausing", "stopping"];
            let moves = moves.iter().any(|status| record["status"] == *status);
            (!moves).then_some(record)
        });
        let record = at_rest.expect("what is idle comes to rest");
        assert!(asked.elapsed() >= IDLE, "after {:?}", asked.elapsed());
        assert_eq!(record["status"], status, "{record}");
        let reason = record["reason"].as_str().unwrap_or_default();
        assert!(reason.starts_with("inactivity"), "{reason}");
        if status == "paused" {
            // A guest without the file has some 96 MiB in use.
            let sealed = record["snapshot"]["memory_bytes"].as_u64();
            let sealed = sealed.expect("it says what is sealed");
            println!("{} MiB of memory are sealed", sealed >> 20);
            assert!(sealed < (256 << 20) - CACHED, "{record}");
        }
    }
    assert_eq!(world.output(&used, "echo used"), "used");
    world.wait_only(&[&used]);
    let resumed = world.about("POST", &idle, "/resume", None);
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    world.wait_status(&idle, "running");
    assert_eq!(world.output(&idle, "cat /dev/shm/kept"), "kept");
    assert_eq!(world.output(&idle, "sha256sum /root/big"), sum);
    assert_eq!(world.record(&idle)["reason"], Value::Null);
}

#[test]
fn a_guest_on_a_full_host_disk_gets_errors_and_keeps_answering() {
    let mut world = World::asleep();
    // The template, the room that a create asks for, and little else.
    world.use_small_disk(650);
    world.arguments = vec!["--capacity-disk".into(), "100000".into()];
    world.start();
    let id = world.capsule();
    let filler = world.data().join("filler");
    fill(&filler);
    let written = world.exec(
        &id,
        "dd if=/dev/zero of=/root/big bs=1M count=30 conv=fsync",
    );
    assert_ne!(written["exit_code"], 0, "{written}");
    assert_eq!(world.output(&id, "echo alive"), "alive");
    fs::remove_file(filler).expect("the filler");
    assert_eq!(
        world.output(&id, "echo alive > /dev/shm/x; cat /dev/shm/x"),
        "alive"
    );
}

/// The log of the cluster has some room left, a pack has none.
#[test]
fn a_pause_without_room_for_the_snapshot_fails_by_name_and_costs_the_guest_nothing() {
    const ROOM_FOR_THE_LOG: u64 = 8 << 20;
    let mut world = World::asleep();
    world.use_small_disk(950);
    world.arguments = vec!["--capacity-disk".into(), "100000".into()];
    world.start();
    let id = world.capsule();
    let contents = Contents::make(&world, &id, 512);
    let filler = world.data().join("filler");
    fill(&filler);
    let full = fs::metadata(&filler).expect("the filler").len();
    let file = fs::File::options().write(true).open(&filler);
    let shortened = file.and_then(|file| file.set_len(full - ROOM_FOR_THE_LOG));
    shortened.expect("a shorter filler");

    let failed = world.about("POST", &id, "/pause", None);
    let (status, said) = (failed.status, failed.json().to_string());
    assert_eq!(status, 502, "{said}");
    assert!(said.contains("runs on"), "{said}");
    assert!(said.contains("must stay free"), "{said}");
    assert_eq!(world.record(&id)["status"], "running");
    goes_on(&world, &id, &contents);

    fs::remove_file(filler).expect("the filler");
    let paused = world.about("POST", &id, "/pause", None);
    assert_eq!(paused.status, 200, "{}", paused.json());
    let resumed = world.about("POST", &id, "/resume", None);
    assert!(matches!(resumed.status, 200 | 202), "{}", resumed.json());
    world.wait_status(&id, "running");
    goes_on(&world, &id, &contents);
}
