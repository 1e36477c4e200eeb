//! `GET /files`: a file in pieces, compressed if the client wants it so.
//!
//! A size is believed only if the file turns out to have it: files of `/proc` claim zero bytes and
//! those of `/sys` a page. So the first piece is read before anything is promised, and a file that
//! ends within it is sent as it is.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::stream;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use tokio::task::spawn_blocking;

use super::content::{disposition, media_type};
use super::encoding::{self, Encoding};
use super::range::{self, Part};
use super::request::{Caller, Operation};
use crate::agent::Agent;
use crate::http::error::ApiError;

/// Bytes read at once; also what one download holds in memory, give or take a copy.
const PIECE_BYTES: usize = 128 * 1024;

/// Handles `GET /files`.
///
/// # Errors
/// 400 for a path that is no file, 401 by token and signature, 404 for a missing file, 406 when no
/// encoding is acceptable.
pub async fn download(
    State(agent): State<Arc<Agent>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, _body) = request.into_parts();
    let caller = Caller::admit(&agent, &parts.uri, &parts.headers, Operation::Read)?;
    let path = caller.query.path.as_deref().unwrap_or_default();
    let path = caller.resolve(&agent, path)?;
    let opened = spawn_blocking(move || Opened::open(path))
        .await
        .map_err(ApiError::internal)??;
    let is_head = parts.method == Method::HEAD;
    opened.answer(&parts.headers, is_head).await
}

/// A file whose first piece has been read.
struct Opened {
    path: PathBuf,
    file: File,
    first: Bytes,
    /// `None` when only reading to the end will tell.
    size: Option<u64>,
    modified: Option<SystemTime>,
}

impl Opened {
    fn open(path: PathBuf) -> Result<Self, ApiError> {
        // Not blocking: opening a pipe would otherwise wait for its writer.
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let mut file = options.open(&path).map_err(|err| open_error(&path, err))?;
        let stat = file.metadata().map_err(ApiError::internal)?;
        if stat.is_dir() {
            let words = format!("path '{}' is a directory", path.display());
            return Err(ApiError::bad_request(words));
        }
        if !stat.is_file() {
            let words = format!("path '{}' is not a regular file", path.display());
            return Err(ApiError::bad_request(words));
        }
        let first = read_piece(&mut file, PIECE_BYTES).map_err(ApiError::internal)?;
        let size = if first.len() < PIECE_BYTES {
            Some(first.len() as u64)
        } else {
            Some(stat.len()).filter(|size| *size >= first.len() as u64)
        };
        Ok(Self {
            path,
            file,
            first,
            size,
            modified: stat.modified().ok(),
        })
    }

    async fn answer(self, asked: &HeaderMap, is_head: bool) -> Result<Response, ApiError> {
        let accepted = text(asked, &header::ACCEPT_ENCODING);
        let chosen = if wants_identity(asked) {
            encoding::accepts_identity(accepted).then_some(Encoding::Identity)
        } else {
            encoding::choose(accepted)
        };
        let refusal = "neither gzip nor identity is acceptable";
        let chosen = chosen.ok_or_else(|| ApiError::new(StatusCode::NOT_ACCEPTABLE, refusal))?;
        let described = self.headers()?;
        let mut response = match condition(asked, self.modified) {
            Condition::NotModified => StatusCode::NOT_MODIFIED.into_response(),
            Condition::Failed => StatusCode::PRECONDITION_FAILED.into_response(),
            Condition::Send { ranges } => match (self.part(asked, ranges), chosen) {
                (Part::Whole, Encoding::Identity) => self.whole(is_head),
                (Part::Whole, Encoding::Gzip) => self.gzipped(is_head),
                (Part::Bytes { start, length }, _) => self.slice(start, length, is_head).await?,
                (Part::Unsatisfiable, _) => self.unsatisfiable(),
            },
        };
        response.headers_mut().extend(described);
        Ok(response)
    }

