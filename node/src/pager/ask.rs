//! Asking the daemon for a chunk, over a unix socket: both halves.
//!
//! A pager that needs a chunk which is not on this node, or whose bytes here are wrong, asks. What
//! the daemon has to fetch from another holder it hands over as it comes, and verifies and stores it
//! while the guest goes on; of what is in the store it says where. The pager believes neither: it
//! hashes what it reads and what it is given, and whoever was given wrong bytes once is told a place
//! the next time, of a chunk that the daemon has verified. One question is under way on a connection at a time.
//!
//! ```text
//! frame     length:u32 (little-endian), then one protobuf message
//! question  version, sandbox, chunk, whether the place known so far held wrong bytes,
//!           whether the chunk itself may be the answer (not from pagers of older releases)
//! answer    a place | the chunk, as packs have it | "not now" and a reason | "gone for good" and a
//!           reason
//! ```
//!
//! The daemon may be restarted at any time. A pager then asks again, as long as it takes: its guest
//! stands still, and nothing but "gone for good" makes it give up.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bytes::Bytes;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::pager::page_map::{Encoding, MAX_STORED_BYTES, Place};
use crate::store::chunk::ChunkId;

/// The words below. A daemon answers those of older releases too: pagers outlive daemons.
const VERSION: u32 = 1;
/// The largest frame: a chunk, or a path, or a reason.
const MAX_FRAME_BYTES: u32 = MAX_STORED_BYTES + 16 * 1024;

/// A pager's question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whose guest waits.
    pub sandbox: String,
    /// What for.
    pub chunk: ChunkId,
    /// The bytes at the place that was known, or answered, are missing or not the chunk's.
    pub spoiled: bool,
    /// The answer may be [`Answer::Here`].
    pub takes_bytes: bool,
}

/// A chunk as packs have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// How to read it.
    pub encoding: Encoding,
    /// What is stored of it.
    pub bytes: Bytes,
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The chunk is in the store now.
    At(Place),
    /// This is the chunk. It may not be in the store yet.
    Here(Stored),
    /// No holder can be reached, or there is no room; asking again may help.
    NotNow(String),
    /// Nobody has it any more. The guest cannot go on.
    Gone(String),
}

/// What was on the wire in a message's place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The stream failed or ended.
    #[error("talk about a chunk")]
    Stream(#[from] io::Error),
    /// The frame is longer than any message.
    #[error("a frame of {found} bytes is longer than {MAX_FRAME_BYTES}")]
    TooLong {
        /// The length it claims.
        found: u32,
    },
    /// The bytes are no message, or one that makes no sense.
    #[error("the message makes no sense: {reason}")]
    Malformed {
        /// In what way.
        reason: &'static str,
    },
}

fn malformed(reason: &'static str) -> AskError {
    AskError::Malformed { reason }
}

