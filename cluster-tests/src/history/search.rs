//! The search for an order: Wing and Gong's, with Lowe's memory of what was tried.
//!
//! A [`Point`] of the search is which operations are in order already, and the state they lead to.
//! From a point, an operation may come next if it was called before any other one that is still
//! missing had returned, and if its answer fits the state. Whoever reaches the point at which no
//! answered operation is missing has found an order.
//!
//! Some things keep this quick where it can be; each only leaves out orders that cannot be the
//! only ones:
//! - A look that may come next, fits and changes nothing comes next, without a branch: later it
//!   would have changed nothing either.
//! - Operations of unknown outcome are tried last, and only where they change the state. Of two
//!   ways to one point, the one that used up fewer of them is as good as the other or better.
//! - Of equal operations of unknown outcome, the one called first is used first.
//! - Points are remembered, and none is looked at twice.
//! - Of registers, and all else that is only overwritten and read, it is known which values are
//!   still to be read ([`Uses`]). A write with all reads of its value comes next, without a branch,
//!   if they all can, and a value that is still to be read is not overwritten for good.
//!
//! What is left can still be exponential: many operations at once on one key that are not like
//! that. Hence the [`Limits`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::model::Model;
use super::operation::{Operation, Outcome};
use super::report::{Undecided, Violation};
use super::uses::Uses;

/// Points between two looks at the clock: a point takes microseconds.
const POINTS_PER_LOOK: usize = 256;

/// How much work a check may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Points of the search for each key. Each that is remembered takes some hundred bytes.
    pub points: usize,
    /// Operations of unknown outcome on one key that may have changed something.
    pub unknowns: usize,
    /// For all keys together.
    pub time: Duration,
}

impl Default for Limits {
    /// At most about 200 MB and 20 s. A cluster test of minutes stays far below.
    fn default() -> Self {
        Self {
            points: 500_000,
            unknowns: 1000,
            time: Duration::from_secs(20),
        }
    }
}

impl Limits {
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.time
    }
}

/// What the search on one key came to.
#[derive(Debug)]
pub(super) enum Verdict {
    Linearizable,
    Violation(Violation),
    Undecided(Undecided),
}

/// Which answered operations are in order: all before `base`, and some after it, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Done {
    base: usize,
    ahead: Vec<usize>,
}

impl Done {
    pub(super) fn has(&self, index: usize) -> bool {
        index < self.base || self.ahead.binary_search(&index).is_ok()
    }

    const fn count(&self) -> usize {
        self.base + self.ahead.len()
    }

    fn add(&mut self, index: usize) {
        insert(&mut self.ahead, index);
        let whole = self.ahead.iter().enumerate();
        let whole = whole.take_while(|(at, index)| **index == self.base + at);
        let whole = whole.count();
        self.ahead.drain(..whole);
        self.base += whole;
    }
}

fn insert(sorted: &mut Vec<usize>, index: usize) {
    let at = sorted.partition_point(|other| *other < index);
    sorted.insert(at, index);
}

/// Whether all of `few` are among `many`; both sorted.
fn is_subset(few: &[usize], many: &[usize]) -> bool {
    let mut rest = many.iter();
    few.len() <= many.len() && few.iter().all(|it| rest.any(|other| other == it))
}

#[derive(Clone)]
struct Point<M: Model> {
    done: Done,
    /// Operations of unknown outcome that were used, sorted.
    used: Vec<usize>,
    state: M::State,
}

/// What may come next at a point.
struct Next {
    /// Answered operations.
    answered: Vec<usize>,
    /// None that was called later may come before the first of these has.
    horizon: Duration,
}

struct Search<M: Model> {
    /// Both sorted by their calls.
    answered: Vec<Operation<M>>,
    unknown: Vec<Operation<M>>,
    /// For each unknown one, the previous one that is equal to it.
    twins: Vec<Option<usize>>,
    /// What is still to be read, where that can be told.
    uses: Option<Uses<M::State>>,
    /// For each point the smallest sets of unknown ones it was reached with.
    seen: HashMap<(Done, M::State), Vec<Vec<usize>>>,
    best: Point<M>,
}

/// Looks for an order of the operations on one key.
pub(super) fn search<M: Model>(
    key: &str,
    operations: Vec<Operation<M>>,
    limits: &Limits,
    deadline: Instant,
) -> Verdict {
    let mut search = Search::new(operations);
    let undecided = |why| {
        let key = key.to_owned();
        Verdict::Undecided(Undecided { key, why })
    };
    if search.unknown.len() > limits.unknowns {
        return undecided("too many operations of unknown outcome");
    }
    let mut open = vec![search.best.clone()];
    let mut points = 0;
    while let Some(point) = open.pop() {
        let point = search.settle(point);
        if point.done.count() > search.best.done.count() {
            search.best = point.clone();
        }
        if point.done.count() == search.answered.len() {
            return Verdict::Linearizable;
        }
        if !search.remember(&point) {
            continue;
        }
        points += 1;
        if points > limits.points {
            return undecided("too many points of the search");
        }
        if points % POINTS_PER_LOOK == 1 && Instant::now() > deadline {
            return undecided("out of time");
        }
        search.branch(&point, &mut open);
    }
    Verdict::Violation(search.violation(key))
}

