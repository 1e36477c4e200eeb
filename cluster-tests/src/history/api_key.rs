//! An API key: made once, useless for ever once it is revoked.

use super::model::Model;

/// The model of one API key.
#[derive(Clone, Copy, Debug)]
pub struct ApiKey;

/// What clients do with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKeyAction {
    /// Makes it.
    Create,
    /// Revokes it.
    Revoke,
    /// Uses it, or looks it up.
    Use,
}

/// What clients are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKeySeen {
    /// It opens doors: it was created, or a request with it was let in.
    Valid,
    /// It opens none: it was revoked, or a request with it was turned away. Why is not told.
    Invalid,
}

/// Where a key stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ApiKeyState {
    /// Not made yet.
    #[default]
    Absent,
    /// Opens doors.
    Valid,
    /// Never will again.
    Revoked,
}

impl Model for ApiKey {
    type State = ApiKeyState;
    type Action = ApiKeyAction;
    type Answer = ApiKeySeen;

    fn step(
        state: &ApiKeyState,
        action: &ApiKeyAction,
        answer: Option<&ApiKeySeen>,
    ) -> Option<ApiKeyState> {
        use ApiKeyState::{Absent, Revoked, Valid};
        let (next, shows) = match (action, state) {
            (ApiKeyAction::Create, Absent | Valid) => (Valid, ApiKeySeen::Valid),
            // Made again under the same id: it stays revoked.
            (ApiKeyAction::Create | ApiKeyAction::Use, Revoked) => (Revoked, ApiKeySeen::Invalid),
            (ApiKeyAction::Revoke, Valid | Revoked) => (Revoked, ApiKeySeen::Invalid),
            (ApiKeyAction::Revoke | ApiKeyAction::Use, Absent) => (Absent, ApiKeySeen::Invalid),
            (ApiKeyAction::Use, Valid) => (Valid, ApiKeySeen::Valid),
        };
        answer.is_none_or(|answer| *answer == shows).then_some(next)
    }

    fn only_looks(action: &ApiKeyAction) -> bool {
        matches!(action, ApiKeyAction::Use)
    }

    fn birth() -> Option<ApiKeyAction> {
        Some(ApiKeyAction::Create)
    }
}
