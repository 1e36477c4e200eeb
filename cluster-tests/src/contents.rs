//! What a guest has that must outlive its pauses: a file in memory, a file on the disk, and a process
//! that keeps its count nowhere but in its own memory.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::client::wait_for;
use crate::world::World;

/// Longest that something soon to come may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How far the clock of a guest that was brought back may be off.
const CLOCK_MARGIN: Duration = Duration::from_millis(500);
/// The process that counts, and shows it.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $$ $i > /dev/shm/shown; \
                       mv /dev/shm/shown /dev/shm/count; sleep 0.1; done";
/// The files.
const FILES: &str = "/root/random /dev/shm/random";

/// The contents of one guest, as they were last made.
#[derive(Clone, Debug)]
pub struct Contents {
    kib: u32,
    hashes: String,
    counter: u32,
    count: u32,
}

impl Contents {
    /// Fills a guest: two files of `kib` each, and the process.
    ///
    /// # Panics
    /// When something of it fails.
    #[must_use]
    pub fn make(world: &World, id: &str, kib: u32) -> Self {
        world.output(
            id,
            &format!(
                "mkdir -p /dev/shm; grep -q ' /dev/shm tmpfs' /proc/mounts || \
                 mount -t tmpfs tmpfs /dev/shm; \
                 for file in {FILES}; do dd if=/dev/urandom of=$file bs=1024 count={kib} 2>&1; done"
            ),
        );
        let request =
            json!({ "cmd": "/bin/sh", "args": ["-c", COUNTER], "background": true, "tag": "kept" });
        let started = world.run(id, &request);
        assert_eq!(started.status, 202, "{}", started.json());
        let seen = wait_for(PATIENCE, || {
            let seen = counted(world, id)?;
            (seen.1 > 2).then_some(seen)
        });
        let (counter, count) = seen.expect("it counts");
        Self {
            kib,
            hashes: hashes(world, id),
            counter,
            count,
        }
    }

    /// Writes `kib` anew in the middle of each file, somewhere else each `round`. The one on the disk
    /// is not written out.
    ///
    /// # Panics
    /// When that fails, or has changed nothing.
    pub fn rewrite(&mut self, world: &World, id: &str, kib: u32, round: u32) {
        let seek = round * kib % self.kib.saturating_sub(kib).max(1);
        let ran = world.output(
            id,
            &format!(
                "for file in {FILES}; do dd if=/dev/urandom of=$file bs=1024 count={kib} \
                 seek={seek} conv=notrunc 2>&1; done > /dev/null; sha256sum {FILES}"
            ),
        );
        assert_ne!(ran, self.hashes);
        self.hashes = ran;
    }

    /// The files are the same, the process is, and it goes on from where it was.
    ///
    /// # Panics
    /// Where that is not so.
    pub fn are_there(&self, world: &World, id: &str) {
        assert_eq!(hashes(world, id), self.hashes, "\n{}", world.log());
        let (counter, count) = counted(world, id).expect("its count is shown");
        assert_eq!(counter, self.counter, "it is another process");
        assert!(count >= self.count, "{count} after {}", self.count);
        let goes_on = wait_for(PATIENCE, || (counted(world, id)?.1 > count).then_some(()));
        assert!(goes_on.is_some(), "it stands still at {count}");
        let listed = world.about("GET", id, "/processes", None).json();
        assert_eq!(listed["processes"][0]["tag"], "kept", "{listed}");
        let off = clock_off(world, id);
        assert!(off <= CLOCK_MARGIN, "the clock is off by {off:?}");
    }
}

fn hashes(world: &World, id: &str) -> String {
    // From the disk itself, not from what is still in memory of it.
    let line = format!("sync; echo 1 > /proc/sys/vm/drop_caches; sha256sum {FILES}");
    world.output(id, &line)
}

/// The pid of the counting process and its count.
fn counted(world: &World, id: &str) -> Option<(u32, u32)> {
    let ran = world.exec(id, "cat /dev/shm/count");
    let (pid, count) = ran["stdout"].as_str()?.trim_end().split_once(' ')?;
    Some((pid.parse().ok()?, count.parse().ok()?))
}

/// How far the guest's clock was certainly outside the time in which it was read.
fn clock_off(world: &World, id: &str) -> Duration {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    let asked = now().expect("after 1970");
    let shown = world.output(id, "date +%s%N");
    let answered = now().expect("after 1970");
    let shown = Duration::from_nanos(shown.parse().expect("nanoseconds"));
    println!("asked at {asked:?}, the guest's clock shows {shown:?}, answered at {answered:?}");
    let early = asked.saturating_sub(shown);
    early.max(shown.saturating_sub(answered))
}
