//! The judge is judged: histories that are known to be right pass, spoilt ones are caught, and
//! where all orders can be tried one by one, the search agrees with that.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use proptest::prelude::*;
use proptest::sample::Index;
use wrenn_cluster_tests::history::{
    ApiKey, ApiKeyAction, ApiKeySeen, Capsule, CapsuleAction, CapsuleSeen, History, Limits, Model,
    Operation, Outcome, Process, Recorder, Register, RegisterAction, Report,
};

type Numbers = Register<u32>;
type Op = Operation<Numbers>;

const KEY: &str = "x";
/// Most time of a processor that a search may take which is said to be quick; a debug build takes a
/// tenth of it.
const QUICK: Duration = Duration::from_secs(5);

fn operation<M: Model>(
    action: M::Action,
    (invoked, returned): (u64, u64),
    outcome: Outcome<M::Answer>,
) -> Operation<M> {
    Operation {
        process: Process(0),
        key: KEY.into(),
        action,
        invoked: Duration::from_micros(invoked),
        returned: Duration::from_micros(returned),
        outcome,
    }
}

fn wrote(value: u32, within: (u64, u64)) -> Op {
    operation(
        RegisterAction::Write(value),
        within,
        Outcome::Ok(Some(value)),
    )
}

fn lost(value: u32, invoked: u64) -> Op {
    operation(
        RegisterAction::Write(value),
        (invoked, invoked),
        Outcome::Unknown,
    )
}

fn read(value: Option<u32>, within: (u64, u64)) -> Op {
    operation(RegisterAction::Read, within, Outcome::Ok(value))
}

fn check<M: Model>(operations: Vec<Operation<M>>) -> Report {
    let history = History {
        operations,
        ..History::default()
    };
    history.check(&Limits::default())
}

fn passes<M: Model>(operations: Vec<Operation<M>>) -> bool {
    let report = check(operations);
    assert!(report.undecided.is_empty(), "{report}");
    report.is_linearizable()
}

#[test]
fn nothing_at_all_is_linearizable() {
    check::<Numbers>(Vec::new()).unwrap();
}

#[test]
fn a_read_sees_the_last_write_or_one_that_is_under_way() {
    assert!(passes(vec![wrote(1, (0, 1)), read(Some(1), (2, 3))]));
    assert!(passes(vec![wrote(1, (0, 9)), read(Some(1), (2, 3))]));
    assert!(passes(vec![wrote(1, (0, 9)), read(None, (2, 3))]));
    // Returned at the very instant: nobody can say which came first.
    assert!(passes(vec![wrote(1, (0, 2)), read(None, (2, 3))]));
}

#[test]
fn a_read_that_misses_a_finished_write_is_caught() {
    assert!(!passes(vec![wrote(1, (0, 1)), read(None, (2, 3))]));
    let stale = vec![wrote(1, (0, 1)), wrote(2, (2, 3)), read(Some(1), (4, 5))];
    assert!(!passes(stale));
}

#[test]
fn a_value_that_nobody_wrote_is_caught() {
    assert!(!passes(vec![wrote(1, (0, 9)), read(Some(2), (2, 3))]));
}

#[test]
fn a_value_once_seen_cannot_be_unseen() {
    let back = vec![
        wrote(1, (0, 1)),
        wrote(2, (2, 20)),
        read(Some(2), (3, 4)),
        read(Some(1), (5, 6)),
    ];
    assert!(!passes(back));
}

#[test]
fn a_refused_write_never_shows_and_never_binds() {
    let refused = operation(RegisterAction::Write(1), (0, 1), Outcome::Refused);
    assert!(passes(vec![refused.clone(), read(None, (2, 3))]));
    assert!(!passes(vec![refused, read(Some(1), (2, 3))]));
}

#[test]
fn a_write_of_unknown_outcome_may_show_late_once_or_never() {
    let late = [
        wrote(2, (1, 2)),
        read(Some(2), (3, 4)),
        read(Some(1), (5, 6)),
    ];
    let with = |more: Vec<Op>| [vec![lost(1, 0)], late.to_vec(), more].concat();
    assert!(passes(with(vec![])));
    assert!(passes(vec![lost(1, 0), read(None, (2, 3))]));
    assert!(!passes(with(vec![
        wrote(3, (7, 8)),
        read(Some(1), (9, 10))
    ])));
    // Not before it was sent.
    assert!(!passes(vec![lost(1, 4), read(Some(1), (2, 3))]));
}

