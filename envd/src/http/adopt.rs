//! `POST /root/adopt` `{directory}`: another root file system in the place of this one.
//!
//! Our extension, for the host that builds a template from a root file system. See [`crate::boot::adopt`].

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde::Deserialize;

use super::error::ApiError;
use super::init::read_body;
use crate::agent::Agent;
use crate::boot::adopt;
use crate::log::chain;

#[derive(Debug, Deserialize)]
struct Body {
    directory: PathBuf,
}

/// Handles `POST /root/adopt`.
///
/// # Errors
/// 400 for a malformed body or a directory that is none to adopt from, 501 outside of a guest, 500 where
/// the disk refused: the guest is of no use then.
pub async fn adopt(
    State(agent): State<Arc<Agent>>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let text = read_body(request).await?;
    let body: Body = serde_json::from_slice(&text)
        .map_err(|err| ApiError::bad_request(format!("parse the body: {err}")))?;
    if agent.surroundings.power.is_none() || !agent.surroundings.in_guest {
        let words = "only the guest's first process can change its root";
        return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, words));
    }
    if !adopt::is_place(&body.directory) || !body.directory.join("root").is_dir() {
        let words = "directory must lie right below / and have a directory root in it";
        return Err(ApiError::bad_request(words));
    }
    let adopted = tokio::task::spawn_blocking(move || adopt::adopt(&body.directory)).await;
    let failed = |text: String| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text);
    adopted
        .map_err(|err| failed(err.to_string()))?
        .map_err(|err| failed(chain(&err).to_string()))?;
    Ok(StatusCode::NO_CONTENT)
}
