//! One started process and the task that sees it to its end.
//!
//! Order at the end: reaped (and so out of every list) → pumps have drained → end event. The
//! deadline, and a kill that says so, end the whole tree; closing a stream kills nobody, because no
//! stream owns anything here.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::exit::Exit;
use super::input::Input;
use super::output::Fanout;
use super::reap::{ExitWatch, Reach, Reaper};
use crate::boot::cgroup::Place;

/// How long a killed process may take to be reaped before its killer is answered regardless. Only
/// a process stuck in the kernel needs more.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// What the caller asked to run, as shown in lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// The command.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables given with the request.
    pub envs: HashMap<String, String>,
    /// Working directory given with the request.
    pub cwd: Option<String>,
}

/// A process that was started, from its fork until nobody remembers it.
#[derive(Debug)]
pub struct Process {
    /// Its pid, which is also the id of its session and group.
    pub pid: Pid,
    /// What was asked for.
    pub command: CommandLine,
    /// The caller's name for it.
    pub tag: Option<String>,
    /// Standard input; held while a piece is written.
    pub input: tokio::sync::Mutex<Input>,
    /// The terminal's master side, if it has one.
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Its listeners.
    pub output: Arc<Fanout>,
    /// Fires when it is reaped.
    pub exit: ExitWatch,
    /// Who may signal it.
    pub reaper: Arc<Reaper>,
    /// The group it was placed in, as long as it has not ended.
    pub place: Weak<Place>,
}

impl Process {
    /// The pid as clients see it.
    #[must_use]
    pub fn pid_on_wire(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Whether it has not been reaped yet.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// Signals the process, or as far as `reach` says; `false` when it was dead already. SIGKILL to
    /// its group ends all that it started, in sessions of their own as well. After SIGKILL it returns
    /// only once the process is reaped, so that its pid is free and every list is right.
    pub async fn signal(&self, signal: Signal, reach: Reach) -> bool {
        let delivered = match (signal, reach) {
            (Signal::SIGKILL, Reach::Group) => self.kill_tree(),
            _ => self.reaper.signal(self.pid, signal, reach),
        };
        if delivered && signal == Signal::SIGKILL {
            let mut exit = self.exit.clone();
            // Past the timeout the kernel holds the process; the kill stands all the same.
            let _ = timeout(REAP_TIMEOUT, exit.wait_for(Option::is_some)).await;
        }
        delivered
    }

    /// Waits for the end, kills the tree at the deadline, and reports the end once `pumps` have
    /// drained.
    pub async fn supervise(self: Arc<Self>, pumps: Vec<JoinHandle<()>>, deadline: Option<Instant>) {
        let (status, by_deadline) = self.wait_or_kill(deadline).await;
        for pump in pumps {
            // A pump that panicked has nothing more to deliver.
            let _ = pump.await;
        }
        self.output.finish(Exit::new(status, by_deadline)).await;
    }

    /// Kills the process, its group and all that is in its place; `false` when it was dead already.
    fn kill_tree(&self) -> bool {
        let killed = self.reaper.signal(self.pid, Signal::SIGKILL, Reach::Group);
        if let Some(place) = self.place.upgrade() {
            place.kill();
        }
        killed
    }

    async fn wait_or_kill(&self, deadline: Option<Instant>) -> (ExitStatus, bool) {
        let Some(deadline) = deadline else {
            return (self.wait().await, false);
        };
        tokio::select! {
            status = self.wait() => (status, false),
            () = sleep_until(deadline) => {
                let killed = self.kill_tree();
                (self.wait().await, killed)
            }
        }
    }

    async fn wait(&self) -> ExitStatus {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        // The sender lives in the reaper's table until it has sent.
        ended.ok().and_then(|status| *status).unwrap_or_default()
    }
}
