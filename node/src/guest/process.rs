//! Processes in a guest: run to the end, start and watch, list, signal.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use connectrpc::client::{CallOptions, ServerStream};
use http::header::AUTHORIZATION;
use hyper::body::Incoming;
use proto::envd::process as pb;
use proto::envd::process::__buffa::oneof;
use proto::envd::process::__buffa::view::{ConnectResponseView, StartResponseView};
use tokio::time;

use super::error::{GuestCode, GuestError};
use super::http::{Guest, bounded};

/// Most output of one foreground run that is kept in memory; past it the run is killed. A client
/// with more to read streams it. As JSON it may take six times that, where it is all control
/// characters: 96 MiB for one answer.
const RUN_OUTPUT_BYTES: usize = 16 << 20;
/// The agent's header for how far a signal goes. An agent that does not know it signals the process
/// alone.
const REACH_HEADER: &str = "x-wrenn-signal-reach";
/// Its value for all that a process has started.
const REACH_TREE: &str = "tree";
/// Added to a run's own deadline before this side gives up waiting for the agent to enforce it.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);
/// Longest wait for the end of a stream whose last event has come. Both are sent together, and only an
/// agent that is not ours, or a machine that stands still, takes any time over it.
const STREAM_END_TIMEOUT: Duration = Duration::from_secs(1);

/// What to start.
#[derive(Clone, Debug, Default)]
pub struct ProcessCommand {
    /// Program, looked up in the guest's `PATH`.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to the guest's environment.
    pub envs: BTreeMap<String, String>,
    /// Working directory; the user's home where absent.
    pub cwd: Option<String>,
    /// The caller's own name for it.
    pub tag: Option<String>,
    /// Who runs it; the guest's default user where absent.
    pub user: Option<String>,
}

impl ProcessCommand {
    /// The start of this process, without a terminal and with nothing to read.
    pub(super) fn into_wire(self) -> pb::StartRequest {
        pb::StartRequest {
            process: pb::ProcessConfig {
                cmd: self.cmd,
                args: self.args,
                envs: self.envs.into_iter().collect(),
                cwd: self.cwd,
                ..Default::default()
            }
            .into(),
            tag: self.tag,
            stdin: Some(false),
            ..Default::default()
        }
    }
}

/// A process that ended while it was watched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunOutput {
    /// Everything it wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything it wrote to standard error.
    pub stderr: Vec<u8>,
    /// Its exit code, -1 where a signal ended it.
    pub exit_code: i32,
}

/// What happens to a watched process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It runs.
    Start {
        /// Its id in the guest.
        pid: u32,
    },
    /// It wrote to standard output.
    Stdout(Bytes),
    /// It wrote to standard error.
    Stderr(Bytes),
    /// Its terminal showed something.
    Pty(Bytes),
    /// It ended.
    End {
        /// Its exit code, -1 where a signal ended it.
        exit_code: i32,
    },
    /// Nothing happened for a while; the stream lives.
    KeepAlive,
}

/// A live process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSummary {
    /// Its id in the guest.
    pub pid: u32,
    /// The name its starter gave it.
    pub tag: Option<String>,
    /// Its program.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
}

/// Names one live process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By process id.
    Pid(u32),
    /// By tag.
    Tag(String),
}

impl Selector {
    /// A number is a process id, anything else a tag.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        text.parse()
            .map_or_else(|_| Self::Tag(text.to_owned()), Self::Pid)
    }

    pub(super) fn into_wire(self) -> pb::ProcessSelector {
        let selector = match self {
            Self::Pid(pid) => oneof::process_selector::Selector::Pid(pid),
            Self::Tag(tag) => oneof::process_selector::Selector::Tag(tag),
        };
        pb::ProcessSelector {
            selector: Some(selector),
            ..Default::default()
        }
    }
}

/// A signal the agent can deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ask it to end.
    Term,
    /// End it.
    Kill,
}

/// The events of one process. Dropping it does not end the process.
pub struct EventStream {
    inner: Inner,
}

