//! Sockets of one VMM's own, without a lasting name.
//!
//! Cloud Hypervisor listens on a descriptor for its API, and *connects* or *binds* by a path for a
//! hand-over. Names in a file system would outlive a killed shim, and could be taken by others. So
//! a socket is bound in a directory of its own, remembered by a descriptor of its inode, and its
//! name removed at once: whoever holds the descriptor reaches it as `/proc/self/fd/<n>`, nobody
//! else does. Where the VMM itself has to bind there is a directory for as long as that takes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Gid, Uid, fchownat};
use tempfile::TempDir;

use crate::vmm::process::poll_timeout;

/// What a socket is called for the moment that it has a name.
const NAME: &str = "s";
/// Pause between two looks for a socket that the VMM makes: it takes a millisecond or two, which is
/// a part of every resume.
const PAUSE: Duration = Duration::from_micros(100);

/// A listening socket without a name.
#[derive(Debug)]
pub struct Nameless {
    listener: UnixListener,
    inode: OwnedFd,
}

impl Nameless {
    /// Makes one.
    ///
    /// # Errors
    /// The kernel or the disk refused.
    pub fn bind() -> io::Result<Self> {
        let home = private_dir()?;
        let path = home.path().join(NAME);
        let listener = UnixListener::bind(&path)?;
        // Only a reference: a socket cannot be opened.
        let inode = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(&path)?;
        home.close()?;
        Ok(Self {
            listener,
            inode: inode.into(),
        })
    }

    /// What it listens with.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// What it is reached by.
    #[must_use]
    pub fn inode(&self) -> BorrowedFd<'_> {
        self.inode.as_fd()
    }

    /// Lets `user` connect to it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn give_to(&self, user: u32) -> io::Result<()> {
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
        let inode = AtFlags::AT_EMPTY_PATH;
        Ok(fchownat(&self.inode, "", Some(user), Some(group), inode)?)
    }

    /// Leaves listening to whoever else has the descriptor: it is reached as long as they live.
    #[must_use]
    pub fn into_inode(self) -> OwnedFd {
        self.inode
    }

    /// Turns away whoever has connected and was not waited for.
    pub fn turn_away(&self) {
        while self.listener.set_nonblocking(true).is_ok() && self.listener.accept().is_ok() {}
    }

    /// The next who connects; `peer` is who may, and becomes readable when it ends.
    ///
    /// # Errors
    /// Nobody had by `deadline` ([`io::ErrorKind::TimedOut`]), `peer` has ended
    /// ([`io::ErrorKind::ConnectionAborted`]), or the kernel refused.
    pub fn accept(&self, peer: BorrowedFd<'_>, deadline: Instant) -> io::Result<UnixStream> {
        self.listener.set_nonblocking(true)?;
        loop {
            match self.listener.accept() {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(err),
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut ready =
                [self.listener.as_fd(), peer].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut ready, poll_timeout(left)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if ready[1].any() == Some(true) && ready[0].any() != Some(true) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
    }
}

/// How the holder of `fd` names it to the kernel.
#[must_use]
pub fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// A directory in which the VMM binds one socket, gone when dropped.
#[derive(Debug)]
pub struct Meeting {
    home: TempDir,
    dir: OwnedFd,
}

impl Meeting {
    /// Makes one.
    ///
    /// # Errors
    /// The disk refused.
    pub fn create() -> io::Result<Self> {
        let home = private_dir()?;
        let dir = File::open(home.path())?.into();
        Ok(Self { home, dir })
    }

    /// To be inherited by the VMM, under this number.
    #[must_use]
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.home.path()
    }

    /// What a VMM calls the place that inherits it, or has it at `mounted` in a root of its own.
    #[must_use]
    pub fn url(&self, mounted: Option<&Path>) -> String {
        let dir = mounted.map_or_else(|| path_of(self.dir()), Path::to_owned);
        format!("unix:{}", dir.join(NAME).display())
    }

    /// Connects, once the VMM has bound. `peer` becomes readable when that ends.
    ///
    /// # Errors
    /// As [`Nameless::accept`].
    pub fn connect(&self, peer: BorrowedFd<'_>, deadline: Instant) -> io::Result<UnixStream> {
        let path = self.home.path().join(NAME);
        loop {
            match UnixStream::connect(&path) {
                Err(err) if not_yet(&err) => {}
                connected => return connected,
            }
            let mut ended = [PollFd::new(peer, PollFlags::POLLIN)];
            if poll(&mut ended, PollTimeout::ZERO)? > 0 {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// Not bound, or bound and not listening.
fn not_yet(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// A directory that only this user may enter.
fn private_dir() -> io::Result<TempDir> {
    tempfile::Builder::new().prefix("wrenn-ch-").tempdir()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_nameless_socket_is_reached_by_its_descriptor_and_by_nothing_else() {
        let socket = Nameless::bind().expect("bound");
        let (alive, theirs) = UnixStream::pair().expect("a pair");
        let late = socket
            .accept(alive.as_fd(), Instant::now())
            .expect_err("nobody");
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let mut ours = UnixStream::connect(path_of(socket.inode())).expect("reached");
        ours.write_all(b"x").expect("written");
        let soon = Instant::now() + Duration::from_secs(5);
        let mut accepted = socket.accept(alive.as_fd(), soon).expect("accepted");
        let mut byte = [0];
        accepted.read_exact(&mut byte).expect("read");
        drop(theirs);
        let gone = socket.accept(alive.as_fd(), soon).expect_err("ended");
        assert_eq!(gone.kind(), io::ErrorKind::ConnectionAborted);
        let inode = socket.into_inode();
        assert!(
            UnixStream::connect(path_of(inode.as_fd())).is_err(),
            "nobody listens"
        );
    }

    #[test]
    fn a_meeting_is_waited_for_and_leaves_nothing() {
        let meeting = Meeting::create().expect("made");
        let (alive, _theirs) = UnixStream::pair().expect("a pair");
        let connect = || meeting.connect(alive.as_fd(), Instant::now());
        let late = connect().expect_err("nobody");
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let url = meeting.url(None);
        let path = PathBuf::from(url.strip_prefix("unix:").expect("a path"));
        let _bound = UnixListener::bind(&path).expect("bound");
        connect().expect("met");
        let home = meeting.home.path().to_owned();
        drop(meeting);
        assert!(!home.exists());
    }
}
