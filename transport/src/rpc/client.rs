//! The calling end.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, ReadError, WriteError};
use tokio::time::{Instant, timeout_at};

use super::frame::{self, FrameError};
use super::stream::Stream;
use super::wire::{Reply, Request, STREAM_FRAME_BYTES, status};
use super::{Method, RpcError, Service};
use crate::bulk::pace::Pacer;
use crate::limits::{MAX_CALL, STREAM_ANSWER_BYTES, STREAM_HEADER_BYTES};
use crate::streams::BiStream;

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
    let patience = patience(deadline);
    let request = request(method, patience, body, false);
    let frame = frame::encode(&request, frame_bytes).map_err(|_| RpcError::TooLarge)?;
    let exchange = exchange(connection, method, frame, frame_bytes);
    let reply = timeout_at(Instant::now() + patience, exchange)
        .await
        .map_err(|_| RpcError::Deadline)??;
    answer(reply, method)
}

/// Opens a byte stream of `service`; resolves when the peer has accepted it.
pub(crate) async fn open(
    connection: &Connection,
    service: Service,
    header: Bytes,
    deadline: Instant,
    pacer: Option<Arc<Pacer>>,
    stall: Duration,
) -> Result<BiStream, RpcError> {
    if header.len() > STREAM_HEADER_BYTES {
        return Err(RpcError::TooLarge);
    }
    let patience = patience(deadline);
    let method = service.method(0);
    let request = request(method, patience, header, true);
    let frame = frame::encode(&request, STREAM_FRAME_BYTES).map_err(|_| RpcError::TooLarge)?;
    let opening = async {
        let mut stream = Stream::open(connection).await?;
        let sent = stream.send.write_chunk(frame).await;
        sent.map_err(write_failed)?;
        let reply = frame::read_next(&mut stream.recv, STREAM_ANSWER_BYTES)
            .await
            .map_err(read_failed)?;
        answer(reply, method)?;
        Ok(BiStream::new(stream, pacer, stall))
    };
    timeout_at(Instant::now() + patience, opening)
        .await
        .unwrap_or(Err(RpcError::Deadline))
}

fn patience(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .min(MAX_CALL)
}

fn request(method: Method, patience: Duration, body: Bytes, stream: bool) -> Request {
    Request {
        service: method.service.0.into(),
        method: method.number.into(),
        patience_ms: millis(patience),
        body,
        stream,
    }
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

pub(crate) fn write_failed(err: WriteError) -> RpcError {
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
