//! Data of earlier versions.
//!
//! `data-v1.tar.gz` is the data directory of a node of layout 1, which ran one capsule to its end and
//! stopped; without what belongs to its host and its images. Its keys open nothing else.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use proto::version;
use serde_json::json;
use wrenn_cluster_tests::world::{World, wrenn};

/// The capsule that layout 1 has on record.
const CAPSULE: &str = "cl-eh9xdx7mi15q7ijgz83dznaak";
/// Keeps what ended long ago.
const RETENTION: [&str; 2] = ["--ended-retention", "876000h"];

/// A world with the data directory that layout 1 left.
fn of_version_1() -> World {
    let mut world = World::asleep();
    fs::create_dir(world.data()).expect("a new directory");
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/upgrade/data-v1.tar.gz");
    let status = Command::new("tar")
        .args(["--extract", "--gzip", "--no-same-owner", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(world.data())
        .status()
        .expect("tar is installed");
    assert!(status.success());
    world.arguments = RETENTION.map(str::to_owned).to_vec();
    world
}

#[test]
fn data_of_version_1_goes_on_in_place() {
    let mut world = of_version_1();
    for _ in 0..2 {
        world.start();
        let marked = fs::read_to_string(world.data().join("version")).expect("a version");
        assert_eq!(marked.trim(), version::DATA_DIR.to_string());
        let record = world.record(CAPSULE);
        assert_eq!(record["status"], "stopped", "{record}");
        assert_eq!(record["metadata"]["made_by"], "version 1");
        // What version 1 did not have: a cluster that others may join.
        let cluster = world.call("GET", "/v1/cluster", None).json();
        assert!(cluster["id"].is_string(), "{cluster}");
        let token = world.call("POST", "/v1/tokens", Some(&json!({})));
        assert_eq!(token.status, 201, "{}", token.json());
        world.stop();
    }
}

#[test]
fn data_of_a_later_version_is_refused_by_name_and_left_alone() {
    let mut world = World::new();
    world.stop();
    let file = world.data().join("version");
    let later = format!("{}\n", version::DATA_DIR + 1);
    fs::write(&file, &later).expect("written");
    let start = world
        .command()
        .stdin(Stdio::null())
        .output()
        .expect("the wrenn binary runs");
    let look = Command::new(wrenn())
        .args(["node", "recover", "--inspect", "--data-dir"])
        .arg(world.data())
        .output()
        .expect("the wrenn binary runs");
    for refused in [start, look] {
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success());
        assert!(said.contains("was written by a later version"), "{said}");
    }
    assert_eq!(fs::read_to_string(&file).expect("there"), later);
    fs::write(&file, format!("{}\n", version::DATA_DIR)).expect("written");
}
