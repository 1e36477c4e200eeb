//! Clients that do not read what they asked for: how long one is waited for, however it is done.
//!
//! An answer that nobody reads holds a place among the requests, its connection, and whatever it is made of: a guest,
//! another node. So a client that takes nothing at all for [`UNREAD_TIMEOUT`] loses it. Who reads slowly, and whom
//! nothing was sent for a while, is left alone: what counts is the time for which something lay ready.
//!
//! ```text
//! HTTP/1.1  one answer at a time: a write that stands still ends the connection   [`Patient`]
//!           (a WebSocket, or another upgrade, has sessions and bounds of its own)
//! HTTP/2    many at once: one that is not read further is broken off alone        [`Unread`]
//! ```

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{self, Instant, Sleep};
use tracing::debug;

/// Longest a client may leave lie what is ready for it. Somebody may look at a page of it meanwhile; and the kernel,
/// which keeps up to 4 MiB for a client that was fast once, takes more only when a third of that was read, so a
/// client may be as slow as 5 KiB/s.
pub(super) const UNREAD_TIMEOUT: Duration = Duration::from_secs(300);
/// How often the answers of a connection are looked at within that time: one is broken off a quarter late at most.
const LOOKS: u32 = 4;
/// From this many answers on, those that are over are forgotten: twice what one connection may have under way.
const FORGET_FROM: usize = 256;

fn gave_up() -> io::Error {
    let why = "the client does not read its answer";
    io::Error::new(io::ErrorKind::TimedOut, why)
}

/// A connection whose writes fail once the other end has taken nothing for so long.
#[derive(Debug)]
pub(super) struct Patient<S> {
    stream: S,
    limit: Duration,
    /// Set where writes are not to be judged: what goes on is no answer any more, or is looked after by itself.
    exempt: Arc<AtomicBool>,
    /// How long the write that stands still may still take.
    standing: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    /// `stream`, until `exempt` is set.
    pub(super) fn new(stream: S, limit: Duration, exempt: Arc<AtomicBool>) -> Self {
        Self {
            stream,
            limit,
            exempt,
            standing: None,
        }
    }

