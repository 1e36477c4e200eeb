//! Byte streams between peers, beside the calls: relayed guest connections, raft snapshots, pulls.
//!
//! ```text
//! opener    open stream > request frame with the header        ... < one answer frame < bytes
//! acceptor  read header within a deadline > handler accepts, or refuses by name > bytes
//! ```
//!
//! Opening resolves when the other end has accepted, so that a refusal never looks like a stream
//! that broke. From then on both directions carry plain bytes. FIN is said by shutting down; a
//! [`BiStream`] dropped before that resets both directions with a [`crate::CloseCode`], so giving up is
//! felt at the other end whichever side gives up. Nothing is buffered here: a writer waits for
//! QUIC's windows, and so for its reader; one that reads nothing at all is given up in the end.

mod inbound;
mod pipe;

pub(crate) use inbound::Opening;
pub use inbound::{Inbound, StreamHandler};
pub use pipe::{BiStream, StreamReset, StreamStalled, close_code_of};

/// [`StreamHandler`] in a form that fits into a table.
pub(crate) trait AnyStreamHandler: Send + Sync {
    fn open_boxed(&self, inbound: Inbound) -> crate::BoxFuture<'_, ()>;
}

impl<H: StreamHandler> AnyStreamHandler for H {
    fn open_boxed(&self, inbound: Inbound) -> crate::BoxFuture<'_, ()> {
        Box::pin(self.open(inbound))
    }
}
