//! The best set of voters for a picture, and whether it is worth a change.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::NodeId;

use super::{Picture, REPLACE_EVERY, odd_at_most};

impl Picture {
    /// A set of voters that is better than the present one and may be changed to now.
    pub(super) fn better_voters(&self) -> Option<BTreeSet<NodeId>> {
        let best = self.best_voters();
        // A leader that is to go hands over first; from the only voter nobody can, so it gets its
        // successor beside it.
        let alone = self.voters.len() == 1;
        let led = best.contains(&self.here) || alone;
        let worth_it = led
            && best != self.voters
            && self.has_quorum(&best)
            && self.is_better(&best)
            && (!self.replaces(&best) || self.may_replace());
        let beside = (alone && self.nodes.contains_key(&self.here)).then_some(self.here);
        worth_it.then(|| best.into_iter().chain(beside).collect())
    }

    /// Those who vote and may go on, then the fittest learners, then voters that are on their way
    /// out but still there; of an even number the last is left out.
    fn best_voters(&self) -> BTreeSet<NodeId> {
        let target = self.target();
        let mut best = self.kept(target);
        self.promote(&mut best, target);
        for stopgap in self.stopgaps(&best) {
            if best.len() < target {
                best.insert(stopgap);
            }
        }
        if best.len().is_multiple_of(2) {
            let odd = odd_at_most(best.len());
            self.shrink(&mut best, odd);
        }
        best
    }

    /// The present voters that are as they should be, at most `target` of them.
    fn kept(&self, target: usize) -> BTreeSet<NodeId> {
        let good = |id: &&NodeId| {
            let listed = self.nodes.get(id);
            let alone = self.voters.len() == 1 && target == 1;
            let good = listed.is_some_and(|node| !node.draining && !node.other_disk);
            // A leader hands over first. One that never will have a second voter beside it is
            // replaced instead.
            (good && !self.is_silent(**id)) || (**id == self.here && listed.is_some() && !alone)
        };
        let mut kept = self.voters.iter().filter(good).copied().collect();
        self.shrink(&mut kept, target);
        kept
    }

    /// Fills `voters` up with learners: an empty zone first, then the one furthest in the log.
    fn promote(&self, voters: &mut BTreeSet<NodeId>, target: usize) {
        // A young cluster becomes fault-tolerant at once; a full one does not hurry.
        let wait = if self.voters.len() < target {
            Duration::ZERO
        } else {
            self.settings.steady_for
        };
        let steady = |id: NodeId| {
            let contact = self.contacts.get(&id);
            contact.is_some_and(|contact| contact.steady_for >= wait)
        };
        let mut fit: BTreeSet<NodeId> = self
            .learners
            .iter()
            .filter(|id| self.is_fit(**id) && steady(**id))
            .copied()
            .collect();
        while voters.len() < target {
            let crowd = self.crowds(voters);
            let rank = |id: &&NodeId| (self.crowd(&crowd, **id), Reverse(self.matched(**id)), **id);
            let Some(next) = fit.iter().min_by_key(rank).copied() else {
                return;
            };
            fit.remove(&next);
            voters.insert(next);
        }
    }

    /// Voters that should be replaced and, failing that, still count: those that are alive first.
    fn stopgaps(&self, best: &BTreeSet<NodeId>) -> Vec<NodeId> {
        let usable = |id: &&NodeId| {
            let listed = self.nodes.get(id);
            !best.contains(id) && listed.is_some_and(|node| !node.other_disk)
        };
        let mut stopgaps: Vec<NodeId> = self.voters.iter().filter(usable).copied().collect();
        stopgaps.sort_by_key(|id| (!self.is_alive(*id), *id));
        stopgaps
    }

    /// Leaves out the least useful until `target` are left; this node never.
    fn shrink(&self, voters: &mut BTreeSet<NodeId>, target: usize) {
        while voters.len() > target.max(1) {
            let crowd = self.crowds(voters);
            let rank = |id: &&NodeId| {
                (
                    self.is_alive(**id),
                    // Draining nodes before others, newcomers before those who vote already.
                    self.nodes.get(id).is_some_and(|node| !node.draining),
                    self.voters.contains(id),
                    Reverse(self.crowd(&crowd, **id)),
                    self.matched(**id),
                    Reverse(**id),
                )
            };
            let others = voters.iter().filter(|id| **id != self.here);
            let Some(least) = others.min_by_key(rank).copied() else {
                return;
            };
            voters.remove(&least);
        }
    }

    /// Whether a change to `best` leaves the cluster no worse off than staying.
    ///
    /// Fewer voters than now are worth it only where too few nodes are left for more, or where the
    /// smaller set survives more failures than the present one with its dead.
    fn is_better(&self, best: &BTreeSet<NodeId>) -> bool {
        best.len() >= self.voters.len().min(self.target())
            || self.spare(best) > self.spare(&self.voters)
    }

    /// How many more failures a set of voters survives.
    fn spare(&self, voters: &BTreeSet<NodeId>) -> usize {
        let alive = voters.iter().filter(|id| self.is_alive(**id)).count();
        alive.saturating_sub(voters.len() / 2 + 1)
    }

    /// Whether a change to `best` puts one node in the place of another.
    fn replaces(&self, best: &BTreeSet<NodeId>) -> bool {
        best.difference(&self.voters).next().is_some()
            && self.voters.difference(best).next().is_some()
    }

    fn may_replace(&self) -> bool {
        self.since_change.is_none_or(|since| since >= REPLACE_EVERY)
    }

    /// How many of `voters` stand in each zone.
    fn crowds(&self, voters: &BTreeSet<NodeId>) -> BTreeMap<&str, usize> {
        let mut crowds = BTreeMap::new();
        for zone in voters.iter().filter_map(|id| self.zone(*id)) {
            *crowds.entry(zone).or_default() += 1;
        }
        crowds
    }

    /// How crowded the zone of a node is. One without a zone shares nobody's that we know of.
    fn crowd(&self, crowds: &BTreeMap<&str, usize>, id: NodeId) -> usize {
        let zone = self.zone(id);
        zone.and_then(|zone| crowds.get(zone)).copied().unwrap_or(0)
    }

    fn zone(&self, id: NodeId) -> Option<&str> {
        self.nodes.get(&id)?.zone.as_deref()
    }
}
