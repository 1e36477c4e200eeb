//! Which Cloud Hypervisor this is, and how that one behaves.

use std::fmt;

/// The first version whose local migration serves us.
pub const OLDEST: u32 = 53;
/// The last version that this release was tried with, and the end of the table in [`behaviour`].
pub const NEWEST: u32 = 54;
/// What a version may be made of; a longer one is none.
const MAX_BYTES: usize = 64;

/// A version, as `vmm.ping` and `--version` tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number: each release has its own.
    pub major: u32,
    /// The second.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Version {
    /// The version in `text`: `53.0.0`, `v53.0`, or what a build between two releases says.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() > MAX_BYTES {
            return None;
        }
        let text = text.strip_prefix("cloud-hypervisor ").unwrap_or(text);
        let text = text.strip_prefix('v').unwrap_or(text);
        let end = text.find(|it: char| !it.is_ascii_digit() && it != '.');
        let mut numbers = text[..end.unwrap_or(text.len())].split('.');
        let mut next = || numbers.next()?.parse().ok();
        Some(Self {
            major: next()?,
            minor: next()?,
        })
    }
}

/// How a guest that was laid open to us is kept where it is, so that it can go on there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// The last question of the hand-over is left open for as long as the guest is saved, and
    /// refused when it is to go on. The VMM takes that for a migration that failed, and keeps the
    /// guest as it was: standing still. An `Ok` would end it.
    HoldTheAnswer,
}

/// What differs between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// See [`Keeping`].
    pub keeping: Keeping,
    /// Its filter of system calls ends the process in a save of a build against glibc, where the
    /// thread that sends looks at a path.
    pub glibc_save_needs_newfstatat: bool,
}

/// A version that is not in the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Cloud Hypervisor {found} is not known: this release runs {OLDEST} to {NEWEST}")]
pub struct UnknownVersion {
    /// What it says of itself.
    pub found: String,
}

/// How `version` behaves.
///
/// # Errors
/// It is not in the table. A state document of it may have another layout, so nothing is assumed.
pub fn behaviour(version: Version) -> Result<Behaviour, UnknownVersion> {
    match version.major {
        OLDEST => Ok(Behaviour {
            keeping: Keeping::HoldTheAnswer,
            glibc_save_needs_newfstatat: true,
        }),
        // It could also keep the guest by an option (`preserve_source`). Holding the answer needs
        // no option and is one path for all.
        NEWEST => Ok(Behaviour {
            keeping: Keeping::HoldTheAnswer,
            glibc_save_needs_newfstatat: false,
        }),
        _ => Err(UnknownVersion {
            found: version.to_string(),
        }),
    }
}

/// The version in `text`, and how it behaves.
///
/// # Errors
/// It is none, or not in the table.
pub fn known(text: &str) -> Result<(Version, Behaviour), UnknownVersion> {
    let version = Version::parse(text).ok_or_else(|| UnknownVersion {
        found: text.chars().take(MAX_BYTES).collect(),
    })?;
    Ok((version, behaviour(version)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_whatever_tells_it() {
        for text in [
            "53.0.0",
            "v53.0",
            "v53.0-246-gae44c2971-dirty\n",
            "cloud-hypervisor v53.0",
        ] {
            let version = Version::parse(text).expect("a version");
            assert_eq!((version.major, version.minor), (53, 0), "{text}");
        }
        let long = "9".repeat(200);
        for text in [
            "",
            "v",
            "53",
            "QEMU emulator 7.2",
            "99999999999999.0",
            &long,
        ] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn versions_outside_the_table_are_refused_by_name() {
        for (major, known) in [(52, false), (53, true), (54, true), (55, false)] {
            let version = Version { major, minor: 1 };
            assert_eq!(behaviour(version).is_ok(), known, "{version}");
        }
        let older = behaviour(Version {
            major: 52,
            minor: 0,
        })
        .expect_err("too old");
        assert!(older.to_string().contains("52.0"), "{older}");
    }
}
