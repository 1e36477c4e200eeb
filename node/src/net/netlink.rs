//! One conversation with the kernel over netlink: a request, and its acknowledgement.
//!
//! Blocking, because the kernel answers a request before `send` returns. A socket belongs to the
//! namespace its thread was in when it was opened, and stays there.

use std::io;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::Socket;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};

/// Longest wait for an answer that the kernel has in fact already queued: past it, it never comes.
const ANSWER_TIMEOUT_S: i64 = 5;
/// Room for one datagram of answers. We ask for nothing larger than an acknowledgement.
const ANSWER_BYTES: usize = 16 * 1024;
/// Size of a netlink message's header.
pub(super) const HEADER_BYTES: usize = 16;
/// Message type of an acknowledgement; its error number is zero when all went well.
const NLMSG_ERROR: u16 = 2;

/// A netlink socket of the namespace it was opened in.
pub(super) struct Conversation {
    socket: Socket,
    sequence: u32,
}

impl Conversation {
    /// Talks about links, addresses and routes of the calling thread's namespace.
    pub(super) fn about_routes() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE)
    }

    /// Talks about nftables of the calling thread's namespace.
    pub(super) fn about_netfilter() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        // A refusal then quotes the header of what it refuses, not all of it.
        socket.set_cap_ack(true)?;
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(ANSWER_TIMEOUT_S),
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends one request and waits for the kernel's verdict on it.
    pub(super) fn request(&mut self, body: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(body);
        debug_assert!(matches!(message.payload, NetlinkPayload::InnerMessage(_)));
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.send(&bytes, self.sequence)
    }

    /// Sends ready-made messages and waits for the verdict on the one numbered `last`, or for
    /// the first refusal of any of them.
    pub(super) fn send(&mut self, bytes: &[u8], last: u32) -> io::Result<()> {
        self.socket.send(bytes, 0)?;
        loop {
            let mut answer = Vec::with_capacity(ANSWER_BYTES);
            self.socket.recv(&mut answer, 0)?;
            if let Some(verdict) = verdict(&answer, last) {
                return verdict;
            }
        }
    }
}

/// The outcome that a datagram of answers decides, if it does.
fn verdict(answer: &[u8], last: u32) -> Option<io::Result<()>> {
    let mut rest = answer;
    while let Some((header, _)) = rest.split_first_chunk::<HEADER_BYTES>() {
        let length = usize::try_from(read_u32(header, 0)?).ok()?;
        let message = rest.get(..length)?;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if kind == NLMSG_ERROR {
            // Negated by the kernel, as an errno.
            let errno = read_u32(message, HEADER_BYTES)?
                .cast_signed()
                .wrapping_neg();
            if errno != 0 {
                return Some(Err(io::Error::from_raw_os_error(errno)));
            }
            if read_u32(header, 8)? == last {
                return Some(Ok(()));
            }
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(sequence: u32, errno: i32) -> Vec<u8> {
        let mut bytes = 36_u32.to_ne_bytes().to_vec();
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend([0, 0]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend((-errno).to_ne_bytes());
        bytes.extend([0; 16]);
        bytes
    }

    #[test]
    fn only_the_last_acknowledgement_ends_the_wait() {
        assert!(verdict(&ack(1, 0), 2).is_none());
        assert!(verdict(&[ack(1, 0), ack(2, 0)].concat(), 2).is_some_and(|v| v.is_ok()));
    }

    #[test]
    fn any_refusal_ends_the_wait_with_its_errno() {
        let refusal = verdict(&ack(1, libc::EEXIST), 9)
            .expect("decided")
            .expect_err("refused");
        assert_eq!(refusal.raw_os_error(), Some(libc::EEXIST));
    }

    #[test]
    fn a_torn_answer_decides_nothing() {
        let whole = ack(1, libc::EPERM);
        for cut in 0..20 {
            assert!(verdict(&whole[..cut], 1).is_none(), "{cut}");
        }
    }
}
