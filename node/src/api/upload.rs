//! Writing files into a capsule from a form.
//!
//! Contents flow from the client's form to the guest through a channel of a few pieces, so memory
//! stays flat and a slow guest slows the client down. The stream ends with an explicit mark: a
//! client that goes away in the middle breaks the guest's upload instead of ending it, so no
//! truncated file passes for a whole one. Only where the file comes before its path (allowed in
//! the limited route alone) does it wait in a nameless file on disk.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderMap, Request, StatusCode};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::fs::File;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time;
use tokio_util::io::ReaderStream;

use super::auth::Caller;
use super::error::{ApiError, Code};
use super::extract::CapsuleId;
use super::files::{PATH_BYTES, check_path};
use super::form::Form;
use super::run::Run;
use super::state::ApiState;

/// Largest file of the plain write route: 100 MiB by its specification.
const FILE_BYTES: u64 = 100 << 20;
/// What a form adds to its file: boundaries, headers and the path.
const FORM_BYTES: u64 = 64 << 10;
/// Pieces between client and guest. A piece is one network frame, 64 KiB or so.
const PIECES: usize = 4;
/// Bytes read from a spool file at once.
const SPOOL_READ_BYTES: usize = 64 << 10;
/// Longest the guest may take no bytes, or leave a finished upload unanswered.
const GUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// A file, or part of one, on its way to the guest.
enum Piece {
    Data(Bytes),
    End,
}

