//! Running commands in a capsule, and the processes that run there.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proto::ids::SandboxId;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::auth::Caller;
use super::error::ApiError;
use super::extract::{CapsuleId, JsonBody, ProcessSelector, QueryOf};
use super::state::ApiState;
use crate::guest::{Guest, GuestError, ProcessCommand, ProcessEvent, RunOutput, Selector, Signal};

/// Deadline of a foreground command that names none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest deadline of a foreground command, a day: nobody keeps one request open for longer.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// Longest tag of a process.
const TAG_BYTES: usize = 128;

/// A command to run.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(super) struct Exec {
    /// Program, looked up in the guest's `PATH`.
    #[serde(default)]
    cmd: String,
    /// Its arguments.
    args: Option<Vec<String>>,
    /// Whether to answer as soon as it runs.
    background: Option<bool>,
    /// Seconds after which a foreground command is killed; 30 where absent or 0.
    timeout_sec: Option<i64>,
    /// Added to the guest's environment.
    envs: Option<BTreeMap<String, String>>,
    /// Working directory; the home of the default user where absent.
    cwd: Option<String>,
    /// The caller's name for a background process.
    tag: Option<String>,
}

/// What a foreground command did.
#[derive(Debug, Serialize, ToSchema)]
struct ExecResult {
    sandbox_id: String,
    cmd: String,
    /// Standard output in the encoding named below.
    stdout: String,
    /// Standard error in the encoding named below.
    stderr: String,
    /// Its exit code, -1 where a signal ended it.
    exit_code: i32,
    /// Milliseconds it took.
    duration_ms: u64,
    /// `utf-8`, or `base64` where either stream is not valid UTF-8.
    #[schema(value_type = String)]
    encoding: &'static str,
}

/// A background process that was started.
#[derive(Debug, Serialize, ToSchema)]
struct ExecStarted {
    sandbox_id: String,
    cmd: String,
    /// Its id in the guest.
    pid: u32,
    /// Its name.
    tag: String,
}

/// Runs a command to its end, or starts one in the background.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/exec", tag = "processes",
    params(("id" = String, Path)), request_body = Exec,
    responses(
        (status = 200, description = "It ended.", body = ExecResult),
        (status = 202, description = "It runs in the background.", body = ExecStarted),
    )
)]
pub(super) async fn exec(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    JsonBody(request): JsonBody<Exec>,
) -> Result<Response, ApiError> {
    let timeout = foreground_timeout(request.timeout_sec)?;
    let background = request.background.unwrap_or(false);
    let command = request.into_command(background)?;
    let guest = api.guest(&caller, id).await?;
    if background {
        let started = api.busy(id, start(&guest, id, command)).await;
        let started = guest.told(started).await?;
        return Ok((StatusCode::ACCEPTED, Json(started)).into_response());
    }
    let cmd = command.cmd.clone();
    let began = Instant::now();
    let ran = api.busy(id, guest.run(command, Some(timeout))).await;
    let output = guest.told(ran).await?;
    let result = ExecResult::new(id, cmd, output, began.elapsed());
    Ok(Json(result).into_response())
}

/// A list of processes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Processes {
    processes: Vec<Process>,
}

/// A process that runs.
#[derive(Debug, Serialize, ToSchema)]
struct Process {
    /// Its id in the guest.
    pid: u32,
    /// The name its starter gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    /// Its program.
    cmd: String,
    /// Its arguments.
    args: Vec<String>,
}

/// Lists the processes that were started through this interface and still run.
#[utoipa::path(
    get, path = "/v1/capsules/{id}/processes", tag = "processes",
    params(("id" = String, Path)), responses((status = 200, body = Processes))
)]
pub(super) async fn processes(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
) -> Result<Json<Processes>, ApiError> {
    let guest = api.guest(&caller, id).await?;
    let found = guest.told(guest.processes().await).await?;
    let shape = found.into_iter().map(|process| Process {
        pid: process.pid,
        tag: process.tag.filter(|tag| !tag.is_empty()),
        cmd: process.cmd,
        args: process.args,
    });
    Ok(Json(Processes {
        processes: shape.collect(),
    }))
}

