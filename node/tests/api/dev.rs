//! `wrenn dev` and `wrenn doctor` where no node runs: what they refuse, and how they say so.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn wrenn(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wrenn"))
        .args(args)
        .current_dir(dir)
        .env_remove("WRENN_DEV_DIR")
        .env_remove("WRENN_IMAGES")
        .output()
        .expect("a process")
}

fn complaint(ran: &Output) -> String {
    String::from_utf8_lossy(&ran.stderr).into_owned()
}

#[test]
fn a_cluster_that_cannot_be_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().expect("a directory");
    for args in [
        &["--nodes", "0"][..],
        &["--nodes", "7000"],
        &["--nodes", "2", "--port-base", "65520"],
    ] {
        let ran = wrenn(dir.path(), &[&["dev", "up"], args].concat());
        assert_eq!(ran.status.code(), Some(2), "{args:?}");
        assert!(complaint(&ran).contains("hint: "), "{}", complaint(&ran));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_partition_needs_sides_of_nodes_that_exist() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = dir.path().join("c");
    std::fs::create_dir(&cluster).unwrap();
    let told = r#"{"nodes":3,"port_base":7320,"images_dir":"/none","node_args":[],"known":[]}"#;
    std::fs::write(cluster.join("cluster.json"), told).unwrap();
    for sides in ["1|4", "1,2,3", "1|1", "x", ""] {
        let ran = wrenn(dir.path(), &["dev", "partition", sides, "--dir", "c"]);
        assert_eq!(ran.status.code(), Some(2), "{sides:?}");
        assert!(complaint(&ran).contains("1|2,3"), "{}", complaint(&ran));
    }
    let ran = wrenn(dir.path(), &["dev", "pause", "1", "--dir", "c"]);
    assert_eq!(ran.status.code(), Some(1));
    assert!(complaint(&ran).contains("wrenn dev start 1"));
}

#[test]
fn a_port_that_is_taken_is_blamed_on_its_holder() {
    // A port with room for the ones after it.
    let (listener, port) = (20_000..60_000)
        .find_map(|port| Some((TcpListener::bind(("127.0.0.1", port)).ok()?, port)))
        .expect("a port");
    let dir = tempfile::tempdir().expect("a directory");
    let ran = wrenn(dir.path(), &["dev", "up", "--port-base", &port.to_string()]);
    assert_eq!(ran.status.code(), Some(1));
    let wanted = format!("port {port} is taken by process {}", std::process::id());
    assert!(complaint(&ran).contains(&wanted), "{}", complaint(&ran));
    drop(listener);
}

#[test]
fn commands_for_a_cluster_that_was_never_started_say_so() {
    let dir = tempfile::tempdir().expect("a directory");
    for args in [
        &["dev", "status"][..],
        &["dev", "env"],
        &["dev", "stop", "1"],
        &["dev", "start", "1"],
        &["dev", "kill", "1"],
        &["dev", "pause", "1"],
        &["dev", "resume", "1"],
        &["dev", "partition", "1|2"],
        &["dev", "heal"],
    ] {
        let ran = wrenn(dir.path(), args);
        assert_eq!(ran.status.code(), Some(1), "{args:?}");
        assert!(
            complaint(&ran).contains("hint: `wrenn dev up`"),
            "{}",
            complaint(&ran)
        );
        assert!(ran.stdout.is_empty());
    }
    assert!(wrenn(dir.path(), &["dev", "down"]).status.success());
}

#[test]
fn a_node_that_cannot_be_configured_names_the_setting() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("c.toml"), "slot_cuont = 1\n").unwrap();
    for (args, word) in [
        (&["node", "start", "--config", "c.toml"][..], "slot_cuont"),
        (&["node", "start", "--config", "none.toml"], "none.toml"),
        (
            &[
                "node",
                "start",
                "--vmm",
                "cloud-hypervisor",
                "--accelerator",
                "tcg",
            ],
            "it cannot emulate",
        ),
        (
            &["node", "start", "--slot-pool", "65", "--slot-count", "64"],
            "slot_pool = 65",
        ),
    ] {
        let ran = wrenn(dir.path(), args);
        assert_eq!(ran.status.code(), Some(1), "{args:?}");
        let complaint = complaint(&ran);
        assert!(
            complaint.starts_with("error: ") && complaint.contains(word),
            "{complaint}"
        );
        assert_eq!(complaint.lines().count(), 2, "{complaint}");
    }
    let ran = wrenn(dir.path(), &["node", "start", "--listen", "here"]);
    assert_eq!(ran.status.code(), Some(2));
}

#[test]
fn the_doctor_fails_where_images_are_missing() {
    let dir = tempfile::tempdir().expect("a directory");
    let images = dir.path().join("none").display().to_string();
    let ran = wrenn(
        dir.path(),
        &["doctor", "--json", "--no-boot", "--images-dir", &images],
    );
    assert_eq!(ran.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    assert_eq!(report["ok"], false);
    let checks = report["checks"].as_array().expect("checks");
    let kernel = checks
        .iter()
        .find(|it| it["name"] == "guest kernel")
        .expect("a check");
    assert_eq!(kernel["verdict"], "fail");
    assert!(kernel["action"].as_str().is_some_and(|it| !it.is_empty()));
}

#[test]
fn every_shell_has_completions() {
    let dir = tempfile::tempdir().expect("a directory");
    for shell in ["bash", "zsh", "fish"] {
        let ran = wrenn(dir.path(), &["completions", shell]);
        assert!(ran.status.success());
        assert!(
            String::from_utf8_lossy(&ran.stdout).contains("capsule"),
            "{shell}"
        );
    }
}
