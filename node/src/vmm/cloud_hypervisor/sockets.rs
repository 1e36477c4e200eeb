//! Sockets of one VMM's own, without a lasting name.
//!
//! Cloud Hypervisor listens on a descriptor for its API, and *connects* or *binds* by a path for a
//! hand-over. Names in a file system would outlive a killed shim, and could be taken by others. So
//! a socket is bound in a directory of its own, remembered by a descriptor of its inode, and its
//! name removed at once: whoever holds the descriptor reaches it as `/proc/self/fd/<n>`, nobody
//! else does. Where the VMM itself has to bind there is a directory for as long as that takes.
//!
//! Those directories are made inside the sandbox's own. A shim that is killed while there is one
//! leaves it, and it goes with the sandbox. They are reached by a descriptor, never by their path,
//! which may be longer than an address of a socket.

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
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, socket};
use nix::unistd::{Gid, Uid, fchownat};
use tempfile::TempDir;

use crate::vmm::process::poll_timeout;

/// What a socket is called for the moment that it has a name.
const NAME: &str = "s";
/// What the name of a directory for a socket begins with: whoever finds one that was left knows whose
/// it is.
const PREFIX: &str = "wrenn-ch-";
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
    /// Makes one, which has a name in a directory of its own inside `home` until this returns.
    ///
    /// # Errors
    /// The kernel or the disk refused.
    pub fn bind(home: &Path) -> io::Result<Self> {
        let place = Meeting::create(home)?;
        let path = place.socket();
        let listener = UnixListener::bind(&path)?;
        // Only a reference: a socket cannot be opened.
        let inode = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(&path)?;
        place.home.close()?;
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

/// Connects to the socket at `path`. Where so many wait there already that the kernel takes no more, as
/// with a process that is stopped for long, it is tried until `deadline`.
///
/// # Errors
/// The deadline came first ([`io::ErrorKind::TimedOut`]), or the kernel refused.
pub fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
    let stream = UnixStream::from(socket(family, SockType::Stream, flags, None)?);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The limit of a unix socket's `connect` too. One that does not block says only that there
        // is no room, and `poll` does not tell when there is.
        stream.set_write_timeout(Some(left))?;
        match socket::connect(stream.as_raw_fd(), &address) {
            Ok(()) => return Ok(stream),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
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
    /// Makes one inside `home`, that only this user may enter.
    ///
    /// # Errors
    /// The disk refused.
    pub fn create(home: &Path) -> io::Result<Self> {
        let home = tempfile::Builder::new().prefix(PREFIX).tempdir_in(home)?;
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

    /// The socket in it, for this process.
    fn socket(&self) -> PathBuf {
        path_of(self.dir()).join(NAME)
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
        let path = self.socket();
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_nameless_socket_is_reached_by_its_descriptor_and_by_nothing_else() {
        let home = tempfile::tempdir().expect("tempdir");
        let socket = Nameless::bind(home.path()).expect("bound");
        let left = std::fs::read_dir(home.path()).expect("listed").count();
        assert_eq!(left, 0, "it has a name");
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

    /// A listener that takes nobody in, and before which one waits: there is room for no other.
    #[test]
    fn a_crowded_socket_is_waited_for_until_the_deadline_and_no_longer() {
        let home = tempfile::tempdir().expect("tempdir");
        let path = home.path().join(NAME);
        let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
        let crowded = socket(family, SockType::Stream, flags, None).expect("made");
        let address = UnixAddr::new(&path).expect("short");
        socket::bind(crowded.as_raw_fd(), &address).expect("bound");
        let none = socket::Backlog::new(0).expect("a length");
        socket::listen(&crowded, none).expect("listening");
        let soon = || Instant::now() + Duration::from_secs(10);
        let _first = connect(&path, soon()).expect("there is room for one");
        let began = Instant::now();
        let brief = Duration::from_millis(50);
        let late = connect(&path, began + brief).expect_err("no room");
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        assert!((brief..Duration::from_secs(5)).contains(&began.elapsed()));
        let listener = UnixListener::from(crowded);
        // Listens on until both are done.
        let taken_in = std::thread::spawn(move || listener.accept().map(|_| listener));
        connect(&path, soon()).expect("there is room again");
        taken_in.join().expect("no panic").expect("accepted");
    }

    #[test]
    fn a_meeting_is_waited_for_and_leaves_nothing() {
        let sandbox = tempfile::tempdir().expect("tempdir");
        // Longer than an address may be.
        let sandbox = sandbox.path().join("d".repeat(200));
        std::fs::create_dir(&sandbox).expect("made");
        let meeting = Meeting::create(&sandbox).expect("made");
        let (alive, _theirs) = UnixStream::pair().expect("a pair");
        let connect = || meeting.connect(alive.as_fd(), Instant::now());
        let late = connect().expect_err("nobody");
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let url = meeting.url(None);
        let path = PathBuf::from(url.strip_prefix("unix:").expect("a path"));
        let _bound = UnixListener::bind(&path).expect("bound");
        connect().expect("met");
        let home = meeting.path().to_owned();
        assert_eq!(home.parent(), Some(sandbox.as_path()));
        drop(meeting);
        assert!(!home.exists());
    }
}
