//! `POST /files/compose`: several files become one, without passing through the agent.
//!
//! All sources are opened before the destination is, so a missing one changes nothing. They are
//! removed when all of it is written; until then nothing is lost, and a destination that was not there
//! before is removed again where it fails.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde::Deserialize;
use tokio::task::spawn_blocking;

use super::metadata::{self, Metadata};
use super::reach;
use super::upload::Written;
use super::write::{WriteError, open_for};
use crate::agent::Agent;
use crate::http::error::ApiError;
use crate::http::init::read_body;
use crate::log;
use crate::log::chain;
use crate::users::User;

/// Files that may become one; each is held open meanwhile.
const MAX_SOURCES: usize = 1024;

#[derive(Debug, Deserialize)]
struct Order {
    #[serde(alias = "sourcePaths")]
    source_paths: Vec<String>,
    destination: String,
    username: Option<String>,
}

/// Handles `POST /files/compose`.
///
/// # Errors
/// 400 for what the caller must change, 401 for an unknown user, 404 for a missing source, 413 for
/// too many of them, 507 when the disk is full.
pub async fn compose(
    State(agent): State<Arc<Agent>>,
    request: Request,
) -> Result<Json<Written>, ApiError> {
    let text = read_body(request).await?;
    let order: Order = serde_json::from_slice(&text)
        .map_err(|err| ApiError::bad_request(format!("parse the body: {err}")))?;
    if order.source_paths.is_empty() {
        return Err(ApiError::bad_request("source_paths is empty"));
    }
    if order.source_paths.len() > MAX_SOURCES {
        let words = format!("more than {MAX_SOURCES} sources");
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, words));
    }
    let user = agent.user(order.username.as_deref());
    let user = user.map_err(|err| ApiError::unauthorized(chain(&err)))?;
    let resolve = |path: &String| {
        if path.is_empty() {
            return Err(ApiError::bad_request("a path is empty"));
        }
        let resolved = agent.resolve(&user, path);
        resolved.map_err(|err| ApiError::bad_request(chain(&err)))
    };
    let sources: Vec<_> = order
        .source_paths
        .iter()
        .map(resolve)
        .collect::<Result<_, _>>()?;
    let destination = resolve(&order.destination)?;
    let composed = spawn_blocking(move || join(&sources, destination, &user)).await;
    composed.map_err(ApiError::internal)?.map(Json)
}

/// Writes all sources to `destination`, one after the other, and removes them.
fn join(sources: &[PathBuf], destination: PathBuf, user: &User) -> Result<Written, ApiError> {
    let opened: Vec<_> = sources
        .iter()
        .map(|path| open_source(path, user))
        .collect::<Result<_, _>>()?;
    let at_destination = fs::canonicalize(&destination).ok();
    let is_destination = |path: &PathBuf| {
        *path == destination
            || at_destination.is_some() && fs::canonicalize(path).ok() == at_destination
    };
    if sources.iter().any(is_destination) {
        return Err(ApiError::bad_request(
            "the destination is one of the sources",
        ));
    }
    let made = open_for(&destination, user, &Metadata::default())?;
    for mut source in opened {
        // The kernel copies from file to file, or only notes that blocks are shared.
        if let Err(err) = io::copy(&mut source, &mut &made.file) {
            made.give_up(user);
            return Err(WriteError::new(&destination, err).into());
        }
    }
    for source in sources {
        // What is composed is composed; whoever wants the space back can still remove it.
        if let Err(err) = reach::remove(source, user) {
            log!("remove {}: {err}", source.display());
        }
    }
    Ok(Written::new(&destination, metadata::read(&made.file)))
}

fn open_source(path: &Path, user: &User) -> Result<File, ApiError> {
    let shown = path.display();
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = reach::come_to(path, user, false, |open| open(flags, Mode::empty()));
    let (file, _) = opened.map_err(|err| match err.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => {
            let words = format!("path '{shown}' does not exist");
            ApiError::new(StatusCode::NOT_FOUND, words)
        }
        _ => ApiError::bad_request(format!("open '{shown}': {err}")),
    })?;
    let stat = file.metadata().map_err(ApiError::internal)?;
    if !stat.is_file() {
        let words = format!("path '{shown}' is not a regular file");
        return Err(ApiError::bad_request(words));
    }
    Ok(file)
}
