//! A bad network, for tests, benchmarks and a local cluster: packets are lost, late, doubled, out of
//! order, or do not pass at all.
//!
//! It sits between QUIC and a node's sockets and needs no privileges. Everything that is drawn comes
//! from one seed. [`Faults`] is a handle: whoever keeps a clone of what it put into
//! [`crate::Config::faults`] can change the network while the node runs. A node started without one
//! has plain sockets and pays nothing.
//!
//! Faults other than blocking are applied to what a node sends, so a bad link in both directions
//! needs a handle at both nodes. Blocked addresses are cut off both ways by one node alone.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Packets of one socket that may be late at the same time; more are lost. Memory: 6 MiB with full
/// Ethernet packets.
const MAX_LATE: usize = 4096;
/// How much later than the others a reordered packet goes out; several packets pass it even on a
/// slow link.
const REORDERED_BY: Duration = Duration::from_millis(5);

/// How bad the way from this node to all others is. Chances are between 0 and 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Chance that a packet is lost.
    pub loss: f64,
    /// How late every packet is.
    pub delay: Duration,
    /// How much later still it may be.
    pub jitter: Duration,
    /// Chance that a packet comes twice.
    pub duplicate: f64,
    /// Chance that later packets overtake it.
    pub reorder: f64,
}

/// The network between one node and the others. Clones are handles to the same one.
#[derive(Clone)]
pub struct Faults(Arc<Mutex<State>>);

struct State {
    link: Link,
    blocked: HashSet<SocketAddr>,
    random: Random,
}

impl Faults {
    /// A network without faults, until it is told otherwise; what happens then follows from `seed`
    /// and the order of packets.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            link: Link::default(),
            blocked: HashSet::new(),
            random: Random(seed),
        })))
    }

    /// Makes the way out as bad as `link` from now on.
    pub fn set(&self, link: Link) {
        self.lock().link = link;
    }

    /// Lets nothing pass to or from exactly these addresses; none heals all.
    pub fn block(&self, addresses: impl IntoIterator<Item = SocketAddr>) {
        self.lock().blocked = addresses.into_iter().collect();
    }

    fn is_blocked(&self, address: SocketAddr) -> bool {
        self.lock().blocked.contains(&address)
    }

    fn fate(&self, to: SocketAddr) -> Fate {
        self.lock().fate(to)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Faults")
            .field("link", &state.link)
            .field("blocked", &state.blocked)
            .finish_non_exhaustive()
    }
}

/// How late each copy of a packet is; a packet without one is lost.
type Fate = [Option<Duration>; 2];

impl State {
    fn fate(&mut self, to: SocketAddr) -> Fate {
        // Drawn whether needed or not, so that a switch does not shift what comes after it.
        let (lost, doubled, overtaken) = (
            self.random.chance(self.link.loss),
            self.random.chance(self.link.duplicate),
            self.random.chance(self.link.reorder),
        );
        let late = [self.lateness(), self.lateness()];
        if lost || self.blocked.contains(&to) {
            return [None, None];
        }
        let first = if overtaken {
            late[0] + REORDERED_BY
        } else {
            late[0]
        };
        [Some(first), doubled.then_some(late[1])]
    }

    fn lateness(&mut self) -> Duration {
        self.link.delay + self.link.jitter.mul_f64(self.random.part())
    }
}

/// `SplitMix64`: small, and the same everywhere.
struct Random(u64);

impl Random {
    /// At least 0 and below 1.
    fn part(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        // The upper 53 bits are what a float holds exactly.
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn chance(&mut self, chance: f64) -> bool {
        self.part() < chance
    }
}

/// Puts `faults` before `socket`. Late packets are sent by a task that ends with the socket.
pub(crate) fn wrap(socket: Arc<dyn AsyncUdpSocket>, faults: Faults) -> Arc<dyn AsyncUdpSocket> {
    let (late, packets) = mpsc::channel(MAX_LATE);
    tokio::spawn(send_late(Arc::clone(&socket), packets));
    Arc::new(Faulty {
        socket,
        faults,
        late,
    })
}

/// A packet that is not sent yet.
struct Late {
    due: Instant,
    /// Packets that are due together go out in the order they came in.
    number: u64,
    to: SocketAddr,
    ecn: Option<EcnCodepoint>,
    from: Option<IpAddr>,
    bytes: Vec<u8>,
}

impl Late {
    fn transmit(&self) -> Transmit<'_> {
        Transmit {
            destination: self.to,
            ecn: self.ecn,
            contents: &self.bytes,
            segment_size: None,
            src_ip: self.from,
        }
    }
}

