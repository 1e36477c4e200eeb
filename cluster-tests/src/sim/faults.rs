//! What goes wrong, and when.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::NodeId;

use super::Ms;
use super::bugs::Bug;
use super::rng::Rng;

/// How slow a link that fades becomes, and after what time nothing gets out.
const FADED: Ms = 4000;
const FADE_AFTER: Ms = 2000;

/// One misfortune.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The daemon dies and is started again after this long; guests and shims live on.
    Crash(NodeId, Ms),
    /// The machine dies, guests and all, and is back after this long.
    LoseHost(NodeId, Ms),
    /// The machine dies and comes back with an empty disk: only a planted bug lets it in again.
    Wipe(NodeId, Ms),
    /// The daemon is stopped for this long and then goes on as if nothing had happened.
    Pause(NodeId, Ms),
    /// The same, and meanwhile its guests break by themselves.
    Break(NodeId, Ms),
    /// Nothing passes from the first set to the second, for this long.
    Cut(BTreeSet<NodeId>, BTreeSet<NodeId>, bool, Ms),
    /// Messages to a node take up to this long, for this long.
    Slow(NodeId, Ms, Ms),
    /// A node's link becomes slow, and two seconds later nothing of it gets out any more.
    Fade(NodeId, Vec<NodeId>, Ms),
    /// The log's entries do not reach a node, everything else does.
    Starve(NodeId, Ms),
    /// Messages are lost in so many of a thousand cases, for this long.
    Loss(u64, Ms),
}

impl Fault {
    /// Draws one.
    pub(crate) fn any(rng: &mut Rng, nodes: &[NodeId], bug: Option<Bug>) -> Self {
        let node = *rng.pick(nodes);
        let short = rng.within(100, 3000);
        let long = rng.within(2000, 25_000);
        match rng.within(0, 14) {
            0 | 1 => Self::Crash(node, if rng.chance(500) { short } else { long }),
            2 if bug == Some(Bug::WipedDiskVotes) => Self::Wipe(node, short),
            2 | 12 => Self::LoseHost(node, long),
            3 | 4 => Self::Pause(node, if rng.chance(500) { short } else { long }),
            5 | 6 => Self::isolate(node, nodes, rng.chance(500), long),
            7 | 8 => Self::split(rng, nodes, long),
            9 => Self::Slow(node, rng.within(500, 4000), long),
            10 => Self::Starve(node, long + 5000),
            11 => Self::Fade(node, nodes.to_vec(), long),
            13 => Self::Break(node, long),
            _ => Self::Loss(rng.within(50, 400), long),
        }
    }

    fn isolate(node: NodeId, nodes: &[NodeId], both: bool, last: Ms) -> Self {
        let others = nodes
            .iter()
            .copied()
            .filter(|other| *other != node)
            .collect();
        Self::Cut(BTreeSet::from([node]), others, both, last)
    }

    fn split(rng: &mut Rng, nodes: &[NodeId], last: Ms) -> Self {
        let (mut one, mut two) = (BTreeSet::new(), BTreeSet::new());
        for node in nodes {
            let side = if rng.chance(500) { &mut one } else { &mut two };
            side.insert(*node);
        }
        Self::Cut(one, two, rng.chance(800), last)
    }
}

/// The network between the nodes.
#[derive(Debug, Default)]
pub(crate) struct Net {
    /// Directed links that are cut, from when until when.
    cut: BTreeMap<(NodeId, NodeId), (Ms, Ms)>,
    slow: BTreeMap<NodeId, (Ms, Ms)>,
    starved: BTreeMap<NodeId, Ms>,
    loss: (u64, Ms),
}

impl Net {
    pub(crate) fn break_by(&mut self, fault: &Fault, now: Ms) {
        match fault {
            Fault::Cut(from, to, both, last) => {
                for (one, other) in from
                    .iter()
                    .flat_map(|one| to.iter().map(move |other| (one, other)))
                {
                    self.cut.insert((*one, *other), (now, now + last));
                    if *both {
                        self.cut.insert((*other, *one), (now, now + last));
                    }
                }
            }
            Fault::Fade(node, others, last) => {
                self.slow.insert(*node, (FADED, now + last));
                for other in others {
                    let cut = (now + FADE_AFTER, now + FADE_AFTER + last);
                    self.cut.insert((*node, *other), cut);
                }
            }
            Fault::Slow(node, up_to, last) => {
                self.slow.insert(*node, (*up_to, now + last));
            }
            Fault::Starve(node, last) => {
                self.starved.insert(*node, now + last);
            }
            Fault::Loss(permille, last) => self.loss = (*permille, now + last),
            Fault::LoseHost(node, last) if last % 2 == 0 => {
                self.starved.insert(*node, now + last + 6000);
            }
            Fault::Crash(..) | Fault::LoseHost(..) | Fault::Wipe(..) => {}
            Fault::Pause(..) | Fault::Break(..) => {}
        }
    }

    pub(crate) fn heal(&mut self) {
        *self = Self::default();
    }

    /// Whether the log does not reach a node.
    pub(crate) fn starves(&self, node: NodeId, now: Ms) -> bool {
        self.starved.get(&node).is_some_and(|until| now < *until)
    }

    /// How long a message takes, or `None` where it is lost.
    pub(crate) fn carry(&self, rng: &mut Rng, now: Ms, from: NodeId, to: NodeId) -> Option<Ms> {
        if from == to {
            return Some(0);
        }
        let cut = self.cut.get(&(from, to));
        let cut = cut.is_some_and(|(since, until)| (*since..*until).contains(&now));
        let lost = now < self.loss.1 && rng.chance(self.loss.0);
        if cut || lost {
            return None;
        }
        let slow = self.slow.get(&to).filter(|(_, until)| now < *until);
        let most = slow.map_or(15, |(up_to, _)| *up_to);
        Some(rng.within(1, most))
    }
}
