//! Carrying bytes between two streams until both directions have ended or one is broken.
//!
//! An end in one direction is passed on as an end, and the other direction goes on. A failure in
//! either, or the word that the far end has gone, drops both streams, which breaks them: nobody
//! takes half a file for a whole one. Memory is one buffer a direction; a reader that is slow
//! keeps its buffer full, and nothing more is read from the other side.
//!
//! Flowing bytes are use. At most once in [`NOTE_INTERVAL`], and before the bytes are passed on,
//! the sandbox is asked whether it may still be used; one that is about to end says no, and the
//! request breaks before the guest has seen it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Bytes on their way in each direction: a few packets, enough to keep a 10 Gbit/s link busy at
/// the round trip of a rack.
pub(super) const BUFFER_BYTES: usize = 64 << 10;
/// How often flowing bytes count as use: well inside the shortest inactivity timeout, a minute.
pub(super) const NOTE_INTERVAL: Duration = Duration::from_secs(1);

/// Carries bytes between `far` and `near` until both have ended. `use_again` counts the use and
/// says whether the guest may still be used.
pub(super) async fn pump<F, N, U>(far: F, near: N, use_again: U) -> io::Result<(u64, u64)>
where
    F: AsyncRead + AsyncWrite + Unpin,
    N: AsyncRead + AsyncWrite + Unpin,
    U: FnMut() -> bool + Unpin,
{
    let mut near = near;
    let mut far = Noted::new(far, use_again);
    tokio::io::copy_bidirectional_with_sizes(&mut far, &mut near, BUFFER_BYTES, BUFFER_BYTES).await
}

/// A stream whose bytes count as use.
pub(super) struct Noted<S, U> {
    inner: S,
    use_again: U,
    noted: Instant,
}

impl<S, U: FnMut() -> bool> Noted<S, U> {
    /// Counts what flows through `inner`, which has just been opened.
    pub(super) fn new(inner: S, use_again: U) -> Self {
        Self {
            inner,
            use_again,
            // Opening the stream was use.
            noted: Instant::now(),
        }
    }

    fn note(&mut self) -> io::Result<()> {
        if self.noted.elapsed() < NOTE_INTERVAL {
            return Ok(());
        }
        self.noted = Instant::now();
        if (self.use_again)() {
            return Ok(());
        }
        let about_to_end = "the guest is about to end";
        Err(io::Error::new(io::ErrorKind::ConnectionReset, about_to_end))
    }
}

impl<S: AsyncRead + Unpin, U: FnMut() -> bool + Unpin> AsyncRead for Noted<S, U> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if matches!(polled, Poll::Ready(Ok(()))) && buf.filled().len() > before {
            self.note()?;
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin, U: FnMut() -> bool + Unpin> AsyncWrite for Noted<S, U> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        if matches!(polled, Poll::Ready(Ok(count)) if count > 0) {
            self.note()?;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn an_end_in_one_direction_leaves_the_other_open() {
        let (mut client, far) = duplex(64);
        let (near, mut guest) = duplex(64);
        let pumping = tokio::spawn(pump(far, near, || true));
        client.write_all(b"question").await.expect("written");
        client.shutdown().await.expect("ended");
        let mut asked = String::new();
        guest
            .read_to_string(&mut asked)
            .await
            .expect("read to the end");
        assert_eq!(asked, "question");
        guest.write_all(b"answer").await.expect("written");
        drop(guest);
        let mut answer = String::new();
        client
            .read_to_string(&mut answer)
            .await
            .expect("read to the end");
        assert_eq!(answer, "answer");
        assert_eq!(pumping.await.expect("joined").expect("clean"), (8, 6));
    }

    #[tokio::test]
    async fn a_slow_reader_bounds_what_is_taken_from_the_other_side() {
        let (client, far) = duplex(1 << 10);
        let (near, mut guest) = duplex(1 << 10);
        let pumping = tokio::spawn(pump(far, near, || true));
        let mut taken = 0;
        let piece = [7; 1 << 10];
        // Whatever does not fit waits; nobody reads at the other end.
        while let Ok(count) =
            tokio::time::timeout(Duration::from_millis(50), guest.write(&piece)).await
        {
            taken += count.expect("written");
        }
        assert!(taken <= BUFFER_BYTES + (2 << 10) + piece.len(), "{taken}");
        drop(client);
        assert!(pumping.await.expect("joined").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_count_as_use_once_a_second_and_a_no_stops_them() {
        let (mut client, far) = duplex(64);
        let (near, mut guest) = duplex(64);
        let mut uses = 0;
        let pumping = tokio::spawn(pump(far, near, move || {
            uses += 1;
            uses < 3
        }));
        for _ in 0..4 {
            for _ in 0..5 {
                client.write_all(b"x").await.expect("written");
                if guest.read_u8().await.is_err() {
                    assert!(pumping.await.expect("joined").is_err());
                    return;
                }
            }
            tokio::time::advance(NOTE_INTERVAL).await;
        }
        panic!("the third use was let through");
    }
}
