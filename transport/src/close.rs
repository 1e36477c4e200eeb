//! Why one end closed a connection or reset a stream: numbers on the wire, names everywhere else.
//!
//! Zero is left out on purpose: quinn sends it when a handle is dropped without a word, and that
//! must never look like a decision. A number is never given a second meaning.

use std::fmt;

use quinn::VarInt;

macro_rules! close_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// A reason for closing a connection or a stream.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum CloseCode {
            $($(#[$doc])* $name,)*
            /// A reason of a later version, or the silent zero.
            Unknown(u64),
        }

        impl CloseCode {
            /// Every reason that has a name.
            pub const NAMED: &'static [Self] = &[$(Self::$name),*];

            /// The number on the wire.
            #[must_use]
            pub const fn code(self) -> u64 {
                match self {
                    $(Self::$name => $code,)*
                    Self::Unknown(code) => code,
                }
            }

            /// The reason behind a number.
            #[must_use]
            pub const fn from_code(code: u64) -> Self {
                match code {
                    $($code => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }

            /// The reason in words, without the number.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Unknown(_) => "closed for a reason this version does not know",
                }
            }
        }
    };
}

close_codes! {
    /// The node is shutting down in good order.
    Stopping = 1, "node is stopping";
    /// The key is not on the member list.
    NotMember = 2, "key is not a member of this cluster";
    /// The key was on the member list until just now.
    Removed = 3, "node was removed from the cluster";
    /// A join was tried while no token is outstanding.
    NoJoinOpen = 4, "no join token is outstanding";
    /// The protocol asked for is not served on this endpoint.
    UnknownProtocol = 5, "protocol is not served here";
    /// Too many unproven connections, from one address or in all.
    Crowded = 6, "too many unproven connections";
    /// A mesh connection began with something else than a hello, or with nothing.
    HelloExpected = 7, "connection did not begin with a hello";
    /// No protocol version that both ends speak.
    VersionMismatch = 8, "no common protocol version";
    /// A newer connection between the same two nodes took this one's place.
    Superseded = 9, "a newer connection took this one's place";
    /// A node dialled its own key.
    DialledSelf = 10, "node dialled itself";
    /// A join connection did more than the one call it has.
    JoinMisuse = 11, "join connection may make one call only";
    /// The one call of a join connection has been answered.
    JoinDone = 12, "join call has been answered";
    /// A frame announced more bytes than allowed.
    FrameTooLarge = 20, "frame exceeds the size limit";
    /// A stream ended inside a frame.
    FrameTruncated = 21, "stream ended inside a frame";
    /// The bytes of a frame are not the message they should be, or more followed them.
    FrameGarbage = 22, "frame is not a valid message";
    /// The other end neither sent nor read for too long.
    Stalled = 23, "stream made no progress in time";
    /// The caller gave up.
    Cancelled = 24, "call was given up by its caller";
    /// The handler ended without an answer.
    HandlerFailed = 25, "handler ended without an answer";
    /// More datagrams than allowed; they are dropped and the connection stays.
    Flood = 28, "datagrams come too fast";
    /// A byte stream was dropped before its end.
    Abandoned = 27, "stream was dropped before its end";
    /// The peer was not heard of any more on its control connection.
    Silent = 29, "peer fell silent";
    /// An answer was dropped because earlier ones are not being read.
    SlowReader = 26, "answers are read too slowly";
}

impl CloseCode {
    /// The code as quinn wants it.
    #[must_use]
    pub fn varint(self) -> VarInt {
        // Every named code is tiny, and `Unknown` only ever came from a varint.
        VarInt::from_u64(self.code()).unwrap_or(VarInt::MAX)
    }
}

impl From<VarInt> for CloseCode {
    fn from(code: VarInt) -> Self {
        Self::from_code(code.into_inner())
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.text(), self.code())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_named_code_has_its_own_number_and_none_is_zero() {
        let numbers: HashSet<u64> = CloseCode::NAMED.iter().map(|code| code.code()).collect();
        assert_eq!(numbers.len(), CloseCode::NAMED.len());
        assert!(!numbers.contains(&0));
    }

    #[test]
    fn codes_survive_the_wire_and_strange_ones_stay_visible() {
        for &code in CloseCode::NAMED {
            assert_eq!(CloseCode::from(code.varint()), code);
        }
        let strange = CloseCode::from_code(4711);
        assert_eq!(strange, CloseCode::Unknown(4711));
        assert!(strange.to_string().contains("4711"));
    }
}
