//! Reading, listing, making and removing files in a capsule.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use proto::ids::SandboxId;
use serde::{Deserialize, Serialize};
use tokio::time::{self, Instant};
use utoipa::ToSchema;

use super::auth::Caller;
use super::error::ApiError;
use super::extract::{CapsuleId, JsonBody};
use super::state::ApiState;
use super::wire::FileEntryShape;
use crate::guest::GuestError;

/// Longest path that Linux takes.
pub(super) const PATH_BYTES: usize = 4096;
/// Longest the guest may leave a started download without a byte.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a download counts as activity.
const TOUCH_INTERVAL: Duration = Duration::from_secs(10);

/// One path.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct PathBody {
    /// An absolute path.
    #[serde(default)]
    path: String,
}

/// A directory to list.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ListBody {
    /// An absolute path.
    #[serde(default)]
    path: String,
    /// Levels to go down; 0 and absent mean 1.
    depth: Option<u32>,
}

/// The entries of a directory.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Entries {
    entries: Vec<FileEntryShape>,
}

/// One entry.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Entry {
    entry: FileEntryShape,
}

/// Reads a file. Errors come before the first byte.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/read", tag = "files",
    params(("id" = String, Path)), request_body = PathBody,
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>))
)]
pub(super) async fn read(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(PathBody { path }): JsonBody<PathBody>,
) -> Result<Response, ApiError> {
    check_path(&path)?;
    let guest = api.guest(&caller, id).await?;
    let contents = guest.told(guest.read_file(&path).await).await?;
    let body = Body::from_stream(watched(api, id, contents));
    Ok(([(CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// The same as reading a file; both stream.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/stream/read", tag = "files",
    params(("id" = String, Path)), request_body = PathBody,
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>))
)]
pub(super) async fn stream_read(
    api: State<ApiState>,
    caller: Caller,
    id: CapsuleId,
    body: JsonBody<PathBody>,
) -> Result<Response, ApiError> {
    read(api, caller, id, body).await
}

/// Lists a directory.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/list", tag = "files",
    params(("id" = String, Path)), request_body = ListBody,
    responses((status = 200, body = Entries))
)]
pub(super) async fn list(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(request): JsonBody<ListBody>,
) -> Result<Json<Entries>, ApiError> {
    check_path(&request.path)?;
    let depth = request.depth.unwrap_or(1).max(1);
    let guest = api.guest(&caller, id).await?;
    let listed = guest.list_dir(&request.path, depth).await;
    let found = guest.told(listed).await?;
    Ok(Json(Entries {
        entries: found.into_iter().map(Into::into).collect(),
    }))
}

/// Makes a directory and its parents.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/mkdir", tag = "files",
    params(("id" = String, Path)), request_body = PathBody,
    responses((status = 200, body = Entry))
)]
pub(super) async fn mkdir(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(PathBody { path }): JsonBody<PathBody>,
) -> Result<Json<Entry>, ApiError> {
    check_path(&path)?;
    let guest = api.guest(&caller, id).await?;
    let made = guest.told(guest.make_dir(&path).await).await?;
    Ok(Json(Entry { entry: made.into() }))
}

/// Removes a file or a whole directory; a missing path is success.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/remove", tag = "files",
    params(("id" = String, Path)), request_body = PathBody, responses((status = 204))
)]
pub(super) async fn remove(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(PathBody { path }): JsonBody<PathBody>,
) -> Result<StatusCode, ApiError> {
    check_path(&path)?;
    let guest = api.guest(&caller, id).await?;
    guest.told(guest.remove(&path).await).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Refuses paths that no guest could mean: they would be read differently by different layers.
pub(super) fn check_path(path: &str) -> Result<(), ApiError> {
    let wrong = if path.is_empty() {
        "path is missing or empty"
    } else if !path.starts_with('/') {
        "path must be absolute"
    } else if path.contains('\0') {
        "path may not contain NUL bytes"
    } else if path.len() > PATH_BYTES {
        "path is longer than 4096 bytes"
    } else {
        return Ok(());
    };
    Err(ApiError::invalid(wrong))
}

/// A download that counts as activity while it flows and breaks off when the guest stalls.
fn watched<S>(
    api: ApiState,
    id: SandboxId,
    contents: S,
) -> impl Stream<Item = Result<Bytes, GuestError>> + Send
where
    S: Stream<Item = Result<Bytes, GuestError>> + Send + 'static,
{
    let start = (Box::pin(contents), Instant::now());
    futures::stream::unfold(Some(start), move |place| {
        let api = api.clone();
        async move {
            let (mut contents, mut touched) = place?;
            let Ok(next) = time::timeout(READ_TIMEOUT, contents.next()).await else {
                let waited = READ_TIMEOUT;
                return Some((Err(GuestError::TimedOut { waited }), None));
            };
            if touched.elapsed() > TOUCH_INTERVAL {
                api.touch(id);
                touched = Instant::now();
            }
            Some((next?, Some((contents, touched))))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_paths_without_nul_bytes_pass() {
        let longest = format!("/{}", "a".repeat(PATH_BYTES - 1));
        for good in ["/", "/etc/passwd", "/a/../b", "/ä\n", &longest] {
            assert!(check_path(good).is_ok(), "{good:?}");
        }
        let long = format!("/{}", "a".repeat(PATH_BYTES));
        for bad in ["", "a", "./a", "../a", "/a\0b", &long] {
            assert!(check_path(bad).is_err(), "{bad:?}");
        }
    }
}
