//! Ids and their public spelling.
//!
//! A random id is 16 bytes; clients see a prefix, a dash and 25 base-36 digits of the big-endian
//! integer (`cl-0a1b…`). Node ids are small numbers given out by the log and never reused.

use std::fmt;
use std::str::FromStr;

/// Digits of a public id after its prefix: 36^25 exceeds 2^128.
const DIGITS: usize = 25;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid id: expected `{prefix}-` and {rest}")]
pub struct ParseIdError {
    text: String,
    prefix: &'static str,
    /// What should stand behind the dash.
    rest: &'static str,
}

/// Behind the dash of a random id.
const RANDOM: &str = "25 characters of [0-9a-z]";

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// What stands before the dash in the public spelling.
            pub const PREFIX: &'static str = $prefix;
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}-{}", Self::PREFIX, base36(self.0))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                text.strip_prefix(Self::PREFIX)
                    .and_then(|rest| rest.strip_prefix('-'))
                    .and_then(from_base36)
                    .map(Self)
                    .ok_or_else(|| ParseIdError {
                        // Enough to recognise it; the text is a stranger's and may be huge.
                        text: text.chars().take(64).collect(),
                        prefix: Self::PREFIX,
                        rest: RANDOM,
                    })
            }
        }
    };
}

random_id!(
    /// One sandbox, for its whole life; clients know it as a capsule.
    SandboxId,
    "cl"
);
random_id!(
    /// A team: the owner of sandboxes, templates and keys. All zero is the platform itself.
    TeamId,
    "team"
);
random_id!(
    /// An API key (not its secret).
    KeyId,
    "key"
);

random_id!(
    /// A join token (not its secret).
    TokenId,
    "tok"
);
random_id!(
    /// What clients of the hosts routes call a node, or a join token that nobody has joined by.
    HostId,
    "host"
);

impl From<NodeId> for HostId {
    fn from(node: NodeId) -> Self {
        Self(u128::from(node.0).to_be_bytes())
    }
}

impl From<TokenId> for HostId {
    fn from(token: TokenId) -> Self {
        Self(token.0)
    }
}

impl HostId {
    /// The node it stands for; `None` where it stands for a token, whose id is a random number past
    /// those of nodes.
    #[must_use]
    pub fn node(self) -> Option<NodeId> {
        u64::try_from(u128::from_be_bytes(self.0)).ok().map(NodeId)
    }

    /// The token it stands for where it stands for no node.
    #[must_use]
    pub const fn token(self) -> TokenId {
        TokenId(self.0)
    }
}

random_id!(
    /// A person who holds keys of teams.
    UserId,
    "usr"
);
random_id!(
    /// A record of the audit log.
    AuditId,
    "log"
);

impl AuditId {
    /// The record that the log's entry `index` made.
    #[must_use]
    pub fn of_entry(index: u64) -> Self {
        Self(u128::from(index).to_be_bytes())
    }

    /// The entry that made it; `None` for an id that no entry makes.
    #[must_use]
    pub fn entry(self) -> Option<u64> {
        u64::try_from(u128::from_be_bytes(self.0)).ok()
    }
}

random_id!(
    /// A snapshot: a sandbox sealed at one instant.
    SnapshotId,
    "snap"
);
random_id!(
    /// A receiver of events over HTTP.
    ChannelId,
    "ch"
);
random_id!(
    /// The building of a template.
    BuildId,
    "bld"
);
random_id!(
    /// A cluster, from its founding on. Nodes of two clusters never mistake each other.
    ClusterId,
    "wc"
);

/// A node: the index of the log entry that admitted it. Never given out twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node-{}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.strip_prefix("node-")
            .and_then(|rest| rest.parse().ok())
            .map(Self)
            .ok_or_else(|| ParseIdError {
                text: text.chars().take(64).collect(),
                prefix: "node",
                rest: "a number",
            })
    }
}

/// SHA-256 of a node's public key (its SPKI encoding): the name by which peers pin it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeKey(pub [u8; 32]);

impl fmt::Display for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The 25 base-36 digits of `bytes` read as a big-endian integer.
fn base36(bytes: [u8; 16]) -> String {
    let mut rest = u128::from_be_bytes(bytes);
    let mut digits = [b'0'; DIGITS];
    for digit in digits.iter_mut().rev() {
        // The remainder is below 36.
        *digit = b"0123456789abcdefghijklmnopqrstuvwxyz"[usize::try_from(rest % 36).unwrap_or(0)];
        rest /= 36;
    }
    digits.iter().map(|&digit| char::from(digit)).collect()
}

/// The inverse of [`base36`]; `None` for another length, another digit or a number past 128 bits.
fn from_base36(text: &str) -> Option<[u8; 16]> {
    if text.len() != DIGITS {
        return None;
    }
    let mut number = 0_u128;
    for byte in text.bytes() {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'z' => byte - b'a' + 10,
            _ => return None,
        };
        number = number.checked_mul(36)?.checked_add(u128::from(digit))?;
    }
    Some(number.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_zero_id_is_spelled_with_25_zeros() {
        assert_eq!(
            TeamId::default().to_string(),
            format!("team-{}", "0".repeat(25))
        );
    }

    #[test]
    fn ids_past_128_bits_upper_case_and_other_prefixes_are_refused() {
        let all_z = "z".repeat(25);
        let upper = "A".repeat(25);
        let zeros = "0".repeat(25);
        for bad in [
            format!("cl-{all_z}"),
            format!("cl-{upper}"),
            format!("team-{zeros}"),
            format!("cl{zeros}"),
            format!("cl-{zeros}0"),
            "cl-../../../../etc/passwd0".into(),
            String::new(),
        ] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_wrong_id_of_a_node_is_told_what_one_looks_like() {
        let err = "node1".parse::<NodeId>().expect_err("no id");
        assert!(
            err.to_string().ends_with("expected `node-` and a number"),
            "{err}"
        );
    }

    proptest! {
        #[test]
        fn every_id_survives_being_spelled_and_read(bytes: [u8; 16]) {
            let id = SandboxId(bytes);
            prop_assert_eq!(id.to_string().len(), 28);
            prop_assert_eq!(id.to_string().parse::<SandboxId>(), Ok(id));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<SandboxId>();
            let _ = text.parse::<NodeId>();
        }
    }
}
