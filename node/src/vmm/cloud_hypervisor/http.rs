//! As much HTTP as the management API speaks. Pure.

/// The longest answer: `vm.info` of a large machine has some 10 KB.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;
/// The longest head of an answer: it has five short lines.
const MAX_HEAD_BYTES: usize = 8192;
/// What ends a head.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// What came with it.
    pub body: Vec<u8>,
}

/// Bytes that are no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The head does not begin, or end, like one.
    #[error("it is no HTTP answer")]
    NotHttp,
    /// The length of its body is none, or told twice.
    #[error("it has no sensible length")]
    BadLength,
    /// It is longer than any answer of its kind.
    #[error("it is longer than {MAX_ANSWER_BYTES} bytes")]
    TooLong,
}

/// A request for `call`, with a JSON document where there is one.
#[must_use]
pub fn encode(method: &str, call: &str, body: Option<&[u8]>) -> Vec<u8> {
    let head = format!("{method} /api/v1/{call} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    let mut request = head.into_bytes();
    if let Some(body) = body {
        let length = body.len();
        let more = format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        request.extend(more.into_bytes());
    }
    request.extend(b"\r\n");
    request.extend(body.unwrap_or_default());
    request
}

/// The answer that `heard` begins with; `None` while a part of it is missing.
///
/// # Errors
/// See [`HttpError`].
pub fn decode(heard: &[u8]) -> Result<Option<Answer>, HttpError> {
    let within = &heard[..heard.len().min(MAX_HEAD_BYTES)];
    let Some(end) = within.windows(4).position(|at| at == HEAD_END) else {
        let whole = within.len() == MAX_HEAD_BYTES;
        return if whole {
            Err(HttpError::NotHttp)
        } else {
            Ok(None)
        };
    };
    let head = std::str::from_utf8(&heard[..end]).map_err(|_| HttpError::NotHttp)?;
    let mut lines = head.split("\r\n");
    let status = status_in(lines.next().unwrap_or_default())?;
    let length = length_in(lines)?;
    if length > MAX_ANSWER_BYTES {
        return Err(HttpError::TooLong);
    }
    let body = &heard[end + HEAD_END.len()..];
    Ok(body.get(..length).map(|body| Answer {
        status,
        body: body.to_vec(),
    }))
}

fn status_in(line: &str) -> Result<u16, HttpError> {
    let rest = line.strip_prefix("HTTP/1.").ok_or(HttpError::NotHttp)?;
    let mut words = rest.split(' ').skip(1);
    let word = words.next().filter(|word| word.len() == 3);
    let status = word.and_then(|word| word.parse().ok());
    status
        .filter(|it| (100..600).contains(it))
        .ok_or(HttpError::NotHttp)
}

fn length_in<'a>(lines: impl Iterator<Item = &'a str>) -> Result<usize, HttpError> {
    let mut found = None;
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(HttpError::NotHttp)?;
        if name.eq_ignore_ascii_case("content-length") {
            let length = value.trim().parse().map_err(|_| HttpError::BadLength)?;
            if found.replace(length).is_some() {
                return Err(HttpError::BadLength);
            }
        }
    }
    Ok(found.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REFUSAL: &[u8] =
        b"HTTP/1.1 500 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
                             Content-Type: application/json\r\nContent-Length: 4\r\n\r\n[\"\"]";

    #[test]
    fn an_answer_is_complete_with_its_last_byte_and_not_before() {
        for cut in 0..REFUSAL.len() {
            assert_eq!(decode(&REFUSAL[..cut]), Ok(None), "{cut}");
        }
        let whole = Answer {
            status: 500,
            body: b"[\"\"]".to_vec(),
        };
        assert_eq!(decode(REFUSAL), Ok(Some(whole)));
    }

    #[test]
    fn an_answer_without_a_body_ends_with_its_head() {
        let answer = decode(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n").expect("fine");
        assert_eq!(answer.map(|it| (it.status, it.body.len())), Some((204, 0)));
    }

    #[test]
    fn nonsense_is_refused_and_never_waited_for() {
        for (heard, err) in [
            (&b"SSH-2.0\r\n\r\n"[..], HttpError::NotHttp),
            (b"HTTP/1.1 20x \r\n\r\n", HttpError::NotHttp),
            (b"HTTP/1.1 200 \r\nno colon\r\n\r\n", HttpError::NotHttp),
            (
                b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
                HttpError::BadLength,
            ),
            (
                b"HTTP/1.1 200 \r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\nab",
                HttpError::BadLength,
            ),
            (
                b"HTTP/1.1 200 \r\nContent-Length: 1048577\r\n\r\n",
                HttpError::TooLong,
            ),
        ] {
            assert_eq!(decode(heard), Err(err), "{heard:?}");
        }
        assert_eq!(decode(&[b'x'; MAX_HEAD_BYTES]), Err(HttpError::NotHttp));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(heard in prop::collection::vec(any::<u8>(), 0..300)) {
            let _outcome = decode(&heard);
        }

        #[test]
        fn a_body_of_any_bytes_comes_back(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut heard = format!("HTTP/1.1 200 OK\r\ncontent-LENGTH: {}\r\n\r\n", body.len()).into_bytes();
            heard.extend(&body);
            prop_assert_eq!(decode(&heard), Ok(Some(Answer { status: 200, body })));
        }
    }
}
