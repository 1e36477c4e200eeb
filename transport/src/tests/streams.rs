//! Byte streams: opened, refused, ended and given up, from either side.

use std::io::ErrorKind;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};

use super::*;
use crate::limits::{BULK_STREAM_WINDOW_BYTES, STREAM_HEADER_BYTES};
use crate::streams::{StreamStalled, close_code_of};
use crate::{BiStream, Inbound, StreamHandler};

/// Gives every accepted stream to the test.
struct Accepts(mpsc::UnboundedSender<(Bytes, BiStream)>);

impl StreamHandler for Accepts {
    async fn open(&self, inbound: Inbound) {
        let header = inbound.header.clone();
        if let Ok(stream) = inbound.accept().await {
            let _gone = self.0.send((header, stream));
        }
    }
}

/// Sends back what comes in, and ends when it does.
struct Mirror;

impl StreamHandler for Mirror {
    async fn open(&self, inbound: Inbound) {
        let stream = inbound.accept().await.expect("the opener waits");
        let (mut from, mut to) = tokio::io::split(stream);
        let _ended = tokio::io::copy(&mut from, &mut to).await;
        let _ended = to.shutdown().await;
    }
}

/// Two members connected on the bulk lane.
async fn bulk_pair() -> (Transport, Transport) {
    let (a, b) = two(Limits::default());
    let lane = Lane::Bulk;
    a.connect(lane, address(&b, lane), b.key(), deadline())
        .await
        .expect("members connect");
    (a, b)
}

fn accept_at(node: &Transport) -> mpsc::UnboundedReceiver<(Bytes, BiStream)> {
    let (accepted, streams) = mpsc::unbounded_channel();
    node.register_streams(SERVICE, Lane::Bulk, Accepts(accepted));
    streams
}

async fn open(
    from: &Transport,
    to: &Transport,
    header: &'static [u8],
) -> Result<BiStream, RpcError> {
    let header = Bytes::from_static(header);
    from.open_stream(Lane::Bulk, to.key(), SERVICE, header, deadline())
        .await
}

/// An open stream, seen from both ends.
async fn both_ends(a: &Transport, b: &Transport) -> (BiStream, BiStream) {
    let mut streams = accept_at(b);
    let near = open(a, b, b"header").await.expect("accepted");
    let (header, far) = soon(streams.recv()).await.expect("accepted");
    assert_eq!(header, "header");
    (near, far)
}

fn assert_reset(err: &std::io::Error, code: CloseCode) {
    assert_eq!(err.kind(), ErrorKind::ConnectionReset, "{err}");
    assert_eq!(close_code_of(err), Some(code), "{err}");
    assert!(err.to_string().contains(code.text()), "{err}");
}

#[tokio::test]
async fn a_stream_carries_bytes_both_ways_whoever_dialled() {
    let (a, b) = bulk_pair().await;
    for (from, to) in [(&a, &b), (&b, &a)] {
        to.register_streams(SERVICE, Lane::Bulk, Mirror);
        let mut stream = open(from, to, b"").await.expect("accepted");
        let sent: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let write = async {
            writer.write_all(&sent).await.expect("written");
            writer.shutdown().await.expect("ended");
        };
        let mut back = Vec::new();
        let read = reader.read_to_end(&mut back);
        let ((), read) = soon(async { tokio::join!(write, read) }).await;
        assert_eq!(read.expect("ends with FIN"), sent.len());
        assert_eq!(back, sent);
    }
    stop([a, b]).await;
}

#[tokio::test]
async fn a_stream_that_is_shut_down_and_dropped_still_delivers_what_was_written() {
    let (a, b) = bulk_pair().await;
    let (mut near, mut far) = both_ends(&a, &b).await;
    near.write_all(&[7; 100_000]).await.expect("written");
    near.shutdown().await.expect("ended");
    drop(near);
    let mut read = Vec::new();
    soon(far.read_to_end(&mut read)).await.expect("delivered");
    assert_eq!(read.len(), 100_000);
    // The other direction was given up.
    let err = until_write_fails(&mut far).await;
    assert_reset(&err, CloseCode::Abandoned);
    stop([a, b]).await;
}

async fn until_write_fails(stream: &mut BiStream) -> std::io::Error {
    let writing = async {
        loop {
            if let Err(err) = stream.write_all(&[1; 1024]).await {
                return err;
            }
            tokio::task::yield_now().await;
        }
    };
    soon(writing).await
}

#[tokio::test]
async fn dropping_either_end_resets_the_other_by_name_in_both_directions() {
    let (a, b) = bulk_pair().await;
    for opener_drops in [true, false] {
        let (near, far) = both_ends(&a, &b).await;
        let (dropped, mut kept) = if opener_drops {
            (near, far)
        } else {
            (far, near)
        };
        drop(dropped);
        let err = soon(kept.read_u8()).await.expect_err("given up");
        assert_reset(&err, CloseCode::Abandoned);
        let err = until_write_fails(&mut kept).await;
        assert_reset(&err, CloseCode::Abandoned);
    }
    stop([a, b]).await;
}

