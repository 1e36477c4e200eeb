//! Who must act on an error. Status code, retry and log level follow from it.

/// Who must act next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// The request itself is wrong; repeating it will not help.
    FixRequest,
    /// What was named does not exist.
    NotThere,
    /// The object is not in a state that allows this; the caller may change that.
    WrongState,
    /// The caller may not do this.
    NotAllowed,
    /// Nothing is wrong but room; later, or on another node, it may work.
    RetryLater,
    /// Another peer may have what this one lacks.
    AskAnotherPeer,
    /// The guest or its VMM is at fault, not this node.
    BlameGuest,
    /// A person has to look at this node.
    CallOperator,
}
