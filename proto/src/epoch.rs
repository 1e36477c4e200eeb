//! The fencing token of a sandbox's ownership.

use std::fmt;

/// How many times a sandbox's ownership has been given out, as the log index of the command that
/// gave it. Sent with every effect; whoever has seen a newer one refuses an older one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
