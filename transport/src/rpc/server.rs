//! The answering end, of calls and of byte streams until they are accepted.
//!
//! Memory held for one connection is bounded: requests under way by a budget of bytes that is
//! taken before a body is read, answers by a second one of the same size; an answer that finds no
//! room because the peer does not read is dropped by name. Every wait has a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use super::wire::{Reply, Request, STREAM_FRAME_BYTES};
use super::{Call, Method, Router, RpcError, Service};
use crate::bulk::pace::Paces;
use crate::close::CloseCode;
use crate::complaints::{Complaints, Subject};
use crate::endpoint::Lane;
use crate::join::JoinChannel;
use crate::limits::{JOIN_ANSWER_BYTES, JOIN_FRAME_BYTES, Limits, MAX_CALL};
use crate::streams::{Inbound, Opening};

/// What answering needs besides the connection.
#[derive(Clone)]
pub(crate) struct Server {
    /// This node's key.
    pub(crate) own: NodeKey,
    pub(crate) router: Arc<Router>,
    pub(crate) limits: Limits,
    pub(crate) complaints: Arc<Complaints>,
    pub(crate) paces: Arc<Paces>,
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

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    /// A member, which may call anything that is served on its lane.
    Member,
    /// A stranger, which has one call of the join service.
    Joiner,
}

/// One connection as what answers its streams sees it.
#[derive(Clone)]
struct Line {
    server: Server,
    peer: NodeKey,
    lane: Lane,
    caller: Caller,
    connection: Connection,
    budget: Budget,
}

/// Answers the calls and streams of a peer until the connection ends or the node stops. Those under
/// way at that moment go on in their own tasks.
pub(crate) async fn serve(server: &Server, lane: Lane, peer: NodeKey, connection: &Connection) {
    let line = Line::new(server, lane, Caller::Member, peer, connection);
    loop {
        let accepted = server
            .stop
            .run_until_cancelled(connection.accept_bi())
            .await;
        let Some(Ok(both)) = accepted else { return };
        let stream = Stream::new(both, CloseCode::HandlerFailed);
        let line = line.clone();
        let answer = async move { line.answer(stream).await };
        server.tasks.spawn(answer.instrument(Span::current()));
    }
}

