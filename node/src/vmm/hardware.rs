//! The virtual hardware of a guest, in words that a snapshot can carry.
//!
//! A device state fits one machine and one processor only. Both have names that never change
//! their meaning: a driver that changes what it builds gives it a new name and keeps the old one
//! for as long as there may be snapshots of it.

use std::fmt;

/// What a guest runs on. Two guests with equal hardware can take over from each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hardware {
    /// The machine: its type at the VMM, and after a slash the number of our layout of it, such
    /// as `pc-q35-7.2/1`.
    pub machine: String,
    /// The processor: a profile of ours (`tcg-1`), or the host's own (`host-…`).
    pub cpu: String,
}

impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {}", self.machine, self.cpu)
    }
}
