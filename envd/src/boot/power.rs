//! The orderly end of the guest.

use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, sync};
use tokio::signal::unix::{Signal as Listener, SignalKind, signal};

use crate::log;
use crate::sys::{self, Reap};

/// How long processes may take to end after they were asked to.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long killed processes may take to vanish before the disk is let go regardless.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);
/// How often it is looked whether they have.
const POLL: Duration = Duration::from_millis(5);

/// The signals that end the agent: of a service manager, of a failing power supply, and of
/// ctrl-alt-del as process 1 receives it.
pub struct Signals {
    terminate: Listener,
    power: Listener,
    interrupt: Listener,
}

impl Signals {
    /// Starts to listen.
    ///
    /// # Errors
    /// When a signal cannot be listened to.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            power: signal(SignalKind::from_raw(libc::SIGPWR))?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The name of the next signal.
    pub async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.power.recv() => "SIGPWR",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Ends every process, writes everything to disk, and powers off. For process 1 only: in any other
/// it would end a machine that is not ours, so there it ends just this process.
pub fn off() -> ! {
    leave_unless_first();
    sync();
    end_all(Signal::SIGTERM, TERMINATE_TIMEOUT);
    end_all(Signal::SIGKILL, KILL_TIMEOUT);
    sync();
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(err) = mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>) {
        // Everything is written; the journal will be replayed at the next start.
        log!("make the root file system read-only: {err}");
    }
    off_now()
}

/// Powers off without further ado.
pub fn off_now() -> ! {
    leave_unless_first();
    let Err(err) = reboot(RebootMode::RB_POWER_OFF);
    log!("power off: {err}");
    // The kernel would panic if process 1 ended.
    loop {
        thread::park();
    }
}

fn leave_unless_first() {
    if std::process::id() != 1 {
        std::process::exit(1);
    }
}

/// Signals every process but this one and reaps until none is left or the time is up.
fn end_all(signal: Signal, limit: Duration) {
    let everyone = Pid::from_raw(-1);
    let began = Instant::now();
    if kill(everyone, signal).is_err() {
        return;
    }
    // Whoever loses its parent becomes our child, so no children means nobody is left.
    while sys::has_children() && began.elapsed() < limit {
        if sys::reap(Reap::Any).is_none() {
            thread::sleep(POLL);
        }
    }
}
