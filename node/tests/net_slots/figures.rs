//! How long it takes. Printed, not asserted tightly: `cargo test … figures -- --nocapture`.

use std::time::{Duration, Instant};

use wrenn_node::net::build::{raise, raze};
use wrenn_node::net::{Serial, Slot, SlotIndex};

use crate::world::on_a_host;

/// Enough for a median that one slow run does not move.
const RUNS: u16 = 24;
/// Far above the goal of 5 ms: fails on a mistake, not on a busy machine.
const ABSURD: Duration = Duration::from_millis(250);

fn median(name: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let middle = times[times.len() / 2];
    println!("FIGURE {name} {:.3} ms", middle.as_secs_f64() * 1e3);
    middle
}

#[test]
fn taking_a_slot_from_a_filled_pool_is_quick() {
    on_a_host(|host| {
        let node = host.node(|config| (config.index_count, config.pool_target) = (64, 4));
        let mut times = Vec::new();
        for _run in 0..RUNS {
            while host.wait(node.pool.ready()).unwrap() < 4 {
                std::thread::yield_now();
            }
            let start = Instant::now();
            let slot = host.wait(node.pool.take()).unwrap();
            times.push(start.elapsed());
            host.wait(node.pool.release(slot)).unwrap();
        }
        assert!(median("slot_take", times) < ABSURD);
    });
}

#[test]
fn making_and_unmaking_a_slot_is_quick() {
    on_a_host(|_| {
        let (mut made, mut unmade) = (Vec::new(), Vec::new());
        for run in 0..RUNS {
            let slot = Slot::new(&"t".parse().unwrap(), Serial(run.into()), SlotIndex(run));
            let start = Instant::now();
            raise(&slot, &[]).unwrap();
            made.push(start.elapsed());
            let start = Instant::now();
            raze(&slot).unwrap();
            unmade.push(start.elapsed());
        }
        assert!(median("slot_create", made) < ABSURD);
        assert!(median("slot_release", unmade) < ABSURD);
    });
}
