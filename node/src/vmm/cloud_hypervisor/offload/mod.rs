//! The protocol by which Cloud Hypervisor hands a guest to another process and takes it back: its
//! local migration, with the shim as the other side.
//!
//! ```text
//! save      it: Start > MemoryFd x slots > Config > State > Complete | CompletePaused
//! restore   we: Start > MemoryFd x slots > Config > State > CompletePaused
//! ```
//!
//! One request, one answer, strictly in turn, over a stream socket. The guest's memory is never in
//! it: it is a memfd of ours, which the slots name. [`codec`] is the bytes, [`taking`] and
//! [`giving`] what may follow what, both pure; [`link`] moves the bytes, each time with a deadline,
//! since Cloud Hypervisor itself has none.

pub mod codec;
pub mod giving;
pub mod link;
pub mod taking;

use std::io;
use std::time::Duration;

use codec::{CodecError, Command};

/// The newest protocol that we speak; both sides say theirs in `Start`.
pub const PROTOCOL: u16 = 0;
/// The most memory slots that a guest of ours can have: its memory below and above the gap
/// beneath 4 GiB, and some room for layouts to come.
pub const MAX_SLOTS: usize = 8;
/// The largest configuration: 8 KB is usual, half of it the processor's features.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The largest device state: 32 to 52 KB with one virtual CPU, and as much again for each more.
pub const MAX_STATE_BYTES: u64 = 32 << 20;

/// Why a guest was not handed over.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OffloadError {
    /// The other side broke the rules of the protocol.
    #[error("follow the offload protocol")]
    Codec(#[from] CodecError),
    /// It said something that must not come at this point.
    #[error("the VMM sent {command:?} {when}")]
    OutOfTurn {
        /// What it said.
        command: Command,
        /// Where we were.
        when: &'static str,
    },
    /// It speaks another version.
    #[error("the VMM speaks version {found} of the offload protocol, and this release {PROTOCOL}")]
    UnknownProtocol {
        /// Its version.
        found: u16,
    },
    /// A document of it is larger than any of its kind.
    #[error("the VMM announced {bytes} bytes of {what}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Its length.
        bytes: u64,
    },
    /// The slots that it names make no sense.
    #[error("the VMM named memory slot {slot} {what}")]
    Slot {
        /// Which.
        slot: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// It offers memory that is not the guest's.
    #[error("memory slot {slot} is not the memory that the guest was given")]
    ForeignMemory {
        /// Which.
        slot: u32,
    },
    /// It refused.
    #[error("the VMM refused our {command:?}")]
    Refused {
        /// What we had said.
        command: Command,
    },
    /// It went away.
    #[error("the VMM closed the connection while {doing}")]
    Closed {
        /// What we were doing.
        doing: &'static str,
    },
    /// It did not answer in time.
    #[error("the VMM was not done within {waited:?} while {doing}")]
    TimedOut {
        /// What we were doing.
        doing: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// The socket failed.
    #[error("{doing}")]
    Socket {
        /// What we were doing.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}
