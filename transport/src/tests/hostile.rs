//! Peers with a key and bad manners, and strangers with neither. The node stays up, names what it
//! refuses, and holds no more than its limits say.

use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::*;
use crate::limits::{
    BULK_STREAMS, CONTROL_STREAMS, FRAME_BYTES, STREAM_HEADER_BYTES, UNPROVEN_WINDOW_BYTES,
};
use crate::rpc::frame;
use crate::rpc::wire::Request;
use crate::{BiStream, Inbound, StreamHandler};

fn request(method: Method, body: Bytes) -> Bytes {
    let request = Request {
        service: method.service.0.into(),
        method: method.number.into(),
        patience_ms: 10_000,
        body,
        stream: false,
    };
    frame::encode(&request, FRAME_BYTES).expect("fits")
}

/// A node that waits only this long for a request, an honest one on a busy machine too. A test waits
/// so long once.
fn impatient() -> Limits {
    Limits {
        request_read: Duration::from_secs(3),
        ..Limits::default()
    }
}

#[tokio::test]
async fn bad_frames_cost_their_stream_and_nothing_else() {
    let node = start(&identity(), Limits::default());
    node.register(SERVICE, Echo);
    let peer = Rough::member(&node).await;
    let good = request(ECHO, Bytes::from_static(b"body"));
    let too_large = (u32::try_from(FRAME_BYTES).expect("fits") + 1).to_be_bytes();
    let no_such_service = Request {
        service: 1 << 20,
        ..Request::default()
    };
    let no_such_service = frame::encode(&no_such_service, FRAME_BYTES).expect("fits");
    let cases: [(&str, &[u8], CloseCode); 7] = [
        ("too large", &too_large, CloseCode::FrameTooLarge),
        ("largest claim", &[0xff; 64], CloseCode::FrameTooLarge),
        ("nothing at all", &[], CloseCode::FrameTruncated),
        (
            "cut short",
            &good[..good.len() - 1],
            CloseCode::FrameTruncated,
        ),
        (
            "garbage",
            &[0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff],
            CloseCode::FrameGarbage,
        ),
        (
            "one byte more",
            &[&good[..], &[0]].concat(),
            CloseCode::FrameGarbage,
        ),
        (
            "number out of range",
            &no_such_service,
            CloseCode::FrameGarbage,
        ),
    ];
    for (name, bytes, expected) in cases {
        assert_eq!(peer.send(bytes, true).await, expected, "{name}");
        assert!(peer.is_answered().await, "after {name}");
    }
    stop([node]).await;
}

#[tokio::test]
async fn a_request_that_stalls_is_reset_by_name() {
    let node = start(&identity(), impatient());
    let peer = Rough::member(&node).await;
    let good = request(ECHO, Bytes::from_static(b"body"));
    // A request that is whole but not ended is a stall too.
    let stalls = [1, 4, good.len() - 1, good.len()];
    let stalls = stalls.map(|upto| peer.send(&good[..upto], false));
    let codes = futures_of(stalls.into_iter()).await;
    assert_eq!(codes, [CloseCode::Stalled; 4]);
    assert!(peer.is_answered().await);
    stop([node]).await;
}

/// Every stream claims a whole frame and sends none of it: only the budget's worth of them gets
/// past its length, all of them end, and another peer notices nothing.
#[tokio::test]
async fn claims_without_bytes_starve_nobody() {
    let (node, other) = two(impatient());
    let rough = identity();
    for one in [&node, &other] {
        one.set_membership(members(2, &[node.key(), other.key(), rough.key()]));
    }
    connect(&other, &node).await;
    let peer = Rough::handshake(&rough, &node, Lane::Control, Alpn::Mesh).await;
    peer.hello().await.expect("is a member");
    let claim = u32::try_from(FRAME_BYTES).expect("fits").to_be_bytes();
    let claims = futures_of((0..64).map(|_| peer.send(&claim, false)));
    let pinged = other.ping(Lane::Control, node.key(), deadline());
    let (codes, pinged) = soon(async { tokio::join!(claims, pinged) }).await;
    pinged.expect("the other peer is answered");
    assert!(
        codes.iter().all(|code| *code == CloseCode::Stalled),
        "{codes:?}"
    );
    assert!(peer.is_answered().await, "the budget came back");
    stop([node, other]).await;
}

