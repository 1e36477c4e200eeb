//! Who votes, who learns, who leads: one decision per tick, on the leader only. Pure.
//!
//! Roles are nobody's configuration. The replicated node table says who belongs to the cluster;
//! this file says what the raft membership should become, one step at a time, and the caller
//! carries the step out and looks again.
//!
//! ```text
//! node table                     raft membership
//! (no member) = mirror <--cap--> learner <--caught up / silent, draining--> voter
//! (removed)   --------------------------> out
//! ```
//!
//! In this order: a change left half done is finished; a leader that is to go hands over; members
//! that left the table go; voters are chosen anew; learners are added up to their cap. The best set
//! of voters is worked out from nothing each time, with a strong preference for those that vote
//! already: so there is a fixed point, and a healthy cluster proposes nothing.
//!
//! What holds of every change of voters, whatever the picture (the property tests name each):
//! - more than half of the old set and more than half of the new one are alive, this node with
//!   them, so the change through joint consensus can be committed;
//! - the new set is odd, has nobody who is not in the table, and nobody new who is silent, behind,
//!   draining or without the disk that is on record;
//! - this node stays in it. One that is the only voter and draining gets its one successor beside it,
//!   as soon as that is ready, and hands over: the one even set, and it has one voter soon after.

#[cfg(test)]
mod tests;
mod voters;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::ids::NodeId;
use raft::state::{self, Node};

use super::lease::Tick;

/// A node heard within this time is alive: three load reports, which come every second.
pub const ALIVE_WITHIN: Duration = Duration::from_secs(3);
/// A voter unheard for this long may be replaced. Longer than a reboot of the daemon takes.
pub const SILENT_AFTER: Duration = Duration::from_secs(10);
/// A learner unheard for this long leaves its place to a mirror that is alive. Much longer than
/// for voters: nothing is at stake, and a machine that reboots keeps its place.
pub const LEARNER_SILENT_AFTER: Duration = Duration::from_secs(600);
/// A learner at most this many entries behind is caught up: under load one always trails a little,
/// and this many are sent in one append.
pub const CAUGHT_UP_WITHIN: u64 = 256;
/// The least time between two replacements of voters: what looks like one dead node after another
/// is more often a bad network.
pub const REPLACE_EVERY: Duration = Duration::from_secs(30);

/// The tag that names a node's failure zone.
pub const ZONE_TAG: &str = "zone";

const _: () = assert!(ALIVE_WITHIN.as_secs() < SILENT_AFTER.as_secs());
const _: () = assert!(SILENT_AFTER.as_secs() < REPLACE_EVERY.as_secs());

/// What the operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The most voters there should be: 1, 3, 5 or 7. With 7, each commit waits for four disks.
    pub max_voters: usize,
    /// The most learners there should be beside a full set of voters; further nodes are mirrors.
    pub max_learners: usize,
    /// How long a learner must have been alive and caught up before it replaces a voter.
    pub steady_for: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_voters: 5,
            // Each costs the leader ten heartbeats a second: some 3 % of a core for 32.
            max_learners: 32,
            steady_for: Duration::from_secs(10),
        }
    }
}

impl From<&state::Settings> for Settings {
    fn from(replicated: &state::Settings) -> Self {
        let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        Self {
            max_voters: count(replicated.max_voters),
            max_learners: count(replicated.max_learners),
            ..Self::default()
        }
    }
}

/// A row of the replicated node table, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// The failure zone it was tagged with.
    pub zone: Option<String>,
    /// It is to be emptied and taken away.
    pub draining: bool,
    /// The disk it showed last is not the one on record: its log may have forgotten what it
    /// acknowledged.
    pub other_disk: bool,
}

impl Listed {
    /// A node's row as applied; `None` for a host of one team, which must not hold everybody's
    /// log. `other_disk` is what the connection to it has shown.
    #[must_use]
    pub fn of(node: &Node, other_disk: bool) -> Option<Self> {
        let of_all = node.team.is_none();
        of_all.then(|| Self {
            zone: node.tags.get(ZONE_TAG).cloned(),
            draining: node.draining,
            other_disk,
        })
    }
}