#[tokio::test]
async fn a_stream_may_be_given_up_with_a_reason_of_its_own() {
    let (a, b) = bulk_pair().await;
    let (near, mut far) = both_ends(&a, &b).await;
    near.abort(CloseCode::SlowReader);
    let err = soon(far.read_u8()).await.expect_err("given up");
    assert_reset(&err, CloseCode::SlowReader);
    stop([a, b]).await;
}

#[tokio::test]
async fn a_lost_connection_ends_its_streams_by_name() {
    let (a, b) = bulk_pair().await;
    let (mut near, _far) = both_ends(&a, &b).await;
    assert!(a.is_connected(Lane::Bulk, b.key()));
    b.disconnect(a.key(), CloseCode::Superseded);
    let err = soon(near.read_u8()).await.expect_err("lost");
    assert_reset(&err, CloseCode::Superseded);
    assert!(!b.is_connected(Lane::Bulk, a.key()));
    stop([a, b]).await;
}

/// Refuses as its header says.
struct Refuses;

impl StreamHandler for Refuses {
    async fn open(&self, inbound: Inbound) {
        match &inbound.header[..] {
            b"busy" => inbound.refuse_busy().await,
            b"panic" => panic!("a bug in a handler"),
            b"silent" => {}
            _ => inbound.refuse("sandbox is paused").await,
        }
    }
}

#[tokio::test]
async fn a_refusal_reaches_the_opener_by_name_and_costs_the_connection_nothing() {
    let (a, b) = bulk_pair().await;
    let err = open(&a, &b, b"").await.expect_err("nobody takes it");
    assert!(matches!(err, RpcError::NotServed { .. }), "{err}");

    b.register_streams(SERVICE, Lane::Bulk, Refuses);
    let err = open(&a, &b, b"no").await.expect_err("refused");
    assert!(matches!(&err, RpcError::Rejected { reason } if reason == "sandbox is paused"));
    let err = open(&a, &b, b"busy").await.expect_err("refused");
    assert!(matches!(err, RpcError::Busy), "{err}");
    for unanswered in [&b"panic"[..], b"silent"] {
        let err = open(&a, &b, unanswered).await.expect_err("no answer");
        let code = CloseCode::HandlerFailed;
        assert!(
            matches!(err, RpcError::Closed { code: told } if told == code),
            "{err}"
        );
    }
    a.ping(Lane::Bulk, b.key(), deadline())
        .await
        .expect("the connection lives on");
    stop([a, b]).await;
}

#[tokio::test]
async fn streams_are_registered_for_their_lane_and_calls_do_not_reach_them() {
    let (a, b) = bulk_pair().await;
    connect(&a, &b).await;
    b.register_streams(SERVICE, Lane::Control, Mirror);
    let err = open(&a, &b, b"").await.expect_err("not on the bulk lane");
    assert!(matches!(err, RpcError::NotServed { .. }), "{err}");
    let opened = a.open_stream(Lane::Control, b.key(), SERVICE, Bytes::new(), deadline());
    drop(opened.await.expect("on the control lane"));
    let err = a.call(b.key(), ECHO, Bytes::new(), deadline()).await;
    assert!(matches!(err, Err(RpcError::NotServed { .. })));
    stop([a, b]).await;
}

#[tokio::test]
async fn a_header_may_be_large_and_not_endless() {
    let (a, b) = bulk_pair().await;
    let mut streams = accept_at(&b);
    let open = |bytes: usize| {
        let header = vec![7; bytes].into();
        a.open_stream(Lane::Bulk, b.key(), SERVICE, header, deadline())
    };
    drop(open(STREAM_HEADER_BYTES).await.expect("fits"));
    let (header, _stream) = soon(streams.recv()).await.expect("accepted");
    assert_eq!(header.len(), STREAM_HEADER_BYTES);
    let err = open(STREAM_HEADER_BYTES + 1).await.expect_err("too large");
    assert!(matches!(err, RpcError::TooLarge), "{err}");
    stop([a, b]).await;
}

/// Never answers, and says when its future is gone.
struct Ponders {
    begun: mpsc::UnboundedSender<()>,
    ended: Arc<Mutex<()>>,
}

impl StreamHandler for Ponders {
    async fn open(&self, _inbound: Inbound) {
        let _held = self.ended.lock().await;
        let _gone = self.begun.send(());
        std::future::pending().await
    }
}

#[tokio::test]
async fn an_opener_that_gives_up_ends_the_handler_s_future() {
    let (a, b) = bulk_pair().await;
    let (begun, mut calls) = mpsc::unbounded_channel();
    let ended = Arc::new(Mutex::new(()));
    let handler = Ponders {
        begun,
        ended: Arc::clone(&ended),
    };
    b.register_streams(SERVICE, Lane::Bulk, handler);
    tokio::select! {
        _ = open(&a, &b, b"") => panic!("never answered"),
        begun = soon(calls.recv()) => begun.expect("begun"),
    }
    // `select!` has dropped the opening.
    drop(soon(ended.lock()).await);
    stop([a, b]).await;
}