#[test]
fn a_violation_names_the_key_the_state_and_what_does_not_fit() {
    let report = check(vec![wrote(7, (0, 1)), read(Some(9), (2, 3))]);
    let text = report.to_string();
    assert!(text.contains("x: not linearizable; 1 of 2"), "{text}");
    assert!(
        text.contains("Some(7)") && text.contains("Read -> Some(9)"),
        "{text}"
    );
}

#[test]
fn keys_are_judged_apart() {
    let elsewhere = Op {
        key: "y".into(),
        ..read(None, (2, 3))
    };
    let report = check(vec![wrote(1, (0, 1)), elsewhere, read(Some(1), (4, 5))]);
    assert_eq!((report.keys, report.operations), (2, 3));
    report.unwrap();
}

#[test]
fn stale_looks_are_allowed_as_far_as_they_are_promised() {
    let history = History {
        operations: vec![wrote(1, (0, 10)), read(None, (50, 51))],
        ..History::<Numbers>::default()
    };
    let bounded = |us| {
        let history = history.clone().with_stale_looks(Duration::from_micros(us));
        history.check(&Limits::default()).is_linearizable()
    };
    assert!(bounded(40));
    assert!(!bounded(39));
}

fn capsule(action: CapsuleAction, at: u64, seen: CapsuleSeen) -> Operation<Capsule> {
    operation(action, (at, at), Outcome::Ok(seen))
}

/// A capsule's operations one after the other: is that possible?
fn capsule_may(steps: &[(CapsuleAction, CapsuleSeen)]) -> bool {
    let steps = (1..).zip(steps);
    passes(
        steps
            .map(|(at, (action, seen))| capsule(*action, at, *seen))
            .collect(),
    )
}

#[test]
fn a_capsule_lives_once_and_is_not_absent_before_it_was_destroyed() {
    use CapsuleAction::{Create, Destroy, Read};
    use CapsuleSeen::{Absent, Ended, Ending, Live, Unlisted};
    let made = (Create, Live);
    let life = [
        (Read, Absent),
        made,
        (Read, Live),
        (Destroy, Ending),
        (Destroy, Ended),
        (Read, Unlisted),
        (Read, Absent),
    ];
    assert!(capsule_may(&life));
    // It broke, or idled, by itself.
    assert!(capsule_may(&[made, (Read, Ended), (Destroy, Ended)]));
    assert!(!capsule_may(&[made, (Read, Absent)]));
    assert!(!capsule_may(&[made, (Read, Ended), (Read, Live)]));
    assert!(!capsule_may(&[made, (Read, Unlisted), (Read, Live)]));
    assert!(!capsule_may(&[made, (Destroy, Ending), (Read, Live)]));
    assert!(!capsule_may(&[made, (Destroy, Ended), (Read, Ending)]));
    assert!(!capsule_may(&[
        made,
        (Destroy, Ended),
        (Read, Absent),
        (Read, Ended)
    ]));
    assert!(!capsule_may(&[(Read, Live)]));
}

#[test]
fn every_status_of_the_api_has_its_place() {
    let seen = CapsuleSeen::of_status;
    assert_eq!(seen("missing"), Some(CapsuleSeen::Live));
    assert_eq!(seen("stopping"), Some(CapsuleSeen::Ending));
    assert_eq!(seen("error"), Some(CapsuleSeen::Ended));
    assert_eq!(seen("paused?"), None);
}

#[test]
fn a_key_works_until_it_is_revoked_and_never_again() {
    use ApiKeyAction::{Create, Revoke, Use};
    use ApiKeySeen::{Invalid, Valid};
    let may = |steps: &[(ApiKeyAction, ApiKeySeen)]| {
        let steps = (1..).zip(steps);
        let one = |(at, (action, seen)): (u64, &(_, _))| {
            operation::<ApiKey>(*action, (at, at), Outcome::Ok(*seen))
        };
        passes(steps.map(one).collect())
    };
    let life = [
        (Use, Invalid),
        (Create, Valid),
        (Use, Valid),
        (Revoke, Invalid),
        (Use, Invalid),
    ];
    assert!(may(&life));
    assert!(!may(&[(Create, Valid), (Use, Invalid)]));
    assert!(!may(&[(Create, Valid), (Revoke, Invalid), (Use, Valid)]));
}

