//! Who is calling: an API key in `X-API-Key` or as a bearer token, known by its hash alone.

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use proto::ids::{KeyId, TeamId};
use raft::state::{Key, State};
use sha2::{Digest as _, Sha256};

use super::error::{ApiError, Code};
use super::state::ApiState;

/// The header that client libraries send.
const KEY_HEADER: &str = "x-api-key";
/// What every API key starts with.
const KEY_PREFIX: &str = "wrn_";
/// Hexadecimal digits after the prefix: 16 random bytes.
const KEY_DIGITS: usize = 32;

/// A caller whose key is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    /// Whose objects the key opens.
    pub(super) team: TeamId,
    /// The key, for the audit trail.
    pub(super) key: KeyId,
}

/// The caller of a request that may also say later who it is: a browser sets no header on a WebSocket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Presented(pub(super) Option<Caller>);

impl FromRequestParts<ApiState> for Presented {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &ApiState) -> Result<Self, ApiError> {
        let caller = presented(&parts.headers).map(|key| Caller::of_key(api, key));
        caller.transpose().map(Self)
    }
}

impl Caller {
    /// Who calls with `key`.
    pub(super) fn of_key(api: &ApiState, key: &str) -> Result<Self, ApiError> {
        if !is_well_formed(key) {
            return Err(refused("this is not an API key"));
        }
        let hash: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let state = api.view.state();
        let known = state
            .key_by_hash(&hash)
            .ok_or_else(|| refused("unknown or revoked API key"))?;
        Ok(Self {
            team: known.team,
            key: known.id,
        })
    }

    /// Whether this is an administrator: a caller of the team that is the platform itself.
    pub(super) fn is_admin(&self) -> bool {
        self.team == TeamId::default()
    }
}

/// A caller who may change the cluster itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admin(pub(super) Caller);

impl FromRequestParts<ApiState> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &ApiState) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, api).await?;
        if caller.is_admin() {
            return Ok(Self(caller));
        }
        let why = "only an administrator's API key may do this, such as the cluster's first key";
        Err(ApiError::new(Code::Forbidden, why))
    }
}

impl FromRequestParts<ApiState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &ApiState) -> Result<Self, ApiError> {
        let key = presented(&parts.headers)
            .ok_or_else(|| refused("no API key: send it in the header X-API-Key"))?;
        Self::of_key(api, key)
    }
}

/// The known key that a request carries, if it carries one.
pub(super) fn presented_by<'a>(state: &'a State, headers: &HeaderMap) -> Option<&'a Key> {
    let key = presented(headers).filter(|key| is_well_formed(key))?;
    state.key_by_hash(&Sha256::digest(key.as_bytes()).into())
}

/// Takes the key of ours out of what is passed on to somebody else.
pub(super) fn strip(headers: &mut HeaderMap) {
    if let Some(key) = presented(headers).filter(|key| is_well_formed(key)) {
        let own = key.to_owned();
        let holds = |value: &HeaderValue| value.to_str().is_ok_and(|text| text.ends_with(&own));
        for name in [HeaderName::from_static(KEY_HEADER), AUTHORIZATION] {
            if headers.get(&name).is_some_and(holds) {
                headers.remove(name);
            }
        }
    }
}

/// The key a request carries, if it carries one.
fn presented(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get(KEY_HEADER) {
        // Not text is as bad as unknown; it must not fall through to another header.
        return Some(key.to_str().unwrap_or_default());
    }
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Whether `key` looks like one of ours: the prefix and lower-case hexadecimal digits.
fn is_well_formed(key: &str) -> bool {
    key.strip_prefix(KEY_PREFIX).is_some_and(|digits| {
        digits.len() == KEY_DIGITS
            && digits
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn refused(message: &str) -> ApiError {
    ApiError::new(Code::Unauthorized, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_prefix_and_32_lower_case_hex_digits_make_a_key() {
        assert!(is_well_formed("wrn_0123456789abcdef0123456789abcdef"));
        for bad in [
            "",
            "wrn_",
            "wrn_0123456789ABCDEF0123456789abcdef",
            "wrn_0123456789abcdef0123456789abcde",
            "wrn_0123456789abcdef0123456789abcdef0",
            "e2b_0123456789abcdef0123456789abcdef",
            "wrn_0123456789abcdef0123456789abcdeg",
        ] {
            assert!(!is_well_formed(bad), "{bad} was accepted");
        }
    }

    #[test]
    fn the_key_header_wins_over_the_bearer_token() {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, "bearer  two".parse().expect("a header"));
        assert_eq!(presented(&headers), Some("two"));
        headers.insert(KEY_HEADER, "one".parse().expect("a header"));
        assert_eq!(presented(&headers), Some("one"));
    }

    #[test]
    fn another_scheme_is_no_key() {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, "Basic abc".parse().expect("a header"));
        assert_eq!(presented(&headers), None);
    }
}
