//! Reads of the replicated state: how new they must be, and how new they are.
//!
//! Every node answers from its own copy. `?consistency=linearizable` first waits until that copy
//! holds everything that was acknowledged before the request; so does a request for one thing that this
//! node does not know ([`catching_up`](super::catching_up)). Answers say in their headers up to
//! which entry of the log the copy reached at least, and whose copy it is: a client that compares
//! indexes sees whether it went back in time by asking another node.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::ApiError;
use super::extract::QueryOf;
use super::state::ApiState;

/// Up to which entry of the log the answer's state reaches at least.
const APPLIED_INDEX: HeaderName = HeaderName::from_static("x-wrenn-applied-index");
/// The node whose copy of the state it is.
const NODE: HeaderName = HeaderName::from_static("x-wrenn-node");

/// How new a read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Consistency {
    /// What this node has.
    #[default]
    Local,
    /// At least what had been acknowledged when the request came.
    Linearizable,
}

/// How new a read must be, in the query of a request.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ReadQuery {
    /// `local` (what this node has, the default) or `linearizable`.
    #[serde(default)]
    #[param(value_type = Option<String>)]
    consistency: Consistency,
}

/// A read that may go on: the copy of the state is as new as was asked for. It comes after the
/// caller among a handler's arguments, so that nobody without a key makes a quorum work.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    applied: u64,
    node: String,
}

impl FromRequestParts<ApiState> for Reading {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &ApiState) -> Result<Self, ApiError> {
        let QueryOf(query): QueryOf<ReadQuery> = QueryOf::from_request_parts(parts, api).await?;
        if query.consistency == Consistency::Linearizable {
            api.cluster.linearize().await?;
        }
        // Before the handler takes its copy, which may be newer but never older.
        Ok(Self {
            applied: api.view.applied(),
            node: api.facts.id.to_string(),
        })
    }
}

impl Reading {
    /// The answer with what is known of its age.
    pub(super) fn answer<T>(self, body: T) -> Answered<T> {
        let mut headers = HeaderMap::new();
        headers.insert(APPLIED_INDEX, self.applied.into());
        if let Ok(node) = HeaderValue::try_from(self.node) {
            headers.insert(NODE, node);
        }
        (headers, body)
    }
}

/// A body with headers.
pub(super) type Answered<T> = (HeaderMap, T);
