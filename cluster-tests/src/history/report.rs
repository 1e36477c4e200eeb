//! What a check came to, in words that help to find the bug.

use std::fmt;

/// What the check of a history came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Operations checked.
    pub operations: usize,
    /// Objects they were on.
    pub keys: usize,
    /// Objects whose operations no order explains.
    pub violations: Vec<Violation>,
    /// Objects that took too much work.
    pub undecided: Vec<Undecided>,
}

/// An object whose operations no order explains.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which one.
    pub key: String,
    /// How many of its operations with an answer the best attempt put in order.
    pub explained: usize,
    /// Out of how many.
    pub operations: usize,
    /// The state that attempt ended in.
    pub state: String,
    /// The operations that had to come next there, none of which fits.
    pub stuck: Vec<String>,
}

/// An object that the limits kept from being decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undecided {
    /// Which one.
    pub key: String,
    /// Which limit.
    pub why: &'static str,
}

impl Report {
    /// Whether every object was decided, and none against the cluster.
    #[must_use]
    pub const fn is_linearizable(&self) -> bool {
        self.violations.is_empty() && self.undecided.is_empty()
    }

    /// Goes on if all is well.
    ///
    /// # Panics
    /// With the report, if anything is not linearizable or undecided.
    pub fn unwrap(&self) {
        assert!(self.is_linearizable(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operations, keys, ..
        } = self;
        writeln!(f, "{operations} operations on {keys} keys")?;
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        for undecided in &self.undecided {
            writeln!(f, "{}: undecided, {}", undecided.key, undecided.why)?;
        }
        Ok(())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: not linearizable; {} of {} operations can be put in order, then the state is {} \
             and none of these fits:",
            self.key, self.explained, self.operations, self.state
        )?;
        self.stuck.iter().try_for_each(|it| write!(f, "\n    {it}"))
    }
}