/// The writer waits for the reader: what is under way stays within QUIC's window.
#[tokio::test]
async fn a_reader_that_stops_holds_its_writer_and_nobody_else() {
    let (a, b) = bulk_pair().await;
    let (mut near, far) = both_ends(&a, &b).await;
    let mut written = 0_u32;
    let chunk = [7; 64 << 10];
    // Nobody has to read these.
    while written < BULK_STREAM_WINDOW_BYTES / 2 {
        let wrote = soon(near.write(&chunk)).await.expect("open");
        written += u32::try_from(wrote).expect("small");
    }
    while let Ok(wrote) = timeout(Duration::from_millis(300), near.write(&chunk)).await {
        written += u32::try_from(wrote.expect("open")).expect("small");
        assert!(written <= 2 * BULK_STREAM_WINDOW_BYTES, "nothing holds it");
    }

    b.register_streams(SERVICE, Lane::Bulk, Mirror);
    let mut other = open(&a, &b, b"").await.expect("accepted");
    other.write_all(b"through").await.expect("written");
    let mut back = [0; 7];
    soon(other.read_exact(&mut back)).await.expect("answered");
    assert_eq!(&back, b"through");
    drop((near, far, other));
    stop([a, b]).await;
}

/// Whatever state a transfer is in, heartbeats have a connection, a socket and a window of their own.
#[tokio::test]
async fn transfers_that_stand_still_both_ways_hold_up_no_call() {
    let (a, b) = bulk_pair().await;
    b.register(SERVICE, Echo);
    connect(&a, &b).await;
    let mut stuffed = Vec::new();
    for _ in 0..4 {
        let (near, far) = both_ends(&a, &b).await;
        for mut end in [near, far] {
            let chunk = [7; 256 << 10];
            while timeout(Duration::from_millis(50), end.write_all(&chunk))
                .await
                .is_ok()
            {}
            stuffed.push(end);
        }
    }
    for number in 0..50_u32 {
        let body = Bytes::copy_from_slice(&number.to_be_bytes());
        let back = a.call(b.key(), ECHO, body.clone(), deadline()).await;
        assert_eq!(back.expect("answered"), body);
    }
    drop(stuffed);
    stop([a, b]).await;
}

#[tokio::test]
async fn a_reader_that_never_reads_loses_its_stream_by_name() {
    let (a, b) = two(Limits {
        stream_stall: Duration::from_millis(300),
        ..Limits::default()
    });
    let lane = Lane::Bulk;
    let connected = a.connect(lane, address(&b, lane), b.key(), deadline());
    connected.await.expect("members connect");
    let (mut near, mut far) = both_ends(&a, &b).await;
    let err = soon(until_write_fails(&mut near)).await;
    let stalled = err.get_ref().and_then(|err| err.downcast_ref());
    let expected = StreamStalled {
        for_at_least: Duration::from_millis(300),
    };
    assert_eq!(stalled, Some(&expected), "{err}");
    drop(near);
    let mut read = Vec::new();
    let err = soon(far.read_to_end(&mut read)).await;
    assert_reset(&err.expect_err("given up"), CloseCode::Stalled);
    stop([a, b]).await;
}

#[tokio::test]
async fn a_reader_that_is_slower_than_the_bound_but_reads_keeps_its_stream() {
    // Many times the wait for a piece, so that a busy machine makes none of them so long.
    let stall = Duration::from_secs(3);
    let (a, b) = two(Limits {
        stream_stall: stall,
        ..Limits::default()
    });
    let lane = Lane::Bulk;
    let connected = a.connect(lane, address(&b, lane), b.key(), deadline());
    connected.await.expect("members connect");
    let (mut near, mut far) = both_ends(&a, &b).await;
    // All but the last window of it waits for the reader: 48 pieces, 3.8 s.
    let all = 4 * BULK_STREAM_WINDOW_BYTES as usize;
    let begun = Instant::now();
    let write = async {
        near.write_all(&vec![7; all]).await.expect("waited for");
        near.shutdown().await.expect("ended");
        begun.elapsed()
    };
    let read = async {
        let (mut total, mut piece) = (0, vec![0; 64 << 10]);
        let mut pauses = tokio::time::interval(Duration::from_millis(80));
        while total < all {
            pauses.tick().await;
            total += far.read(&mut piece).await.expect("goes on");
        }
        total
    };
    let (writing, total) = soon(async { tokio::join!(write, read) }).await;
    assert_eq!(total, all);
    assert!(writing > stall, "it was not slow: {writing:?}");
    stop([a, b]).await;
}

#[tokio::test]
async fn stopping_ends_streams_that_outlast_its_deadline() {
    let (a, b) = bulk_pair().await;
    b.register_streams(SERVICE, Lane::Bulk, Mirror);
    let mut stream = open(&a, &b, b"").await.expect("accepted");
    soon(b.stop(Instant::now() + Duration::from_millis(50))).await;
    let err = soon(stream.read_u8()).await.expect_err("cut off");
    assert_reset(&err, CloseCode::Stopping);
    drop(stream);
    stop([a]).await;
}
