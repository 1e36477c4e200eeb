//! Frames: a big-endian u32 length, then that many bytes of one prost message.
//!
//! The length is a claim, not a fact: it is checked against the limit before anything is kept, and
//! memory grows only with bytes that have arrived.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::close::CloseCode;

/// Bytes of the length in front of a frame.
const HEADER_BYTES: usize = 4;
/// Room made at first for a frame, whatever it claims.
const FIRST_ROOM_BYTES: usize = 4 << 10;

/// Why a frame could not be read or made.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It announced, or would have, more bytes than allowed.
    #[error("frame of {bytes} bytes exceeds the limit of {max}")]
    TooLarge {
        /// What it claims to have.
        bytes: usize,
        /// What is allowed.
        max: usize,
    },
    /// The stream ended before the frame did.
    #[error("stream ended {missing} bytes before its frame did")]
    Truncated {
        /// How much was still to come.
        missing: usize,
    },
    /// The bytes are not the message they should be.
    #[error("decode frame")]
    Garbage {
        /// What prost says.
        source: prost::DecodeError,
    },
    /// Something followed the only frame there may be.
    #[error("bytes followed the only frame of a stream")]
    Trailing,
    /// The stream itself failed.
    #[error("read frame")]
    Stream {
        /// How.
        source: io::Error,
    },
}

impl FrameError {
    /// The code by which the sender of such a frame is told.
    #[must_use]
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::TooLarge { .. } => CloseCode::FrameTooLarge,
            Self::Truncated { .. } => CloseCode::FrameTruncated,
            Self::Garbage { .. } | Self::Trailing => CloseCode::FrameGarbage,
            Self::Stream { .. } => CloseCode::Cancelled,
        }
    }
}

/// Reads the length of the next frame and checks it against `max`.
///
/// # Errors
/// [`FrameError::TooLarge`], [`FrameError::Truncated`], [`FrameError::Stream`].
pub async fn read_length<R: AsyncRead + Unpin>(
    reader: &mut R,
    max: usize,
) -> Result<usize, FrameError> {
    let mut header = BytesMut::with_capacity(HEADER_BYTES);
    fill(reader, &mut header, HEADER_BYTES).await?;
    let mut claimed = [0; HEADER_BYTES];
    claimed.copy_from_slice(&header);
    let bytes = usize::try_from(u32::from_be_bytes(claimed)).unwrap_or(usize::MAX);
    if bytes > max {
        return Err(FrameError::TooLarge { bytes, max });
    }
    Ok(bytes)
}

/// Reads the `length` bytes of a frame whose length has been read and judged.
///
/// # Errors
/// [`FrameError::Truncated`], [`FrameError::Stream`].
pub async fn read_body<R: AsyncRead + Unpin>(
    reader: &mut R,
    length: usize,
) -> Result<Bytes, FrameError> {
    let mut body = BytesMut::with_capacity(length.min(FIRST_ROOM_BYTES));
    fill(reader, &mut body, length).await?;
    Ok(body.freeze())
}

/// Makes sure that nothing follows.
///
/// # Errors
/// [`FrameError::Trailing`], [`FrameError::Stream`].
pub async fn read_end<R: AsyncRead + Unpin>(reader: &mut R) -> Result<(), FrameError> {
    let mut more = [0];
    match reader.read(&mut more).await {
        Ok(0) => Ok(()),
        Ok(_) => Err(FrameError::Trailing),
        Err(source) => Err(FrameError::Stream { source }),
    }
}

/// Reads the only frame of a stream as a message.
///
/// # Errors
/// All of [`FrameError`].
pub async fn read_only<M: Message + Default, R: AsyncRead + Unpin>(
    reader: &mut R,
    max: usize,
) -> Result<M, FrameError> {
    let length = read_length(reader, max).await?;
    let body = read_body(reader, length).await?;
    read_end(reader).await?;
    decode(body)
}

/// Reads the next frame as a message and nothing of what follows it.
///
/// # Errors
/// All of [`FrameError`] but [`FrameError::Trailing`].
pub async fn read_next<M: Message + Default, R: AsyncRead + Unpin>(
    reader: &mut R,
    max: usize,
) -> Result<M, FrameError> {
    let length = read_length(reader, max).await?;
    decode(read_body(reader, length).await?)
}

/// The message in a frame's bytes. Fields of type `Bytes` share them instead of copying.
///
/// # Errors
/// [`FrameError::Garbage`].
pub fn decode<M: Message + Default>(body: Bytes) -> Result<M, FrameError> {
    M::decode(body).map_err(|source| FrameError::Garbage { source })
}

