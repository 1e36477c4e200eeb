//! A resume through the API of real daemons: on the node where the capsule was paused, on one that
//! has a copy, and on one that has nothing of it, where the guest runs before its memory is there.
//!
//! Three daemons on this machine, each with a store, ports and network slots of its own; what comes
//! from another goes over loopback, encrypted. Each round two fresh capsules: one is resumed where it
//! was paused and, paused again, where its copy is; the other where nothing is. Nothing but what all
//! guests of a template have in common is there then.
//!
//! *First answer* is from the request to the end of a first command. *Read all* is from the request
//! until the guest has read all that was filled. *From peers* is what the pager was given by the time
//! of the first answer.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use wrenn_cluster_tests::cluster::ClusterWorld;
use wrenn_cluster_tests::world::World;

use super::capsule::Capsule;
use super::{filled_mib, rounds};
use crate::figures::{Samples, figure, ms, ratio};
use crate::{Outcome, Run};

/// Nodes: one that pauses, one with the copy, one with nothing.
const NODES: u16 = 3;
/// Where capsules are made.
const FIRST: u16 = 1;
/// Copies that a cluster keeps.
const COPIES: usize = 2;
/// Pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest until there are so many.
const PATIENCE: Duration = Duration::from_secs(120);
/// A first answer where a copy is takes no longer than where the capsule was paused; two runs of the
/// same differ by this much.
const COPY_GOAL: f64 = 1.1;
/// One where nothing is may take so many times as long, and so may reading everything.
const NOTHING_GOAL: f64 = 2.0;

/// Where a capsule is resumed.
struct Place {
    name: &'static str,
    running: Samples,
    first_answer: Samples,
    read_all: Samples,
    from_peers: Samples,
}

impl Place {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            running: Samples::new(),
            first_answer: Samples::new(),
            read_all: Samples::new(),
            from_peers: Samples::new(),
        }
    }

    fn print(&self) {
        let name = format!("resume_{}", self.name);
        self.first_answer
            .print(&format!("{name}_first_answer"), "ms");
        self.running.print_p50(&format!("{name}_running"), "ms");
        self.read_all.print_p50(&format!("{name}_read_all"), "ms");
        self.from_peers
            .print_p50(&format!("{name}_from_peers"), "MiB");
    }
}

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let cluster = ClusterWorld::new(NODES);
    let [mut same, mut copy, mut nothing] =
        ["where_paused", "at_copy", "at_nothing"].map(Place::new);
    for round in 1..=rounds(run) {
        run.go_on()?;
        let (capsule, holders) = paused(run, &cluster)?;
        let capsule = measure(&cluster, capsule, FIRST, &mut same)?;
        let other = others(&holders).next().ok_or("nobody else has a copy")?;
        measure(&cluster, capsule, other, &mut copy)?.destroy()?;
        run.go_on()?;
        let (capsule, holders) = paused(run, &cluster)?;
        let lacks = (1..=NODES).find(|number| !holders.contains(number));
        let lacks = lacks.ok_or("everybody has a copy")?;
        measure(&cluster, capsule, lacks, &mut nothing)?.destroy()?;
        run.note(&format!("round {round}"));
    }
    figure("resume_anywhere_memory", run.memory_mib.into(), "MiB");
    for place in [&same, &copy, &nothing] {
        place.print();
    }
    let over = |what: &str, of: fn(&Place) -> &Samples, place: &Place, goal| {
        let name = format!("resume_{what}_{}_over_where_paused", place.name);
        ratio(&name, of(place).p50(), of(&same).p50(), goal);
    };
    over("first_answer", |it| &it.first_answer, &copy, COPY_GOAL);
    over(
        "first_answer",
        |it| &it.first_answer,
        &nothing,
        NOTHING_GOAL,
    );
    over("read_all", |it| &it.read_all, &nothing, NOTHING_GOAL);
    Ok(())
}

/// A fresh capsule, filled and paused on the first node, and who has a copy of it once all have that
/// shall.
fn paused(run: &Run, cluster: &ClusterWorld) -> Outcome<(Capsule, Vec<u16>)> {
    let mut capsule = made_at(cluster, run.memory_mib)?;
    capsule.fill(filled_mib(run))?;
    capsule.pause()?;
    let holders = copied(&mut capsule)?;
    Ok((capsule, holders))
}

/// A capsule on the first node: the others take none meanwhile.
fn made_at(cluster: &ClusterWorld, memory_mib: u32) -> Outcome<Capsule> {
    let world = cluster.client(FIRST);
    each_other(world, "cordon")?;
    let capsule = Capsule::create(world, memory_mib);
    each_other(world, "uncordon")?;
    capsule
}

fn each_other(world: &World, act: &str) -> Outcome {
    for other in (1..=NODES).filter(|number| *number != FIRST) {
        let path = format!("/v1/nodes/{}/{act}", name(other));
        let answer = world.call("POST", &path, None);
        if answer.status != 200 {
            return Err(format!("{act} {other}: {}", answer.json()).into());
        }
    }
    Ok(())
}

/// Waits until as many nodes have a copy as shall; which those are.
fn copied(capsule: &mut Capsule) -> Outcome<Vec<u16>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let shown = capsule.shown()?;
        let holders = shown["snapshot"]["holders"].as_array();
        let holders: Vec<u16> = holders.into_iter().flatten().filter_map(number).collect();
        if holders.len() >= COPIES {
            return Ok(holders);
        }
        if Instant::now() > deadline {
            return Err(format!("it is not copied: {shown}").into());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// Resumes the capsule on a node, has it read everything, and pauses it there.
fn measure(
    cluster: &ClusterWorld,
    capsule: Capsule,
    number: u16,
    place: &mut Place,
) -> Outcome<Capsule> {
    let mut capsule = capsule.through(cluster.client(number))?;
    let began = Instant::now();
    let resumed = capsule.resume_on(&name(number))?;
    let looked = Instant::now();
    let shown = capsule.shown()?;
    let looking = looked.elapsed();
    capsule.read_all()?;
    place.read_all.add(ms(began.elapsed() - looking));
    place.running.add(resumed.running);
    place.first_answer.add(resumed.first_answer);
    let bytes = shown["memory"]["peer_bytes"].as_f64().unwrap_or_default();
    place.from_peers.add(bytes / f64::from(1 << 20));
    capsule.pause()?;
    copied(&mut capsule)?;
    Ok(capsule)
}

fn others(holders: &[u16]) -> impl Iterator<Item = u16> {
    holders.iter().copied().filter(|number| *number != FIRST)
}

/// What a node is called, and back.
fn name(number: u16) -> String {
    format!("node{number}")
}

fn number(shown: &Value) -> Option<u16> {
    shown.as_str()?.strip_prefix("node")?.parse().ok()
}
