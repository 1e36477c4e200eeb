//! What a shim and its pager say to each other.
//!
//! A pair of packet sockets: each packet is one JSON document, and the first one, from the shim,
//! carries the descriptors. The end of the stream tells each side that the other is gone.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, sendmsg, shutdown,
    socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::pager::post_copy::Slot;
use crate::pager::prefetch::Fill;
use crate::pager::stats::Stats;
use crate::pager::uffd::{Tracking, sys};

/// The largest packet: a setup with a few paths.
const MAX_PACKET_BYTES: usize = 32 * 1024;

/// All a pager has to know. The descriptors with it: guest memory, page states, the VMM, and where
/// that asks for pages by itself the connection on which it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setup {
    pub(super) vmm_pid: u32,
    pub(super) memory_bytes: u64,
    pub(super) pages: PathBuf,
    pub(super) daemon: PathBuf,
    pub(super) sandbox: String,
    pub(super) working_set: Option<PathBuf>,
    pub(super) record_to: Option<PathBuf>,
    pub(super) fill: Fill,
    pub(super) tracking: Tracking,
    pub(super) takeovers: u64,
    /// Where the guest sees its memory, if its VMM asks for pages by itself.
    pub(super) slots: Option<Vec<Slot>>,
}

/// From shim to pager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToPager {
    /// Serve this. Once, first.
    Setup(Setup),
    /// The guest is ready: save the working set.
    Ready,
    /// Tell the counters.
    Tell,
}

/// From pager to shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromPager {
    /// The VMM's registers are about to be changed: until *serving* a death tears it.
    Injecting,
    /// Faults are served.
    Serving { tracking: Tracking },
    /// The counters.
    Told(Stats),
}

/// One end of the pair.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Both ends; they are closed by `exec`.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(ours), theirs))
    }

    /// The same end once more.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// The end that a pager finds in its standard input's place.
    pub(super) fn of_stdin() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// Sends one message and `fds` with it.
    pub(super) fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let packet = serde_json::to_vec(message)?;
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let with = [ControlMessage::ScmRights(&numbers)];
        let with = if fds.is_empty() { &[] } else { &with[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let part = [IoSlice::new(&packet)];
        sendmsg::<()>(self.0.as_raw_fd(), &part, with, flags, None)?;
        Ok(())
    }

    /// Waits for one message; `None` if the other side is gone.
    pub(super) fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let mut packet = vec![0; MAX_PACKET_BYTES];
        let (length, fds) = loop {
            match sys::receive(self.0.as_fd(), &mut packet) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                received => break received?,
            }
        };
        if length == 0 {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&packet[..length])?, fds)))
    }

    /// Ends the stream in both directions.
    pub(super) fn close(&self) {
        // Fails only where the other side has done so.
        let _already = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptors_and_an_end_is_an_end() {
        let (ours, theirs) = Channel::pair().expect("a pair");
        let theirs = Channel(theirs);
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"shared").expect("written");
        ours.send(&ToPager::Ready, &[file.as_fd(), file.as_fd()])
            .expect("sent");
        ours.send(&ToPager::Tell, &[]).expect("sent");
        drop(ours);

        let (first, fds) = theirs.receive::<ToPager>().expect("fine").expect("there");
        assert_eq!((first, fds.len()), (ToPager::Ready, 2));
        let mut same = File::from(fds.into_iter().next().expect("one"));
        same.rewind().expect("rewound");
        let mut text = String::new();
        same.read_to_string(&mut text).expect("read");
        assert_eq!(text, "shared");

        let (second, fds) = theirs.receive::<ToPager>().expect("fine").expect("there");
        assert_eq!((second, fds.len()), (ToPager::Tell, 0));
        assert!(theirs.receive::<ToPager>().expect("fine").is_none());
        assert!(theirs.send(&FromPager::Injecting, &[]).is_err());
    }
}