/// How to end a process.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct KillQuery {
    /// `SIGKILL` (default) or `SIGTERM`.
    signal: Option<String>,
}

/// Signals a process, named by its number or by its tag.
#[utoipa::path(
    delete, path = "/v1/capsules/{id}/processes/{selector}", tag = "processes",
    params(("id" = String, Path), ("selector" = String, Path), KillQuery),
    responses((status = 204))
)]
pub(super) async fn kill(
    State(api): State<ApiState>,
    caller: Caller,
    CapsuleId(id): CapsuleId,
    ProcessSelector(selector): ProcessSelector,
    QueryOf(query): QueryOf<KillQuery>,
) -> Result<StatusCode, ApiError> {
    // Anything unknown kills: clients of the first servers rely on it.
    let signal = match query.signal.as_deref() {
        Some("SIGTERM") => Signal::Term,
        _ => Signal::Kill,
    };
    let guest = api.guest(&caller, id).await?;
    let told = guest.signal(Selector::parse(&selector), signal).await;
    guest.told(told).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Exec {
    /// The checked command. Nothing in it can end a C string early.
    fn into_command(self, background: bool) -> Result<ProcessCommand, ApiError> {
        if self.cmd.is_empty() {
            return Err(ApiError::invalid("cmd is missing or empty"));
        }
        let tag = background.then(|| checked_tag(self.tag)).transpose()?;
        let command = ProcessCommand {
            cmd: self.cmd,
            args: self.args.unwrap_or_default(),
            envs: self.envs.unwrap_or_default(),
            cwd: self.cwd.filter(|cwd| !cwd.is_empty()),
            tag,
            user: None,
        };
        checked(command)
    }
}

/// `command`, if nothing in it can end a C string early.
pub(super) fn checked(command: ProcessCommand) -> Result<ProcessCommand, ApiError> {
    let words = command.args.iter().chain(command.envs.values());
    let words = words.chain(&command.cwd).chain([&command.cmd]);
    if words.into_iter().any(|word| word.contains('\0')) {
        return Err(ApiError::invalid("a command may not contain NUL bytes"));
    }
    let is_name = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
    if let Some(bad) = command.envs.keys().find(|name| !is_name(name)) {
        return Err(ApiError::invalid(format!(
            "{bad:?} cannot be the name of an environment variable"
        )));
    }
    // It goes before the colon of Basic credentials.
    let user = command.user.as_deref().unwrap_or("root");
    if user.is_empty() || user.contains(|it: char| it == ':' || it.is_control()) {
        return Err(ApiError::invalid(format!(
            "{user:?} cannot be a user's name"
        )));
    }
    Ok(command)
}

fn checked_tag(tag: Option<String>) -> Result<String, ApiError> {
    match tag.filter(|tag| !tag.is_empty()) {
        None => Ok(format!("proc-{:08x}", rand::random::<u32>())),
        Some(tag) if tag.len() <= TAG_BYTES && !tag.contains(char::is_control) => Ok(tag),
        Some(_) => Err(ApiError::invalid(format!(
            "a tag has {TAG_BYTES} bytes at most and no control characters"
        ))),
    }
}

fn foreground_timeout(asked: Option<i64>) -> Result<Duration, ApiError> {
    let asked = match asked {
        None | Some(0) => return Ok(DEFAULT_TIMEOUT),
        Some(asked) => asked,
    };
    u64::try_from(asked)
        .map(Duration::from_secs)
        .ok()
        .filter(|timeout| *timeout <= MAX_TIMEOUT)
        .ok_or_else(|| {
            ApiError::invalid(format!(
                "timeout_sec must be 0 to {}, not {asked}",
                MAX_TIMEOUT.as_secs()
            ))
        })
}

/// Starts a process and lets go of it as soon as it runs.
async fn start(
    guest: &Guest,
    id: SandboxId,
    command: ProcessCommand,
) -> Result<ExecStarted, GuestError> {
    let cmd = command.cmd.clone();
    let tag = command.tag.clone().unwrap_or_default();
    let mut events = guest.start(command, None).await?;
    while let Some(event) = events.next().await? {
        if let ProcessEvent::Start { pid } = event {
            return Ok(ExecStarted {
                sandbox_id: id.to_string(),
                cmd,
                pid,
                tag,
            });
        }
    }
    Err(GuestError::Nonsense(
        "it did not say that the process started".into(),
    ))
}

impl ExecResult {
    fn new(id: SandboxId, cmd: String, output: RunOutput, took: Duration) -> Self {
        let (stdout, stderr, encoding) = encode(output.stdout, output.stderr);
        Self {
            sandbox_id: id.to_string(),
            cmd,
            stdout,
            stderr,
            exit_code: output.exit_code,
            duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            encoding,
        }
    }
}

/// Both streams as text if both are, else both in base64.
fn encode(stdout: Vec<u8>, stderr: Vec<u8>) -> (String, String, &'static str) {
    match (String::from_utf8(stdout), String::from_utf8(stderr)) {
        (Ok(stdout), Ok(stderr)) => (stdout, stderr, "utf-8"),
        (stdout, stderr) => {
            let bytes = |it: Result<String, std::string::FromUtf8Error>| match it {
                Ok(text) => text.into_bytes(),
                Err(err) => err.into_bytes(),
            };
            let stdout = STANDARD.encode(bytes(stdout));
            let stderr = STANDARD.encode(bytes(stderr));
            (stdout, stderr, "base64")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn command(json: serde_json::Value) -> Result<ProcessCommand, ApiError> {
        let request: Exec = serde_json::from_value(json).expect("a request");
        request.into_command(true)
    }

    #[test]
    fn one_stray_byte_in_either_stream_encodes_both() {
        assert_eq!(
            encode(b"ok".to_vec(), b"\xff".to_vec()),
            ("b2s=".into(), "/w==".into(), "base64")
        );
        assert_eq!(
            encode(b"ok".to_vec(), vec![]),
            ("ok".into(), String::new(), "utf-8")
        );
    }

    #[test]
    fn words_that_no_program_can_be_given_are_refused() {
        for json in [
            serde_json::json!({}),
            serde_json::json!({"cmd": ""}),
            serde_json::json!({"cmd": "a\0b"}),
            serde_json::json!({"cmd": "a", "args": ["b\0"]}),
            serde_json::json!({"cmd": "a", "cwd": "/\0"}),
            serde_json::json!({"cmd": "a", "envs": {"": "x"}}),
            serde_json::json!({"cmd": "a", "envs": {"A=B": "x"}}),
            serde_json::json!({"cmd": "a", "envs": {"A": "\0"}}),
            serde_json::json!({"cmd": "a", "tag": "\n"}),
            serde_json::json!({"cmd": "a", "tag": "t".repeat(129)}),
        ] {
            assert!(command(json.clone()).is_err(), "{json} was accepted");
        }
    }

    #[test]
    fn a_background_process_without_a_tag_is_given_one() {
        let tag = command(serde_json::json!({"cmd": "a", "args": null, "tag": ""}))
            .expect("a command")
            .tag
            .expect("a tag");
        assert!(tag.starts_with("proc-") && tag.len() == 13, "{tag}");
    }

    #[test]
    fn timeouts_default_to_30_s_and_end_at_a_day() {
        assert_eq!(foreground_timeout(None), Ok(DEFAULT_TIMEOUT));
        assert_eq!(foreground_timeout(Some(0)), Ok(DEFAULT_TIMEOUT));
        assert_eq!(foreground_timeout(Some(1)), Ok(Duration::from_secs(1)));
        assert!(foreground_timeout(Some(-1)).is_err());
        assert!(foreground_timeout(Some(86_401)).is_err());
        assert!(foreground_timeout(Some(i64::MAX)).is_err());
    }

    proptest! {
        #[test]
        fn encoded_streams_decode_to_what_they_were(
            stdout: Vec<u8>,
            stderr in prop_oneof![any::<Vec<u8>>(), ".*".prop_map(String::into_bytes)],
        ) {
            let (out, err, encoding) = encode(stdout.clone(), stderr.clone());
            let decode = |text: String| match encoding {
                "base64" => STANDARD.decode(text).expect("base64"),
                _ => text.into_bytes(),
            };
            prop_assert_eq!(decode(out), stdout);
            prop_assert_eq!(decode(err), stderr);
        }
    }
}
