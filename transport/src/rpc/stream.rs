//! A call's stream, which tells the other end when it is dropped half way.
//!
//! quinn *finishes* a stream that is dropped, so that a call given up in the middle of its request
//! would look like a truncated one. Here it is reset with a reason instead.

use quinn::{Connection, RecvStream, SendStream};

use crate::close::CloseCode;

/// Both directions of one call.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
    on_drop: Option<CloseCode>,
}

impl Stream {
    /// Takes over a stream; `on_drop` is what the other end hears unless [`Stream::done`] or
    /// [`Stream::refuse`] comes first.
    pub(crate) fn new((send, recv): (SendStream, RecvStream), on_drop: CloseCode) -> Self {
        Self {
            send,
            recv,
            on_drop: Some(on_drop),
        }
    }

    /// Opens a stream of a call we make.
    pub(crate) async fn open(connection: &Connection) -> Result<Self, quinn::ConnectionError> {
        let both = connection.open_bi().await?;
        Ok(Self::new(both, CloseCode::Cancelled))
    }

    /// The call has run its course.
    pub(crate) fn done(mut self) {
        self.leave();
    }

    /// Leaves both directions as they are when this is dropped.
    pub(crate) fn leave(&mut self) {
        self.on_drop = None;
    }

    /// Ends the call by name.
    pub(crate) fn refuse(mut self, code: CloseCode) {
        self.on_drop = Some(code);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(code) = self.on_drop {
            // Either direction may have ended already; then there is nobody to tell.
            let _ended = self.send.reset(code.varint());
            let _ended = self.recv.stop(code.varint());
        }
    }
}