/// A peer asks for far more than it reads. What does not fit into the windows and the budget is
/// dropped by name; the node goes on answering the others.
#[tokio::test]
async fn a_peer_that_does_not_read_its_answers_is_cut_short_by_name() {
    let (node, other) = two(Limits {
        // The unread answers wait in three batches, each so long.
        reply_write: Duration::from_secs(1),
        ..Limits::default()
    });
    node.register(SERVICE, Echo);
    let rough = identity();
    for one in [&node, &other] {
        one.set_membership(members(2, &[node.key(), other.key(), rough.key()]));
    }
    connect(&other, &node).await;
    let peer = Rough::handshake(&rough, &node, Lane::Control, Alpn::Mesh).await;
    peer.hello().await.expect("is a member");

    let large = request(ECHO, vec![7; FRAME_BYTES - 64].into());
    let mut unread = Vec::new();
    for _ in 0..24 {
        let (mut send, recv) = soon(peer.connection.open_bi()).await.expect("opens");
        soon(send.write_all(&large)).await.expect("the node reads");
        send.finish().expect("open");
        unread.push(recv);
    }
    other
        .ping(Lane::Control, node.key(), deadline())
        .await
        .expect("answered");
    let mut cut = Vec::new();
    for mut recv in unread {
        match soon(recv.received_reset()).await {
            Ok(Some(code)) => cut.push(CloseCode::from(code)),
            other => panic!("neither read nor reset: {other:?}"),
        }
    }
    let named = [CloseCode::Stalled, CloseCode::SlowReader];
    assert!(cut.iter().all(|code| named.contains(code)), "{cut:?}");
    assert!(peer.is_answered().await, "the connection lives on");
    stop([node, other]).await;
}

#[tokio::test]
async fn a_mesh_connection_that_does_not_begin_with_a_hello_is_closed() {
    let node = start(&identity(), Limits::default());
    let rude = identity();
    node.set_membership(members(1, &[node.key(), rude.key()]));
    let too_new = crate::rpc::wire::Hello {
        oldest: 1000,
        newest: 1001,
        ..Default::default()
    };
    let too_new = request(Method::HELLO, too_new.encode_to_vec().into());
    let huge = request(Method::HELLO, vec![0; 64 << 10].into());
    let cases: [(&[u8], CloseCode); 4] = [
        (
            &request(Method::PING, Bytes::new()),
            CloseCode::HelloExpected,
        ),
        (
            &[0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff],
            CloseCode::FrameGarbage,
        ),
        (&too_new, CloseCode::VersionMismatch),
        (&huge, CloseCode::FrameTooLarge),
    ];
    for (bytes, expected) in cases {
        let peer = Rough::handshake(&rude, &node, Lane::Control, Alpn::Mesh).await;
        let (mut send, _recv) = soon(peer.connection.open_bi()).await.expect("opens");
        let _refused = soon(send.write_all(bytes)).await;
        let _ended = send.finish();
        assert_eq!(close_code(&peer.connection).await, expected);
    }
    assert!(node.peers().is_empty());
    stop([node]).await;
}

#[tokio::test]
async fn a_member_that_never_says_hello_is_closed_when_the_handshake_s_time_is_up() {
    let limits = Limits {
        // Long enough for TLS on a busy machine.
        handshake: Duration::from_secs(3),
        ..Limits::default()
    };
    let node = start(&identity(), limits);
    let mute = identity();
    node.set_membership(members(1, &[node.key(), mute.key()]));
    let peer = Rough::handshake(&mute, &node, Lane::Control, Alpn::Mesh).await;
    assert_eq!(close_code(&peer.connection).await, CloseCode::HelloExpected);
    stop([node]).await;
}

#[tokio::test]
async fn the_bulk_lane_answers_no_call_but_a_ping() {
    let node = start(&identity(), Limits::default());
    node.register(SERVICE, Echo);
    let member = identity();
    node.set_membership(members(1, &[node.key(), member.key()]));
    let peer = Rough::handshake(&member, &node, Lane::Bulk, Alpn::Mesh).await;
    peer.hello().await.expect("is a member");
    let call = crate::rpc::call(
        &peer.connection,
        ECHO,
        Bytes::new(),
        deadline(),
        FRAME_BYTES,
    );
    let err = call.await.expect_err("not on this lane");
    assert!(matches!(err, RpcError::NotServed { .. }), "{err}");
    assert!(peer.is_answered().await);
    stop([node]).await;
}

#[tokio::test]
async fn noise_on_the_sockets_disturbs_no_peer() {
    let (a, b) = two(Limits::default());
    connect(&a, &b).await;
    let noise = std::net::UdpSocket::bind(loopback()).expect("a socket");
    for lane in [Lane::Control, Lane::Bulk] {
        for length in 0..1200_usize {
            let packet: Vec<u8> = (0..length)
                .map(|at| ((at * 31 + length) % 251).to_le_bytes()[0])
                .collect();
            noise.send_to(&packet, address(&b, lane)).expect("sent");
        }
    }
    a.ping(Lane::Control, b.key(), deadline())
        .await
        .expect("answered");
    connect(&b, &a).await;
    stop([a, b]).await;
}

