//! The shim's side of a pager: starts it, starts it again when it dies, and asks it.
//!
//! ```text
//! start ─> serving ─> died ─> serving ─> … ─> the VMM ended, or the guest cannot go on
//! ```
//!
//! A pager that dies under a running guest freezes it at its next missing page and loses nothing:
//! the thread that watches starts another within milliseconds. Only two ends are final, and the
//! shim hears of either once: the VMM has ended, or the guest cannot go on, with the reason. A pager
//! that dies again and again is the second kind.
//!
//! The page states live here, so that they outlive every pager, and so that written pages can be
//! listed without one.
//!
//! One that lives and does nothing is as bad as none. It is asked for a sign every [`BEAT`], and
//! killed after [`MAX_SILENCE`] without; it ends itself when one fault keeps it for too long
//! ([`super::main`]).

mod process;
mod written;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{self, Signal};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use self::process::{Serving, reason_in, setup_of, wait_readable};
use crate::base::chain::chain;
use crate::pager::control::{Channel, FromPager, ToPager};
use crate::pager::dirty::probe;
use crate::pager::layout::Layout;
use crate::pager::main::{FAILURE, GONE};
use crate::pager::memory::{GuestMemory, sealed_memfd};
use crate::pager::page_map::PAGES;
use crate::pager::post_copy::Questions;
use crate::pager::prefetch::Fill;
use crate::pager::region::Region;
use crate::pager::states::StateTable;
use crate::pager::stats::Stats;
use crate::pager::target::{AttachError, Target};
use crate::pager::uffd::Tracking;
use crate::pager::uffd::sys::pidfd_open;

pub use self::process::Waiting;
pub use self::written::ListWrittenError;

/// So many deaths within [`DEATHS_WITHIN`] are one too many: whatever kills pagers kills the next.
const MAX_DEATHS: usize = 5;
/// See [`MAX_DEATHS`].
const DEATHS_WITHIN: Duration = Duration::from_secs(10);
/// Longest time a pager that takes over may need: it takes milliseconds, and reads a page map.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest a killed pager may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a silent pager is asked for a sign.
const BEAT: Duration = Duration::from_secs(2);
/// Longest silence of one that lives. It answers from a thread that does nothing else, so only a host
/// that is out of processor time is as slow, and a new one costs no more than some milliseconds.
const MAX_SILENCE: Duration = Duration::from_secs(6);
/// The pause after one that did not come to serve: the host may be short of something.
const REPLACE_PAUSE: Duration = Duration::from_millis(100);
/// Stack of the thread that watches: it parses one message at a time.
const STACK_BYTES: usize = 128 * 1024;

/// What a pager is to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagerSpec {
    /// The `wrenn` binary; a shim says `/proc/self/exe`.
    pub program: PathBuf,
    /// The sandbox's directory: in the pager's arguments, and where it leaves a reason.
    pub dir: PathBuf,
    /// The VMM, a child that has not been reaped.
    pub vmm_pid: u32,
    /// The page map ([`PageMap`]).
    pub pages: PathBuf,
    /// Where the daemon answers for chunks that are not on this node.
    pub daemon: PathBuf,
    /// The sandbox, as the daemon knows it.
    pub sandbox: String,
    /// A working set to push ahead; a file that is not there is none.
    pub working_set: Option<PathBuf>,
    /// Where the working set of this resume is saved.
    pub record_to: Option<PathBuf>,
    /// What is put into the guest unasked.
    pub fill: Fill,
    /// How writes are to be known at best; [`crate::pager::dirty::probe`] tells what this host can.
    pub tracking: Tracking,
}

/// The program of a pager, to its shim: the same.
pub const OURSELVES: &str = "/proc/self/exe";
/// The working set in a sandbox's directory.
pub const WORKING_SET: &str = "working-set";

