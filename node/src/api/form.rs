//! Multipart forms, read part by part as they arrive.
//!
//! The reader never holds more than one network frame and one part's headers: whoever reads parts
//! slowly slows the sender down, and endless headers are refused. That, and limits that differ by
//! part, is why this is our own and not the form reader of the HTTP library, which keeps what it
//! cannot parse yet without a bound.

use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use tokio::time::{self, Instant};

use super::error::ApiError;

/// Longest silence of a sender in the middle of a form.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a sender is waited for before its rate is looked at, and then again as long: a line that
/// stalls gets the time that one which is silent gets.
const RATE_WINDOW: Duration = IDLE_TIMEOUT;
/// Least bytes that a sender sends while it is waited for that long: 1 KiB a second, of which a modem's
/// line carries several. Less is a sender that holds a place and does not mean to be done.
const RATE_WINDOW_BYTES: usize = 60 << 10;
/// Longest boundary; the standard allows 70 characters.
const BOUNDARY_BYTES: usize = 200;
/// Most bytes of a part's headers, and of what precedes the first part.
const HEADER_BYTES: usize = 8 << 10;

/// A form that is being received.
#[derive(Debug)]
pub(super) struct Form {
    body: Body,
    /// What has arrived and was not handed out yet.
    buf: BytesMut,
    /// A line break, two dashes and the boundary.
    delimiter: Vec<u8>,
    place: Place,
    pace: Pace,
}

/// How fast the sender is, while it is waited for. Time that whoever reads the form takes is not counted.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: usize,
}

impl Pace {
    /// Counts a frame; `false` where the sender is too slow.
    fn keeps_up(&mut self, waited: Duration, bytes: usize) -> bool {
        self.waited += waited;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.waited < RATE_WINDOW {
            return true;
        }
        let sent = std::mem::take(self).bytes;
        sent >= RATE_WINDOW_BYTES
    }
}

/// Where the reader stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the first delimiter or inside a part.
    InPart,
    /// Right after a delimiter.
    AfterDelimiter,
    /// After the last part.
    End,
}

impl Form {
    /// A form in a request of these headers.
    pub(super) fn new(headers: &HeaderMap, body: Body) -> Result<Self, ApiError> {
        let content_type = headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let boundary = boundary(content_type).ok_or_else(|| {
            ApiError::invalid("the body must be multipart/form-data with a boundary")
        })?;
        Ok(Self {
            body,
            // The first delimiter may lack its line break; with one in front it looks like all.
            buf: BytesMut::from(&b"\r\n"[..]),
            delimiter: [b"\r\n--", boundary.as_bytes()].concat(),
            place: Place::InPart,
            pace: Pace::default(),
        })
    }

    /// Goes to the next part, past what is left of this one, and returns its name; `None` after
    /// the last part.
    pub(super) async fn next_part(&mut self) -> Result<Option<String>, ApiError> {
        while self.place == Place::InPart {
            self.chunk().await?;
        }
        if self.place == Place::End || self.ends_here().await? {
            self.place = Place::End;
            return Ok(None);
        }
        let headers = self.part_headers().await?;
        self.place = Place::InPart;
        Ok(Some(part_name(&headers)))
    }

