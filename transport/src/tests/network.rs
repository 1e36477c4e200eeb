//! Whole nodes on a bad network, and on a slow one.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{DialError, Faults, Inbound, Link, Pace, StreamHandler};

/// Counts what comes in and sends the count back.
struct Counts;

impl StreamHandler for Counts {
    async fn open(&self, inbound: Inbound) {
        let mut stream = inbound.accept().await.expect("the opener waits");
        let read = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        let count = read.expect("read to the end");
        stream.write_u64(count).await.expect("written");
        let _ended = stream.shutdown().await;
    }
}

/// Two members that know each other, the first with `config` applied.
fn two_with(config: impl Fn(Config) -> Config) -> (Transport, Transport) {
    let start = || {
        let limits = Limits {
            redial: Duration::ZERO,
            ..Limits::default()
        };
        let plain = Config {
            limits,
            ..Config::at(loopback(), loopback())
        };
        Transport::start(&identity(), config(plain)).expect("starts")
    };
    let (a, b) = (start(), start());
    for node in [&a, &b] {
        node.set_membership(members(1, &[a.key(), b.key()]));
        node.register(SERVICE, Echo);
        node.register_streams(SERVICE, Lane::Bulk, Counts);
    }
    (a, b)
}

/// Sends `bytes` zeroes and has them counted.
async fn send(from: &Transport, to: &Transport, bytes: usize) -> u64 {
    let lane = Lane::Bulk;
    from.connect(lane, address(to, lane), to.key(), deadline())
        .await
        .expect("members connect");
    let opened = from.open_stream(lane, to.key(), SERVICE, Bytes::new(), deadline());
    let mut stream = opened.await.expect("accepted");
    soon(stream.write_all(&vec![0; bytes]))
        .await
        .expect("written");
    stream.shutdown().await.expect("ended");
    soon(stream.read_u64()).await.expect("counted")
}

#[tokio::test]
async fn calls_and_streams_come_through_a_lossy_link_whole() {
    let faults = Faults::seeded(42);
    let (a, b) = two_with(|plain| Config {
        faults: Some(faults.clone()),
        ..plain
    });
    faults.set(Link {
        loss: 0.05,
        delay: Duration::from_millis(2),
        jitter: Duration::from_millis(2),
        duplicate: 0.05,
        reorder: 0.1,
    });
    connect(&a, &b).await;
    for number in 0..20_u32 {
        let body = Bytes::copy_from_slice(&number.to_be_bytes());
        let back = a.call(b.key(), ECHO, body.clone(), deadline()).await;
        assert_eq!(back.expect("answered"), body);
    }
    assert_eq!(send(&a, &b, 300_000).await, 300_000);
    let rtt = a.peers().iter().map(|peer| peer.rtt).min();
    assert!(rtt >= Some(Duration::from_millis(4)), "{rtt:?}");
    stop([a, b]).await;
}

#[tokio::test]
async fn a_blocked_peer_is_unreachable_until_it_is_healed() {
    let faults = Faults::seeded(1);
    let (a, b) = two_with(|plain| Config {
        faults: Some(faults.clone()),
        ..plain
    });
    connect(&a, &b).await;
    faults.block([address(&a, Lane::Control), address(&b, Lane::Control)]);
    let soon_over = || Instant::now() + Duration::from_millis(300);
    let err = a.ping(Lane::Control, b.key(), soon_over()).await;
    assert!(matches!(err, Err(RpcError::Deadline)));

    // Each has heard the last of the other and may dial again.
    for (node, peer) in [(&a, &b), (&b, &a)] {
        node.disconnect(peer.key(), CloseCode::Stalled);
    }
    let to = address(&b, Lane::Control);
    let dialled = a.connect(Lane::Control, to, b.key(), soon_over()).await;
    assert!(matches!(dialled, Err(DialError::Unreachable { .. })));

    faults.block([]);
    connect(&a, &b).await;
    a.ping(Lane::Control, b.key(), deadline())
        .await
        .expect("healed");
    stop([a, b]).await;
}

/// Accepts, and says nothing more.
struct Silent;

impl StreamHandler for Silent {
    async fn open(&self, inbound: Inbound) {
        let _held = inbound.accept().await.expect("the opener waits");
        std::future::pending().await
    }
}

/// On the bulk lane the peer is still heard here: only the loss of the other lane ends it.
#[tokio::test]
async fn streams_to_a_peer_whose_control_connection_died_end_with_it() {
    let faults = Faults::seeded(1);
    let (a, b) = two_with(|plain| Config {
        faults: Some(faults.clone()),
        ..plain
    });
    b.register_streams(SERVICE, Lane::Bulk, Silent);
    connect(&a, &b).await;
    let lane = Lane::Bulk;
    a.connect(lane, address(&b, lane), b.key(), deadline())
        .await
        .expect("members connect");
    let opened = a.open_stream(lane, b.key(), SERVICE, Bytes::new(), deadline());
    let mut stream = opened.await.expect("accepted");
    faults.block([address(&a, Lane::Control), address(&b, Lane::Control)]);
    soon(stream.read_u8()).await.expect_err("cut off");
    stop([a, b]).await;
}

#[tokio::test]
async fn a_paced_node_sends_no_faster_than_its_rate() {
    const RATE: u64 = 2 << 20;
    let (a, b) = two_with(|plain| Config {
        pace: Pace::Fixed {
            bytes_per_second: RATE,
        },
        ..plain
    });
    let begun = Instant::now();
    assert_eq!(send(&a, &b, 1 << 20).await, 1 << 20);
    // Half a second's worth, less what may go at once.
    assert!(
        begun.elapsed() >= Duration::from_millis(400),
        "{:?}",
        begun.elapsed()
    );
    stop([a, b]).await;
}