impl PagerSpec {
    /// A pager for the VMM `vmm_pid` of the sandbox in `dir`, with the files where they always are:
    /// its working set is pushed, and saved anew with what it missed.
    #[must_use]
    pub fn new(dir: &Path, vmm_pid: u32, daemon: PathBuf, sandbox: String) -> Self {
        let working_set = dir.join(WORKING_SET);
        Self {
            program: PathBuf::from(OURSELVES),
            dir: dir.to_owned(),
            vmm_pid,
            pages: dir.join(PAGES),
            daemon,
            sandbox,
            working_set: Some(working_set.clone()),
            record_to: Some(working_set),
            fill: Fill::Nothing,
            tracking: probe(),
        }
    }

    /// A process for it.
    fn wait(&self) -> Result<Waiting, StartPagerError> {
        Waiting::start(&self.program, &self.dir)
    }
}

/// Why no pager serves. The guest has not run: kill the VMM, which may be torn, and begin again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartPagerError {
    /// A system call that such a start is made of failed.
    #[error("{doing}")]
    System {
        /// Which step.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It gave up before it served.
    #[error("the pager gave up: {reason}")]
    GaveUp {
        /// What it said.
        reason: String,
    },
    /// It found that the guest cannot go on.
    #[error("the guest cannot go on: {reason}")]
    Hopeless {
        /// Why.
        reason: String,
    },
    /// It did not come to serve in time.
    #[error("the pager did not serve in time")]
    TooSlow,
    /// The VMM has no such memory, or has ended.
    #[error("find the guest's memory")]
    Target(#[from] AttachError),
}

fn system(doing: &'static str) -> impl Fn(io::Error) -> StartPagerError {
    move |source| StartPagerError::System { doing, source }
}

/// Why a pager did not answer. The guest may go on all the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskPagerError {
    /// It has no words for us now: it is being replaced, or has ended.
    #[error("reach the pager")]
    Away(#[from] io::Error),
    /// It did not answer in time.
    #[error("the pager did not answer in time")]
    TooSlow,
}

/// How a pager ended for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PagerEnd {
    /// The VMM has ended.
    VmmEnded,
    /// The guest cannot go on: it must be stopped, with this reason.
    Failed {
        /// Why.
        reason: String,
    },
}

/// The pager of one guest, whichever process that is at the moment. Dropping it ends the process.
pub struct Pager {
    shared: Arc<Shared>,
}

struct Shared {
    spec: PagerSpec,
    target: Target,
    region: Region,
    /// Of a VMM that asks for pages by itself.
    questions: Option<Questions>,
    memory: OwnedFd,
    states: OwnedFd,
    table: Arc<StateTable>,
    layout: Layout,
    tracking: Tracking,
    state: Mutex<State>,
    told: Condvar,
    /// One question at a time.
    asking: Mutex<()>,
}

struct State {
    pid: u32,
    /// It has not been reaped.
    lives: bool,
    /// Somebody follows it, and whoever comes after it.
    watched: bool,
    channel: Arc<Channel>,
    stats: Option<Stats>,
    stopping: bool,
    ready: bool,
    takeovers: u64,
}

impl Pager {
    /// Starts a pager for the guest whose memory is `memory`, and returns once it serves. To be
    /// called before the guest runs. `on_end` is called once, from another thread.
    ///
    /// # Errors
    /// See [`StartPagerError`].
    pub fn start(
        spec: PagerSpec,
        memory: &GuestMemory,
        deadline: Instant,
        on_end: impl FnOnce(PagerEnd) + Send + 'static,
    ) -> Result<Self, StartPagerError> {
        Self::start_by(spec.wait()?, spec, None, memory, deadline, on_end)
    }

    /// As [`Self::start`], for a VMM that asks for pages by itself: nothing of it is touched.
    ///
    /// # Errors
    /// See [`StartPagerError`].
    pub fn answer(
        spec: PagerSpec,
        questions: Questions,
        memory: &GuestMemory,
        deadline: Instant,
        on_end: impl FnOnce(PagerEnd) + Send + 'static,
    ) -> Result<Self, StartPagerError> {
        let asked = Some(questions);
        Self::start_by(spec.wait()?, spec, asked, memory, deadline, on_end)
    }

