//! From what went wrong to what a client is told: the only place that chooses a status and a code.
//!
//! Every error below this room says who must act ([`Remedy`]); status and stable code follow from
//! that in [`Code::of`], and for refusals of the guest agent in [`Code::of_guest`]. The body of
//! every answer from 400 up is `{"error":{"code","message"}}`. A failure that is ours or the
//! guest's is logged here, once, with its whole chain.

use std::borrow::Cow;
use std::error::Error;

use axum::Json;
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use raft::command::Refusal;
use serde::Serialize;
use tracing::{error, warn};
use utoipa::ToSchema;

use super::cluster_info::NoQuorum;
use crate::base::chain::chain;
use crate::base::remedy::Remedy;
use crate::cluster::{LogError, ProposeError};
use crate::guest::{GuestCode, GuestError};
use crate::relay::RelayError;

/// Longest message sent to a client. Some quote what the client sent, which may be huge.
const MESSAGE_CHARS: usize = 1000;

/// The stable codes of the public interface, each with its one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request itself is wrong.
    InvalidRequest,
    /// No key, or none that is known.
    Unauthorized,
    /// The caller may not do this.
    Forbidden,
    /// What was named does not exist, or not for this caller.
    NotFound,
    /// No such method on this route.
    MethodNotAllowed,
    /// The capsule is not in the state the call needs.
    InvalidState,
    /// The host that is to go has capsules.
    HostHasSandboxes,
    /// The guest says its object is not in the state the call needs.
    Conflict,
    /// Something of that name exists.
    AlreadyExists,
    /// The body is past its limit.
    TooLarge,
    /// This node failed.
    InternalError,
    /// Part of the interface that this version does not have yet.
    NotImplemented,
    /// The guest agent does not offer this.
    AgentUnimplemented,
    /// The guest or its VMM failed.
    AgentError,
    /// The capsule's host, or the cluster, cannot be reached.
    HostUnavailable,
    /// No host has room.
    NoHostsAvailable,
    /// Most voters of the cluster cannot be reached.
    NoQuorum,
    /// This node serves as many requests as it can.
    Overloaded,
    /// The API key has made too many requests.
    RateLimited,
}

impl Code {
    /// The status and the word on the wire.
    #[must_use]
    pub const fn wire(self) -> (StatusCode, &'static str) {
        match self {
            Self::InvalidRequest => (StatusCode::BAD_REQUEST, "invalid_request"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::InvalidState => (StatusCode::CONFLICT, "invalid_state"),
            Self::HostHasSandboxes => (StatusCode::CONFLICT, "host_has_sandboxes"),
            Self::Conflict => (StatusCode::CONFLICT, "conflict"),
            Self::AlreadyExists => (StatusCode::CONFLICT, "already_exists"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Self::InternalError => (StatusCode::INTERNAL_SERVER_ERROR, "internal_error"),
            Self::NotImplemented => (StatusCode::NOT_IMPLEMENTED, "not_implemented"),
            Self::AgentUnimplemented => (StatusCode::NOT_IMPLEMENTED, "agent_error"),
            Self::AgentError => (StatusCode::BAD_GATEWAY, "agent_error"),
            Self::HostUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "host_unavailable"),
            Self::NoHostsAvailable => (StatusCode::SERVICE_UNAVAILABLE, "no_hosts_available"),
            Self::NoQuorum => (StatusCode::SERVICE_UNAVAILABLE, "no_quorum"),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
            Self::RateLimited => (StatusCode::TOO_MANY_REQUESTS, "rate_limited"),
        }
    }

    /// What a remedy means to a client.
    const fn of(remedy: Remedy) -> Self {
        match remedy {
            Remedy::FixRequest => Self::InvalidRequest,
            Remedy::NotThere => Self::NotFound,
            Remedy::WrongState => Self::InvalidState,
            Remedy::NotAllowed => Self::Forbidden,
            Remedy::RetryLater | Remedy::AskAnotherPeer => Self::HostUnavailable,
            Remedy::BlameGuest => Self::AgentError,
            Remedy::CallOperator => Self::InternalError,
        }
    }

    /// What a refusal of the guest agent means to a client.
    const fn of_guest(code: GuestCode) -> Self {
        match code {
            GuestCode::NotFound => Self::NotFound,
            GuestCode::InvalidArgument => Self::InvalidRequest,
            GuestCode::AlreadyExists => Self::AlreadyExists,
            GuestCode::FailedPrecondition => Self::Conflict,
            GuestCode::PermissionDenied => Self::Forbidden,
            GuestCode::Unimplemented => Self::AgentUnimplemented,
            GuestCode::NoSpace | GuestCode::DeadlineExceeded | GuestCode::Other => Self::AgentError,
        }
    }

    /// Whether this node or a guest failed, so that somebody may want to read about it.
    const fn is_failure(self) -> bool {
        match self {
            Self::InternalError | Self::AgentError | Self::HostUnavailable => true,
            Self::InvalidRequest
            | Self::Unauthorized
            | Self::Forbidden
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::InvalidState
            | Self::HostHasSandboxes
            | Self::Conflict
            | Self::AlreadyExists
            | Self::TooLarge
            | Self::NotImplemented
            | Self::AgentUnimplemented
            | Self::NoHostsAvailable
            | Self::NoQuorum
            | Self::Overloaded
            | Self::RateLimited => false,
        }
    }
}

/// An answer that says no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// What kind of no.
    pub code: Code,
    /// Why, for people.
    pub message: String,
    /// Tells apart what one code covers, for programs that care.
    pub detail: Option<&'static str>,
}

