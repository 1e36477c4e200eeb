//! Who owes what: which chunks are still to come, and whom each was asked of. Pure.
//!
//! A chunk waits in the queue, or somebody owes it, or it is here. Whoever has time takes the next
//! few from the front; that splits the work by speed without measuring any. What a holder did not
//! give goes back to the front. Near the end, where nothing waits, whoever has time may take what
//! another has owed for long: a slow holder does not hold up the whole.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use proto::ids::NodeId;
use tokio::time::Instant;

use crate::store::chunk::ChunkId;

/// How long one holder may owe a chunk before another is asked for it as well.
const OWED_LONG: Duration = Duration::from_secs(2);
/// As many are asked for the same chunk at once.
const ASKED_AT_ONCE: usize = 2;

/// A chunk that is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owed {
    pub(super) id: ChunkId,
    /// As many bytes of it as the images show.
    pub(super) bytes: u64,
}

/// A chunk's number in the ledger.
pub(super) type Number = usize;

/// What is still to come.
#[derive(Debug)]
pub(super) struct Ledger {
    owed: Vec<Owed>,
    arrived: Vec<bool>,
    left: usize,
    queue: VecDeque<Number>,
    asked: HashMap<Number, Asked>,
    lacks: BTreeMap<NodeId, HashSet<Number>>,
}

#[derive(Debug)]
struct Asked {
    of: Vec<NodeId>,
    since: Instant,
}

