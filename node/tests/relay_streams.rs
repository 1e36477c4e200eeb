//! Streams through a node that does not own the sandbox: carried, ended, broken and refused.
//! Everything holds over pipes in memory and over two real transports.

#![allow(clippy::unwrap_used)] // a failed test may panic

mod relay_world;

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use proto::wire::relay::{RefusalKind, Verdict as Judged};
use raft::command::Verdict;
use relay_world::{BOTH, Between, OWNER, Pair, eventually, soon};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wrenn_node::relay::RelayError;

#[tokio::test]
async fn an_end_in_one_direction_leaves_the_other_open() {
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        let (mut near, mut far) = pair.stream(&listener).await;
        near.write_all(b"question").await.expect("written");
        near.shutdown().await.expect("ended");
        let mut asked = String::new();
        soon(far.read_to_string(&mut asked))
            .await
            .expect("read to the end");
        assert_eq!(asked, "question", "{between:?}");

        far.write_all(b"answer").await.expect("written");
        drop(far);
        let mut answer = String::new();
        soon(near.read_to_string(&mut answer))
            .await
            .expect("read to the end");
        assert_eq!(answer, "answer", "{between:?}");
        eventually(|| pair.server.streams() == 0).await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_takes_the_connection_in_the_guest_with_it() {
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        let (mut near, mut far) = pair.stream(&listener).await;
        near.write_all(b"x").await.expect("written");
        soon(far.read_u8()).await.expect("read");
        drop(near);
        // The guest neither reads nor writes more than it must to see it.
        let ended = soon(far.read(&mut [0])).await;
        assert!(matches!(ended, Ok(0) | Err(_)), "{between:?}: {ended:?}");
        eventually(|| pair.server.streams() == 0).await;
    }
}

#[tokio::test]
async fn a_guest_that_dies_breaks_its_streams_and_does_not_end_them() {
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        let (mut near, mut far) = pair.stream(&listener).await;
        far.write_all(b"half a fi").await.expect("written");
        let mut half = [0; 9];
        soon(near.read_exact(&mut half)).await.expect("read");
        pair.gone.cancel();
        let broken = soon(near.read(&mut [0])).await.expect_err("broken");
        assert_eq!(broken.kind(), io::ErrorKind::ConnectionReset, "{between:?}");
        assert_eq!(RelayError::among_causes(&broken), None, "{between:?}");
    }
}

#[tokio::test]
async fn a_node_that_is_gone_is_told_from_a_guest_that_is() {
    let (pair, listener) = Pair::raw(Between::Quic).await;
    let (mut near, _far) = pair.stream(&listener).await;
    let [owner, _] = pair.transports.clone().expect("transports");
    owner.stop(tokio::time::Instant::now()).await;
    let broken = soon(near.read(&mut [0])).await.expect_err("broken");
    let host = "n1".to_owned();
    let lost = RelayError::HostLost { id: pair.id, host };
    assert_eq!(RelayError::among_causes(&broken), Some(&lost));
    assert!(!lost.nothing_happened());
}

#[tokio::test]
async fn an_epoch_that_is_over_breaks_what_was_opened_under_it() {
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        let (mut near, _far) = pair.stream(&listener).await;
        let old = pair.asked.guest(pair.id).await.expect("a guest");
        pair.lose_owner().await;
        let broken = soon(near.read(&mut [0])).await.expect_err("broken");
        assert_eq!(broken.kind(), io::ErrorKind::ConnectionReset, "{between:?}");
        let again = soon(old.dial().dial()).await;
        assert!(again.is_err(), "{between:?}");
    }
}

#[tokio::test]
async fn an_owner_refuses_an_epoch_that_is_over_by_name() {
    for between in BOTH {
        let (pair, _listener) = Pair::raw(between).await;
        let header = open_header(&pair, pair.epoch.0, 80);
        pair.lose_owner().await;
        let refusal = refusal_of(&pair, header).await;
        assert_eq!(refusal, Some(RefusalKind::StaleEpoch), "{between:?}");
    }
}

#[tokio::test]
async fn garbage_other_versions_and_epochs_of_the_future_are_refused_by_name() {
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        let port = listener.address.port().into();
        for (header, expected) in [
            (
                Bytes::from_static(b"\xff\xff\xffnonsense"),
                RefusalKind::Garbled,
            ),
            (Bytes::new(), RefusalKind::Version),
            (vec![0x0a; 60_000].into(), RefusalKind::Garbled),
            (
                open_header(&pair, pair.epoch.0, 70_000),
                RefusalKind::Garbled,
            ),
            (
                open_header(&pair, pair.epoch.0 + 1, port),
                RefusalKind::Early,
            ),
        ] {
            let refusal = refusal_of(&pair, header).await;
            assert_eq!(refusal, Some(expected), "{between:?}");
        }
        // And it still serves.
        let (_near, _far) = pair.stream(&listener).await;
        let answered = pair
            .peers
            .ask(OWNER, Bytes::from_static(b"\xffwhat?"))
            .await;
        assert!(answered.is_ok(), "a refusal is an answer");
    }
}

