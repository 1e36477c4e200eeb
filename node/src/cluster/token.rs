//! A join token as text: everything a new host needs to find a cluster and to prove that it may
//! come in.
//!
//! ```text
//! wrj1_ + base64url( version | role | cluster 16 | token 16 | seed 32 | expiry 8
//!                    | count | count x (key 32 | length | "control address,bulk address") | crc 4 )
//! ```
//!
//! The seed is the secret: it is printed once and exists nowhere else, the log has its public half.
//! The contacts carry the fingerprints of their keys, so a joiner cannot be fooled about whom it
//! joins. Role and expiry are for people; the log decides.

use std::fmt;
use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proto::ids::{ClusterId, NodeKey, TokenId};
use proto::units::Stamp;

/// What a token begins with; the digit is the version of the text.
const PREFIX: &str = "wrj1_";
/// The version inside.
const VERSION: u8 = 1;
/// Most contacts in a token: three survive two dead hosts and keep the line at 350 characters.
pub const MAX_CONTACTS: usize = 4;
/// Longest text that is looked at.
const MAX_CHARS: usize = 2048;

/// A member that a joiner may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenContact {
    /// Its key.
    pub key: NodeKey,
    /// Where it takes calls.
    pub control: SocketAddr,
    /// Where it takes bulk transfers.
    pub bulk: SocketAddr,
}

/// What a joining node becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRole {
    /// A full member.
    Member,
    /// A host of one team.
    Host,
}

/// A join token with its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinTicket {
    /// What the node becomes.
    pub role: TokenRole,
    /// Of which cluster.
    pub cluster: ClusterId,
    /// Which token.
    pub token: TokenId,
    /// The secret.
    pub seed: [u8; 32],
    /// When it ends.
    pub expires_at: Stamp,
    /// Whom to ask.
    pub contacts: Vec<TokenContact>,
}

impl fmt::Debug for JoinTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinTicket")
            .field("cluster", &self.cluster)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// Why a text is no join token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadTokenError {
    /// Something else altogether.
    #[error("this is not a join token: one begins with {PREFIX}")]
    NotAToken,
    /// Characters were lost or changed.
    #[error("the join token is damaged: copy the whole line that `wrenn token create` printed")]
    Damaged,
    /// Made by a later version.
    #[error("the join token has version {found}, this program reads {VERSION}: upgrade it")]
    Version {
        /// The version it has.
        found: u8,
    },
}

impl JoinTicket {
    /// The token as one word.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut bytes = vec![VERSION, u8::from(self.role == TokenRole::Host)];
        bytes.extend_from_slice(&self.cluster.0);
        bytes.extend_from_slice(&self.token.0);
        bytes.extend_from_slice(&self.seed);
        bytes.extend_from_slice(&self.expires_at.0.to_be_bytes());
        let contacts = &self.contacts[..self.contacts.len().min(MAX_CONTACTS)];
        bytes.push(u8::try_from(contacts.len()).unwrap_or(0));
        for contact in contacts {
            let addresses = format!("{},{}", contact.control, contact.bulk);
            bytes.extend_from_slice(&contact.key.0);
            bytes.push(u8::try_from(addresses.len()).unwrap_or(0));
            bytes.extend_from_slice(addresses.as_bytes());
        }
        bytes.extend_from_slice(&checksum(&bytes));
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// Reads a token.
    ///
    /// # Errors
    /// [`ReadTokenError`], in words for whoever pasted it.
    pub fn from_text(text: &str) -> Result<Self, ReadTokenError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).ok_or(ReadTokenError::NotAToken)?;
        if text.len() > MAX_CHARS {
            return Err(ReadTokenError::Damaged);
        }
        let bytes = URL_SAFE_NO_PAD
            .decode(body)
            .map_err(|_| ReadTokenError::Damaged)?;
        let (body, sum) = bytes
            .split_last_chunk::<4>()
            .ok_or(ReadTokenError::Damaged)?;
        if checksum(body) != *sum {
            return Err(ReadTokenError::Damaged);
        }
        let mut rest = body;
        let [version, role] = take(&mut rest)?;
        if version != VERSION {
            return Err(ReadTokenError::Version { found: version });
        }
        let role = match role {
            0 => TokenRole::Member,
            1 => TokenRole::Host,
            _ => return Err(ReadTokenError::Damaged),
        };
        let ticket = Self {
            role,
            cluster: ClusterId(take(&mut rest)?),
            token: TokenId(take(&mut rest)?),
            seed: take(&mut rest)?,
            expires_at: Stamp(u64::from_be_bytes(take(&mut rest)?)),
            contacts: contacts(&mut rest)?,
        };
        if rest.is_empty() && !ticket.contacts.is_empty() {
            Ok(ticket)
        } else {
            Err(ReadTokenError::Damaged)
        }
    }
}

