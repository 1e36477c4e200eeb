//! HTTP to whatever listens at one port of a guest.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, Error};

use super::dial::{Connector, Dial};
use super::http::{GuestBody, http2_pool, pool};

/// A client of one port, with its pool of connections. Cheap to clone; clones share the pool.
#[derive(Clone, Debug)]
pub struct PortClient {
    http: Client<Connector, GuestBody>,
}

impl PortClient {
    /// A client of the port that `dial` leads to ([`Dial::at_port`]).
    #[must_use]
    pub fn new(dial: &Arc<dyn Dial>) -> Self {
        Self { http: pool(dial) }
    }

    /// The same of a port where HTTP/2 is spoken without asking.
    #[must_use]
    pub fn http2(dial: &Arc<dyn Dial>) -> Self {
        let http = http2_pool(dial);
        Self { http }
    }

    /// Sends a request, whose URI must be absolute. The head of the answer comes as it is.
    ///
    /// # Errors
    /// The port takes no connection ([`Error::is_connect`]), or what listens there broke off.
    pub async fn send(&self, request: Request<GuestBody>) -> Result<Response<Incoming>, Error> {
        self.http.request(request).await
    }
}
