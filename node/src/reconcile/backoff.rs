//! Which step may start now: one at a time per sandbox, and a step that is planned again right
//! after it was carried out did not help, so it waits longer each time.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use proto::ids::SandboxId;
use tokio::time::Instant;

use super::plan::Step;

/// The first wait: most failures are a leader change, over within a second.
const FIRST: Duration = Duration::from_millis(200);
/// The longest wait: a repaired cause is noticed within this time.
const LONGEST: Duration = Duration::from_secs(15);

/// The sandbox a step is about; `None` for the one that is about none.
pub(super) type Subject = Option<SandboxId>;

/// The steps under way and those lately carried out.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    by_subject: HashMap<Subject, Attempt>,
}

#[derive(Debug)]
struct Attempt {
    step: Step,
    tries: u32,
    state: AttemptState,
}

#[derive(Debug)]
enum AttemptState {
    UnderWay,
    Done { again_at: Instant },
}

/// Whether a step may start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Now; it counts as under way from here on.
    Start,
    /// Another one of this subject is under way.
    Busy,
    /// Not before this much time has passed.
    Wait(Duration),
}

impl Attempts {
    /// Judges a planned step.
    pub(super) fn judge(&mut self, step: &Step, now: Instant) -> Verdict {
        let tries = match self.by_subject.get(&step.sandbox()) {
            Some(Attempt {
                state: AttemptState::UnderWay,
                ..
            }) => return Verdict::Busy,
            Some(Attempt {
                step: last,
                tries,
                state: AttemptState::Done { again_at },
            }) if repeats(last, step) => {
                if *again_at > now {
                    return Verdict::Wait(*again_at - now);
                }
                tries.saturating_add(1)
            }
            Some(_) | None => 1,
        };
        let attempt = Attempt {
            step: step.clone(),
            tries,
            state: AttemptState::UnderWay,
        };
        self.by_subject.insert(step.sandbox(), attempt);
        Verdict::Start
    }

    /// Notes that the step of a subject has been carried out, well or not.
    pub(super) fn done(&mut self, subject: Subject, now: Instant) {
        if let Some(attempt) = self.by_subject.get_mut(&subject) {
            attempt.state = AttemptState::Done {
                again_at: now + after(attempt.tries),
            };
        }
    }

    /// Forgets subjects that no plan speaks of any more.
    pub(super) fn keep_only(&mut self, planned: &BTreeSet<Subject>) {
        self.by_subject.retain(|subject, attempt| {
            matches!(attempt.state, AttemptState::UnderWay) || planned.contains(subject)
        });
    }
}

/// Whether a step is the last one again. A prune carries the time, so each would be new.
fn repeats(last: &Step, step: &Step) -> bool {
    last == step || matches!((last, step), (Step::Prune { .. }, Step::Prune { .. }))
}

/// The wait after `tries` tries of the same step in a row.
fn after(tries: u32) -> Duration {
    let doublings = tries.saturating_sub(1).min(16);
    FIRST.saturating_mul(1 << doublings).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use proto::units::Stamp;

    use super::*;

    const ID: SandboxId = SandboxId([7; 16]);

    #[test]
    fn waits_double_up_to_a_bound_and_never_overflow() {
        assert_eq!(after(1), FIRST);
        assert_eq!(after(2), FIRST * 2);
        assert_eq!(after(u32::MAX), LONGEST);
    }

    #[test]
    fn a_prune_that_failed_waits_although_the_clock_has_moved_on() {
        let mut attempts = Attempts::default();
        let now = Instant::now();
        let prune = |ms| Step::Prune {
            ended_before: Stamp(ms),
        };
        assert_eq!(attempts.judge(&prune(1), now), Verdict::Start);
        attempts.done(None, now);
        assert_eq!(attempts.judge(&prune(2), now), Verdict::Wait(FIRST));
    }

    #[test]
    fn one_step_of_a_sandbox_is_under_way_at_a_time() {
        let mut attempts = Attempts::default();
        let now = Instant::now();
        assert_eq!(attempts.judge(&Step::Start(ID), now), Verdict::Start);
        assert_eq!(attempts.judge(&Step::Stop(ID), now), Verdict::Busy);
        attempts.done(Some(ID), now);
        assert_eq!(attempts.judge(&Step::Stop(ID), now), Verdict::Start);
    }

    #[test]
    fn a_step_that_did_not_help_waits_and_waits_longer_the_next_time() {
        let mut attempts = Attempts::default();
        let now = Instant::now();
        assert_eq!(attempts.judge(&Step::Stop(ID), now), Verdict::Start);
        attempts.done(Some(ID), now);
        assert_eq!(attempts.judge(&Step::Stop(ID), now), Verdict::Wait(FIRST));
        assert_eq!(attempts.judge(&Step::Stop(ID), now + FIRST), Verdict::Start);
        attempts.done(Some(ID), now + FIRST);
        assert_eq!(
            attempts.judge(&Step::Stop(ID), now + FIRST),
            Verdict::Wait(FIRST * 2)
        );
    }
}
