//! How much the bulk lane keeps under way: CUBIC, which is told of losses only where they mean a full link.
//!
//! CUBIC takes every loss for a queue that overflows and gives up 30 % of its window. A line that loses one packet in a
//! hundred by itself (radio, a busy exchange point) is then never filled: at 20 ms and 1 % it carried a sixth of what
//! the kernel's BBR does. So losses are counted here first, and handed on when they are more than [`TOLERATED`] of what
//! was sent lately, the share at which BBR gives way too. A full queue loses far more than that within a round trip, so
//! a busy link is still shared.
//!
//! quinn's own BBR is marked as an experiment by its authors; this changes only *when* a proven controller hears.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// One packet in so many may be lost without a word to CUBIC.
const TOLERATED: u64 = 50;
/// Packets over which the share is taken, with the older half counting less and less. At a loss of 1 % this makes a
/// reaction by chance a matter of once in hundreds of MB; a queue that overflows loses so many packets at once that
/// it is noticed within a round trip all the same.
const SPAN_PACKETS: u64 = 1024;

/// Makes the bulk lane's controllers.
#[derive(Debug, Default)]
pub(crate) struct PatientConfig {
    cubic: Arc<CubicConfig>,
}

impl ControllerFactory for PatientConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Patient {
            cubic: Arc::clone(&self.cubic).build(now, current_mtu),
            losses: Losses::new(current_mtu),
        })
    }
}

/// CUBIC behind a count of losses.
struct Patient {
    cubic: Box<dyn Controller>,
    losses: Losses,
}

impl Controller for Patient {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.losses.arrived(bytes);
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.cubic
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        // A router that marks instead of losing means a full queue, and so does a line on which nothing arrives.
        let plain = lost_bytes == 0 || is_persistent_congestion;
        if plain || self.losses.lost(now, sent, lost_bytes) {
            self.cubic
                .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.losses.span_bytes = SPAN_PACKETS * u64::from(new_mtu);
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            cubic: self.cubic.clone_box(),
            losses: self.losses.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What was lost lately, of what was sent.
#[derive(Clone, Debug)]
struct Losses {
    span_bytes: u64,
    sent: u64,
    lost: u64,
    /// When CUBIC was last told: what was sent before belongs to the same overflow.
    told: Option<Instant>,
}

impl Losses {
    fn new(mtu: u16) -> Self {
        Self {
            span_bytes: SPAN_PACKETS * u64::from(mtu),
            sent: 0,
            lost: 0,
            told: None,
        }
    }

    /// Bytes arrived.
    fn arrived(&mut self, bytes: u64) {
        self.sent += bytes;
        if self.sent >= self.span_bytes {
            self.sent /= 2;
            self.lost /= 2;
        }
    }

    /// Bytes that were sent at `sent` are lost: whether that is too much.
    fn lost(&mut self, now: Instant, sent: Instant, bytes: u64) -> bool {
        if self.told.is_some_and(|told| sent <= told) {
            return false;
        }
        self.sent += bytes;
        self.lost += bytes;
        let too_much = self.lost * TOLERATED > self.sent.max(self.span_bytes);
        if too_much {
            (self.sent, self.lost, self.told) = (0, 0, Some(now));
        }
        too_much
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    const MTU: u16 = 1200;
    const SEED: u64 = 4;

    /// How often CUBIC hears while `packets` are sent, one a microsecond, of which `chance` in 10,000 are lost.
    fn reactions(packets: u64, chance: u32) -> u32 {
        let (mut losses, mut random) = (Losses::new(MTU), StdRng::seed_from_u64(SEED));
        let start = Instant::now();
        let mut told = 0;
        for packet in 0..packets {
            let now = start + Duration::from_micros(packet);
            if random.random_range(0..10_000) < chance {
                told += u32::from(losses.lost(now, now, MTU.into()));
            } else {
                losses.arrived(MTU.into());
            }
        }
        told
    }

    #[test]
    fn one_lost_packet_in_a_hundred_is_hardly_ever_a_full_link() {
        let told = reactions(1_000_000, 100);
        assert!(told <= 5, "{told} reactions in 1.2 GB");
    }

    #[test]
    fn one_lost_packet_in_twenty_is_a_full_link() {
        let told = reactions(100_000, 500);
        assert!(told >= 100, "{told} reactions in 100,000 packets");
    }

    #[test]
    fn an_overflow_is_told_once_however_much_of_it_is_lost() {
        let mut losses = Losses::new(MTU);
        let start = Instant::now();
        let noticed = start + Duration::from_millis(20);
        let told = (0..1000)
            .filter(|_| losses.lost(noticed, start, MTU.into()))
            .count();
        assert_eq!(told, 1);
        assert!(!losses.lost(noticed, noticed + Duration::from_millis(1), MTU.into()));
    }

    #[test]
    fn a_link_that_is_lost_for_good_is_told_at_once() {
        let mut controller = Arc::new(PatientConfig::default()).build(Instant::now(), MTU);
        let before = controller.window();
        let now = Instant::now();
        controller.on_congestion_event(now, now, true, MTU.into());
        assert!(controller.window() < before);
    }

    #[test]
    fn a_few_losses_leave_the_window_and_many_cut_it() {
        let mut controller = Arc::new(PatientConfig::default()).build(Instant::now(), MTU);
        let before = controller.window();
        let now = Instant::now();
        controller.on_congestion_event(now, now, false, 10 * u64::from(MTU));
        assert_eq!(controller.window(), before);
        controller.on_congestion_event(now, now, false, 11 * u64::from(MTU));
        assert!(controller.window() < before);
    }
}
