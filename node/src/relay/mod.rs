//! Finding the node that runs a sandbox and carrying bytes to its guest.
//!
//! [`Relay::guest`] answers with a client of the guest agent, whichever node the guest is on; the
//! caller cannot tell the difference. Today every guest is on this node; a relay over the
//! transport joins here, behind the same [`Guest`].

mod error;
mod local;
mod locate;

pub use error::RelayError;
pub use local::{LocalFacts, LocalGuests};
pub use locate::Relay;
