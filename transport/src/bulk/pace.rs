//! How fast this node sends on the bulk lane: a token bucket for each peer, shared by its streams.
//!
//! Priorities order only what is still inside the sender. Once the queue of a link fills, nothing
//! but sending less keeps the control lane's round trip short, and that round trip is how it is
//! noticed: while it is well above its minimum, the rate is halved.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use proto::ids::NodeKey;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::bucket::Bucket;
use crate::endpoint::Lane;
use crate::peers::Peers;

/// How often the round trip is looked at: a few times within the shortest election timeout.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How far above its minimum the round trip is a full queue.
const CROWDED_FACTOR: u32 = 3;
/// Below this a round trip harms nothing, whatever its minimum: a heartbeat comes every 100 ms.
const CALM: Duration = Duration::from_millis(5);
/// A writer that finds less than this waits for it: fed byte by byte it would never sleep.
const QUANTUM_BYTES: u64 = 16 << 10;
/// What may go out at once after a silence, as a part of what a second may carry.
const BURSTS_PER_SECOND: u64 = 20;

/// How fast this node sends to each peer on the bulk lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// As fast as QUIC finds the path to be.
    #[default]
    Unlimited,
    /// No faster than this, and half of it while the control lane's round trip to that peer is more
    /// than three times its minimum. Four fifths of the link leave the control lane its room.
    Fixed {
        /// Bytes a second for each peer.
        bytes_per_second: u64,
    },
}

/// A round trip and the shortest there was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoundTrip {
    pub(crate) now: Duration,
    pub(crate) min: Duration,
}

impl RoundTrip {
    fn is_crowded(self) -> bool {
        self.now > CALM && self.now > CROWDED_FACTOR * self.min
    }
}

/// The pacers of one node.
pub(crate) struct Paces {
    pace: Pace,
    peers: Weak<Peers>,
    pacers: Mutex<HashMap<NodeKey, Weak<Pacer>>>,
}

impl Paces {
    pub(crate) fn new(pace: Pace, peers: &Arc<Peers>) -> Self {
        Self {
            pace,
            peers: Arc::downgrade(peers),
            pacers: Mutex::default(),
        }
    }

    /// What a stream to `peer` on `lane` has to keep to.
    pub(crate) fn of(&self, lane: Lane, peer: NodeKey) -> Option<Arc<Pacer>> {
        let (Lane::Bulk, Pace::Fixed { bytes_per_second }) = (lane, self.pace) else {
            return None;
        };
        let mut pacers = self.pacers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pacer) = pacers.get(&peer).and_then(Weak::upgrade) {
            return Some(pacer);
        }
        pacers.retain(|_, pacer| pacer.strong_count() > 0);
        let peers = Weak::clone(&self.peers);
        let look = move || {
            let connection = peers.upgrade()?.newest(peer, Lane::Control)?;
            Some(RoundTrip {
                now: connection.rtt(),
                min: connection.min_rtt(),
            })
        };
        let pacer = Arc::new(Pacer::new(bytes_per_second, look));
        pacers.insert(peer, Arc::downgrade(&pacer));
        Some(pacer)
    }
}

/// What all streams to one peer may send together.
pub(crate) struct Pacer {
    bytes_per_second: u64,
    look: Box<dyn Fn() -> Option<RoundTrip> + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    bucket: Bucket,
    looked: Option<Instant>,
}

impl Pacer {
    pub(crate) fn new(
        bytes_per_second: u64,
        look: impl Fn() -> Option<RoundTrip> + Send + Sync + 'static,
    ) -> Self {
        let burst = (bytes_per_second / BURSTS_PER_SECOND).max(QUANTUM_BYTES);
        Self {
            bytes_per_second,
            look: Box::new(look),
            state: Mutex::new(State {
                bucket: Bucket::new(bytes_per_second, burst, Instant::now()),
                looked: None,
            }),
        }
    }

