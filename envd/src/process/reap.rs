//! The one place that waits for children.
//!
//! As process 1 the agent inherits every orphan and must reap it, yet must not steal the status of
//! a process that somebody here waits for. So a single table knows our own children; forking,
//! signalling and reaping all happen under its lock. A pid is therefore signalled only while it
//! still is our child, and a status always finds its owner. Outside a VM only known children are
//! reaped, so that the agent can share a process with others (its tests do).

use std::collections::HashMap;
use std::io;
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::sys::{self, Reap};

/// Whose deaths are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Only children started through the reaper.
    Own,
    /// Orphans as well: the duty of process 1.
    Everyone,
}

/// Becomes `Some` when the process has been reaped.
pub type ExitWatch = watch::Receiver<Option<ExitStatus>>;

/// Starts, signals and reaps children.
#[derive(Debug)]
pub struct Reaper {
    scope: Scope,
    children: Mutex<HashMap<i32, watch::Sender<Option<ExitStatus>>>>,
}

impl Reaper {
    /// A reaper with no children yet.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        Self {
            scope,
            children: Mutex::default(),
        }
    }

    /// Runs `fork` and remembers the child before anybody can reap it.
    ///
    /// # Errors
    /// What `fork` said.
    pub fn start(
        &self,
        fork: impl FnOnce() -> io::Result<Child>,
    ) -> io::Result<(Child, Pid, ExitWatch)> {
        let mut children = self.lock();
        let child = fork()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let (died, watch) = watch::channel(None);
        children.insert(pid, died);
        Ok((child, Pid::from_raw(pid), watch))
    }

    /// Signals a child, or its whole group; `false` when it is dead already.
    pub fn signal(&self, pid: Pid, signal: Signal, reach: Reach) -> bool {
        let mut children = self.lock();
        self.collect_locked(&mut children);
        if !children.contains_key(&pid.as_raw()) {
            return false;
        }
        if reach == Reach::Group {
            // The group may be gone or never made; the process itself is what counts.
            let _ = kill(Pid::from_raw(-pid.as_raw()), signal);
        }
        kill(pid, signal).is_ok()
    }

    /// Reaps whoever has died and tells their owners. Cheap, so questions about who lives ask it
    /// first instead of relying on the signal having been handled already.
    pub fn collect(&self) {
        self.collect_locked(&mut self.lock());
    }

    /// Collects at each SIGCHLD until the runtime stops.
    ///
    /// # Errors
    /// When the signal cannot be listened to.
    pub fn listen(self: std::sync::Arc<Self>) -> io::Result<impl Future<Output = ()>> {
        let mut deaths = signal(SignalKind::child())?;
        Ok(async move {
            self.collect();
            while deaths.recv().await.is_some() {
                self.collect();
            }
        })
    }

    fn collect_locked(&self, children: &mut HashMap<i32, watch::Sender<Option<ExitStatus>>>) {
        match self.scope {
            Scope::Everyone => {
                while let Some((pid, status)) = sys::reap(Reap::Any) {
                    announce(children.remove(&pid), status);
                }
            }
            Scope::Own => {
                let dead = |pid: &i32| sys::reap(Reap::One(*pid));
                let dead: Vec<_> = children.keys().filter_map(dead).collect();
                for (pid, status) in dead {
                    announce(children.remove(&pid), status);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<ExitStatus>>>> {
        // The table is whole between statements; a panic elsewhere leaves it usable.
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn announce(owner: Option<watch::Sender<Option<ExitStatus>>>, status: ExitStatus) {
    if let Some(owner) = owner {
        owner.send_replace(Some(status));
    }
}

/// How far a signal goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The process alone.
    Process,
    /// The process and all that still are in its group.
    Group,
}
