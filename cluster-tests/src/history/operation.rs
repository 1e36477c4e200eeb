//! One operation, and the history they make up.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use super::model::Model;
use super::report::Report;
use super::search::{self, Limits};

/// A client that does one thing after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process(pub u32);

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

/// What became of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<A> {
    /// It was done, and this is the answer.
    Ok(A),
    /// It was definitely not done, and never will be.
    Refused,
    /// Nobody knows: it may take effect at any later instant, or never.
    Unknown,
}

/// One operation. Times count from the start of the recording, on a clock that never steps.
#[derive(Clone, Debug)]
pub struct Operation<M: Model> {
    /// Who asked.
    pub process: Process,
    /// Which object.
    pub key: String,
    /// What was asked.
    pub action: M::Action,
    /// When it was sent, or earlier.
    pub invoked: Duration,
    /// When the answer was there, or later. Of no meaning where the outcome is unknown.
    pub returned: Duration,
    /// What came back.
    pub outcome: Outcome<M::Answer>,
}

impl<M: Model> fmt::Display for Operation<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (self.invoked.as_secs_f64(), self.returned.as_secs_f64());
        write!(f, "{} {} {:?} ", self.process, self.key, self.action)?;
        match &self.outcome {
            Outcome::Ok(answer) => write!(f, "-> {answer:?} in {from:.6}..{to:.6} s"),
            Outcome::Refused => write!(f, "refused in {from:.6}..{to:.6} s"),
            Outcome::Unknown => write!(f, "unknown from {from:.6} s"),
        }
    }
}

/// Everything that was asked of some objects.
#[derive(Clone, Debug)]
pub struct History<M: Model> {
    /// In any order.
    pub operations: Vec<Operation<M>>,
    /// When births of unknown outcome were asked for whose object nobody was told.
    pub unnamed: Vec<Duration>,
}

impl<M: Model> Default for History<M> {
    fn default() -> Self {
        Self {
            operations: Vec::new(),
            unnamed: Vec::new(),
        }
    }
}

impl<M: Model> History<M> {
    /// Lets looks be answered from a state up to `bound` old, for routes that promise no more than
    /// that. What they may not do is look into the future, or be older still.
    #[must_use]
    pub fn with_stale_looks(mut self, bound: Duration) -> Self {
        for operation in &mut self.operations {
            if M::only_looks(&operation.action) {
                operation.invoked = operation.invoked.saturating_sub(bound);
            }
        }
        self
    }

    /// Checks every key. The time limit is for all of them together, the others for each.
    #[must_use]
    pub fn check(&self, limits: &Limits) -> Report {
        let mut keys: BTreeMap<&str, Vec<Operation<M>>> = BTreeMap::new();
        for operation in &self.operations {
            let of_key = keys.entry(&operation.key).or_default();
            of_key.push(operation.clone());
        }
        self.explain_births(&mut keys);
        let mut report = Report {
            operations: self.operations.len(),
            keys: keys.len(),
            ..Report::default()
        };
        let deadline = limits.deadline();
        for (key, operations) in keys {
            match search::search(key, operations, limits, deadline) {
                search::Verdict::Linearizable => {}
                search::Verdict::Violation(violation) => report.violations.push(violation),
                search::Verdict::Undecided(why) => report.undecided.push(why),
            }
        }
        report
    }

    /// An object that nobody is known to have made may come from a birth whose answer was lost:
    /// each such birth explains one object, the earliest births those that were met first.
    fn explain_births(&self, keys: &mut BTreeMap<&str, Vec<Operation<M>>>) {
        let Some(birth) = M::birth() else { return };
        let is_birth = |operation: &Operation<M>| operation.action == birth;
        let mut met: BTreeSet<(Duration, &str)> = BTreeSet::new();
        for (key, operations) in keys.iter() {
            if !operations.iter().any(is_birth) {
                let first = operations.iter().map(|operation| operation.returned).min();
                met.insert((first.unwrap_or_default(), key));
            }
        }
        let mut unnamed = self.unnamed.clone();
        unnamed.sort_unstable();
        for (invoked, (_, key)) in unnamed.into_iter().zip(met) {
            let lost = Operation {
                process: Process(u32::MAX),
                key: key.to_owned(),
                action: birth.clone(),
                invoked,
                returned: invoked,
                outcome: Outcome::Unknown,
            };
            keys.entry(key).or_default().push(lost);
        }
    }
}