    /// What every answer says about the file.
    fn headers(&self) -> Result<HeaderMap, ApiError> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let disposition = HeaderValue::try_from(disposition(&name)).map_err(ApiError::internal)?;
        let media_type = HeaderValue::from_static(media_type(&self.path));
        let mut headers = HeaderMap::from_iter([
            (header::CONTENT_DISPOSITION, disposition),
            (header::CONTENT_TYPE, media_type),
            (header::VARY, HeaderValue::from_static("Accept-Encoding")),
            (header::ACCEPT_RANGES, HeaderValue::from_static("bytes")),
        ]);
        if let Some(modified) = self.modified.and_then(http_date) {
            headers.insert(header::LAST_MODIFIED, modified);
        }
        Ok(headers)
    }

    fn part(&self, asked: &HeaderMap, ranges: bool) -> Part {
        let range = text(asked, &header::RANGE).filter(|_| ranges);
        match (range, self.size) {
            (Some(range), Some(size)) => range::parse(range, size),
            // Parts of a file whose size nobody knows cannot be told apart.
            _ => Part::Whole,
        }
    }

    fn whole(self, is_head: bool) -> Response {
        let size = self.size;
        let mut response = Response::new(if is_head { Body::empty() } else { self.body() });
        if let Some(size) = size {
            response
                .headers_mut()
                .insert(header::CONTENT_LENGTH, size.into());
        }
        response
    }

    fn body(self) -> Body {
        let left = self.size.map(|size| size - self.first.len() as u64);
        if left == Some(0) {
            return self.first.into();
        }
        Body::from_stream(pieces(Pieces {
            file: self.file,
            ready: Some(self.first),
            left,
        }))
    }

    fn gzipped(self, is_head: bool) -> Response {
        let body = if is_head {
            Body::empty()
        } else {
            let encoder = GzEncoder::new(Vec::new(), Compression::fast());
            Body::from_stream(compressed(Compressing {
                file: self.file,
                ready: Some(self.first),
                encoder: Some(encoder),
            }))
        };
        let mut response = Response::new(body);
        let gzip = HeaderValue::from_static("gzip");
        response
            .headers_mut()
            .insert(header::CONTENT_ENCODING, gzip);
        response
    }

    async fn slice(self, start: u64, length: u64, is_head: bool) -> Result<Response, ApiError> {
        let size = self.size.unwrap_or_default();
        let mut file = self.file;
        let seek = move || file.seek(SeekFrom::Start(start)).map(|_| file);
        let sought = spawn_blocking(seek).await.map_err(ApiError::internal)?;
        let file = sought.map_err(ApiError::internal)?;
        let body = Body::from_stream(pieces(Pieces {
            file,
            ready: None,
            left: Some(length),
        }));
        let mut response = Response::new(if is_head { Body::empty() } else { body });
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let range = format!("bytes {start}-{}/{size}", start + length - 1);
        let range = HeaderValue::try_from(range).map_err(ApiError::internal)?;
        response.headers_mut().insert(header::CONTENT_RANGE, range);
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, length.into());
        Ok(response)
    }

    fn unsatisfiable(&self) -> Response {
        let range = format!("bytes */{}", self.size.unwrap_or_default());
        let refusal = ApiError::new(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "range is outside the file",
        );
        ([(header::CONTENT_RANGE, range)], refusal).into_response()
    }
}

fn open_error(path: &Path, err: io::Error) -> ApiError {
    let shown = path.display();
    match err.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ApiError::new(
            StatusCode::NOT_FOUND,
            format!("path '{shown}' does not exist"),
        ),
        Some(libc::ELOOP | libc::ENAMETOOLONG | libc::ENXIO) => {
            ApiError::bad_request(format!("open '{shown}': {err}"))
        }
        _ => ApiError::internal(err),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &header::HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Parts and conditions speak about the file's own bytes, so these cannot be compressed.
fn wants_identity(asked: &HeaderMap) -> bool {
    [
        header::RANGE,
        header::IF_RANGE,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        header::IF_MODIFIED_SINCE,
        header::IF_UNMODIFIED_SINCE,
    ]
    .iter()
    .any(|name| asked.contains_key(name))
}

/// What the conditions of a request come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Send { ranges: bool },
    NotModified,
    Failed,
}

/// Files have no tags here, only a time of change, in whole seconds.
fn condition(asked: &HeaderMap, modified: Option<SystemTime>) -> Condition {
    let modified = modified.and_then(seconds);
    let date = |name| text(asked, name).and_then(parse_http_date);
    let newer_than = |name| match (modified, date(name)) {
        (Some(modified), Some(date)) => Some(modified > date),
        _ => None,
    };
    if asked.contains_key(header::IF_MATCH) && text(asked, &header::IF_MATCH) != Some("*") {
        return Condition::Failed;
    }
    if newer_than(&header::IF_UNMODIFIED_SINCE) == Some(true) {
        return Condition::Failed;
    }
    if text(asked, &header::IF_NONE_MATCH) == Some("*") {
        return Condition::NotModified;
    }
    let unconditional = !asked.contains_key(header::IF_NONE_MATCH);
    if unconditional && newer_than(&header::IF_MODIFIED_SINCE) == Some(false) {
        return Condition::NotModified;
    }
    let same = newer_than(&header::IF_RANGE) == Some(false);
    Condition::Send {
        ranges: !asked.contains_key(header::IF_RANGE) || same,
    }
}

