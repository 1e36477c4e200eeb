//! A cluster in which nothing happens: nothing periodic goes through the log, and next to nothing to
//! the disks.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sys::signal::Signal;
use wrenn_cluster_tests::client::wait_for;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::signal;

use crate::{SETTLE_TIMEOUT, three_alone};

/// How long nothing may happen. Leases are renewed ten times in it, load is reported twenty times.
const IDLE: Duration = Duration::from_secs(20);
/// Nothing has happened for so long: what came with forming the cluster is over, the flush of the
/// derived copy too.
const CALM: Duration = Duration::from_secs(8);
/// Most watches: on a busy machine an election may fall into one, and the entry with which a leader
/// begins is not what is looked for. A log that grows by itself does so in each of them.
const WATCHES: usize = 3;
/// Most syncs of one node in a second.
const SYNCS_PER_SECOND: u32 = 2;
/// Most bytes a node may write while idle: logs, and a lease file of one block a renewal.
const WRITTEN_BYTES: u64 = 256 * 1024;

#[test]
fn an_idle_cluster_does_not_grow_its_log_and_hardly_syncs() {
    let cluster = three_alone();
    let watched = (0..WATCHES).any(|_| is_idle_for_a_while(&cluster));
    assert!(watched, "elections in each watch:\n{}", cluster.logs());
}

/// One watch; false where there was an election meanwhile.
fn is_idle_for_a_while(cluster: &ClusterWorld) -> bool {
    wait_calm(cluster);
    let terms = told(cluster, "term");
    let (index, written) = (applied(cluster), written(cluster));
    let counters: Vec<_> = (1..=3).map(|number| Syncs::of(cluster, number)).collect();
    thread::sleep(IDLE);
    let syncs: Vec<_> = counters.into_iter().map(|it| it.map(Syncs::stop)).collect();
    let (index_after, written_after) = (applied(cluster), self::written(cluster));
    let terms_after = told(cluster, "term");
    if terms_after != terms {
        println!("an election fell into the watch: {terms:?}, then {terms_after:?}");
        return false;
    }
    assert_eq!(index_after, index, "the log grew");
    for ((number, before), after) in written.into_iter().zip(written_after.values()) {
        println!("node {number}: {} bytes written", after - before);
        assert!(after - before < WRITTEN_BYTES, "node {number}");
    }
    match syncs.into_iter().collect::<Option<Vec<u32>>>() {
        None => println!("syncs were not counted: strace is not installed"),
        Some(counts) => {
            println!("syncs in {IDLE:?}: {counts:?}");
            let most = SYNCS_PER_SECOND * u32::try_from(IDLE.as_secs()).expect("seconds");
            assert!(counts.iter().all(|count| *count < most), "{counts:?}");
        }
    }
    true
}

fn wait_calm(cluster: &ClusterWorld) {
    let (mut seen, mut since) = (applied(cluster), Instant::now());
    let calm = wait_for(SETTLE_TIMEOUT, || {
        let now = applied(cluster);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        (since.elapsed() > CALM).then_some(())
    });
    assert!(calm.is_some(), "it never calms down:\n{}", cluster.logs());
}

/// The last entry that each node has applied.
fn applied(cluster: &ClusterWorld) -> BTreeMap<u16, u64> {
    told(cluster, "applied_index")
}

/// A number that each node tells of the cluster.
fn told(cluster: &ClusterWorld, field: &str) -> BTreeMap<u16, u64> {
    let of = |number| {
        let seen = cluster.client(number).call("GET", "/v1/cluster", None);
        seen.json()[field].as_u64().expect("a number")
    };
    (1..=3).map(|number| (number, of(number))).collect()
}

/// The bytes that each daemon has had written to disks.
fn written(cluster: &ClusterWorld) -> BTreeMap<u16, u64> {
    let of = |number| {
        let file = format!("/proc/{}/io", cluster.client(number).pid());
        let counters = fs::read_to_string(file).expect("the kernel counts");
        let mut lines = counters.lines();
        let bytes = lines.find_map(|line| line.strip_prefix("write_bytes: "));
        bytes.and_then(|it| it.parse().ok()).expect("a number")
    };
    (1..=3).map(|number| (number, of(number))).collect()
}

/// Counts the syncs of one daemon.
struct Syncs {
    strace: std::process::Child,
    output: std::path::PathBuf,
}

impl Syncs {
    /// `None` where there is no strace.
    fn of(cluster: &ClusterWorld, number: u16) -> Option<Self> {
        let world = cluster.client(number);
        let output = world.dir().join("syncs");
        let strace = Command::new("strace")
            .args([
                "-f",
                "-e",
                "trace=fsync,fdatasync,sync_file_range,msync,syncfs",
            ])
            .arg("-o")
            .arg(&output)
            .args(["-p", &world.pid().to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self { strace, output })
    }

    fn stop(mut self) -> u32 {
        signal(self.strace.id(), Signal::SIGTERM);
        let _status = self.strace.wait();
        let text = fs::read_to_string(&self.output).expect("what strace saw");
        let calls = text
            .lines()
            .filter(|line| line.contains("sync") && !line.contains("resumed"));
        u32::try_from(calls.count()).expect("few")
    }
}
