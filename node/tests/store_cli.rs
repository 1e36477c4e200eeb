//! `wrenn store` on a stopped node's directory, and on one that is in use.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod store_support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use store_support::{content, file_with};
use wrenn_node::store::{DataDir, ImageDigest, Limits, Store};

fn wrenn(data_dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wrenn"))
        .arg("store")
        .args(args)
        .arg("--data-dir")
        .arg(data_dir)
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A data directory of a stopped node with one image in it.
fn stopped() -> (tempfile::TempDir, ImageDigest) {
    let dir = tempfile::tempdir().unwrap();
    let data = DataDir::open(&dir.path().join("data")).unwrap();
    let store = Store::open(&data.paths().store(), Limits::default()).unwrap();
    let bytes = content(1);
    let file = file_with(&dir.path().join("image"), &bytes);
    let seal = store.begin();
    let sealed = seal.image(&file, bytes.len() as u64).unwrap();
    seal.finish(None).unwrap();
    (dir, sealed.image.digest)
}

#[test]
fn a_sound_store_is_told_in_figures() {
    let (dir, _) = stopped();
    let data = dir.path().join("data");
    let stats = wrenn(&data, &["stats", "--json"]);
    assert!(stats.status.success(), "{}", stderr(&stats));
    let stats = json(&stats);
    assert_eq!(stats["images"], 1);
    assert_eq!(stats["packs"], 1);
    assert!(stats["dedup_ratio"].as_f64().unwrap() >= 1.0);

    let check = wrenn(&data, &["check", "--json"]);
    assert!(check.status.success(), "{}", stderr(&check));
    assert_eq!(json(&check)["sound"], true);
    assert_eq!(json(&check)["chunks"], stats["chunks"]);
    let people = wrenn(&data, &["stats"]);
    assert!(String::from_utf8_lossy(&people.stdout).contains("dedup"));
}

#[test]
fn damage_is_told_once_with_its_exit_code_and_then_is_missing() {
    let (dir, _) = stopped();
    let data = dir.path().join("data");
    let pack = data.join("store/packs/00000000.pack");
    let pack = OpenOptions::new().write(true).open(pack).unwrap();
    pack.write_all_at(b"????", 80).unwrap();
    let check = wrenn(&data, &["check", "--json"]);
    assert_eq!(check.status.code(), Some(1));
    let told = json(&check);
    assert_eq!(told["sound"], false);
    assert_eq!(told["damaged_chunks"].as_array().unwrap().len(), 1);
    assert_eq!(told["incomplete"][0]["lacks"], 1);
    let again = wrenn(&data, &["check"]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(String::from_utf8_lossy(&again.stdout).contains("not all here of image"));
}

#[test]
fn without_a_running_node_nothing_is_dropped() {
    let (dir, digest) = stopped();
    let data = dir.path().join("data");
    let gc = wrenn(&data, &["gc"]);
    assert_eq!(gc.status.code(), Some(1));
    let said = stderr(&gc);
    assert!(
        said.contains("nothing was dropped") && said.contains("start the node"),
        "{said}"
    );
    assert!(data.join("store/images").join(digest.to_string()).exists());
}

#[test]
fn a_store_in_use_by_what_does_not_answer_is_left_alone_and_the_reader_is_told_what_to_do() {
    let (dir, _) = stopped();
    let data = dir.path().join("data");
    let _daemon = DataDir::open(&data).unwrap();
    for verb in ["check", "gc", "stats"] {
        let refused = wrenn(&data, &[verb]);
        assert_eq!(refused.status.code(), Some(1));
        let said = stderr(&refused);
        assert!(
            said.contains("in use") && said.contains("stop the node first"),
            "{said}"
        );
    }
}

#[test]
fn a_directory_that_is_no_nodes_is_not_made_one() {
    let dir = tempfile::tempdir().unwrap();
    let refused = wrenn(dir.path(), &["stats"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("no data directory of a node"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
