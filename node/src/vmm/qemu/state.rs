//! The first bytes of QEMU's device state: enough to tell a wrong file before anything starts.
//!
//! All integers are big-endian: magic, version, then a section that names the machine type.

use crate::vmm::error::ForeignStateError;
use crate::vmm::hardware::Hardware;
use crate::vmm::qemu::machine;

/// `QEVM`.
const MAGIC: u32 = 0x5145_564d;
/// The only version there is.
const VERSION: u32 = 3;
/// The byte before the machine's name.
const CONFIGURATION: u8 = 7;
/// Longer than any machine's name; a damaged length must not make us believe a page of noise.
const MAX_NAME_BYTES: usize = 64;
/// Bytes from the beginning of a state that [`check`] looks at.
pub const HEAD_BYTES: usize = 4 + 4 + 1 + 4 + MAX_NAME_BYTES;

/// See [`crate::vmm::check_state`].
///
/// # Errors
/// See [`ForeignStateError`].
pub fn check(head: &[u8], hardware: &Hardware) -> Result<(), ForeignStateError> {
    let (found, wanted) = (machine_in(head)?, machine::type_of(&hardware.machine));
    if found == wanted {
        return Ok(());
    }
    Err(ForeignStateError::OtherMachine {
        found: found.to_owned(),
        wanted: wanted.to_owned(),
    })
}

fn machine_in(head: &[u8]) -> Result<&str, ForeignStateError> {
    use ForeignStateError::NotAState;
    let (magic, rest) = u32_from(head).ok_or(NotAState)?;
    if magic != MAGIC {
        return Err(NotAState);
    }
    let (found, rest) = u32_from(rest).ok_or(NotAState)?;
    if found != VERSION {
        return Err(ForeignStateError::UnknownVersion {
            found,
            known: VERSION,
        });
    }
    let rest = rest.strip_prefix(&[CONFIGURATION]).ok_or(NotAState)?;
    let (length, rest) = u32_from(rest).ok_or(NotAState)?;
    let length = usize::try_from(length).map_err(|_| NotAState)?;
    let name = rest.get(..length).ok_or(NotAState)?;
    let plain = length <= MAX_NAME_BYTES && name.iter().all(u8::is_ascii_graphic);
    let name = std::str::from_utf8(name).ok().filter(|_| plain);
    name.ok_or(NotAState)
}

fn u32_from(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    Some((u32::from_be_bytes(*word), rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vmm::Accelerator;

    fn head(machine: &str) -> Vec<u8> {
        let mut head = b"QEVM\0\0\0\x03\x07".to_vec();
        head.extend(u32::try_from(machine.len()).expect("short").to_be_bytes());
        head.extend(machine.as_bytes());
        head.extend(b"\x05and so on");
        head
    }

    fn ours() -> Hardware {
        machine::of_new_guests(Accelerator::Tcg)
    }

    #[test]
    fn a_state_of_our_machine_is_taken_and_one_of_another_refused_by_name() {
        assert_eq!(check(&head("pc-q35-7.2"), &ours()), Ok(()));
        let refused = check(&head("pc-q35-7.1"), &ours()).expect_err("another");
        assert!(refused.to_string().contains("pc-q35-7.1"), "{refused}");
    }

    #[test]
    fn what_does_not_begin_like_a_state_is_refused() {
        let good = head("pc-q35-7.2");
        for cut in 0..13 + "pc-q35-7.2".len() {
            let refused = check(&good[..cut], &ours());
            assert_eq!(refused, Err(ForeignStateError::NotAState), "cut at {cut}");
        }
        let mut newer = good;
        newer[7] = 4;
        let refused = check(&newer, &ours());
        assert_eq!(
            refused,
            Err(ForeignStateError::UnknownVersion { found: 4, known: 3 })
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            prop_assert!(check(&bytes, &ours()).is_err());
        }
    }
}
