//! Choosing a node for a sandbox: pure, and part of apply, so that two concurrent creates can
//! never be promised the same room.
//!
//! Filter first: may the node take it at all (lease, cordon, team, tags, template), and does it fit
//! beside what is already reserved there? Then score: the node that keeps the largest share of its
//! scarcest resource wins. What the proposer last heard of the load weighs a little; it can never
//! make a node fit. The lower id wins a tie.
//!
//! A paused sandbox is placed where its guest can be resumed: the same hypervisor. One that boots from
//! a disk that was sealed needs only the image below that. A holder of its
//! snapshot wins over anybody who would have to fetch it first. The node that a create asked for is
//! where the sandbox began: it binds no resume, which would else be lost with that node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use proto::ids::{NodeId, TeamId};

use crate::state::{Node, Resources, SandboxSpec, Snapshot, State};

/// How much a fully busy node loses, in thousandths of its score's range: enough to choose between
/// equals, too little to pile sandboxes onto one node because others were busy for a second.
const BUSY_WEIGHT_PERMILLE: u64 = 200;

/// What a holder of the snapshot gains: more than the whole range of a score.
const HOLDER_BONUS: u64 = 10_000;

/// How busy a node was when the proposer last heard of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadHint {
    /// Which node.
    pub node: NodeId,
    /// Its busy processors in thousandths of what it has.
    pub busy_permille: u32,
}

/// Why no node could take a request: what was missing, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack(pub String);

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The best node for what `spec` asks, starting from its template or from a snapshot; or what was
/// missing.
///
/// # Errors
/// [`Lack`] counts the nodes that may not take it by reason, and names, for the node with the most
/// free memory among the others, each resource that fell short.
pub fn place(
    state: &State,
    team: TeamId,
    spec: &SandboxSpec,
    source: Source<'_>,
    hints: &[LoadHint],
) -> Result<NodeId, Lack> {
    let wanted = spec.resources();
    let template = state.template(&spec.template).map(|it| it.digest);
    let busy: BTreeMap<NodeId, u32> = hints.iter().map(|it| (it.node, it.busy_permille)).collect();
    let mut best: Option<(u64, NodeId)> = None;
    let mut nearest: Option<(Resources, &Node)> = None;
    let mut barred: BTreeMap<&'static str, u32> = BTreeMap::new();
    for node in state.nodes() {
        if let Some(why) = bar(node, team, spec, (source, template)) {
            *barred.entry(why).or_default() += 1;
            continue;
        }
        let free = node.capacity.less(state.reserved(node.id));
        if free.covers(wanted) {
            let busy = busy.get(&node.id).copied().unwrap_or_default();
            let bonus = if source.is_held_by(node) {
                HOLDER_BONUS
            } else {
                0
            };
            let score = score(free.less(wanted), node.capacity, busy) + bonus;
            // Nodes come in the order of their ids, so `>` keeps the lower id on a tie.
            if best.is_none_or(|(top, _)| score > top) {
                best = Some((score, node.id));
            }
        } else if nearest.is_none_or(|(most, _)| free.memory > most.memory) {
            nearest = Some((free, node));
        }
    }
    best.map(|(_, id)| id).ok_or_else(|| {
        let nearest = nearest.map(|(free, node)| {
            format!(
                "{} lacks {}",
                node.name,
                shortfalls(free, wanted).join(", ")
            )
        });
        Lack(lack(nearest, &barred))
    })
}

/// What a sandbox is started from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// The root disk that its template names.
    Template,
    /// A snapshot.
    Snapshot {
        /// Which.
        snapshot: &'a Snapshot,
        /// The only node that will do; `None` leaves the choice.
        to: Option<NodeId>,
        /// Where it failed.
        failed_on: &'a BTreeSet<NodeId>,
    },
}

impl Source<'_> {
    fn is_held_by(self, node: &Node) -> bool {
        match self {
            Self::Template => false,
            Self::Snapshot { snapshot, .. } => snapshot.holders.contains(&node.id),
        }
    }
}

/// Why a node may not take the sandbox however much room it has. Whose host it is comes first:
/// how another team's hosts fare is nobody's business.
fn bar(
    node: &Node,
    team: TeamId,
    spec: &SandboxSpec,
    (source, template): (Source<'_>, Option<[u8; 32]>),
) -> Option<&'static str> {
    if node.team.is_some_and(|only| only != team) {
        return Some("of another team");
    }
    let only = match source {
        Source::Template => spec.on_node,
        Source::Snapshot { to, .. } => to,
    };
    if only.is_some_and(|only| only != node.id) {
        return Some("not the one asked for");
    }
    if !node.liveness.is_alive() {
        return Some("not reachable");
    }
    if node.cordoned {
        return Some("cordoned");
    }
    let tagged = |(key, value): (&String, &String)| node.tags.get(key) == Some(value);
    if !spec.node_tags.iter().all(tagged) {
        return Some("without the tags asked for");
    }
    match source {
        Source::Template => {
            let held = node.templates.get(&spec.template);
            (template.is_none() || template.as_ref() != held).then_some("without the template")
        }
        Source::Snapshot { failed_on, .. } if failed_on.contains(&node.id) => {
            Some("where it failed already")
        }
        Source::Snapshot { snapshot, .. } => {
            let sealed = &snapshot.sealed;
            if !sealed.runs_on(node) {
                return Some("with another hypervisor than the snapshot's");
            }
            (!sealed.needs.has_base(node)).then_some("without the template of the snapshot")
        }
    }
}

fn lack(nearest: Option<String>, barred: &BTreeMap<&'static str, u32>) -> String {
    let counts = barred.iter().map(|(why, count)| {
        let hosts = if *count == 1 { "host is" } else { "hosts are" };
        format!("{count} {hosts} {why}")
    });
    let parts: Vec<String> = nearest.into_iter().chain(counts).collect();
    if parts.is_empty() {
        return "the cluster has no nodes".into();
    }
    parts.join("; ")
}

/// Each resource of which `free` has less than `wanted`, in words.
fn shortfalls(free: Resources, wanted: Resources) -> Vec<String> {
    let mut short = Vec::new();
    let mut check = |what: &str, unit: &str, wanted: u32, free: u32| {
        if wanted > free {
            short.push(format!("{what} ({wanted}{unit} wanted, {free}{unit} free)"));
        }
    };
    check("vCPUs", "", wanted.vcpus, free.vcpus);
    check("memory", " MiB", wanted.memory.0, free.memory.0);
    check("disk", " MiB", wanted.disk.0, free.disk.0);
    check("capsule slots", "", wanted.sandboxes, free.sandboxes);
    short
}

/// The smallest share, in thousandths, that stays free of any resource, less what the load takes
/// away; a thousand added so that no load makes it negative.
fn score(left: Resources, capacity: Resources, busy_permille: u32) -> u64 {
    let share = |left: u32, all: u32| u64::from(left) * 1000 / u64::from(all.max(1));
    let free = share(left.vcpus, capacity.vcpus)
        .min(share(left.memory.0, capacity.memory.0))
        .min(share(left.disk.0, capacity.disk.0))
        .min(share(left.sandboxes, capacity.sandboxes));
    let busy = u64::from(busy_permille.min(1000));
    (free + 1000).saturating_sub(busy * BUSY_WEIGHT_PERMILLE / 1000)
}
