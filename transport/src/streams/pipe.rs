//! Both directions of an accepted stream, as tokio's I/O traits.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::{ConnectionError, ReadError, WriteError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::bulk::pace::{Paced, Pacer};
use crate::close::CloseCode;
use crate::rpc::stream::Stream;

/// Priority of a stream that goes first; all others have 0.
const FIRST: i32 = 1;

/// A byte stream to a peer.
///
/// Shutting it down says FIN: what was written is delivered even if the stream is dropped then.
/// Dropping it before, or before the peer's FIN was read, resets what is still open with
/// [`CloseCode::Abandoned`]. When the peer does the same, reading and writing fail with
/// [`io::ErrorKind::ConnectionReset`] and a [`StreamReset`] that names its code.
///
/// Writing waits for the peer to read, but not for ever: when it has taken nothing for
/// [`crate::Limits::stream_stall`], writing fails with [`StreamStalled`], and the peer hears
/// [`CloseCode::Stalled`].
#[derive(Debug)]
pub struct BiStream {
    stream: Stream,
    /// Whether our FIN is said, or the direction has failed.
    sent: bool,
    /// Whether the peer's FIN was read, or the direction has failed.
    read: bool,
    on_drop: CloseCode,
    pace: Option<Paced>,
    stall: Duration,
    /// Runs while bytes wait and the peer takes none.
    stalling: Option<Pin<Box<Sleep>>>,
}

impl BiStream {
    pub(crate) fn new(stream: Stream, pacer: Option<Arc<Pacer>>, stall: Duration) -> Self {
        Self {
            stream,
            sent: false,
            read: false,
            on_drop: CloseCode::Abandoned,
            pace: pacer.map(Paced::new),
            stall,
            stalling: None,
        }
    }

    /// Gives the stream up and tells the peer why.
    pub fn abort(mut self, code: CloseCode) {
        self.on_drop = code;
    }

    /// What is written goes out before that of other streams to the same peer on this lane, for a
    /// stream that carries little and that somebody waits for.
    pub fn go_first(&mut self) {
        // It fails only on a direction that has ended.
        let _ended = self.stream.send.set_priority(FIRST);
    }

    /// The outcome of a write, or the stream's end where the peer has taken nothing for too long.
    fn bound_wait(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalling = None;
            return written;
        }
        let stall = self.stall;
        let stalling = self.stalling.get_or_insert_with(|| Box::pin(sleep(stall)));
        ready!(stalling.as_mut().poll(cx));
        self.on_drop = CloseCode::Stalled;
        Poll::Ready(Err(io::Error::other(StreamStalled {
            for_at_least: stall,
        })))
    }
}

impl AsyncRead for BiStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.remaining();
        match this.stream.recv.poll_read_buf(cx, buf) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => {
                this.read |= before > 0 && buf.remaining() == before;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(err)) => {
                this.read = true;
                Poll::Ready(Err(read_failed(err)))
            }
        }
    }
}

impl AsyncWrite for BiStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let allowed = match &mut this.pace {
            Some(pace) => ready!(pace.poll_take(cx, bytes.len())),
            None => bytes.len(),
        };
        let written = Pin::new(&mut this.stream.send).poll_write(cx, &bytes[..allowed]);
        if let Some(pace) = &this.pace {
            let sent = match &written {
                Poll::Ready(Ok(sent)) => *sent,
                Poll::Ready(Err(_)) | Poll::Pending => 0,
            };
            pace.put_back(allowed - sent);
        }
        let written = written.map_err(|err| {
            this.sent = true;
            write_failed(err)
        });
        this.bound_wait(cx, written)
    }

    /// Does nothing: what is written is on its way.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sent {
            this.sent = true;
            // It fails only on a direction that has ended, and then there is nothing left to say.
            let _ended = this.stream.send.finish();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for BiStream {
    fn drop(&mut self) {
        // A reset after the FIN would take back what is not acknowledged yet.
        if !self.sent {
            let _ended = self.stream.send.reset(self.on_drop.varint());
        }
        if !self.read {
            let _ended = self.stream.recv.stop(self.on_drop.varint());
        }
        self.stream.leave();
    }
}

/// The peer ended a stream, or the connection under it, for a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("peer reset the stream: {code}")]
pub struct StreamReset {
    /// Its reason.
    pub code: CloseCode,
}

/// The peer takes no bytes of a stream that has some for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer has read nothing for {for_at_least:?}")]
pub struct StreamStalled {
    /// For how long.
    pub for_at_least: Duration,
}

/// The peer's reason in an error of a [`BiStream`], if the peer had one.
#[must_use]
pub fn close_code_of(err: &io::Error) -> Option<CloseCode> {
    let reset = err.get_ref()?.downcast_ref::<StreamReset>()?;
    Some(reset.code)
}

fn reset(code: CloseCode) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, StreamReset { code })
}

fn read_failed(err: ReadError) -> io::Error {
    match err {
        ReadError::Reset(code) => reset(code.into()),
        ReadError::ConnectionLost(err) => lost(err),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            io::Error::new(io::ErrorKind::NotConnected, err)
        }
    }
}

fn write_failed(err: WriteError) -> io::Error {
    match err {
        WriteError::Stopped(code) => reset(code.into()),
        WriteError::ConnectionLost(err) => lost(err),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => {
            io::Error::new(io::ErrorKind::NotConnected, err)
        }
    }
}

fn lost(err: ConnectionError) -> io::Error {
    match err {
        ConnectionError::ApplicationClosed(close) => reset(close.error_code.into()),
        ConnectionError::TimedOut => io::Error::new(io::ErrorKind::TimedOut, err),
        err => io::Error::new(io::ErrorKind::ConnectionAborted, err),
    }
}
