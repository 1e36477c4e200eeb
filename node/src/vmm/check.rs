//! Checks of a [`VmmSpec`](super::VmmSpec) that every driver makes. Pure.

use std::path::Path;

use crate::vmm::error::SpecError;
use crate::vmm::{MAX_VCPUS, MIN_MEMORY, VmmSpec};

/// The largest guest memory: what its type can hold, so that the sum below cannot overflow.
const MAX_MEMORY_MIB: u32 = 1 << 24;
/// The longest name that the kernel gives an interface.
const MAX_TAP_BYTES: usize = 15;

/// Whether the numbers of `spec` can be built.
///
/// # Errors
/// [`SpecError::OutOfRange`].
pub fn numbers(spec: &VmmSpec) -> Result<(), SpecError> {
    range("vcpus", 1, u64::from(MAX_VCPUS), u64::from(spec.vcpus))?;
    let (least, most) = (u64::from(MIN_MEMORY.0), u64::from(MAX_MEMORY_MIB));
    range("memory in MiB", least, most, u64::from(spec.memory.0))
}

/// The path of a `what`, as text.
///
/// # Errors
/// [`SpecError::Path`].
pub fn utf8<'a>(what: &'static str, path: &'a Path) -> Result<&'a str, SpecError> {
    path.to_str()
        .filter(|_| path.is_absolute())
        .ok_or_else(|| SpecError::Path {
            what,
            path: path.to_owned(),
        })
}

/// Whether an interface can have the name `tap`.
///
/// # Errors
/// [`SpecError::Word`].
pub fn tap(tap: &str) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if tap.is_empty() || tap.len() > MAX_TAP_BYTES || !tap.chars().all(plain) {
        return Err(SpecError::Word {
            what: "tap name",
            value: tap.to_owned(),
        });
    }
    Ok(())
}

/// `mac`, as people and VMMs write it.
#[must_use]
pub fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn range(what: &'static str, least: u64, most: u64, found: u64) -> Result<(), SpecError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(SpecError::OutOfRange {
        what,
        least,
        most,
        found,
    })
}
