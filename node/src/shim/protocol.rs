//! Frames on the shim's socket: a length (u32, little-endian) and one protobuf message.
//!
//! Both halves live here, so that neither can drift from the other: blocking reads and writes for
//! the shim, asynchronous ones for the daemon. A frame is small, its length is checked before
//! anything is allocated for it, and an end of the stream between frames is not an error.

use std::io::{self, Read, Write};

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest frame. The largest message is an exit with 4 KiB of complaint in it.
pub const MAX_FRAME_BYTES: u32 = 64 * 1024;

/// What was on the wire in a message's place.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The frame is longer than any message.
    #[error("a frame of {found} bytes is longer than {MAX_FRAME_BYTES}")]
    TooLong {
        /// The length it claims.
        found: u64,
    },
    /// The bytes are no message.
    #[error("decode a frame")]
    Malformed(#[from] prost::DecodeError),
    /// The stream ended inside a frame, or failed.
    #[error("carry a frame")]
    Stream(#[from] io::Error),
}

/// `message` as one frame.
///
/// # Errors
/// It is too long.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    let too_long = || FrameError::TooLong {
        found: length as u64,
    };
    let header = u32::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_FRAME_BYTES)
        .ok_or_else(too_long)?;
    let mut frame = Vec::with_capacity(size_of::<u32>() + length);
    frame.extend_from_slice(&header.to_le_bytes());
    frame.extend_from_slice(&message.encode_to_vec());
    Ok(frame)
}

/// Writes `message` as one frame.
///
/// # Errors
/// The stream failed, or the message is too long.
pub fn write(stream: &mut impl Write, message: &impl Message) -> Result<(), FrameError> {
    Ok(stream.write_all(&encode(message)?)?)
}

/// Reads one message; `None` if the stream ends before its first byte.
///
/// # Errors
/// See [`FrameError`]. The stream is of no further use.
pub fn read<M: Message + Default>(stream: &mut impl Read) -> Result<Option<M>, FrameError> {
    let mut header = [0; size_of::<u32>()];
    let mut read = 0;
    while read < header.len() {
        match stream.read(&mut header[read..])? {
            0 if read == 0 => return Ok(None),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            count => read += count,
        }
    }
    let mut body = vec![0; checked_length(header)?];
    stream.read_exact(&mut body)?;
    Ok(Some(M::decode(body.as_slice())?))
}

/// Writes `message` as one frame.
///
/// # Errors
/// As [`write`].
pub async fn write_async<S>(stream: &mut S, message: &impl Message) -> Result<(), FrameError>
where
    S: AsyncWrite + Unpin,
{
    Ok(stream.write_all(&encode(message)?).await?)
}

/// Reads one message; the end of the stream is an error here: an answer is owed.
///
/// # Errors
/// As [`read`].
pub async fn read_async<M, S>(stream: &mut S) -> Result<M, FrameError>
where
    M: Message + Default,
    S: AsyncRead + Unpin,
{
    let mut header = [0; size_of::<u32>()];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; checked_length(header)?];
    stream.read_exact(&mut body).await?;
    Ok(M::decode(body.as_slice())?)
}

fn checked_length(header: [u8; size_of::<u32>()]) -> Result<usize, FrameError> {
    let found = u32::from_le_bytes(header);
    usize::try_from(found)
        .ok()
        .filter(|_| found <= MAX_FRAME_BYTES)
        .ok_or(FrameError::TooLong {
            found: u64::from(found),
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::wire::shim as wire;

    use super::*;

    #[test]
    fn a_message_survives_its_frame() {
        let exit = wire::Exit {
            code: -1,
            signal: 9,
            ..wire::Exit::default()
        };
        let frame = encode(&exit).expect("small");
        let back = read::<wire::Exit>(&mut frame.as_slice()).expect("readable");
        assert_eq!(back, Some(exit));
    }

    #[test]
    fn a_length_past_the_limit_is_refused_before_anything_is_read() {
        let header = (MAX_FRAME_BYTES + 1).to_le_bytes();
        let refused = read::<wire::Request>(&mut header.as_slice());
        assert!(
            matches!(refused, Err(FrameError::TooLong { .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn an_end_inside_a_frame_is_an_error_and_between_frames_is_not() {
        let frame = encode(&wire::Status {
            shim_pid: 1,
            ..wire::Status::default()
        })
        .expect("small");
        assert!(matches!(read::<wire::Status>(&mut [].as_slice()), Ok(None)));
        for cut in 1..frame.len() {
            let refused = read::<wire::Status>(&mut &frame[..cut]);
            assert!(
                matches!(refused, Err(FrameError::Stream(_))),
                "cut at {cut}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = read::<wire::Request>(&mut bytes.as_slice());
        }
    }
}