impl ApiError {
    /// An error of this code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            detail: None,
        }
    }

    /// The request is wrong, and how.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message)
    }

    /// What a client is told beside the status.
    pub(super) fn body(&self) -> ErrorBody {
        let (_, code) = self.code.wire();
        let message = self.message.chars().take(MESSAGE_CHARS).collect::<String>();
        let error = ErrorContents {
            code,
            message: message.into(),
            detail: self.detail,
        };
        ErrorBody { error }
    }

    /// An error whose code follows from its remedy, told with its causes.
    fn from_remedy(remedy: Remedy, err: &dyn Error) -> Self {
        Self::new(Code::of(remedy), chain(err))
    }
}

impl From<RelayError> for ApiError {
    fn from(err: RelayError) -> Self {
        let detail = match &err {
            RelayError::HostUnreachable { .. } => Some(HOST_UNREACHABLE),
            RelayError::HostLost { .. } => Some("host_lost"),
            RelayError::Frozen { .. } => Some(HOST_FROZEN),
            _ => None,
        };
        let told = Self::from_remedy(err.remedy(), &err);
        let code = match err {
            RelayError::Busy { .. } => Code::Overloaded,
            _ => told.code,
        };
        Self {
            code,
            detail,
            ..told
        }
    }
}

impl From<ProposeError> for ApiError {
    fn from(err: ProposeError) -> Self {
        match &err {
            // The one refusal that clients know by a code of its own.
            ProposeError::Refused(Refusal::NoRoom(_)) => {
                Self::new(Code::NoHostsAvailable, err.to_string())
            }
            ProposeError::Refused(Refusal::NameTaken(name)) => Self::new(
                Code::Conflict,
                format!("there is a snapshot called {name:?} already; ?overwrite=true replaces it"),
            ),
            // With or without a known outcome: asking again once there is a quorum is right.
            ProposeError::Log(LogError::NoLeader { .. } | LogError::Unknown { .. }) => {
                Self::new(Code::NoQuorum, err.to_string())
            }
            ProposeError::Refused(_) | ProposeError::Log(_) => {
                Self::from_remedy(err.remedy(), &err)
            }
        }
    }
}

impl From<NoQuorum> for ApiError {
    fn from(err: NoQuorum) -> Self {
        Self::new(Code::NoQuorum, err.to_string())
    }
}

impl From<GuestError> for ApiError {
    fn from(err: GuestError) -> Self {
        // The way to the guest may be at fault, and not the guest.
        if let Some(relay) = RelayError::among_causes(&err) {
            return relay.clone().into();
        }
        match &err {
            GuestError::Refused { code, message } => Self {
                code: Code::of_guest(*code),
                message: message.clone(),
                detail: match code {
                    GuestCode::DeadlineExceeded => Some(DEADLINE_EXCEEDED),
                    GuestCode::NoSpace => Some("no_space"),
                    GuestCode::NotFound
                    | GuestCode::InvalidArgument
                    | GuestCode::AlreadyExists
                    | GuestCode::FailedPrecondition
                    | GuestCode::PermissionDenied
                    | GuestCode::Unimplemented
                    | GuestCode::Other => None,
                },
            },
            GuestError::TimedOut { .. } => Self {
                detail: Some(DEADLINE_EXCEEDED),
                ..Self::from_remedy(err.remedy(), &err)
            },
            GuestError::Unreachable { .. } | GuestError::Nonsense(_) => {
                Self::from_remedy(err.remedy(), &err)
            }
        }
    }
}

/// The detail of an answer that came because a deadline passed.
pub const DEADLINE_EXCEEDED: &str = "deadline_exceeded";

/// The detail of an answer that came because the capsule's host cannot be reached. Nothing was
/// done.
const HOST_UNREACHABLE: &str = "host_unreachable";
/// The detail of an answer that came because the capsule stands still until its host hears of the
/// cluster again.
const HOST_FROZEN: &str = "host_frozen";
/// When to try again where a host is away: an election and a lease renewal later.
const RETRY_AFTER_SECONDS: u32 = 5;

