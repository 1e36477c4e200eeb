//! The answering end.
//!
//! Memory held for one connection is bounded: requests under way by a budget of bytes that is
//! taken before a body is read, answers by a second one of the same size; an answer that finds no
//! room because the peer does not read is dropped by name. Every wait has a deadline.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::ids::NodeKey;
use quinn::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span, debug, warn};

use super::frame::{self, FrameError};
use super::stream::Stream;
use super::wire::{Reply, Request, status};
use super::{Call, Method, Router, RpcError, Service};
use crate::close::CloseCode;
use crate::limits::{JOIN_FRAME_BYTES, Limits, MAX_CALL};

/// What answering needs besides the connection.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) router: Arc<Router>,
    pub(crate) limits: Limits,
    /// Largest request: the frame limit, or less for strangers.
    pub(crate) request_max_bytes: usize,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// The budgets of one connection.
#[derive(Clone)]
struct Budget {
    requests: Arc<Semaphore>,
    replies: Arc<Semaphore>,
}

impl Budget {
    fn new(bytes: usize) -> Self {
        let semaphore = || Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        Self {
            requests: semaphore(),
            replies: semaphore(),
        }
    }
}

/// Answers the calls of a peer until the connection ends or the node stops. Calls under way at
/// that moment go on in their own tasks.
pub(crate) async fn serve(server: &Server, peer: NodeKey, connection: &Connection) {
    let budget = Budget::new(server.limits.request_bytes);
    loop {
        let accepted = server
            .stop
            .run_until_cancelled(connection.accept_bi())
            .await;
        let Some(Ok(both)) = accepted else { return };
        let stream = Stream::new(both, CloseCode::HandlerFailed);
        let (own, budget) = (server.clone(), budget.clone());
        let answer = async move { own.answer(peer, stream, budget).await };
        server.tasks.spawn(answer.instrument(Span::current()));
    }
}

/// Answers the one call that a stranger on the join protocol has.
pub(crate) async fn serve_join(server: &Server, peer: NodeKey, connection: &Connection) {
    let one_call = async {
        let both = connection.accept_bi().await.ok()?;
        let stream = Stream::new(both, CloseCode::HandlerFailed);
        let budget = Budget::new(server.limits.request_bytes);
        let narrow = Server {
            request_max_bytes: JOIN_FRAME_BYTES,
            ..server.clone()
        };
        tokio::select! {
            () = narrow.answer_join(peer, stream, budget) => {}
            second = connection.accept_bi() => {
                second.ok()?;
                return Some(CloseCode::JoinMisuse);
            }
        }
        // The answer is on its way; the joiner closes when it has read it.
        Some(match connection.accept_bi().await {
            Ok(_second) => CloseCode::JoinMisuse,
            Err(_closed) => CloseCode::JoinDone,
        })
    };
    let code = match timeout(server.limits.join, one_call).await {
        Ok(code) => code.unwrap_or(CloseCode::JoinDone),
        Err(_) => CloseCode::Stalled,
    };
    connection.close(code.varint(), code.text().as_bytes());
}

impl Server {
    /// Answers one call of a member.
    async fn answer(&self, peer: NodeKey, stream: Stream, budget: Budget) {
        self.answer_if(peer, stream, budget, |_| true).await;
    }

    /// Answers one call of a stranger.
    async fn answer_join(&self, peer: NodeKey, stream: Stream, budget: Budget) {
        let allowed = |service| service == Service::JOIN;
        self.answer_if(peer, stream, budget, allowed).await;
    }

    async fn answer_if(
        &self,
        peer: NodeKey,
        mut stream: Stream,
        budget: Budget,
        allowed: impl Fn(Service) -> bool,
    ) {
        let reading = read_request(&mut stream, self.request_max_bytes, &budget);
        let (request, _held) = match timeout(self.limits.request_read, reading).await {
            Ok(Ok(read)) => read,
            Ok(Err(err)) => return refuse(stream, &err),
            Err(_) => return stream.refuse(CloseCode::Stalled),
        };
        let Some(call) = to_call(peer, request) else {
            return stream.refuse(CloseCode::FrameGarbage);
        };
        let method = call.method;
        let outcome = if allowed(method.service) {
            // Also ends when the connection does.
            let hung_up = stream.send.stopped();
            tokio::select! {
                outcome = self.run(call) => outcome,
                _ = hung_up => return,
            }
        } else {
            Err(RpcError::NotServed { method })
        };
        self.reply(stream, to_reply(outcome), &budget).await;
    }