/// Answers the one call that a stranger on the join protocol has.
pub(crate) async fn serve_join(server: &Server, peer: NodeKey, connection: &Connection) {
    let one_call = async {
        let both = connection.accept_bi().await.ok()?;
        let stream = Stream::new(both, CloseCode::HandlerFailed);
        let line = Line::new(server, Lane::Control, Caller::Joiner, peer, connection);
        tokio::select! {
            () = line.answer(stream) => {}
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

impl Line {
    fn new(
        server: &Server,
        lane: Lane,
        caller: Caller,
        peer: NodeKey,
        connection: &Connection,
    ) -> Self {
        Self {
            server: server.clone(),
            peer,
            lane,
            caller,
            connection: connection.clone(),
            budget: Budget::new(server.limits.request_bytes),
        }
    }

    /// Answers what was opened, whatever it is.
    async fn answer(&self, mut stream: Stream) {
        let reading = self.read_request(&mut stream);
        let (request, held) = match timeout(self.server.limits.request_read, reading).await {
            Ok(Ok(read)) => read,
            Ok(Err(err)) => {
                debug!(%err, "refusing a call");
                return self.refuse(stream, err.close_code());
            }
            Err(_) => return self.refuse(stream, CloseCode::Stalled),
        };
        let streams = request.stream;
        let Some(call) = self.to_call(request) else {
            return self.refuse(stream, CloseCode::FrameGarbage);
        };
        if streams {
            self.answer_stream(stream, call, held).await;
        } else {
            self.answer_call(stream, call).await;
        }
    }

    async fn answer_call(&self, stream: Stream, call: Call) {
        let outcome = if self.may_call(call.method) {
            // Also ends when the connection does.
            let hung_up = stream.send.stopped();
            tokio::select! {
                outcome = self.run(call) => outcome,
                _ = hung_up => return,
            }
        } else {
            Err(RpcError::NotServed {
                method: call.method,
            })
        };
        self.reply(stream, Reply::of(outcome)).await;
    }

    /// Hands a stream to its handler and sees to it that the handler ends with the connection, and
    /// with the opener's patience while the stream is not accepted yet.
    async fn answer_stream(&self, stream: Stream, call: Call, held: Option<OwnedSemaphorePermit>) {
        let answered = Arc::new(AtomicBool::new(false));
        let hung_up = stream.send.stopped();
        let opening = Opening {
            stream,
            held,
            answered: Arc::clone(&answered),
            write: self.server.limits.reply_write,
            stall: self.server.limits.stream_stall,
            pacer: self.server.paces.of(self.lane, self.peer),
        };
        let service = call.method.service;
        let handler = match self.caller {
            Caller::Member => self.server.router.stream_handler(service, self.lane),
            Caller::Joiner => None,
        };
        let Some(handler) = handler else {
            let method = call.method;
            return opening.refuse(RpcError::NotServed { method }).await;
        };
        let inbound = Inbound {
            peer: self.peer,
            service,
            lane: self.lane,
            header: call.body,
            patience: call.patience,
            opening,
        };
        let given_up = async {
            let _gone = hung_up.await;
            if answered.load(Ordering::Acquire) {
                // From here on the handler hears of it through the stream.
                self.connection.closed().await;
            }
        };
        tokio::select! {
            () = handler.open_boxed(inbound) => {}
            () = given_up => {}
        }
    }

    async fn run(&self, call: Call) -> Result<Bytes, RpcError> {
        let patience = call.patience;
        timeout(patience, self.server.router.call(call))
            .await
            .unwrap_or(Err(RpcError::Deadline))
    }

    async fn reply(&self, mut stream: Stream, reply: Reply) {
        let max = self.answer_max_bytes();
        let frame = match frame::encode(&reply, max) {
            Ok(frame) => frame,
            Err(err) => {
                warn!(%err, "a handler's answer is too large to send");
                let empty = Reply::of(Err(RpcError::TooLarge));
                match frame::encode(&empty, max) {
                    Ok(frame) => frame,
                    Err(_) => return stream.refuse(CloseCode::FrameTooLarge),
                }
            }
        };
        let Some(_room) = try_room(&self.budget.replies, frame.len()) else {
            return self.refuse(stream, CloseCode::SlowReader);
        };
        let write = self.server.limits.reply_write;
        match timeout(write, stream.send.write_chunk(frame)).await {
            Ok(Ok(())) => {
                let _ended = stream.send.finish();
                stream.done();
            }
            // The caller has gone, and the reset tells nobody.
            Ok(Err(_)) => {}
            Err(_) => self.refuse(stream, CloseCode::Stalled),
        }
    }

    /// Ends a stream by name. A caller that gave up did nothing wrong.
    fn refuse(&self, stream: Stream, code: CloseCode) {
        if code != CloseCode::Cancelled {
            let who = match self.caller {
                Caller::Member => Subject::Peer(self.peer),
                Caller::Joiner => Subject::Address(self.connection.remote_address().ip()),
            };
            self.server.complaints.about(who, code);
        }
        stream.refuse(code);
    }

    fn may_call(&self, method: Method) -> bool {
        match (self.caller, self.lane) {
            (Caller::Joiner, _) => method.service == Service::JOIN,
            (Caller::Member, Lane::Control) => true,
            (Caller::Member, Lane::Bulk) => method == Method::PING,
        }
    }

    fn request_max_bytes(&self) -> usize {
        match self.caller {
            Caller::Member => self.server.limits.frame_bytes,
            Caller::Joiner => JOIN_FRAME_BYTES,
        }
    }

    fn answer_max_bytes(&self) -> usize {
        match self.caller {
            Caller::Member => self.server.limits.frame_bytes,
            Caller::Joiner => JOIN_ANSWER_BYTES,
        }
    }

    /// Reads the request and takes its share of the budget, which is held until the answer is out.
    async fn read_request(
        &self,
        stream: &mut Stream,
    ) -> Result<(Request, Option<OwnedSemaphorePermit>), FrameError> {
        let length = frame::read_length(&mut stream.recv, self.request_max_bytes()).await?;
        // Waiting here is bounded by the caller's timeout around the whole read.
        let share = Arc::clone(&self.budget.requests)
            .acquire_many_owned(permits(length))
            .await
            .ok();
        let body = frame::read_body(&mut stream.recv, length).await?;
        let request: Request = frame::decode(body)?;
        if !request.stream {
            frame::read_end(&mut stream.recv).await?;
        } else if length > STREAM_FRAME_BYTES {
            return Err(FrameError::TooLarge {
                bytes: length,
                max: STREAM_FRAME_BYTES,
            });
        }
        Ok((request, share))
    }

    /// The call in a request; `None` if its numbers are none of ours.
    fn to_call(&self, request: Request) -> Option<Call> {
        let service = Service(u16::try_from(request.service).ok()?);
        let number = u16::try_from(request.method).ok()?;
        let patience = Duration::from_millis(request.patience_ms.into()).min(MAX_CALL);
        let channel = match service {
            Service::JOIN => JoinChannel::of(&self.connection, self.server.own, self.peer),
            _ => None,
        };
        Some(Call {
            peer: self.peer,
            method: service.method(number),
            body: request.body,
            patience,
            channel,
        })
    }
}

fn try_room(budget: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    Arc::clone(budget)
        .try_acquire_many_owned(permits(bytes))
        .ok()
}

fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Whether a request is the first one every connection must make.
pub(super) fn is_hello(request: &Request) -> bool {
    request.service == u32::from(Method::HELLO.service.0)
        && request.method == u32::from(Method::HELLO.number)
}
