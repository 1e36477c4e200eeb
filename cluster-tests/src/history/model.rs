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

    /// The action that brings an object into being, for objects that the cluster names: its client
    /// does not know which object it made until it is answered.
    #[must_use]
    fn birth() -> Option<Self::Action> {
        None
    }
}
