//! A gzip-compressed request body as a stream of plain pieces.
//!
//! Input is fed in small slices, because a slice may inflate a thousandfold: so what is in memory
//! at once stays bounded, whatever a body claims to be.

use std::io::{self, Write};

use axum::body::BodyDataStream;
use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures::{Stream, StreamExt, stream};

/// Compressed bytes decoded in one go; 1,032 times as many plain bytes at the very most.
const SLICE_BYTES: usize = 2 * 1024;

struct Inflating {
    source: BodyDataStream,
    /// What has been received and not been decoded.
    pending: Bytes,
    /// `None` once the end has been checked.
    decoder: Option<MultiGzDecoder<Vec<u8>>>,
}

/// Decodes `source`. A body that is cut off or is not gzip ends in an error.
pub fn gunzip(source: BodyDataStream) -> impl Stream<Item = io::Result<Bytes>> {
    let decoder = Some(MultiGzDecoder::new(Vec::new()));
    let state = Inflating {
        source,
        pending: Bytes::new(),
        decoder,
    };
    stream::try_unfold(state, async |mut state| {
        let piece = state.next().await?;
        Ok(piece.map(|piece| (piece, state)))
    })
}

impl Inflating {
    /// The next plain piece, never empty.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        while let Some(decoder) = &mut self.decoder {
            if self.pending.is_empty() {
                if let Some(received) = self.source.next().await {
                    self.pending = received.map_err(io::Error::other)?;
                } else {
                    decoder.try_finish()?;
                    let rest = std::mem::take(decoder.get_mut());
                    self.decoder = None;
                    return Ok(Some(rest.into()).filter(|rest: &Bytes| !rest.is_empty()));
                }
            }
            let slice = self.pending.split_to(self.pending.len().min(SLICE_BYTES));
            decoder.write_all(&slice)?;
            let plain = std::mem::take(decoder.get_mut());
            if !plain.is_empty() {
                return Ok(Some(plain.into()));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use futures::TryStreamExt;

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(plain).expect("to memory");
        encoder.finish().expect("to memory")
    }

    async fn inflate(body: Vec<u8>) -> io::Result<Vec<u8>> {
        let pieces = body
            .chunks(7_000)
            .map(|piece| Ok::<_, io::Error>(piece.to_vec()));
        let body = Body::from_stream(stream::iter(pieces.collect::<Vec<_>>()));
        let pieces: Vec<Bytes> = gunzip(body.into_data_stream()).try_collect().await?;
        Ok(pieces.concat())
    }

    #[tokio::test]
    async fn what_was_compressed_comes_back() {
        let plain: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(inflate(gzip(&plain)).await.expect("valid"), plain);
        let two = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(inflate(two).await.expect("valid"), b"onetwo");
    }

    #[tokio::test]
    async fn cut_or_foreign_bodies_are_errors() {
        let whole = gzip(&[7; 50_000]);
        for length in [0, 5, whole.len() / 2, whole.len() - 1] {
            assert!(
                inflate(whole[..length].to_vec()).await.is_err(),
                "cut at {length}"
            );
        }
        assert!(
            inflate(b"not gzip at all, not at all".to_vec())
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn a_piece_is_bounded_however_well_it_compresses() {
        let body = Body::from(gzip(&vec![0; 32 << 20]));
        let mut pieces = std::pin::pin!(gunzip(body.into_data_stream()));
        while let Some(piece) = pieces.try_next().await.expect("valid") {
            assert!(
                piece.len() <= SLICE_BYTES * 1_100,
                "{} bytes at once",
                piece.len()
            );
        }
    }
}
