//! The Connect service `process.Process`: messages in, calls on the rooms below, events out.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use buffa::{EnumValue, MessageField};
use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::{Stream, StreamExt, stream};
use nix::sys::signal::Signal as UnixSignal;
use proto::envd::process as wire;
use tokio::time::{Instant, sleep_until, timeout};
use wire::__buffa::oneof;
use wire::process_event::{DataEvent, EndEvent, KeepAlive, StartEvent};

use super::exit::Exit;
use super::input::{FeedError, Piece, TerminalSize};
use super::launch::{Launch, LaunchError};
use super::live::{CommandLine, Process};
use super::output::{Channel, Output, Subscription};
use super::reap::Reach;
use super::registry::{FindError, Selector};
use crate::agent::Agent;
use crate::boot::cgroup::Group;
use crate::log::chain;
use crate::users::User;

/// Silence after which a stream says that it still lives, unless the client asks for another.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(90);
/// The client's wish for that interval, in seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
/// Says how far a signal goes. Nodes send it; a signal without it goes to the process alone, as the
/// SDKs expect.
pub const REACH_HEADER: &str = "x-wrenn-signal-reach";
/// Its value for a signal that goes to the process and to all that it started.
pub const REACH_TREE: &str = "tree";

/// The service.
pub struct ProcessService {
    agent: Arc<Agent>,
}

impl ProcessService {
    /// Serves the processes of `agent`.
    #[must_use]
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn find(
        &self,
        selector: &MessageFieldOf<wire::ProcessSelector>,
    ) -> Result<Arc<Process>, ConnectError> {
        Ok(self.agent.processes.find(&to_selector(selector)?)?)
    }

    fn launch(
        &self,
        ctx: &RequestContext,
        request: wire::StartRequest,
    ) -> Result<Launch, ConnectError> {
        let user = rpc_user(&self.agent, ctx)?;
        let command = to_command(request.process);
        let cwd = self
            .agent
            .resolve(&user, command.cwd.as_deref().unwrap_or_default());
        let mut cwd = cwd.map_err(|err| ConnectError::invalid_argument(chain(&err)))?;
        // Nobody asked for the home directory by name, so a missing one is no mistake of theirs.
        if command.cwd.as_deref().unwrap_or_default().is_empty() && !cwd.is_dir() {
            cwd = "/".into();
        }
        let env = self
            .agent
            .settings()
            .global
            .for_process(self.agent.path(), &user, &command.envs);
        let terminal = request.pty.as_option().map(to_size);
        let group = if terminal.is_some() {
            Group::Terminal
        } else {
            Group::User
        };
        Ok(Launch {
            command,
            tag: request.tag,
            cwd,
            env,
            stdin: request.stdin.unwrap_or(true),
            terminal,
            place: self.agent.surroundings.groups.place(group),
            deadline: ctx.deadline().map(Instant::from_std),
            user,
        })
    }
}

type MessageFieldOf<T> = MessageField<T, buffa::Inline<T>>;

