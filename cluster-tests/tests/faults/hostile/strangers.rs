//! Whoever knows an address and at most a join token.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, Error, SignatureScheme};
use tokio::time::{Instant, timeout};
use transport::alpn::Alpn;
use transport::{Config, Identity, Lane, Service, Transport};

use super::Target;
use crate::chance::Chance;

/// Datagrams of garbage for each lane; the sender needs about a second for them.
const DATAGRAMS: usize = 20_000;
/// Connections of each bad kind.
const CONNECTIONS: usize = 40;
/// Streams that one stranger tries to open.
const STREAMS: usize = 10_000;
/// Longest anything of this may take by itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// How an Ed25519 key in PKCS#8 begins; 32 bytes of secret follow.
const PKCS8_HEAD: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];
/// TLS: none of the protocols offered is spoken here.
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// Datagrams that are no QUIC, and datagrams that begin like a first packet of a new connection.
pub(super) fn send_garbage(target: Target) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    let mut chance = Chance::new(1);
    let mut packet = [0_u8; 1200];
    for round in 0..DATAGRAMS {
        for byte in &mut packet[..64] {
            *byte = u8::try_from(chance.below(256)).expect("a byte");
        }
        if round % 2 == 0 {
            // A long header, version 1, an id of eight bytes each way.
            packet[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
            packet[14] = 8;
        }
        let length = if round % 3 == 0 {
            1200
        } else {
            chance.below(1200)
        };
        for address in [target.control, target.bulk] {
            // A full buffer loses some; there are enough.
            let _lost = socket.send_to(&packet[..length], address);
        }
    }
}

/// Well-formed connections for a protocol that nobody speaks, or for members only.
pub(super) async fn speak_otherwise(target: Target) {
    for _ in 0..CONNECTIONS {
        let refused = connect(target, b"h3").await.expect_err("it is not spoken");
        let alert = quinn::TransportErrorCode::crypto(NO_APPLICATION_PROTOCOL);
        match refused {
            ConnectionError::ConnectionClosed(close) => assert_eq!(close.error_code, alert),
            other => panic!("not refused by name: {other}"),
        }
    }
    let at = (Ipv4Addr::LOCALHOST, 0).into();
    for _ in 0..CONNECTIONS {
        let identity = Identity::ephemeral().expect("randomness");
        let stranger = Transport::start(&identity, Config::at(at, at)).expect("starts");
        let deadline = Instant::now() + PATIENCE;
        let dialled = stranger.connect(Lane::Control, target.control, target.key, deadline);
        let refused = dialled.await.expect_err("a stranger is no member");
        assert!(refused.to_string().contains("member"), "{refused}");
        let garbage = |_: &_| Bytes::from_static(&[0xff; 512]);
        let method = Service::JOIN.method(1);
        let asked = stranger.call_join(target.control, target.key, method, garbage, deadline);
        asked.await.expect_err("garbage is no request");
        stranger.stop(Instant::now() + PATIENCE).await;
    }
}

/// A stranger that may join opens as many streams as it is let, and ends none.
pub(super) async fn open_streams(target: Target) {
    let (_endpoint, connection) = connect(target, Alpn::Join.wire()).await.expect("let in");
    let mut open = Vec::new();
    while open.len() < STREAMS {
        match timeout(Duration::from_millis(500), connection.open_bi()).await {
            Ok(Ok((mut send, recv))) => {
                let _refused = send.write_all(&[0xff; 64]).await;
                open.push((send, recv));
            }
            // No more are granted, or the node has had enough.
            Ok(Err(_)) | Err(_) => break,
        }
    }
    println!("a stranger got {} streams", open.len());
    assert!(open.len() < 10, "{}", open.len());
}

/// Shakes hands with a key of no meaning for a protocol of any name.
async fn connect(
    target: Target,
    protocol: &[u8],
) -> Result<(Endpoint, quinn::Connection), ConnectionError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_cert_resolver(Arc::new(
            rustls::client::AlwaysResolvesClientRawPublicKeys::new(Arc::new(key())),
        ));
    tls.alpn_protocols = vec![protocol.to_vec()];
    let crypto = QuicClientConfig::try_from(tls).expect("fit for QUIC");
    let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("a socket");
    let config = ClientConfig::new(Arc::new(crypto));
    let connecting = endpoint.connect_with(config, target.control, "x");
    let connection = connecting.expect("begins").await?;
    Ok((endpoint, connection))
}

fn key() -> CertifiedKey {
    let der = [PKCS8_HEAD.as_slice(), &[7; 32]].concat();
    let key = rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(der));
    let key = key.expect("a key");
    let public = key.public_key().expect("it has a public half").to_vec();
    CertifiedKey::new(vec![CertificateDer::from(public)], key)
}

/// Takes whoever answers for the node.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
