//! The node's half of the lease.
//!
//! ```text
//! (new) --first grant--> held --no grant until kill--> lapsed --start_over--> (new)
//!                         ^  '--grant--'
//! ```
//!
//! A lease that has lapsed takes no grant any more: the cluster may have given this node's
//! sandboxes out since, and a guest that was merely suspended all the while must not wake up into a
//! fresh lease. The caller ends its lease-bound guests, then starts over under another incarnation.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Tick;
use super::book::{Listed, Liveness};
use super::times::LeaseTimes;

/// Renewals whose answers are still waited for: as many as can be sent in a time to live, twice.
/// An answer to an older one would grant hardly anything.
const MOST_UNANSWERED: usize = 10;

/// What a node sends to the leader to keep its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Renewal {
    /// Under which incarnation the node asks.
    pub incarnation: u64,
    /// Counts up within the incarnation; the answer names it.
    pub seq: u64,
}

/// When a node's lease-bound guests must stop, if no later grant comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Limits {
    /// From here on guests are frozen; a later grant thaws them.
    pub freeze_at: Tick,
    /// From here on guests are killed, and no grant counts any more.
    pub kill_at: Tick,
}

impl Limits {
    /// The limits of the only voter: no other node could ever give its sandboxes out.
    pub const NONE: Self = Self {
        freeze_at: Tick::NEVER,
        kill_at: Tick::NEVER,
    };
}

/// What a grant did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// The lease is now good until this instant, later than before.
    Until(Tick),
    /// Nothing: the renewal is unknown, of another incarnation, or older than what is held.
    Stale,
    /// Nothing: this node has not applied yet that it counts as alive. A later grant will do.
    NotCaughtUp,
    /// Nothing: the lease had lapsed before the answer came. See [`Holder::start_over`].
    Lapsed,
}

/// What a node knows of its own lease.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Holder {
    times: LeaseTimes,
    incarnation: u64,
    next_seq: u64,
    /// When each unanswered renewal was sent.
    sent: BTreeMap<u64, Tick>,
    valid_until: Option<Tick>,
    lapsed: bool,
    sole_voter: bool,
}

impl Holder {
    /// A holder without a lease: before the first grant no lease-bound guest may run.
    ///
    /// `incarnation` is that of the node's replicated row: the log index of its last announcement,
    /// so that no two are the same.
    #[must_use]
    pub const fn new(times: LeaseTimes, incarnation: u64) -> Self {
        Self {
            times,
            incarnation,
            next_seq: 1,
            sent: BTreeMap::new(),
            valid_until: None,
            lapsed: false,
            sole_voter: false,
        }
    }

    /// Takes over what an earlier daemon held on this boot of the machine, under which its guests
    /// still run. `valid_until` is what that daemon wrote down last.
    #[must_use]
    pub fn resume(mut self, valid_until: Tick) -> Self {
        self.valid_until = Some(valid_until);
        self
    }

    /// The incarnation it renews under.
    #[must_use]
    pub const fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Makes the next renewal and remembers when.
    ///
    /// `now` must be read *before* the renewal is handed to the network: the lease counts from it.
    pub fn renew(&mut self, now: Tick) -> Renewal {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.sent.insert(seq, now);
        while self.sent.len() > MOST_UNANSWERED {
            self.sent.pop_first();
        }
        Renewal {
            incarnation: self.incarnation,
            seq,
        }
    }

    /// Takes the leader's consent to a renewal, which arrived at `now`. `own` is this node's own
    /// row as this node has applied it.
    ///
    /// The row must show it alive under the incarnation it renews with: a node that was lost has
    /// then applied its return, and before it, what became of its sandboxes. Otherwise it could
    /// start one again from a copy of the state in which that is still its own.
    pub fn granted(&mut self, now: Tick, renewal: Renewal, own: Option<Listed>) -> Granted {
        if renewal.incarnation != self.incarnation {
            return Granted::Stale;
        }
        let wanted = Listed {
            incarnation: self.incarnation,
            liveness: Liveness::Alive,
        };
        if own != Some(wanted) {
            return Granted::NotCaughtUp;
        }
        let Some(sent_at) = self.sent.remove(&renewal.seq) else {
            return Granted::Stale;
        };
        if self.has_lapsed(now) {
            return Granted::Lapsed;
        }
        // Older ones can only grant less.
        self.sent.retain(|seq, _| *seq > renewal.seq);
        let until = sent_at.plus(self.times.ttl);
        // Nothing newer than what is held; or, where nothing is, over before it came.
        let over = now >= until.plus(self.times.grace);
        if over || self.valid_until.is_some_and(|known| known >= until) {
            return Granted::Stale;
        }
        self.valid_until = Some(until);
        Granted::Until(until)
    }

