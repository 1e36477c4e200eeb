//! A machine: its clock, its guests and their shims, which live on while the daemon does not.

use std::collections::BTreeMap;
use std::time::Duration;

use node::cluster::lease::{LeaseTimes, Limits, Tick};
use node::sandbox::{End, Observed, ObservedState};
use proto::epoch::Epoch;
use proto::ids::SandboxId;
use raft::state::{GuestVersions, Node, Sealed};

use super::Ms;
use super::bugs::Bug;

/// What survives the daemon.
#[derive(Debug)]
pub(crate) struct Body {
    /// The node's own facts.
    pub(crate) record: Node,
    /// How far its clock is ahead of true time, and by how many millionths it runs wrong.
    pub(crate) ahead: Ms,
    pub(crate) drift_ppm: i64,
    /// What its shims hold. Gone with the boot.
    pub(crate) guests: BTreeMap<SandboxId, Guest>,
    /// What the shims read. Gone with the boot.
    pub(crate) lease: Option<Limits>,
}

#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) epoch: Epoch,
    pub(crate) bound: bool,
    pub(crate) state: GuestState,
    pub(crate) frozen: bool,
    /// Who it takes itself for.
    pub(crate) is: SandboxId,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum GuestState {
    /// It waits for the cluster's word, and takes so long to boot then.
    Waiting(Ms),
    /// It boots, and answers at that instant.
    Booting(Ms),
    Ready,
    /// It is frozen, and sealed at that instant, or found impossible to seal.
    Sealing(Ms, Option<Sealed>),
    Sealed(Sealed),
    Unsealed,
    /// It is dead; what it held is free at that instant.
    Releasing(Ms, End),
    Gone(End),
}

impl Guest {
    /// Whether its processors execute anything.
    pub(crate) fn runs(&self) -> bool {
        !self.frozen && matches!(self.state, GuestState::Booting(_) | GuestState::Ready)
    }
}

impl Body {
    /// The machine's suspend-aware clock at true time `now`.
    pub(crate) fn tick(&self, now: Ms) -> Tick {
        let micros = now
            .saturating_mul(1000)
            .saturating_add_signed(i64::try_from(now / 1000).unwrap_or(0) * self.drift_ppm);
        Tick(Duration::from_micros(micros + self.ahead * 1000))
    }

    /// Every shim looks at the lease once.
    pub(crate) fn watch(&mut self, now: Ms, times: LeaseTimes, bug: Option<Bug>) {
        let tick = self.tick(now);
        let lease = self.lease;
        let late = if bug == Some(Bug::NoMargins) {
            times.ttl() / 5
        } else {
            Duration::ZERO
        };
        for guest in self.guests.values_mut().filter(|guest| guest.bound) {
            if bug == Some(Bug::ShimIgnoresLease)
                || matches!(guest.state, GuestState::Releasing(..) | GuestState::Gone(_))
            {
                continue;
            }
            // Without a lease to read there is none.
            let over = lease.is_none_or(|limits| tick >= limits.kill_at);
            if over {
                let reason = "the node lost its lease".into();
                guest.state = GuestState::Gone(End::LeaseLost { reason });
                guest.frozen = false;
            } else {
                guest.frozen = lease.is_some_and(|limits| tick >= limits.freeze_at.plus(late));
            }
        }
    }

    /// What a new daemon makes of guests that an earlier one was sealing: it cannot know whether the
    /// cluster was told, and asks before they go on.
    pub(crate) fn forget_seals(&mut self) {
        for guest in self.guests.values_mut() {
            if matches!(guest.state, GuestState::Sealing(..) | GuestState::Sealed(_)) {
                guest.state = GuestState::Unsealed;
            }
        }
    }

    /// Every guest that runs breaks by itself.
    pub(crate) fn break_guests(&mut self) {
        for guest in self.guests.values_mut().filter(|guest| guest.runs()) {
            let reason = "it broke".into();
            guest.state = GuestState::Gone(End::Failed { reason });
        }
    }

    /// Guests boot and release what they held.
    pub(crate) fn progress(&mut self, now: Ms) {
        for guest in self.guests.values_mut().filter(|guest| !guest.frozen) {
            match &guest.state {
                GuestState::Booting(at) if *at <= now => guest.state = GuestState::Ready,
                GuestState::Sealing(at, sealed) if *at <= now => {
                    guest.state = sealed
                        .clone()
                        .map_or(GuestState::Unsealed, GuestState::Sealed);
                }
                GuestState::Releasing(at, end) if *at <= now => {
                    guest.state = GuestState::Gone(end.clone());
                }
                _ => {}
            }
        }
    }

    /// What the daemon's registry would say.
    pub(crate) fn observed(&self) -> BTreeMap<SandboxId, Observed> {
        let seen = |guest: &Guest| Observed {
            epoch: guest.epoch,
            let_begin: !matches!(guest.state, GuestState::Waiting(_)),
            state: match &guest.state {
                GuestState::Waiting(_) | GuestState::Booting(_) => ObservedState::Starting,
                GuestState::Ready => ObservedState::Ready(GuestVersions::default()),
                GuestState::Sealing(..) => ObservedState::Sealing,
                GuestState::Sealed(sealed) => ObservedState::Sealed(sealed.clone()),
                GuestState::Unsealed => ObservedState::Frozen {
                    reason: "the disk is full".into(),
                },
                GuestState::Releasing(..) => ObservedState::Releasing,
                GuestState::Gone(end) => ObservedState::Gone(end.clone()),
            },
            idle_for: Duration::ZERO,
            reclaimed: false,
            has_warm: false,
        };
        self.guests
            .iter()
            .map(|(id, guest)| (*id, seen(guest)))
            .collect()
    }

    /// Whether no lease-bound guest is left that could be thawed.
    pub(crate) fn bound_are_dead(&self) -> bool {
        let dead =
            |guest: &Guest| matches!(guest.state, GuestState::Gone(_) | GuestState::Releasing(..));
        self.guests
            .values()
            .all(|guest| !guest.bound || dead(guest))
    }
}
