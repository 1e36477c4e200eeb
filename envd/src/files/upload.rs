//! `POST /files`: one or several files, streamed to disk as they arrive.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use futures::{Stream, StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::time::timeout;

use super::inflate::gunzip;
use super::metadata::{self, Metadata};
use super::request::{Caller, Operation};
use super::write::Writing;
use crate::agent::Agent;
use crate::http::error::ApiError;
use crate::log::chain;

/// How long a client may send nothing in the middle of an upload.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);
/// What one step through a multipart body may take in: the head of a part, or what is looked at for
/// the next boundary. A body without either would otherwise be held as a whole.
const STEP_BYTES: usize = 1024 * 1024;
/// Files of one upload.
const MAX_PARTS: usize = 10_000;
/// Form name of the parts that are files.
const FILE_PART: &str = "file";

/// One written file, as answered.
#[derive(Debug, Serialize)]
pub struct Written {
    path: PathBuf,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata,
}

impl Written {
    /// The file at `path`.
    #[must_use]
    pub fn new(path: &Path, metadata: Metadata) -> Self {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self {
            path: path.to_owned(),
            name,
            r#type: "file",
            metadata,
        }
    }
}

/// Handles `POST /files`.
///
/// # Errors
/// 400 for what the caller must change, 401 by token and signature, 408 when nothing more comes,
/// 507 when the disk is full.
pub async fn upload(
    State(agent): State<Arc<Agent>>,
    request: Request,
) -> Result<Json<Vec<Written>>, ApiError> {
    let caller = Caller::admit(&agent, request.uri(), request.headers(), Operation::Write)?;
    let metadata = metadata::from_headers(request.headers());
    let metadata = metadata.map_err(|err| ApiError::bad_request(chain(&err)))?;
    let upload = Upload {
        agent,
        caller,
        metadata,
    };
    let kind = content_type(request.headers());
    let request = plain(request)?;
    let written = if kind.starts_with("multipart/") {
        upload.multipart(request).await?
    } else if kind == "application/octet-stream" {
        vec![upload.octets(request).await?]
    } else {
        return Err(ApiError::bad_request(format!(
            "content type '{kind}' is not supported"
        )));
    };
    Ok(Json(written))
}

/// The media type without its parameters.
fn content_type(headers: &HeaderMap) -> String {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media_type = value
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default();
    media_type.trim().to_ascii_lowercase()
}

/// The request with its body decompressed and watched for stalls.
fn plain(request: Request) -> Result<Request, ApiError> {
    let (mut parts, body) = request.into_parts();
    let encoding = parts.headers.remove(header::CONTENT_ENCODING);
    let encoding = encoding
        .as_ref()
        .map_or(Ok("identity"), |value| value.to_str());
    let watched = Body::from_stream(watch(body.into_data_stream()));
    let body = match encoding
        .unwrap_or("unknown")
        .trim()
        .to_ascii_lowercase()
        .as_str()
    {
        "" | "identity" => watched,
        "gzip" | "x-gzip" => Body::from_stream(gunzip(watched.into_data_stream())),
        other => {
            let words = format!("content encoding '{other}' is not supported");
            return Err(ApiError::bad_request(words));
        }
    };
    Ok(Request::from_parts(parts, body))
}

/// Ends a body in an error when nothing comes for too long.
fn watch<E: std::error::Error + Send + Sync + 'static>(
    body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures::stream::try_unfold(body, async |mut body| {
        let stalled = |_| io::Error::from(io::ErrorKind::TimedOut);
        match timeout(STALL_TIMEOUT, body.next()).await.map_err(stalled)? {
            None => Ok(None),
            Some(Ok(piece)) => Ok(Some((piece, body))),
            Some(Err(err)) => Err(io::Error::other(err)),
        }
    })
}

