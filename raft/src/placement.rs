//! Choosing a node for a sandbox: pure, and part of apply, so that two concurrent creates can
//! never be promised the same room.
//!
//! Filter first (does the request fit beside what is already reserved there?), then score: the
//! node that keeps the largest share of its scarcest resource wins, the lower id on a tie.

use std::fmt;

use proto::ids::NodeId;

use crate::state::{Resources, State};

/// Why no node could take a request: what was missing on the node that came closest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack(pub String);

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The best node for `wanted`, or what was missing.
///
/// # Errors
/// [`Lack`] names, for the node with the most free memory, each resource that fell short.
pub fn place(state: &State, wanted: Resources) -> Result<NodeId, Lack> {
    let mut best: Option<(u64, NodeId)> = None;
    let mut nearest: Option<(u32, String)> = None;
    for node in state.nodes() {
        let free = node.capacity.less(state.reserved(node.id));
        let short = shortfalls(free, wanted);
        if short.is_empty() {
            let score = score(free.less(wanted), node.capacity);
            // Nodes come in the order of their ids, so `>` keeps the lower id on a tie.
            if best.is_none_or(|(top, _)| score > top) {
                best = Some((score, node.id));
            }
        } else if nearest
            .as_ref()
            .is_none_or(|(memory, _)| free.memory.0 > *memory)
        {
            nearest = Some((
                free.memory.0,
                format!("{} lacks {}", node.name, short.join(", ")),
            ));
        }
    }
    match (best, nearest) {
        (Some((_, id)), _) => Ok(id),
        (None, Some((_, text))) => Err(Lack(text)),
        (None, None) => Err(Lack("the cluster has no nodes".into())),
    }
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

/// The smallest share, in thousandths, that stays free of any resource.
fn score(left: Resources, capacity: Resources) -> u64 {
    let share = |left: u32, all: u32| u64::from(left) * 1000 / u64::from(all.max(1));
    share(left.vcpus, capacity.vcpus)
        .min(share(left.memory.0, capacity.memory.0))
        .min(share(left.disk.0, capacity.disk.0))
        .min(share(left.sandboxes, capacity.sandboxes))
}