    async fn run(&self, call: Call) -> Result<Bytes, RpcError> {
        let patience = call.patience;
        timeout(patience, self.router.call(call))
            .await
            .unwrap_or(Err(RpcError::Deadline))
    }

    async fn reply(&self, mut stream: Stream, reply: Reply, budget: &Budget) {
        let frame = match frame::encode(&reply, self.limits.frame_bytes) {
            Ok(frame) => frame,
            Err(err) => {
                warn!(%err, "a handler's answer is too large to send");
                let empty = to_reply(Err(RpcError::TooLarge));
                match frame::encode(&empty, self.limits.frame_bytes) {
                    Ok(frame) => frame,
                    Err(_) => return stream.refuse(CloseCode::FrameTooLarge),
                }
            }
        };
        let Some(_room) = try_room(&budget.replies, frame.len()) else {
            debug!("an answer is dropped: the peer does not read");
            return stream.refuse(CloseCode::SlowReader);
        };
        match timeout(self.limits.reply_write, stream.send.write_chunk(frame)).await {
            Ok(Ok(())) => {
                let _ended = stream.send.finish();
                stream.done();
            }
            // The caller has gone, and the reset tells nobody.
            Ok(Err(_)) => {}
            Err(_) => stream.refuse(CloseCode::Stalled),
        }
    }
}

/// Reads the request and takes its share of the budget, which is held until the answer is out.
async fn read_request(
    stream: &mut Stream,
    max: usize,
    budget: &Budget,
) -> Result<(Request, Option<OwnedSemaphorePermit>), FrameError> {
    let length = frame::read_length(&mut stream.recv, max).await?;
    // Waiting here is bounded by the caller's timeout around the whole read.
    let share = Arc::clone(&budget.requests)
        .acquire_many_owned(permits(length))
        .await
        .ok();
    let body = frame::read_body(&mut stream.recv, length).await?;
    frame::read_end(&mut stream.recv).await?;
    Ok((frame::decode(body)?, share))
}

fn try_room(budget: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    Arc::clone(budget)
        .try_acquire_many_owned(permits(bytes))
        .ok()
}

fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn refuse(stream: Stream, err: &FrameError) {
    debug!(%err, "refusing a call");
    stream.refuse(err.close_code());
}

/// The call in a request; `None` if its numbers are none of ours.
fn to_call(peer: NodeKey, request: Request) -> Option<Call> {
    let service = Service(u16::try_from(request.service).ok()?);
    let number = u16::try_from(request.method).ok()?;
    let patience = Duration::from_millis(request.patience_ms.into()).min(MAX_CALL);
    Some(Call {
        peer,
        method: service.method(number),
        body: request.body,
        patience,
    })
}

fn to_reply(outcome: Result<Bytes, RpcError>) -> Reply {
    let (status, reason) = match outcome {
        Ok(body) => {
            return Reply {
                status: status::OK,
                body,
                reason: String::new(),
            };
        }
        Err(RpcError::NotServed { .. }) => (status::NOT_SERVED, String::new()),
        Err(RpcError::Rejected { reason }) => (status::REJECTED, reason),
        Err(RpcError::Busy) => (status::BUSY, String::new()),
        Err(RpcError::Deadline) => (status::DEADLINE, String::new()),
        Err(RpcError::TooLarge) => (status::TOO_LARGE, String::new()),
        Err(RpcError::Failed { reason }) => (status::FAILED, reason),
        // A handler that called a third node reports what became of that.
        Err(other) => (status::FAILED, other.to_string()),
    };
    Reply {
        status,
        body: Bytes::new(),
        reason: super::short(reason),
    }
}

/// Whether a request is the first one every connection must make.
pub(super) fn is_hello(request: &Request) -> bool {
    request.service == u32::from(Method::HELLO.service.0)
        && request.method == u32::from(Method::HELLO.number)
}