    /// The next piece of this part; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, ApiError> {
        if self.place != Place::InPart {
            return Ok(None);
        }
        loop {
            match find(&self.buf, &self.delimiter) {
                Some(0) => {
                    let _delimiter = self.buf.split_to(self.delimiter.len());
                    self.place = Place::AfterDelimiter;
                    return Ok(None);
                }
                Some(at) => return Ok(Some(self.buf.split_to(at).freeze())),
                None => {
                    // The end may be the start of a delimiter whose rest is on its way.
                    let sure = self.buf.len().saturating_sub(self.delimiter.len() - 1);
                    if sure > 0 {
                        return Ok(Some(self.buf.split_to(sure).freeze()));
                    }
                    self.fill().await?;
                }
            }
        }
    }

    /// The whole of this part as text, if it has `limit` bytes at most.
    pub(super) async fn text(&mut self, what: &str, limit: usize) -> Result<String, ApiError> {
        let mut whole = Vec::new();
        while let Some(piece) = self.chunk().await? {
            whole.extend_from_slice(&piece);
            if whole.len() > limit {
                return Err(ApiError::invalid(format!(
                    "field {what} has more than {limit} bytes"
                )));
            }
        }
        String::from_utf8(whole)
            .map_err(|_| ApiError::invalid(format!("field {what} is not UTF-8 text")))
    }

    /// Whether the delimiter just read is the last one, which two more dashes mark.
    async fn ends_here(&mut self) -> Result<bool, ApiError> {
        while self.buf.len() < 2 {
            self.fill().await?;
        }
        Ok(self.buf.starts_with(b"--"))
    }

    async fn part_headers(&mut self) -> Result<Bytes, ApiError> {
        const END: &[u8] = b"\r\n\r\n";
        loop {
            if let Some(at) = find(&self.buf, END) {
                return Ok(self.buf.split_to(at + END.len()).freeze());
            }
            if self.buf.len() > HEADER_BYTES {
                return Err(ApiError::invalid(format!(
                    "a part of the form has more than {HEADER_BYTES} bytes of headers"
                )));
            }
            self.fill().await?;
        }
    }

    /// Waits for more of the body.
    async fn fill(&mut self) -> Result<(), ApiError> {
        let asked = Instant::now();
        let frame = time::timeout(IDLE_TIMEOUT, self.body.frame())
            .await
            .map_err(|_| ApiError::invalid(format!("nothing was sent for {IDLE_TIMEOUT:?}")))?
            .ok_or_else(|| ApiError::invalid("the form ends before its last boundary"))?
            .map_err(|err| ApiError::invalid(format!("the body broke off: {err}")))?;
        let data = frame.into_data().unwrap_or_default();
        if !self.pace.keeps_up(asked.elapsed(), data.len()) {
            return Err(ApiError::invalid(format!(
                "fewer than {RATE_WINDOW_BYTES} bytes were sent within {RATE_WINDOW:?}"
            )));
        }
        self.buf.extend_from_slice(&data);
        Ok(())
    }
}

/// Where `needle` first lies in `hay`.
fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = hay[from..].iter().position(|byte| *byte == first) {
        let at = from + at;
        if hay[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

fn boundary(content_type: &str) -> Option<String> {
    let (kind, params) = content_type.split_once(';')?;
    kind.trim()
        .eq_ignore_ascii_case("multipart/form-data")
        .then(|| param(params, "boundary"))
        .flatten()
        .filter(|it| !it.is_empty() && it.len() <= BOUNDARY_BYTES)
}

/// The name in a part's `Content-Disposition`; empty where there is none.
fn part_name(headers: &[u8]) -> String {
    let text = String::from_utf8_lossy(headers);
    let disposition = text.split("\r\n").find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.trim()
            .eq_ignore_ascii_case("content-disposition")
            .then_some(value)
    });
    disposition
        .and_then(|value| value.split_once(';'))
        .and_then(|(_, params)| param(params, "name"))
        .unwrap_or_default()
}

/// The value of one parameter in `a=b; c="d"`.
fn param(params: &str, wanted: &str) -> Option<String> {
    let mut rest = params;
    loop {
        rest = rest.trim_start_matches([';', ' ', '\t']);
        let (key, after) = rest.split_once('=')?;
        let (value, tail) = match after.strip_prefix('"') {
            Some(quoted) => quoted_value(quoted),
            None => {
                let (value, tail) = after.split_once(';').unwrap_or((after, ""));
                (value.trim().to_owned(), tail)
            }
        };
        if key.trim().eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = tail;
    }
}

