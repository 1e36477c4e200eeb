//! Who gets in, who does not, and what each is told.

use super::*;
use crate::DialError;

async fn dial(from: &Transport, to: &Transport, key: NodeKey) -> Result<(), DialError> {
    let lane = Lane::Control;
    from.connect(lane, address(to, lane), key, deadline()).await
}

#[tokio::test]
async fn members_reach_each_other_pinned_both_ways_on_both_lanes() {
    let (a, b) = two(Limits::default());
    for lane in [Lane::Control, Lane::Bulk] {
        let connected = a
            .connect(lane, address(&b, lane), b.key(), deadline())
            .await;
        connected.expect("members connect");
        // The dialler can call, and so can the one that was dialled.
        a.ping(lane, b.key(), deadline()).await.expect("answered");
        b.ping(lane, a.key(), deadline()).await.expect("answered");
    }
    for (node, other, dialled) in [(&a, &b, true), (&b, &a, false)] {
        let peers = node.peers();
        assert_eq!(peers.len(), 2);
        for peer in peers {
            assert_eq!((peer.key, peer.dialled), (other.key(), dialled));
            assert_eq!(peer.product, proto::version::PRODUCT);
            assert_eq!((peer.protocol, peer.membership_index), (1, 1));
        }
    }
    stop([a, b]).await;
}

#[tokio::test]
async fn connecting_again_keeps_the_one_connection() {
    let (a, b) = two(Limits::default());
    for _ in 0..3 {
        connect(&a, &b).await;
    }
    connect(&b, &a).await;
    assert_eq!((a.peers().len(), b.peers().len()), (1, 1));
    stop([a, b]).await;
}

#[tokio::test]
async fn the_oldest_of_too_many_connections_is_superseded() {
    let node = start(&identity(), Limits::default());
    let restarted = identity();
    node.set_membership(members(1, &[node.key(), restarted.key()]));
    let mut connections = Vec::new();
    for _ in 0..=crate::limits::MAX_CONNECTIONS_PER_LANE {
        let peer = Rough::handshake(&restarted, &node, Lane::Control, Alpn::Mesh).await;
        peer.hello().await.expect("is a member");
        connections.push(peer);
    }
    assert_eq!(
        close_code(&connections[0].connection).await,
        CloseCode::Superseded
    );
    assert!(connections[1].is_answered().await);
    stop([node]).await;
}

#[tokio::test]
async fn another_key_than_the_pinned_one_is_refused_in_the_dialler_s_handshake() {
    let (a, b) = two(Limits::default());
    let imagined = identity().key();
    a.set_membership(members(2, &[a.key(), b.key(), imagined]));
    let err = dial(&a, &b, imagined)
        .await
        .expect_err("somebody else answers");
    assert!(
        matches!(err, DialError::WrongKey { expected, .. } if expected == imagined),
        "{err}"
    );
    assert!(a.peers().is_empty() && b.peers().is_empty());
    stop([a, b]).await;
}

#[tokio::test]
async fn a_node_does_not_dial_whom_its_own_list_lacks() {
    let (a, b) = two(Limits::default());
    a.set_membership(members(2, &[a.key()]));
    let err = dial(&a, &b, b.key()).await.expect_err("not on the list");
    assert!(matches!(err, DialError::NotMember { .. }), "{err}");
    stop([a, b]).await;
}

#[tokio::test]
async fn an_unknown_key_is_told_so_by_its_first_hello() {
    let (a, b) = two(Limits::default());
    b.set_membership(members(2, &[b.key()]));
    let err = dial(&a, &b, b.key()).await.expect_err("b does not know a");
    assert!(matches!(err, DialError::KeyRefused { .. }), "{err}");
    assert!(a.peers().is_empty() && b.peers().is_empty());
    stop([a, b]).await;
}

/// With a token outstanding TLS lets strangers through, and the gate has to stop them.
#[tokio::test]
async fn the_gate_keeps_strangers_off_the_mesh_while_a_token_is_outstanding() {
    let (a, b) = two(Limits::default());
    b.set_membership(Membership {
        join_open: true,
        ..members(2, &[b.key()])
    });
    for lane in [Lane::Control, Lane::Bulk] {
        let dialled = a
            .connect(lane, address(&b, lane), b.key(), deadline())
            .await;
        let err = dialled.expect_err("a is a stranger");
        assert!(matches!(err, DialError::KeyRefused { .. }), "{err}");
    }
    assert!(a.peers().is_empty() && b.peers().is_empty());
    stop([a, b]).await;
}

#[tokio::test]
async fn a_node_that_dials_itself_is_refused() {
    let me = identity();
    let (node, twin) = (start(&me, Limits::default()), start(&me, Limits::default()));
    for node in [&node, &twin] {
        node.set_membership(members(1, &[me.key()]));
    }
    let err = dial(&twin, &node, me.key()).await.expect_err("same key");
    let code = CloseCode::DialledSelf;
    assert!(
        matches!(err, DialError::Refused { code: told, .. } if told == code),
        "{err}"
    );
    stop([node, twin]).await;
}

