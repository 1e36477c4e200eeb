//! The search for an order: Wing and Gong's, with Lowe's memory of what was tried.
//!
//! A [`Point`] of the search is which operations are in order already, and the state they lead to.
//! From a point, an operation may come next if it was called before any other one that is still
//! missing had returned, and if its answer fits the state. Whoever reaches the point at which no
//! answered operation is missing has found an order.
//!
//! Four things keep this quick where it can be; each only leaves out orders that cannot be the
//! only ones:
//! - An operation that may come next and leaves the state as it is (every look that fits) comes
//!   next, without a branch: later it would have changed nothing either.
//! - Operations of unknown outcome are tried last, and only where they change the state. Of two
//!   ways to one point, the one that used up fewer of them is as good as the other or better.
//! - Of equal operations of unknown outcome, the one called first is used first.
//! - Points are remembered, and none is looked at twice.
//!
//! What is left can still be exponential: many writes at once on one key, with an answer that no
//! order explains. Hence the [`Limits`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::model::Model;
use super::operation::{Operation, Outcome};
use super::report::{Undecided, Violation};

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
struct Done {
    base: usize,
    ahead: Vec<usize>,
}

impl Done {
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
        if points % POINTS_PER_LOOK == 0 && Instant::now() > deadline {
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
    fn settle(&mut self, mut point: Point<M>) -> Point<M> {
        loop {
            let mut idle = self.next(&point.done).answered;
            idle.retain(|index| self.step(&point.state, *index).as_ref() == Some(&point.state));
            if idle.is_empty() {
                break;
            }
            idle.into_iter().for_each(|index| point.done.add(index));
        }
        if point.done.count() > self.best.done.count() {
            self.best = point.clone();
        }
        point
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
        let mut next = self.next(&point.done);
        let called = |operation: &Operation<M>| operation.invoked <= next.horizon;
        let called = self.unknown.partition_point(called);
        for index in (0..called).rev() {
            if let Some(state) = self.step_unknown(point, index) {
                let mut after = point.clone();
                insert(&mut after.used, index);
                open.push(Point { state, ..after });
            }
        }
        // Whatever returned first is needed first.
        next.answered
            .sort_by_key(|index| std::cmp::Reverse(self.answered[*index].returned));
        for index in next.answered {
            if let Some(state) = self.step(&point.state, index) {
                let mut after = point.clone();
                after.done.add(index);
                open.push(Point { state, ..after });
            }
        }
    }

    /// Where one of unknown outcome leads, if it is worth trying here.
    fn step_unknown(&self, point: &Point<M>, index: usize) -> Option<M::State> {
        let is_used = |index: usize| point.used.binary_search(&index).is_ok();
        let twin_is_left = self.twins[index].is_some_and(|twin| !is_used(twin));
        if is_used(index) || twin_is_left {
            return None;
        }
        let state = M::step(&point.state, &self.unknown[index].action, None)?;
        (state != point.state).then_some(state)
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