/// What stands before the closing quote, unescaped, and what follows it.
fn quoted_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use proptest::prelude::*;

    use super::*;

    /// The form that `bytes` make when they arrive in pieces of the given sizes.
    fn form(content_type: &str, bytes: &[u8], sizes: &[usize]) -> Result<Form, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, content_type.parse().expect("a header"));
        let mut pieces = Vec::new();
        let mut rest = bytes;
        let mut sizes = sizes.iter().copied().cycle();
        while !rest.is_empty() {
            let size = sizes.next().unwrap_or(rest.len()).clamp(1, rest.len());
            let (piece, tail) = rest.split_at(size);
            pieces.push(Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece)));
            rest = tail;
        }
        let body = Body::from_stream(futures::stream::iter(pieces));
        Form::new(&headers, body)
    }

    async fn parts(mut form: Form) -> Result<Vec<(String, Vec<u8>)>, ApiError> {
        let mut parts = Vec::new();
        while let Some(name) = form.next_part().await? {
            let mut whole = Vec::new();
            while let Some(piece) = form.chunk().await? {
                whole.extend_from_slice(&piece);
            }
            parts.push((name, whole));
        }
        Ok(parts)
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime")
            .block_on(work)
    }

    fn encode(parts: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, data) in parts {
            let head = format!(
                "--XyZ\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"f;=\"\r\n\r\n"
            );
            bytes.extend_from_slice(head.as_bytes());
            bytes.extend_from_slice(data);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"--XyZ--\r\n");
        bytes
    }

    const TYPE: &str = "multipart/form-data; boundary=XyZ";

    #[test]
    fn a_form_that_stops_before_its_last_boundary_is_an_error() {
        let whole = encode(&[("file".into(), b"hello".to_vec())]);
        // Without the line break after the last dashes it is still whole.
        for length in 0..whole.len() - 4 {
            let cut = form(TYPE, &whole[..length], &[7]).expect("a form");
            assert!(run(parts(cut)).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn other_content_types_and_bad_boundaries_are_refused() {
        let long = format!("multipart/form-data; boundary={}", "b".repeat(201));
        for bad in [
            "application/json",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/mixed; boundary=x",
            &long,
        ] {
            assert!(form(bad, b"", &[]).is_err(), "{bad}");
        }
        assert!(form("Multipart/Form-Data; charset=x; boundary=\"a b\"", b"", &[]).is_ok());
    }

    #[test]
    fn endless_headers_are_refused() {
        let mut bytes = b"--XyZ\r\n".to_vec();
        bytes.extend(std::iter::repeat_n(b'a', 1 << 20));
        let form = form(TYPE, &bytes, &[4096]).expect("a form");
        let err = run(parts(form)).expect_err("it was accepted");
        assert!(err.message.contains("headers"), "{}", err.message);
    }

    #[test]
    fn a_sender_that_falls_silent_is_given_up_on() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, TYPE.parse().expect("a header"));
        let silent = futures::stream::pending::<Result<Bytes, std::io::Error>>();
        let form = Form::new(&headers, Body::from_stream(silent)).expect("a form");
        let err = run(parts(form)).expect_err("it was accepted");
        assert!(err.message.contains("nothing was sent"), "{}", err.message);
    }

    /// A form whose file comes in pieces of `bytes`, one each `every`; `pieces` of them.
    async fn paced(bytes: usize, every: Duration, pieces: usize) -> Result<usize, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, TYPE.parse().expect("a header"));
        let head = "--XyZ\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n";
        let mut all = vec![Bytes::from(head)];
        all.extend((0..pieces).map(|_| Bytes::from(vec![b'x'; bytes])));
        all.push(Bytes::from("\r\n--XyZ--\r\n"));
        let sent = futures::stream::iter(all).then(move |piece| async move {
            time::sleep(every).await;
            Ok::<_, std::io::Error>(piece)
        });
        let form = Form::new(&headers, Body::from_stream(sent))?;
        Ok(parts(form).await?.iter().map(|(_, data)| data.len()).sum())
    }

    #[test]
    fn a_sender_of_a_byte_now_and_then_is_given_up_on_and_a_slow_one_is_not() {
        let err = run(paced(1, Duration::from_secs(30), 1000)).expect_err("it was accepted");
        assert!(err.message.contains("fewer than"), "{}", err.message);
        // 2 KiB a second, for some minutes.
        let slow = run(paced(20 << 10, Duration::from_secs(10), 60));
        assert_eq!(slow, Ok(60 * (20 << 10)));
        // A small form is done before anybody looks.
        assert_eq!(run(paced(1, Duration::from_secs(10), 3)), Ok(3));
    }

    #[test]
    fn names_may_be_quoted_with_escapes_or_bare() {
        for (header, name) in [
            ("form-data; name=\"a\\\"b\"", "a\"b"),
            ("form-data; name=path", "path"),
            ("form-data; filename=\"name=x\"; name=\"file\"", "file"),
            ("form-data; name=\"open", "open"),
            ("form-data", ""),
            ("form-data; name", ""),
        ] {
            let headers = format!("\r\ncontent-disposition: {header}\r\n\r\n");
            assert_eq!(part_name(headers.as_bytes()), name, "{header}");
        }
    }

    proptest! {
        #[test]
        fn parts_survive_any_split_into_frames(
            datas in proptest::collection::vec(
                proptest::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'-'), any::<u8>()], 0..200),
                0..4,
            ),
            sizes in proptest::collection::vec(1..40_usize, 1..8),
        ) {
            let sent: Vec<_> = datas.into_iter().enumerate().map(|(i, data)| (format!("p{i}"), data)).collect();
            let form = form(TYPE, &encode(&sent), &sizes).expect("a form");
            prop_assert_eq!(run(parts(form)), Ok(sent));
        }

        #[test]
        fn no_bytes_make_the_reader_panic_or_loop(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b"\r\n--XyZ".to_vec()), Just(b"\r\n".to_vec()), Just(b"--".to_vec()), any::<Vec<u8>>()],
                0..8,
            ),
        ) {
            let _ = run(parts(form(TYPE, &bytes.concat(), &[5]).expect("a form")));
        }
    }
}