/// A body that ended early or made no sense: the caller's fault, or its connection's.
fn body_error(err: &(dyn std::error::Error + 'static)) -> ApiError {
    let mut cause = Some(err);
    while let Some(error) = cause {
        match error.downcast_ref().map(io::Error::kind) {
            Some(io::ErrorKind::TimedOut) => {
                return ApiError::new(StatusCode::REQUEST_TIMEOUT, "upload stalled");
            }
            Some(io::ErrorKind::FileTooLarge) => {
                let words = "the head of a part is too large";
                return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, words);
            }
            _ => cause = error.source(),
        }
    }
    ApiError::bad_request(format!("read the body: {}", chain(err)))
}

/// What a step through a body has taken in.
#[derive(Clone, Debug, Default)]
struct Step(Arc<AtomicUsize>);

impl Step {
    /// Begins a step.
    fn begin(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// `body`, which ends in an error where a step takes in too much.
    fn bound(&self, body: Body) -> Body {
        let step = self.clone();
        let bounded = body.into_data_stream().map_err(io::Error::other);
        Body::from_stream(bounded.and_then(move |piece: Bytes| {
            let taken = step.0.fetch_add(piece.len(), Ordering::Relaxed) + piece.len();
            let piece = if taken - piece.len() < STEP_BYTES {
                Ok(piece)
            } else {
                Err(io::Error::from(io::ErrorKind::FileTooLarge))
            };
            std::future::ready(piece)
        }))
    }
}

struct Upload {
    agent: Arc<Agent>,
    caller: Caller,
    metadata: Metadata,
}

impl Upload {
    async fn octets(&self, request: Request) -> Result<Written, ApiError> {
        let path = self
            .caller
            .query
            .path
            .as_deref()
            .filter(|path| !path.is_empty());
        let path = path.ok_or_else(|| ApiError::bad_request("path query is required"))?;
        let path = self.caller.resolve(&self.agent, path)?;
        let body = request.into_body().into_data_stream();
        self.write(path, body).await
    }

    async fn multipart(&self, request: Request) -> Result<Vec<Written>, ApiError> {
        let step = Step::default();
        let request = request.map(|body| step.bound(body));
        let parts = Multipart::from_request(request, &()).await;
        let mut parts = parts.map_err(|err| ApiError::bad_request(err.body_text()))?;
        let mut written = Vec::new();
        let mut seen = BTreeSet::new();
        while let Some(part) = parts.next_field().await.map_err(|err| body_error(&err))? {
            let mut part = part.inspect_ok(|_| step.begin());
            step.begin();
            if part.get_ref().name() != Some(FILE_PART) {
                while part
                    .try_next()
                    .await
                    .map_err(|err| body_error(&err))?
                    .is_some()
                {}
                continue;
            }
            if seen.len() == MAX_PARTS {
                let words = format!("more than {MAX_PARTS} files");
                return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, words));
            }
            let path = self.part_path(part.get_ref())?;
            if !seen.insert(path.clone()) {
                let words = format!("two parts are for '{}'", path.display());
                return Err(ApiError::bad_request(words));
            }
            written.push(self.write(path, part).await?);
        }
        if written.is_empty() {
            return Err(ApiError::bad_request(format!(
                "no part is named '{FILE_PART}'"
            )));
        }
        Ok(written)
    }

    fn part_path(&self, part: &Field<'_>) -> Result<PathBuf, ApiError> {
        let asked = self
            .caller
            .query
            .path
            .as_deref()
            .filter(|path| !path.is_empty());
        let named = asked.or(part.file_name()).filter(|path| !path.is_empty());
        let path = named.ok_or_else(|| ApiError::bad_request("part has no file name"))?;
        self.caller.resolve(&self.agent, path)
    }

    async fn write<E: std::error::Error + 'static>(
        &self,
        path: PathBuf,
        mut pieces: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<Written, ApiError> {
        let user = self.caller.user.clone();
        let mut writing = Writing::open(path, user, self.metadata.clone()).await?;
        let path = writing.path().to_owned();
        while let Some(piece) = pieces.try_next().await.map_err(|err| body_error(&err))? {
            writing.push(piece).await?;
        }
        Ok(Written::new(&path, writing.complete().await?))
    }
}
