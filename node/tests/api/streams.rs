//! Large bodies flow through the interface without being kept, on the node that owns the sandbox
//! and through another. Alone in its binary, because it measures the memory of the whole process,
//! agent included.

use bytes::Bytes;
use futures::stream;
use http::Method;
use http_body_util::BodyExt as _;
use serde_json::json;

use crate::world::{KEY, World, encode_form, full, streamed};

/// Size of the body: far above what may stay in memory.
const PIECES: usize = 192;
const PIECE_BYTES: usize = 1 << 20;
/// How much the process may grow meanwhile: buffers of sockets and channels, and the test's own.
const GROWTH_BYTES: u64 = 48 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_flows_in_and_out_with_flat_memory() {
    flow_both_ways(World::new().await).await;
    flow_both_ways(World::elsewhere().await.0).await;
}

async fn flow_both_ways(world: World) {
    let id = world.capsule().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("large").display().to_string();
    let before = peak_bytes();

    let form = encode_form(&[("path", path.as_bytes()), ("file", b"")]);
    let (head, tail) = form.split_at(form.len() - b"\r\n--xyz--\r\n".len());
    let piece = |number: usize| Bytes::from(vec![u8::try_from(number % 251).unwrap(); PIECE_BYTES]);
    let pieces = [Bytes::copy_from_slice(head)]
        .into_iter()
        .chain((0..PIECES).map(piece))
        .chain([Bytes::copy_from_slice(tail)]);
    let request = world
        .request(
            Method::POST,
            &format!("/v1/capsules/{id}/files/stream/write"),
        )
        .header("x-api-key", KEY)
        .header("content-type", "multipart/form-data; boundary=xyz")
        .body(streamed(stream::iter(pieces)))
        .unwrap();
    world.send(request).await.is(204);
    let size = std::fs::metadata(&path).expect("the file").len();
    assert_eq!(size, (PIECES * PIECE_BYTES) as u64);

    let request = world
        .request(
            Method::POST,
            &format!("/v1/capsules/{id}/files/stream/read"),
        )
        .header("x-api-key", KEY)
        .body(full(json!({"path": path}).to_string()))
        .unwrap();
    let mut answer = world.open(request).await.into_body();
    let mut read = 0;
    while let Some(frame) = answer.frame().await {
        let data = frame.expect("a frame").into_data().expect("data");
        for (at, byte) in data.iter().enumerate().step_by(4096) {
            let number = (read + at) / PIECE_BYTES % 251;
            assert_eq!(usize::from(*byte), number, "at {}", read + at);
        }
        read += data.len();
    }
    assert_eq!(read, PIECES * PIECE_BYTES);

    let growth = peak_bytes() - before;
    assert!(growth < GROWTH_BYTES, "memory grew by {} MiB", growth >> 20);
}

/// The most memory this process ever had.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("a number") * 1024
}