    /// As [`Self::start`], or as [`Self::answer`] where there are `questions`, by a process that is
    /// there already.
    ///
    /// # Errors
    /// See [`StartPagerError`].
    pub fn start_by(
        waiting: Waiting,
        spec: PagerSpec,
        questions: Option<Questions>,
        memory: &GuestMemory,
        deadline: Instant,
        on_end: impl FnOnce(PagerEnd) + Send + 'static,
    ) -> Result<Self, StartPagerError> {
        let pidfd = pidfd_open(spec.vmm_pid).map_err(system("find the VMM"))?;
        let target = Target::new(spec.vmm_pid, pidfd);
        let region = memory.region();
        let layout = target.layout(memory.as_fd(), region)?;
        let states = sealed_memfd("wrenn-page-states", region.pages())
            .map_err(system("make the page states"))?;
        let table = StateTable::map(&states, region).map_err(system("map the page states"))?;
        let memory = memory.as_fd().try_clone_to_owned();
        let memory = memory.map_err(system("keep the guest's memory"))?;
        let fds = [memory.as_fd(), states.as_fd(), target.pidfd()];
        let _none = fs::remove_file(spec.dir.join(FAILURE));
        let (setup, fds) = setup_of(&spec, region, 0, fds, questions.as_ref());
        let serving = waiting.serve(&spec, setup, &fds, deadline)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                pid: serving.child.id(),
                lives: true,
                watched: true,
                channel: Arc::clone(&serving.channel),
                stats: None,
                stopping: false,
                ready: false,
                takeovers: 0,
            }),
            tracking: serving.tracking,
            told: Condvar::new(),
            asking: Mutex::new(()),
            table: Arc::new(table),
            spec,
            target,
            region,
            questions,
            memory,
            states,
            layout,
        });
        let watching = Arc::clone(&shared);
        thread::Builder::new()
            .name("pager".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Some(end) = watching.watch(serving) {
                    on_end(end);
                }
                watching.state().watched = false;
                watching.told.notify_all();
            })
            .map_err(system("start a thread"))?;
        Ok(Self { shared })
    }

    /// Ends the process that serves, and waits until it is gone and reaped. One that has not ended by
    /// `deadline` is killed. Its VMM is dead, or will be: nobody brings its pages any more.
    pub fn end(&self, deadline: Instant) {
        self.shared.stop();
        if !self.await_end(deadline) {
            self.shared.kill();
            self.await_end(Instant::now() + KILL_TIMEOUT);
        }
    }

    fn await_end(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let told = &self.shared.told;
        let watched = |state: &mut State| state.watched;
        let waited = told.wait_timeout_while(self.shared.state(), left, watched);
        !waited.unwrap_or_else(PoisonError::into_inner).0.watched
    }

    /// The process that serves now.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.shared.state().pid
    }

    /// How writes are known.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        self.shared.tracking
    }

    /// Says that the guest is ready: its working set is complete, and saved.
    pub fn mark_ready(&self) {
        let channel = {
            let mut state = self.shared.state();
            state.ready = true;
            Arc::clone(&state.channel)
        };
        // One that is just being replaced is told when it is there.
        let _away = channel.send(&ToPager::Ready, &[]);
    }

    /// The counters of the pager that serves now.
    ///
    /// # Errors
    /// See [`AskPagerError`].
    pub fn stats(&self, deadline: Instant) -> Result<Stats, AskPagerError> {
        let _one_at_a_time = lock(&self.shared.asking);
        let channel = {
            let mut state = self.shared.state();
            state.stats = None;
            Arc::clone(&state.channel)
        };
        channel.send(&ToPager::Tell, &[])?;
        let left = deadline.saturating_duration_since(Instant::now());
        let none = |state: &mut State| state.stats.is_none();
        let (mut state, _) = self
            .shared
            .told
            .wait_timeout_while(self.shared.state(), left, none)
            .unwrap_or_else(PoisonError::into_inner);
        state.stats.take().ok_or(AskPagerError::TooSlow)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        state.channel.close();
    }

    /// Kills the process that serves. It cannot be another's: it is reaped only after it was noted
    /// as dead, under this lock.
    fn kill(&self) {
        let state = self.state();
        let pid = i32::try_from(state.pid).map(Pid::from_raw);
        if let (true, Ok(pid)) = (state.lives, pid) {
            let _gone_already = signal::kill(pid, Signal::SIGKILL);
        }
    }

    /// Waits for the end of the process that serves, and reaps it.
    fn reap(&self, child: &mut Child) -> io::Result<ExitStatus> {
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(Pid::from_raw(pid)), ended) == Err(Errno::EINTR) {}
        self.state().lives = false;
        child.wait()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Follows one pager after the other. `None` if the shim wanted no more.
    fn watch(&self, mut serving: Serving) -> Option<PagerEnd> {
        let mut deaths = VecDeque::new();
        loop {
            self.listen(&serving.channel);
            let status = self.reap(&mut serving.child);
            if self.state().stopping {
                return None;
            }
            let fate = status.map_or_else(
                |err| Fate::Died(format!("wait for it: {err}")),
                |status| self.fate(status),
            );
            let mut reason = match fate {
                Fate::End(end) => return Some(end),
                Fate::Died(reason) => reason,
            };
            serving = loop {
                let now = Instant::now();
                deaths.push_back(now);
                deaths.retain(|death| now.duration_since(*death) < DEATHS_WITHIN);
                if deaths.len() > MAX_DEATHS {
                    let reason = format!("the pager died too often, last: {reason}");
                    return Some(PagerEnd::Failed { reason });
                }
                match self.replace() {
                    Ok(serving) => break serving,
                    Err(_) if self.target.has_ended() => return Some(PagerEnd::VmmEnded),
                    Err(StartPagerError::Hopeless { reason }) => {
                        return Some(PagerEnd::Failed { reason });
                    }
                    Err(err) => reason = chain(&err),
                }
                thread::sleep(REPLACE_PAUSE);
            };
        }
    }

    /// Takes what the pager says, until it says no more. One that is silent is killed.
    fn listen(&self, channel: &Channel) {
        let mut heard = Instant::now();
        loop {
            match wait_readable(channel, Instant::now() + BEAT) {
                Ok(()) => match channel.receive() {
                    Ok(Some((FromPager::Told(stats), _))) => {
                        self.state().stats = Some(stats);
                        self.told.notify_all();
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                },
                Err(StartPagerError::TooSlow) if heard.elapsed() < MAX_SILENCE => {
                    // One that cannot be told is gone, which is heard next.
                    let _unheard = channel.send(&ToPager::Tell, &[]);
                    continue;
                }
                Err(_) => return self.kill(),
            }
            heard = Instant::now();
        }
    }

    fn fate(&self, status: ExitStatus) -> Fate {
        match status.code() {
            Some(0) if self.target.has_ended() => Fate::End(PagerEnd::VmmEnded),
            Some(0) => Fate::Died("it ended before its VMM".to_owned()),
            Some(code) if code == i32::from(GONE) => Fate::End(PagerEnd::Failed {
                reason: reason_in(&self.spec),
            }),
            Some(_) => Fate::Died(reason_in(&self.spec)),
            None => Fate::Died(format!("signal {}", status.signal().unwrap_or_default())),
        }
    }

    /// Starts the next one.
    fn replace(&self) -> Result<Serving, StartPagerError> {
        let takeovers = self.state().takeovers + 1;
        let fds = [
            self.memory.as_fd(),
            self.states.as_fd(),
            self.target.pidfd(),
        ];
        let deadline = Instant::now() + TAKEOVER_TIMEOUT;
        let questions = self.questions.as_ref();
        let _none = fs::remove_file(self.spec.dir.join(FAILURE));
        let (setup, fds) = setup_of(&self.spec, self.region, takeovers, fds, questions);
        let waiting = self.spec.wait()?;
        let serving = waiting.serve(&self.spec, setup, &fds, deadline)?;
        let mut state = self.state();
        state.takeovers = takeovers;
        state.pid = serving.child.id();
        state.lives = true;
        state.channel = Arc::clone(&serving.channel);
        if state.stopping {
            state.channel.close();
        }
        if state.ready {
            // What its predecessor recorded is saved or lost; there is nothing more to record.
            let _away = state.channel.send(&ToPager::Ready, &[]);
        }
        Ok(serving)
    }
}

enum Fate {
    End(PagerEnd),
    Died(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
