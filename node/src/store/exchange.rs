//! What two stores say to each other: the words of both ends.
//!
//! ```text
//! fetcher  header: version, what is wanted, snapshot digest
//! holder   manifests only: length u32, signed snapshot | for each of its images: length u32, manifest
//! fetcher  count u16, that many chunk names; again, before the answers are in; count 0 ends it
//! holder   for each name in turn: 0 for one that is not here | encoding u8 (1 raw, 2 zstd),
//!          chunk's bytes u32, stored bytes u32, what is stored
//! ```
//!
//! Integers are big-endian. Chunks travel as they lie in packs: neither end compresses anything for
//! the other, and the fetcher checks what it has unpacked against the name. Nothing here waits with
//! a limit: whoever calls knows how patient to be.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task;

use super::chunk::{CHUNK_BYTES, ChunkId};
use super::codec::Encoding;
use super::snapshot::SnapshotDigest;

/// What this release speaks.
const VERSION: u8 = 2;
/// Bytes of a stream's header.
const HEADER_BYTES: usize = 1 + 1 + 32;
/// Most names in one request: 1 MiB of answers, of which either end holds one request's at most.
/// Smaller ones would be asked for all the time, larger ones split badly among holders.
pub(super) const NAMES_AT_ONCE: usize = 16;

/// Bytes before what is stored of a chunk: its encoding and two lengths.
const HEAD_BYTES: usize = 1 + 4 + 4;

const LACKS: u8 = 0;
const RAW: u8 = 1;
const ZSTD: u8 = 2;

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// The manifests, and then chunks.
    Manifests,
    /// Chunks, as many as there are.
    Chunks,
    /// Single chunks that somebody waits for, now and then; it is kept open between them.
    Urgent,
}

/// What a stream's opener asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Of which snapshot.
    pub digest: SnapshotDigest,
    /// What of it.
    pub wants: Wants,
}

impl Asked {
    /// The header that says so.
    #[must_use]
    pub fn header(&self) -> Vec<u8> {
        let wants = match self.wants {
            Wants::Manifests => 0,
            Wants::Chunks => 1,
            Wants::Urgent => 2,
        };
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend([VERSION, wants]);
        header.extend(self.digest.0);
        header
    }

    /// What a header says; `None` where this release does not understand it.
    #[must_use]
    pub fn read(header: &[u8]) -> Option<Self> {
        let header: &[u8; HEADER_BYTES] = header.try_into().ok()?;
        let [VERSION, wants, digest @ ..] = *header else {
            return None;
        };
        let wants = match wants {
            0 => Wants::Manifests,
            1 => Wants::Chunks,
            2 => Wants::Urgent,
            _ => return None,
        };
        Some(Self {
            digest: SnapshotDigest(digest),
            wants,
        })
    }
}

/// A chunk on its way, as it lies in a pack. Clones share its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// How to read what is stored.
    pub encoding: Encoding,
    /// How long the chunk is.
    pub chunk_bytes: u32,
    /// What is stored of it.
    pub stored: Bytes,
}

/// The answer to one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Here(Carried),
    Lacks,
}

/// Asks for some chunks.
pub(super) async fn write_names(
    wire: &mut (impl AsyncWrite + Unpin),
    names: &[ChunkId],
) -> io::Result<()> {
    let count = u16::try_from(names.len()).map_err(io::Error::other)?;
    // In one piece: a packet, not one for each name.
    let mut request = Vec::with_capacity(2 + names.len() * 32);
    request.extend(count.to_be_bytes());
    names.iter().for_each(|name| request.extend(name.0));
    wire.write_all(&request).await?;
    wire.flush().await
}