/// The messages as they are on the wire.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Question {
        #[prost(uint32, tag = "1")]
        pub(super) version: u32,
        #[prost(string, tag = "2")]
        pub(super) sandbox: String,
        #[prost(bytes = "vec", tag = "3")]
        pub(super) chunk: Vec<u8>,
        #[prost(bool, tag = "4")]
        pub(super) spoiled: bool,
        #[prost(bool, tag = "5")]
        pub(super) takes_bytes: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Answer {
        #[prost(oneof = "Kind", tags = "1, 2, 3, 4")]
        pub(super) kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Kind {
        #[prost(message, tag = "1")]
        At(Place),
        #[prost(string, tag = "2")]
        NotNow(String),
        #[prost(string, tag = "3")]
        Gone(String),
        #[prost(message, tag = "4")]
        Here(Stored),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Stored {
        #[prost(bytes = "bytes", tag = "1")]
        pub(super) bytes: bytes::Bytes,
        #[prost(uint32, tag = "2")]
        pub(super) encoding: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Place {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) pack: Vec<u8>,
        #[prost(uint64, tag = "2")]
        pub(super) offset: u64,
        #[prost(uint32, tag = "3")]
        pub(super) stored_bytes: u32,
        #[prost(uint32, tag = "4")]
        pub(super) encoding: u32,
    }
}

impl Question {
    fn to_wire(&self) -> wire::Question {
        wire::Question {
            version: VERSION,
            sandbox: self.sandbox.clone(),
            chunk: self.chunk.0.to_vec(),
            spoiled: self.spoiled,
            takes_bytes: self.takes_bytes,
        }
    }

    fn from_wire(wire: wire::Question) -> Result<Self, AskError> {
        if wire.version != VERSION {
            return Err(malformed("the question is of another release"));
        }
        let chunk = wire.chunk.try_into();
        let chunk = chunk.map_err(|_| malformed("the chunk's name is none"))?;
        Ok(Self {
            sandbox: wire.sandbox,
            chunk: ChunkId(chunk),
            spoiled: wire.spoiled,
            takes_bytes: wire.takes_bytes,
        })
    }
}

impl Answer {
    fn to_wire(&self) -> wire::Answer {
        let kind = match self {
            Self::At(place) => wire::Kind::At(wire::Place {
                pack: place.pack.as_os_str().as_bytes().to_vec(),
                offset: place.offset,
                stored_bytes: place.stored_bytes,
                encoding: u32::from(place.encoding.code()),
            }),
            Self::Here(stored) => wire::Kind::Here(wire::Stored {
                bytes: stored.bytes.clone(),
                encoding: u32::from(stored.encoding.code()),
            }),
            Self::NotNow(reason) => wire::Kind::NotNow(reason.clone()),
            Self::Gone(reason) => wire::Kind::Gone(reason.clone()),
        };
        wire::Answer { kind: Some(kind) }
    }

    fn from_wire(wire: wire::Answer) -> Result<Self, AskError> {
        Ok(
            match wire.kind.ok_or_else(|| malformed("the answer is empty"))? {
                wire::Kind::NotNow(reason) => Self::NotNow(reason),
                wire::Kind::Gone(reason) => Self::Gone(reason),
                wire::Kind::Here(stored) => {
                    check_length(stored.bytes.len())?;
                    Self::Here(Stored {
                        encoding: encoding(stored.encoding)?,
                        bytes: stored.bytes,
                    })
                }
                wire::Kind::At(place) => {
                    check_length(place.stored_bytes as usize)?;
                    Self::At(Place {
                        pack: Path::new(OsStr::from_bytes(&place.pack)).into(),
                        offset: place.offset,
                        stored_bytes: place.stored_bytes,
                        encoding: encoding(place.encoding)?,
                    })
                }
            },
        )
    }
}

fn check_length(stored_bytes: usize) -> Result<(), AskError> {
    match (1..=MAX_STORED_BYTES as usize).contains(&stored_bytes) {
        true => Ok(()),
        false => Err(malformed("the stored length is none")),
    }
}

fn encoding(code: u32) -> Result<Encoding, AskError> {
    let code = u8::try_from(code).ok();
    code.and_then(Encoding::from_code)
        .ok_or_else(|| malformed("nobody knows the encoding"))
}

fn frame(message: &impl Message) -> Result<Vec<u8>, AskError> {
    let whole = message.encoded_len();
    let length = u32::try_from(whole)
        .ok()
        .filter(|&length| length <= MAX_FRAME_BYTES)
        .ok_or_else(|| malformed("it is longer than a frame"))?;
    let mut frame = Vec::with_capacity(size_of::<u32>() + whole);
    frame.extend(length.to_le_bytes());
    let encoded = message.encode(&mut frame);
    encoded.map_err(|_| malformed("it is longer than it said"))?;
    Ok(frame)
}

fn body_for(header: [u8; 4]) -> Result<Vec<u8>, AskError> {
    let found = u32::from_le_bytes(header);
    match usize::try_from(found) {
        Ok(length) if found <= MAX_FRAME_BYTES => Ok(vec![0; length]),
        _ => Err(AskError::TooLong { found }),
    }
}

fn decode<M: Message + Default>(body: Vec<u8>) -> Result<M, AskError> {
    // Bytes in it are not copied out of the body.
    M::decode(Bytes::from(body)).map_err(|_| malformed("it is no message"))
}

/// The pager's half: asks, and waits for the answer as long as `stream` is set to.
///
/// # Errors
/// See [`AskError`]. The stream is of no further use.
pub fn ask(stream: &mut (impl Read + Write), question: &Question) -> Result<Answer, AskError> {
    send(stream, question)?;
    receive(stream)
}

/// The first part of [`ask`]. It does not wait where nothing else is under way on the stream.
///
/// # Errors
/// See [`AskError`]. The stream is of no further use.
pub fn send(stream: &mut impl Write, question: &Question) -> Result<(), AskError> {
    Ok(stream.write_all(&frame(&question.to_wire())?)?)
}

/// The second part of [`ask`].
///
/// # Errors
/// See [`AskError`]. The stream is of no further use.
pub fn receive(stream: &mut impl Read) -> Result<Answer, AskError> {
    let mut header = [0; 4];
    stream.read_exact(&mut header)?;
    let mut body = body_for(header)?;
    stream.read_exact(&mut body)?;
    Answer::from_wire(decode(body)?)
}

/// The daemon's half: the next question, or `None` when the pager has no more.
///
/// # Errors
/// See [`AskError`]. The stream is of no further use.
pub async fn next_question<S>(stream: &mut S) -> Result<Option<Question>, AskError>
where
    S: AsyncRead + Unpin,
{
    let mut header = [0; 4];
    match stream.read_exact(&mut header).await {
        // Between questions, or just after a pager was killed in one: all the same to the daemon.
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let mut body = body_for(header)?;
    stream.read_exact(&mut body).await?;
    Question::from_wire(decode(body)?).map(Some)
}

/// The daemon's half: answers the question that was read last.
///
/// # Errors
/// See [`AskError`]. The stream is of no further use.
pub async fn answer<S>(stream: &mut S, answer: &Answer) -> Result<(), AskError>
where
    S: AsyncWrite + Unpin,
{
    Ok(stream.write_all(&frame(&answer.to_wire())?).await?)
}

/// The daemon's half of one connection, to its end: every question goes to `find`.
///
/// # Errors
/// See [`AskError`].
pub async fn serve<S, F, A>(stream: &mut S, find: F) -> Result<(), AskError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(Question) -> A,
    A: Future<Output = Answer>,
{
    while let Some(question) = next_question(stream).await? {
        let found = find(question).await;
        answer(stream, &found).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn question() -> Question {
        Question {
            sandbox: "cl-1".to_owned(),
            chunk: ChunkId([7; 32]),
            spoiled: true,
            takes_bytes: true,
        }
    }

    fn place() -> Place {
        Place {
            pack: Path::new("/store/packs/0001.pack").into(),
            offset: 77,
            stored_bytes: 100,
            encoding: Encoding::Zstd,
        }
    }

    #[tokio::test]
    async fn every_answer_arrives_as_it_was_given() {
        let answers = [
            Answer::At(place()),
            Answer::Here(Stored {
                encoding: Encoding::Raw,
                bytes: vec![7; MAX_STORED_BYTES as usize].into(),
            }),
            Answer::NotNow("no holder answers".to_owned()),
            Answer::Gone("no holder is left".to_owned()),
        ];
        for given in answers {
            let (theirs, mut ours) = tokio::net::UnixStream::pair().expect("a pair");
            let mut theirs = theirs.into_std().expect("blocking");
            theirs.set_nonblocking(false).expect("set");
            let asking = std::thread::spawn(move || ask(&mut theirs, &question()));
            serve(&mut ours, |asked| {
                assert_eq!(asked, question());
                let given = given.clone();
                async move { given }
            })
            .await
            .expect("served to the end");
            let got = asking.join().expect("asked").expect("answered");
            assert_eq!(got, given);
        }
    }

    #[test]
    fn answers_that_make_no_sense_are_refused() {
        let refused = |change: fn(&mut wire::Place)| {
            let Some(wire::Kind::At(mut place)) = Answer::At(place()).to_wire().kind else {
                panic!("a place");
            };
            change(&mut place);
            let kind = Some(wire::Kind::At(place));
            Answer::from_wire(wire::Answer { kind }).is_err()
        };
        assert!(refused(|place| place.stored_bytes = 0));
        assert!(refused(|place| place.stored_bytes = MAX_STORED_BYTES + 1));
        assert!(refused(|place| place.encoding = 9));
        assert!(!refused(|_| ()));
        assert!(Answer::from_wire(wire::Answer { kind: None }).is_err());
    }

    #[test]
    fn a_chunk_of_no_length_or_more_than_one_is_refused() {
        let refused = |length: usize, encoding| {
            let bytes = vec![7; length].into();
            let kind = Some(wire::Kind::Here(wire::Stored { bytes, encoding }));
            Answer::from_wire(wire::Answer { kind }).is_err()
        };
        let (raw, whole) = (u32::from(Encoding::Raw.code()), MAX_STORED_BYTES as usize);
        assert!(refused(0, raw));
        assert!(refused(whole + 1, raw));
        assert!(refused(whole, 9));
        assert!(!refused(whole, raw));
    }

    /// Pagers outlive daemons: one of an older release knows places only.
    #[test]
    fn an_older_pager_does_not_take_bytes() {
        let older = wire::Question {
            version: VERSION,
            sandbox: "cl-1".to_owned(),
            chunk: vec![7; 32],
            ..wire::Question::default()
        };
        let heard = Question::from_wire(older).expect("understood");
        assert!(!heard.takes_bytes);
    }

    #[test]
    fn a_frame_past_the_limit_is_refused_before_anything_is_read() {
        let refused = body_for((MAX_FRAME_BYTES + 1).to_le_bytes());
        assert!(matches!(refused, Err(AskError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_either_reader_panic(bytes: Vec<u8>) {
            if let Ok(wire) = decode::<wire::Question>(bytes.clone()) {
                let _ = Question::from_wire(wire);
            }
            if let Ok(wire) = decode::<wire::Answer>(bytes) {
                let _ = Answer::from_wire(wire);
            }
        }
    }
}
