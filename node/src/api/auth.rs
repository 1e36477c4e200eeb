//! Who is calling: an API key in `X-API-Key` or as a bearer token, known by its hash alone.
//!
//! What the caller may do is decided in [`scopes`](super::scopes), before any handler runs.

use std::net::IpAddr;

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use proto::ids::{KeyId, TeamId};
use proto::units::Stamp;
use raft::state::{Actor, Key, Scope, State};
use sha2::{Digest as _, Sha256};

use super::error::{ApiError, Code};
use super::state::ApiState;

/// The header that client libraries send.
const KEY_HEADER: &str = "x-api-key";
/// What every API key starts with.
pub(super) const KEY_PREFIX: &str = "wrn_";
/// Hexadecimal digits after the prefix: 16 random bytes.
const KEY_DIGITS: usize = 32;

/// A caller whose key is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    /// Whose objects the key opens.
    pub(super) team: TeamId,
    /// The key, for the audit trail.
    pub(super) key: KeyId,
    /// What the key may do.
    pub(super) scope: Scope,
    /// Where the request came from.
    pub(super) from: Option<IpAddr>,
}

/// The caller of a request that may also say later who it is: a browser sets no header on a WebSocket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Presented(pub(super) Option<Caller>);

impl FromRequestParts<ApiState> for Presented {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &ApiState) -> Result<Self, ApiError> {
        Ok(Self(parts.extensions.get::<Caller>().copied()))
    }
}

impl Caller {
    /// Who calls with `key`, wherever that came from. One that was made through another node a moment ago is waited
    /// for; what is no key at all is not.
    pub(super) async fn presenting(
        api: &ApiState,
        key: Option<&str>,
        from: Option<IpAddr>,
    ) -> Result<Self, ApiError> {
        let hash = hash_if_sound(key)?;
        if let Some(known) = Self::holding(api, &hash, from)? {
            return Ok(known);
        }
        if !api.catch_up_for_stranger().await {
            // Nobody has looked for it: a client that is told that its key is unknown throws it away.
            let why = "too many requests with keys that this node does not know: try again later";
            return Err(ApiError::new(Code::Overloaded, why));
        }
        Self::holding(api, &hash, from)?.ok_or_else(unknown)
    }

    /// Who calls with the key of this hash; `None` where this node knows no such key.
    fn holding(
        api: &ApiState,
        hash: &[u8; 32],
        from: Option<IpAddr>,
    ) -> Result<Option<Self>, ApiError> {
        let state = api.view.state();
        let Some(known) = state.key_by_hash(hash) else {
            return Ok(None);
        };
        let scope = good_for(&state, known, api.clock.now());
        Ok(Some(Self {
            team: known.team,
            key: known.id,
            scope: scope.ok_or_else(|| refused("this API key has expired"))?,
            from,
        }))
    }

    /// Refuses where more than the key's scope is needed.
    pub(super) fn check(&self, needed: Scope) -> Result<(), ApiError> {
        if self.scope >= needed {
            return Ok(());
        }
        let (has, needed) = (self.scope.word(), needed.word());
        let why = format!("this API key has the scope {has:?}; this takes {needed:?}");
        Err(ApiError::new(Code::Forbidden, why))
    }

    /// Whether this is a caller of the team that is the platform itself.
    pub(super) fn is_platform(&self) -> bool {
        self.team == TeamId::default()
    }

    /// As whom the audit log knows the caller.
    pub(super) fn actor(&self, state: &State) -> Actor {
        let key = state.key(self.key);
        Actor::Key {
            id: self.key,
            name: key.map(|key| key.name.clone()).unwrap_or_default(),
            holder: key.and_then(|key| key.holder),
            address: self.from.map(|from| from.to_string()).unwrap_or_default(),
        }
    }
}

/// A caller who may change the cluster itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admin(pub(super) Caller);

impl FromRequestParts<ApiState> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &ApiState) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, api).await?;
        // Once more: the table might say less than the handler takes for granted.
        super::scopes::Needs::Platform(Scope::Admin).check(&caller)?;
        Ok(Self(caller))
    }
}

impl FromRequestParts<ApiState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &ApiState) -> Result<Self, ApiError> {
        let known = parts.extensions.get::<Self>().copied();
        // Nobody was let in: the route is not in the table of scopes.
        known.ok_or_else(|| ApiError::new(Code::Forbidden, "nobody may use this route yet"))
    }
}

/// The known key that a request carries, if it carries one that may use capsules.
pub(super) fn presented_by<'a>(
    state: &'a State,
    headers: &HeaderMap,
    now: Stamp,
) -> Option<&'a Key> {
    let key = presented(headers).filter(|key| is_well_formed(key))?;
    let key = state.key_by_hash(&hash_of(key))?;
    good_for(state, key, now).filter(|scope| *scope >= Scope::Run)?;
    Some(key)
}

/// What `key` may do at `now`; `None` where it has ended. The role of the member who holds it limits it.
fn good_for(state: &State, key: &Key, now: Stamp) -> Option<Scope> {
    if key.revoked || key.has_expired(now) {
        return None;
    }
    match key.holder {
        None => Some(key.scope),
        Some(user) => {
            let member = state.member(key.team, user)?;
            Some(key.scope.min(member.role.most()))
        }
    }
}

/// Whether the key of this id still opens anything.
pub(super) fn is_good(state: &State, key: KeyId, now: Stamp) -> bool {
    let key = state.key(key);
    key.is_some_and(|key| good_for(state, key, now).is_some())
}

/// As what a key is on record.
pub(super) fn hash_of(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
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
pub(super) fn presented(headers: &HeaderMap) -> Option<&str> {
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

/// As what the key of a request would be on record.
fn hash_if_sound(key: Option<&str>) -> Result<[u8; 32], ApiError> {
    let key = key.ok_or_else(|| refused("no API key: send it in the header X-API-Key"))?;
    if !is_well_formed(key) {
        return Err(refused("this is not an API key"));
    }
    Ok(hash_of(key))
}

fn unknown() -> ApiError {
    refused("unknown or revoked API key")
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
