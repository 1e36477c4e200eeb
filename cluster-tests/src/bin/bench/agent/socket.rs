//! A WebSocket of a capsule, as a client holds it.

use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{WebSocketStream, client_async};
use wrenn_cluster_tests::world::World;

use super::kind;
use crate::Outcome;

/// A socket.
pub(crate) struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    /// One about a capsule: `route` follows its id.
    pub(crate) async fn open(world: &World, id: &str, route: &str) -> Outcome<Self> {
        let address = world.url().replace("http://", "");
        let mut request =
            format!("ws://{address}/v1/capsules/{id}/{route}").into_client_request()?;
        let key = world.key().parse()?;
        request.headers_mut().insert("x-api-key", key);
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self(client_async(request, stream).await?.0))
    }

    /// Sends words.
    pub(crate) async fn say(&mut self, words: &Value) -> Outcome {
        let text = Message::text(words.to_string());
        Ok(self.0.send(text).await?)
    }

    /// The next words; bytes are passed over.
    pub(crate) async fn hear(&mut self) -> Outcome<Value> {
        loop {
            if let Message::Text(text) = self.next().await? {
                return Ok(serde_json::from_str(&text)?);
            }
        }
    }

    /// Waits for words of a kind.
    pub(crate) async fn told(&mut self, wanted: &str) -> Outcome {
        loop {
            let told = self.hear().await?;
            match kind(&told) {
                found if found == wanted => return Ok(()),
                "error" => return Err(told.to_string().into()),
                _ => {}
            }
        }
    }

    /// Types a key and waits for its letter.
    pub(crate) async fn type_key(&mut self, key: u8) -> Outcome {
        self.0.send(Message::binary(vec![key])).await?;
        loop {
            match self.next().await? {
                Message::Binary(shown) if shown.contains(&key) => return Ok(()),
                Message::Text(text) if text.contains("exit") => return Err(text.as_str().into()),
                _ => {}
            }
        }
    }

    async fn next(&mut self) -> Outcome<Message> {
        let message = self.0.next().await.ok_or("the socket has ended")?;
        Ok(message?)
    }
}