/// What the leader sees of another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contact {
    /// How long ago it was last heard, over raft or by a load report; `None` for not yet.
    pub heard: Option<Duration>,
    /// The last log entry it is known to have; `None` for not known.
    pub matched: Option<u64>,
    /// How long it has been alive and caught up without a break; see [`Steadiness`].
    pub steady_for: Duration,
}

/// What a decision is made from. Gathered anew for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// This node, the leader.
    pub here: NodeId,
    /// The replicated node table, as applied here, without hosts of one team.
    pub nodes: BTreeMap<NodeId, Listed>,
    /// The voters of the newest membership in the log; of a joint one, the set it leads to.
    pub voters: BTreeSet<NodeId>,
    /// Its learners.
    pub learners: BTreeSet<NodeId>,
    /// Whether the newest membership in the log is a joint one.
    pub joint: bool,
    /// Whether a change is being made or its outcome is not known yet.
    pub change_under_way: bool,
    /// What is seen of the others. This node needs no entry.
    pub contacts: BTreeMap<NodeId, Contact>,
    /// The last entry of the log.
    pub last_log: u64,
    /// How long this node has led.
    pub leader_for: Duration,
    /// How long ago the voters last changed, if this node knows of a change.
    pub since_change: Option<Duration>,
    /// What the operator set.
    pub settings: Settings,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Finish the change that a former leader left half done.
    FinishJoint,
    /// Hand the leadership over; this node is to go.
    TransferLeader(NodeId),
    /// Drop members that left the table, or learners past the cap. None of them votes.
    Remove(BTreeSet<NodeId>),
    /// Make this the set of voters, in one change; those left out stay as learners.
    SetVoters(BTreeSet<NodeId>),
    /// Add a learner, without waiting for it to catch up.
    AddLearner(NodeId),
}

/// The next step towards the membership that should be, or `None` where nothing should change or
/// nothing may.
#[must_use]
pub fn decide(at: &Picture) -> Option<Action> {
    if at.change_under_way || !at.has_quorum(&at.voters) {
        return None;
    }
    if at.joint {
        return Some(Action::FinishJoint);
    }
    at.hand_over()
        .or_else(|| at.removal())
        .or_else(|| at.better_voters().map(Action::SetVoters))
        .or_else(|| at.addition())
}

impl Settings {
    /// How many voters a cluster of `nodes` nodes should have when `voters` vote now.
    ///
    /// More come at 3, 7 and 9 nodes. They go only when fewer nodes than voters are left: a cluster
    /// that loses one of seven nodes keeps five voters.
    #[must_use]
    pub const fn target_voters(&self, nodes: usize, voters: usize) -> usize {
        let wanted = match nodes {
            0..=2 => 1,
            3..=6 => 3,
            7..=8 => 5,
            _ => 7,
        };
        let kept = odd_at_most(if voters < nodes { voters } else { nodes });
        let target = if kept > wanted { kept } else { wanted };
        let most = odd_at_most(self.max_voters);
        if target < most { target } else { most }
    }
}

/// The largest odd number up to `count`, and 1 for none.
const fn odd_at_most(count: usize) -> usize {
    if count == 0 {
        1
    } else {
        count - (count + 1) % 2
    }
}

impl Picture {
    /// The leader hands over if it is to go and another voter can take over at once.
    fn hand_over(&self) -> Option<Action> {
        let stays = self
            .nodes
            .get(&self.here)
            .is_some_and(|here| !here.draining && !here.other_disk);
        if stays {
            return None;
        }
        let fit = |id: &&NodeId| **id != self.here && self.is_fit(**id);
        let matched = |id: &&NodeId| (self.matched(**id), std::cmp::Reverse(**id));
        let successor = self.voters.iter().filter(fit).max_by_key(matched)?;
        Some(Action::TransferLeader(*successor))
    }

    /// Members that left the table and do not vote, then the learners for which there is no room.
    fn removal(&self) -> Option<Action> {
        let gone: BTreeSet<NodeId> = self
            .learners
            .iter()
            .filter(|id| !self.nodes.contains_key(id))
            .copied()
            .collect();
        if !gone.is_empty() {
            return Some(Action::Remove(gone));
        }
        let surplus = self.learners.len().saturating_sub(self.learner_room());
        if surplus > 0 {
            return Some(Action::Remove(self.least_useful_learners(surplus)));
        }
        let full = self.learners.len() == self.learner_room();
        let silent = |id: &&NodeId| self.unheard_for(**id) >= LEARNER_SILENT_AFTER;
        let idle = self.learners.iter().find(silent)?;
        (full && self.next_mirror().is_some()).then(|| Action::Remove(BTreeSet::from([*idle])))
    }

