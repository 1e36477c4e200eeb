//! From the death of the leader to the next write: ours beside etcd-server, both as they come.
//!
//! The leader's process is killed while nothing is under way; then the client writes to both
//! survivors until one of them has done it. An attempt is given up early and repeated, as a client
//! must that does not know who is alive: a put that etcd has handed on to its dead leader would
//! wait for seconds. Then the dead one starts again and catches up, and it is the other's turn.

use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::time;

use crate::figures::{Samples, ms, ratio};
use crate::trio::MEMBERS;
use crate::trio::Store as _;
use crate::trio::etcd::{self, Etcd};
use crate::trio::ours::{self, Ours};
use crate::{Outcome, Run};

/// Ours may take this share of etcd's time.
const GOAL: f64 = 0.7;
/// Longest one attempt lasts.
const ATTEMPT: Duration = Duration::from_millis(100);
/// Pause after an attempt that was refused at once.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest a failover may take at all.
const PATIENCE: Duration = Duration::from_secs(30);
/// Quiet time before a kill, so that everybody has everything.
const CALM: Duration = Duration::from_millis(1500);
/// A round takes some five seconds; this many are a minute.
const MAX_ROUNDS: usize = 8;

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let folder = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let runtime = Runtime::new()?;
    let mut etcd = Etcd::start(folder.path())?;
    let mut ours = runtime.block_on(Ours::start(folder.path()))?;
    let (mut our, mut their) = (Samples::default(), Samples::default());
    let rounds = run.runs.min(MAX_ROUNDS);
    for round in 1..=rounds {
        run.go_on()?;
        our.add(ms(runtime.block_on(kill_ours(&mut ours))?));
        their.add(ms(kill_etcd(&runtime, &mut etcd)?));
        run.note(&format!("round {round} of {rounds}"));
    }
    our.print("failover_ours", "ms");
    their.print("failover_etcd", "ms");
    ratio("failover_p50", our.p50(), their.p50(), GOAL);
    Ok(())
}

async fn kill_ours(ours: &mut Ours) -> Outcome<Duration> {
    time::sleep(CALM).await;
    let leader = ours.leader().await?;
    let mut doors = ours.doors();
    doors.remove(leader);
    let deadline = Instant::now() + PATIENCE;
    ours.kill(leader)?;
    let killed = Instant::now();
    tokio::select! {
        done = until_ours(&doors[0], deadline) => done?,
        done = until_ours(&doors[1], deadline) => done?,
    }
    let took = killed.elapsed();
    ours.restart(leader)?;
    Ok(took)
}

async fn until_ours(door: &ours::Door, deadline: Instant) -> Outcome {
    while Instant::now() < deadline {
        if door.put_within(0, ATTEMPT).await.is_ok() {
            return Ok(());
        }
        time::sleep(PAUSE).await;
    }
    Err("no survivor of ours takes a write".into())
}

fn kill_etcd(runtime: &Runtime, etcd: &mut Etcd) -> Outcome<Duration> {
    std::thread::sleep(CALM);
    let leader = etcd.leader()?;
    let mut doors = Vec::new();
    for at in (0..MEMBERS).filter(|at| *at != leader) {
        doors.push(runtime.block_on(etcd.door(at))?);
    }
    let deadline = Instant::now() + PATIENCE;
    etcd.kill(leader)?;
    let killed = Instant::now();
    runtime.block_on(async {
        tokio::select! {
            done = until_etcd(&doors[0], deadline) => done,
            done = until_etcd(&doors[1], deadline) => done,
        }
    })?;
    let took = killed.elapsed();
    etcd.restart(leader)?;
    etcd.settle()?;
    Ok(took)
}

async fn until_etcd(door: &etcd::Door, deadline: Instant) -> Outcome {
    while Instant::now() < deadline {
        if let Ok(Ok(())) = time::timeout(ATTEMPT, door.put(0)).await {
            return Ok(());
        }
        time::sleep(PAUSE).await;
    }
    Err("no survivor of etcd takes a write".into())
}
