//! Which processes live, and which ended so recently that a late listener may still ask.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::live::Process;
use super::reap::Reaper;

/// How long an ended process can still be attached to, to learn how it ended.
const RETAIN: Duration = Duration::from_secs(30);

/// Processes of callers that may live at once: more than a guest has room for, as a rule, and few
/// enough for what the agent keeps of each.
pub const MAX_PROCESSES: usize = 4096;

/// How a caller names a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By pid.
    Pid(u32),
    /// By tag; the first live match.
    Tag(String),
}

impl Selector {
    fn selects(&self, process: &Process) -> bool {
        match self {
            Self::Pid(pid) => process.pid_on_wire() == *pid,
            Self::Tag(tag) => process.tag.as_ref() == Some(tag),
        }
    }
}

/// No process answers to the selector.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// No such pid.
    #[error("process with pid {0} not found")]
    Pid(u32),
    /// No such tag.
    #[error("process with tag {0} not found")]
    Tag(String),
}

#[derive(Debug, Default)]
struct Table {
    /// By order of start, so that a tag finds the oldest.
    known: BTreeMap<u64, Entry>,
    started: u64,
}

#[derive(Debug)]
struct Entry {
    process: Arc<Process>,
    /// When it was first seen dead.
    ended: Option<Instant>,
}

/// The table of processes.
#[derive(Debug)]
pub struct Registry {
    reaper: Arc<Reaper>,
    table: Mutex<Table>,
}

impl Registry {
    /// An empty table.
    #[must_use]
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            table: Mutex::default(),
        }
    }

    /// Who starts and reaps.
    #[must_use]
    pub fn reaper(&self) -> &Arc<Reaper> {
        &self.reaper
    }

    /// Adds a started process. An ended one with the same pid or tag is forgotten.
    pub fn add(&self, process: Arc<Process>) {
        let mut table = self.lock();
        table.known.retain(|_, entry| {
            let same_tag = entry.process.tag.is_some() && entry.process.tag == process.tag;
            entry.process.is_alive() || !(same_tag || entry.process.pid == process.pid)
        });
        table.started += 1;
        let order = table.started;
        table.known.insert(
            order,
            Entry {
                process,
                ended: None,
            },
        );
    }

    /// Every process that lives at this moment.
    #[must_use]
    pub fn live(&self) -> Vec<Arc<Process>> {
        let table = self.current();
        let live = table.known.values().filter(|entry| entry.ended.is_none());
        live.map(|entry| entry.process.clone()).collect()
    }

    /// Whether one more process may be started.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let known = self.lock().known.len();
        known < MAX_PROCESSES || self.live().len() < MAX_PROCESSES
    }

    /// The live process that `selector` names.
    ///
    /// # Errors
    /// [`FindError`] repeats the selector.
    pub fn find(&self, selector: &Selector) -> Result<Arc<Process>, FindError> {
        self.search(selector, |entry| entry.ended.is_none())
    }

    /// As [`Self::find`], but a process that ended lately is found as well.
    ///
    /// # Errors
    /// [`FindError`] repeats the selector.
    pub fn find_retained(&self, selector: &Selector) -> Result<Arc<Process>, FindError> {
        self.find(selector)
            .or_else(|_| self.search(selector, |_| true))
    }

    fn search(
        &self,
        selector: &Selector,
        accept: impl Fn(&Entry) -> bool,
    ) -> Result<Arc<Process>, FindError> {
        let table = self.current();
        let mut matches = table
            .known
            .values()
            .filter(|entry| selector.selects(&entry.process));
        let found = matches
            .find(|entry| accept(entry))
            .map(|entry| entry.process.clone());
        found.ok_or_else(|| match selector {
            Selector::Pid(pid) => FindError::Pid(*pid),
            Selector::Tag(tag) => FindError::Tag(tag.clone()),
        })
    }

    /// The table with deaths noted and old ends forgotten, as of now.
    fn current(&self) -> MutexGuard<'_, Table> {
        self.reaper.collect();
        let mut table = self.lock();
        let now = Instant::now();
        table.known.retain(|_, entry| {
            if entry.ended.is_none() && !entry.process.is_alive() {
                entry.ended = Some(now);
            }
            entry
                .ended
                .is_none_or(|ended| now.duration_since(ended) < RETAIN)
        });
        table
    }

    /// Notes a death and forgets it when its time is over, so that a table nobody asks does not
    /// keep what ended processes held.
    pub async fn forget_in_time(&self) {
        drop(self.current());
        sleep(RETAIN).await;
        drop(self.current());
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::launch::Launch;
    use crate::process::live::CommandLine;
    use crate::process::reap::Scope;
    use crate::users::Accounts;

    /// Starts `/bin/true` under `tag` and waits until it has been reaped.
    async fn run(registry: &Arc<Registry>, tag: &str) -> Arc<Process> {
        let launch = Launch {
            command: CommandLine {
                cmd: "/bin/true".into(),
                ..CommandLine::default()
            },
            tag: Some(tag.into()),
            user: Accounts::read().user("root").expect("always there"),
            cwd: "/".into(),
            env: BTreeMap::default(),
            stdin: false,
            terminal: None,
            place: None,
            deadline: None,
        };
        let (process, mut output) = launch.start(registry).expect("started");
        while output.recv().await.is_some() {}
        process
    }

    fn registry() -> Arc<Registry> {
        let reaper = Arc::new(Reaper::new(Scope::Own));
        tokio::spawn(reaper.clone().listen().expect("signals can be heard"));
        Arc::new(Registry::new(reaper))
    }

    #[tokio::test]
    async fn ended_process_is_remembered_for_half_a_minute() {
        let registry = registry();
        let process = run(&registry, "t").await;
        let by_pid = Selector::Pid(process.pid_on_wire());
        assert!(registry.find(&by_pid).is_err(), "dead at once");
        tokio::time::pause();
        tokio::time::advance(RETAIN / 2).await;
        assert!(registry.find_retained(&by_pid).is_ok());
        tokio::time::advance(RETAIN).await;
        assert!(registry.find_retained(&by_pid).is_err());
    }

    #[tokio::test]
    async fn reused_tag_forgets_the_ended_process() {
        let registry = registry();
        let old = run(&registry, "t").await;
        let new = run(&registry, "t").await;
        let found = registry
            .find_retained(&Selector::Tag("t".into()))
            .expect("retained");
        assert!(Arc::ptr_eq(&found, &new));
        assert!(
            registry
                .find_retained(&Selector::Pid(old.pid_on_wire()))
                .is_err()
        );
    }
}
