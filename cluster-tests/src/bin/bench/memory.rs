//! What a node costs while nobody uses it: memory, processor, syncs.
//!
//! The daemon is looked at when it is fresh, with the records of [`RECORDS`] capsules (created and
//! destroyed again; their records stay for a day), and with [`RUNNING`] capsules at rest. Guests
//! are another program's memory and not counted. `rss` is what is resident, shared pages of the
//! binary and of libc included in each process that maps them; `pss` divides them up.
//!
//! Syncs are counted by `strace` where it is installed, since the kernel counts them nowhere.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use wrenn_cluster_tests::world::World;

use crate::create::{connect, destroy};
use crate::figures::{Samples, at_most, figure, ms};
use crate::process::{self, Memory};
use crate::{Outcome, Run};

/// Capsules whose records the daemon keeps.
const RECORDS: usize = 20;
/// Capsules that run: enough to see what one costs, few enough to boot under emulation.
const RUNNING: usize = 2;
/// The most that a shim may hold.
const SHIM_GOAL_MIB: f64 = 8.0;
/// The most that an idle daemon may hold.
const DAEMON_GOAL_MIB: f64 = 30.0;
/// The most of one core that it may use, in percent.
const PROCESSOR_GOAL_PERCENT: f64 = 0.5;
/// The most syncs a second.
const SYNCS_GOAL: f64 = 2.0;
/// How long the node is left alone before it is looked at.
const SETTLE: Duration = Duration::from_secs(3);
/// How long it is watched.
const WATCH: Duration = Duration::from_secs(10);
/// Longest wait for a capsule to appear in the list, or to be gone from it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Measures a node at rest.
pub(crate) fn run(run: &Run) -> Outcome {
    let world = World::new();
    run.note("a fresh node");
    let fresh = daemon_at_rest(&world, "daemon_0_records")?;
    at_most("daemon_rss_0_records", fresh.resident, DAEMON_GOAL_MIB);
    idle(run, &world, "idle")?;
    run.note(&format!("{RECORDS} records"));
    for _ in 0..RECORDS {
        run.go_on()?;
        leave_a_record(&world)?;
    }
    let kept = daemon_at_rest(&world, &format!("daemon_{RECORDS}_records"))?;
    let name = format!("daemon_rss_{RECORDS}_records");
    at_most(&name, kept.resident, DAEMON_GOAL_MIB);
    run.note(&format!("{RUNNING} running capsules"));
    shims(run, &world)
}

fn shims(run: &Run, world: &World) -> Outcome {
    let mut ids = Vec::new();
    for _ in 0..RUNNING {
        run.go_on()?;
        ids.push(world.capsule());
    }
    daemon_at_rest(world, &format!("daemon_{RUNNING}_running"))?;
    idle(run, world, &format!("idle_{RUNNING}_running"))?;
    let (mut resident, mut anonymous, mut proportional) = Default::default();
    for id in &ids {
        let memory = process::memory(world.shim_pid(id))?;
        Samples::add(&mut resident, memory.resident);
        Samples::add(&mut anonymous, memory.anonymous);
        Samples::add(&mut proportional, memory.proportional);
    }
    resident.print_p50("shim_rss", "MiB");
    anonymous.print_p50("shim_anonymous", "MiB");
    proportional.print_p50("shim_pss", "MiB");
    at_most("shim_rss", resident.p99(), SHIM_GOAL_MIB);
    let mut api = connect(world)?;
    for id in &ids {
        destroy(&mut api, id)?;
    }
    Ok(())
}

/// The daemon's memory after a rest.
fn daemon_at_rest(world: &World, name: &str) -> Outcome<Memory> {
    thread::sleep(SETTLE);
    let memory = process::memory(world.pid())?;
    figure(&format!("{name}_rss"), memory.resident, "MiB");
    figure(&format!("{name}_anonymous"), memory.anonymous, "MiB");
    figure(&format!("{name}_pss"), memory.proportional, "MiB");
    Ok(memory)
}

/// What the daemon does while nobody asks for anything.
fn idle(run: &Run, world: &World, name: &str) -> Outcome {
    let before = process::thread_time(world.pid())?;
    let start = Instant::now();
    thread::sleep(WATCH);
    let spent = process::thread_time(world.pid())?.saturating_sub(before);
    let percent = 100.0 * ms(spent) / ms(start.elapsed());
    figure(&format!("{name}_processor"), percent, "%");
    at_most(
        &format!("{name}_processor"),
        percent,
        PROCESSOR_GOAL_PERCENT,
    );
    match count_syncs(world.pid())? {
        Some(per_second) => {
            figure(&format!("{name}_syncs"), per_second, "/s");
            at_most(&format!("{name}_syncs"), per_second, SYNCS_GOAL);
        }
        None => run.note("strace is not installed: syncs are not counted"),
    }
    Ok(())
}

/// Syncs a second over [`WATCH`]; `None` without `strace`.
fn count_syncs(pid: u32) -> Outcome<Option<f64>> {
    let (pid, seconds) = (pid.to_string(), WATCH.as_secs().to_string());
    let calls = "trace=fsync,fdatasync,sync_file_range,msync,syncfs,sync";
    let traced = Command::new("timeout")
        .args(["--signal=INT", &seconds, "strace", "-f", "-qq", "-e", calls])
        .args(["-e", "signal=none", "-p", &pid])
        .stdin(Stdio::null())
        .output()?;
    /// What `timeout` ends with when the program is not there.
    const NOT_FOUND: i32 = 127;
    if traced.status.code() == Some(NOT_FOUND) {
        return Ok(None);
    }
    let lines = String::from_utf8_lossy(&traced.stderr).into_owned();
    // A call that another thread interrupts takes two lines.
    let is_call = |line: &&str| line.contains("sync") && !line.contains("resumed>");
    let count = lines.lines().filter(is_call).count();
    Ok(Some(count as f64 / WATCH.as_secs_f64()))
}

/// Creates a capsule and destroys it before its guest has booted.
fn leave_a_record(world: &World) -> Outcome {
    let request = json!({ "memory_mb": 128 }).to_string();
    // Nobody waits for the answer, which would come with the boot.
    let mut unheard = connect(world)?;
    unheard.send("POST", "/v1/capsules", request.as_bytes())?;
    let mut api = connect(world)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let listed = api.call("GET", "/v1/capsules", b"")?.expect(200)?.json()?;
        if let Some(id) = listed[0]["id"].as_str() {
            return destroy(&mut api, id);
        }
        if Instant::now() > deadline {
            return Err("the capsule does not appear in the list".into());
        }
        thread::sleep(LOOK_AGAIN);
    }
}