impl PartialEq for Late {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Late {}

impl PartialOrd for Late {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Late {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

/// Sends packets when they are due, until their socket is gone.
async fn send_late(socket: Arc<dyn AsyncUdpSocket>, mut packets: mpsc::Receiver<Late>) {
    let mut waiting = BinaryHeap::new();
    let mut number = 0;
    loop {
        let next = waiting.peek().map(|Reverse(late): &Reverse<Late>| late.due);
        let due = async {
            match next {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            packet = packets.recv() => {
                let Some(mut packet) = packet else { return };
                if waiting.len() < MAX_LATE {
                    packet.number = number;
                    number += 1;
                    waiting.push(Reverse(packet));
                }
            }
            () = due => {
                if let Some(Reverse(packet)) = waiting.pop() {
                    // A full socket loses it, as a full link would.
                    let _lost = socket.try_send(&packet.transmit());
                }
            }
        }
    }
}

/// A socket with a bad network behind it.
struct Faulty {
    socket: Arc<dyn AsyncUdpSocket>,
    faults: Faults,
    late: mpsc::Sender<Late>,
}

impl Faulty {
    fn send_later(&self, transmit: &Transmit<'_>, by: Duration) {
        let late = Late {
            due: Instant::now() + by,
            number: 0,
            to: transmit.destination,
            ecn: transmit.ecn,
            from: transmit.src_ip,
            bytes: transmit.contents.to_vec(),
        };
        // A full queue loses it, as a full link would.
        let _lost = self.late.try_send(late);
    }
}

impl AsyncUdpSocket for Faulty {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        for copy in self.faults.fate(transmit.destination).into_iter().flatten() {
            if copy.is_zero() {
                self.socket.try_send(transmit)?;
            } else {
                self.send_later(transmit, copy);
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let polled = self.socket.poll_recv(cx, bufs, meta);
        if let Poll::Ready(Ok(count)) = &polled {
            for packet in &mut meta[..*count] {
                if self.faults.is_blocked(packet.addr) {
                    // Nothing is read of a packet without bytes.
                    packet.len = 0;
                }
            }
        }
        polled
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// One, so that every packet has a fate of its own.
    fn max_transmit_segments(&self) -> usize {
        1
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty")
            .field("socket", &self.socket)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Link = Link {
        loss: 0.1,
        delay: Duration::from_millis(20),
        jitter: Duration::from_millis(10),
        duplicate: 0.05,
        reorder: 0.2,
    };

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    fn fates(seed: u64, link: Link) -> Vec<Fate> {
        let faults = Faults::seeded(seed);
        faults.set(link);
        (0..10_000).map(|_| faults.fate(address(1))).collect()
    }

    #[test]
    fn a_seed_decides_everything() {
        assert_eq!(fates(7, BAD), fates(7, BAD));
        assert_ne!(fates(7, BAD), fates(8, BAD));
    }

    #[test]
    fn chances_and_delays_are_kept() {
        let fates = fates(1, BAD);
        let count = |wanted: &dyn Fn(&&Fate) -> bool| fates.iter().filter(wanted).count();
        let (latest, by) = (BAD.delay + BAD.jitter, REORDERED_BY);
        let lost = count(&|fate| fate[0].is_none());
        let doubled = count(&|fate| fate[1].is_some());
        let overtaken = count(&|fate| fate[0].is_some_and(|late| late > latest));
        assert!((900..1100).contains(&lost), "{lost}");
        assert!((380..520).contains(&doubled), "{doubled}");
        assert!(overtaken > 500, "{overtaken}");
        let mut late = fates.iter().flatten().flatten();
        assert!(late.all(|late| *late >= BAD.delay && *late < latest + by));
    }

    #[test]
    fn a_network_without_faults_passes_everything_at_once() {
        let passed = [Some(Duration::ZERO), None];
        assert!(fates(1, Link::default()).iter().all(|fate| *fate == passed));
    }

    #[test]
    fn blocked_addresses_get_nothing_until_they_are_healed() {
        let faults = Faults::seeded(1);
        faults.block([address(1)]);
        assert_eq!(faults.fate(address(1)), [None, None]);
        assert_ne!(faults.fate(address(2)), [None, None]);
        faults.block([]);
        assert_ne!(faults.fate(address(1)), [None, None]);
    }
}