#[tokio::test]
async fn a_guest_that_stands_still_or_does_not_listen_is_refused_by_name() {
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        let guest = pair.asked.guest(pair.id).await.expect("a guest");
        let nobody = soon(guest.dial().at_port(1).dial()).await.map(|_| ());
        let nobody = nobody.expect_err("nobody listens");
        let told = RelayError::among_causes(&nobody);
        assert!(matches!(told, Some(RelayError::Guest { .. })), "{told:?}");

        pair.guests.frozen.store(true, Ordering::Relaxed);
        let port = listener.address.port();
        let frozen = soon(guest.dial().at_port(port).dial()).await.map(|_| ());
        let frozen = frozen.expect_err("it stands still");
        let told = RelayError::among_causes(&frozen);
        assert!(matches!(told, Some(RelayError::Frozen { .. })), "{told:?}");
        assert_eq!(pair.server.streams(), 0);
    }
}

#[tokio::test]
async fn a_slow_reader_bounds_what_is_taken_from_its_writer() {
    /// Pipes, QUIC's windows, sockets of the kernel, with room to spare.
    const BOUND: usize = 24 << 20;
    for between in BOTH {
        let (pair, listener) = Pair::raw(between).await;
        for upwards in [true, false] {
            let (mut near, mut far) = pair.stream(&listener).await;
            let taken = if upwards {
                write_until_stuck(&mut near, BOUND).await
            } else {
                write_until_stuck(&mut far, BOUND).await
            };
            assert!(taken < BOUND, "{between:?}: {taken} bytes on their way");
        }
    }
}

#[tokio::test]
async fn a_host_that_the_cluster_misses_is_named_and_not_asked() {
    let (pair, _listener) = Pair::raw(Between::Pipes).await;
    let pipes = pair.pipes.clone().expect("pipes");
    pair.judge(Verdict::Missing).await;
    let away = pair.asked.guest(pair.id).await.map(|_| ());
    let told = away.expect_err("missing").to_string();
    assert!(
        told.contains("n1") && told.contains("since 2023-11-14"),
        "{told}"
    );
    assert!(pair.asked.console_tail(pair.id, 10).await.is_err());
    assert_eq!(pair.asked.facts(pair.id).await, None);
    assert_eq!(pipes.asked() + pipes.opened(), 0);

    pair.judge(Verdict::Back).await;
    assert!(pair.asked.guest(pair.id).await.is_ok());
    pipes.cut(OWNER);
    let away = pair.asked.console_tail(pair.id, 10).await;
    assert!(matches!(
        away,
        Err(RelayError::HostUnreachable { since: None, .. })
    ));
}

/// Writes until nothing more is taken, and says how much was.
async fn write_until_stuck<W: tokio::io::AsyncWrite + Unpin>(to: &mut W, most: usize) -> usize {
    let piece = vec![7; 64 << 10];
    let mut taken = 0;
    while taken < most {
        let Ok(count) = tokio::time::timeout(Duration::from_millis(300), to.write(&piece)).await
        else {
            break;
        };
        taken += count.expect("written");
    }
    taken
}

fn open_header(pair: &Pair, epoch: u64, port: u32) -> Bytes {
    let open = proto::wire::relay::Open {
        version: 1,
        sandbox: pair.id.0.to_vec(),
        epoch,
        port,
    };
    open.encode_to_vec().into()
}

/// Opens a stream by hand; `None` where the guest is at its other end.
async fn refusal_of(pair: &Pair, header: Bytes) -> Option<RefusalKind> {
    let mut stream = soon(pair.peers.open(OWNER, header)).await.expect("opened");
    let length = soon(stream.read_u16()).await.expect("a verdict");
    let mut verdict = vec![0; length.into()];
    soon(stream.read_exact(&mut verdict))
        .await
        .expect("a verdict");
    let verdict = Judged::decode(verdict.as_slice()).expect("a verdict");
    if verdict.refusal.is_some() {
        let ended = soon(stream.read(&mut [0])).await;
        assert_eq!(ended.expect("a clean end"), 0);
    }
    verdict.refusal.map(|it| it.kind())
}
