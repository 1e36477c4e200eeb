//! What a process can be fed through, and how.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

use crate::sys;

/// The writing side of a process's standard input.
#[derive(Debug)]
pub enum Input {
    /// The process was started without one, or it has been closed.
    Closed,
    /// A pipe.
    Pipe(pipe::Sender),
    /// A terminal's master side.
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

/// Why input was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// Standard input is a null device or was closed.
    #[error("standard input is not open")]
    Closed,
    /// Terminal input for a pipe or the other way round.
    #[error("process was started {0}")]
    WrongKind(&'static str),
    /// The process no longer reads.
    #[error("write to the process")]
    Write(#[source] io::Error),
}

/// One piece of input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// For a pipe.
    Stdin(Vec<u8>),
    /// For a terminal.
    Terminal(Vec<u8>),
}

impl Input {
    /// Writes all of `piece`, waiting while the process does not read.
    ///
    /// # Errors
    /// [`FeedError`] says whether the caller or the process is at fault.
    pub async fn feed(&mut self, piece: &Piece) -> Result<(), FeedError> {
        match (self, piece) {
            (Self::Pipe(pipe), Piece::Stdin(data)) => {
                pipe.write_all(data).await.map_err(FeedError::Write)
            }
            (Self::Terminal(master), Piece::Terminal(data)) => {
                write_terminal(master, data).await.map_err(FeedError::Write)
            }
            (Self::Closed, Piece::Stdin(_)) => Err(FeedError::Closed),
            (Self::Terminal(_), Piece::Stdin(_)) => Err(FeedError::WrongKind("with a terminal")),
            (Self::Pipe(_) | Self::Closed, Piece::Terminal(_)) => {
                Err(FeedError::WrongKind("without a terminal"))
            }
        }
    }

    /// Closes a pipe so that the process reads the end of its input. Closing twice is fine.
    ///
    /// # Errors
    /// [`FeedError::WrongKind`] for a terminal, which has no end of input.
    pub fn close(&mut self) -> Result<(), FeedError> {
        if matches!(self, Self::Terminal(_)) {
            return Err(FeedError::WrongKind("with a terminal"));
        }
        *self = Self::Closed;
        Ok(())
    }
}

async fn write_terminal(master: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = master.writable().await?;
        let write = |fd: &AsyncFd<OwnedFd>| nix::unistd::write(fd, data).map_err(io::Error::from);
        if let Ok(written) = ready.try_io(write) {
            data = &data[written?..];
        }
    }
    Ok(())
}

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

impl TerminalSize {
    /// Applies the size to a terminal.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn apply(self, terminal: impl AsFd) -> io::Result<()> {
        let size = libc::winsize {
            ws_row: self.rows,
            ws_col: self.cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        sys::resize_terminal(terminal.as_fd(), &size)
    }
}