fn contacts(rest: &mut &[u8]) -> Result<Vec<TokenContact>, ReadTokenError> {
    let [count] = take(rest)?;
    if usize::from(count) > MAX_CONTACTS {
        return Err(ReadTokenError::Damaged);
    }
    (0..count).map(|_| contact(rest)).collect()
}

fn contact(rest: &mut &[u8]) -> Result<TokenContact, ReadTokenError> {
    let key = NodeKey(take(rest)?);
    let [length] = take(rest)?;
    let (text, after) = rest
        .split_at_checked(length.into())
        .ok_or(ReadTokenError::Damaged)?;
    *rest = after;
    let parsed = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.split_once(','))
        .and_then(|(control, bulk)| Some((control.parse().ok()?, bulk.parse().ok()?)));
    let (control, bulk) = parsed.ok_or(ReadTokenError::Damaged)?;
    Ok(TokenContact { key, control, bulk })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], ReadTokenError> {
    let (taken, after) = rest
        .split_first_chunk::<N>()
        .ok_or(ReadTokenError::Damaged)?;
    *rest = after;
    Ok(*taken)
}

/// Not a secret's protection: it tells a line that was cut from one that is not a token.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let hash = blake3::hash(bytes);
    let mut sum = [0; 4];
    sum.copy_from_slice(&hash.as_bytes()[..4]);
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket(contacts: usize) -> JoinTicket {
        let contact = |n: usize| TokenContact {
            key: NodeKey([u8::try_from(n).expect("few"); 32]),
            control: format!("192.0.2.{n}:7321").parse().expect("an address"),
            bulk: format!("[2001:db8::{n}]:7322").parse().expect("an address"),
        };
        JoinTicket {
            role: TokenRole::Member,
            cluster: ClusterId([1; 16]),
            token: TokenId([2; 16]),
            seed: [3; 32],
            expires_at: Stamp(1_800_000_000_000),
            contacts: (1..=contacts).map(contact).collect(),
        }
    }

    #[test]
    fn a_token_survives_being_printed_and_pasted() {
        for contacts in 1..=MAX_CONTACTS {
            let ticket = ticket(contacts);
            let text = ticket.to_text();
            assert_eq!(JoinTicket::from_text(&format!(" {text}\n")), Ok(ticket));
        }
    }

    #[test]
    fn the_secret_is_not_in_debug_output() {
        assert!(!format!("{:?}", ticket(1)).contains("3, 3, 3"));
    }

    #[test]
    fn a_token_that_was_cut_or_changed_anywhere_is_damaged() {
        let text = ticket(3).to_text();
        for at in PREFIX.len()..text.len() {
            assert!(JoinTicket::from_text(&text[..at]).is_err(), "cut at {at}");
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("ASCII");
            let read = JoinTicket::from_text(&changed);
            assert!(read.is_err(), "changed at {at}: {read:?}");
        }
        assert_eq!(
            JoinTicket::from_text("wrn_0123"),
            Err(ReadTokenError::NotAToken)
        );
    }

    #[test]
    fn a_later_version_is_named() {
        let mut bytes = vec![9_u8; 80];
        bytes.extend_from_slice(&checksum(&bytes));
        let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes));
        let read = JoinTicket::from_text(&text);
        assert_eq!(read, Err(ReadTokenError::Version { found: 9 }));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in ".*", bytes: Vec<u8>) {
            let _ = JoinTicket::from_text(&text);
            let mut framed = bytes;
            framed.extend_from_slice(&checksum(&framed.clone()));
            let _ = JoinTicket::from_text(&format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(framed)));
        }
    }
}
