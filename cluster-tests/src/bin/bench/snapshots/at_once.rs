//! Many capsules resumed at the same instant, each to its first answer.
//!
//! Each guest is small; what is measured is what they cost each other. With emulated guests the
//! processors are theirs: [`Run::at_once`] says how many there are.

use std::sync::Barrier;
use std::thread;

use wrenn_cluster_tests::world::World;

use super::capsule::{Capsule, Resumed};
use super::rounds;
use crate::figures::{Samples, figure};
use crate::{Outcome, Run};

/// Memory of one guest.
const MEMORY_MIB: u32 = 128;
/// The disk that the template gives one; sparse.
const DISK_MIB: usize = 5120;
/// Slots beyond those that run: one that is given back is not free at once.
const SPARE_SLOTS: u16 = 4;

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let count = run.at_once;
    let mut world = World::asleep();
    world.slots = u16::try_from(count)? + SPARE_SLOTS;
    // As much as they are promised, whatever this host has: they use next to nothing of it.
    let promised = [
        ("WRENN_DISK_MIB", count * DISK_MIB),
        ("WRENN_VCPUS", count),
        ("WRENN_MEMORY_MIB", count * 2 * MEMORY_MIB as usize),
    ];
    let promised = promised.map(|(name, value)| (name.to_owned(), value.to_string()));
    world.environment.extend(promised);
    world.start();
    let mut capsules = Vec::new();
    for number in 1..=count {
        run.go_on()?;
        let mut capsule = Capsule::create(&world, MEMORY_MIB)?;
        capsule.pause()?;
        capsules.push(capsule);
        run.note(&format!("capsule {number} of {count} rests"));
    }
    let (mut alone, mut running, mut first) =
        (Samples::default(), Samples::default(), Samples::default());
    for round in 1..=rounds(run) {
        run.go_on()?;
        alone.add(capsules[0].resume()?.first_answer);
        capsules[0].pause()?;
        for resumed in together(&mut capsules)? {
            running.add(resumed.running);
            first.add(resumed.first_answer);
        }
        for capsule in &mut capsules {
            capsule.pause()?;
        }
        run.note(&format!("round {round}"));
    }
    capsules.into_iter().try_for_each(Capsule::destroy)?;
    figure("resume_at_once_count", count as f64, "capsules");
    alone.print_p50("resume_alone_first_answer", "ms");
    running.print("resume_at_once_running", "ms");
    first.print("resume_at_once_first_answer", "ms");
    Ok(())
}

/// Resumes all of them at one instant.
fn together(capsules: &mut [Capsule]) -> Outcome<Vec<Resumed>> {
    let barrier = Barrier::new(capsules.len());
    thread::scope(|scope| {
        let begin = |capsule| {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                Capsule::resume(capsule).map_err(|err| err.to_string())
            })
        };
        let working: Vec<_> = capsules.iter_mut().map(begin).collect();
        let join = |one: thread::ScopedJoinHandle<'_, Result<Resumed, String>>| {
            Ok(one.join().map_err(|_| "a resume broke")??)
        };
        working.into_iter().map(join).collect()
    })
}