/// Two calls answer the same events in messages of their own.
enum Inner {
    Started(ServerStream<Incoming, StartResponseView<'static>>),
    Attached(ServerStream<Incoming, ConnectResponseView<'static>>),
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}

impl EventStream {
    /// The next event; `None` after the last one.
    ///
    /// # Errors
    /// [`GuestError`] where the stream broke or the agent ended it with one.
    pub async fn next(&mut self) -> Result<Option<ProcessEvent>, GuestError> {
        loop {
            let event = match &mut self.inner {
                Inner::Started(inner) => match inner.message().await? {
                    Some(message) => message.to_owned_message().event,
                    None => return Ok(None),
                },
                Inner::Attached(inner) => match inner.message().await? {
                    Some(message) => message.to_owned_message().event,
                    None => return Ok(None),
                },
            };
            if let Some(event) = event.into_option().and_then(|it| it.event) {
                return Ok(Some(from_wire(event)));
            }
        }
    }
}

impl Guest {
    /// Starts a process. The agent kills it when `timeout` passes; without one it may run for
    /// ever.
    ///
    /// # Errors
    /// [`GuestError::Refused`] where the agent will not start it.
    pub async fn start(
        &self,
        command: ProcessCommand,
        timeout: Option<Duration>,
    ) -> Result<EventStream, GuestError> {
        let user = command.user.clone();
        self.open(command.into_wire(), user, timeout).await
    }

    /// Sends a start and waits until the agent streams its events.
    pub(super) async fn open(
        &self,
        request: pb::StartRequest,
        user: Option<String>,
        timeout: Option<Duration>,
    ) -> Result<EventStream, GuestError> {
        let mut options = CallOptions::default();
        if let Some(user) = user {
            // The agent knows users by name alone: access is decided before.
            let credentials = STANDARD.encode(format!("{user}:"));
            options = options.with_header(AUTHORIZATION, format!("Basic {credentials}"));
        }
        if let Some(timeout) = timeout {
            options = options.with_timeout(timeout);
        }
        let opened = self.process().start_with_options(request, options);
        let inner = Inner::Started(bounded(opened).await?);
        Ok(EventStream { inner })
    }

    /// Attaches to a live process: its start event, then what it writes from now on, then its end.
    ///
    /// # Errors
    /// [`GuestCode::NotFound`] where no live process is meant.
    pub async fn attach(&self, process: Selector) -> Result<EventStream, GuestError> {
        let request = pb::ConnectRequest {
            process: process.into_wire().into(),
            ..Default::default()
        };
        let inner = Inner::Attached(bounded(self.process().connect(request)).await?);
        Ok(EventStream { inner })
    }

    /// Runs a process to its end and returns all it wrote.
    ///
    /// # Errors
    /// [`GuestError::Refused`] with [`GuestCode::DeadlineExceeded`] when `timeout` passed; the
    /// process is dead then.
    pub async fn run(
        &self,
        command: ProcessCommand,
        timeout: Option<Duration>,
    ) -> Result<RunOutput, GuestError> {
        let collect = async {
            let mut events = self.start(command, timeout).await?;
            let output = collect(self, &mut events).await?;
            Ok((output, events))
        };
        let outcome = match timeout {
            Some(timeout) => time::timeout(timeout + DEADLINE_GRACE, collect)
                .await
                .unwrap_or(Err(GuestError::TimedOut { waited: timeout })),
            None => collect.await,
        };
        let (output, mut events) = outcome.map_err(|err| match err {
            GuestError::Refused {
                code: GuestCode::DeadlineExceeded,
                message,
            } => GuestError::Refused {
                code: GuestCode::DeadlineExceeded,
                message: match timeout {
                    Some(timeout) => {
                        format!("the command ran past its timeout of {timeout:?} and was killed")
                    }
                    None => message,
                },
            },
            other => other,
        })?;
        // It has ended, whatever its deadline is.
        read_out(&mut events).await;
        Ok(output)
    }

    /// The live processes that were started through the agent.
    ///
    /// # Errors
    /// [`GuestError`] where the agent cannot be asked.
    pub async fn processes(&self) -> Result<Vec<ProcessSummary>, GuestError> {
        let response = bounded(self.process().list(pb::ListRequest::default())).await?;
        let summary = |info: pb::ProcessInfo| {
            let config = info.config.into_option().unwrap_or_default();
            ProcessSummary {
                pid: info.pid,
                tag: info.tag,
                cmd: config.cmd,
                args: config.args,
            }
        };
        Ok(response
            .into_owned()
            .processes
            .into_iter()
            .map(summary)
            .collect())
    }

    /// Signals one process.
    ///
    /// # Errors
    /// [`GuestCode::NotFound`] where no live process is meant.
    pub async fn signal(&self, process: Selector, signal: Signal) -> Result<(), GuestError> {
        self.send_signal(process, signal, CallOptions::default())
            .await
    }

    /// Kills a process and all that it has started: the children of a shell as well.
    ///
    /// # Errors
    /// [`GuestCode::NotFound`] where no live process is meant.
    pub async fn kill_tree(&self, process: Selector) -> Result<(), GuestError> {
        let whole = CallOptions::default().with_header(REACH_HEADER, REACH_TREE);
        self.send_signal(process, Signal::Kill, whole).await
    }

    async fn send_signal(
        &self,
        process: Selector,
        signal: Signal,
        options: CallOptions,
    ) -> Result<(), GuestError> {
        let signal = match signal {
            Signal::Term => pb::Signal::Sigterm,
            Signal::Kill => pb::Signal::Sigkill,
        };
        let request = pb::SendSignalRequest {
            process: process.into_wire().into(),
            signal: signal.into(),
            ..Default::default()
        };
        let sent = self.process().send_signal_with_options(request, options);
        bounded(sent).await?;
        Ok(())
    }
}

/// Reads a process's events to the end; kills it if it writes more than may be kept.
async fn collect(guest: &Guest, events: &mut EventStream) -> Result<RunOutput, GuestError> {
    let mut output = RunOutput::default();
    let mut running = None;
    while let Some(event) = events.next().await? {
        match event {
            ProcessEvent::Start { pid } => running = Some(pid),
            ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes) => {
                output.stdout.extend_from_slice(&bytes);
            }
            ProcessEvent::Stderr(bytes) => output.stderr.extend_from_slice(&bytes),
            ProcessEvent::End { exit_code } => {
                output.exit_code = exit_code;
                return Ok(output);
            }
            ProcessEvent::KeepAlive => {}
        }
        if output.stdout.len() + output.stderr.len() > RUN_OUTPUT_BYTES {
            if let Some(pid) = running {
                guest.kill_tree(Selector::Pid(pid)).await?;
            }
            return Err(GuestError::Refused {
                code: GuestCode::Other,
                message: format!(
                    "the command wrote more than {RUN_OUTPUT_BYTES} bytes and was killed; \
                     redirect its output to a file or stream it"
                ),
            });
        }
    }
    Err(GuestError::Nonsense(
        "the process stream ended without an end event".into(),
    ))
}

/// Reads a stream behind its last event, so that its connection can carry the next call. One that
/// does not end costs its connection, and [`STREAM_END_TIMEOUT`].
async fn read_out(events: &mut EventStream) {
    let _end = time::timeout(STREAM_END_TIMEOUT, events.next()).await;
}

fn from_wire(event: oneof::process_event::Event) -> ProcessEvent {
    use oneof::process_event::Event as Wire;
    use oneof::process_event::data_event::Output;
    match event {
        Wire::Start(start) => ProcessEvent::Start { pid: start.pid },
        Wire::Data(data) => match data.output {
            Some(Output::Stdout(bytes)) => ProcessEvent::Stdout(bytes.into()),
            Some(Output::Stderr(bytes)) => ProcessEvent::Stderr(bytes.into()),
            Some(Output::Pty(bytes)) => ProcessEvent::Pty(bytes.into()),
            None => ProcessEvent::KeepAlive,
        },
        Wire::End(end) => ProcessEvent::End {
            exit_code: end.exit_code,
        },
        Wire::Keepalive(_) => ProcessEvent::KeepAlive,
    }
}
