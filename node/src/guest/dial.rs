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
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Longest a connection to a guest may take. The path is local, so a guest that has not answered
/// a SYN by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A future that owns what it needs.
pub type DialFuture = Pin<Box<dyn Future<Output = io::Result<GuestStream>> + Send>>;

/// A way to open streams to one guest's agent.
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Opens one stream.
    fn dial(&self) -> DialFuture;

    /// The same guest at another port.
    fn at_port(&self, port: u16) -> Arc<dyn Dial>;
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

    fn at_port(&self, port: u16) -> Arc<dyn Dial> {
        Arc::new(Self(SocketAddr::new(self.0.ip(), port)))
    }
}

/// A [`Dial`] whose streams break when the guest is gone.
///
/// A killed guest closes no connection and its host's end of the link vanishes with it, so a
/// reader would wait for ever; and its address will be another guest's.
#[derive(Clone, Debug)]
pub struct CutDial {
    dial: Arc<dyn Dial>,
    gone: CancellationToken,
}

impl CutDial {
    /// Dials by `dial` until `gone`.
    pub fn new(dial: impl Dial, gone: CancellationToken) -> Self {
        let dial = Arc::new(dial);
        Self { dial, gone }
    }
}

impl Dial for CutDial {
    fn dial(&self) -> DialFuture {
        let (dialling, gone) = (self.dial.dial(), self.gone.clone());
        Box::pin(async move {
            let dialled = gone.run_until_cancelled(dialling).await;
            let inner = dialled.unwrap_or_else(|| Err(guest_gone()))?;
            Ok(GuestStream::new(CutStream {
                inner,
                reader: Box::pin(gone.clone().cancelled_owned()),
                writer: Box::pin(gone.cancelled_owned()),
            }))
        })
    }

    fn at_port(&self, port: u16) -> Arc<dyn Dial> {
        Arc::new(Self {
            dial: self.dial.at_port(port),
            gone: self.gone.clone(),
        })
    }
}

fn guest_gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the guest is gone")
}

/// A stream that breaks when its guest is gone. Each half waits for that by itself, since they
/// may be polled by different tasks.
struct CutStream {
    inner: GuestStream,
    reader: Pin<Box<WaitForCancellationFutureOwned>>,
    writer: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl CutStream {
    /// Pending, unless the guest is gone.
    fn unless_gone<T>(
        gone: &mut Pin<Box<WaitForCancellationFutureOwned>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        gone.as_mut().poll(cx).map(|()| Err(guest_gone()))
    }
}

impl AsyncRead for CutStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // What has arrived is still given out.
        match Pin::new(&mut self.inner).poll_read(cx, buf) {
            Poll::Pending => Self::unless_gone(&mut self.reader, cx),
            ready @ Poll::Ready(_) => ready,
        }
    }
}

impl AsyncWrite for CutStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Self::unless_gone(&mut self.writer, cx) {
            Poll::Pending => Pin::new(&mut self.inner).poll_write(cx, buf),
            broken @ Poll::Ready(_) => broken,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Self::unless_gone(&mut self.writer, cx) {
            Poll::Pending => Pin::new(&mut self.inner).poll_flush(cx),
            broken @ Poll::Ready(_) => broken,
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Closing a socket needs no guest.
        Pin::new(&mut self.inner).poll_shutdown(cx)
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn streams_of_a_guest_that_is_gone_break_and_no_new_one_opens() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let gone = CancellationToken::new();
        let dial = CutDial::new(TcpDial(address), gone.clone());
        let mut stream = dial.dial().await.expect("dialled");
        let (mut silent, _) = listener.accept().await.expect("accepted");
        silent.write_all(b"last").await.expect("written");
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.expect("read");

        let reading = tokio::spawn(async move {
            let read = stream.read_u8().await;
            (read, stream)
        });
        tokio::task::yield_now().await;
        gone.cancel();
        let (read, mut stream) = reading.await.expect("not stuck");
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let written = stream.write_u8(0).await;
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let again = dial.dial().await.map(|_| ());
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