    /// Takes up to `want` bytes, or tells when to ask again.
    fn take(&self, want: u64) -> Result<u64, Instant> {
        let now = Instant::now();
        let mut state = self.lock();
        let due = state.looked.is_none_or(|at| now - at >= LOOK_EVERY);
        if due {
            state.looked = Some(now);
            let crowded = (self.look)().is_some_and(RoundTrip::is_crowded);
            let share = if crowded { 2 } else { 1 };
            state.bucket.set_rate(self.bytes_per_second / share, now);
        }
        match state.bucket.wait_for(want.min(QUANTUM_BYTES), now) {
            Duration::ZERO => Ok(state.bucket.take(want, now)),
            wait => Err(now + wait),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream's share of a [`Pacer`].
pub(crate) struct Paced {
    pacer: Arc<Pacer>,
    /// Until when this stream waits for the bucket.
    waits: Option<Pin<Box<Sleep>>>,
}

impl Paced {
    pub(crate) fn new(pacer: Arc<Pacer>) -> Self {
        Self { pacer, waits: None }
    }

    /// Takes at least one and up to `want` bytes, none only if none are wanted.
    pub(crate) fn poll_take(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<usize> {
        loop {
            if let Some(waits) = &mut self.waits {
                ready!(waits.as_mut().poll(cx));
                self.waits = None;
            }
            if want == 0 {
                return Poll::Ready(0);
            }
            match self.pacer.take(want as u64) {
                // It is no more than `want`.
                Ok(taken) => return Poll::Ready(usize::try_from(taken).unwrap_or(want)),
                Err(until) => self.waits = Some(Box::pin(sleep_until(until))),
            }
        }
    }

    /// Gives back what was not sent.
    pub(crate) fn put_back(&self, bytes: usize) {
        self.pacer.lock().bucket.put_back(bytes as u64);
    }
}

impl std::fmt::Debug for Paced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Paced({} B/s)", self.pacer.bytes_per_second)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const RATE: u64 = 10 << 20;

    /// What a greedy stream gets in `window` of moved clock.
    async fn sent_in(paced: &mut Paced, window: Duration) -> u64 {
        let until = Instant::now() + window;
        let mut sent = 0;
        while Instant::now() < until {
            let take = poll_fn(|cx| paced.poll_take(cx, 1 << 20));
            sent += take.await as u64;
        }
        sent
    }

    /// Whether `sent` is within a burst and each stream's last quantum of `expected`.
    fn is_about(sent: u64, expected: u64) -> bool {
        sent.abs_diff(expected) <= RATE / BURSTS_PER_SECOND + 4 * QUANTUM_BYTES
    }

    fn pacer(crowded: &Arc<AtomicBool>) -> Arc<Pacer> {
        let crowded = Arc::clone(crowded);
        Arc::new(Pacer::new(RATE, move || {
            let ms = if crowded.load(Ordering::SeqCst) {
                50
            } else {
                10
            };
            Some(RoundTrip {
                now: Duration::from_millis(ms),
                min: Duration::from_millis(10),
            })
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_gets_the_rate_and_half_of_it_while_the_control_lane_is_crowded() {
        let crowded = Arc::new(AtomicBool::new(false));
        let mut paced = Paced::new(pacer(&crowded));
        let second = Duration::from_secs(1);
        let sent = sent_in(&mut paced, 4 * second).await;
        assert!(is_about(sent, 4 * RATE), "{sent}");
        crowded.store(true, Ordering::SeqCst);
        let sent = sent_in(&mut paced, 4 * second).await;
        assert!(is_about(sent, 2 * RATE), "{sent}");
        crowded.store(false, Ordering::SeqCst);
        let sent = sent_in(&mut paced, 4 * second).await;
        assert!(is_about(sent, 4 * RATE), "{sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn streams_to_one_peer_share_its_rate() {
        let pacer = pacer(&Arc::new(AtomicBool::new(false)));
        let mut all = [0; 4].map(|_: u8| Paced::new(Arc::clone(&pacer)));
        let [a, b, c, d] = &mut all;
        let window = Duration::from_secs(2);
        let sent = tokio::join!(
            sent_in(a, window),
            sent_in(b, window),
            sent_in(c, window),
            sent_in(d, window)
        );
        let sent = sent.0 + sent.1 + sent.2 + sent.3;
        assert!(is_about(sent, 2 * RATE), "{sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_sent_is_given_back() {
        let pacer = pacer(&Arc::new(AtomicBool::new(false)));
        let mut paced = Paced::new(pacer);
        let first = poll_fn(|cx| paced.poll_take(cx, usize::MAX)).await;
        paced.put_back(first);
        assert_eq!(poll_fn(|cx| paced.poll_take(cx, usize::MAX)).await, first);
        assert_eq!(poll_fn(|cx| paced.poll_take(cx, 0)).await, 0);
    }

    #[test]
    fn a_short_round_trip_is_never_crowded_whatever_its_minimum() {
        let round_trip = |now_ms, min_us| RoundTrip {
            now: Duration::from_millis(now_ms),
            min: Duration::from_micros(min_us),
        };
        assert!(!round_trip(4, 100).is_crowded());
        assert!(round_trip(6, 100).is_crowded());
        assert!(!round_trip(60, 20_000).is_crowded());
        assert!(round_trip(61, 20_000).is_crowded());
    }
}
