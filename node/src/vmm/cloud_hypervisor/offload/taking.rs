//! What Cloud Hypervisor may say while it hands a guest to us, and what is to be done about it.
//! Pure: [`super::link`] reads and answers.
//!
//! ```text
//! Fresh --Start--> Started --MemoryFd--> Started … --Config--> Configured --State--> Stated
//! Stated --Complete | CompletePaused--> (whole)
//! ```
//!
//! The last request is not answered here. As long as it has no answer the guest stands still, and
//! Cloud Hypervisor owns it: with `Error` it keeps it, with `Ok` it ends (or keeps it too, where a
//! version can).

use super::codec::{Command, Request};
use super::{MAX_CONFIG_BYTES, MAX_SLOTS, MAX_STATE_BYTES, OffloadError, PROTOCOL};

/// Where a hand-over to us stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Fresh,
    Started,
    Configured,
    Stated,
    Whole,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// An answer of `Ok`.
    Answer,
    /// A slot and its descriptor are to be read ([`Taking::slot`]), then the answer.
    Slot,
    /// So many bytes of configuration are to be read, then the answer.
    Config(usize),
    /// So many bytes of state are to be read, then the answer.
    State(usize),
    /// Nothing: all is there. The answer decides what becomes of the guest on the other side.
    Whole,
}

/// A hand-over to us.
#[derive(Clone, Debug)]
pub struct Taking {
    phase: Phase,
    slots: Vec<u32>,
}

impl Default for Taking {
    fn default() -> Self {
        Self {
            phase: Phase::Fresh,
            slots: Vec::new(),
        }
    }
}

impl Taking {
    /// Takes in the next request.
    ///
    /// # Errors
    /// See [`OffloadError`]; the hand-over is over.
    pub fn hear(&mut self, request: Request) -> Result<Ask, OffloadError> {
        use Phase::{Configured, Fresh, Started, Stated, Whole};
        let (phase, ask) = match (self.phase, request.command) {
            (Fresh, Command::Start) if request.version == PROTOCOL => (Started, Ask::Answer),
            (Fresh, Command::Start) => {
                return Err(OffloadError::UnknownProtocol {
                    found: request.version,
                });
            }
            (Started, Command::MemoryFd) => (Started, Ask::Slot),
            // Without a slot the memory would follow inline, and it would not be ours.
            (Started, Command::Config) if !self.slots.is_empty() => {
                let bytes = bounded("configuration", request.length, MAX_CONFIG_BYTES)?;
                (Configured, Ask::Config(bytes))
            }
            (Configured, Command::State) => {
                let bytes = bounded("device state", request.length, MAX_STATE_BYTES)?;
                (Stated, Ask::State(bytes))
            }
            (Stated, Command::Complete | Command::CompletePaused) => (Whole, Ask::Whole),
            (phase, command) => {
                let when = when(phase);
                return Err(OffloadError::OutOfTurn { command, when });
            }
        };
        self.phase = phase;
        Ok(ask)
    }

    /// Takes in a slot's number.
    ///
    /// # Errors
    /// [`OffloadError::Slot`]: there are too many, or it was named before.
    pub fn slot(&mut self, slot: u32) -> Result<(), OffloadError> {
        if self.slots.contains(&slot) {
            let what = "twice";
            return Err(OffloadError::Slot { slot, what });
        }
        if self.slots.len() == MAX_SLOTS {
            let what = "after more than any guest of ours has";
            return Err(OffloadError::Slot { slot, what });
        }
        self.slots.push(slot);
        Ok(())
    }

    /// The slots that were named.
    #[must_use]
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }
}

fn bounded(what: &'static str, bytes: u64, most: u64) -> Result<usize, OffloadError> {
    let too_large = OffloadError::TooLarge { what, bytes };
    if bytes > most {
        return Err(too_large);
    }
    usize::try_from(bytes).map_err(|_| too_large)
}

