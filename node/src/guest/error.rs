//! What can go wrong between this node and a guest agent.

use std::error::Error as _;
use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};

use crate::base::remedy::Remedy;

/// A refusal by the agent, in the terms that clients are answered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestCode {
    /// The path or process does not exist.
    NotFound,
    /// The request makes no sense to the agent.
    InvalidArgument,
    /// Something of that name exists.
    AlreadyExists,
    /// The object is not in a state that allows it.
    FailedPrecondition,
    /// The user inside the guest may not do it.
    PermissionDenied,
    /// The guest's disk is full.
    NoSpace,
    /// The agent does not offer this.
    Unimplemented,
    /// The process ran past its deadline and was killed.
    DeadlineExceeded,
    /// Anything else the agent reports.
    Other,
}

/// Why a call to a guest agent failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The agent answered, and said no.
    #[error("{message}")]
    Refused {
        /// What kind of no.
        code: GuestCode,
        /// The agent's own words.
        message: String,
    },
    /// The agent could not be reached, or the connection broke.
    #[error("reach the guest agent")]
    Unreachable {
        /// What the transport says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("the guest agent did not answer within {waited:?}")]
    TimedOut {
        /// How long was waited.
        waited: Duration,
    },
    /// The agent's answer is not what its protocol says.
    #[error("the guest agent answered nonsense: {0}")]
    Nonsense(String),
}

impl GuestError {
    /// Who must act next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Refused { code, .. } => match code {
                GuestCode::NotFound => Remedy::NotThere,
                GuestCode::InvalidArgument => Remedy::FixRequest,
                GuestCode::AlreadyExists | GuestCode::FailedPrecondition => Remedy::WrongState,
                GuestCode::PermissionDenied => Remedy::NotAllowed,
                GuestCode::NoSpace
                | GuestCode::Unimplemented
                | GuestCode::DeadlineExceeded
                | GuestCode::Other => Remedy::BlameGuest,
            },
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Nonsense(_) => {
                Remedy::BlameGuest
            }
        }
    }

    /// Wraps a transport failure.
    pub(super) fn unreachable(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Unreachable {
            source: source.into(),
        }
    }

    /// An HTTP answer of status 400 or more, with its body.
    pub(super) fn from_http(status: http::StatusCode, body: &[u8]) -> Self {
        #[derive(serde::Deserialize)]
        struct Envelope {
            message: String,
        }
        let code = match status.as_u16() {
            400 => GuestCode::InvalidArgument,
            403 => GuestCode::PermissionDenied,
            404 => GuestCode::NotFound,
            409 => GuestCode::AlreadyExists,
            501 => GuestCode::Unimplemented,
            507 => GuestCode::NoSpace,
            _ => GuestCode::Other,
        };
        let message = serde_json::from_slice::<Envelope>(body)
            .map_or_else(|_| format!("status {status}"), |envelope| envelope.message);
        Self::Refused { code, message }
    }
}

/// How the client library begins its own words for an answer that broke off. It gives no other sign.
const BROKEN_BODY: &str = "failed to read response body";

fn is_broken_body(err: &ConnectError) -> bool {
    let words = err.message.as_deref();
    words.is_some_and(|words| words.starts_with(BROKEN_BODY))
}

impl From<ConnectError> for GuestError {
    fn from(err: ConnectError) -> Self {
        let code = match err.code {
            ErrorCode::NotFound => GuestCode::NotFound,
            ErrorCode::InvalidArgument | ErrorCode::OutOfRange => GuestCode::InvalidArgument,
            ErrorCode::AlreadyExists => GuestCode::AlreadyExists,
            ErrorCode::FailedPrecondition => GuestCode::FailedPrecondition,
            ErrorCode::PermissionDenied => GuestCode::PermissionDenied,
            ErrorCode::Unimplemented => GuestCode::Unimplemented,
            ErrorCode::DeadlineExceeded => GuestCode::DeadlineExceeded,
            ErrorCode::Unavailable => return Self::unreachable(err),
            // A cause is never sent: this one is our side's, and no word of the agent.
            _ if err.source().is_some() => return Self::unreachable(err),
            ErrorCode::Internal if is_broken_body(&err) => return Self::unreachable(err),
            _ => GuestCode::Other,
        };
        let message = err
            .message
            .clone()
            .unwrap_or_else(|| err.code.as_str().to_owned());
        Self::Refused { code, message }
    }
}
