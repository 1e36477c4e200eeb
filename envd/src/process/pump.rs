//! Moves what a process writes to its listeners.
//!
//! Normally a pipe ends when the process does. A descendant that inherited it (a server started in
//! the background) keeps it open, though, and must not keep the caller waiting: once the process is
//! reaped, the pump takes what is in the pipe, waits [`DRAIN_GRACE`] at most for stragglers, and
//! lets the end event go. From then on output is read and dropped, so that the descendant is not
//! killed by a broken pipe.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::time::{Instant, timeout};

use super::output::{Channel, Fanout};
use super::reap::ExitWatch;

/// Largest chunk of standard output or error, as clients know it.
const PIPE_CHUNK_BYTES: usize = 32 * 1024;
/// Largest chunk of terminal output.
const TERMINAL_CHUNK_BYTES: usize = 16 * 1024;
/// How long, in all, an ended process's pipe is waited on while a descendant holds it open. Long
/// enough for `cmd > >(filter)` on a slow guest, short enough not to be felt.
const DRAIN_GRACE: Duration = Duration::from_millis(500);
/// Most that is taken from a pipe after the process ended: the largest capacity a pipe may have by
/// default. What comes beyond was written by someone else.
const DRAIN_BYTES: usize = 1024 * 1024;

/// Where output comes from.
#[derive(Debug)]
pub enum Source {
    /// One of the two output pipes.
    Pipe(pipe::Receiver),
    /// The master side of a terminal.
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl Source {
    /// A pipe's read end.
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub fn pipe(end: impl Into<OwnedFd>) -> io::Result<Self> {
        pipe::Receiver::from_owned_fd(end.into()).map(Self::Pipe)
    }

    fn chunk_bytes(&self) -> usize {
        match self {
            Self::Pipe(_) => PIPE_CHUNK_BYTES,
            Self::Terminal(_) => TERMINAL_CHUNK_BYTES,
        }
    }

    /// Reads what there is; 0 at the end. Dropping the future loses nothing.
    async fn read(&mut self, buffer: &mut [u8]) -> usize {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await.unwrap_or(0),
            Self::Terminal(master) => read_terminal(master, buffer).await.unwrap_or(0),
        }
    }
}

async fn read_terminal(master: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = master.readable().await?;
        let read = |fd: &AsyncFd<OwnedFd>| nix::unistd::read(fd, buffer).map_err(io::Error::from);
        match ready.try_io(read) {
            // The last holder of the slave side closed it.
            Ok(Err(err)) if err.raw_os_error() == Some(Errno::EIO as i32) => return Ok(0),
            Ok(done) => return done,
            Err(_would_block) => {}
        }
    }
}

/// Publishes everything from `source` and returns when no more belongs to the process.
pub async fn run(mut source: Source, channel: Channel, fanout: Arc<Fanout>, mut exit: ExitWatch) {
    let mut buffer = vec![0; source.chunk_bytes()];
    loop {
        let filled = tokio::select! {
            filled = source.read(&mut buffer) => filled,
            _ = exit.wait_for(Option::is_some) => break,
        };
        if filled == 0 {
            return;
        }
        fanout
            .publish(channel, Bytes::copy_from_slice(&buffer[..filled]))
            .await;
    }
    if !drain(&mut source, &mut buffer, channel, &fanout).await {
        tokio::spawn(async move { while source.read(&mut buffer).await > 0 {} });
    }
}

/// Takes what an ended process left behind; `false` when somebody else still holds the pipe.
async fn drain(source: &mut Source, buffer: &mut [u8], channel: Channel, fanout: &Fanout) -> bool {
    let mut room = DRAIN_BYTES;
    let mut grace = DRAIN_GRACE;
    while room > 0 {
        // Only waiting counts against the grace, not a slow listener.
        let asked = Instant::now();
        let Ok(filled) = timeout(grace, source.read(buffer)).await else {
            return false;
        };
        if filled == 0 {
            return true;
        }
        grace = grace.saturating_sub(asked.elapsed());
        room = room.saturating_sub(filled);
        fanout
            .publish(channel, Bytes::copy_from_slice(&buffer[..filled]))
            .await;
    }
    false
}