/// The earlier start says no goodbye and keeps its socket: only the new one's hello tells.
#[tokio::test]
async fn a_peer_that_has_started_anew_ends_what_its_earlier_start_had() {
    let (mine, theirs) = (identity(), identity());
    let a = start(&mine, Limits::default());
    let (before, after) = (
        start(&theirs, Limits::default()),
        start(&theirs, Limits::default()),
    );
    for node in [&a, &before, &after] {
        node.set_membership(members(1, &[mine.key(), theirs.key()]));
    }
    for lane in [Lane::Control, Lane::Bulk] {
        let connected = a.connect(lane, address(&before, lane), theirs.key(), deadline());
        connected.await.expect("members connect");
    }
    assert_eq!(a.peers().len(), 2);
    connect(&after, &a).await;
    let left = a.peers();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(!left[0].dialled, "the new one is what is left");
    a.ping(Lane::Control, theirs.key(), deadline())
        .await
        .expect("and answers");
    stop([a, before, after]).await;
}

#[tokio::test]
async fn removing_a_member_closes_its_live_connections_and_refuses_new_ones() {
    let (a, b) = two(Limits::default());
    let mut seen_by_a = Vec::new();
    for lane in [Lane::Control, Lane::Bulk] {
        let connected = a
            .connect(lane, address(&b, lane), b.key(), deadline())
            .await;
        connected.expect("members connect");
        seen_by_a.push(a.connection(lane, b.key()).expect("live"));
    }

    assert!(b.set_membership(members(2, &[b.key()])));
    assert!(b.peers().is_empty(), "gone before the call returns");
    for connection in &seen_by_a {
        assert_eq!(close_code(connection).await, CloseCode::Removed);
    }
    let err = dial(&a, &b, b.key()).await.expect_err("removed");
    assert!(matches!(err, DialError::KeyRefused { .. }), "{err}");
    stop([a, b]).await;
}

#[tokio::test]
async fn a_member_removed_between_handshake_and_hello_does_not_get_in() {
    let node = start(&identity(), Limits::default());
    let removed = identity();
    node.set_membership(Membership {
        join_open: true,
        ..members(1, &[node.key(), removed.key()])
    });
    let peer = Rough::handshake(&removed, &node, Lane::Control, Alpn::Mesh).await;
    // A token is outstanding, so TLS stays out of it wherever the handshake stands.
    node.set_membership(Membership {
        join_open: true,
        ..members(2, &[node.key()])
    });

    let err = peer.hello().await.expect_err("removed");
    // Which of the two depends on whether the gate had looked already.
    let named = [CloseCode::Removed, CloseCode::NotMember];
    assert!(
        matches!(err, RpcError::Closed { code } if named.contains(&code)),
        "{err:?}"
    );
    assert!(node.peers().is_empty());
    stop([node]).await;
}

#[tokio::test]
async fn an_older_member_list_never_replaces_a_newer_one() {
    let (a, b) = two(Limits::default());
    connect(&a, &b).await;
    assert!(b.set_membership(members(9, &[a.key(), b.key()])));
    assert!(!b.set_membership(members(8, &[b.key()])));
    assert_eq!(b.membership().index, 9);
    a.ping(Lane::Control, b.key(), deadline())
        .await
        .expect("still in");
    stop([a, b]).await;
}

/// A dialler that shows no key at all.
#[derive(Debug)]
struct NoKey;

impl rustls::client::ResolvesClientCert for NoKey {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn a_dialler_without_a_key_gets_nowhere_even_with_a_token_outstanding() {
    let node = open_to_joiners();
    let mut config = tls::raw_client_config(&identity(), node.key(), Alpn::Join).expect("TLS");
    config.client_auth_cert_resolver = Arc::new(NoKey);
    if let Ok(peer) = Rough::with_tls(config, &node, Lane::Control).await {
        // The dialler's half of the handshake may be over before the node refuses.
        match soon(peer.connection.closed()).await {
            ConnectionError::ConnectionClosed(_) => {}
            other => panic!("not refused by TLS: {other}"),
        }
    }
    stop([node]).await;
}

#[tokio::test]
async fn an_unknown_protocol_does_not_complete_a_handshake() {
    let node = open_to_joiners();
    for alpns in [vec![b"h3".to_vec()], vec![b"wrenn-mesh/2".to_vec()], vec![]] {
        let mut config = tls::raw_client_config(&identity(), node.key(), Alpn::Mesh).expect("TLS");
        config.alpn_protocols = alpns;
        let refused = Rough::with_tls(config, &node, Lane::Control).await;
        assert!(refused.is_err());
    }
    stop([node]).await;
}

/// A resumed session never asks the verifier, so there must be none. The dialler here would gladly
/// resume, and send its hello before the handshake.
#[tokio::test]
async fn a_removed_member_cannot_come_back_on_a_resumed_session() {
    let node = start(&identity(), Limits::default());
    let member = identity();
    node.set_membership(members(1, &[node.key(), member.key()]));
    let mut config = tls::raw_client_config(&member, node.key(), Alpn::Mesh).expect("TLS");
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    config.enable_early_data = true;
    let first = Rough::with_tls(config.clone(), &node, Lane::Control)
        .await
        .expect("a member");
    first.hello().await.expect("a member");
    assert!(first.is_answered().await);

    node.set_membership(members(2, &[node.key()]));
    assert_eq!(close_code(&first.connection).await, CloseCode::Removed);
    if let Ok(again) = Rough::with_tls(config, &node, Lane::Control).await {
        let err = again.hello().await.expect_err("removed");
        assert!(matches!(err, RpcError::Lost { .. }), "{err:?}");
    }
    assert!(node.peers().is_empty());
    stop([node]).await;
}
