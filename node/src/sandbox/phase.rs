//! Where a sandbox stands on this node, and what each event means there. Pure.
//!
//! ```text
//! Starting --GuestReady--> Ready --StopAsked | VmmEnded--> Releasing --Released--> Gone
//!    '-----StartFailed | StopAsked-------------------------^
//! ```
//!
//! There is no way back: a sandbox that ended here is forgotten, never restarted in place.

/// How a sandbox ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// As somebody wanted: the caller, or the guest itself by powering off.
    Stopped {
        /// Who wanted it, where it was not the caller.
        reason: String,
    },
    /// It could not start, or it broke.
    Failed {
        /// What broke.
        reason: String,
    },
    /// This node lost its lease, and ended it before another may start it.
    LeaseLost {
        /// In a sentence for people.
        reason: String,
    },
}

/// Where a sandbox stands on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its resources are being acquired, its guest boots.
    Starting,
    /// Its guest answers.
    Ready,
    /// It has ended; what it held is being released.
    Releasing {
        /// How it ended.
        end: End,
    },
    /// Nothing of it is left here.
    Gone {
        /// How it ended.
        end: End,
    },
}

/// What happens to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest answered and was set up.
    GuestReady,
    /// A step of the start failed for good.
    StartFailed {
        /// Which step, and why.
        reason: String,
    },
    /// It is to end.
    StopAsked,
    /// Its VMM ended without being asked to.
    VmmEnded(End),
    /// Everything it held is released.
    Released,
    /// Something it holds could not be released yet.
    ReleaseFailed,
}

/// What the driver has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Undo what was acquired, newest first.
    Release,
    /// Wait a little, then undo what is left.
    ReleaseLater,
}

/// Why an event means nothing where a sandbox stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// It is on its way out already.
    #[error("the sandbox is already stopping")]
    AlreadyStopping,
    /// The event does not belong to this phase.
    #[error("the event is out of turn")]
    OutOfTurn,
}

/// Moves one sandbox by one event.
///
/// # Errors
/// [`Refusal`] where the event changes nothing.
pub(super) fn step(phase: Phase, event: Event) -> Result<(Phase, Vec<Action>), Refusal> {
    let stopped = || End::Stopped {
        reason: String::new(),
    };
    Ok(match (phase, event) {
        // Starting --GuestReady--> Ready
        (Phase::Starting, Event::GuestReady) => (Phase::Ready, vec![]),
        // Starting --StartFailed--> Releasing
        (Phase::Starting, Event::StartFailed { reason }) => (
            Phase::Releasing {
                end: End::Failed { reason },
            },
            vec![Action::Release],
        ),
        // Starting or Ready --StopAsked--> Releasing
        (Phase::Starting | Phase::Ready, Event::StopAsked) => {
            (Phase::Releasing { end: stopped() }, vec![Action::Release])
        }
        // Starting or Ready --VmmEnded--> Releasing
        (Phase::Starting | Phase::Ready, Event::VmmEnded(end)) => {
            (Phase::Releasing { end }, vec![Action::Release])
        }
        // Releasing --Released--> Gone
        (Phase::Releasing { end }, Event::Released) => (Phase::Gone { end }, vec![]),
        // Releasing --ReleaseFailed--> Releasing: what is held stays known until it is gone.
        (Phase::Releasing { end }, Event::ReleaseFailed) => {
            (Phase::Releasing { end }, vec![Action::ReleaseLater])
        }
        (Phase::Releasing { .. } | Phase::Gone { .. }, Event::StopAsked) => {
            return Err(Refusal::AlreadyStopping);
        }
        (Phase::Starting | Phase::Ready | Phase::Releasing { .. } | Phase::Gone { .. }, _) => {
            return Err(Refusal::OutOfTurn);
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn failed() -> End {
        End::Failed {
            reason: "broke".into(),
        }
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::GuestReady),
            Just(Event::StartFailed {
                reason: "broke".into()
            }),
            Just(Event::StopAsked),
            Just(Event::VmmEnded(failed())),
            Just(Event::Released),
            Just(Event::ReleaseFailed),
        ]
    }

    #[test]
    fn a_failed_start_releases_what_it_had_and_keeps_its_reason() {
        let failure = Event::StartFailed {
            reason: "no disk".into(),
        };
        let (phase, actions) = step(Phase::Starting, failure).expect("starting may fail");
        assert_eq!(actions, [Action::Release]);
        let (phase, _) = step(phase, Event::Released).expect("releasing ends");
        assert_eq!(
            phase,
            Phase::Gone {
                end: End::Failed {
                    reason: "no disk".into()
                }
            }
        );
    }

    #[test]
    fn a_vmm_that_ends_while_it_is_released_changes_nothing() {
        let releasing = Phase::Releasing {
            end: End::Stopped {
                reason: String::new(),
            },
        };
        assert_eq!(
            step(releasing, Event::VmmEnded(failed())),
            Err(Refusal::OutOfTurn)
        );
    }

    #[test]
    fn a_second_stop_is_refused_by_name() {
        let (phase, _) = step(Phase::Ready, Event::StopAsked).expect("ready may stop");
        assert_eq!(step(phase, Event::StopAsked), Err(Refusal::AlreadyStopping));
    }

    proptest! {
        /// Whatever happens, in whatever order, a stop followed by a release ends the sandbox.
        #[test]
        fn every_history_has_a_way_out(events in prop::collection::vec(any_event(), 0..20)) {
            let mut phase = Phase::Starting;
            for event in events.into_iter().chain([Event::StopAsked, Event::Released]) {
                if let Ok((next, _)) = step(phase.clone(), event) {
                    phase = next;
                }
            }
            prop_assert!(matches!(phase, Phase::Gone { .. }), "stuck in {:?}", phase);
        }
    }
}