/// The frame of a message.
///
/// # Errors
/// [`FrameError::TooLarge`]: the other end would refuse it.
pub fn encode<M: Message>(message: &M, max: usize) -> Result<Bytes, FrameError> {
    let bytes = message.encoded_len();
    let length = match u32::try_from(bytes) {
        Ok(length) if bytes <= max => length,
        Ok(_) | Err(_) => return Err(FrameError::TooLarge { bytes, max }),
    };
    let mut frame = BytesMut::with_capacity(HEADER_BYTES + bytes);
    frame.put_u32(length);
    frame.put_slice(&message.encode_to_vec());
    Ok(frame.freeze())
}

/// Reads until `into` holds exactly `length` bytes.
async fn fill<R: AsyncRead + Unpin>(
    reader: &mut R,
    into: &mut BytesMut,
    length: usize,
) -> Result<(), FrameError> {
    while into.len() < length {
        let missing = length - into.len();
        let mut bounded = (&mut *reader).take(missing as u64);
        match bounded.read_buf(into).await {
            Ok(0) => return Err(FrameError::Truncated { missing }),
            Ok(_) => {}
            Err(source) => return Err(FrameError::Stream { source }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use proptest::prelude::*;
    use tokio::io::ReadBuf;

    use super::*;
    use crate::rpc::wire::Request;

    const MAX: usize = 1 << 10;

    /// A stream that delivers its bytes in the given portions, then ends.
    struct Portions(VecDeque<Vec<u8>>);

    impl Portions {
        fn new(bytes: &[u8], portion: usize) -> Self {
            Self(bytes.chunks(portion.max(1)).map(<[u8]>::to_vec).collect())
        }
    }

    impl AsyncRead for Portions {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if let Some(mut portion) = self.0.pop_front() {
                let rest = portion.split_off(portion.len().min(buf.remaining()));
                buf.put_slice(&portion);
                if !rest.is_empty() {
                    self.0.push_front(rest);
                }
            }
            Poll::Ready(Ok(()))
        }
    }

    fn read(bytes: &[u8], portion: usize) -> Result<Request, FrameError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        runtime.block_on(read_only(&mut Portions::new(bytes, portion), MAX))
    }

    fn request(body: Vec<u8>) -> Request {
        Request {
            service: 7,
            method: 9,
            patience_ms: 100,
            body: body.into(),
            stream: false,
        }
    }

    proptest! {
        #[test]
        fn a_frame_arrives_whole_however_it_is_cut_up(
            body in prop::collection::vec(any::<u8>(), 0..900),
            portion in 1_usize..64,
        ) {
            let sent = request(body);
            let frame = encode(&sent, MAX).expect("fits");
            prop_assert_eq!(read(&frame, portion).expect("whole"), sent);
        }

        #[test]
        fn a_frame_cut_short_is_called_truncated(
            body in prop::collection::vec(any::<u8>(), 0..900),
            cut in any::<prop::sample::Index>(),
            portion in 1_usize..64,
        ) {
            let frame = encode(&request(body), MAX).expect("fits");
            let cut = cut.index(frame.len());
            let err = read(&frame[..cut], portion).expect_err("a part is missing");
            prop_assert_eq!(err.close_code(), CloseCode::FrameTruncated);
        }

        #[test]
        fn any_bytes_end_in_a_message_or_a_named_error(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            portion in 1_usize..64,
        ) {
            if let Err(err) = read(&bytes, portion) {
                prop_assert_ne!(err.close_code(), CloseCode::Cancelled);
            }
        }

        #[test]
        fn a_length_above_the_limit_is_refused_before_any_byte_is_kept(claim in 1025_u32..) {
            let err = read(&claim.to_be_bytes(), 4).expect_err("too large");
            prop_assert_eq!(err.close_code(), CloseCode::FrameTooLarge);
        }
    }

    #[test]
    fn bytes_after_the_only_frame_are_refused() {
        let frame = encode(&request(vec![1]), MAX).expect("fits");
        let err = read(&[&frame[..], &[0]].concat(), 64).expect_err("one byte too many");
        assert!(matches!(err, FrameError::Trailing));
    }

    #[test]
    fn a_message_above_the_limit_is_not_sent() {
        let err = encode(&request(vec![0; MAX]), MAX).expect_err("too large");
        assert!(matches!(err, FrameError::TooLarge { max: MAX, .. }));
    }
}