#[tokio::test]
async fn a_crowd_of_strangers_is_cut_off_and_leaves_room_for_a_member_at_their_address() {
    let patient = Limits {
        join: PATIENCE,
        ..Limits::default()
    };
    let (node, member) = two(patient);
    node.set_membership(Membership {
        join_open: true,
        ..members(2, &[node.key(), member.key()])
    });
    let mut crowd = Vec::new();
    for _ in 0..=crate::limits::MAX_UNPROVEN_PER_ADDRESS {
        crowd.push(Rough::handshake(&identity(), &node, Lane::Control, Alpn::Join).await);
    }
    let last = crowd.pop().expect("one too many");
    assert_eq!(close_code(&last.connection).await, CloseCode::Crowded);
    connect(&member, &node).await;
    assert!(
        crowd
            .iter()
            .all(|stranger| stranger.connection.close_reason().is_none())
    );
    stop([node, member]).await;
}

/// Takes every stream and never reads or ends it, and says when its future is gone.
struct Pours {
    ended: mpsc::UnboundedSender<()>,
}

struct OnDrop(mpsc::UnboundedSender<()>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        let _gone = self.0.send(());
    }
}

impl StreamHandler for Pours {
    async fn open(&self, inbound: Inbound) {
        let _told = OnDrop(self.ended.clone());
        let mut stream = inbound.accept().await.expect("the opener waits");
        while stream.write_all(&[7; 1 << 16]).await.is_ok() {}
    }
}

fn opening(header: Bytes) -> Bytes {
    let request = Request {
        service: SERVICE.0.into(),
        method: 0,
        patience_ms: 10_000,
        body: header,
        stream: true,
    };
    frame::encode(&request, FRAME_BYTES).expect("fits")
}

#[tokio::test]
async fn bad_openings_of_streams_cost_their_stream_and_nothing_else() {
    let node = start(&identity(), impatient());
    let (ended, _ends) = mpsc::unbounded_channel();
    node.register_streams(SERVICE, Lane::Bulk, Pours { ended });
    let peer = Rough::member_on(&node, Lane::Bulk).await;
    let good = opening(Bytes::from_static(b"header"));
    let large = opening(vec![0; 2 * STREAM_HEADER_BYTES].into());
    let cases: [(&str, &[u8], bool, CloseCode); 5] = [
        ("no header", &[0], false, CloseCode::Stalled),
        ("half of it", &good[..7], false, CloseCode::Stalled),
        ("cut short", &good[..7], true, CloseCode::FrameTruncated),
        ("too large", &large, false, CloseCode::FrameTooLarge),
        (
            "garbage",
            &[0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff],
            false,
            CloseCode::FrameGarbage,
        ),
    ];
    // All at once: some of them take their time.
    let peer = &peer;
    let sent = cases.map(|(name, bytes, fin, expected)| async move {
        assert_eq!(peer.send(bytes, fin).await, expected, "{name}");
        assert!(peer.is_answered().await, "after {name}");
    });
    futures_of(sent.into_iter()).await;
    stop([node]).await;
}

/// A stranger's join connection has calls and no streams.
#[tokio::test]
async fn a_stranger_opens_no_stream_even_with_a_token_outstanding() {
    let node = open_to_joiners();
    let (ended, mut ends) = mpsc::unbounded_channel();
    for service in [SERVICE, Service::JOIN] {
        let ended = ended.clone();
        node.register_streams(service, Lane::Control, Pours { ended });
    }
    drop(ended);
    for service in [SERVICE, Service::JOIN] {
        let peer = Rough::handshake(&identity(), &node, Lane::Control, Alpn::Join).await;
        let opened = open_by_hand(&peer, service);
        let err = opened.await.expect_err("not for strangers");
        assert!(matches!(err, RpcError::NotServed { .. }), "{err}");
    }
    stop([node]).await;
    assert!(ends.try_recv().is_err());
}

/// As many streams as QUIC grants, none of them with a header: they end by name, the next ones are
/// served, and another peer notices nothing.
#[tokio::test]
async fn streams_without_a_header_end_and_make_room() {
    let (node, other) = two(impatient());
    let rough = identity();
    for one in [&node, &other] {
        one.set_membership(members(2, &[node.key(), other.key(), rough.key()]));
    }
    connect(&other, &node).await;
    let peer = Rough::handshake(&rough, &node, Lane::Bulk, Alpn::Mesh).await;
    peer.hello().await.expect("is a member");
    let mut mute = Vec::new();
    // The hello was one of them.
    for _ in 1..BULK_STREAMS {
        let (mut send, recv) = soon(peer.connection.open_bi()).await.expect("granted");
        soon(send.write_all(&[0])).await.expect("granted");
        mute.push((send, recv));
    }
    other
        .ping(Lane::Control, node.key(), deadline())
        .await
        .expect("the other peer is answered");
    for (_send, recv) in &mut mute {
        let reset = soon(recv.received_reset()).await.expect("reset");
        assert_eq!(reset.map(CloseCode::from), Some(CloseCode::Stalled));
    }
    drop(mute);
    assert!(peer.is_answered().await, "there is room again");
    stop([node, other]).await;
}

