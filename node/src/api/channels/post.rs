//! One delivery: a signed POST over HTTP/1.1 to an address that was looked at.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use proto::units::Stamp;
use ring::hmac;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::target::{Target, TargetError};
use crate::net::Cidr;

/// Longest one delivery may take, from the name to the last byte of the answer.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer that are read: its status is all that counts.
const ANSWER_BYTES: usize = 64 << 10;

/// What is sent.
#[derive(Clone, Debug)]
pub(super) struct Delivery<'a> {
    pub(super) url: &'a str,
    pub(super) secret: &'a str,
    /// Names it: the same for each try, so that a receiver knows one that it has had.
    pub(super) id: String,
    /// What happened, in a word.
    pub(super) kind: &'a str,
    pub(super) body: Bytes,
    pub(super) at: Stamp,
}

/// Why a delivery did not arrive, as far as is known.
#[derive(Debug, thiserror::Error)]
pub(super) enum PostError {
    /// Nothing is sent there.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Nobody listens there, or the connection broke.
    #[error("the receiver could not be reached: {0}")]
    Broken(String),
    /// It answered something else than a success.
    #[error("the receiver answered {0}")]
    Status(u16),
    /// It took too long.
    #[error("the receiver did not answer within {DELIVERY_TIMEOUT:?}")]
    TimedOut,
}

/// Delivers once. Redirects are not followed: they would lead around the check of the address.
pub(super) async fn post(delivery: &Delivery<'_>, allowed: &[Cidr]) -> Result<(), PostError> {
    let sent = time::timeout(DELIVERY_TIMEOUT, send(delivery, allowed));
    let status = sent.await.map_err(|_| PostError::TimedOut)??;
    if (200..300).contains(&status) {
        return Ok(());
    }
    Err(PostError::Status(status))
}

async fn send(delivery: &Delivery<'_>, allowed: &[Cidr]) -> Result<u16, PostError> {
    let target = Target::parse(delivery.url)?;
    let address = target.resolve(allowed).await?;
    let broken = |err: io::Error| PostError::Broken(err.to_string());
    let stream = TcpStream::connect(address).await.map_err(broken)?;
    let request = request(delivery, &target)?;
    if !target.tls {
        return exchange(stream, request).await;
    }
    let name = ServerName::try_from(target.host.clone());
    let name = name.map_err(|_| TargetError::Url("its host has no name that can be proven"))?;
    let connector = TlsConnector::from(tls());
    let stream = connector.connect(name, stream).await.map_err(broken)?;
    exchange(stream, request).await
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Result<u16, PostError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let broken = |err: hyper::Error| PostError::Broken(err.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let answered = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status().as_u16();
        drain(response).await;
        Ok(status)
    };
    tokio::pin!(answered, connection);
    tokio::select! {
        done = &mut answered => done,
        // Its end ends the answer too, with what went wrong.
        _ = &mut connection => answered.await,
    }
}

/// Reads an answer, so that the receiver can write it; what is in it matters to nobody.
async fn drain(response: Response<Incoming>) {
    let _read = Limited::new(response.into_body(), ANSWER_BYTES)
        .collect()
        .await;
}

fn request(delivery: &Delivery<'_>, target: &Target) -> Result<Request<Full<Bytes>>, PostError> {
    let seconds = delivery.at.0 / 1000;
    let signature = sign(delivery.secret, seconds, &delivery.body);
    Request::post(target.path.as_str())
        .header("host", target.authority.as_str())
        .header("content-type", "application/json")
        .header("user-agent", concat!("wrenn/", env!("CARGO_PKG_VERSION")))
        .header("x-wrenn-event", delivery.kind)
        .header("x-wrenn-delivery", delivery.id.as_str())
        .header("x-wrenn-timestamp", seconds)
        .header("x-wrenn-signature", signature)
        .body(Full::new(delivery.body.clone()))
        .map_err(|_| TargetError::Url("it cannot be asked for").into())
}

/// HMAC-SHA256 over the time, a dot and the body: a recorded delivery is of no use later.
pub(super) fn sign(secret: &str, seconds: u64, body: &[u8]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let mut signed = hmac::Context::with_key(&key);
    signed.update(format!("{seconds}.").as_bytes());
    signed.update(body);
    let hex: String = signed
        .sign()
        .as_ref()
        .iter()
        .map(|it| format!("{it:02x}"))
        .collect();
    format!("sha256={hex}")
}

/// The host's own roots, read once. TLS 1.2 too, which many receivers still end at.
fn tls() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13, &TLS12]);
        let config = match builder {
            Ok(builder) => builder.with_root_certificates(roots).with_no_client_auth(),
            Err(never) => unreachable!("the provider speaks TLS: {never}"),
        };
        Arc::new(config)
    });
    Arc::clone(config)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
    use tokio_rustls::rustls::sign::CertifiedKey;
    use tokio_rustls::rustls::{
        ClientConnection, ServerConfig, ServerConnection, SupportedProtocolVersion,
    };

    use super::*;

    /// Whether a receiver's certificate was asked for, which comes behind the agreement on a version.
    #[derive(Debug, Default)]
    struct Asked(AtomicBool);

    impl ResolvesServerCert for Asked {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            self.0.store(true, Ordering::Relaxed);
            None
        }
    }

    /// Whether a receiver that speaks `version` alone agrees to speak with us.
    fn agrees(version: &'static SupportedProtocolVersion) -> bool {
        let asked = Arc::new(Asked::default());
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let receiver = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .expect("the provider speaks it")
            .with_no_client_auth()
            .with_cert_resolver(asked.clone());
        let mut receiver = ServerConnection::new(Arc::new(receiver)).expect("a server");
        let name = "example.com".try_into().expect("a name");
        let mut client = ClientConnection::new(tls(), name).expect("a client");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("into memory");
        receiver
            .read_tls(&mut hello.as_slice())
            .expect("from memory");
        // It has no certificate, so it ends there at the latest.
        receiver.process_new_packets().expect_err("no certificate");
        asked.0.load(Ordering::Relaxed)
    }

    #[test]
    fn receivers_of_tls_1_2_alone_are_delivered_to_as_well() {
        assert!(agrees(&TLS12));
        assert!(agrees(&TLS13));
    }

    #[test]
    fn a_signature_is_over_time_and_body() {
        // echo -n '1700000000.{"a":1}' | openssl dgst -sha256 -hmac secret
        let signed = sign("secret", 1_700_000_000, b"{\"a\":1}");
        let known = "49f24e537407743fa4a0242bb63b94b9a47ee99cbbe071ccd8a22550ae411686";
        assert_eq!(signed, format!("sha256={known}"));
        assert_ne!(signed, sign("secret", 1_700_000_001, b"{\"a\":1}"));
        assert_ne!(signed, sign("other", 1_700_000_000, b"{\"a\":1}"));
    }
}
