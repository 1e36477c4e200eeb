//! What is told of a build: how far it is, and the lines of its log, by proposals.
//!
//! Lines are gathered and told together ([`Journal::flush`]): each telling is an entry of the cluster's
//! log. A build whose node reaches no quorum stands still here until it does.

use std::time::Duration;

use proto::ids::{BuildId, SandboxId};
use raft::command::{BuildChange, Command};
use tokio::time;
use tracing::debug;

use super::Stop;
use crate::cluster::{LogError, ProposeError, Proposer};
use crate::template::log::{Entry, Kind};

/// Lines are told at once when there are this many bytes of them.
pub(super) const FULL_BYTES: usize = 16 << 10;
/// Pause before something is told again that got no answer.
const AGAIN: Duration = Duration::from_secs(1);

/// What one attempt tells.
pub(super) struct Journal {
    proposer: Proposer,
    id: BuildId,
    attempt: u32,
    phase: &'static str,
    step: u32,
    sandbox: Option<SandboxId>,
    lines: Vec<u8>,
    changed: bool,
}

impl Journal {
    pub(super) const fn new(proposer: Proposer, id: BuildId, attempt: u32) -> Self {
        Self {
            proposer,
            id,
            attempt,
            phase: "starting",
            step: 0,
            sandbox: None,
            lines: Vec::new(),
            changed: false,
        }
    }

    /// Names the sandbox of this attempt; whoever ends the attempt ends it too.
    pub(super) const fn built_in(&mut self, sandbox: SandboxId) {
        self.sandbox = Some(sandbox);
        self.changed = true;
    }

    /// What is being done from now on.
    pub(super) const fn at(&mut self, phase: &'static str, step: u32) {
        self.phase = phase;
        self.step = step;
        self.changed = true;
    }

    /// Adds a line of the present step.
    pub(super) fn line(&mut self, kind: Kind, text: impl Into<String>) {
        self.add(&Entry::new(kind, self.step, self.phase, text));
    }

    /// Adds a line about the build itself.
    pub(super) fn note(&mut self, text: impl Into<String>) {
        self.add(&Entry::new(Kind::Note, 0, self.phase, text));
    }

    /// Adds the end of the present step.
    pub(super) fn end(&mut self, exit: i32, took: Duration) {
        let entry = Entry {
            exit: Some(exit),
            ok: Some(exit == 0),
            elapsed_ms: Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
            ..Entry::new(Kind::End, self.step, self.phase, "")
        };
        self.add(&entry);
    }

    fn add(&mut self, entry: &Entry) {
        self.lines.extend(entry.encode());
    }

    /// Whether so much waits to be told that it should be.
    pub(super) const fn is_full(&self) -> bool {
        self.lines.len() >= FULL_BYTES
    }

    /// What was not told yet.
    pub(super) fn take_lines(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.lines)
    }

    /// Tells what there is to tell.
    pub(super) async fn flush(&mut self) -> Result<(), Stop> {
        if self.lines.is_empty() && !self.changed {
            return Ok(());
        }
        let told = BuildChange::Progress {
            id: self.id,
            attempt: self.attempt,
            phase: self.phase.to_owned(),
            step: self.step,
            sandbox: self.sandbox,
            log: std::mem::take(&mut self.lines),
        };
        self.changed = false;
        persist(&self.proposer, Command::Build(told)).await
    }
}

/// Proposes until there is an answer: a node without a quorum can do nothing else. What may have been told
/// is told twice then.
pub(super) async fn persist(proposer: &Proposer, command: Command) -> Result<(), Stop> {
    loop {
        match proposer.propose(command.clone()).await {
            Ok(_) => return Ok(()),
            Err(ProposeError::Refused(refusal)) => {
                debug!(%refusal, "an attempt of a build is not heard");
                return Err(Stop::Deposed);
            }
            Err(ProposeError::Log(LogError::Stopped(_))) => return Err(Stop::Deposed),
            Err(ProposeError::Log(_)) => time::sleep(AGAIN).await,
        }
    }
}
