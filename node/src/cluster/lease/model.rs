//! One host, one cluster, a network that loses and delays: every history, exhausted.
//!
//! The host has the real [`Holder`], each leader the real [`Book`]; the model moves their clocks and
//! carries their messages. A tick is a second, the lease lasts four. What is asked of each variant
//! is the most ticks in a row of which a guest runs on the host *and* the cluster has given its
//! epoch out. The variants that break a rule show that the rule is needed, and that the model would
//! notice.
//!
//! To look at the lease alone there is no grace and no early freeze: they are what makes up for a
//! late watchdog, and would hide what is looked for here.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use proto::ids::NodeId;

use super::{Book, Holder, LeaseTimes, Limits, Listed, Liveness, Renewal, Tick, Verdict};

const HOST: NodeId = NodeId(1);
const INCARNATION: u64 = 1;
/// The lease, in ticks.
const TTL: u64 = 4;
/// The messages under way at a time: a renewal and an answer, or one that is very late.
const MESSAGES: usize = 2;
/// Histories end here: a grant, a whole lease, and every message late by as much again.
const HORIZON: u64 = 15;

/// A variant this bad need not be looked at any longer.
const ENOUGH: u64 = TTL - 1;

/// Which rules a variant keeps and which misfortunes it meets.
#[derive(Clone, Copy, Debug)]
struct Variant {
    /// How much longer the leader counts.
    margin: u64,
    /// Ticks that the host's clock may miss in all.
    drift: u64,
    /// The lease counts from when the answer came.
    counted_from_receipt: bool,
    /// Ticks for which the host may be suspended, once.
    suspend: u64,
    /// The host's clock counts while it is suspended.
    boottime: bool,
    /// The watchdog looks before a guest runs on after a suspend.
    frozen_until_first_look: bool,
    /// A second leader takes over at some instant.
    leader_change: bool,
    /// The first leader asks a quorum before it answers.
    quorum_check: bool,
    /// The second leader counts from its own start.
    new_leader_waits: bool,
}

/// The rules kept, and no misfortune but the network's.
const SOUND: Variant = Variant {
    margin: 0,
    drift: 0,
    counted_from_receipt: false,
    suspend: 0,
    boottime: true,
    frozen_until_first_look: true,
    leader_change: false,
    quorum_check: true,
    new_leader_waits: true,
};

