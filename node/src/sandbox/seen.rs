//! The newest epoch seen of each sandbox, so that an older one is never run again here.
//!
//! Ownership is given out in a row; a start under an older epoch comes from a decision that has
//! been overtaken. Epochs of sandboxes that left this node are remembered too, as many as
//! [`MAX_REMEMBERED`], the oldest forgotten first: such a start is a matter of moments, and the
//! memory is bounded.

use std::collections::{HashMap, VecDeque};

use proto::epoch::Epoch;
use proto::ids::SandboxId;

/// Sandboxes remembered; about 4 MiB when full.
const MAX_REMEMBERED: usize = 65_536;

/// A start under an epoch that has been overtaken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("epoch {asked} has been overtaken by {seen}")]
pub(super) struct Overtaken {
    asked: Epoch,
    seen: Epoch,
}

/// The newest epoch of each sandbox.
#[derive(Debug, Default)]
pub(super) struct SeenEpochs {
    newest: HashMap<SandboxId, Epoch>,
    /// In the order in which they were first seen.
    order: VecDeque<SandboxId>,
}

impl SeenEpochs {
    /// Notes `epoch`.
    ///
    /// # Errors
    /// A newer one was seen.
    pub(super) fn admit(&mut self, id: SandboxId, epoch: Epoch) -> Result<(), Overtaken> {
        if let Some(&seen) = self.newest.get(&id)
            && seen > epoch
        {
            return Err(Overtaken { asked: epoch, seen });
        }
        if self.newest.insert(id, epoch).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > MAX_REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.newest.remove(&oldest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SandboxId = SandboxId([7; 16]);

    #[test]
    fn an_epoch_lower_than_one_that_was_seen_is_refused_by_name() {
        let mut seen = SeenEpochs::default();
        assert_eq!(seen.admit(ID, Epoch(5)), Ok(()));
        assert_eq!(seen.admit(ID, Epoch(5)), Ok(()), "the same start again");
        let refused = Overtaken {
            asked: Epoch(4),
            seen: Epoch(5),
        };
        assert_eq!(seen.admit(ID, Epoch(4)), Err(refused));
        assert_eq!(seen.admit(ID, Epoch(9)), Ok(()));
        assert!(seen.admit(ID, Epoch(5)).is_err());
        assert_eq!(seen.admit(SandboxId([8; 16]), Epoch(1)), Ok(()));
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_is_forgotten_first() {
        let mut seen = SeenEpochs::default();
        let id = |n: usize| SandboxId((n as u128).to_be_bytes());
        for n in 0..=MAX_REMEMBERED {
            assert_eq!(seen.admit(id(n), Epoch(2)), Ok(()));
        }
        assert_eq!(seen.newest.len(), MAX_REMEMBERED);
        assert!(seen.admit(id(1), Epoch(1)).is_err());
        assert_eq!(seen.admit(id(0), Epoch(1)), Ok(()), "long forgotten");
    }
}
