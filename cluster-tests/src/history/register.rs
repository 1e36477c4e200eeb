//! A register: what was written last is read.
//!
//! Histories should write values that no one else writes; a value written twice hides stale reads.

use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;

use super::model::{Model, Shape};

/// The model of a register of `V`s. Nothing was written before the first write.
#[derive(Clone, Debug)]
pub struct Register<V>(PhantomData<V>);

/// What clients ask of a register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegisterAction<V> {
    /// Replaces the value. Its answer is the value written.
    Write(V),
    /// Asks for the value; the answer is `None` before the first write.
    Read,
}

impl<V: Clone + Debug + Eq + Hash + 'static> Model for Register<V> {
    type State = Option<V>;
    type Action = RegisterAction<V>;
    type Answer = Option<V>;

    fn step(
        state: &Self::State,
        action: &Self::Action,
        answer: Option<&Self::Answer>,
    ) -> Option<Self::State> {
        match action {
            RegisterAction::Write(value) => Some(Some(value.clone())),
            RegisterAction::Read => {
                let right = answer.is_none_or(|answer| answer == state);
                right.then(|| state.clone())
            }
        }
    }

    fn only_looks(action: &Self::Action) -> bool {
        matches!(action, RegisterAction::Read)
    }

    fn shape(action: &Self::Action, answer: Option<&Self::Answer>) -> Shape<Self::State> {
        match (action, answer) {
            (RegisterAction::Write(value), _) => Shape::Overwrites(Some(value.clone())),
            (RegisterAction::Read, Some(found)) => Shape::Needs(found.clone()),
            (RegisterAction::Read, None) => Shape::Other,
        }
    }
}
