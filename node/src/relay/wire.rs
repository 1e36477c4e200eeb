//! What two relays say to each other, and the reader that can say no.
//!
//! Everything here came from, or goes to, another node: it is bounded before it is read, and what
//! cannot be read is refused by name.

use std::io;

use bytes::Bytes;
use prost::Message as _;
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::wire::relay as pb;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::refusal::Refusal;

/// The version of everything in `relay.proto`.
pub(super) const VERSION: u32 = 1;
/// Longest header of a stream: ids and numbers, with room for what later versions add.
const HEADER_BYTES: usize = 512;
/// Longest question: [`IDS_PER_QUESTION`] ids of 16 bytes, and their tags.
const QUESTION_BYTES: usize = 64 << 10;
/// Longest verdict. Its explanation is cut to fit.
const VERDICT_BYTES: u16 = 1 << 10;
/// Characters of an explanation that are sent: four bytes each at most, well within a verdict.
const DETAIL_CHARS: usize = 200;
/// Sandboxes in one question.
pub(super) const IDS_PER_QUESTION: usize = 2048;
const _: () = assert!(IDS_PER_QUESTION * 18 < QUESTION_BYTES);

/// The port that means the guest's agent.
const AGENT: u16 = 0;

/// Which guest a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sandbox: SandboxId,
    pub(super) epoch: Epoch,
    /// Where in the guest; its agent, wherever that listens, where there is none.
    pub(super) port: Option<u16>,
}

impl Header {
    pub(super) fn encode(self) -> Bytes {
        let open = pb::Open {
            version: VERSION,
            sandbox: self.sandbox.0.to_vec(),
            epoch: self.epoch.0,
            port: self.port.unwrap_or(AGENT).into(),
        };
        open.encode_to_vec().into()
    }

    pub(super) fn decode(bytes: &Bytes) -> Result<Self, Refusal> {
        if bytes.len() > HEADER_BYTES {
            return Err(Refusal::Garbled("the header is too long".into()));
        }
        let open = pb::Open::decode(bytes.as_ref()).map_err(garbled)?;
        check_version(open.version)?;
        let port = u16::try_from(open.port);
        let port = port.map_err(|_| Refusal::Garbled("there is no such port".into()))?;
        Ok(Self {
            sandbox: sandbox_id(&open.sandbox)?,
            epoch: Epoch(open.epoch),
            port: Some(port).filter(|port| *port != AGENT),
        })
    }
}

/// A question as the owner reads it.
pub(super) fn question(bytes: &Bytes) -> Result<pb::question::Ask, Refusal> {
    if bytes.len() > QUESTION_BYTES {
        return Err(Refusal::Garbled("the question is too long".into()));
    }
    let question = pb::Question::decode(bytes.as_ref()).map_err(garbled)?;
    check_version(question.version)?;
    question
        .ask
        .ok_or_else(|| Refusal::Garbled("nothing this version knows is asked".into()))
}

/// A question as it is sent.
pub(super) fn ask(ask: pb::question::Ask) -> Bytes {
    let question = pb::Question {
        version: VERSION,
        ask: Some(ask),
    };
    question.encode_to_vec().into()
}

/// An answer as it is sent.
pub(super) fn answer(answered: Result<pb::answer::Answer, Refusal>) -> Bytes {
    let answer = answered.unwrap_or_else(|refusal| pb::answer::Answer::Refusal(refusal.into()));
    let answer = pb::Answer {
        answer: Some(answer),
    };
    answer.encode_to_vec().into()
}

/// An answer as the asker reads it.
pub(super) fn answered(bytes: &Bytes) -> Result<pb::answer::Answer, Refusal> {
    let answer = pb::Answer::decode(bytes.as_ref()).map_err(garbled)?;
    match answer.answer {
        Some(pb::answer::Answer::Refusal(refusal)) => Err(refusal.into()),
        Some(answer) => Ok(answer),
        None => Err(Refusal::Garbled("the answer is empty".into())),
    }
}

