//! Clocks that jump and clocks that differ.
//!
//! The wall clock of one daemon is moved while it runs: a preloaded library (`clock.c`) shifts what it
//! reads. The boot clock, by which leases run, is set to another value at start in a time namespace
//! of its own, which is how the boot clocks of two hosts relate.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use crate::{missing, wait_voters};

/// An hour, as a clock may be off after a change of a time zone or of a battery.
const HOUR: i64 = 3600;
/// How long each step is watched, over which every lease is renewed once; all of them together are
/// longer than a lease and its margin.
const WATCHED: Duration = Duration::from_millis(3500);
/// How often the steps are taken at most: on a busy machine an election may fall among them, and a
/// step that costs the leader its lease does so each time.
const TRIES: usize = 3;
/// Boot clocks of hosts that have been up for different times, in seconds. The first keeps its own.
const UP_FOR: [u64; 3] = [0, 90_000, 90_000_000];

/// A daemon's wall clock.
struct WallClock(File);

impl WallClock {
    /// Gives the daemon of `world`, which has not been started, a clock that can be moved.
    fn give(world: &mut World, library: &Path) -> Self {
        let path = world.dir().join("clock");
        let file = File::create_new(&path).expect("a new file");
        let clock = Self(file);
        clock.shift(0);
        let text = |path: &Path| path.to_str().expect("an ordinary path").to_owned();
        world.environment.extend([
            ("LD_PRELOAD".to_owned(), text(library)),
            ("WRENN_TEST_CLOCK".to_owned(), text(&path)),
        ]);
        clock
    }

    fn shift(&self, seconds: i64) {
        let written = self.0.write_all_at(&seconds.to_ne_bytes(), 0);
        written.expect("the file takes eight bytes");
    }
}

/// Builds the library that shifts clocks.
fn library(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/clock.c");
    let built = dir.join("clock.so");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&built, &source])
        .args(["-ldl"])
        .status()
        .expect("a C compiler, which building Wrenn needs too");
    assert!(status.success());
    built
}

#[test]
fn i1_steps_of_a_wall_clock_and_unlike_boot_clocks_cost_nobody_a_lease() {
    let dir = tempfile::tempdir().expect("a temp dir");
    let library = library(dir.path());
    let mut clocks = Vec::new();
    let mut cluster = ClusterWorld::alone(3, |number, world| {
        clocks.push(WallClock::give(world, &library));
        let up_for = UP_FOR[usize::from(number) - 1].to_string();
        let in_its_own_time = ["unshare", "--time", "--boottime", &up_for];
        world.launcher = in_its_own_time.map(str::to_owned).to_vec();
    });
    wait_voters(cluster.client(1), 3);
    unlike_boot_clocks(&cluster);
    let mut written = Vec::new();
    let stepped = (0..TRIES).find_map(|_| step_clocks(&cluster, &clocks, &mut written));
    let follower = stepped.expect("no election while clocks step");
    off_by_an_hour(&cluster, &library);
    clocks[usize::from(follower) - 1].shift(0);
    // The jump is in the records too; a restart reads them again.
    cluster.stop(follower);
    cluster.start(follower);
    cluster.wait_members(3);
    assert_eq!(
        missing(cluster.client(follower), &written),
        Vec::<String>::new()
    );
}

/// Steps the leader's clock and that of a follower, whose number it returns; `None` where there was
/// an election meanwhile.
fn step_clocks(
    cluster: &ClusterWorld,
    clocks: &[WallClock],
    written: &mut Vec<String>,
) -> Option<u16> {
    for clock in clocks {
        clock.shift(0);
    }
    let leader = cluster.wait_leader();
    // Not node 1: by it a stranger comes in, whose clock is off in its turn.
    let follower = if leader == 2 { 3 } else { 2 };
    let before = reign(cluster);
    for (number, shift) in [
        (leader, HOUR),
        (follower, -HOUR),
        (leader, -HOUR),
        (leader, 0),
    ] {
        clocks[usize::from(number) - 1].shift(shift);
        assert_shifted(cluster.client(number), shift);
        go_on(cluster, written);
    }
    let after = reign(cluster);
    if after != before {
        println!("an election while clocks stepped: {before:?}, then {after:?}");
        return None;
    }
    Some(follower)
}

/// The term and its leader, as node 1 knows them.
fn reign(cluster: &ClusterWorld) -> (Value, Value) {
    let seen = cluster.client(1).call("GET", "/v1/cluster", None).json();
    (seen["term"].clone(), seen["leader"].clone())
}

/// Each daemon does live in a time of its own.
fn unlike_boot_clocks(cluster: &ClusterWorld) {
    for (number, up_for) in (1..=3).zip(UP_FOR) {
        let file = format!("/proc/{}/timens_offsets", cluster.client(number).pid());
        let offsets = fs::read_to_string(file).expect("the kernel has time namespaces");
        let boot = offsets.lines().find(|line| line.starts_with("boottime"));
        let seconds = boot.and_then(|line| line.split_whitespace().nth(1));
        assert_eq!(seconds, Some(up_for.to_string().as_str()), "{offsets}");
    }
}

/// What it stamps is off by so much.
fn assert_shifted(world: &World, shift: i64) {
    let made = world.call("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 600 })));
    assert_eq!(made.status, 201, "{}", made.json());
    let told = made.json()["created_at"]
        .as_str()
        .expect("a time")
        .to_owned();
    let read = Command::new("date").args(["+%s", "-d", &told]).output();
    let read = String::from_utf8(read.expect("date").stdout).expect("digits");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = i64::try_from(now.expect("after 1970").as_secs()).expect("it fits");
    let off = read.trim().parse::<i64>().expect("seconds") - now;
    assert!(
        (off - shift).abs() < 5,
        "{told} is off by {off} s, not {shift}"
    );
}

/// Everybody is there for everybody, and takes writes.
fn go_on(cluster: &ClusterWorld, written: &mut Vec<String>) {
    let until = Instant::now() + WATCHED;
    while Instant::now() < until {
        for number in 1..=3 {
            let world = cluster.client(number);
            let nodes = world.call("GET", "/v1/nodes", None).json();
            let all = nodes.as_array().into_iter().flatten();
            let states: Vec<&Value> = all.map(|node| &node["state"]).collect();
            assert_eq!(states, ["alive"; 3], "seen by node {number}");
            let made = world.call("POST", "/v1/tokens", Some(&json!({ "ttl_sec": 86_400 })));
            assert_eq!(made.status, 201, "{}", made.json());
            written.push(made.json()["id"].as_str().expect("an id").to_owned());
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// A host whose clock is wrong is told so before it is let in.
fn off_by_an_hour(cluster: &ClusterWorld, library: &Path) {
    let made = cluster
        .client(1)
        .call("POST", "/v1/tokens", Some(&json!({})));
    let token = made.json()["token"].as_str().expect("a token").to_owned();
    let mut stranger = cluster.stranger(4, &token);
    let clock = WallClock::give(&mut stranger, library);
    for (shift, way) in [(HOUR, "ahead of"), (-HOUR, "behind")] {
        clock.shift(shift);
        let mut command = stranger.command();
        let ended = command.stdin(Stdio::null()).output().expect("wrenn runs");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        let named = said.contains("clock is") && said.contains(way);
        assert!(named && !ended.status.success(), "{said}");
    }
}