    /// Until when the lease is good, if there ever was one. Only ever moves forward within an
    /// incarnation.
    #[must_use]
    pub const fn valid_until(&self) -> Option<Tick> {
        self.valid_until
    }

    /// When lease-bound guests must stop; `None` while none may run at all.
    #[must_use]
    pub fn limits(&self) -> Option<Limits> {
        if self.sole_voter {
            return Some(Limits::NONE);
        }
        self.valid_until.map(|until| Limits {
            freeze_at: until.less(self.times.freeze_ahead),
            kill_at: until.plus(self.times.grace),
        })
    }

    /// Whether a lease-bound guest may be started or thawed at `now`.
    #[must_use]
    pub fn may_run(&mut self, now: Tick) -> bool {
        !self.has_lapsed(now) && self.limits().is_some_and(|limits| now < limits.freeze_at)
    }

    /// Whether the lease has lapsed by `now`; once it has, it stays so until [`Self::start_over`].
    pub fn has_lapsed(&mut self, now: Tick) -> bool {
        self.lapsed = self.lapsed || self.limits().is_some_and(|limits| now >= limits.kill_at);
        self.lapsed
    }

    /// Begins again without a lease. Only once every lease-bound guest of this node is dead.
    ///
    /// `incarnation` must be a new one; the present one is refused with `false`.
    pub fn start_over(&mut self, incarnation: u64) -> bool {
        if incarnation == self.incarnation {
            return false;
        }
        let sole_voter = self.sole_voter;
        *self = Self::new(self.times, incarnation);
        self.sole_voter = sole_voter;
        true
    }

    /// Takes over newer times, or a newer announcement of this node; what is held stays held, and
    /// renewals that are under way grant nothing any more.
    pub fn bring_up_to(&mut self, times: LeaseTimes, incarnation: u64) {
        if self.times == times && self.incarnation == incarnation {
            return;
        }
        *self = Self {
            valid_until: self.valid_until,
            lapsed: self.lapsed,
            sole_voter: self.sole_voter,
            ..Self::new(times, incarnation)
        };
    }

    /// Says whether this node is the only voter, which needs nobody's consent and has no limits.
    ///
    /// `false` must be said, and the limits written where the shims read them, *before* the change
    /// that adds another voter is proposed; `true` only after the change that leaves this one is
    /// committed. Renewals with itself go on all the while, so that there is a lease to fall back
    /// to; where [`Self::limits`] has none after `false` was said, the change has to wait.
    pub const fn set_sole_voter(&mut self, sole: bool) {
        self.sole_voter = sole;
    }

