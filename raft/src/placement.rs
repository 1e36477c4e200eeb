//! Choosing a node for a sandbox: pure, and part of apply, so that two concurrent creates can
//! never be promised the same room.
//!
//! Filter first: may the node take it at all (lease, cordon, team, tags, template), and does it fit
//! beside what is already reserved there? Then score: the node that keeps the largest share of its
//! scarcest resource wins. What the proposer last heard of the load weighs a little; it can never
//! make a node fit. The lower id wins a tie.

use std::collections::BTreeMap;
use std::fmt;

use proto::ids::{NodeId, TeamId};

use crate::state::{Node, Resources, SandboxSpec, State};

/// How much a fully busy node loses, in thousandths of its score's range: enough to choose between
/// equals, too little to pile sandboxes onto one node because others were busy for a second.
const BUSY_WEIGHT_PERMILLE: u64 = 200;

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

/// The best node for what `spec` asks, or what was missing.
///
/// # Errors
/// [`Lack`] counts the nodes that may not take it by reason, and names, for the node with the most
/// free memory among the others, each resource that fell short.
pub fn place(
    state: &State,
    team: TeamId,
    spec: &SandboxSpec,
    hints: &[LoadHint],
) -> Result<NodeId, Lack> {
    let wanted = spec.resources();
    let mut best: Option<(u64, NodeId)> = None;
    let mut nearest: Option<(u32, String)> = None;
    let mut barred: BTreeMap<&'static str, u32> = BTreeMap::new();
    for node in state.nodes() {
        if let Some(why) = bar(state, node, team, spec) {
            *barred.entry(why).or_default() += 1;
            continue;
        }
        let free = node.capacity.less(state.reserved(node.id));
        let short = shortfalls(free, wanted);
        if short.is_empty() {
            let score = score(free.less(wanted), node.capacity, busy(hints, node.id));
            // Nodes come in the order of their ids, so `>` keeps the lower id on a tie.
            if best.is_none_or(|(top, _)| score > top) {
                best = Some((score, node.id));
            }
        } else if nearest
            .as_ref()
            .is_none_or(|(memory, _)| free.memory.0 > *memory)
        {
            let text = format!("{} lacks {}", node.name, short.join(", "));
            nearest = Some((free.memory.0, text));
        }
    }
    best.map(|(_, id)| id)
        .ok_or_else(|| Lack(lack(nearest.map(|(_, text)| text), &barred)))
}

/// Why a node may not take the sandbox however much room it has.
fn bar(state: &State, node: &Node, team: TeamId, spec: &SandboxSpec) -> Option<&'static str> {
    if spec.on_node.is_some_and(|only| only != node.id) {
        return Some("not the one asked for");
    }
    if !node.liveness.is_alive() {
        return Some("not reachable");
    }
    if node.cordoned {
        return Some("cordoned");
    }
    if node.team.is_some_and(|only| only != team) {
        return Some("of another team");
    }
    let tagged = |(key, value): (&String, &String)| node.tags.get(key) == Some(value);
    if !spec.node_tags.iter().all(tagged) {
        return Some("without the tags asked for");
    }
    let digest = state.template(&spec.template).map(|it| it.digest);
    if digest.as_ref() != node.templates.get(&spec.template) {
        return Some("without the template");
    }
    None
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

fn busy(hints: &[LoadHint], node: NodeId) -> u64 {
    let hint = hints.iter().find(|hint| hint.node == node);
    hint.map_or(0, |hint| u64::from(hint.busy_permille.min(1000)))
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
fn score(left: Resources, capacity: Resources, busy_permille: u64) -> u64 {
    let share = |left: u32, all: u32| u64::from(left) * 1000 / u64::from(all.max(1));
    let free = share(left.vcpus, capacity.vcpus)
        .min(share(left.memory.0, capacity.memory.0))
        .min(share(left.disk.0, capacity.disk.0))
        .min(share(left.sandboxes, capacity.sandboxes));
    (free + 1000).saturating_sub(busy_permille * BUSY_WEIGHT_PERMILLE / 1000)
}