impl Variant {
    fn times(self) -> LeaseTimes {
        LeaseTimes {
            ttl: Duration::from_secs(TTL),
            grace: Duration::ZERO,
            freeze_ahead: Duration::ZERO,
            margin: Duration::from_secs(self.margin),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Message {
    Renew(Renewal),
    Grant(Renewal),
}

/// One instant of one history.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    now: u64,
    host: Host,
    messages: BTreeSet<Message>,
    old: Book,
    /// The second leader's book, once there is one.
    new: Option<Book>,
    liveness: Liveness,
    /// The last ticks, in a row, in which two guests ran.
    double: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host {
    clock: u64,
    missed: u64,
    suspended_for: u64,
    suspended_now: bool,
    holder: Holder,
    guest_runs: bool,
}

fn at(ticks: u64) -> Tick {
    Tick(Duration::from_secs(ticks))
}

fn listed(liveness: Liveness) -> Listed {
    Listed {
        incarnation: INCARNATION,
        liveness,
    }
}

impl World {
    /// The host has just been granted its first lease.
    fn first(variant: Variant) -> Self {
        let times = variant.times();
        let mut holder = Holder::new(times, INCARNATION);
        let mut old = Book::new(times, at(0));
        let renewal = holder.renew(at(0));
        let listed = Some(listed(Liveness::Alive));
        let granted = old.renewed(HOST, renewal.incarnation, at(0), listed);
        granted.expect("a listed node is granted its lease");
        holder.granted(at(0), renewal, listed);
        Self {
            now: 0,
            host: Host {
                clock: 0,
                missed: 0,
                suspended_for: 0,
                suspended_now: false,
                holder,
                guest_runs: true,
            },
            messages: BTreeSet::new(),
            old,
            new: None,
            liveness: Liveness::Alive,
            double: 0,
        }
    }

    /// Every world that the next tick may bring.
    fn next(&self, variant: Variant) -> Vec<Self> {
        let mut worlds = self.clocks_moved(variant);
        each(&mut worlds, |world| world.leader_changed(variant));
        each(&mut worlds, |world| world.delivered(variant));
        each(&mut worlds, |world| world.renewed());
        for world in &mut worlds {
            world.judge();
            world.count_double();
        }
        worlds
    }

    /// True time moves on; the host's clock may miss a tick, or the host may be suspended.
    fn clocks_moved(&self, variant: Variant) -> Vec<Self> {
        let mut usual = self.clone();
        usual.now += 1;
        let woke_up = usual.host.suspended_now;
        usual.host.suspended_now = false;
        let mut worlds = Vec::new();
        if usual.host.suspended_for < variant.suspend && (usual.host.suspended_for == 0 || woke_up)
        {
            let mut asleep = usual.clone();
            asleep.host.suspended_now = true;
            asleep.host.suspended_for += 1;
            asleep.host.clock += u64::from(variant.boottime);
            worlds.push(asleep);
        }
        if usual.host.missed < variant.drift {
            let mut slow = usual.clone();
            slow.host.missed += 1;
            slow.watch(woke_up, variant);
            worlds.push(slow);
        }
        usual.host.clock += 1;
        usual.watch(woke_up, variant);
        worlds.push(usual);
        worlds
    }

    /// The watchdog looks at the clock and ends a guest whose lease is over.
    fn watch(&mut self, woke_up: bool, variant: Variant) {
        if woke_up && !variant.frozen_until_first_look {
            return;
        }
        let host = &mut self.host;
        let limits = host.holder.limits().unwrap_or(Limits::NONE);
        host.guest_runs &= at(host.clock) < limits.kill_at;
    }

    fn leader_changed(self, variant: Variant) -> Vec<Self> {
        if !variant.leader_change || self.new.is_some() {
            return vec![self];
        }
        let mut changed = self.clone();
        let started_at = if variant.new_leader_waits {
            self.now
        } else {
            0
        };
        let mut book = Book::new(variant.times(), at(started_at));
        // What it looks at first, it looks at when it starts.
        book.verdicts(at(started_at), [(HOST, listed(self.liveness))]);
        changed.new = Some(book);
        vec![self, changed]
    }

    /// Each message arrives, is lost, or stays under way.
    fn delivered(self, variant: Variant) -> Vec<Self> {
        let mut worlds = vec![self.clone()];
        for message in &self.messages {
            let mut more = Vec::new();
            for world in &worlds {
                let mut without = world.clone();
                without.messages.remove(message);
                more.push(without.clone());
                if !world.host.suspended_now || matches!(message, Message::Renew(_)) {
                    without.arrive(message, variant);
                    more.push(without);
                }
            }
            worlds.extend(more);
        }
        worlds
    }

    fn arrive(&mut self, message: &Message, variant: Variant) {
        match message {
            Message::Renew(renewal) => {
                // A deposed leader that asks a quorum learns so; the host then finds the new one.
                let (book, liveness) = match &mut self.new {
                    Some(new) if variant.quorum_check => (new, self.liveness),
                    Some(_) => (&mut self.old, Liveness::Alive),
                    None => (&mut self.old, self.liveness),
                };
                let row = Some(listed(liveness));
                let asked = book.renewed(HOST, renewal.incarnation, at(self.now), row);
                if asked.is_ok() && self.messages.len() < MESSAGES {
                    self.messages.insert(Message::Grant(*renewal));
                }
            }
            Message::Grant(renewal) => {
                let host = &mut self.host;
                let now = at(host.clock);
                let counted = if variant.counted_from_receipt {
                    host.holder.renew(now)
                } else {
                    *renewal
                };
                host.holder
                    .granted(now, counted, Some(listed(Liveness::Alive)));
            }
        }
    }

    /// The host renews, or finds no time to.
    fn renewed(self) -> Vec<Self> {
        if self.host.suspended_now || self.messages.len() >= MESSAGES {
            return vec![self];
        }
        let mut asking = self.clone();
        let now = at(asking.host.clock);
        let renewal = asking.host.holder.renew(now);
        asking.messages.insert(Message::Renew(renewal));
        vec![self, asking]
    }

    /// The leader's verdicts, committed at once.
    fn judge(&mut self) {
        let leader = self.new.as_mut().unwrap_or(&mut self.old);
        // Missing and lost follow each other within the tick, as there is no grace.
        for _ in 0..2 {
            for verdict in leader.verdicts(at(self.now), [(HOST, listed(self.liveness))]) {
                self.liveness = match verdict {
                    Verdict::Missing(..) => Liveness::Missing,
                    Verdict::Lost(..) => Liveness::Lost,
                    Verdict::Back(..) => Liveness::Alive,
                };
            }
        }
    }

    fn count_double(&mut self) {
        let here = self.host.guest_runs && !self.host.suspended_now;
        let there = self.liveness == Liveness::Lost;
        self.double = if here && there { self.double + 1 } else { 0 };
    }
}

/// Replaces each world by all that may come of it.
fn each(worlds: &mut Vec<World>, mut step: impl FnMut(World) -> Vec<World>) {
    let all: HashSet<World> = worlds.drain(..).flat_map(&mut step).collect();
    worlds.extend(all);
}

/// The most ticks in a row with two running guests, over every history.
fn worst(variant: Variant) -> u64 {
    let mut worlds = HashSet::from([World::first(variant)]);
    let mut worst = 0;
    for _ in 0..HORIZON {
        let next = worlds.iter().flat_map(|world| world.next(variant));
        worlds = next.filter(|world| !is_settled(world)).collect();
        let now = worlds.iter().map(|world| world.double).max();
        worst = worst.max(now.unwrap_or(0));
        if worst >= ENOUGH {
            break;
        }
    }
    worst
}

/// Whether nothing can go wrong any more: the host's guest is dead.
fn is_settled(world: &World) -> bool {
    !world.host.guest_runs
}

#[test]
fn exact_clocks_need_no_margin() {
    assert_eq!(worst(SOUND), 0);
}

#[test]
fn a_slow_clock_without_margin_runs_two_guests() {
    assert_eq!(worst(Variant { drift: 1, ..SOUND }), 1);
}

#[test]
fn a_margin_as_long_as_the_drift_runs_one_guest() {
    let variant = Variant {
        drift: 1,
        margin: 1,
        ..SOUND
    };
    assert_eq!(worst(variant), 0);
}

#[test]
fn a_lease_counted_from_receipt_runs_two_guests_despite_the_margin() {
    let variant = Variant {
        margin: 1,
        counted_from_receipt: true,
        ..SOUND
    };
    assert!(worst(variant) >= 2);
}

#[test]
fn a_clock_that_stops_in_suspend_runs_two_guests_despite_the_margin() {
    let variant = Variant {
        margin: 1,
        suspend: 6,
        boottime: false,
        ..SOUND
    };
    // All of the lease but the tick before it fell asleep.
    assert_eq!(worst(variant), TTL - 1);
}

#[test]
fn a_guest_that_runs_before_the_watchdog_looks_runs_beside_another_for_a_tick() {
    let variant = Variant {
        margin: 1,
        suspend: 6,
        frozen_until_first_look: false,
        ..SOUND
    };
    assert_eq!(worst(variant), 1);
}

#[test]
fn a_clock_that_counts_suspends_and_a_watchdog_that_looks_first_run_one_guest() {
    let variant = Variant {
        margin: 1,
        suspend: 6,
        ..SOUND
    };
    assert_eq!(worst(variant), 0);
}

#[test]
fn a_leader_change_runs_one_guest() {
    let variant = Variant {
        leader_change: true,
        ..SOUND
    };
    assert_eq!(worst(variant), 0);
}

#[test]
fn a_deposed_leader_that_answers_without_a_quorum_runs_two_guests() {
    let variant = Variant {
        leader_change: true,
        quorum_check: false,
        ..SOUND
    };
    assert!(worst(variant) >= 2);
}

#[test]
fn a_new_leader_that_does_not_wait_runs_two_guests() {
    let variant = Variant {
        leader_change: true,
        new_leader_waits: false,
        ..SOUND
    };
    assert!(worst(variant) >= 2);
}
