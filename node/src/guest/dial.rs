//! Opening a byte stream to a guest agent, wherever the guest is.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{fmt, io};

use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time;

/// Longest a connection to a guest may take. The path is local, so a guest that has not answered
/// a SYN by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A future that owns what it needs.
pub type DialFuture = Pin<Box<dyn Future<Output = io::Result<GuestStream>> + Send>>;

/// A way to open streams to one guest's agent.
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Opens one stream.
    fn dial(&self) -> DialFuture;
}

/// Dials a guest on this host.
#[derive(Clone, Copy, Debug)]
pub struct TcpDial(pub SocketAddr);

impl Dial for TcpDial {
    fn dial(&self) -> DialFuture {
        let address = self.0;
        Box::pin(async move {
            let connected = time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
            let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            stream.set_nodelay(true)?;
            Ok(GuestStream(Box::new(stream)))
        })
    }
}

/// Anything bytes flow through in both directions.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// An open stream to a guest agent.
pub struct GuestStream(Box<dyn Duplex>);

impl GuestStream {
    /// Wraps any duplex stream, for relays and tests.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Box::new(stream))
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Connection for GuestStream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// A [`Dial`] in the shape the HTTP client wants.
#[derive(Clone, Debug)]
pub(super) struct Connector(pub(super) Arc<dyn Dial>);

impl tower::Service<http::Uri> for Connector {
    type Response = TokioIo<GuestStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let dialled = self.0.dial();
        Box::pin(async move { Ok(TokioIo::new(dialled.await?)) })
    }
}