/// Opening and giving up as fast as possible: each stream has gone before the next one counts.
#[tokio::test]
async fn streams_opened_and_reset_at_once_pile_up_nowhere() {
    let node = start(&identity(), Limits::default());
    node.register(SERVICE, Echo);
    let peer = Rough::member(&node).await;
    let half = &request(ECHO, vec![7; 1000].into())[..500];
    for _ in 0..20 * CONTROL_STREAMS {
        let (mut send, mut recv) = soon(peer.connection.open_bi()).await.expect("granted");
        let _refused = send.write(half).await;
        let _ended = send.reset(CloseCode::Cancelled.varint());
        let _ended = recv.stop(CloseCode::Cancelled.varint());
    }
    assert!(peer.is_answered().await);
    assert!(
        node.tasks() <= CONTROL_STREAMS as usize + 8,
        "{}",
        node.tasks()
    );
    stop([node]).await;
}

/// A handler pours into streams that nobody reads. What it has written stays within QUIC's windows,
/// and it ends with the peer.
#[tokio::test]
async fn a_peer_that_reads_none_of_its_streams_holds_their_handlers_until_it_goes() {
    let (node, other) = two(Limits::default());
    let (ended, mut ends) = mpsc::unbounded_channel();
    node.register_streams(SERVICE, Lane::Bulk, Pours { ended });
    let rough = identity();
    for one in [&node, &other] {
        one.set_membership(members(2, &[node.key(), other.key(), rough.key()]));
    }
    connect(&other, &node).await;
    let peer = Rough::handshake(&rough, &node, Lane::Bulk, Alpn::Mesh).await;
    peer.hello().await.expect("is a member");
    let mut unread = Vec::new();
    for _ in 0..16 {
        let opened = open_by_hand(&peer, SERVICE);
        unread.push(opened.await.expect("accepted"));
    }
    other
        .ping(Lane::Control, node.key(), deadline())
        .await
        .expect("the other peer is answered");
    assert!(peer.is_answered().await, "on the same connection too");
    assert!(ends.try_recv().is_err(), "all of them wait");
    peer.connection.close(CloseCode::Stopping.varint(), b"");
    for _ in &unread {
        soon(ends.recv()).await.expect("ended with its peer");
    }
    stop([node, other]).await;
}

/// Before its hello a connection has two streams and a small window, whatever it sends.
#[tokio::test]
async fn a_connection_without_a_hello_is_held_to_a_small_window() {
    let node = start(&identity(), Limits::default());
    let mute = identity();
    node.set_membership(members(1, &[node.key(), mute.key()]));
    let peer = Rough::handshake(&mute, &node, Lane::Bulk, Alpn::Mesh).await;
    let (mut hello, _recv) = soon(peer.connection.open_bi()).await.expect("granted");
    // A hello that never ends.
    soon(hello.write_all(&[0, 0, 0x0f, 0xff]))
        .await
        .expect("granted");
    let (mut more, _recv) = soon(peer.connection.open_bi()).await.expect("granted");
    let moment = Duration::from_millis(200);
    let mut written = 0;
    while let Ok(wrote) = timeout(moment, more.write(&[7; 4096])).await {
        written += wrote.expect("open");
    }
    assert!(written < UNPROVEN_WINDOW_BYTES as usize, "{written}");
    let third = timeout(moment, peer.connection.open_bi()).await;
    assert!(third.is_err(), "a third stream was granted");
    stop([node]).await;
}

/// All of `futures` at once.
async fn futures_of<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut running: Vec<_> = futures.map(Box::pin).map(Some).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|cx| {
        for slot in &mut running {
            let Some(future) = slot else { continue };
            if let std::task::Poll::Ready(value) = future.as_mut().poll(cx) {
                done.push(value);
                *slot = None;
            }
        }
        if running.iter().all(Option::is_none) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done
}

async fn open_by_hand(peer: &Rough, service: Service) -> Result<BiStream, RpcError> {
    let (header, connection) = (Bytes::new(), &peer.connection);
    let stall = Limits::default().stream_stall;
    crate::rpc::open(connection, service, header, deadline(), None, stall).await
}
