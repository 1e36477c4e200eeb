//! Load and liveness on the control lane.

use tokio::sync::mpsc;

use super::*;
use crate::DatagramError;
use crate::limits::{DATAGRAM_BURST, DATAGRAM_RATE};

/// What a node hears.
fn listen(node: &Transport) -> mpsc::UnboundedReceiver<(NodeKey, Bytes)> {
    let (heard, datagrams) = mpsc::unbounded_channel();
    node.on_datagram(move |peer, bytes| {
        let _gone = heard.send((peer, bytes));
    });
    datagrams
}

#[tokio::test]
async fn a_datagram_reaches_the_peer_under_its_sender_s_key_either_way() {
    let (a, b) = two(Limits::default());
    connect(&a, &b).await;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let mut heard = listen(to);
        from.send_datagram(to.key(), Bytes::from_static(b"load"))
            .expect("connected");
        let datagram = soon(heard.recv()).await.expect("heard");
        assert_eq!(datagram, (from.key(), Bytes::from_static(b"load")));
    }
    stop([a, b]).await;
}

#[tokio::test]
async fn what_cannot_be_sent_is_named_at_once() {
    let (a, b) = two(Limits::default());
    let peer = b.key();
    let err = a
        .send_datagram(peer, Bytes::new())
        .expect_err("no connection");
    assert_eq!(err, DatagramError::NotConnected { peer });
    connect(&a, &b).await;
    let err = a
        .send_datagram(peer, vec![0; 64 << 10].into())
        .expect_err("no packet is that large");
    assert!(
        matches!(err, DatagramError::TooLarge { max: 1100.., .. }),
        "{err}"
    );
    stop([a, b]).await;
}

#[tokio::test]
async fn a_stranger_s_datagrams_are_never_heard() {
    let node = open_to_joiners();
    let mut heard = listen(&node);
    let joiner = Rough::handshake(&identity(), &node, Lane::Control, Alpn::Join).await;
    joiner
        .connection
        .send_datagram(Bytes::from_static(b"psst"))
        .expect("sent");
    // Its one call is answered after the datagram has come in.
    let call = crate::rpc::call(
        &joiner.connection,
        Service::JOIN.method(1),
        Bytes::new(),
        deadline(),
        1024,
    );
    call.await.expect("answered");
    stop([node]).await;
    assert!(soon(heard.recv()).await.is_none());
}

#[tokio::test]
async fn a_flood_of_datagrams_is_thinned_out_and_calls_are_answered_through_it() {
    let (a, b) = two(Limits::default());
    let mut heard = listen(&b);
    connect(&a, &b).await;
    let begun = Instant::now();
    for _ in 0..50 {
        for number in 0..100_u64 {
            a.send_datagram(b.key(), number.to_be_bytes().to_vec().into())
                .expect("connected");
        }
        a.ping(Lane::Control, b.key(), deadline())
            .await
            .expect("answered");
    }
    let allowed = DATAGRAM_BURST + DATAGRAM_RATE * (begun.elapsed().as_secs() + 1);
    let mut count = 0;
    while heard.try_recv().is_ok() {
        count += 1;
    }
    assert!(count > 0 && count <= allowed, "{count} of {allowed}");
    stop([a, b]).await;
}
