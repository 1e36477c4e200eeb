//! The calling end.

use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, ReadError, WriteError};
use tokio::time::{Instant, timeout_at};

use super::frame::{self, FrameError};
use super::stream::Stream;
use super::wire::{Reply, Request, status};
use super::{Method, RpcError};
use crate::limits::MAX_CALL;

/// Calls `method` of the peer at the other end of `connection`.
///
/// `deadline` bounds everything, waiting for a free stream included, and is cut to [`MAX_CALL`].
/// Dropping the future gives the call up.
pub(crate) async fn call(
    connection: &Connection,
    method: Method,
    body: Bytes,
    deadline: Instant,
    frame_bytes: usize,
) -> Result<Bytes, RpcError> {
    let patience = deadline
        .saturating_duration_since(Instant::now())
        .min(MAX_CALL);
    let request = Request {
        service: method.service.0.into(),
        method: method.number.into(),
        patience_ms: millis(patience),
        body,
    };
    let frame = frame::encode(&request, frame_bytes).map_err(|_| RpcError::TooLarge)?;
    let exchange = exchange(connection, method, frame, frame_bytes);
    let reply = timeout_at(Instant::now() + patience, exchange)
        .await
        .map_err(|_| RpcError::Deadline)??;
    answer(reply, method)
}

async fn exchange(
    connection: &Connection,
    method: Method,
    request: Bytes,
    frame_bytes: usize,
) -> Result<Reply, RpcError> {
    let mut stream = Stream::open(connection).await?;
    // It can only fail on a stream that has ended, which the write will tell.
    let _ended = stream.send.set_priority(method.service.priority());
    stream
        .send
        .write_chunk(request)
        .await
        .map_err(write_failed)?;
    let _ended = stream.send.finish();
    let reply = frame::read_only(&mut stream.recv, frame_bytes)
        .await
        .map_err(read_failed)?;
    stream.done();
    Ok(reply)
}

fn answer(reply: Reply, method: Method) -> Result<Bytes, RpcError> {
    let reason = super::short(reply.reason);
    Err(match reply.status {
        status::OK => return Ok(reply.body),
        status::NOT_SERVED => RpcError::NotServed { method },
        status::REJECTED => RpcError::Rejected { reason },
        status::BUSY => RpcError::Busy,
        status::DEADLINE => RpcError::Deadline,
        status::TOO_LARGE => RpcError::TooLarge,
        // A status of a later version is a failure too.
        _ => RpcError::Failed { reason },
    })
}

fn write_failed(err: WriteError) -> RpcError {
    match err {
        WriteError::Stopped(code) => RpcError::Closed { code: code.into() },
        WriteError::ConnectionLost(err) => err.into(),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => RpcError::Lost {
            source: quinn::ConnectionError::LocallyClosed,
        },
    }
}

/// Finds the peer's reason inside the I/O error that the frame reader saw.
fn read_failed(err: FrameError) -> RpcError {
    let FrameError::Stream { source } = &err else {
        return RpcError::BadAnswer { source: err };
    };
    let cause = source
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<ReadError>());
    match cause {
        Some(ReadError::Reset(code)) => RpcError::Closed {
            code: (*code).into(),
        },
        Some(ReadError::ConnectionLost(err)) => err.clone().into(),
        Some(_) | None => RpcError::BadAnswer { source: err },
    }
}

fn millis(patience: Duration) -> u32 {
    u32::try_from(patience.as_millis()).unwrap_or(u32::MAX)
}
