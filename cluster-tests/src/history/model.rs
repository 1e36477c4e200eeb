//! What an object may do when operations come one after the other.

use std::fmt::Debug;
use std::hash::Hash;

/// A sequential object. Same state, same action, same answer: always the same next state.
pub trait Model: Clone + Debug + 'static {
    /// Where one object stands; the default is where each begins.
    type State: Clone + Debug + Default + Eq + Hash;
    /// What a client asks.
    type Action: Clone + Debug + PartialEq;
    /// What a client is told.
    type Answer: Clone + Debug;

    /// The state after `action` if `answer` is right in `state`, else `None`. Without an answer
    /// (the client never got one) whatever the object would have answered is right, and `None`
    /// says that it would have changed nothing.
    fn step(
        state: &Self::State,
        action: &Self::Action,
        answer: Option<&Self::Answer>,
    ) -> Option<Self::State>;

    /// Whether the action only looks. A look whose answer is unknown says nothing at all.
    fn only_looks(action: &Self::Action) -> bool;

    /// Whether a look that is answered like this and changes nothing where it is made would have
    /// changed nothing at any later instant at which the answer fits, either.
    fn is_steady(action: &Self::Action, _answer: &Self::Answer) -> bool {
        Self::only_looks(action)
    }

    /// What the operation has to do with the state before it. Models whose operations are all
    /// [`Shape::Overwrites`] or [`Shape::Needs`] are searched much faster.
    fn shape(_action: &Self::Action, _answer: Option<&Self::Answer>) -> Shape<Self::State> {
        Shape::Other
    }

    /// The action that brings an object into being, for objects that the cluster names: its client
    /// does not know which object it made until it is answered.
    #[must_use]
    fn birth() -> Option<Self::Action> {
        None
    }
}

/// How an operation depends on the state before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape<S> {
    /// Fits any state and leads to this one.
    Overwrites(S),
    /// Fits this state only and changes nothing.
    Needs(S),
    /// Neither.
    Other,
}