/// The user of a call: the name in its Basic credentials, or the default.
///
/// # Errors
/// `unauthenticated` for a name without an account.
pub fn rpc_user(agent: &Agent, ctx: &RequestContext) -> Result<User, ConnectError> {
    let name = ctx
        .header(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(basic_user);
    agent
        .user(name.as_deref())
        .map_err(|err| ConnectError::unauthenticated(chain(&err)))
}

/// How much silence the caller of a stream bears.
#[must_use]
pub fn keepalive_interval(ctx: &RequestContext) -> Duration {
    let asked = ctx
        .header(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok());
    let asked = asked
        .and_then(|seconds| seconds.parse().ok())
        .filter(|seconds| *seconds > 0);
    asked.map_or(KEEPALIVE_INTERVAL, Duration::from_secs)
}

/// How far the caller of a signal wants it to go.
fn signal_reach(ctx: &RequestContext) -> Reach {
    match ctx.header(REACH_HEADER) {
        Some(value) if value == REACH_TREE => Reach::Group,
        _ => Reach::Process,
    }
}

/// The user name of a Basic `Authorization` value.
fn basic_user(value: &str) -> Option<String> {
    let (scheme, credentials) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let credentials = String::from_utf8(STANDARD.decode(credentials.trim()).ok()?).ok()?;
    Some(
        credentials
            .split_once(':')
            .map_or(credentials.as_str(), |(name, _)| name)
            .to_owned(),
    )
}

fn to_selector(selector: &MessageFieldOf<wire::ProcessSelector>) -> Result<Selector, ConnectError> {
    match selector
        .as_option()
        .and_then(|selector| selector.selector.as_ref())
    {
        Some(oneof::process_selector::Selector::Pid(pid)) => Ok(Selector::Pid(*pid)),
        Some(oneof::process_selector::Selector::Tag(tag)) => Ok(Selector::Tag(tag.clone())),
        None => Err(ConnectError::invalid_argument("request selects no process")),
    }
}

fn to_command(config: MessageFieldOf<wire::ProcessConfig>) -> CommandLine {
    let config = config.into_option().unwrap_or_default();
    CommandLine {
        cmd: config.cmd,
        args: config.args,
        envs: config.envs.into_iter().collect(),
        cwd: config.cwd,
    }
}

fn to_size(pty: &wire::PTY) -> TerminalSize {
    let clamp = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
    TerminalSize {
        cols: clamp(pty.size.cols),
        rows: clamp(pty.size.rows),
    }
}

fn to_piece(input: &MessageFieldOf<wire::ProcessInput>) -> Result<Piece, ConnectError> {
    match input.as_option().and_then(|input| input.input.as_ref()) {
        Some(oneof::process_input::Input::Stdin(data)) => Ok(Piece::Stdin(data.clone())),
        Some(oneof::process_input::Input::Pty(data)) => Ok(Piece::Terminal(data.clone())),
        None => Err(ConnectError::invalid_argument("request holds no input")),
    }
}

async fn feed(process: &Process, piece: Piece) -> Result<(), ConnectError> {
    Ok(process.input.lock().await.feed(&piece).await?)
}

fn to_info(process: &Process) -> wire::ProcessInfo {
    let command = &process.command;
    let config = wire::ProcessConfig {
        cmd: command.cmd.clone(),
        args: command.args.clone(),
        envs: command.envs.clone().into_iter().collect(),
        cwd: command.cwd.clone(),
        ..Default::default()
    };
    wire::ProcessInfo {
        config: MessageField::some(config),
        pid: process.pid_on_wire(),
        tag: process.tag.clone(),
        ..Default::default()
    }
}

fn event(event: impl Into<Option<oneof::process_event::Event>>) -> wire::ProcessEvent {
    wire::ProcessEvent {
        event: event.into(),
        ..Default::default()
    }
}

fn start_event(pid: u32) -> wire::ProcessEvent {
    event(StartEvent {
        pid,
        ..Default::default()
    })
}

fn output_event(output: Output) -> wire::ProcessEvent {
    use oneof::process_event::data_event::Output as Data;
    match output {
        Output::Data(channel, data) => {
            let data = match channel {
                Channel::Stdout => Data::Stdout(data.into()),
                Channel::Stderr => Data::Stderr(data.into()),
                Channel::Terminal => Data::Pty(data.into()),
            };
            event(DataEvent {
                output: Some(data),
                ..Default::default()
            })
        }
        Output::End(Exit {
            code,
            exited,
            status,
            error,
            ..
        }) => event(EndEvent {
            exit_code: code,
            exited,
            status,
            error,
            ..Default::default()
        }),
    }
}

/// The events of one stream: start, output, end.
struct Events {
    subscription: Subscription,
    keepalive: Duration,
    /// When this stream ends, whatever the process does.
    deadline: Option<Instant>,
    /// Whether the process's deadline is this caller's, who then hears of it as an error.
    owns_process_deadline: bool,
    ended: bool,
}

impl Events {
    /// Events for a caller who attached: its deadline ends the stream and spares the process.
    fn attached(ctx: &RequestContext, subscription: Subscription) -> Self {
        let deadline = ctx.deadline().map(Instant::from_std);
        Self {
            deadline,
            owns_process_deadline: false,
            ..Self::started(ctx, subscription)
        }
    }

    /// Events for the caller who started the process: the deadline is the process's own.
    fn started(ctx: &RequestContext, subscription: Subscription) -> Self {
        Self {
            subscription,
            keepalive: keepalive_interval(ctx),
            deadline: None,
            owns_process_deadline: true,
            ended: false,
        }
    }

    async fn next(&mut self) -> Option<Result<wire::ProcessEvent, ConnectError>> {
        if self.ended {
            return None;
        }
        let output = timeout(self.keepalive, self.subscription.recv());
        let output = match self.deadline {
            None => output.await,
            Some(deadline) => tokio::select! {
                biased;
                output = output => output,
                () = sleep_until(deadline) => {
                    self.ended = true;
                    return Some(Err(ConnectError::deadline_exceeded("stream timed out")));
                }
            },
        };
        match output {
            Err(_silence) => Some(Ok(event(KeepAlive::default()))),
            Ok(None) => None,
            Ok(Some(Output::End(exit))) if exit.by_deadline && self.owns_process_deadline => {
                self.ended = true;
                Some(Err(ConnectError::deadline_exceeded(
                    "process ran past its deadline",
                )))
            }
            Ok(Some(output)) => {
                self.ended = matches!(output, Output::End(_));
                Some(Ok(output_event(output)))
            }
        }
    }

    fn after_start(self, pid: u32) -> impl Stream<Item = Result<wire::ProcessEvent, ConnectError>> {
        let rest = stream::unfold(self, async |mut events| {
            let next = events.next().await?;
            Some((next, events))
        });
        stream::iter([Ok(start_event(pid))]).chain(rest)
    }
}

impl From<FindError> for ConnectError {
    fn from(err: FindError) -> Self {
        Self::not_found(chain(&err))
    }
}

impl From<FeedError> for ConnectError {
    fn from(err: FeedError) -> Self {
        match err {
            FeedError::Closed | FeedError::WrongKind(_) => Self::failed_precondition(chain(&err)),
            FeedError::Write(_) => Self::internal(chain(&err)),
        }
    }
}

impl From<LaunchError> for ConnectError {
    fn from(err: LaunchError) -> Self {
        match err {
            LaunchError::NoCommand | LaunchError::NoDirectory(_) | LaunchError::Spawn { .. } => {
                Self::invalid_argument(chain(&err))
            }
            LaunchError::TooMany => Self::resource_exhausted(chain(&err)),
            LaunchError::Streams(_) => Self::internal(chain(&err)),
        }
    }
}

#[allow(refining_impl_trait)] // the concrete types say more than the trait requires
impl wire::Process for ProcessService {
    async fn list(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<wire::ListResponse> {
        let processes = self
            .agent
            .processes
            .live()
            .iter()
            .map(|live| to_info(live))
            .collect();
        Response::ok(wire::ListResponse {
            processes,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<wire::StartResponse>> {
        let launch = self.launch(&ctx, request.to_owned_message())?;
        let (process, subscription) = launch.start(&self.agent.processes)?;
        let events = Events::started(&ctx, subscription).after_start(process.pid_on_wire());
        Response::stream_ok(events.map(|event| {
            let event = MessageField::some(event?);
            Ok(wire::StartResponse {
                event,
                ..Default::default()
            })
        }))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<wire::ConnectResponse>> {
        let selector = to_selector(&request.to_owned_message().process)?;
        let process = self.agent.processes.find_retained(&selector)?;
        let events = Events::attached(&ctx, process.output.subscribe());
        Response::stream_ok(events.after_start(process.pid_on_wire()).map(|event| {
            let event = MessageField::some(event?);
            Ok(wire::ConnectResponse {
                event,
                ..Default::default()
            })
        }))
    }

    async fn update(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<wire::UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.find(&request.process)?;
        if let Some(pty) = request.pty.as_option() {
            let Some(terminal) = &process.terminal else {
                return Err(ConnectError::failed_precondition("process has no terminal"));
            };
            let resized = to_size(pty).apply(terminal.get_ref());
            resized.map_err(|err| ConnectError::internal(format!("resize the terminal: {err}")))?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _ctx: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<wire::StreamInputResponse> {
        use oneof::stream_input_request::Event;
        let mut target: Option<Arc<Process>> = None;
        while let Some(request) = requests.next().await {
            match (request?.to_owned_message().event, &target) {
                (Some(Event::Start(start)), None) => target = Some(self.find(&start.process)?),
                (Some(Event::Data(data)), Some(process)) => {
                    feed(process, to_piece(&data.input)?).await?;
                }
                (Some(Event::Keepalive(_)) | None, _) => {}
                (Some(Event::Start(_)), Some(_)) => {
                    return Err(ConnectError::invalid_argument(
                        "stream selects a process twice",
                    ));
                }
                (Some(Event::Data(_)), None) => {
                    return Err(ConnectError::invalid_argument("stream begins with data"));
                }
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<wire::SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.find(&request.process)?;
        feed(&process, to_piece(&request.input)?).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<wire::SendSignalResponse> {
        let request = request.to_owned_message();
        let signal = match request.signal {
            EnumValue::Known(wire::Signal::SIGNAL_SIGTERM) => UnixSignal::SIGTERM,
            EnumValue::Known(wire::Signal::SIGNAL_SIGKILL) => UnixSignal::SIGKILL,
            EnumValue::Known(wire::Signal::SIGNAL_UNSPECIFIED) | EnumValue::Unknown(_) => {
                return Err(ConnectError::invalid_argument(
                    "only SIGTERM and SIGKILL can be sent",
                ));
            }
        };
        let process = self.find(&request.process)?;
        if !process.signal(signal, signal_reach(&ctx)).await {
            return Err(FindError::Pid(process.pid_on_wire()).into());
        }
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<wire::CloseStdinResponse> {
        let process = self.find(&request.to_owned_message().process)?;
        process.input.lock().await.close()?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_give_the_name_before_the_colon() {
        let encode = |text: &str| format!("Basic {}", STANDARD.encode(text));
        assert_eq!(basic_user(&encode("user:")).as_deref(), Some("user"));
        assert_eq!(basic_user(&encode("user")).as_deref(), Some("user"));
        assert_eq!(
            basic_user(&encode("a:b:c").replace("Basic", "basic")).as_deref(),
            Some("a")
        );
        assert_eq!(basic_user("Bearer abc"), None);
        assert_eq!(basic_user("Basic !!!"), None);
    }
}