/// Writes a file of up to 100 MiB; its fields may come in any order.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/write", tag = "files",
    params(("id" = String, Path)),
    request_body(content_type = "multipart/form-data", content = String,
        description = "Fields `path` (text) and `file`, in any order."),
    responses((status = 204))
)]
pub(super) async fn write(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    request: Request<Body>,
) -> Result<StatusCode, ApiError> {
    let guest = api.guest(&caller, id).await?;
    if declared_length(request.headers()).is_some_and(|it| it > FILE_BYTES + FORM_BYTES) {
        return Err(too_large());
    }
    let form = Form::new(&request.headers().clone(), request.into_body())?;
    api.busy(id, write_any_order(&api, &guest, form)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Writes a file of any size; field `path` must come first.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/stream/write", tag = "files",
    params(("id" = String, Path)),
    request_body(content_type = "multipart/form-data", content = String,
        description = "Field `path` (text), then `file`."),
    responses((status = 204))
)]
pub(super) async fn stream_write(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    request: Request<Body>,
) -> Result<StatusCode, ApiError> {
    let guest = api.guest(&caller, id).await?;
    let form = Form::new(&request.headers().clone(), request.into_body())?;
    api.busy(id, write_path_first(&guest, form)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn write_path_first(guest: &Run, mut form: Form) -> Result<(), ApiError> {
    let mut path = None;
    while let Some(name) = form.next_part().await? {
        match (name.as_str(), &path) {
            ("path", _) => path = Some(read_path(&mut form).await?),
            ("file", Some(path)) => {
                send(guest, path, &mut form, None).await?;
                return read_rest(form).await;
            }
            ("file", None) => {
                return Err(ApiError::invalid("field path must come before field file"));
            }
            _ => {}
        }
    }
    Err(missing(path.is_some()))
}

async fn write_any_order(api: &ApiState, guest: &Run, mut form: Form) -> Result<(), ApiError> {
    let mut path = None;
    let mut spool = None;
    while let Some(name) = form.next_part().await? {
        match name.as_str() {
            "path" => path = Some(read_path(&mut form).await?),
            "file" => match &path {
                Some(path) => {
                    send(guest, path, &mut form, Some(FILE_BYTES)).await?;
                    return read_rest(form).await;
                }
                None => spool = Some(fill_spool(api, &mut form).await?),
            },
            _ => {}
        }
        if let Some(path) = &path
            && let Some(spool) = spool.take()
        {
            send_spool(guest, path, spool).await?;
            return read_rest(form).await;
        }
    }
    Err(missing(path.is_some()))
}

/// Sends the form's present part to the guest as it arrives.
async fn send(
    guest: &Run,
    path: &str,
    form: &mut Form,
    limit: Option<u64>,
) -> Result<(), ApiError> {
    let (feed, pieces) = mpsc::channel(PIECES);
    let write = guest.write_file(path, until_end(pieces));
    tokio::pin!(write);
    tokio::select! {
        // An early answer is a refusal: the guest's disk is full, the path is a directory.
        written = &mut write => return guest.told(written).await,
        pumped = pump(form, feed, limit) => pumped?,
    }
    let written = time::timeout(GUEST_TIMEOUT, write).await;
    guest.told(written.map_err(|_| stalled())?).await
}

/// Moves the form's present part into `feed`, mark included.
async fn pump(
    form: &mut Form,
    feed: mpsc::Sender<Piece>,
    limit: Option<u64>,
) -> Result<(), ApiError> {
    let mut seen = 0;
    while let Some(data) = form.chunk().await? {
        count(&mut seen, &data, limit)?;
        push(&feed, Piece::Data(data)).await?;
    }
    push(&feed, Piece::End).await
}

async fn push(feed: &mpsc::Sender<Piece>, piece: Piece) -> Result<(), ApiError> {
    let sent = time::timeout(GUEST_TIMEOUT, feed.send(piece)).await;
    match sent.map_err(|_| stalled())? {
        Ok(()) => Ok(()),
        // The reader of the channel is gone: its own answer, which tells why, comes first.
        Err(_) => {
            time::sleep(GUEST_TIMEOUT).await;
            Err(stalled())
        }
    }
}

/// The pieces up to the mark; an error if the sender goes away before it.
fn until_end(pieces: mpsc::Receiver<Piece>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    futures::stream::unfold(Some(pieces), |pieces| async {
        let mut pieces = pieces?;
        match pieces.recv().await {
            Some(Piece::Data(data)) => Some((Ok(data), Some(pieces))),
            Some(Piece::End) => None,
            None => Some((Err(io::ErrorKind::UnexpectedEof.into()), None)),
        }
    })
}

/// Puts the form's present part into a file without a name.
async fn fill_spool(api: &ApiState, form: &mut Form) -> Result<Spool, ApiError> {
    let permit = api.spools.clone().try_acquire_owned().map_err(|_| {
        ApiError::new(
            Code::Overloaded,
            "too many uploads at once; send path before file",
        )
    })?;
    let dir = api.spool_dir.clone();
    let made = tokio::task::spawn_blocking(move || tempfile::tempfile_in(dir.as_path()));
    let file = made.await.map_err(io::Error::other).and_then(|it| it);
    let mut file = File::from_std(file.map_err(|err| spool_failed(&err))?);
    let mut seen = 0;
    while let Some(data) = form.chunk().await? {
        count(&mut seen, &data, Some(FILE_BYTES))?;
        file.write_all(&data)
            .await
            .map_err(|err| spool_failed(&err))?;
    }
    file.rewind().await.map_err(|err| spool_failed(&err))?;
    Ok(Spool {
        file,
        _permit: permit,
    })
}

/// A file that waits for its path.
struct Spool {
    file: File,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

async fn send_spool(guest: &Run, path: &str, spool: Spool) -> Result<(), ApiError> {
    let contents = ReaderStream::with_capacity(spool.file, SPOOL_READ_BYTES).boxed();
    // The whole file lies here, so time is bounded by its size alone.
    let written = time::timeout(2 * GUEST_TIMEOUT, guest.write_file(path, contents)).await;
    guest.told(written.map_err(|_| stalled())?).await
}

async fn read_path(form: &mut Form) -> Result<String, ApiError> {
    let path = form.text("path", PATH_BYTES).await?;
    check_path(&path)?;
    Ok(path)
}

/// Reads what follows the file, so that the connection can be used again. The file is written
/// already: an unclean end of the form no longer matters.
async fn read_rest(mut form: Form) -> Result<(), ApiError> {
    while let Ok(Some(_)) = form.next_part().await {}
    Ok(())
}

fn count(seen: &mut u64, data: &Bytes, limit: Option<u64>) -> Result<(), ApiError> {
    *seen += data.len() as u64;
    if limit.is_some_and(|limit| *seen > limit) {
        return Err(too_large());
    }
    Ok(())
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large() -> ApiError {
    let message = format!(
        "a file of this route may have {FILE_BYTES} bytes at most; files/stream/write takes more"
    );
    ApiError::new(Code::TooLarge, message)
}

fn missing(has_path: bool) -> ApiError {
    let field = if has_path { "file" } else { "path" };
    ApiError::invalid(format!("the form lacks field {field}"))
}

fn stalled() -> ApiError {
    let message = format!("the guest took no bytes for {GUEST_TIMEOUT:?}");
    ApiError::new(Code::AgentError, message)
}

fn spool_failed(err: &io::Error) -> ApiError {
    ApiError::new(Code::InternalError, format!("keep the upload: {err}"))
}
