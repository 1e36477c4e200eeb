//! Which values of a register are still to be read, and who could still write them.

use std::collections::HashMap;
use std::hash::Hash;

use super::model::{Model, Shape};
use super::operation::{Operation, Outcome};
use super::search::Done;

/// For each state the operations that need it and those that lead to it, by their numbers.
#[derive(Debug)]
pub(super) struct Uses<S> {
    needers: HashMap<S, Vec<usize>>,
    makers: HashMap<S, Vec<usize>>,
    unknown_makers: HashMap<S, Vec<usize>>,
}

impl<S: Clone + Eq + Hash> Uses<S> {
    /// `None` where some operation neither needs one state nor overwrites all.
    pub(super) fn of<M: Model<State = S>>(
        answered: &[Operation<M>],
        unknown: &[Operation<M>],
    ) -> Option<Self> {
        let mut uses = Self {
            needers: HashMap::new(),
            makers: HashMap::new(),
            unknown_makers: HashMap::new(),
        };
        for (index, operation) in answered.iter().enumerate() {
            let answer = match &operation.outcome {
                Outcome::Ok(answer) => Some(answer),
                Outcome::Refused | Outcome::Unknown => None,
            };
            match M::shape(&operation.action, answer) {
                Shape::Needs(state) => uses.needers.entry(state).or_default().push(index),
                Shape::Overwrites(state) => uses.makers.entry(state).or_default().push(index),
                Shape::Other => return None,
            }
        }
        for (index, operation) in unknown.iter().enumerate() {
            let Shape::Overwrites(state) = M::shape(&operation.action, None) else {
                return None;
            };
            uses.unknown_makers.entry(state).or_default().push(index);
        }
        Some(uses)
    }

    /// Whether a missing operation needs this state.
    pub(super) fn needs(&self, state: &S, done: &Done) -> bool {
        of(&self.needers, state).any(|index| !done.has(*index))
    }

    /// Whether this state may be left: nobody needs it any more, or it can come again.
    pub(super) fn may_leave(&self, state: &S, done: &Done, used: &[usize]) -> bool {
        !self.needs(state, done)
            || of(&self.makers, state).any(|index| !done.has(*index))
            || of(&self.unknown_makers, state).any(|index| used.binary_search(index).is_err())
    }
}

fn of<'a, S: Eq + Hash>(
    all: &'a HashMap<S, Vec<usize>>,
    state: &S,
) -> impl Iterator<Item = &'a usize> {
    all.get(state).into_iter().flatten()
}