/// The body of every answer from 400 up.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    error: ErrorContents,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
struct ErrorContents {
    /// A stable word for programs.
    #[schema(value_type = String, example = "not_found")]
    code: &'static str,
    /// An explanation for people.
    #[schema(value_type = String)]
    message: Cow<'static, str>,
    /// Tells apart what one code covers.
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'static str>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, code) = self.code.wire();
        match self.code {
            Code::InternalError => error!(code, message = %self.message, "request failed"),
            other if other.is_failure() => warn!(code, message = %self.message, "request failed"),
            _ => {}
        }
        let mut response = (status, Json(self.body())).into_response();
        if matches!(self.detail, Some(HOST_UNREACHABLE | HOST_FROZEN)) {
            let headers = response.headers_mut();
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS.into());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use proto::ids::SandboxId;
    use raft::placement::Lack;
    use raft::state::Phase;

    use super::*;
    use crate::cluster::LogError;

    fn wire_of(err: impl Into<ApiError>) -> (u16, &'static str) {
        let (status, code) = err.into().code.wire();
        (status.as_u16(), code)
    }

    #[test]
    fn every_guest_code_has_the_status_of_the_specification() {
        let expected = [
            (GuestCode::NotFound, 404, "not_found"),
            (GuestCode::InvalidArgument, 400, "invalid_request"),
            (GuestCode::AlreadyExists, 409, "already_exists"),
            (GuestCode::FailedPrecondition, 409, "conflict"),
            (GuestCode::PermissionDenied, 403, "forbidden"),
            (GuestCode::Unimplemented, 501, "agent_error"),
            (GuestCode::NoSpace, 502, "agent_error"),
            (GuestCode::DeadlineExceeded, 502, "agent_error"),
            (GuestCode::Other, 502, "agent_error"),
        ];
        for (code, status, word) in expected {
            let message = String::new();
            assert_eq!(
                wire_of(GuestError::Refused { code, message }),
                (status, word)
            );
        }
    }

    #[test]
    fn a_guest_that_cannot_be_reached_is_an_agent_error_with_its_cause() {
        let err = ApiError::from(GuestError::Unreachable {
            source: "connection refused".into(),
        });
        assert_eq!(err.code, Code::AgentError);
        assert_eq!(err.message, "reach the guest agent: connection refused");
    }

    fn unreachable(id: SandboxId) -> RelayError {
        RelayError::HostUnreachable {
            id,
            host: "otter".into(),
            since: None,
            why: "no answer".into(),
        }
    }

    #[test]
    fn a_host_that_is_away_is_told_from_a_guest_that_is() {
        let relay = unreachable(SandboxId::default());
        let dialled = std::io::Error::other(relay.clone());
        let err = ApiError::from(GuestError::Unreachable {
            source: dialled.into(),
        });
        assert_eq!(err, ApiError::from(relay));
        assert_eq!(err.detail, Some(HOST_UNREACHABLE));
        assert!(err.message.contains("otter"));
        let response = err.into_response();
        assert_eq!(response.headers()[RETRY_AFTER], "5");
    }

    #[test]
    fn what_may_have_happened_is_not_to_be_tried_again_unasked() {
        let lost = RelayError::HostLost {
            id: SandboxId::default(),
            host: "otter".into(),
        };
        let response = ApiError::from(lost).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(!response.headers().contains_key(RETRY_AFTER));
    }

    #[test]
    fn relay_and_proposal_errors_keep_their_meaning() {
        let id = SandboxId::default();
        let lack = || Refusal::NoRoom(Lack("n1 lacks memory".into()));
        let phase = Phase::Starting;
        assert_eq!(wire_of(RelayError::NoSuchSandbox(id)), (404, "not_found"));
        assert_eq!(
            wire_of(RelayError::NotRunning { id, phase }),
            (409, "invalid_state")
        );
        assert_eq!(wire_of(unreachable(id)), (503, "host_unavailable"));
        assert_eq!(
            wire_of(ProposeError::Refused(lack())),
            (503, "no_hosts_available")
        );
        assert!(
            ApiError::from(ProposeError::Refused(lack()))
                .message
                .contains("n1 lacks memory")
        );
        let waited = std::time::Duration::ZERO;
        for lost in [LogError::Unknown { waited }, LogError::NoLeader { waited }] {
            assert_eq!(wire_of(ProposeError::Log(lost)), (503, "no_quorum"));
        }
        let template = Refusal::NoSuchTemplate("x".into());
        assert_eq!(wire_of(ProposeError::Refused(template)), (404, "not_found"));
    }
}
