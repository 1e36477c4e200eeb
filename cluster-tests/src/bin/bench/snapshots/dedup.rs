//! How much room several capsules of one template share in the store.
//!
//! Ten capsules are created, do a little that differs, and are paused. What their snapshots hold,
//! holes left out, is set against what the packs hold: once of a first one alone, once of all. Two
//! things make the difference: chunks that are the same in several, and compression.

use std::fs;

use wrenn_cluster_tests::world::World;

use super::capsule::Capsule;
use crate::figures::{figure, ratio};
use crate::{Outcome, Run};

/// Capsules.
const CAPSULES: usize = 10;
/// Memory of one.
const MEMORY_MIB: u32 = 256;
/// All after the first take at most this much of what the first one took, each.
const EACH_GOAL: f64 = 0.5;

/// Measures once: it is a count, not a time.
pub(crate) fn run(run: &Run) -> Outcome {
    let world = World::new();
    let (mut held, mut packs) = (Vec::new(), Vec::new());
    let mut capsules = Vec::new();
    for number in 1..=CAPSULES {
        run.go_on()?;
        let mut capsule = Capsule::create(&world, MEMORY_MIB)?;
        capsule.exec(&format!(
            "echo {number} > /root/number; head -c 1048576 /dev/urandom > /root/own; sync"
        ))?;
        held.push(capsule.pause()?.whole_mib);
        packs.push(packs_mib(&world)?);
        run.note(&format!(
            "{number}: {:.0} MiB of snapshots in {:.0} MiB of packs",
            held.iter().sum::<f64>(),
            packs[number - 1]
        ));
        capsules.push(capsule);
    }
    capsules.into_iter().try_for_each(Capsule::destroy)?;
    let whole: f64 = held.iter().sum();
    let (first, all) = (packs[0], packs[CAPSULES - 1]);
    figure("dedup_snapshots", whole, "MiB");
    figure("dedup_packs", all, "MiB");
    figure("dedup_packs_of_the_first", first, "MiB");
    figure("dedup_factor", whole / all, "times");
    let each = (all - first) / (CAPSULES - 1) as f64;
    figure("dedup_each_further", each, "MiB");
    ratio("dedup_each_further_over_the_first", each, first, EACH_GOAL);
    Ok(())
}

/// Bytes of all packs.
fn packs_mib(world: &World) -> Outcome<f64> {
    let mut bytes = 0;
    for entry in fs::read_dir(world.data().join("store").join("packs"))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes as f64 / f64::from(1 << 20))
}
