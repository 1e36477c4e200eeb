//! A process that is killed at any moment loses nothing it acknowledged.
//!
//! The test runs itself: with [`CHILD`] set, the binary is a writer that opens the folder, checks
//! what the file of acknowledgements says, and writes on until it is killed. Killing a process
//! keeps the page cache, so this finds mistakes in our own order of things, not missing syncs.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{get, set, start};
use rand::Rng;

/// Names the folder the child works in.
const CHILD: &str = "WRENN_TEST_KILLED_WRITER";
/// Names of the keys, so that rows change as well as grow.
const KEYS: u64 = 40;

#[test]
fn nothing_acknowledged_is_lost_by_kill() {
    if let Some(dir) = std::env::var_os(CHILD) {
        write_until_killed(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut lived = 0;
    for _ in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "nothing_acknowledged_is_lost_by_kill",
                "--nocapture",
            ])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap() == "ready");
        assert!(ready, "the writer found something missing");
        let millis = rand::rng().random_range(0..150);
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().unwrap();
        child.wait().unwrap();
        lived += millis;
    }
    let acknowledged = fs::read_to_string(dir.path().join("acknowledged")).unwrap();
    println!(
        "{} acknowledged writes in {lived} ms",
        acknowledged.lines().count()
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { check(dir.path()).await.0.shutdown().await });
}

type Group = wrenn_raft::group::Group<common::toy::Toy>;

/// Opens the folder and compares it with the file of acknowledgements; returns the next number.
async fn check(dir: &Path) -> (Group, u64) {
    let group = start(dir).await;
    let text = fs::read_to_string(dir.join("acknowledged")).unwrap_or_default();
    let last: u64 = text.lines().last().map_or(0, |line| line.parse().unwrap());
    for number in last.saturating_sub(KEYS - 1).max(1)..=last {
        let found = get(&group, &format!("key {}", number % KEYS));
        let found: u64 = found.expect("the key is there").parse().unwrap();
        // One more than was noted may have been applied.
        assert!(
            found == number || found == number + KEYS,
            "{number}: {found}"
        );
    }
    (group, last + 1)
}

fn write_until_killed(dir: &Path) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let end = runtime.block_on(async {
        let (group, mut number) = check(dir).await;
        let mut options = OpenOptions::new();
        let mut noted = options
            .create(true)
            .append(true)
            .open(dir.join("acknowledged"))
            .unwrap();
        println!("\nready");
        loop {
            set(
                &group,
                &format!("key {}", number % KEYS),
                &number.to_string(),
            )
            .await;
            writeln!(noted, "{number}").unwrap();
            number += 1;
            if number == u64::MAX {
                break number;
            }
        }
    });
    panic!("the writer ended by itself at {end}")
}
