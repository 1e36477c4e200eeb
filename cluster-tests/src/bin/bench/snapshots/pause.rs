//! A pause that stores what was written since the last one, beside one that stores everything.
//!
//! Each round: a fresh capsule whose memory is filled, paused (*full*: it never was before); then,
//! for each share of its memory, it is resumed, so much of it is written anew, and it is paused
//! again. Time is what a client sees; bytes are those that the store took up anew, memory, disk and
//! device state together. What the guest writes beside what it was told (its page cache, its log) is
//! in the bytes too: a pause after nothing at all was written shows how much that is.

use wrenn_cluster_tests::world::World;

use super::capsule::{Capsule, Paused};
use super::{filled_mib, rounds};
use crate::figures::{Samples, figure, ratio};
use crate::{Outcome, Run};

/// Shares of the memory that are written anew, in percent.
const SHARES: [u32; 4] = [0, 1, 5, 25];
/// The share that the goals are about.
const GOAL_SHARE: u32 = 5;
/// At most this much of a full pause's bytes, and of its time.
const BYTES_GOAL: f64 = 1.0 / 8.0;
const TIME_GOAL: f64 = 1.0 / 4.0;

/// Pauses of one kind.
struct Kind {
    name: String,
    took: Samples,
    new_mib: Samples,
    steps: [(&'static str, Samples); 3],
}

impl Kind {
    fn new(name: String) -> Self {
        let steps = ["quiesce", "save", "store"];
        Self {
            name,
            took: Samples::default(),
            new_mib: Samples::default(),
            steps: steps.map(|step| (step, Samples::default())),
        }
    }

    fn add(&mut self, paused: &Paused) {
        self.took.add(paused.took);
        self.new_mib.add(paused.new_mib);
        for (step, samples) in &mut self.steps {
            samples.add(paused.steps.get(*step).copied().unwrap_or(f64::NAN));
        }
    }

    fn print(&self) {
        self.took.print(&self.name, "ms");
        self.new_mib.print_p50(&format!("{}_new", self.name), "MiB");
        for (step, samples) in &self.steps {
            samples.print_p50(&format!("{}_{step}", self.name), "ms");
        }
    }
}

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let world = World::new();
    let mut full = Kind::new("pause_full".into());
    let mut kinds = SHARES.map(|share| (share, Kind::new(format!("pause_{share}_percent"))));
    for round in 1..=rounds(run) {
        run.go_on()?;
        let mut capsule = Capsule::create(&world, run.memory_mib)?;
        capsule.fill(filled_mib(run))?;
        let paused = capsule.pause()?;
        run.note(&format!(
            "round {round}: full in {:.0} ms, {:.0} MiB of {:.0}",
            paused.took, paused.new_mib, paused.whole_mib
        ));
        full.add(&paused);
        for (share, kind) in &mut kinds {
            run.go_on()?;
            let paused = after(&mut capsule, run, *share)?;
            run.note(&format!(
                "  {share} %: {:.0} ms, {:.1} MiB",
                paused.took, paused.new_mib
            ));
            kind.add(&paused);
        }
        capsule.destroy()?;
    }
    print(run, &full, &kinds);
    Ok(())
}

/// Resumes the capsule, has so much of its memory written, and pauses it.
fn after(capsule: &mut Capsule, run: &Run, share: u32) -> Outcome<Paused> {
    capsule.resume()?;
    let mib = run.memory_mib * share / 100;
    if mib > 0 {
        // Not where the last share was written.
        capsule.write(filled_mib(run) - mib, mib)?;
    }
    capsule.pause()
}

fn print(run: &Run, full: &Kind, kinds: &[(u32, Kind)]) {
    figure("pause_memory", run.memory_mib.into(), "MiB");
    full.print();
    for (share, kind) in kinds {
        kind.print();
        let (bytes, time) = match *share {
            GOAL_SHARE => (BYTES_GOAL, TIME_GOAL),
            _ => (1.0, 1.0),
        };
        let over_full = |what: &str| format!("{}_{what}_over_full", kind.name);
        let (some, all) = (kind.new_mib.p50(), full.new_mib.p50());
        ratio(&over_full("new"), some, all, bytes);
        ratio(&over_full("time"), kind.took.p50(), full.took.p50(), time);
    }
}
