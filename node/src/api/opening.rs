//! Which version of HTTP a client speaks: what its first bytes say.
//!
//! A client that knows that we speak HTTP/2 begins with its preface (RFC 9113, 3.4), whose first letters no
//! request of HTTP/1.1 has. What was read to find out is given to whoever reads next.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// What tells the two apart: no method of HTTP/1.1 is called `PRI` (RFC 9113, 11.6).
const PREFACE: &[u8] = b"PRI ";

/// A version of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
}

/// A stream of which the first bytes have been read.
#[derive(Debug)]
pub(super) struct Opened<S> {
    first: Bytes,
    stream: S,
}

/// Reads until it is clear what the client speaks. Whoever calls bounds the time; a stream that ends is one of
/// HTTP/1.1, to whose server an end says the same.
pub(super) async fn opened<S: AsyncRead + Unpin>(
    mut stream: S,
) -> io::Result<(Version, Opened<S>)> {
    let mut first = BytesMut::with_capacity(PREFACE.len());
    let version = loop {
        if !PREFACE.starts_with(&first) {
            break Version::Http1;
        }
        if first.len() == PREFACE.len() {
            break Version::Http2;
        }
        // No more than may still decide.
        let mut rest = [0; PREFACE.len()];
        let wanted = PREFACE.len() - first.len();
        let read = stream.read(&mut rest[..wanted]).await?;
        if read == 0 {
            break Version::Http1;
        }
        first.extend_from_slice(&rest[..read]);
    };
    let first = first.freeze();
    Ok((version, Opened { first, stream }))
}

impl<S: AsyncRead + Unpin> AsyncRead for Opened<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first[..count]);
        self.first.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opened<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// What a client is taken for that sends these pieces and ends, and what is read of it in all.
    async fn taken(pieces: &[&[u8]]) -> (Version, Vec<u8>) {
        // One byte at a time, as slow as a wire can be.
        let (mut client, server) = tokio::io::duplex(1);
        let pieces = pieces.concat();
        let sending = async move {
            client.write_all(&pieces).await.expect("sent");
            drop(client);
        };
        let reading = async {
            let (version, mut stream) = opened(server).await.expect("read");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.expect("read");
            (version, all)
        };
        tokio::join!(sending, reading).1
    }

    #[tokio::test]
    async fn the_preface_alone_is_http_2_and_nothing_that_was_read_is_lost() {
        for (sent, version) in [
            (&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], Version::Http2),
            (b"PROPFIND / HTTP/1.1\r\n\r\n", Version::Http1),
            (b"PRIVATE / HTTP/1.1\r\n\r\n", Version::Http1),
            (b"GET / HTTP/1.1\r\n\r\n", Version::Http1),
            (b"\x16\x03\x01", Version::Http1),
            (b"PR", Version::Http1),
            (b"", Version::Http1),
        ] {
            let whole = taken(&[sent]).await;
            assert_eq!(whole, (version, sent.to_vec()), "{sent:?}");
        }
    }
}
