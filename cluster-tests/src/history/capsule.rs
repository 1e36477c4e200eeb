//! A capsule: not there, there, ending, ended, forgotten. It never goes back.
//!
//! ```text
//! Absent --create--> Live --destroy--> Ending --> Ended --> Forgotten
//!                      '-----(by itself: it broke, it idled)---^
//! ```
//!
//! Only creates and destroys are clients' doing; the rest happens by itself and is noticed by
//! looking. Starting, running and "its host is missing" are all [`CapsuleSeen::Live`]: a capsule
//! that is placed again starts a second time, but one that ended never lives again. A live capsule
//! may end by itself, so seeing it ended proves nothing wrong; **seeing it absent does**, because
//! its record is kept long after its end, and so does seeing it live after it was seen ended.

use super::model::Model;

/// The model of one capsule.
#[derive(Clone, Copy, Debug)]
pub struct Capsule;

/// What clients do with a capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapsuleAction {
    /// Makes it.
    Create,
    /// Wants it gone.
    Destroy,
    /// Looks at it.
    Read,
}

/// What clients are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapsuleSeen {
    /// No such capsule (404).
    Absent,
    /// `starting`, `running` or `missing`.
    Live,
    /// `stopping`, or a destroy that is still under way (202).
    Ending,
    /// `stopped` or `error`, a create that came to nothing, or a destroy that is done (204).
    Ended,
    /// Not in the list, which shows live and ending ones only.
    Unlisted,
}

impl CapsuleSeen {
    /// What the `status` of a capsule says; `None` for a word this test does not know.
    #[must_use]
    pub fn of_status(status: &str) -> Option<Self> {
        match status {
            "starting" | "running" | "missing" => Some(Self::Live),
            "stopping" => Some(Self::Ending),
            "stopped" | "error" => Some(Self::Ended),
            _ => None,
        }
    }
}

/// Where a capsule stands, as far as anybody has noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CapsuleState {
    /// Not made yet.
    #[default]
    Absent,
    /// Made; it may have ended unnoticed.
    Live,
    /// Wanted gone; it may have ended unnoticed.
    Ending,
    /// Ended; its record is kept for a while.
    Ended,
    /// Its record is gone too.
    Forgotten,
}

impl CapsuleState {
    /// The state in which a look finds what was seen, if it can.
    fn noticed(self, seen: CapsuleSeen) -> Option<Self> {
        use CapsuleState::{Absent, Ended, Ending, Forgotten, Live};
        match (seen, self) {
            (CapsuleSeen::Absent | CapsuleSeen::Unlisted, Absent) => Some(Absent),
            (CapsuleSeen::Absent, Ending | Ended | Forgotten) => Some(Forgotten),
            (CapsuleSeen::Live, Live) => Some(Live),
            (CapsuleSeen::Ending, Live | Ending) => Some(Ending),
            (CapsuleSeen::Ended | CapsuleSeen::Unlisted, Live | Ending | Ended) => Some(Ended),
            (CapsuleSeen::Unlisted, Forgotten) => Some(Forgotten),
            _ => None,
        }
    }

    const fn destroyed(self) -> Self {
        match self {
            Self::Live => Self::Ending,
            other => other,
        }
    }
}

impl Model for Capsule {
    type State = CapsuleState;
    type Action = CapsuleAction;
    type Answer = CapsuleSeen;

    fn step(
        state: &CapsuleState,
        action: &CapsuleAction,
        answer: Option<&CapsuleSeen>,
    ) -> Option<CapsuleState> {
        let acted = match (action, state) {
            (CapsuleAction::Create, CapsuleState::Absent) => CapsuleState::Live,
            // An id is given out once.
            (CapsuleAction::Create, _) => return None,
            (CapsuleAction::Destroy, state) => state.destroyed(),
            (CapsuleAction::Read, state) => *state,
        };
        answer.map_or(Some(acted), |seen| acted.noticed(*seen))
    }

    fn only_looks(action: &CapsuleAction) -> bool {
        matches!(action, CapsuleAction::Read)
    }

    fn is_steady(action: &CapsuleAction, answer: &CapsuleSeen) -> bool {
        // Not listed before its create is nothing; after it, it is an end that was noticed.
        Self::only_looks(action) && *answer != CapsuleSeen::Unlisted
    }

    fn birth() -> Option<CapsuleAction> {
        Some(CapsuleAction::Create)
    }
}
