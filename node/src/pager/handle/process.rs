//! One pager process, from its start until it serves: what it is told, and how it fails.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{PagerSpec, StartPagerError, system};
use crate::pager::control::{Channel, FromPager, Setup, ToPager};
use crate::pager::main::{COMMAND, DIR_OPTION, FAILURE, GONE};
use crate::pager::post_copy::Questions;
use crate::pager::region::Region;
use crate::pager::uffd::Tracking;

/// The pause between two looks whether one has ended that is just ending.
const END_PAUSE: Duration = Duration::from_millis(1);
/// The most of a reason that is repeated.
const MAX_REASON_BYTES: usize = 4096;

/// A pager process that has not been told yet what to serve. Starting one takes as long as starting a
/// VMM does, so a shim does both at once. Dropped, it ends.
pub struct Waiting {
    /// `None` once it serves.
    child: Option<Child>,
    channel: Channel,
}

impl Waiting {
    /// Starts `program`, the `wrenn` binary, as the pager of the sandbox in `dir`. The calling thread
    /// must outlive it.
    ///
    /// # Errors
    /// [`StartPagerError::System`].
    pub fn start(program: &Path, dir: &Path) -> Result<Self, StartPagerError> {
        let (channel, theirs) = Channel::pair().map_err(system("make a socket pair"))?;
        let child = Command::new(program)
            .arg(COMMAND)
            .arg(DIR_OPTION)
            .arg(dir)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(system("start the pager"))?;
        Ok(Self {
            child: Some(child),
            channel,
        })
    }

    /// Tells it what to serve, and waits until it does, or ends.
    pub(super) fn serve(
        mut self,
        spec: &PagerSpec,
        setup: Setup,
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<Serving, StartPagerError> {
        let serving = self
            .channel
            .send(&ToPager::Setup(setup), fds)
            .map_err(system("tell the pager what to serve"))
            .and_then(|()| await_serving(&self.channel, deadline));
        match (serving, self.child.take()) {
            (Ok(Some(tracking)), Some(child)) => {
                let channel = self.channel.try_clone();
                Ok(Serving {
                    child,
                    channel: Arc::new(channel.map_err(system("keep the pager's socket"))?),
                    tracking,
                })
            }
            (Ok(None), child) => {
                self.child = child;
                let code = self.ended(deadline);
                let reason = reason_in(spec);
                Err(match code {
                    Some(code) if code == i32::from(GONE) => StartPagerError::Hopeless { reason },
                    _ => StartPagerError::GaveUp { reason },
                })
            }
            (other, child) => {
                // It may be tracing the VMM: its end lets go.
                self.child = child;
                self.end();
                Err(other.err().unwrap_or(StartPagerError::TooSlow))
            }
        }
    }

    /// How one has ended that has closed its socket, which is its last act but one.
    fn ended(&mut self, deadline: Instant) -> Option<i32> {
        let child = self.child.as_mut()?;
        loop {
            match child.try_wait() {
                Ok(None) if Instant::now() < deadline => thread::sleep(END_PAUSE),
                Ok(Some(status)) => return status.code(),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _killed = child.kill();
            let _reaped = child.wait();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

/// A pager process that serves.
pub(super) struct Serving {
    pub(super) child: Child,
    pub(super) channel: Arc<Channel>,
    pub(super) tracking: Tracking,
}

/// What the last pager left.
pub(super) fn reason_in(spec: &PagerSpec) -> String {
    let mut reason = fs::read_to_string(spec.dir.join(FAILURE)).unwrap_or_default();
    if reason.is_empty() {
        "it left no reason".clone_into(&mut reason);
    }
    let cut = (0..=MAX_REASON_BYTES.min(reason.len()))
        .rev()
        .find(|&at| reason.is_char_boundary(at));
    reason.truncate(cut.unwrap_or(0));
    reason
}

/// All that a pager is told, and the descriptors with it.
pub(super) fn setup_of<'a>(
    spec: &PagerSpec,
    region: Region,
    takeovers: u64,
    fds: [BorrowedFd<'a>; 3],
    questions: Option<&'a Questions>,
) -> (Setup, Vec<BorrowedFd<'a>>) {
    let setup = Setup {
        vmm_pid: spec.vmm_pid,
        memory_bytes: region.bytes(),
        pages: spec.pages.clone(),
        daemon: spec.daemon.clone(),
        sandbox: spec.sandbox.clone(),
        working_set: spec.working_set.clone(),
        record_to: spec.record_to.clone(),
        fill: spec.fill,
        tracking: spec.tracking,
        takeovers,
        slots: questions.map(|it| it.slots.clone()),
    };
    let mut fds = fds.to_vec();
    fds.extend(questions.map(Questions::fd));
    (setup, fds)
}

/// How the pager knows of writes, once it serves; `None` if it has ended.
fn await_serving(
    channel: &Channel,
    deadline: Instant,
) -> Result<Option<Tracking>, StartPagerError> {
    loop {
        wait_readable(channel, deadline)?;
        let message = channel.receive().map_err(system("hear from the pager"))?;
        match message {
            Some((FromPager::Serving { tracking }, _)) => return Ok(Some(tracking)),
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

pub(super) fn wait_readable(channel: &Channel, deadline: Instant) -> Result<(), StartPagerError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
    let mut readable = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    match poll(&mut readable, timeout) {
        Ok(0) => Err(StartPagerError::TooSlow),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(system("wait for the pager")(errno.into())),
    }
}
