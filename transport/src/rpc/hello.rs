//! The first call on every connection: who are you, and which version do we speak?
//!
//! A dialler's handshake is over before the other end has looked at its key, so nothing is proven
//! to it until the hello is answered. Only then do both sides enter the connection in their tables.

use prost::Message;
use quinn::Connection;
use tokio::time::Instant;

use super::stream::Stream;
use super::wire::{Hello, HelloReply, NEWEST, OLDEST, Reply, status};
use super::{Method, RpcError, frame, server};
use crate::close::CloseCode;
use crate::limits::{HELLO_FRAME_BYTES, Limits};

/// Longest product version that is kept of a peer's hello.
const PRODUCT_CHARS: usize = 64;

/// What one side says of itself.
#[derive(Clone, Debug)]
pub struct Own {
    /// The product version.
    pub product: String,
    /// The log index of its member list.
    pub membership_index: u64,
    /// A number of this start alone; never 0.
    pub run: u64,
}

/// What came of a hello.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The protocol version both ends speak.
    pub protocol: u32,
    /// The other end's product version.
    pub product: String,
    /// The log index of the other end's member list.
    pub membership_index: u64,
    /// The other end's number of its start; 0 where it has none.
    pub run: u64,
}

/// Says hello as the dialling side.
pub(crate) async fn say(
    connection: &Connection,
    own: Own,
    deadline: Instant,
    limits: &Limits,
) -> Result<Settled, RpcError> {
    let hello = Hello {
        oldest: OLDEST,
        newest: NEWEST,
        product: own.product,
        membership_index: own.membership_index,
        run: own.run,
    };
    let body = hello.encode_to_vec().into();
    let frame_bytes = limits.frame_bytes;
    let answer = super::call(connection, Method::HELLO, body, deadline, frame_bytes).await?;
    let reply: HelloReply =
        frame::decode(answer).map_err(|source| RpcError::BadAnswer { source })?;
    if !(OLDEST..=NEWEST).contains(&reply.protocol) {
        return Err(RpcError::Closed {
            code: CloseCode::VersionMismatch,
        });
    }
    Ok(Settled {
        protocol: reply.protocol,
        product: reply.product.chars().take(PRODUCT_CHARS).collect(),
        membership_index: reply.membership_index,
        run: reply.run,
    })
}

/// A hello that has been heard and not yet answered.
pub(crate) struct Heard {
    stream: Stream,
    /// What was settled.
    pub(crate) settled: Settled,
}

/// Hears the hello as the accepting side. Anything else as the first call ends the connection; the
/// code says how.
pub(crate) async fn hear(connection: &Connection) -> Result<Heard, CloseCode> {
    let both = connection
        .accept_bi()
        .await
        .map_err(|_| CloseCode::HelloExpected)?;
    let mut stream = Stream::new(both, CloseCode::HelloExpected);
    let request = frame::read_only(&mut stream.recv, HELLO_FRAME_BYTES)
        .await
        .map_err(|err| err.close_code())?;
    if !server::is_hello(&request) {
        return Err(CloseCode::HelloExpected);
    }
    let hello: Hello = frame::decode(request.body).map_err(|err| err.close_code())?;
    let protocol = settle(hello.oldest, hello.newest).ok_or(CloseCode::VersionMismatch)?;
    Ok(Heard {
        stream,
        settled: Settled {
            protocol,
            product: hello.product.chars().take(PRODUCT_CHARS).collect(),
            membership_index: hello.membership_index,
            run: hello.run,
        },
    })
}

impl Heard {
    /// Answers: from here on the dialler knows that it is in.
    pub(crate) async fn answer(mut self, own: Own, limits: &Limits) -> Result<(), CloseCode> {
        let body = HelloReply {
            protocol: self.settled.protocol,
            product: own.product,
            membership_index: own.membership_index,
            run: own.run,
        };
        let reply = Reply {
            status: status::OK,
            body: body.encode_to_vec().into(),
            reason: String::new(),
        };
        let frame = frame::encode(&reply, limits.frame_bytes).map_err(|err| err.close_code())?;
        let written = self.stream.send.write_chunk(frame).await;
        written.map_err(|_| CloseCode::HelloExpected)?;
        let _ended = self.stream.send.finish();
        self.stream.done();
        Ok(())
    }
}

/// The newest version that both this node and a peer speaking `oldest..=newest` know.
fn settle(oldest: u32, newest: u32) -> Option<u32> {
    let best = newest.min(NEWEST);
    (best >= oldest.max(OLDEST)).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_settled_on_or_none() {
        assert_eq!(settle(OLDEST, NEWEST), Some(NEWEST));
        assert_eq!(settle(OLDEST, NEWEST + 7), Some(NEWEST));
        assert_eq!(settle(NEWEST + 1, NEWEST + 7), None);
        assert_eq!(settle(0, OLDEST - 1), None);
        assert_eq!(settle(NEWEST, 0), None);
    }
}
