//! What both directions of `/files` ask first: may this caller, who is it, and which file.

use std::path::PathBuf;

use axum::extract::Query;
use axum::http::{HeaderMap, StatusCode, Uri};
use jiff::Timestamp;
use serde::Deserialize;

use crate::agent::Agent;
use crate::auth::SignedUrl;
use crate::http::TOKEN_HEADER;
use crate::http::error::ApiError;
use crate::log::chain;
use crate::users::User;

/// The query of `/files`.
#[derive(Debug, Default, Deserialize)]
pub struct FilesQuery {
    /// The file, as the caller wrote it.
    pub path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    signature_expiration: Option<i64>,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To the caller.
    Read,
    /// From the caller.
    Write,
}

/// A caller who may.
#[derive(Debug)]
pub struct Caller {
    /// The query.
    pub query: FilesQuery,
    /// Whom the file belongs to.
    pub user: User,
}

impl Caller {
    /// Checks token or signature, then the user.
    ///
    /// # Errors
    /// 400 for a malformed query, 401 for everything else.
    pub fn admit(
        agent: &Agent,
        uri: &Uri,
        headers: &HeaderMap,
        operation: Operation,
    ) -> Result<Self, ApiError> {
        let Query(query) = Query::<FilesQuery>::try_from_uri(uri)
            .map_err(|err| ApiError::bad_request(format!("parse the query: {err}")))?;
        let operation = match operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        let url = SignedUrl {
            operation,
            path: query.path.as_deref().unwrap_or_default(),
            username: query.username.as_deref().unwrap_or_default(),
            expiration: query.signature_expiration,
        };
        let header = headers
            .get(TOKEN_HEADER)
            .map(|value| value.to_str().unwrap_or_default());
        let now = Timestamp::now().as_second();
        let token = agent.settings().token.clone();
        url.check(token.as_ref(), header, query.signature.as_deref(), now)
            .map_err(|refusal| ApiError::unauthorized(refusal.to_string()))?;
        let user = agent.user(query.username.as_deref());
        let user = user.map_err(|err| ApiError::unauthorized(chain(&err)))?;
        Ok(Self { query, user })
    }

    /// The absolute path that `path` means for this caller.
    ///
    /// # Errors
    /// 400 names what is wrong with it.
    pub fn resolve(&self, agent: &Agent, path: &str) -> Result<PathBuf, ApiError> {
        let resolved = agent.resolve(&self.user, path);
        resolved.map_err(|err| ApiError::new(StatusCode::BAD_REQUEST, chain(&err)))
    }
}