    /// How long the lease is still good at `now`.
    #[must_use]
    pub fn left(&self, now: Tick) -> Duration {
        self.valid_until
            .map_or(Duration::ZERO, |until| until.since(now))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(secs: u64) -> Tick {
        Tick(Duration::from_secs(secs))
    }

    fn holder() -> Holder {
        Holder::new(LeaseTimes::default(), 1)
    }

    /// A grant to a node that counts as alive.
    fn grant(holder: &mut Holder, now: Tick, renewal: Renewal) -> Granted {
        let own = Listed {
            incarnation: holder.incarnation(),
            liveness: Liveness::Alive,
        };
        holder.granted(now, renewal, Some(own))
    }

    #[test]
    fn a_node_that_has_not_applied_its_return_takes_no_grant() {
        let mut holder = holder();
        let renewal = holder.renew(at(100));
        let row = |incarnation, liveness| {
            Some(Listed {
                incarnation,
                liveness,
            })
        };
        for own in [
            None,
            row(1, Liveness::Lost),
            row(1, Liveness::Missing),
            row(9, Liveness::Alive),
        ] {
            assert_eq!(holder.granted(at(101), renewal, own), Granted::NotCaughtUp);
        }
        let own = row(1, Liveness::Alive);
        assert_eq!(
            holder.granted(at(101), renewal, own),
            Granted::Until(at(110))
        );
    }

    #[test]
    fn the_lease_counts_from_the_sending_however_late_the_answer() {
        let mut holder = holder();
        let renewal = holder.renew(at(100));
        assert_eq!(
            grant(&mut holder, at(105), renewal),
            Granted::Until(at(110))
        );
        let limits = holder.limits().expect("a lease is held");
        assert_eq!((limits.freeze_at, limits.kill_at), (at(108), at(170)));
    }

    #[test]
    fn nothing_runs_before_the_first_grant() {
        let mut holder = holder();
        holder.renew(at(1));
        assert_eq!(holder.limits(), None);
        assert!(!holder.may_run(at(1)));
    }

    #[test]
    fn an_answer_counts_once_and_an_older_one_after_a_newer_one_not_at_all() {
        let mut holder = holder();
        let first = holder.renew(at(100));
        let second = holder.renew(at(102));
        assert_eq!(grant(&mut holder, at(103), second), Granted::Until(at(112)));
        assert_eq!(grant(&mut holder, at(103), second), Granted::Stale);
        assert_eq!(grant(&mut holder, at(103), first), Granted::Stale);
        assert_eq!(holder.valid_until(), Some(at(112)));
    }

    #[test]
    fn unknown_numbers_and_other_incarnations_grant_nothing() {
        let mut holder = holder();
        let renewal = holder.renew(at(100));
        let unknown = Renewal { seq: 99, ..renewal };
        let other = Renewal {
            incarnation: 0,
            ..renewal
        };
        assert_eq!(grant(&mut holder, at(101), unknown), Granted::Stale);
        assert_eq!(grant(&mut holder, at(101), other), Granted::Stale);
        assert_eq!(holder.limits(), None);
    }

    #[test]
    fn a_frozen_node_is_thawed_by_a_grant_and_a_lapsed_one_is_not() {
        let mut holder = holder();
        let first = holder.renew(at(100));
        grant(&mut holder, at(100), first);
        let second = holder.renew(at(150));
        assert!(!holder.may_run(at(151)));
        assert_eq!(grant(&mut holder, at(152), second), Granted::Until(at(160)));
        assert!(holder.may_run(at(153)));
        let third = holder.renew(at(219));
        assert_eq!(grant(&mut holder, at(220), third), Granted::Lapsed);
        assert!(!holder.may_run(at(220)));
        assert!(!holder.start_over(1));
        assert!(holder.start_over(2));
        let fourth = holder.renew(at(221));
        assert_eq!(grant(&mut holder, at(221), fourth), Granted::Until(at(231)));
    }

    #[test]
    fn the_only_voter_has_no_limits_and_falls_back_to_its_lease_as_others_join() {
        let mut holder = holder();
        let renewal = holder.renew(at(100));
        grant(&mut holder, at(100), renewal);
        holder.set_sole_voter(true);
        assert!(holder.may_run(at(10_000)));
        holder.set_sole_voter(false);
        assert_eq!(holder.valid_until(), Some(at(110)));
    }

    #[test]
    fn a_daemon_that_restarts_goes_on_under_what_its_guests_run_under() {
        let mut holder = holder().resume(at(110));
        assert!(holder.may_run(at(107)));
        assert!(!holder.may_run(at(108)));
        let mut late = Holder::new(LeaseTimes::default(), 2).resume(at(110));
        let renewal = late.renew(at(200));
        assert_eq!(grant(&mut late, at(200), renewal), Granted::Lapsed);
    }

    proptest! {
        /// Whatever is sent, lost, repeated or late: the lease never moves back, never reaches past
        /// the last sending plus its time to live, and the memory stays bounded.
        #[test]
        fn the_lease_is_monotone_and_bounded(
            steps in prop::collection::vec((0_u64..5, 0_u64..20, 0_u64..3), 0..200),
        ) {
            let mut holder = holder();
            let (mut now, mut last_sent, mut asked) = (0, 0, 0);
            for (wait, pick, kind) in steps {
                now += wait;
                let before = holder.valid_until();
                if kind == 0 {
                    asked = holder.renew(at(now)).seq;
                    last_sent = now;
                } else {
                    let seq = asked.saturating_sub(pick);
                    grant(&mut holder, at(now), Renewal { incarnation: 1, seq });
                }
                prop_assert!(holder.valid_until() >= before);
                prop_assert!(holder.valid_until() <= Some(at(last_sent + 10)));
                prop_assert!(holder.sent.len() <= MOST_UNANSWERED);
            }
        }
    }
}
