//! The one call of a stranger, and what it can be tied to.

use super::*;
use crate::limits::JOIN_ANSWER_BYTES;
use crate::{DialError, JoinChannel, Seed, verify_seed_signature};

const JOIN: Method = Service::JOIN.method(1);

#[tokio::test]
async fn joining_without_an_outstanding_token_is_refused() {
    let (a, b) = two(Limits::default());
    let join = || {
        let method = Service::JOIN.method(1);
        a.call_join(
            address(&b, Lane::Control),
            b.key(),
            method,
            |_| Bytes::new(),
            deadline(),
        )
    };
    // A member is told by the gate, a stranger already by TLS.
    let err = join().await.expect_err("no token");
    assert!(matches!(err, DialError::JoinClosed { .. }), "{err}");
    b.set_membership(members(2, &[b.key()]));
    let err = join().await.expect_err("no token");
    assert!(matches!(err, DialError::JoinClosed { .. }), "{err}");
    stop([a, b]).await;
}

#[tokio::test]
async fn a_stranger_with_a_token_outstanding_has_one_small_call_of_the_join_service() {
    let node = open_to_joiners();
    let joiner = start(&identity(), Limits::default());
    let call = |method, body: Vec<u8>| {
        let to = address(&node, Lane::Control);
        joiner.call_join(to, node.key(), method, |_| body.into(), deadline())
    };
    let answer = call(Service::JOIN.method(1), vec![7; 100])
        .await
        .expect("heard");
    assert_eq!(answer, vec![7; 100]);

    let err = call(ECHO, vec![7]).await.expect_err("not the join service");
    let source = std::error::Error::source(&err)
        .expect("has a cause")
        .to_string();
    assert!(source.contains("does not serve"), "{source}");

    let err = call(Service::JOIN.method(1), vec![7; 8 << 10])
        .await
        .expect_err("too large");
    let code = CloseCode::FrameTooLarge;
    assert!(
        matches!(err, DialError::Refused { code: told, .. } if told == code),
        "{err}"
    );
    assert!(node.peers().is_empty(), "a joiner is not a peer");
    stop([node, joiner]).await;
}

#[tokio::test]
async fn a_second_call_on_a_join_connection_ends_it() {
    let node = open_to_joiners();
    let peer = Rough::handshake(&identity(), &node, Lane::Control, Alpn::Join).await;
    let method = Service::JOIN.method(1);
    let call = || crate::rpc::call(&peer.connection, method, Bytes::new(), deadline(), 1024);
    call().await.expect("the one call");
    let err = call().await.expect_err("one too many");
    let code = CloseCode::JoinMisuse;
    assert!(
        matches!(err, RpcError::Closed { code: told } if told == code),
        "{err:?}"
    );
    assert_eq!(close_code(&peer.connection).await, CloseCode::JoinMisuse);
    stop([node]).await;
}

/// Checks the proof in a call's body against the token's public key.
struct Checks([u8; 32]);

/// What a joiner signs: the exporter and both keys, the joiner's first.
fn transcript(exporter: [u8; 32], joiner: NodeKey, node: NodeKey) -> Vec<u8> {
    [&b"join"[..], &exporter, &joiner.0, &node.0].concat()
}

impl Handler for Checks {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        let channel = call.channel.expect("a join call has its channel");
        assert_eq!(channel.peer, call.peer);
        let message = transcript(channel.exporter, channel.peer, channel.own);
        match verify_seed_signature(&self.0, &message, &call.body) {
            true => Ok(Bytes::from_static(b"welcome")),
            false => Err(RpcError::rejected("proof does not fit")),
        }
    }
}

#[tokio::test]
async fn a_proof_fits_the_connection_it_was_made_for_and_no_other() {
    let node = open_to_joiners();
    let seed = Seed::random().expect("randomness");
    node.register(Service::JOIN, Checks(seed.public_key()));
    let (joiner, thief) = two(Limits::default());
    let prove = |channel: &JoinChannel| {
        let message = transcript(channel.exporter, channel.own, channel.peer);
        Bytes::copy_from_slice(&seed.sign(&message))
    };
    let to = address(&node, Lane::Control);
    let mut seen = Bytes::new();
    let join = joiner.call_join(
        to,
        node.key(),
        JOIN,
        |channel| {
            seen = prove(channel);
            seen.clone()
        },
        deadline(),
    );
    assert_eq!(join.await.expect("proven"), "welcome");

    // Neither the joiner on its next connection nor anybody else can use it again.
    for again in [&joiner, &thief] {
        let replay = again.call_join(to, node.key(), JOIN, |_| seen.clone(), deadline());
        let err = replay.await.expect_err("another connection");
        assert_eq!(err.refusal(), Some("proof does not fit"), "{err}");
    }
    stop([node, joiner, thief]).await;
}

/// Answers with as many bytes as the call's body says.
struct Long;

impl Handler for Long {
    async fn call(&self, call: Call) -> Result<Bytes, RpcError> {
        let text = std::str::from_utf8(&call.body).expect("a number");
        Ok(vec![7; text.parse().expect("a number")].into())
    }
}

#[tokio::test]
async fn the_answer_to_a_joiner_may_be_long_and_not_endless() {
    let node = open_to_joiners();
    node.register(Service::JOIN, Long);
    let joiner = start(&identity(), Limits::default());
    let join = |bytes: usize| {
        let make = move |_: &JoinChannel| bytes.to_string().into();
        joiner.call_join(
            address(&node, Lane::Control),
            node.key(),
            JOIN,
            make,
            deadline(),
        )
    };
    let largest = JOIN_ANSWER_BYTES - 16;
    assert_eq!(join(largest).await.expect("fits").len(), largest);
    let err = join(JOIN_ANSWER_BYTES).await.expect_err("too long");
    assert!(matches!(err, DialError::Hello { .. }), "{err}");
    stop([node, joiner]).await;
}

#[tokio::test]
async fn a_dialler_is_told_apart_silence_another_key_and_a_closed_door() {
    let node = start(&identity(), Limits::default());
    node.set_membership(members(1, &[node.key()]));
    let joiner = start(&identity(), Limits::default());
    let silent = std::net::UdpSocket::bind(loopback()).expect("a socket");
    let join = |address, key, patience_ms| {
        let until = Instant::now() + Duration::from_millis(patience_ms);
        joiner.call_join(address, key, JOIN, |_| Bytes::new(), until)
    };
    let there = address(&node, Lane::Control);
    let nobody = silent.local_addr().expect("bound");

    let err = join(nobody, node.key(), 300)
        .await
        .expect_err("nobody there");
    assert!(
        matches!(err, DialError::Unreachable { address } if address == nobody),
        "{err}"
    );
    assert!(err.to_string().contains("no node answers"), "{err}");
    let err = join(there, joiner.key(), 20_000)
        .await
        .expect_err("another key");
    assert!(matches!(err, DialError::WrongKey { .. }), "{err}");
    assert!(err.to_string().contains("another key"), "{err}");
    let err = join(there, node.key(), 20_000).await.expect_err("no token");
    assert!(matches!(err, DialError::JoinClosed { .. }), "{err}");
    assert!(err.to_string().contains("no join token"), "{err}");
    stop([node, joiner]).await;
}