#[test]
fn a_capsule_whose_create_was_never_answered_may_show_up_but_only_one_for_each() {
    let recorder = Recorder::<Capsule>::new();
    let client = recorder.client();
    client.invoke_unnamed(CapsuleAction::Create).unknown();
    client.invoke_unnamed(CapsuleAction::Create).refused();
    let sees = |id: &str| {
        let look = client.invoke(id, CapsuleAction::Read);
        look.answered(CapsuleSeen::Live);
    };
    sees("cl-1");
    recorder.history().check(&Limits::default()).unwrap();
    sees("cl-2");
    let report = recorder.history().check(&Limits::default());
    assert_eq!(report.violations.len(), 1, "{report}");
    assert_eq!(report.violations[0].key, "cl-2");
}

#[test]
fn a_call_that_is_dropped_counts_as_unknown() {
    let recorder = Recorder::<Numbers>::new();
    let client = recorder.client();
    drop(client.invoke(KEY, RegisterAction::Write(1)));
    let history = recorder.history();
    assert_eq!(history.operations[0].outcome, Outcome::Unknown);
    let look = client.invoke(KEY, RegisterAction::Read);
    look.answered(Some(1));
    recorder.history().check(&Limits::default()).unwrap();
}

#[test]
fn threads_at_a_real_register_pass_and_are_all_there() {
    let recorder = Recorder::<Numbers>::new();
    let register = std::sync::Mutex::new(None);
    thread::scope(|scope| {
        for thread in 0..8 {
            let (client, register) = (recorder.client(), &register);
            scope.spawn(move || {
                for value in 0..150 {
                    let value = 1000 * thread + value;
                    let call = client.invoke(KEY, RegisterAction::Write(value));
                    *register.lock().unwrap() = Some(value);
                    call.answered(Some(value));
                    let call = client.invoke(KEY, RegisterAction::Read);
                    let found = *register.lock().unwrap();
                    call.answered(found);
                }
            });
        }
    });
    let report = recorder.history().check(&Limits::default());
    assert_eq!(report.operations, 2400);
    report.unwrap();
}

/// A small generator of its own: the large histories below must be the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What one register gives `clients` that work at once, some of whose answers get lost.
fn simulate(seed: u64, clients: u64, operations: u32, lost_percent: u64) -> Vec<Op> {
    let mut random = Random(seed);
    let mut plan = Vec::new();
    let mut free = vec![0_u64; usize::try_from(clients).unwrap()];
    for value in 0..operations {
        let client = usize::try_from(random.below(clients)).unwrap();
        let invoked = free[client] + 1 + random.below(20);
        let acts = invoked + random.below(50);
        let returned = acts + random.below(50);
        free[client] = returned;
        let is_read = random.below(2) == 0;
        let is_lost = random.below(100) < lost_percent;
        plan.push((acts, value, is_read, is_lost, (invoked, returned)));
    }
    plan.sort_unstable();
    let mut register = None;
    let mut history = Vec::new();
    for (_, value, is_read, is_lost, within) in plan {
        let happens = !is_lost || random.below(2) == 0;
        if !is_read && happens {
            register = Some(value);
        }
        history.push(match (is_read, is_lost) {
            (true, _) => read(register, within),
            (false, true) => lost(value, within.0),
            (false, false) => wrote(value, within),
        });
    }
    history
}

fn quickly(operations: Vec<Op>) -> bool {
    let start = worked();
    let passed = passes(operations);
    let took = worked() - start;
    assert!(took < QUICK, "took {took:?}");
    passed
}

/// How long processors have worked for this thread, on which a search runs: what else a busy machine
/// does counts for nothing.
fn worked() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    now.expect("Linux counts it").into()
}

#[test]
fn thousands_of_operations_on_one_key_are_checked_quickly() {
    for seed in 1..=5 {
        assert!(quickly(simulate(seed, 8, 3000, 0)));
        assert!(quickly(simulate(seed, 64, 2000, 0)));
    }
}

