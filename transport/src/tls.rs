//! TLS with raw public keys (RFC 7250): both ends prove an Ed25519 key, and nothing else is
//! possible.
//!
//! TLS 1.3 only, signatures by Ed25519 only, no tickets, no resumption, no 0-RTT: a resumed
//! session would skip the verifier, and with it the removal of a member. The dialler pins the one
//! key it wants to reach; the acceptor lets through whoever might be welcome and leaves the rest
//! to the gate.

use std::sync::Arc;

use proto::ids::NodeKey;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::version::TLS13;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    SignatureScheme,
};

use crate::alpn::Alpn;
use crate::identity::{Identity, key_of_spki};
use crate::peers::Peers;

/// The alert (`access_denied`) by which either end refuses the other's key.
const ACCESS_DENIED: u8 = 49;

/// The alert (`no_application_protocol`) by which the acceptor refuses what it does not speak.
const NO_PROTOCOL: u8 = 120;

/// Why a TLS configuration could not be built. It means that the crypto provider lacks something.
#[derive(Clone, Debug, thiserror::Error)]
#[error("set up TLS 1.3 with raw keys")]
pub struct TlsError(#[source] Arc<dyn std::error::Error + Send + Sync>);

impl TlsError {
    fn new(source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }
}

/// The acceptor's side, offering `alpns`.
pub(crate) fn server_config(
    identity: &Identity,
    peers: Arc<Peers>,
    alpns: &[Alpn],
) -> Result<QuicServerConfig, TlsError> {
    let config = raw_server_config(identity, peers, alpns)?;
    QuicServerConfig::try_from(config).map_err(TlsError::new)
}

/// The same before it is wrapped up for QUIC.
fn raw_server_config(
    identity: &Identity,
    peers: Arc<Peers>,
    alpns: &[Alpn],
) -> Result<rustls::ServerConfig, TlsError> {
    let provider = provider();
    let verifier = Arc::new(AnyoneWelcome {
        peers,
        signatures: Signatures(Arc::clone(&provider)),
    });
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
            identity.certified(),
        )));
    config.alpn_protocols = alpns.iter().map(|alpn| alpn.wire().to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// The dialler's side: only the node with the key `pin` will do.
pub(crate) fn client_config(
    identity: &Identity,
    pin: NodeKey,
    alpn: Alpn,
) -> Result<QuicClientConfig, TlsError> {
    let config = raw_client_config(identity, pin, alpn)?;
    QuicClientConfig::try_from(config).map_err(TlsError::new)
}

/// The same before it is wrapped up for QUIC.
pub(crate) fn raw_client_config(
    identity: &Identity,
    pin: NodeKey,
    alpn: Alpn,
) -> Result<rustls::ClientConfig, TlsError> {
    let provider = provider();
    let verifier = Arc::new(Pinned {
        pin,
        signatures: Signatures(Arc::clone(&provider)),
    });
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(TlsError::new)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
            identity.certified(),
        )));
    config.alpn_protocols = vec![alpn.wire().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // Names mean nothing here, the key is the name.
    config.enable_sni = false;
    Ok(config)
}

/// The key the other end of an established connection has proven.
pub(crate) fn peer_key(connection: &quinn::Connection) -> Option<NodeKey> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    key_of_spki(chain.first()?)
}

/// The protocol an established connection has agreed on.
pub(crate) fn peer_alpn(connection: &quinn::Connection) -> Option<Alpn> {
    let data = connection.handshake_data()?;
    let data = data
        .downcast::<quinn::crypto::rustls::HandshakeData>()
        .ok()?;
    Alpn::from_wire(data.protocol.as_deref()?)
}

/// Whether `code` says that a key was refused inside the handshake.
pub(crate) fn is_key_refusal(code: quinn::TransportErrorCode) -> bool {
    code == quinn::TransportErrorCode::crypto(ACCESS_DENIED)
}

/// Whether `code` says that the protocol asked for is not spoken at the other end.
pub(crate) fn is_alpn_refusal(code: quinn::TransportErrorCode) -> bool {
    code == quinn::TransportErrorCode::crypto(NO_PROTOCOL)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Refuses a key; becomes the alert [`ACCESS_DENIED`].
fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// The key in a handshake message that holds a raw key and nothing else.
fn only_key(spki: &[u8], rest: &[CertificateDer<'_>]) -> Result<NodeKey, Error> {
    if !rest.is_empty() {
        return Err(refused());
    }
    key_of_spki(spki).ok_or_else(refused)
}

/// The signature half of both verifiers.
#[derive(Debug)]
struct Signatures(Arc<CryptoProvider>);

impl Signatures {
    fn verify(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if signed.scheme != SignatureScheme::ED25519 {
            return Err(PeerIncompatible::NoSignatureSchemesInCommon.into());
        }
        verify_tls13_signature_with_raw_key(
            message,
            &SubjectPublicKeyInfoDer::from(spki.as_ref()),
            signed,
            &self.0.signature_verification_algorithms,
        )
    }
}

fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(PeerIncompatible::Tls12NotOffered.into())
}

/// The dialler's verifier: one key and no other.
#[derive(Debug)]
struct Pinned {
    pin: NodeKey,
    signatures: Signatures,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if only_key(end_entity, intermediates)? == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(refused())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The acceptor's verifier: members, whoever could be vouched for, and strangers while a
/// join token is outstanding.
#[derive(Debug)]
struct AnyoneWelcome {
    peers: Arc<Peers>,
    signatures: Signatures,
}

impl ClientCertVerifier for AnyoneWelcome {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let key = only_key(end_entity, intermediates)?;
        if self.peers.may_handshake(key) {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(refused())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signatures.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use rustls::version::TLS12;
    use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig};
    use rustls::{ServerConnection, SupportedProtocolVersion};

    use super::*;

    /// Hands what `from` says first to `to`, and returns what that makes of it.
    fn tell(from: &mut Connection, to: &mut Connection) -> Result<(), Error> {
        let mut said = Vec::new();
        from.write_tls(&mut said).expect("into memory");
        to.read_tls(&mut said.as_slice()).expect("from memory");
        to.process_new_packets().map(drop)
    }

    fn stranger(config: ClientConfig) -> Connection {
        let name = "node".try_into().expect("a name");
        let client = ClientConnection::new(Arc::new(config), name);
        client.expect("a client").into()
    }

    fn acceptor(config: ServerConfig) -> Connection {
        let server = ServerConnection::new(Arc::new(config));
        server.expect("a server").into()
    }

    #[test]
    fn neither_end_speaks_tls_1_2_although_the_library_could() {
        let only: &[&SupportedProtocolVersion] = &[&TLS12];
        let node = Identity::ephemeral().expect("an identity");
        let peers = Arc::new(Peers::new(node.key()));
        let config = raw_server_config(&node, peers, &[Alpn::Mesh]).expect("TLS");
        let old = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(only)
            .expect("the provider speaks it")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let told = tell(&mut stranger(old), &mut acceptor(config));
        assert_eq!(told, Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into()));

        let config = raw_client_config(&node, node.key(), Alpn::Mesh).expect("TLS");
        let old = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(only)
            .expect("the provider speaks it")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
                node.certified(),
            )));
        let told = tell(&mut stranger(config), &mut acceptor(old));
        assert_eq!(told, Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into()));
    }
}
