//! Which Cloud Hypervisor this is, and how that one behaves: an older one is refused, a newer one taken
//! for the newest that was tried.

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

/// What differs between releases, as far as the driver acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// Its filter of system calls ends a build against glibc in the middle of a save: the thread that
    /// sends looks at a path, and may not. Whoever runs one is told so, and what to use instead.
    pub filter_ends_glibc_save: bool,
}

/// A release that serves us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Which it is.
    pub version: Version,
    /// How it behaves, or is taken to behave where it is newer than the table.
    pub behaviour: Behaviour,
}

impl Known {
    /// What people should be told of it: that it is newer than any that was tried.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let version = self.version;
        (version.major > NEWEST).then(|| {
            format!(
                "Cloud Hypervisor {version} is newer than {NEWEST}, the last that this release was tried \
                 with, and is taken for one of those"
            )
        })
    }
}

/// A version that does not serve us.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Cloud Hypervisor {found} does not serve: this release needs {OLDEST} or a newer one")]
pub struct UnknownVersion {
    /// What it says of itself.
    pub found: String,
}

/// How `version` behaves. One that is newer than the table behaves as the last in it: its guests are
/// named after it and go to no other release, its documents are read with no field that we do not
/// know, and the probe has had one guest saved before any other is.
///
/// # Errors
/// It is older than the first whose hand-over serves us.
pub fn behaviour(version: Version) -> Result<Behaviour, UnknownVersion> {
    match version.major {
        ..OLDEST => Err(UnknownVersion {
            found: version.to_string(),
        }),
        OLDEST => Ok(Behaviour {
            filter_ends_glibc_save: true,
        }),
        NEWEST.. => Ok(Behaviour {
            filter_ends_glibc_save: false,
        }),
    }
}

/// The release that tells `text` of itself.
///
/// # Errors
/// It is none, or too old.
pub fn known(text: &str) -> Result<Known, UnknownVersion> {
    let version = Version::parse(text).ok_or_else(|| UnknownVersion {
        found: text.chars().take(MAX_BYTES).collect(),
    })?;
    Ok(Known {
        version,
        behaviour: behaviour(version)?,
    })
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
    fn an_older_version_is_refused_by_name_and_so_is_none() {
        let older = known("v52.1").expect_err("too old").to_string();
        assert!(older.contains("52.1") && older.contains("53"), "{older}");
        let none = known("QEMU emulator 7.2").expect_err("none").to_string();
        assert!(none.contains("QEMU emulator 7.2"), "{none}");
    }

    #[test]
    fn a_version_of_the_table_is_taken_without_a_word() {
        for (text, filtered) in [("v53.0", true), ("54.2.0", false)] {
            let known = known(text).expect("known");
            assert_eq!(known.behaviour.filter_ends_glibc_save, filtered, "{text}");
            assert_eq!(known.warning(), None, "{text}");
        }
    }

    #[test]
    fn a_newer_version_behaves_as_the_newest_of_the_table_and_people_are_told() {
        let newer = known("v55.0").expect("taken");
        let newest = behaviour(Version {
            major: NEWEST,
            minor: 0,
        });
        assert_eq!(Ok(newer.behaviour), newest);
        let warning = newer.warning().expect("a warning");
        assert!(
            warning.contains("55.0") && warning.contains("54"),
            "{warning}"
        );
    }
}
