//! Reading requests: JSON bodies, ids and queries, with every rejection in our own words.
//!
//! axum's extractors answer plain text with statuses of their own choice; these answer the error
//! envelope. A body has a size limit and a time limit, both enforced while it is read.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams};
use axum::http::Request;
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use proto::ids::SandboxId;
use serde::de::DeserializeOwned;
use tokio::time;

use super::error::{ApiError, Code};

/// Largest JSON body. The largest honest one is an exec with a long script.
const JSON_BYTES: usize = 1 << 20;
/// Longest a JSON body may take to arrive; a sender that trickles holds a request slot.
const JSON_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON body, whatever its content type says.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, ApiError> {
        let bytes = read_json(request.into_body()).await?;
        parse(&bytes).map(Self)
    }
}

/// A JSON body that may be left out.
#[derive(Debug)]
pub(super) struct OptionalJson<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, ApiError> {
        let bytes = read_json(request.into_body()).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        parse(&bytes).map(Self)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|err| ApiError::invalid(format!("the JSON body cannot be used: {err}")))
}

async fn read_json(body: Body) -> Result<Bytes, ApiError> {
    let collected = time::timeout(JSON_READ_TIMEOUT, Limited::new(body, JSON_BYTES).collect());
    let collected = collected.await.map_err(|_| {
        ApiError::invalid(format!(
            "the body was not complete after {JSON_READ_TIMEOUT:?}"
        ))
    })?;
    match collected {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(err) if err.is::<LengthLimitError>() => Err(ApiError::new(
            Code::TooLarge,
            format!("a JSON body may have {JSON_BYTES} bytes at most"),
        )),
        Err(err) => Err(ApiError::invalid(format!("the body broke off: {err}"))),
    }
}

/// The capsule that a path names.
#[derive(Clone, Copy, Debug)]
pub(super) struct CapsuleId(pub(super) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for CapsuleId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_param(parts, state, "id").await?;
        text.parse()
            .map(Self)
            .map_err(|err: proto::ids::ParseIdError| ApiError::invalid(err.to_string()))
    }
}

/// The process that a path names.
#[derive(Clone, Debug)]
pub(super) struct ProcessSelector(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for ProcessSelector {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        path_param(parts, state, "selector").await.map(Self)
    }
}

/// What a path with one name in it names: a node or a token.
#[derive(Clone, Debug)]
pub(super) struct PathName(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for PathName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|err| ApiError::invalid(err.body_text()))?;
        let name = params.iter().next().map(|(_, name)| name.to_owned());
        name.map(Self)
            .ok_or_else(|| ApiError::invalid("the path names nothing"))
    }
}

/// What a path with two names in it names.
#[derive(Clone, Debug)]
pub(super) struct PathPair(pub(super) String, pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for PathPair {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|err| ApiError::invalid(err.body_text()))?;
        let mut names = params.iter().map(|(_, name)| name.to_owned());
        match (names.next(), names.next()) {
            (Some(first), Some(second)) => Ok(Self(first, second)),
            _ => Err(ApiError::invalid("the path names too little")),
        }
    }
}

async fn path_param<S: Send + Sync>(
    parts: &mut Parts,
    state: &S,
    name: &str,
) -> Result<String, ApiError> {
    let params = RawPathParams::from_request_parts(parts, state)
        .await
        .map_err(|err| ApiError::invalid(err.body_text()))?;
    let found = params.iter().find(|(key, _)| *key == name);
    found
        .map(|(_, value)| value.to_owned())
        .ok_or_else(|| ApiError::invalid(format!("the path names no {name}")))
}

/// The query of a request.
#[derive(Debug)]
pub(super) struct QueryOf<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for QueryOf<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query
            .map(|Query(value)| Self(value))
            .map_err(|err| ApiError::invalid(err.body_text()))
    }
}
