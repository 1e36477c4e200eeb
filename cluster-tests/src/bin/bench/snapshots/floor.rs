//! What no page from a peer can be quicker than on this machine, for [`super::faults`].
//!
//! Two round trips of as many bytes as a page's chunk has, a short question one way and the chunk
//! the other, without any of the product's own work: over a warm byte stream between two nodes,
//! which encrypts; and over a unix socket between a blocking thread and a task. A fault from a peer
//! takes one of each, one after the other, and what a fault of this node takes besides.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;
use transport::streams::{Inbound, StreamHandler};
use transport::{Identity, Lane, Service, Transport};

use super::peer::{LOOPBACK, begin, join, soon};
use crate::Outcome;
use crate::figures::Samples;

/// A service of this benchmark's.
const SERVICE: Service = Service(901);
/// A question: a count and a chunk's name.
const QUESTION_BYTES: usize = 34;
/// An answer: a head, and a chunk of which half compresses away.
const ANSWER_BYTES: usize = 9 + (32 << 10);
/// Round trips, and those that are not counted: congestion windows grow.
const TRIPS: usize = 2000;
const WARM_UP: usize = 200;

/// Microseconds of round trips over a byte stream between two nodes.
pub(super) fn stream() -> Outcome<Samples> {
    let (there, here) = (Runtime::new()?, Runtime::new()?);
    let far = begin(&there, &Identity::ephemeral()?, LOOPBACK)?;
    let near = begin(&here, &Identity::ephemeral()?, LOOPBACK)?;
    far.register_streams(SERVICE, Lane::Bulk, Answers);
    join(&here, &near, &far, LOOPBACK)?;
    let (asking, peer) = (std::sync::Arc::clone(&near), far.key());
    let samples = here.block_on(here.spawn(async move {
        let trips = trips(&asking, peer).await;
        trips.map_err(|err| err.to_string())
    }))??;
    here.block_on(near.stop(soon()));
    there.block_on(far.stop(soon()));
    Ok(samples)
}

async fn trips(near: &Transport, peer: proto::ids::NodeKey) -> Outcome<Samples> {
    let opened = near.open_stream(Lane::Bulk, peer, SERVICE, Default::default(), soon());
    let mut stream = opened.await?;
    let mut answer = vec![0; ANSWER_BYTES];
    let mut samples = Samples::default();
    for trip in 0..TRIPS {
        let began = Instant::now();
        stream.write_all(&[7; QUESTION_BYTES]).await?;
        stream.read_exact(&mut answer).await?;
        if trip >= WARM_UP {
            samples.add(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(samples)
}

/// Answers every question.
struct Answers;

impl StreamHandler for Answers {
    async fn open(&self, inbound: Inbound) {
        let Ok(mut stream) = inbound.accept().await else {
            return;
        };
        stream.go_first();
        let (mut question, answer) = ([0; QUESTION_BYTES], vec![7; ANSWER_BYTES]);
        while stream.read_exact(&mut question).await.is_ok() {
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

/// Microseconds of round trips over a unix socket, from a thread that blocks to a task.
pub(super) fn socket() -> Outcome<Samples> {
    let runtime = Runtime::new()?;
    let (mut near, far) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    runtime.spawn(async move {
        let mut far = tokio::net::UnixStream::from_std(far)?;
        let (mut question, answer) = ([0; QUESTION_BYTES], vec![7; ANSWER_BYTES]);
        // Until the other end is closed.
        while far.read_exact(&mut question).await.is_ok() {
            far.write_all(&answer).await?;
        }
        std::io::Result::Ok(())
    });
    let mut answer = vec![0; ANSWER_BYTES];
    let mut samples = Samples::default();
    for trip in 0..TRIPS {
        let began = Instant::now();
        near.write_all(&[7; QUESTION_BYTES])?;
        near.read_exact(&mut answer)?;
        if trip >= WARM_UP {
            samples.add(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(samples)
}