    /// The learners to drop first: those unheard longest, then the latest to have joined.
    fn least_useful_learners(&self, count: usize) -> BTreeSet<NodeId> {
        let mut learners: Vec<NodeId> = self.learners.iter().copied().collect();
        let alive = |id: NodeId| self.is_alive(id);
        learners.sort_by_key(|id| (alive(*id), std::cmp::Reverse(*id)));
        learners.into_iter().take(count).collect()
    }

    fn addition(&self) -> Option<Action> {
        if self.learners.len() >= self.learner_room() {
            return None;
        }
        self.next_mirror().map(Action::AddLearner)
    }

    /// The first node that is alive and no member.
    fn next_mirror(&self) -> Option<NodeId> {
        let outside = |id: &&NodeId| !self.voters.contains(id) && !self.learners.contains(id);
        self.nodes
            .iter()
            .filter(|(id, node)| !node.other_disk && self.is_alive(**id))
            .map(|(id, _)| id)
            .find(outside)
            .copied()
    }

    /// How many learners there may be: more while voters are missing, so that there is somebody to
    /// promote.
    fn learner_room(&self) -> usize {
        let missing = self.target().saturating_sub(self.voters.len());
        self.settings.max_learners.saturating_add(missing)
    }

    fn target(&self) -> usize {
        let nodes = self.nodes.len();
        self.settings.target_voters(nodes, self.voters.len())
    }

    fn unheard_for(&self, id: NodeId) -> Duration {
        let heard = self.contacts.get(&id).and_then(|contact| contact.heard);
        // A leader knows nothing of the time before it led.
        heard.unwrap_or(self.leader_for).min(self.leader_for)
    }

    fn is_alive(&self, id: NodeId) -> bool {
        let heard = self.contacts.get(&id).and_then(|contact| contact.heard);
        // Who left the table may still be heard, but nobody answers it any more.
        let listed = self.nodes.contains_key(&id);
        id == self.here || listed && heard.is_some_and(|heard| heard <= ALIVE_WITHIN)
    }

    fn is_silent(&self, id: NodeId) -> bool {
        id != self.here && self.unheard_for(id) >= SILENT_AFTER
    }

    fn matched(&self, id: NodeId) -> Option<u64> {
        self.contacts.get(&id).and_then(|contact| contact.matched)
    }

    fn is_caught_up(&self, id: NodeId) -> bool {
        let needed = self.last_log.saturating_sub(CAUGHT_UP_WITHIN);
        id == self.here || self.matched(id).is_some_and(|matched| matched >= needed)
    }

    /// Whether a node may be given a role it does not have.
    fn is_fit(&self, id: NodeId) -> bool {
        let listed = self.nodes.get(&id);
        listed.is_some_and(|node| !node.draining && !node.other_disk)
            && self.is_alive(id)
            && self.is_caught_up(id)
    }

    /// Whether more than half of `voters` are alive.
    fn has_quorum(&self, voters: &BTreeSet<NodeId>) -> bool {
        let alive = voters.iter().filter(|id| self.is_alive(**id)).count();
        alive * 2 > voters.len()
    }
}

/// How long each node has been alive and caught up without a break: the memory between decisions.
/// A new leader begins with an empty one.
#[derive(Clone, Debug, Default)]
pub struct Steadiness {
    since: BTreeMap<NodeId, Tick>,
}

impl Steadiness {
    /// Looks at a picture at `now` and fills in `steady_for` of each contact.
    pub fn fill_in(&mut self, now: Tick, picture: &mut Picture) {
        let steady: BTreeSet<NodeId> = picture
            .contacts
            .keys()
            .filter(|id| picture.is_alive(**id) && picture.is_caught_up(**id))
            .copied()
            .collect();
        self.since.retain(|id, _| steady.contains(id));
        for id in steady {
            let since = *self.since.entry(id).or_insert(now);
            if let Some(contact) = picture.contacts.get_mut(&id) {
                contact.steady_for = now.since(since);
            }
        }
    }
}
