//! Which handler answers which service.
//!
//! Handlers come later than the transport (raft needs the transport to be built, and answers
//! through it), so a service may be registered at any time. Until then its calls are refused by
//! name.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;

use super::{Call, Handler, Method, RpcError, Service};
use crate::BoxFuture;
use crate::endpoint::Lane;
use crate::streams::{AnyStreamHandler, StreamHandler};

type Answer<'a> = BoxFuture<'a, Result<Bytes, RpcError>>;

/// [`Handler`] in a form that fits into a table.
trait AnyHandler: Send + Sync {
    fn call_boxed(&self, call: Call) -> Answer<'_>;
}

impl<H: Handler> AnyHandler for H {
    fn call_boxed(&self, call: Call) -> Answer<'_> {
        Box::pin(self.call(call))
    }
}

/// The handlers of a node.
#[derive(Default)]
pub(crate) struct Router {
    handlers: RwLock<HashMap<Service, Arc<dyn AnyHandler>>>,
    streams: RwLock<HashMap<(Service, Lane), Arc<dyn AnyStreamHandler>>>,
}

impl Router {
    /// Lets `handler` answer `service` from now on, in place of any earlier one.
    pub(crate) fn register(&self, service: Service, handler: impl Handler) {
        let mut handlers = self
            .handlers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        handlers.insert(service, Arc::new(handler));
    }

    /// Lets `handler` take the byte streams of `service` on `lane` from now on.
    pub(crate) fn register_streams(
        &self,
        service: Service,
        lane: Lane,
        handler: impl StreamHandler,
    ) {
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        streams.insert((service, lane), Arc::new(handler));
    }

    /// Who takes the byte streams of `service` on `lane`.
    pub(crate) fn stream_handler(
        &self,
        service: Service,
        lane: Lane,
    ) -> Option<Arc<dyn AnyStreamHandler>> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.get(&(service, lane)).cloned()
    }

    /// Answers one call.
    pub(crate) async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        if call.method == Method::PING {
            return Ok(call.body);
        }
        let handler = {
            let handlers = self.handlers.read().unwrap_or_else(PoisonError::into_inner);
            handlers.get(&call.method.service).cloned()
        };
        match handler {
            Some(handler) => handler.call_boxed(call).await,
            None => Err(RpcError::NotServed {
                method: call.method,
            }),
        }
    }
}