impl<M: Model> Search<M> {
    fn new(mut operations: Vec<Operation<M>>) -> Self {
        operations.sort_by_key(|operation| operation.invoked);
        let (mut answered, mut unknown) = (Vec::new(), Vec::new());
        for operation in operations {
            match operation.outcome {
                Outcome::Ok(_) => answered.push(operation),
                Outcome::Unknown if !M::only_looks(&operation.action) => unknown.push(operation),
                Outcome::Unknown | Outcome::Refused => {}
            }
        }
        let twin = |index: usize| {
            let equal = |earlier: &Operation<M>| earlier.action == unknown[index].action;
            unknown[..index].iter().rposition(equal)
        };
        let twins = (0..unknown.len()).map(twin).collect();
        Self {
            uses: Uses::of::<M>(&answered, &unknown),
            answered,
            unknown,
            twins,
            seen: HashMap::new(),
            best: Point {
                done: Done::default(),
                used: Vec::new(),
                state: M::State::default(),
            },
        }
    }

    fn next(&self, done: &Done) -> Next {
        let mut next = Next {
            answered: Vec::new(),
            horizon: Duration::MAX,
        };
        let mut ahead = done.ahead.iter().peekable();
        for (index, operation) in self.answered.iter().enumerate().skip(done.base) {
            if ahead.next_if_eq(&&index).is_some() {
                continue;
            }
            if operation.invoked > next.horizon {
                break;
            }
            next.answered.push(index);
            next.horizon = next.horizon.min(operation.returned);
        }
        let horizon = next.horizon;
        next.answered
            .retain(|index| self.answered[*index].invoked <= horizon);
        next
    }

    fn step(&self, state: &M::State, index: usize) -> Option<M::State> {
        let operation = &self.answered[index];
        match &operation.outcome {
            Outcome::Ok(answer) => M::step(state, &operation.action, Some(answer)),
            Outcome::Refused | Outcome::Unknown => None,
        }
    }

    /// Puts everything in order that may come next and changes nothing.
    fn settle(&self, mut point: Point<M>) -> Point<M> {
        loop {
            let mut idle = self.next(&point.done).answered;
            idle.retain(|index| self.is_idle(&point.state, *index));
            if idle.is_empty() {
                break;
            }
            idle.into_iter().for_each(|index| point.done.add(index));
        }
        point
    }

    fn is_idle(&self, state: &M::State, index: usize) -> bool {
        let operation = &self.answered[index];
        match &operation.outcome {
            Outcome::Ok(answer) => {
                M::is_steady(&operation.action, answer)
                    && M::step(state, &operation.action, Some(answer)).as_ref() == Some(state)
            }
            Outcome::Refused | Outcome::Unknown => false,
        }
    }

    /// Whether this point is new, or was reached with fewer unknown ones than before.
    fn remember(&mut self, point: &Point<M>) -> bool {
        let at = (point.done.clone(), point.state.clone());
        let sets = self.seen.entry(at).or_default();
        if sets.iter().any(|set| is_subset(set, &point.used)) {
            return false;
        }
        sets.retain(|set| !is_subset(&point.used, set));
        sets.push(point.used.clone());
        true
    }

    /// Opens the points that follow; what is to be tried first comes last.
    fn branch(&self, point: &Point<M>, open: &mut Vec<Point<M>>) {
        let mut followers = self.followers(point);
        if let Some(uses) = &self.uses {
            let is_free = |point: &Point<M>| !uses.needs(&point.state, &point.done);
            let settled = followers.into_iter().map(|after| self.settle(after));
            followers = settled.collect();
            if is_free(point) {
                // A whole write, reads included: it may as well be the next.
                if let Some(whole) = followers.iter().position(is_free) {
                    open.push(followers.swap_remove(whole));
                    return;
                }
            }
            followers.retain(|after| {
                let may_leave = |state| uses.may_leave(state, &after.done, &after.used);
                may_leave(&point.state) && may_leave(&after.state)
            });
        }
        open.extend(followers.into_iter().rev());
    }

    /// The points that follow, in the order in which they should be tried.
    fn followers(&self, point: &Point<M>) -> Vec<Point<M>> {
        let mut next = self.next(&point.done);
        // Whatever returned first is needed first.
        next.answered
            .sort_by_key(|index| self.answered[*index].returned);
        let answered = next.answered.iter().filter_map(|&index| {
            let state = self.step(&point.state, index)?;
            let mut after = point.clone();
            after.done.add(index);
            Some(Point { state, ..after })
        });
        let called = |operation: &Operation<M>| operation.invoked <= next.horizon;
        let called = self.unknown.partition_point(called);
        let unknown = (0..called).filter_map(|index| {
            let state = self.step_unknown(point, index)?;
            let mut after = point.clone();
            insert(&mut after.used, index);
            Some(Point { state, ..after })
        });
        answered.chain(unknown).collect()
    }

    /// Where one of unknown outcome leads, if it is worth trying here.
    fn step_unknown(&self, point: &Point<M>, index: usize) -> Option<M::State> {
        let is_used = |index: usize| point.used.binary_search(&index).is_ok();
        let twin_is_left = self.twins[index].is_some_and(|twin| !is_used(twin));
        if is_used(index) || twin_is_left {
            return None;
        }
        let state = M::step(&point.state, &self.unknown[index].action, None)?;
        let is_wanted = |uses: &Uses<M::State>| uses.needs(&state, &point.done);
        let is_wanted = self.uses.as_ref().is_none_or(is_wanted);
        (is_wanted && state != point.state).then_some(state)
    }

    fn violation(&self, key: &str) -> Violation {
        let next = self.next(&self.best.done).answered;
        let text = |index: usize| self.answered[index].to_string();
        Violation {
            key: key.to_owned(),
            explained: self.best.done.count(),
            operations: self.answered.len(),
            state: format!("{:?}", self.best.state),
            stuck: next.into_iter().map(text).collect(),
        }
    }
}
