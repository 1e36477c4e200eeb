//! The kernel command line, as a pure function.
//!
//! The daemon states what the guest agent should know ([`GuestArgs`]); the driver states what its
//! machine needs and puts both together ([`join`]). Nobody may weaken the guest: mitigations and
//! KASLR stay as the kernel has them, and [`join`] refuses words that would change that.

use std::fmt;

use crate::vmm::error::SpecError;

/// `COMMAND_LINE_SIZE` of x86 is 2048 with the closing zero; the kernel cuts longer lines.
const MAX_LINE_BYTES: usize = 2047;

/// Words that would take a protection from the guest, each also as `word=…`.
const WEAKENING: [&str; 13] = [
    "mitigations",
    "nokaslr",
    "nopti",
    "pti",
    "nosmep",
    "nosmap",
    "nospectre_v1",
    "nospectre_v2",
    "spectre_v2",
    "spec_store_bypass_disable",
    "l1tf",
    "mds",
    "init",
];

/// What the guest agent reads from its kernel command line. The default is every sandbox's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestArgs {
    /// The root disk as the guest names it.
    pub root: String,
    /// Address and prefix length.
    pub ip: String,
    /// The default gateway.
    pub gateway: String,
    /// Name servers.
    pub dns: Vec<String>,
    /// The host name.
    pub hostname: String,
    /// Only prove that the guest boots: say so on the console and power off.
    pub probe: bool,
}

impl Default for GuestArgs {
    fn default() -> Self {
        Self {
            root: "/dev/vda".into(),
            ip: "169.254.0.21/30".into(),
            gateway: "169.254.0.22".into(),
            dns: vec!["8.8.8.8".into(), "8.8.4.4".into()],
            hostname: "capsule".into(),
            probe: false,
        }
    }
}

impl GuestArgs {
    /// Arguments of a guest that only proves that it boots.
    #[must_use]
    pub fn probe() -> Self {
        Self {
            probe: true,
            ..Self::default()
        }
    }
}

impl fmt::Display for GuestArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.probe {
            return f.write_str("wrenn.probe=1");
        }
        write!(
            f,
            "wrenn.root={} wrenn.ip={} wrenn.gw={} wrenn.dns={} wrenn.hostname={}",
            self.root,
            self.ip,
            self.gateway,
            self.dns.join(","),
            self.hostname
        )
    }
}

/// The whole line: the machine's words first, the guest's after them.
///
/// # Errors
/// The guest's part holds a character the kernel would read otherwise, a word that weakens the
/// guest, or is too long.
pub fn join(machine: &str, guest: &str) -> Result<String, SpecError> {
    let refuse = |value: &str| SpecError::Word {
        what: "kernel argument",
        value: value.chars().take(64).collect(),
    };
    // A quote would join words; the rest cannot be typed into a boot loader either.
    if let Some(bad) = guest
        .split(' ')
        .find(|word| word.chars().any(|c| !c.is_ascii_graphic() || c == '"'))
    {
        return Err(refuse(bad));
    }
    let named = |word: &str| word.split('=').next().unwrap_or(word).replace('-', "_");
    if let Some(bad) = guest
        .split(' ')
        .find(|word| WEAKENING.contains(&named(word).as_str()) || *word == "--")
    {
        return Err(refuse(bad));
    }
    let line = format!("{machine} {guest}");
    if line.len() > MAX_LINE_BYTES {
        return Err(SpecError::LineTooLong {
            found: line.len(),
            most: MAX_LINE_BYTES,
        });
    }
    Ok(line.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_line_states_the_fixed_facts_of_every_sandbox() {
        let line = join("console=ttyS0", &GuestArgs::default().to_string()).expect("valid");
        assert_eq!(
            line,
            "console=ttyS0 wrenn.root=/dev/vda wrenn.ip=169.254.0.21/30 wrenn.gw=169.254.0.22 \
             wrenn.dns=8.8.8.8,8.8.4.4 wrenn.hostname=capsule"
        );
    }

    #[test]
    fn a_probe_is_told_nothing_else() {
        assert_eq!(GuestArgs::probe().to_string(), "wrenn.probe=1");
    }

    #[test]
    fn words_that_weaken_the_guest_are_refused() {
        for bad in [
            "mitigations=off",
            "a=b nokaslr",
            "nopti",
            "init=/bin/sh",
            "spec-store-bypass-disable=off",
            "-- --x",
        ] {
            assert!(join("console=ttyS0", bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn characters_that_would_split_or_join_words_are_refused() {
        for bad in ["a=\"b c\"", "a=b\nc", "a=\u{fc}", "a=\0", "a\tb"] {
            assert!(join("console=ttyS0", bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_line_the_kernel_would_cut_is_refused() {
        let long = format!("a={}", "x".repeat(MAX_LINE_BYTES));
        assert!(matches!(
            join("console=ttyS0", &long),
            Err(SpecError::LineTooLong { .. })
        ));
    }
}
