//! Which handler answers which service.
//!
//! Handlers come later than the transport (raft needs the transport to be built, and answers
//! through it), so a service may be registered at any time. Until then its calls are refused by
//! name.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;

use super::{Call, Handler, Method, RpcError, Service};

type Answer<'a> = Pin<Box<dyn Future<Output = Result<Bytes, RpcError>> + Send + 'a>>;

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