impl Ledger {
    /// All of these are to come, in this order.
    pub(super) fn new(owed: Vec<Owed>) -> Self {
        Self {
            arrived: vec![false; owed.len()],
            left: owed.len(),
            queue: (0..owed.len()).collect(),
            owed,
            asked: HashMap::new(),
            lacks: BTreeMap::new(),
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.left == 0
    }

    pub(super) fn get(&self, number: Number) -> Owed {
        self.owed[number]
    }

    /// Whether there is anything to ask `node` for.
    pub(super) fn has_work_for(&self, node: NodeId) -> bool {
        let lacks = self.lacks.get(&node);
        let lacks = |number: &Number| lacks.is_some_and(|lacks| lacks.contains(number));
        self.queue
            .iter()
            .any(|number| !self.arrived[*number] && !lacks(number))
            || self.late(node).any(|number| !lacks(&number))
    }

    /// Gives `node` at most so many to ask for. Each is owed from now on.
    pub(super) fn take(&mut self, node: NodeId, most: usize) -> Vec<Number> {
        let lacks = self.lacks.get(&node);
        let lacks = |number: &Number| lacks.is_some_and(|lacks| lacks.contains(number));
        let (mut taken, mut passed) = (Vec::new(), Vec::new());
        while taken.len() < most
            && let Some(number) = self.queue.pop_front()
        {
            match number {
                number if self.arrived[number] => {}
                number if lacks(&number) => passed.push(number),
                number => taken.push(number),
            }
        }
        if taken.is_empty() {
            let late = self.late(node).filter(|number| !lacks(number));
            taken.extend(late.take(most));
        }
        for number in passed.into_iter().rev() {
            self.queue.push_front(number);
        }
        for number in &taken {
            let asked = self.asked.entry(*number).or_insert_with(|| Asked {
                of: Vec::new(),
                since: Instant::now(),
            });
            asked.of.push(node);
        }
        taken
    }

    /// It is here; true if that is news.
    pub(super) fn arrived(&mut self, number: Number) -> bool {
        self.asked.remove(&number);
        let news = !std::mem::replace(&mut self.arrived[number], true);
        self.left -= usize::from(news);
        news
    }

    /// `node` does not have it.
    pub(super) fn lacks(&mut self, node: NodeId, number: Number) {
        self.lacks.entry(node).or_default().insert(number);
        self.give_back(node, [number]);
    }

    /// `node` will not give these.
    pub(super) fn give_back(&mut self, node: NodeId, numbers: impl IntoIterator<Item = Number>) {
        for number in numbers {
            let Some(asked) = self.asked.get_mut(&number) else {
                continue;
            };
            asked.of.retain(|other| *other != node);
            if asked.of.is_empty() {
                self.asked.remove(&number);
                self.queue.push_front(number);
            }
        }
    }

    /// Chunks that were said to be lacking may be there by now.
    pub(super) fn forget_lacks(&mut self) {
        self.lacks.clear();
    }

    /// A chunk that `node` said it does not have.
    pub(super) fn lacked_by(&self, node: NodeId) -> Option<ChunkId> {
        let lacks = self.lacks.get(&node)?;
        let number = lacks.iter().find(|number| !self.arrived[**number])?;
        Some(self.owed[*number].id)
    }

    /// What others owe for long.
    fn late(&self, node: NodeId) -> impl Iterator<Item = Number> {
        let late = self.asked.iter().filter(move |(_, asked)| {
            asked.of.len() < ASKED_AT_ONCE
                && !asked.of.contains(&node)
                && asked.since.elapsed() >= OWED_LONG
        });
        late.map(|(number, _)| *number)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    fn ledger(chunks: u8) -> Ledger {
        let owed = (0..chunks).map(|name| Owed {
            id: ChunkId([name; 32]),
            bytes: 1,
        });
        Ledger::new(owed.collect())
    }

    #[tokio::test(start_paused = true)]
    async fn two_holders_are_never_asked_for_the_same_while_something_waits() {
        let mut ledger = ledger(10);
        assert_eq!(ledger.take(A, 4), [0, 1, 2, 3]);
        assert_eq!(ledger.take(B, 4), [4, 5, 6, 7]);
        assert_eq!(ledger.take(A, 4), [8, 9]);
        assert!(!ledger.has_work_for(B));
        assert!(ledger.take(B, 4).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_holder_does_not_give_goes_to_the_next_and_before_all_else() {
        let mut ledger = ledger(6);
        let taken = ledger.take(A, 3);
        ledger.arrived(0);
        ledger.give_back(A, taken);
        let next = ledger.take(B, 3);
        assert_eq!(next.len(), 3);
        assert!(next.contains(&1) && next.contains(&2), "{next:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_holder_lacks_it_is_not_asked_for_again() {
        let mut ledger = ledger(2);
        ledger.take(A, 1);
        ledger.lacks(A, 0);
        assert_eq!(ledger.take(A, 5), [1]);
        assert!(!ledger.has_work_for(A));
        assert_eq!(ledger.lacked_by(A), Some(ChunkId([0; 32])));
        assert_eq!(ledger.take(B, 5), [0]);
        ledger.give_back(B, [0]);
        ledger.forget_lacks();
        assert!(ledger.has_work_for(A));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_owed_for_long_is_asked_of_one_more_and_no_third() {
        let mut ledger = ledger(2);
        ledger.take(A, 2);
        assert!(ledger.take(B, 2).is_empty());
        tokio::time::advance(OWED_LONG).await;
        assert!(ledger.take(A, 2).is_empty(), "it owes them already");
        assert_eq!(ledger.take(B, 2).len(), 2);
        assert!(ledger.take(C, 2).is_empty());
        // One of the two fails: the other still owes it.
        ledger.give_back(A, [0, 1]);
        assert!(ledger.queue.is_empty());
        assert!(ledger.arrived(0));
        assert!(!ledger.arrived(0), "the second one is no news");
        assert!(ledger.arrived(1));
        assert!(ledger.is_settled());
    }

    proptest! {
        /// Whatever holders do, everything is asked for until it is here, and the count is right.
        #[test]
        fn nothing_is_ever_forgotten(steps in prop::collection::vec((0_u64..3, 0_u8..4, 1_usize..5), 0..80)) {
            let mut ledger = ledger(12);
            let mut owes: BTreeMap<NodeId, Vec<Number>> = BTreeMap::new();
            for (node, what, most) in steps {
                let node = NodeId(node);
                let taken = owes.entry(node).or_default();
                match (what, taken.pop()) {
                    (0, popped) => {
                        taken.extend(popped);
                        taken.extend(ledger.take(node, most));
                    }
                    (1, Some(number)) => { ledger.arrived(number); }
                    (2, Some(number)) => ledger.lacks(node, number),
                    (_, popped) => {
                        let all: Vec<Number> = taken.drain(..).chain(popped).collect();
                        ledger.give_back(node, all);
                    }
                }
            }
            for number in 0..12 {
                let waits = ledger.queue.contains(&number);
                let asked = ledger.asked.contains_key(&number);
                prop_assert!(ledger.arrived[number] || waits || asked, "{number} is lost");
            }
            let here = ledger.arrived.iter().filter(|here| **here).count();
            prop_assert_eq!(ledger.left, 12 - here);
        }
    }
}