fn seconds(time: SystemTime) -> Option<i64> {
    Some(Timestamp::try_from(time).ok()?.as_second())
}

fn http_date(time: SystemTime) -> Option<HeaderValue> {
    let time = Timestamp::try_from(time).ok()?;
    let text = DateTimePrinter::new()
        .timestamp_to_rfc9110_string(&time)
        .ok()?;
    HeaderValue::try_from(text).ok()
}

fn parse_http_date(text: &str) -> Option<i64> {
    Some(
        jiff::fmt::rfc2822::parse(text)
            .ok()?
            .timestamp()
            .as_second(),
    )
}

/// Reads until `room` bytes are there or the file ends.
fn read_piece(file: &mut File, room: usize) -> io::Result<Bytes> {
    let mut piece = Vec::with_capacity(room);
    file.take(room as u64).read_to_end(&mut piece)?;
    Ok(piece.into())
}

/// The rest of a file.
struct Pieces {
    file: File,
    ready: Option<Bytes>,
    /// Bytes promised and not read; `None` reads to the end.
    left: Option<u64>,
}

fn pieces(state: Pieces) -> impl futures::Stream<Item = io::Result<Bytes>> {
    stream::try_unfold(state, async |mut state| {
        if let Some(ready) = state.ready.take() {
            return Ok(Some((ready, state)));
        }
        spawn_blocking(move || state.read())
            .await
            .map_err(io::Error::other)?
    })
}

impl Pieces {
    fn read(mut self) -> io::Result<Option<(Bytes, Self)>> {
        let room = self.left.map_or(PIECE_BYTES, |left| {
            usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES))
        });
        if room == 0 {
            return Ok(None);
        }
        let piece = read_piece(&mut self.file, room)?;
        match &mut self.left {
            // Shorter than promised: cut the connection rather than let the client believe it.
            Some(_) if piece.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            None if piece.is_empty() => Ok(None),
            Some(left) => {
                *left -= piece.len() as u64;
                Ok(Some((piece, self)))
            }
            None => Ok(Some((piece, self))),
        }
    }
}

/// A file on its way through the compressor, to its end whatever its size was.
struct Compressing {
    file: File,
    ready: Option<Bytes>,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

fn compressed(state: Compressing) -> impl futures::Stream<Item = io::Result<Bytes>> {
    stream::try_unfold(state, async |state| {
        spawn_blocking(move || state.next())
            .await
            .map_err(io::Error::other)?
    })
}

impl Compressing {
    fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        while let Some(mut encoder) = self.encoder.take() {
            let piece = match self.ready.take() {
                Some(ready) => ready,
                None => read_piece(&mut self.file, PIECE_BYTES)?,
            };
            if piece.is_empty() {
                return Ok(Some((encoder.finish()?.into(), self)));
            }
            encoder.write_all(&piece)?;
            let out = std::mem::take(encoder.get_mut());
            self.encoder = Some(encoder);
            if !out.is_empty() {
                return Ok(Some((out.into(), self)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    const EARLIER: &str = "Thu, 01 Jan 1970 00:01:39 GMT";
    const SAME: &str = "Thu, 01 Jan 1970 00:01:40 GMT";

    fn decide(name: header::HeaderName, value: &'static str) -> Condition {
        let asked = HeaderMap::from_iter([(name, HeaderValue::from_static(value))]);
        condition(&asked, Some(UNIX_EPOCH + Duration::from_millis(100_500)))
    }

    #[test]
    fn conditions_compare_whole_seconds() {
        let send = Condition::Send { ranges: true };
        assert_eq!(
            decide(header::IF_MODIFIED_SINCE, SAME),
            Condition::NotModified
        );
        assert_eq!(decide(header::IF_MODIFIED_SINCE, EARLIER), send);
        assert_eq!(decide(header::IF_MODIFIED_SINCE, "yesterday"), send);
        assert_eq!(
            decide(header::IF_UNMODIFIED_SINCE, EARLIER),
            Condition::Failed
        );
        assert_eq!(decide(header::IF_UNMODIFIED_SINCE, SAME), send);
        assert_eq!(
            decide(header::IF_RANGE, EARLIER),
            Condition::Send { ranges: false }
        );
        assert_eq!(decide(header::IF_RANGE, SAME), send);
        assert_eq!(decide(header::IF_NONE_MATCH, "*"), Condition::NotModified);
        assert_eq!(decide(header::IF_MATCH, "\"tag\""), Condition::Failed);
    }

    #[test]
    fn dates_are_written_as_http_wants_them() {
        let written = http_date(UNIX_EPOCH + Duration::from_secs(100)).expect("in range");
        assert_eq!(written, SAME);
        assert_eq!(parse_http_date(SAME), Some(100));
    }
}