/// Tells the opener of a stream whether it has the guest.
pub(super) async fn write_verdict<W: AsyncWrite + Unpin>(
    stream: &mut W,
    refusal: Option<Refusal>,
) -> io::Result<()> {
    let verdict = pb::Verdict {
        refusal: refusal.map(Into::into),
    };
    let body = verdict.encode_to_vec();
    let length = u16::try_from(body.len()).map_err(io::Error::other)?;
    let frame = [length.to_be_bytes().as_slice(), &body].concat();
    stream.write_all(&frame).await?;
    stream.flush().await
}

/// Reads whether a stream has the guest at its other end.
pub(super) async fn read_verdict<R: AsyncRead + Unpin>(
    stream: &mut R,
) -> io::Result<Result<(), Refusal>> {
    let length = stream.read_u16().await?;
    if length > VERDICT_BYTES {
        return Ok(Err(Refusal::Garbled("the verdict is too long".into())));
    }
    let mut body = vec![0; usize::from(length)];
    stream.read_exact(&mut body).await?;
    Ok(match pb::Verdict::decode(body.as_slice()) {
        Ok(verdict) => verdict.refusal.map_or(Ok(()), |it| Err(it.into())),
        Err(err) => Err(garbled(err)),
    })
}

/// A sandbox's id as another node sent it.
pub(super) fn sandbox_id(bytes: &[u8]) -> Result<SandboxId, Refusal> {
    let id = bytes.try_into().map(SandboxId);
    id.map_err(|_| Refusal::Garbled("a sandbox id has a wrong length".into()))
}

/// The ids of a question about several sandboxes.
pub(super) fn sandbox_ids(all: &[Vec<u8>]) -> Result<Vec<SandboxId>, Refusal> {
    if all.len() > IDS_PER_QUESTION {
        return Err(Refusal::Garbled("too many sandboxes are asked for".into()));
    }
    all.iter().map(|id| sandbox_id(id)).collect()
}

/// An explanation, cut to what is sent.
pub(super) fn short(detail: &str) -> String {
    detail.chars().take(DETAIL_CHARS).collect()
}

fn check_version(version: u32) -> Result<(), Refusal> {
    match version {
        VERSION => Ok(()),
        other => Err(Refusal::Version(other)),
    }
}

fn garbled(err: prost::DecodeError) -> Refusal {
    Refusal::Garbled(err.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[tokio::test]
    async fn a_verdict_arrives_as_it_was_given_however_long_its_explanation() {
        for refusal in [
            None,
            Some(Refusal::StaleEpoch { newest: Epoch(9) }),
            Some(Refusal::Guest("\u{1f600}".repeat(5000))),
        ] {
            let mut wire = Vec::new();
            write_verdict(&mut wire, refusal.clone())
                .await
                .expect("written");
            let read = read_verdict(&mut wire.as_slice()).await.expect("read");
            match refusal {
                Some(Refusal::Guest(_)) => assert!(matches!(read, Err(Refusal::Guest(_)))),
                other => assert_eq!(read.err(), other),
            }
        }
    }

    #[test]
    fn a_header_with_an_impossible_port_or_of_another_version_is_refused() {
        let open = |version, port| pb::Open {
            version,
            sandbox: vec![1; 16],
            epoch: 1,
            port,
        };
        let decoded = |open: pb::Open| Header::decode(&open.encode_to_vec().into());
        assert!(decoded(open(VERSION, 80)).is_ok());
        assert_eq!(decoded(open(2, 80)), Err(Refusal::Version(2)));
        for port in [65_536, u32::MAX] {
            assert!(matches!(
                decoded(open(VERSION, port)),
                Err(Refusal::Garbled(_))
            ));
        }
    }

    proptest! {
        #[test]
        fn every_header_survives_the_wire(sandbox: [u8; 16], epoch: u64, port in 1_u16.., agent: bool) {
            let port = (!agent).then_some(port);
            let header = Header { sandbox: SandboxId(sandbox), epoch: Epoch(epoch), port };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let bytes = Bytes::from(bytes);
            let _ = Header::decode(&bytes);
            let _ = question(&bytes);
            let _ = answered(&bytes);
        }
    }
}
