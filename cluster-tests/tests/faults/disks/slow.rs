//! A leader whose disk is slow does not hold the cluster up: two others make a change durable, and
//! their clients wait at most for an election.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use wrenn_cluster_tests::cluster::ClusterWorld;

use crate::door::{Change, Door};
use crate::{missing, wait_voters};

/// The log's segment, the state, and room.
const DISK_MIB: u64 = 200;
/// How long a disk is slow.
const SLOW_FOR: Duration = Duration::from_secs(8);
/// What a sync takes then, a hundred times what it takes otherwise.
const SYNC_AT_LEAST: Duration = Duration::from_millis(500);
/// Longest a client of another node may wait meanwhile: an attempt, an election, an attempt.
const WAIT_AT_MOST: Duration = Duration::from_secs(5);
/// Fewer writes of one client in that time, and its node stands.
const ENOUGH: usize = 20;

/// The kernel's block controller, in either version.
enum Controller {
    First(PathBuf),
    Second(PathBuf),
}

/// A group of processes with a rate of its own.
struct Throttle {
    group: PathBuf,
    controller: Controller,
}

impl Throttle {
    /// `None` where the kernel offers no block controller.
    fn new(name: &str) -> Option<Self> {
        let first = Path::new("/sys/fs/cgroup/blkio");
        let second = Path::new("/sys/fs/cgroup");
        let offered = fs::read_to_string(second.join("cgroup.subtree_control"));
        let (group, controller) = if first.join("blkio.throttle.write_iops_device").exists() {
            let group = first.join(name);
            let file = group.join("blkio.throttle.write_iops_device");
            (group, Controller::First(file))
        } else if offered.is_ok_and(|all| all.split_whitespace().any(|it| it == "io")) {
            let group = second.join(name);
            let file = group.join("io.max");
            (group, Controller::Second(file))
        } else {
            return None;
        };
        fs::create_dir(&group).ok()?;
        Some(Self { group, controller })
    }

    fn take(&self, pid: u32) {
        fs::write(self.group.join("cgroup.procs"), pid.to_string()).expect("it moves");
    }

    /// How long one sync of one block takes in this group, on the file system of `dir`.
    fn sync_takes(&self, dir: &Path) -> Duration {
        let probe = dir.join("probe");
        let line = format!(
            "echo $$ > {}/cgroup.procs && exec dd if=/dev/zero of={} bs=4k count=1 conv=fdatasync status=none",
            self.group.display(),
            probe.display()
        );
        let begun = Instant::now();
        let status = Command::new("sh").args(["-c", &line]).status();
        assert!(status.expect("a shell").success());
        fs::remove_file(probe).expect("it was made");
        begun.elapsed()
    }

    /// Lets so many writes a second through to a device, or any number.
    fn writes_per_second(&self, device: &str, count: Option<u32>) {
        let (file, rule) = match &self.controller {
            Controller::First(file) => (file, format!("{device} {}", count.unwrap_or(0))),
            Controller::Second(file) => {
                let count = count.map_or("max".to_owned(), |count| count.to_string());
                (file, format!("{device} wiops={count}"))
            }
        };
        fs::write(file, rule).expect("the controller takes a rule");
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let parent = self.group.parent().expect("it is in a hierarchy");
        for pid in fs::read_to_string(self.group.join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
        {
            let _gone = fs::write(parent.join("cgroup.procs"), pid);
        }
        if let Err(err) = fs::remove_dir(&self.group) {
            eprintln!("{} stays: {err}", self.group.display());
        }
    }
}

/// The device, as `major:minor`, under a data directory.
fn device(data: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let number = fs::metadata(data).expect("a directory").dev();
    format!("{}:{}", libc::major(number), libc::minor(number))
}

#[test]
fn a_leader_with_a_slow_disk_does_not_hold_the_cluster_up() {
    let name = format!("wrenn-test-{}", std::process::id());
    let Some(throttle) = Throttle::new(&name) else {
        println!("not shown here: the kernel offers no block controller");
        return;
    };
    let mut cluster = ClusterWorld::alone(3, |_, world| world.use_own_disk(DISK_MIB));
    wait_voters(cluster.client(1), 3);
    let doors = Door::all(&cluster);
    let mut written = Vec::new();
    for times in write_for(&doors, SLOW_FOR / 5, &mut written) {
        report("good disks", times);
    }
    let leader = cluster.wait_leader();
    let data = cluster.client(leader).data();
    let device = device(&data);
    throttle.take(cluster.client(leader).pid());
    throttle.writes_per_second(&device, Some(1));
    let sync = throttle.sync_takes(&data);
    assert!(sync > SYNC_AT_LEAST, "the disk is not slow: {sync:?}");
    println!("the syncs of node {leader}, which leads, take {sync:?}");
    let all = write_for(&doors, SLOW_FOR, &mut written);
    throttle.writes_per_second(&device, None);
    for (number, times) in (1..).zip(all) {
        let (count, longest) = report(&format!("through node {number}"), times);
        // Once deposed it must write a vote before it knows by whom, so its own clients may be told
        // to ask elsewhere.
        if number != leader {
            assert!(longest < WAIT_AT_MOST, "{longest:?}\n{}", cluster.logs());
            assert!(count > ENOUGH, "{count}\n{}", cluster.logs());
        }
    }
    cluster.wait_members(3);
    println!("node {leader} led, node {} does now", cluster.wait_leader());
    // What it had not written yet it writes now; then a crash shows what it has.
    cluster.kill(leader);
    cluster.start(leader);
    cluster.wait_members(3);
    for number in 1..=3 {
        let lost = missing(cluster.client(number), &written);
        assert!(lost.is_empty(), "node {number} lost {lost:?}");
    }
}

/// How long each write took, for one client of each node.
fn write_for(doors: &[Door], lasting: Duration, written: &mut Vec<String>) -> Vec<Vec<Duration>> {
    let until = Instant::now() + lasting;
    let client = |door: &Door| {
        let (mut times, mut made) = (Vec::new(), Vec::new());
        while Instant::now() < until {
            let begun = Instant::now();
            match door.make_token() {
                Change::Made(answer) => {
                    made.push(answer.json()["id"].as_str().expect("an id").to_owned());
                }
                other => println!("{:?}: {other:?}", begun.elapsed()),
            }
            times.push(begun.elapsed());
            thread::sleep(Duration::from_millis(5));
        }
        (times, made)
    };
    let all: Vec<_> = thread::scope(|scope| {
        let clients: Vec<_> = doors
            .iter()
            .map(|door| scope.spawn(move || client(door)))
            .collect();
        clients
            .into_iter()
            .map(|it| it.join().expect("a client"))
            .collect()
    });
    let (times, made): (_, Vec<_>) = all.into_iter().unzip();
    written.extend(made.into_iter().flatten());
    times
}

/// Says how long writes took; returns how many there were, and the longest.
fn report(what: &str, mut times: Vec<Duration>) -> (usize, Duration) {
    times.sort_unstable();
    let (count, longest) = (times.len(), *times.last().expect("some"));
    let median = times[count / 2];
    println!("{what}: {count} writes, median {median:?}, longest {longest:?}");
    (count, longest)
}
