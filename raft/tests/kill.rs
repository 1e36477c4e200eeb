//! A process that is killed at any moment loses nothing it acknowledged.
//!
//! Killing a process keeps the page cache, so this finds mistakes in our own order of things, not
//! missing syncs; those are `power_cut.rs`'s business.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::writer;
use rand::Rng;

#[test]
fn nothing_acknowledged_is_lost_by_kill() {
    writer::become_writer_if_asked();
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("acknowledged");
    for _ in 0..12 {
        let mut child = writer::spawn("nothing_acknowledged_is_lost_by_kill", dir.path(), &notes);
        // The moment is what the test is about; there is nothing to wait for.
        std::thread::sleep(Duration::from_millis(rand::rng().random_range(0..150)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let last = writer::acknowledged(&notes);
    println!("{last} writes were acknowledged");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { writer::check(dir.path(), last).await.shutdown().await });
}