    /// What becomes of a write that came to `outcome`.
    fn judged<T>(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() || self.exempt.load(Ordering::Relaxed) {
            self.standing = None;
            return outcome;
        }
        let limit = self.limit;
        let standing = self
            .standing
            .get_or_insert_with(|| Box::pin(time::sleep(limit)));
        ready!(standing.as_mut().poll(cx));
        Poll::Ready(Err(gave_up()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.judged(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.judged(cx, outcome)
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

/// The answers of one connection of HTTP/2.
#[derive(Clone, Debug)]
pub(super) struct Unread {
    limit: Duration,
    answers: Arc<Mutex<Vec<Weak<Mutex<Answer>>>>>,
}

/// An answer on its way.
#[derive(Debug)]
struct Answer {
    /// What is still to come; none once it was broken off.
    body: Option<Body>,
    /// Since when the client could have read on; none while nothing more is there for it.
    offered_at: Option<Instant>,
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each holder leaves it whole.
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unread {
    /// None yet.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            answers: Arc::default(),
        }
    }

    /// `response`, whose body is broken off, with all that it holds, once it is not read any further.
    pub(super) fn watched(&self, response: Response) -> Response {
        response.map(|body| {
            if body.is_end_stream() {
                return body;
            }
            let answer = Arc::new(Mutex::new(Answer {
                body: Some(body),
                offered_at: Some(Instant::now()),
            }));
            let mut answers = lock(&self.answers);
            if answers.len() >= FORGET_FROM {
                answers.retain(|it| it.strong_count() > 0);
            }
            answers.push(Arc::downgrade(&answer));
            Body::new(Watched(answer))
        })
    }

    /// Breaks off what is not read, for as long as it is polled.
    pub(super) async fn watch(&self) {
        loop {
            time::sleep(self.limit / LOOKS).await;
            lock(&self.answers).retain(|it| {
                let Some(answer) = it.upgrade() else {
                    return false;
                };
                let mut answer = lock(&answer);
                let is_stuck = answer
                    .offered_at
                    .is_some_and(|since| since.elapsed() >= self.limit);
                if is_stuck {
                    debug!(waited = ?self.limit, "an answer was broken off: its client does not read it");
                    answer.body = None;
                }
                !is_stuck
            });
        }
    }
}

/// The body of an answer that somebody looks after.
#[derive(Debug)]
struct Watched(Arc<Mutex<Answer>>);

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut answer = lock(&self.0);
        let Some(body) = &mut answer.body else {
            return Poll::Ready(Some(Err(axum::Error::new(gave_up()))));
        };
        let next = Pin::new(body).poll_frame(cx);
        answer.offered_at = next.is_ready().then(Instant::now);
        next
    }

    fn is_end_stream(&self) -> bool {
        let answer = lock(&self.0);
        answer.body.as_ref().is_some_and(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let answer = lock(&self.0);
        answer
            .body
            .as_ref()
            .map_or_else(SizeHint::default, HttpBody::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use http_body_util::{BodyExt as _, StreamBody};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::sync::mpsc;
    use tokio_util::task::AbortOnDropHandle;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);
    const ALMOST: Duration = Duration::from_secs(59);

    /// Somebody who writes more than there is room for, and the other end.
    fn writer(exempt: bool) -> (AbortOnDropHandle<io::Result<()>>, DuplexStream) {
        let (client, server) = tokio::io::duplex(16);
        let exempt = Arc::new(AtomicBool::new(exempt));
        let mut server = Patient::new(server, LIMIT, exempt);
        let writing = async move { server.write_all(&[0; 64]).await };
        (AbortOnDropHandle::new(tokio::spawn(writing)), client)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_given_up_and_one_that_reads_a_little_is_not() {
        let (writing, _client) = writer(false);
        let began = Instant::now();
        let failed = writing.await.expect("no panic").expect_err("gave up");
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed(), LIMIT);

        let (writing, mut client) = writer(false);
        for _ in 0..48 {
            time::sleep(ALMOST).await;
            client.read_u8().await.expect("a byte");
        }
        writing.await.expect("no panic").expect("all of it");
    }

    #[tokio::test(start_paused = true)]
    async fn what_became_a_websocket_is_waited_for_without_end() {
        let (writing, mut client) = writer(true);
        time::sleep(100 * LIMIT).await;
        let mut all = [0; 64];
        client.read_exact(&mut all).await.expect("all of it");
        writing.await.expect("no panic").expect("all of it");
    }

    /// An answer of which the test sends the pieces, and its body as it is watched.
    fn answer(unread: &Unread) -> (mpsc::Sender<&'static str>, Body) {
        let (sender, receiver) = mpsc::channel(4);
        let pieces =
            futures::stream::unfold(receiver, async |mut receiver: mpsc::Receiver<&str>| {
                let piece = receiver.recv().await?;
                let frame = Frame::data(Bytes::from_static(piece.as_bytes()));
                Some((Ok::<_, io::Error>(frame), receiver))
            });
        let body = Body::new(StreamBody::new(pieces));
        (sender, unread.watched(Response::new(body)).into_body())
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_read_lets_go_of_all_it_holds_and_no_other_does() {
        let unread = Unread::new(LIMIT);
        let watch = unread.clone();
        let _watching = AbortOnDropHandle::new(tokio::spawn(async move { watch.watch().await }));
        let (stuck, mut left) = answer(&unread);
        let (silent, mut read) = answer(&unread);
        stuck.send("one").await.expect("room");
        left.frame().await.expect("a frame").expect("a piece");
        // Whoever asks for more and gets nothing waits for us, and not we for it.
        assert!(read.frame().now_or_never().is_none());

        time::timeout(2 * LIMIT, stuck.closed())
            .await
            .expect("in time");
        let broken = left.frame().await.expect("a word");
        broken.expect_err("it was broken off");
        time::sleep(10 * LIMIT).await;
        silent.send("late").await.expect("room");
        read.frame().await.expect("a frame").expect("a piece");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_never_begun_to_be_read_is_broken_off_too() {
        let unread = Unread::new(LIMIT);
        let (sender, _body) = answer(&unread);
        tokio::select! {
            () = unread.watch() => unreachable!("it has no end"),
            () = sender.closed() => {}
        }
    }

    #[test]
    fn answers_that_are_over_are_forgotten() {
        let unread = Unread::new(LIMIT);
        for _ in 0..10 * FORGET_FROM {
            unread.watched(Response::new(Body::from("x")));
        }
        assert!(lock(&unread.answers).len() <= FORGET_FROM);
        unread.watched(Response::new(Body::empty()));
    }
}
