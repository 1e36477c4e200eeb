//! What the log drives: a pure state machine whose state is cheap to clone.
//!
//! The storage in this crate is written against the trait, so that it can be tested with a toy;
//! in production the machine is [`State`].

use crate::command::Proposal;
use crate::state::State;

/// What one entry did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// What the proposer is told.
    pub answer: Vec<u8>,
    /// The rows that changed: key, and value or `None` where the row is gone.
    pub rows: Vec<Change>,
}

/// An encoded key and value.
pub type Row = (Vec<u8>, Vec<u8>);
/// A row's key and its new value, `None` where the row is gone.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Why bytes mean nothing to this version of the machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this version cannot read the {what}: {why}")]
pub struct Unreadable {
    /// A row or an entry.
    pub what: &'static str,
    /// The decoder's own words.
    pub why: String,
}

/// A deterministic state machine. Same entries in the same order, same state on every member.
pub trait Machine: Clone + Send + Sync + 'static {
    /// The state before the first entry.
    fn empty() -> Self;

    /// Applies the proposal at `index`. Reads no clock, no file and no random number.
    ///
    /// # Errors
    /// [`Unreadable`] for a proposal of a newer version. It stops the node: a member that skipped
    /// what others applied would hold another state from then on.
    fn apply(&mut self, index: u64, proposal: &[u8]) -> Result<Applied, Unreadable>;

    /// Every row of the state.
    fn rows(&self) -> impl Iterator<Item = Row> + Send;

    /// The state that `rows` describe, in any order.
    ///
    /// # Errors
    /// [`Unreadable`] for the first row this version cannot read.
    fn from_rows(rows: impl IntoIterator<Item = Row>) -> Result<Self, Unreadable>;
}

impl Machine for State {
    fn empty() -> Self {
        Self::default()
    }

    fn apply(&mut self, index: u64, proposal: &[u8]) -> Result<Applied, Unreadable> {
        let proposal = Proposal::decode(proposal).map_err(|bad| unreadable("entry", &bad))?;
        let applied = Self::apply(self, index, proposal);
        let rows = applied.touched.iter();
        Ok(Applied {
            rows: rows.map(|key| (key.encode(), self.row(key))).collect(),
            answer: crate::wire::encode_answer(&applied.answer),
        })
    }

    fn rows(&self) -> impl Iterator<Item = Row> + Send {
        Self::rows(self)
    }

    fn from_rows(rows: impl IntoIterator<Item = Row>) -> Result<Self, Unreadable> {
        Self::from_rows(rows).map_err(|bad| unreadable("row", &bad))
    }
}

fn unreadable(what: &'static str, bad: &dyn std::error::Error) -> Unreadable {
    Unreadable {
        what,
        why: bad.to_string(),
    }
}