#[test]
fn hundreds_of_unknown_writes_on_one_key_are_checked_quickly() {
    for seed in 1..=3 {
        assert!(quickly(simulate(seed, 8, 3000, 30)));
    }
    // The worst: nobody ever reads what was lost.
    let mut unread: Vec<Op> = (0..830)
        .map(|value| lost(value, u64::from(value)))
        .collect();
    unread.extend((0..100_u32).map(|at| {
        let start = 1000 + 10 * u64::from(at);
        wrote(5000 + at, (start, start + 5))
    }));
    unread.push(read(Some(5099), (3000, 3001)));
    assert!(quickly(unread.clone()));
    unread.push(read(Some(5098), (3002, 3003)));
    assert!(!quickly(unread));
}

#[test]
fn a_stale_read_among_thousands_is_caught_quickly() {
    for seed in 1..=5 {
        let mut history = simulate(seed, 8, 3000, 2);
        make_stale(&mut history, usize::try_from(seed * 400).unwrap());
        assert!(!quickly(history), "seed {seed}");
    }
}

/// Lets a read, the first from `from` on that can, return what was certainly overwritten before.
fn make_stale(history: &mut [Op], from: usize) {
    let sure = |operation: &Op| {
        matches!(operation.action, RegisterAction::Write(_))
            && operation.outcome != Outcome::Unknown
    };
    let writes: Vec<Op> = history.iter().filter(|it| sure(it)).cloned().collect();
    let old_value = |look: &Op| {
        let before = |first: &&Op, second: &Op| first.returned < second.invoked;
        let newer: Vec<&Op> = writes.iter().filter(|it| before(it, look)).collect();
        let old = newer
            .iter()
            .find(|old| newer.iter().any(|new| before(old, new)))?;
        match old.outcome {
            Outcome::Ok(value) => Some(value),
            Outcome::Refused | Outcome::Unknown => None,
        }
    };
    let (at, value) = (from..history.len())
        .filter(|at| history[*at].action == RegisterAction::Read)
        .find_map(|at| Some((at, old_value(&history[at])?)))
        .expect("a write was overwritten");
    history[at].outcome = Outcome::Ok(value);
}

#[test]
fn a_search_that_meets_a_limit_says_undecided() {
    let history = History {
        operations: simulate(1, 8, 500, 0),
        ..History::<Numbers>::default()
    };
    let few = Limits {
        points: 3,
        ..Limits::default()
    };
    let report = history.check(&few);
    assert!(!report.is_linearizable() && report.violations.is_empty());
    assert_eq!(report.undecided.len(), 1, "{report}");

    let unknown = History {
        operations: (0..20).map(|value| lost(value, 0)).collect(),
        ..History::<Numbers>::default()
    };
    let few = Limits {
        unknowns: 19,
        ..Limits::default()
    };
    assert_eq!(unknown.check(&few).undecided.len(), 1);
    let no_time = Limits {
        time: Duration::ZERO,
        ..Limits::default()
    };
    assert!(!history.check(&no_time).undecided.is_empty());
}

/// Tries every order, one by one.
fn has_an_order(answered: &[Op], unknown: &[Op], state: Option<u32>) -> bool {
    if answered.is_empty() {
        return true;
    }
    let horizon = answered.iter().map(|it| it.returned).min().unwrap();
    let without = |all: &[Op], at: usize| {
        let mut rest = all.to_vec();
        rest.remove(at);
        rest
    };
    let next_answered = answered.iter().enumerate().any(|(at, it)| {
        let Outcome::Ok(answer) = it.outcome else {
            return false;
        };
        it.invoked <= horizon
            && Numbers::step(&state, &it.action, Some(&answer))
                .is_some_and(|state| has_an_order(&without(answered, at), unknown, state))
    });
    next_answered
        || unknown.iter().enumerate().any(|(at, it)| {
            it.invoked <= horizon
                && Numbers::step(&state, &it.action, None)
                    .is_some_and(|state| has_an_order(answered, &without(unknown, at), state))
        })
}

