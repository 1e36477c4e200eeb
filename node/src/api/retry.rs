//! Requests that may be sent again, to any node.
//!
//! A command names what it makes by ids that its proposer chose, and is known by them when it comes
//! again. So a request that comes again needs no table of past ones: where its client gave it an
//! `Idempotency-Key`, the ids are made from that, the API key and what is asked for, and every node
//! makes the same ones. They are known for as long as what they stand for is on record.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use proto::ids::{SandboxId, SnapshotId};

use super::auth::Caller;
use super::error::{ApiError, Code};

/// The header by which a client says that a request is the same one again.
const HEADER: &str = "idempotency-key";
/// Longest key. Those of common libraries are UUIDs.
const KEY_BYTES: usize = 255;
/// Keeps these hashes apart from all others. Part of what nodes of different versions agree on.
const CONTEXT: &str = "wrenn 2026-11-22 ids of requests that may be sent again";

/// The key that a client gave its request, if it did.
#[derive(Clone, Debug)]
pub(super) struct RetryKey(Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for RetryKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Some(value) = parts.headers.get(HEADER) else {
            return Ok(Self(None));
        };
        let text = value.to_str().unwrap_or_default();
        let fits =
            (1..=KEY_BYTES).contains(&text.len()) && text.bytes().all(|it| it.is_ascii_graphic());
        if !fits {
            return Err(ApiError::invalid(format!(
                "Idempotency-Key must have 1 to {KEY_BYTES} printable ASCII characters without spaces"
            )));
        }
        Ok(Self(Some(text.to_owned())))
    }
}

impl RetryKey {
    /// The ids of what `caller`'s request makes; `request` says which route it is, and of what.
    pub(super) fn ids(&self, caller: &Caller, request: &[&str]) -> Ids {
        let Some(key) = &self.0 else {
            return Ids {
                seed: rand::random(),
                may_come_again: false,
            };
        };
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&caller.key.0);
        for part in [key.as_str()].iter().chain(request) {
            // With its length: two requests must not become one by where a part ends.
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Ids {
            seed: *hasher.finalize().as_bytes(),
            may_come_again: true,
        }
    }
}

/// The ids of what one request makes: the same ones if it comes again, where it may.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    seed: [u8; 32],
    may_come_again: bool,
}

impl Ids {
    /// Whether the client may send it again.
    pub(super) const fn may_come_again(&self) -> bool {
        self.may_come_again
    }

    /// The `number`th sandbox.
    pub(super) fn sandbox(&self, number: u32) -> SandboxId {
        SandboxId(self.id("sandbox", number))
    }

    /// The ask of a checkpoint.
    pub(super) fn ask(&self) -> SnapshotId {
        SnapshotId(self.id("ask", 0))
    }

    /// A number for a name that the client left out.
    pub(super) fn number(&self) -> u32 {
        let [a, b, c, d, ..] = self.id("name", 0);
        u32::from_le_bytes([a, b, c, d])
    }

    fn id(&self, of: &str, number: u32) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&self.seed);
        hasher.update(&number.to_le_bytes()).update(of.as_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        id
    }
}

/// The answer to a request whose key stands for another one.
pub(super) fn used_otherwise() -> ApiError {
    let message = "this Idempotency-Key was used for another request";
    ApiError::new(Code::Conflict, message)
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use proto::ids::{KeyId, TeamId};
    use raft::state::Scope;

    use super::*;

    fn caller(key: u8) -> Caller {
        Caller {
            team: TeamId::default(),
            key: KeyId([key; 16]),
            scope: Scope::Run,
            from: None,
        }
    }

    fn key(text: &str) -> RetryKey {
        RetryKey(Some(text.into()))
    }

    #[test]
    fn the_same_request_makes_the_same_ids_and_any_other_makes_others() {
        let ids = key("a").ids(&caller(1), &["fork", "cl-1"]);
        let same = key("a").ids(&caller(1), &["fork", "cl-1"]);
        assert_eq!(ids.sandbox(0), same.sandbox(0));
        assert_eq!(ids.ask(), same.ask());
        assert_ne!(ids.sandbox(0), ids.sandbox(1));
        assert_ne!(ids.sandbox(0).0, ids.ask().0);
        for other in [
            key("b").ids(&caller(1), &["fork", "cl-1"]),
            key("a").ids(&caller(2), &["fork", "cl-1"]),
            key("a").ids(&caller(1), &["fork", "cl-2"]),
            key("a").ids(&caller(1), &["forkcl-1"]),
            RetryKey(None).ids(&caller(1), &["fork", "cl-1"]),
        ] {
            assert_ne!(ids.sandbox(0), other.sandbox(0));
        }
    }

    #[test]
    fn ids_of_one_version_are_those_of_the_next() {
        let ids = key("a").ids(&caller(1), &["capsule"]);
        assert_eq!(ids.sandbox(0).to_string(), "cl-5yzkbi9665mmgk166abb5unmt");
    }

    #[tokio::test]
    async fn a_key_that_is_none_is_refused() {
        let long = "x".repeat(KEY_BYTES + 1);
        for (text, fits) in [("a", true), ("", false), ("a b", false), (&*long, false)] {
            let request = Request::builder().header(HEADER, text).body(());
            let (mut parts, ()) = request.expect("a request").into_parts();
            let key = RetryKey::from_request_parts(&mut parts, &()).await;
            assert_eq!(key.is_ok(), fits, "{text:?}");
        }
    }
}
