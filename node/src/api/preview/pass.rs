//! Who may visit a port: anybody where the team opened it, else whoever has a key of the team or a link.
//!
//! A link is a signed, short-lived word for one port of one capsule. It is signed with what every node knows of an
//! API key, its hash, so every node can check it, and revoking the key ends its links.

use axum::http::HeaderMap;
use axum::http::header::COOKIE;
use axum::http::request::Parts;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proto::ids::KeyId;
use proto::units::Stamp;
use raft::state::{Sandbox, State};

use super::super::auth::{is_good, presented_by};
use super::address::Address;

/// The parameter, the cookie and the header that carry a link's word.
pub(super) const LINK: &str = "wrenn_link";
const LINK_HEADER: &str = "wrenn-link";
/// What a signature is for, so that it can never be taken for one of something else.
const PURPOSE: &[u8] = b"wrenn preview link 1";
/// Key, port and end of a link before its signature.
const TERMS_BYTES: usize = 16 + 2 + 8;
/// The signature.
const SIGNATURE_BYTES: usize = 32;

/// Makes the word of a link to `to` that holds until `until`.
pub(super) fn sign(key: KeyId, hash: &[u8; 32], to: Address, until: Stamp) -> String {
    let mut word = terms(key, to.port, until);
    let signature = signature(hash, to, &word);
    word.extend_from_slice(signature.as_bytes());
    URL_SAFE_NO_PAD.encode(word)
}

/// By what a visitor comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// The team opened the port to everybody.
    Open,
    /// By this key, or a link of it.
    Key(KeyId),
}

/// By what a request may go to `sandbox` at `now`, if it may.
pub(super) fn pass(
    state: &State,
    sandbox: &Sandbox,
    port: u16,
    parts: &Parts,
    now: Stamp,
) -> Option<Pass> {
    if sandbox.spec.ports_open {
        return Some(Pass::Open);
    }
    let by_key = presented_by(state, &parts.headers, now).filter(|it| it.team == sandbox.team);
    let to = Address {
        id: sandbox.id,
        port,
    };
    let by_link = || words(parts).find_map(|word| signer(state, sandbox, to, word, now));
    by_key.map(|key| key.id).or_else(by_link).map(Pass::Key)
}

/// The words of links that a request carries.
fn words(parts: &Parts) -> impl Iterator<Item = &str> {
    let header = parts
        .headers
        .get(LINK_HEADER)
        .and_then(|it| it.to_str().ok());
    header
        .into_iter()
        .chain(in_query(parts))
        .chain(in_cookies(&parts.headers))
}

/// The word in the query of a request.
pub(super) fn in_query(parts: &Parts) -> Option<&str> {
    let pairs = parts.uri.query()?.split('&');
    pairs
        .filter_map(|pair| pair.split_once('='))
        .find_map(|(name, word)| (name == LINK).then_some(word))
}

fn in_cookies(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let texts = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|it| it.to_str().ok());
    let pairs = texts
        .flat_map(|text| text.split(';'))
        .filter_map(|pair| pair.trim().split_once('='));
    pairs.filter_map(|(name, word)| (name == LINK).then_some(word))
}

/// The key whose link `word` is, if it holds.
fn signer(state: &State, sandbox: &Sandbox, to: Address, word: &str, now: Stamp) -> Option<KeyId> {
    checked(word, to, now, |id| {
        let key = state.key(id).filter(|_| is_good(state, id, now))?;
        (key.team == sandbox.team).then_some(key.hash)
    })
}

/// The key of the link `word` to `to` that holds at `now`, signed with what `hash_of` knows of it.
fn checked(
    word: &str,
    to: Address,
    now: Stamp,
    hash_of: impl Fn(KeyId) -> Option<[u8; 32]>,
) -> Option<KeyId> {
    let bytes = URL_SAFE_NO_PAD.decode(word).ok()?;
    let (said, signed) = bytes.split_at_checked(TERMS_BYTES)?;
    let signed = <[u8; SIGNATURE_BYTES]>::try_from(signed).ok()?;
    let (key, rest) = said.split_first_chunk()?;
    let (_, until) = said.split_last_chunk()?;
    let port = [rest[0], rest[1]];
    let fits = u16::from_be_bytes(port) == to.port && now < Stamp(u64::from_be_bytes(*until));
    // Compared in constant time.
    let key = KeyId(*key);
    let hash = hash_of(key).filter(|_| fits)?;
    (signature(&hash, to, said) == signed).then_some(key)
}

fn terms(key: KeyId, port: u16, until: Stamp) -> Vec<u8> {
    [&key.0[..], &port.to_be_bytes(), &until.0.to_be_bytes()].concat()
}

fn signature(hash: &[u8; 32], to: Address, terms: &[u8]) -> blake3::Hash {
    let mut signer = blake3::Hasher::new_keyed(hash);
    signer.update(PURPOSE).update(&to.id.0).update(terms);
    signer.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::ids::SandboxId;

    use super::*;

    const HASH: [u8; 32] = [7; 32];
    const TO: Address = Address {
        id: SandboxId([1; 16]),
        port: 8080,
    };

    const KEY: KeyId = KeyId([2; 16]);

    fn opens(word: &str, to: Address, now: u64) -> bool {
        checked(word, to, Stamp(now), |id| (id == KEY).then_some(HASH)) == Some(KEY)
    }

    #[test]
    fn a_link_leads_to_its_own_port_until_its_end_and_not_beyond() {
        let word = sign(KEY, &HASH, TO, Stamp(1000));
        assert!(opens(&word, TO, 999));
        assert!(!opens(&word, TO, 1000), "it is over");
        assert!(!opens(&word, Address { port: 8081, ..TO }, 0));
        let id = SandboxId([9; 16]);
        assert!(!opens(&word, Address { id, ..TO }, 0));
        assert!(
            checked(&word, TO, Stamp(0), |_| None).is_none(),
            "its key is revoked"
        );
        assert!(checked(&word, TO, Stamp(0), |_| Some([8; 32])).is_none());
    }

    proptest! {
        #[test]
        fn no_changed_word_opens(at in 0_usize..58, change in 1_u8.., junk in "[ -~]*") {
            let mut bytes = URL_SAFE_NO_PAD.decode(sign(KEY, &HASH, TO, Stamp(1000))).expect("a word");
            bytes[at] ^= change;
            prop_assert!(!opens(&URL_SAFE_NO_PAD.encode(bytes), TO, 0));
            prop_assert!(!opens(&junk, TO, 0));
        }
    }
}