/// Anything at all: most of it is wrong.
fn any_operation() -> impl Strategy<Value = Op> {
    let times = (0..12_u64, 0..6_u64).prop_map(|(from, takes)| (from, from + takes));
    (0..5_u8, 0..3_u32, times).prop_map(|(kind, value, within)| match kind {
        0 | 1 => wrote(value, within),
        2 => lost(value, within.0),
        _ => read(value.checked_sub(1), within),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_search_agrees_with_trying_every_order(
        history in prop::collection::vec(any_operation(), 0..7)
    ) {
        let is_lost = |it: &Op| it.outcome == Outcome::Unknown;
        let (unknown, answered): (Vec<Op>, Vec<Op>) = history.clone().into_iter().partition(is_lost);
        prop_assert_eq!(passes(history), has_an_order(&answered, &unknown, None));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whatever_one_register_did_passes(
        seed in 1..u64::MAX, clients in 1..20_u64, operations in 0..300_u32, lost in 0..40_u64
    ) {
        prop_assert!(passes(simulate(seed, clients, operations, lost)));
    }

    #[test]
    fn a_stale_read_is_caught_wherever_it_is(seed in 1..u64::MAX, clients in 1..10_u64) {
        let mut history = simulate(seed, clients, 200, 0);
        make_stale(&mut history, 100);
        prop_assert!(!passes(history));
    }

    #[test]
    fn swapped_answers_of_one_client_are_caught(
        seed in 1..u64::MAX, first in any::<Index>(), second in any::<Index>()
    ) {
        let mut history = simulate(seed, 1, 60, 0);
        let reads: Vec<usize> = (0..history.len())
            .filter(|at| history[*at].action == RegisterAction::Read)
            .collect();
        let (first, second) = (reads[first.index(reads.len())], reads[second.index(reads.len())]);
        prop_assume!(history[first].outcome != history[second].outcome);
        let outcome = history[first].outcome.clone();
        history[first].outcome = std::mem::replace(&mut history[second].outcome, outcome);
        prop_assert!(!passes(history));
    }

    #[test]
    fn whatever_real_capsules_do_passes(seed in 1..u64::MAX) {
        let history = simulate_capsules(seed);
        let report = check(history);
        prop_assert!(report.is_linearizable(), "{}", report);
    }

    #[test]
    fn a_capsule_that_is_seen_after_its_end_is_caught(seed in 1..u64::MAX) {
        let mut history = simulate_capsules(seed);
        let gone = |it: &Operation<Capsule>| it.outcome == Outcome::Ok(CapsuleSeen::Absent)
            || it.outcome == Outcome::Ok(CapsuleSeen::Ended);
        let end = history.iter().filter(|it| gone(it)).max_by_key(|it| it.returned).cloned();
        prop_assume!(end.as_ref().is_some_and(|it| it.invoked > Duration::from_millis(10)));
        let end = end.unwrap();
        let late = end.returned + Duration::from_micros(1);
        history.push(Operation { action: CapsuleAction::Read, invoked: late, returned: late,
            outcome: Outcome::Ok(CapsuleSeen::Live), ..end });
        prop_assert!(!passes(history));
    }
}

/// What clients see of ten capsules that are made, looked at and destroyed by several at once.
fn simulate_capsules(seed: u64) -> Vec<Operation<Capsule>> {
    let mut random = Random(seed);
    let mut plan = Vec::new();
    for key in 0..10_u64 {
        let born = random.below(1000);
        plan.push((born, key, CapsuleAction::Create));
        for _ in 0..20 {
            plan.push((random.below(30_000), key, CapsuleAction::Read));
        }
        for _ in 0..2 {
            plan.push((born + 1 + random.below(20_000), key, CapsuleAction::Destroy));
        }
    }
    plan.sort_by_key(|(at, ..)| *at);
    let mut stages: BTreeMap<u64, u8> = BTreeMap::new();
    let mut history = Vec::new();
    for (at, key, action) in plan {
        let stage = stages.entry(key).or_default();
        // Ending and forgetting take their time.
        if *stage >= 2 && *stage < 4 && random.below(3) == 0 {
            *stage += 1;
        }
        match action {
            CapsuleAction::Create => *stage = 1,
            CapsuleAction::Destroy if *stage == 1 => *stage = 2,
            CapsuleAction::Destroy | CapsuleAction::Read => {}
        }
        let seen = match stage {
            0 | 4 => CapsuleSeen::Absent,
            1 => CapsuleSeen::Live,
            2 => CapsuleSeen::Ending,
            _ => CapsuleSeen::Ended,
        };
        let is_lost = action != CapsuleAction::Read && random.below(10) == 0;
        let within = (at.saturating_sub(random.below(200)), at + random.below(200));
        history.push(Operation {
            key: format!("cl-{key}"),
            ..operation(
                action,
                within,
                if is_lost {
                    Outcome::Unknown
                } else {
                    Outcome::Ok(seen)
                },
            )
        });
    }
    history
}
