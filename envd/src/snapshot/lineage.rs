//! Which word of the host is the newest. Pure.
//!
//! Two numbers come with each order. The *epoch* says under whose ownership it was given: an order
//! of an older owner than the newest heard of is refused. The *generation* names one life of the
//! guest, between two restores; a restore that is told again (its answer was lost) changes nothing.

use std::fmt;
use std::str::FromStr;

use proto::epoch::Epoch;

/// Names the life of the guest since its last restore: 16 random bytes of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation([u8; 16]);

impl Generation {
    /// The life that began with a boot.
    pub const BOOT: Self = Self([0; 16]);
    /// Length of its text.
    const TEXT_BYTES: usize = 32;
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The text is not 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 32 lower-case hexadecimal digits")]
pub struct NotAGeneration;

impl FromStr for Generation {
    type Err = NotAGeneration;

    fn from_str(text: &str) -> Result<Self, NotAGeneration> {
        let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != Self::TEXT_BYTES || !text.bytes().all(plain) {
            return Err(NotAGeneration);
        }
        let value = u128::from_str_radix(text, 16).map_err(|_| NotAGeneration)?;
        Ok(Self(value.to_be_bytes()))
    }
}

/// The order is of an owner that is not the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("epoch {given} is older than {newest}, the newest this guest has heard of")]
pub struct StaleEpoch {
    /// The order's.
    pub given: Epoch,
    /// The newest.
    pub newest: Epoch,
}

/// What the guest remembers of the orders it was given.
#[derive(Debug, Default)]
pub struct Lineage {
    newest: Option<Epoch>,
    generation: Option<Generation>,
}

impl Lineage {
    /// Refuses an order of an older owner, and remembers a newer one. Orders that name no epoch
    /// come from hosts that have none.
    ///
    /// # Errors
    /// [`StaleEpoch`] names both.
    pub fn admit(&mut self, epoch: Option<Epoch>) -> Result<(), StaleEpoch> {
        match (epoch, self.newest) {
            (Some(given), Some(newest)) if given < newest => Err(StaleEpoch { given, newest }),
            _ => {
                self.newest = epoch.or(self.newest);
                Ok(())
            }
        }
    }

    /// Whether the guest is in this life already.
    #[must_use]
    pub fn is_in(&self, generation: Generation) -> bool {
        self.generation == Some(generation)
    }

    /// Notes that this life has begun.
    pub fn enter(&mut self, generation: Generation) {
        self.generation = Some(generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_older_epoch_is_refused_and_an_equal_one_is_not() {
        let mut lineage = Lineage::default();
        assert_eq!(lineage.admit(None), Ok(()));
        assert_eq!(lineage.admit(Some(Epoch(7))), Ok(()));
        assert_eq!(lineage.admit(Some(Epoch(7))), Ok(()));
        let stale = StaleEpoch {
            given: Epoch(6),
            newest: Epoch(7),
        };
        assert_eq!(lineage.admit(Some(Epoch(6))), Err(stale));
        assert_eq!(lineage.admit(None), Ok(()), "a host without epochs");
        assert_eq!(
            lineage.admit(Some(Epoch(6))),
            Err(stale),
            "is not a newer one"
        );
        assert_eq!(lineage.admit(Some(Epoch(8))), Ok(()));
    }

    #[test]
    fn a_generation_is_known_again_and_no_other() {
        let (one, two) = (Generation([1; 16]), Generation([2; 16]));
        let mut lineage = Lineage::default();
        assert!(!lineage.is_in(one));
        lineage.enter(one);
        assert!(lineage.is_in(one) && !lineage.is_in(two));
    }

    proptest! {
        #[test]
        fn only_the_one_spelling_is_read(text in "[0-9a-fA-F+]{30,34}", bytes: [u8; 16]) {
            if let Ok(read) = text.parse::<Generation>() {
                prop_assert_eq!(read.to_string(), text);
            }
            let spelled = Generation(bytes);
            prop_assert_eq!(spelled.to_string().parse(), Ok(spelled));
        }
    }
}
