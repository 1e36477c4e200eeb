//! A node whose disk is full steps aside, says why, and comes back when there is room.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::door::{Change, Door};
use crate::{SETTLE_TIMEOUT, missing, wait_voters};

/// A segment of the log, and as much again for the next and all else.
const DISK_MIB: u32 = 150;
/// Writes that must be acknowledged by the others alone.
const RECORDS: usize = 30;
/// Longest the others may need to go on: an election and what a busy machine adds.
const GO_ON_WITHIN: Duration = Duration::from_secs(10);

#[test]
fn i2_a_node_with_a_full_disk_steps_aside_and_loses_nothing() {
    let mut cluster = ClusterWorld::with(3, |_, world| world.use_small_disk(DISK_MIB));
    wait_voters(cluster.client(1), 3);
    for number in 1..=3 {
        cluster.stop(number);
        dig_holes(&cluster.client(number).data());
        cluster.start(number);
        cluster.wait_members(3);
    }
    let full = cluster.wait_leader();
    let others: Vec<u16> = (1..=3).filter(|it| *it != full).collect();
    let doors = Door::all(&cluster);
    let mut written = Vec::new();
    write(&doors, &mut written);

    let filler = fill(&cluster.client(full).data());
    let begun = Instant::now();
    let rest: Vec<Door> = others
        .iter()
        .map(|it| doors[usize::from(*it) - 1].clone())
        .collect();
    while written.len() < 2 * RECORDS {
        write(&rest, &mut written);
        assert!(begun.elapsed() < SETTLE_TIMEOUT, "{}", cluster.logs());
    }
    let ended = wait_for(SETTLE_TIMEOUT, || {
        (!cluster.node(full).is_alive()).then_some(())
    });
    assert!(
        ended.is_some(),
        "it goes on:\n{}",
        cluster.client(full).log()
    );
    println!(
        "the leader was out {:?} after its disk was full",
        begun.elapsed()
    );
    assert_says_full(cluster.client(full));
    let begun = Instant::now();
    write(&rest, &mut written);
    assert!(begun.elapsed() < GO_ON_WITHIN, "{:?}", begun.elapsed());

    // Without room it does not come back, and says so again.
    let still = cluster.client(full).command().stdin(Stdio::null()).output();
    let said = String::from_utf8_lossy(&still.expect("wrenn runs").stderr).into_owned();
    println!(
        "{}",
        said.lines()
            .find(|line| line.starts_with("error"))
            .unwrap_or("it started")
    );

    fs::remove_file(filler).expect("the filler goes");
    cluster.start(full);
    cluster.wait_members(3);
    for number in 1..=3 {
        let lost = missing(cluster.client(number), &written);
        assert!(lost.is_empty(), "node {number} lost {lost:?}");
    }
}

fn assert_says_full(world: &World) {
    let log = world.log();
    let said = log.lines().find(|line| line.starts_with("error"));
    let said = said.unwrap_or_else(|| panic!("no reason is given:\n{log}"));
    println!("{said}");
    assert!(said.contains("the disk is full"), "{said}");
}

/// Has each of these nodes make records, once.
fn write(doors: &[Door], written: &mut Vec<String>) {
    for door in doors {
        if let Change::Made(answer) = door.make_token() {
            written.push(answer.json()["id"].as_str().expect("an id").to_owned());
        }
    }
}

/// Gives back what the segments of the log only reserve.
fn dig_holes(data: &Path) {
    for entry in fs::read_dir(data.join("raft/log")).expect("a log") {
        let status = Command::new("fallocate")
            .arg("--dig-holes")
            .arg(entry.expect("an entry").path())
            .status();
        assert!(status.expect("fallocate is part of util-linux").success());
    }
}

/// Takes all that is left of the disk under `data`.
fn fill(data: &Path) -> PathBuf {
    let path = data.join("filler");
    let mut file = File::create_new(&path).expect("a new file");
    for size in [1 << 20, 4096, 1] {
        let piece = vec![1; size];
        let full = loop {
            if let Err(err) = file.write_all(&piece) {
                break err;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::StorageFull, "{full}");
    }
    path
}
