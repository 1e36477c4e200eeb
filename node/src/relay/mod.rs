//! Finding the node that runs a sandbox and carrying bytes to its guest.
//!
//! [`Relay::guest`] answers with a client of the guest agent, whichever node the guest is on; the
//! caller cannot tell the difference.
//!
//! ```text
//! here    Relay (locate) > LocalGuests > guest                     it runs here
//!                        > RemoteDial (remote) > Peers ~ ~ ~ .     it runs elsewhere
//! there                           LocalGuests < Server (serve) < ' guest
//! ```
//!
//! What the owner alone knows is asked through the same seam ([`Peers::ask`], answered in
//! `answer.rs`); that a sandbox is used is told in batches (`touch.rs`). Bytes that flow to a guest
//! are counted as use on its own node, by `pump.rs` for others and by `noted.rs` for itself.

mod answer;
mod error;
mod fake;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod local;
mod locate;
mod noted;
mod peers;
mod pump;
mod quic;
mod refusal;
mod remote;
mod samples;
mod serve;
mod touch;
mod wire;

pub use error::RelayError;
pub use fake::InProcessPeers;
pub use local::{LocalFacts, LocalGuests, MemoryFacts, Transfer, Waiting};
pub use locate::Relay;
pub use peers::{NoPeers, PeerError, Peers};
pub use quic::{QuicPeers, QuicRelay, Ways};
pub use serve::{STREAMS_IN_ALL, STREAMS_PER_PEER, Server};
