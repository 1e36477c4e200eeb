//! Network slots: what taking one costs a create, and what making one would without the pool.
//!
//! Runs the node's own code in a network and mount namespace that goes with this process's
//! thread, so nothing of the host is touched.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use node::base::stop::Tasks;
use node::net::build::{raise, raze};
use node::net::{NetConfig, Serial, Slot, SlotIndex, SlotPool};
use tokio::runtime::Runtime;

use crate::figures::{Samples, at_most};
use crate::{Outcome, Run};

/// The goal for taking a slot.
const TAKE_GOAL_MS: f64 = 5.0;
/// Slots for each run asked for: one takes milliseconds.
const SLOTS_PER_RUN: usize = 5;
/// Slots kept ready, as a node does by default.
const POOL: usize = 4;
/// Indexes to use; those of released slots come back.
const INDEXES: u16 = 64;
/// Pause between two looks at a pool that fills.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Measures slots on a host of their own.
pub(crate) fn run(run: &Run) -> Outcome {
    let done = thread::scope(|scope| {
        let measuring = scope.spawn(|| measure(run).map_err(|err| err.to_string()));
        measuring.join()
    });
    Ok(done.map_err(|_| "the measuring broke")??)
}

fn measure(run: &Run) -> Outcome {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Where namespaces get their names.
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    let slots = run.runs * SLOTS_PER_RUN;
    let taken = from_the_pool(run, slots)?;
    let (made, unmade) = without_the_pool(run, slots)?;
    taken.print("slot_take", "ms");
    made.print("slot_make", "ms");
    unmade.print("slot_unmake", "ms");
    at_most("slot_take_p50", taken.p50(), TAKE_GOAL_MS);
    Ok(())
}

fn from_the_pool(run: &Run, slots: usize) -> Outcome<Samples> {
    run.note(&format!("{slots} slots from the pool"));
    let folder = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    // Its threads are made by this one, and so live in its namespaces.
    let runtime = Arc::new(Runtime::new()?);
    let tasks = Tasks::new();
    let config = NetConfig {
        tag: "b".parse()?,
        index_base: 0,
        index_count: INDEXES,
        pool_target: POOL,
        egress_allow: Vec::new(),
        serial_file: folder.path().join("serial"),
    };
    let pool = runtime.block_on(SlotPool::start(config, &tasks))?;
    let mut taken = Samples::default();
    for _ in 0..slots {
        run.go_on()?;
        while runtime.block_on(pool.ready())? < POOL {
            thread::sleep(LOOK_AGAIN);
        }
        let start = Instant::now();
        let slot = runtime.block_on(pool.take())?;
        taken.add_ms(start.elapsed());
        runtime.block_on(pool.release(slot))?;
    }
    runtime.block_on(pool.shutdown());
    runtime.block_on(tasks.stop_and_join());
    Ok(taken)
}

fn without_the_pool(run: &Run, slots: usize) -> Outcome<(Samples, Samples)> {
    run.note(&format!("{slots} slots made and unmade"));
    let (mut made, mut unmade) = (Samples::default(), Samples::default());
    for (number, index) in (0..slots).zip((0..INDEXES).cycle()) {
        run.go_on()?;
        let serial = Serial(number as u64);
        let slot = Slot::new(&"c".parse()?, serial, SlotIndex(index));
        let start = Instant::now();
        raise(&slot, &[])?;
        made.add_ms(start.elapsed());
        let start = Instant::now();
        raze(&slot)?;
        unmade.add_ms(start.elapsed());
    }
    Ok((made, unmade))
}
