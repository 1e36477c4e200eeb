//! Where a sandbox stands on this node, and what each event means there. Pure.
//!
//! ```text
//! Starting --GuestReady--> Ready --StopAsked | VmmEnded--> Releasing --Released--> Gone
//!    '-----StartFailed | StopAsked-------------------------^
//!
//! Ready --SealAsked--> Sealing --Sealed-----> Sealed --StopAsked--> Releasing
//!   ^                     '------SealFailed-> Frozen --StopAsked--> Releasing
//!   '--Thawed-- Thawing <--ThawAsked-- Frozen | Sealed
//! ```
//!
//! There is no way back from `Releasing`: a sandbox that ended here is forgotten, never restarted in
//! place. A sandbox that is sealed needs its VMM no more: its end changes nothing.

use raft::state::{Sealed, SnapshotKind};

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
    /// Its start was cut short by the end of the daemon, and nothing of it was told to anybody.
    Unfinished {
        /// In a sentence for people.
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
    /// Its guest is frozen, and its state goes into the store.
    Sealing,
    /// It is in the store, durably; the guest is still here, frozen.
    Sealed(Box<Sealed>),
    /// It could not be sealed; the guest is frozen until somebody says what becomes of it.
    Frozen {
        /// What was in the way.
        reason: String,
    },
    /// The guest is let go on.
    Thawing,
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

/// What a seal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SealFor {
    /// The pause or checkpoint that asked for it.
    pub(super) pause: u64,
    /// What of the sandbox is to be in it.
    pub(super) kind: SnapshotKind,
}

/// What happens to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest answered and was set up.
    GuestReady,
    /// It was found standing still: an earlier daemon was sealing it.
    FoundFrozen {
        /// For people.
        reason: String,
    },
    /// A step of the start failed for good.
    StartFailed {
        /// Which step, and why.
        reason: String,
    },
    /// It is to be sealed.
    SealAsked(SealFor),
    /// It was.
    Sealed(Box<Sealed>),
    /// It was not, and the guest is still frozen.
    SealFailed {
        /// Which step, and why.
        reason: String,
    },
    /// A frozen guest is to go on.
    ThawAsked,
    /// It goes on.
    Thawed,
    /// It does not yet, and will be told again.
    ThawFailed {
        /// What is in the way.
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
    /// Freeze the guest and put its state into the store.
    Seal(SealFor),
    /// Let the guest go on.
    Thaw,
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
        // Starting --FoundFrozen--> Frozen
        (Phase::Starting, Event::FoundFrozen { reason }) => (Phase::Frozen { reason }, vec![]),
        // Starting --StartFailed--> Releasing
        (Phase::Starting, Event::StartFailed { reason }) => (
            Phase::Releasing {
                end: End::Failed { reason },
            },
            vec![Action::Release],
        ),
        // Ready --SealAsked--> Sealing
        (Phase::Ready, Event::SealAsked(what)) => (Phase::Sealing, vec![Action::Seal(what)]),
        // Sealing --Sealed--> Sealed
        (Phase::Sealing, Event::Sealed(sealed)) => (Phase::Sealed(sealed), vec![]),
        // Sealing --SealFailed--> Frozen
        (Phase::Sealing, Event::SealFailed { reason }) => (Phase::Frozen { reason }, vec![]),
        // Frozen or Sealed --ThawAsked--> Thawing
        (Phase::Frozen { .. } | Phase::Sealed(_), Event::ThawAsked) => {
            (Phase::Thawing, vec![Action::Thaw])
        }
        // Thawing --ThawFailed--> Frozen
        (Phase::Thawing, Event::ThawFailed { reason }) => (Phase::Frozen { reason }, vec![]),
        // Thawing --Thawed--> Ready
        (Phase::Thawing, Event::Thawed) => (Phase::Ready, vec![]),
        // Sealed --VmmEnded--> Sealed: everything there is of it lies in the store.
        (Phase::Sealed(sealed), Event::VmmEnded(_)) => (Phase::Sealed(sealed), vec![]),
        // Anything that holds a VMM --StopAsked--> Releasing
        (
            Phase::Starting
            | Phase::Ready
            | Phase::Sealing
            | Phase::Sealed(_)
            | Phase::Frozen { .. }
            | Phase::Thawing,
            Event::StopAsked,
        ) => (Phase::Releasing { end: stopped() }, vec![Action::Release]),
        // The same --VmmEnded--> Releasing
        (
            Phase::Starting | Phase::Ready | Phase::Sealing | Phase::Frozen { .. } | Phase::Thawing,
            Event::VmmEnded(end),
        ) => (Phase::Releasing { end }, vec![Action::Release]),
        // Releasing --Released--> Gone
        (Phase::Releasing { end }, Event::Released) => (Phase::Gone { end }, vec![]),
        // Releasing --ReleaseFailed--> Releasing: what is held stays known until it is gone.
        (Phase::Releasing { end }, Event::ReleaseFailed) => {
            (Phase::Releasing { end }, vec![Action::ReleaseLater])
        }
        (Phase::Releasing { .. } | Phase::Gone { .. }, Event::StopAsked) => {
            return Err(Refusal::AlreadyStopping);
        }
        (
            Phase::Starting
            | Phase::Ready
            | Phase::Sealing
            | Phase::Sealed(_)
            | Phase::Frozen { .. }
            | Phase::Thawing
            | Phase::Releasing { .. }
            | Phase::Gone { .. },
            _,
        ) => return Err(Refusal::OutOfTurn),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ASKED: SealFor = SealFor {
        pause: 7,
        kind: SnapshotKind::Snapshot,
    };

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
            Just(Event::FoundFrozen {
                reason: "the daemon died".into()
            }),
            Just(Event::SealAsked(ASKED)),
            Just(Event::Sealed(Box::default())),
            Just(Event::SealFailed {
                reason: "full".into()
            }),
            Just(Event::ThawAsked),
            Just(Event::Thawed),
            Just(Event::ThawFailed {
                reason: "hung".into()
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
    fn a_seal_that_failed_leaves_the_guest_frozen_until_it_is_let_go() {
        let (phase, actions) =
            step(Phase::Ready, Event::SealAsked(ASKED)).expect("ready may be sealed");
        assert_eq!(actions, [Action::Seal(ASKED)]);
        let failure = Event::SealFailed {
            reason: "disk full".into(),
        };
        let (phase, actions) = step(phase, failure).expect("sealing may fail");
        assert_eq!(actions, []);
        let (phase, actions) = step(phase, Event::ThawAsked).expect("frozen may thaw");
        assert_eq!(actions, [Action::Thaw]);
        let (phase, _) = step(phase, Event::Thawed).expect("thawing ends");
        assert_eq!(phase, Phase::Ready);
    }

    #[test]
    fn a_sealed_sandbox_does_not_need_its_vmm() {
        let sealed = Phase::Sealed(Box::default());
        let (phase, actions) = step(sealed.clone(), Event::VmmEnded(failed())).expect("it may end");
        assert_eq!((phase, actions), (sealed, vec![]));
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