fn when(phase: Phase) -> &'static str {
    match phase {
        Phase::Fresh => "before it had started",
        Phase::Started => "where its memory or its configuration should be",
        Phase::Configured => "where its state should be",
        Phase::Stated => "where the end should be",
        Phase::Whole => "after the end",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hear(taking: &mut Taking, command: Command, length: u64) -> Result<Ask, OffloadError> {
        taking.hear(Request::new(command, length))
    }

    #[test]
    fn a_guest_with_two_slots_is_taken_in_order() {
        let mut taking = Taking::default();
        let start = hear(&mut taking, Command::Start, 0).expect("first");
        assert_eq!(start, Ask::Answer);
        for slot in [1, 0] {
            let ask = hear(&mut taking, Command::MemoryFd, 4).expect("memory");
            assert_eq!(ask, Ask::Slot);
            taking.slot(slot).expect("new");
        }
        let config = hear(&mut taking, Command::Config, 7500).expect("configuration");
        assert_eq!(config, Ask::Config(7500));
        let state = hear(&mut taking, Command::State, 40_000).expect("state");
        assert_eq!(state, Ask::State(40_000));
        let end = hear(&mut taking, Command::CompletePaused, 0).expect("end");
        assert_eq!((end, taking.slots()), (Ask::Whole, &[1, 0][..]));
        assert!(hear(&mut taking, Command::CompletePaused, 0).is_err());
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let newer = Request {
            version: 1,
            ..Request::new(Command::Start, 0)
        };
        let refused = Taking::default().hear(newer).expect_err("unknown");
        assert!(refused.to_string().contains("version 1"), "{refused}");
    }

    #[test]
    fn memory_that_would_come_inline_is_refused() {
        let mut taking = Taking::default();
        hear(&mut taking, Command::Start, 0).expect("first");
        let without = hear(&mut taking, Command::Config, 10);
        assert!(matches!(without, Err(OffloadError::OutOfTurn { .. })));
        hear(&mut taking, Command::MemoryFd, 4).expect("memory");
        taking.slot(0).expect("new");
        hear(&mut taking, Command::Config, 10).expect("configuration");
        assert!(hear(&mut taking, Command::Memory, 16).is_err());
    }

    #[test]
    fn slots_are_few_and_different_and_documents_bounded() {
        let mut taking = Taking::default();
        for slot in 0..8 {
            taking.slot(slot).expect("room");
        }
        assert!(taking.slot(3).is_err());
        assert!(taking.slot(8).is_err());
        hear(&mut taking, Command::Start, 0).expect("first");
        for bytes in [MAX_CONFIG_BYTES + 1, u64::MAX] {
            let refused = hear(&mut taking.clone(), Command::Config, bytes);
            assert!(matches!(refused, Err(OffloadError::TooLarge { .. })));
        }
    }

    proptest! {
        /// Whatever comes in whatever order: a guest is whole only after one of each.
        #[test]
        fn only_the_one_order_makes_a_whole_guest(
            commands in prop::collection::vec(0_usize..7, 0..12)
        ) {
            let kinds = [
                Command::Start, Command::MemoryFd, Command::Config, Command::State,
                Command::Complete, Command::CompletePaused, Command::Abandon,
            ];
            let mut taking = Taking::default();
            let mut heard = Vec::new();
            for (slot, kind) in (0_u32..).zip(&commands) {
                let command = kinds[*kind];
                let length = if command == Command::MemoryFd { 4 } else { 0 };
                let Ok(ask) = hear(&mut taking, command, length) else { break };
                if ask == Ask::Slot && taking.slot(slot).is_err() { break }
                heard.push(command);
                if ask == Ask::Whole {
                    let slots = heard.len() - 4;
                    prop_assert!(slots >= 1);
                    prop_assert_eq!(heard[0], Command::Start);
                    prop_assert!(heard[1..=slots].iter().all(|it| *it == Command::MemoryFd));
                    prop_assert_eq!(&heard[slots + 1..slots + 3], &[Command::Config, Command::State]);
                }
            }
        }
    }
}
