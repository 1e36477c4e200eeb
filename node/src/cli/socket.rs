//! A WebSocket to a route of the interface.

use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::client::{CONNECT_TIMEOUT, Client, refusal};
use super::error::{CliError, chain};

/// An open one.
pub(super) struct Socket {
    stream: WebSocketStream<TcpStream>,
    base: String,
}

/// What came.
#[derive(Debug)]
pub(super) enum Frame {
    Json(Value),
    Bytes(Bytes),
    /// The node stops; what runs in the guest goes on.
    Away,
}

impl Client {
    /// Opens a WebSocket.
    pub(super) async fn socket(&self, path: &str) -> Result<Socket, CliError> {
        let reach = |err: &(dyn std::error::Error + 'static)| {
            CliError::new(format!("cannot reach {}: {}", self.base(), chain(err)))
                .hint("is the node up? `wrenn dev status` or `wrenn doctor` tell")
        };
        let url = format!("{}{path}", self.base().replacen("http", "ws", 1));
        let mut request = url.into_client_request().map_err(|err| reach(&err))?;
        let headers = request.headers_mut();
        headers.insert("x-api-key", self.key().clone());
        let uri = request.uri();
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let address = (host, uri.port_u16().unwrap_or(80));
        let connected = time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
        let connected = connected.unwrap_or_else(|late| Err(late.into()));
        let stream = connected.map_err(|err| reach(&err))?;
        stream.set_nodelay(true).map_err(|err| reach(&err))?;
        match client_async(request, stream).await {
            Ok((stream, _)) => Ok(Socket {
                stream,
                base: self.base().to_owned(),
            }),
            Err(Error::Http(answer)) => {
                let body = answer.body().as_deref().unwrap_or_default();
                Err(refusal(path, answer.status(), body))
            }
            Err(err) => Err(reach(&err)),
        }
    }
}

impl Socket {
    /// Sends one JSON frame.
    pub(super) async fn say(&mut self, frame: &Value) -> Result<(), CliError> {
        let sent = self.stream.send(Message::text(frame.to_string())).await;
        sent.map_err(|err| self.broken(&err))
    }

    /// Sends bytes as they are.
    pub(super) async fn send(&mut self, bytes: Vec<u8>) -> Result<(), CliError> {
        let sent = self.stream.send(Message::binary(bytes)).await;
        sent.map_err(|err| self.broken(&err))
    }

    /// The next frame; `None` after the last one. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, CliError> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Text(text))) => {
                    let json = serde_json::from_str(&text);
                    return json.map(|it| Some(Frame::Json(it))).map_err(|_| {
                        CliError::new(format!("{} sent a frame that is no JSON", self.base))
                    });
                }
                Some(Ok(Message::Binary(bytes))) => return Ok(Some(Frame::Bytes(bytes))),
                Some(Ok(Message::Close(Some(frame)))) if u16::from(frame.code) == AWAY => {
                    return Ok(Some(Frame::Away));
                }
                None | Some(Ok(Message::Close(_))) => return Ok(None),
                Some(Ok(_)) => {}
                Some(Err(err)) => return Err(self.broken(&err)),
            }
        }
    }

    fn broken(&self, err: &Error) -> CliError {
        CliError::new(format!(
            "the connection to {} broke off: {}",
            self.base,
            chain(err)
        ))
    }
}

/// The code with which a stopping node closes.
const AWAY: u16 = 1001;
