//! Who may call: the access token, and signatures that stand in for it in file URLs.
//!
//! The rules themselves are pure functions here; `http/` applies them. Tokens are compared by
//! their digests, so that the time taken tells nothing about how much of a guess was right.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256, Sha512};

/// A secret that clients present in `X-Access-Token`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// A token; the empty string means none.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Option<Self> {
        Some(text.into()).filter(|text| !text.is_empty()).map(Self)
    }

    /// Whether `presented` is this token.
    #[must_use]
    pub fn admits(&self, presented: &str) -> bool {
        same(self.0.as_bytes(), presented.as_bytes())
    }
}

fn same(left: &[u8], right: &[u8]) -> bool {
    Sha256::digest(left) == Sha256::digest(right)
}

/// What `/init` may do to the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenChange {
    /// It stays as it is.
    Keep,
    /// It becomes this one, or none.
    Become(Option<Token>),
}

/// Where the sandbox's owner may publish the hash of a new token. A VMM without a metadata service
/// has none and delivers everything through `/init`.
pub trait PublishedHash: Send + Sync {
    /// SHA-512 of the token in hexadecimal, if one is published.
    fn hash(&self) -> Option<String>;
}

/// Decides on the token given to `/init`; `None` is a refusal. The rows are tried top-down.
#[must_use]
pub fn decide_init(
    given: Option<&Token>,
    current: Option<&Token>,
    published: Option<&str>,
) -> Option<TokenChange> {
    if let (Some(given), Some(current)) = (given, current)
        && current.admits(&given.0)
    {
        return Some(TokenChange::Keep);
    }
    if let Some(published) = published {
        let given_text = given.map_or("", |token| token.0.as_str());
        let matches = same(
            hex(&Sha512::digest(given_text)).as_bytes(),
            published.as_bytes(),
        );
        return matches.then(|| TokenChange::Become(given.cloned()));
    }
    current
        .is_none()
        .then(|| TokenChange::Become(given.cloned()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a signature of a file URL covers.
#[derive(Clone, Copy, Debug)]
pub struct SignedUrl<'a> {
    /// `read` or `write`.
    pub operation: &'a str,
    /// The raw `path` value, before it is resolved.
    pub path: &'a str,
    /// The raw `username` value, empty when absent.
    pub username: &'a str,
    /// Unix seconds after which the URL is void.
    pub expiration: Option<i64>,
}

/// Why a file request is refused. The texts are asserted by existing clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefuseFile {
    /// The header's token is wrong.
    #[error("access token present in header but does not match")]
    WrongToken,
    /// Neither token nor signature.
    #[error("missing signature query parameter")]
    NoSignature,
    /// The signature is not ours.
    #[error("invalid signature")]
    WrongSignature,
    /// The signature was ours and has run out.
    #[error("signature is already expired")]
    Expired,
}

impl SignedUrl<'_> {
    /// The signature of this URL under `token`.
    #[must_use]
    pub fn signature(&self, token: &Token) -> String {
        let Self {
            path,
            operation,
            username,
            ..
        } = self;
        let mut text = format!("{path}:{operation}:{username}:{}", token.0);
        if let Some(expiration) = self.expiration {
            text = format!("{text}:{expiration}");
        }
        format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
    }

    /// Decides on a file request at `now` (unix seconds), in the order clients rely on.
    ///
    /// # Errors
    /// [`RefuseFile`] with the exact words of the answer.
    pub fn check(
        &self,
        token: Option<&Token>,
        header: Option<&str>,
        signature: Option<&str>,
        now: i64,
    ) -> Result<(), RefuseFile> {
        let Some(token) = token else { return Ok(()) };
        if let Some(header) = header {
            return if token.admits(header) {
                Ok(())
            } else {
                Err(RefuseFile::WrongToken)
            };
        }
        let signature = signature.ok_or(RefuseFile::NoSignature)?;
        if !same(signature.as_bytes(), self.signature(token).as_bytes()) {
            return Err(RefuseFile::WrongSignature);
        }
        match self.expiration {
            Some(expiration) if expiration < now => Err(RefuseFile::Expired),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(text: &str) -> Option<Token> {
        Token::new(text)
    }

    #[test]
    fn init_follows_the_table_of_the_spec() {
        let hash_of_b = hex(&Sha512::digest("b"));
        let hash_of_none = hex(&Sha512::digest(""));
        let become_b = Some(TokenChange::Become(token("b")));
        for (given, current, published, expected) in [
            ("a", "a", None, Some(TokenChange::Keep)),
            ("a", "a", Some(&hash_of_b), Some(TokenChange::Keep)),
            ("b", "a", Some(&hash_of_b), become_b.clone()),
            (
                "",
                "a",
                Some(&hash_of_none),
                Some(TokenChange::Become(None)),
            ),
            ("b", "", None, become_b.clone()),
            ("", "", None, Some(TokenChange::Become(None))),
            ("b", "a", None, None),
            ("", "a", None, None),
            ("c", "", Some(&hash_of_b), None),
            ("c", "a", Some(&hash_of_b), None),
        ] {
            let (given, current) = (token(given), token(current));
            let decided = decide_init(
                given.as_ref(),
                current.as_ref(),
                published.map(String::as_str),
            );
            assert_eq!(
                decided, expected,
                "given {given:?} current {current:?} {published:?}"
            );
        }
    }

    const URL: SignedUrl<'_> = SignedUrl {
        operation: "read",
        path: "/a",
        username: "u",
        expiration: Some(100),
    };

    #[test]
    fn signature_is_the_digest_of_the_parts_in_order() {
        let secret = token("t").expect("not empty");
        let expected = format!(
            "v1_{}",
            STANDARD_NO_PAD.encode(Sha256::digest("/a:read:u:t:100"))
        );
        assert_eq!(URL.signature(&secret), expected);
        let endless = SignedUrl {
            expiration: None,
            ..URL
        };
        let expected = format!(
            "v1_{}",
            STANDARD_NO_PAD.encode(Sha256::digest("/a:read:u:t"))
        );
        assert_eq!(endless.signature(&secret), expected);
    }

    #[test]
    fn checks_come_in_the_order_of_the_spec() {
        let secret = token("t");
        let good = URL.signature(secret.as_ref().expect("set"));
        let check = |header, signature, now| URL.check(secret.as_ref(), header, signature, now);
        assert_eq!(URL.check(None, None, None, 0), Ok(()));
        assert_eq!(check(Some("t"), None, 0), Ok(()));
        assert_eq!(
            check(Some("x"), Some(&good), 0),
            Err(RefuseFile::WrongToken)
        );
        assert_eq!(check(None, None, 0), Err(RefuseFile::NoSignature));
        assert_eq!(
            check(None, Some("v1_x"), 999),
            Err(RefuseFile::WrongSignature)
        );
        assert_eq!(check(None, Some(&good), 100), Ok(()));
        assert_eq!(check(None, Some(&good), 101), Err(RefuseFile::Expired));
    }

    proptest! {
        #[test]
        fn a_signature_fits_no_other_url(path in ".{0,20}", other in ".{0,20}", user in "[a-z]{0,5}") {
            let secret = token("t").expect("not empty");
            let url = SignedUrl { operation: "read", path: &path, username: &user, expiration: None };
            let signature = url.signature(&secret);
            let changed = SignedUrl { path: &other, ..url };
            let fits = changed.check(Some(&secret), None, Some(&signature), 0).is_ok();
            prop_assert_eq!(fits, path == other);
            let writing = SignedUrl { operation: "write", ..url };
            prop_assert!(writing.check(Some(&secret), None, Some(&signature), 0).is_err());
        }
    }
}
