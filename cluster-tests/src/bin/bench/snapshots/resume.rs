//! A resume whose memory comes as it is touched, beside memory copied whole before.
//!
//! Each round a fresh capsule, paused and resumed in three ways in turns. *Lazy*: what it touches on
//! its way up is known from no earlier resume. *Working set*: the resume before has recorded it, and
//! it is pushed ahead. *Eager*: the same daemon, told to go on as where no pager can serve, which is
//! to copy whole images. Before each resume the daemon is started anew, so none has an advantage.
//! Page cache is warm for all.
//!
//! *First answer* is from the request to the end of a first command. *Read all* is from the request
//! until the guest has read all that was filled: with the copy that is there, without it comes
//! then. *Held* is what exists of the guest's memory after the first answer.

use std::collections::BTreeMap;
use std::time::Instant;

use wrenn_cluster_tests::world::World;

use super::capsule::{Capsule, Resumed, held_mib};
use super::{filled_mib, rounds};
use crate::figures::{Samples, figure, ms, ratio};
use crate::{Outcome, Run};

/// What makes a daemon go on as where no pager can serve.
const COPY_MEMORY: &str = "WRENN_BENCH_COPY_MEMORY";
/// A resumed capsule that does nothing holds at most this much of what a copy holds.
const HELD_GOAL: f64 = 0.5;
/// A first answer takes at most this much of the time that it takes behind a copy.
const FIRST_GOAL: f64 = 0.6;

/// One way to resume.
struct Way {
    name: &'static str,
    copies: bool,
    running: Samples,
    first_answer: Samples,
    read_all: Samples,
    held: Samples,
    stages: BTreeMap<String, Samples>,
}

impl Way {
    fn new(name: &'static str, copies: bool) -> Self {
        Self {
            name,
            copies,
            running: Samples::default(),
            first_answer: Samples::default(),
            read_all: Samples::default(),
            held: Samples::default(),
            stages: BTreeMap::new(),
        }
    }

    fn add(&mut self, resumed: &Resumed) {
        self.running.add(resumed.running);
        self.first_answer.add(resumed.first_answer);
        for (stage, took) in &resumed.stages {
            self.stages.entry(stage.clone()).or_default().add(*took);
        }
    }

    fn print(&self) {
        let name = format!("resume_{}", self.name);
        self.first_answer
            .print(&format!("{name}_first_answer"), "ms");
        self.running.print(&format!("{name}_running"), "ms");
        self.read_all.print_p50(&format!("{name}_read_all"), "ms");
        self.held.print_p50(&format!("{name}_held"), "MiB");
        for (stage, samples) in &self.stages {
            samples.print_p50(&format!("{name}_stage_{stage}"), "ms");
        }
    }
}

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let mut world = World::new();
    let mut ways = [
        Way::new("lazy", false),
        Way::new("working_set", false),
        Way::new("eager", true),
    ];
    for round in 1..=rounds(run) {
        let mut capsule = Capsule::create(&world, run.memory_mib)?;
        capsule.fill(filled_mib(run))?;
        capsule.pause()?;
        for way in &mut ways {
            run.go_on()?;
            world.stop();
            world.environment.clear();
            if way.copies {
                let set = (COPY_MEMORY.to_owned(), "1".to_owned());
                world.environment.push(set);
            }
            world.start();
            capsule = capsule.through(&world)?;
            measure(run, &world, &mut capsule, way)?;
            run.note(&format!("round {round}, {}", way.name));
        }
        capsule.destroy()?;
    }
    print(run, &ways);
    Ok(())
}

fn print(run: &Run, ways: &[Way; 3]) {
    figure("resume_memory", run.memory_mib.into(), "MiB");
    ways.iter().for_each(Way::print);
    let [lazy, working_set, eager] = ways;
    for way in [lazy, working_set] {
        let over = |what: &str, of: fn(&Way) -> &Samples, goal| {
            let name = format!("resume_{what}_{}_over_eager", way.name);
            ratio(&name, of(way).p50(), of(eager).p50(), goal);
        };
        over("first_answer", |way| &way.first_answer, FIRST_GOAL);
        over("read_all", |way| &way.read_all, 1.0);
        over("held", |way| &way.held, HELD_GOAL);
    }
}

fn measure(run: &Run, world: &World, capsule: &mut Capsule, way: &mut Way) -> Outcome {
    let began = Instant::now();
    way.add(&capsule.resume()?);
    let looked = Instant::now();
    way.held.add(held_mib(world, &capsule.id, run.memory_mib)?);
    let looking = looked.elapsed();
    capsule.read_all()?;
    way.read_all.add(ms(began.elapsed() - looking));
    capsule.pause()?;
    Ok(())
}
