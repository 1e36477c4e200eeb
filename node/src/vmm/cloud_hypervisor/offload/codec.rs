//! The bytes of the protocol. Pure.
//!
//! ```text
//! request    command u16 | version u16 | 4 bytes not looked at | length u64 | payload
//! response   status u16  | 6 bytes not looked at               | length u64 | payload
//! ```
//!
//! Little-endian. The version stands in `Start` only; elsewhere it is zero and not looked at.
//! `MemoryFd` is announced by plain bytes; its four bytes of slot come in a message of their own,
//! with the descriptor. Whoever reads ahead of the header loses that.

/// Length of either header.
pub const HEADER_BYTES: usize = 16;
/// Length of a slot's number.
pub const SLOT_BYTES: u64 = 4;
/// Length of the range that a page fault names.
pub const RANGE_BYTES: u64 = 16;
/// What the connection for page faults begins with.
pub const FAULT_ROLE: u16 = 2;

/// A request's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// The first request, with the sender's version.
    Start = 1,
    /// The machine's configuration: a JSON document.
    Config = 2,
    /// The devices' and processors' state: a JSON document.
    State = 3,
    /// Pages, inline. Never in a local hand-over.
    Memory = 4,
    /// The guest is to run on the receiver's side.
    Complete = 5,
    /// The sender has given up.
    Abandon = 6,
    /// A slot's memory, as a descriptor.
    MemoryFd = 7,
    /// As `Complete`, but the guest is to stand still.
    CompletePaused = 8,
    /// The receiver's guest misses a page.
    PageFault = 9,
}

impl Command {
    const ALL: [Self; 9] = [
        Self::Start,
        Self::Config,
        Self::State,
        Self::Memory,
        Self::Complete,
        Self::Abandon,
        Self::MemoryFd,
        Self::CompletePaused,
        Self::PageFault,
    ];

    fn of_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|it| *it as u16 == number)
    }
}

/// An answer's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// It was done.
    Ok = 1,
    /// It was not, and will not be.
    Error = 2,
}

/// Bytes that mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// There is no such command.
    #[error("there is no request {found}")]
    UnknownCommand {
        /// Its number.
        found: u16,
    },
    /// There is no such answer.
    #[error("there is no answer {found}")]
    UnknownStatus {
        /// Its number.
        found: u16,
    },
    /// A request of fixed length has another.
    #[error("the request {command:?} has {found} bytes instead of {wanted}")]
    Length {
        /// Which.
        command: Command,
        /// Its length.
        found: u64,
        /// The length of its kind.
        wanted: u64,
    },
    /// An answer that must be empty is not.
    #[error("an answer has {found} bytes, and should have none")]
    FullAnswer {
        /// Its length.
        found: u64,
    },
}

/// What a request begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it is.
    pub command: Command,
    /// The sender's version, where it is `Start`.
    pub version: u16,
    /// How many bytes follow.
    pub length: u64,
}

impl Request {
    /// A request with `length` bytes to follow, of our version.
    #[must_use]
    pub fn new(command: Command, length: u64) -> Self {
        Self {
            command,
            version: super::PROTOCOL,
            length,
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&(self.command as u16).to_le_bytes());
        if self.command == Command::Start {
            bytes[2..4].copy_from_slice(&self.version.to_le_bytes());
        }
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// The request in `bytes`, whose length is the only one its kind may have.
    ///
    /// # Errors
    /// See [`CodecError`].
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, CodecError> {
        let (found, version) = (u16_at(&bytes, 0), u16_at(&bytes, 2));
        let command = Command::of_number(found).ok_or(CodecError::UnknownCommand { found })?;
        let length = length_in(&bytes);
        let wanted = match command {
            Command::Start | Command::Complete | Command::CompletePaused | Command::Abandon => 0,
            Command::MemoryFd => SLOT_BYTES,
            Command::PageFault => RANGE_BYTES,
            Command::Config | Command::State => length,
            // Ranges, with their bytes after them.
            Command::Memory => length - length % RANGE_BYTES,
        };
        if length != wanted {
            return Err(CodecError::Length {
                command,
                found: length,
                wanted,
            });
        }
        let version = if command == Command::Start {
            version
        } else {
            0
        };
        Ok(Self {
            command,
            version,
            length,
        })
    }
}

/// The bytes of an answer that nothing follows.
#[must_use]
pub fn encode_answer(status: Status) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..2].copy_from_slice(&(status as u16).to_le_bytes());
    bytes
}

/// The answer in `bytes`, which nothing may follow.
///
/// # Errors
/// See [`CodecError`].
pub fn decode_answer(bytes: [u8; HEADER_BYTES]) -> Result<Status, CodecError> {
    let found = length_in(&bytes);
    if found != 0 {
        return Err(CodecError::FullAnswer { found });
    }
    match u16_at(&bytes, 0) {
        1 => Ok(Status::Ok),
        2 => Ok(Status::Error),
        found => Err(CodecError::UnknownStatus { found }),
    }
}

fn u16_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn length_in(bytes: &[u8; HEADER_BYTES]) -> u64 {
    let mut length = [0; 8];
    length.copy_from_slice(&bytes[8..]);
    u64::from_le_bytes(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_bytes_are_those_that_cloud_hypervisor_53_writes() {
        let start = Request::new(Command::Start, 0).encode();
        assert_eq!(start, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let slot = Request::new(Command::MemoryFd, SLOT_BYTES).encode();
        assert_eq!(slot, [7, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        let refused = encode_answer(Status::Error);
        assert_eq!(refused, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn lengths_that_a_request_cannot_have_are_refused() {
        for (command, length) in [
            (Command::Start, 1),
            (Command::MemoryFd, 8),
            (Command::MemoryFd, 0),
            (Command::Complete, 16),
            (Command::CompletePaused, u64::MAX),
            (Command::PageFault, 15),
            (Command::Memory, 17),
        ] {
            let bytes = Request::new(command, length).encode();
            let refused = Request::decode(bytes);
            assert!(
                matches!(refused, Err(CodecError::Length { .. })),
                "{command:?} {length}: {refused:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_decoded_is_what_was_meant(bytes: [u8; HEADER_BYTES]) {
            if let Ok(request) = Request::decode(bytes) {
                prop_assert_eq!(Request::decode(request.encode()), Ok(request));
                prop_assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), request.command as u16);
            }
            if let Ok(status) = decode_answer(bytes) {
                prop_assert_eq!(decode_answer(encode_answer(status)), Ok(status));
            }
        }

        #[test]
        fn documents_may_have_any_length(length: u64, version: u16) {
            for command in [Command::Config, Command::State] {
                let request = Request::new(command, length);
                prop_assert_eq!(Request::decode(request.encode()), Ok(Request { version: 0, ..request }));
            }
            let start = Request { version, ..Request::new(Command::Start, 0) };
            prop_assert_eq!(Request::decode(start.encode()), Ok(start));
        }
    }
}