/// The next request; nothing in it ends the stream.
pub(super) async fn read_names(wire: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<ChunkId>> {
    let count = usize::from(wire.read_u16().await?);
    if count > NAMES_AT_ONCE {
        return Err(nonsense("a request for too many chunks"));
    }
    let mut names = vec![ChunkId([0; 32]); count];
    for name in &mut names {
        wire.read_exact(&mut name.0).await?;
    }
    Ok(names)
}

/// Gives a chunk, or says that it is not here.
pub(super) async fn write_answer(
    wire: &mut (impl AsyncWrite + Unpin),
    answer: &Answer,
) -> io::Result<()> {
    let Answer::Here(carried) = answer else {
        return wire.write_u8(LACKS).await;
    };
    let encoding = match carried.encoding {
        Encoding::Raw => RAW,
        Encoding::Zstd => ZSTD,
    };
    let stored_bytes = u32::try_from(carried.stored.len()).map_err(io::Error::other)?;
    // In one piece, or the head would go out in a packet of its own.
    let mut whole = Vec::with_capacity(HEAD_BYTES + carried.stored.len());
    whole.push(encoding);
    whole.extend(carried.chunk_bytes.to_be_bytes());
    whole.extend(stored_bytes.to_be_bytes());
    whole.extend_from_slice(&carried.stored);
    wire.write_all(&whole).await
}

/// The answer to one name. No more than a chunk of memory is taken, whatever the peer claims.
pub(super) async fn read_answer(wire: &mut (impl AsyncRead + Unpin)) -> io::Result<Answer> {
    let encoding = match wire.read_u8().await? {
        LACKS => return Ok(Answer::Lacks),
        RAW => Encoding::Raw,
        ZSTD => Encoding::Zstd,
        _ => return Err(nonsense("an answer in an encoding that nobody knows")),
    };
    let chunk_bytes = wire.read_u32().await?;
    let stored_bytes = wire.read_u32().await? as usize;
    let whole = chunk_bytes as usize;
    let fits = (1..=CHUNK_BYTES).contains(&whole) && (1..=whole).contains(&stored_bytes);
    if !fits {
        return Err(nonsense("a chunk that is too long"));
    }
    let mut stored = vec![0; stored_bytes];
    wire.read_exact(&mut stored).await?;
    Ok(Answer::Here(Carried {
        encoding,
        chunk_bytes,
        stored: stored.into(),
    }))
}

/// Sends a manifest.
pub(super) async fn write_part(
    wire: &mut (impl AsyncWrite + Unpin),
    part: &[u8],
) -> io::Result<()> {
    let length = u32::try_from(part.len()).map_err(io::Error::other)?;
    wire.write_u32(length).await?;
    wire.write_all(part).await
}

/// A peer broke the rules.
pub(super) fn nonsense(how: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, how)
}

/// Runs work on the store off the runtime's workers.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    task::spawn_blocking(work).await.map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const DIGEST: SnapshotDigest = SnapshotDigest([7; 32]);

    fn now<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(future)
    }

    #[test]
    fn a_header_says_what_is_wanted_and_one_of_a_later_release_says_nothing() {
        for wants in [Wants::Manifests, Wants::Chunks, Wants::Urgent] {
            let asked = Asked {
                digest: DIGEST,
                wants,
            };
            let header = asked.header();
            assert_eq!(Asked::read(&header), Some(asked));
            let mut later = header.clone();
            later[0] += 1;
            let mut odd = header.clone();
            odd[1] = 3;
            let longer = [&header[..], &[0]].concat();
            for other in [&later[..], &odd, &longer, &header[1..], &[]] {
                assert_eq!(Asked::read(other), None);
            }
        }
    }

    #[test]
    fn an_answer_that_claims_more_than_a_chunk_is_refused_before_memory_is_taken() {
        let head = |encoding: u8, chunk: u32, stored: u32| {
            [&[encoding][..], &chunk.to_be_bytes(), &stored.to_be_bytes()].concat()
        };
        let longest = u32::try_from(CHUNK_BYTES).expect("a chunk is small");
        for claim in [
            head(RAW, longest + 1, 1),
            head(ZSTD, 10, 11),
            head(ZSTD, longest, u32::MAX),
            head(RAW, 0, 0),
            head(RAW, 5, 0),
            head(3, 5, 5),
        ] {
            let refused = now(read_answer(&mut &claim[..])).expect_err("nonsense");
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_request_for_too_many_chunks_is_refused_before_memory_is_taken() {
        let request = u16::MAX.to_be_bytes();
        let refused = now(read_names(&mut &request[..])).expect_err("nonsense");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn answers_survive_the_way(stored in vec(any::<u8>(), 1..500), more in 0_u32..100, zstd: bool) {
            let chunk_bytes = u32::try_from(stored.len()).expect("short") + more;
            let encoding = if zstd { Encoding::Zstd } else { Encoding::Raw };
            let answers = [Answer::Lacks, Answer::Here(Carried { encoding, chunk_bytes, stored: stored.into() })];
            for answer in answers {
                let mut sent = Vec::new();
                now(write_answer(&mut sent, &answer)).expect("room");
                prop_assert_eq!(now(read_answer(&mut &sent[..])).expect("sound"), answer);
                let cut = now(read_answer(&mut &sent[..sent.len() - 1]));
                prop_assert!(cut.is_err());
            }
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = now(read_answer(&mut &bytes[..]));
            let _ = now(read_names(&mut &bytes[..]));
            let _ = Asked::read(&bytes);
        }
    }
}
