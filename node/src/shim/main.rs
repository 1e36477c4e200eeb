//! The shim process, from its arguments to its end.
//!
//! `wrenn shim --dir D` starts twice: the *starter* forks, waits until the shim proper reports
//! through a pipe, and ends with its verdict; the *shim* is in a session of its own, a child of
//! nobody who could take it down, and reports once its VMM answers and its socket listens. A guest
//! that boots runs by then; one that is restored has its memory and its devices back
//! ([`super::restore`]) and stands still.
//!
//! The main thread starts the VMM and then waits for its end: the VMM dies with the thread that
//! started it, so this one must live as long as the shim. Three more threads serve the console,
//! the VMM's complaints and the socket, and two watch over a guest that is bound to the node's
//! lease ([`super::watchdog`]). There is no async runtime: a shim stays below 8 MiB.
//!
//! At the end `exit.json` is written first, then whoever waits is told, then the process goes: a
//! daemon that finds no shim can rely on the file. A shim that is killed writes nothing, and its
//! VMM goes with it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use proto::version;
use proto::wire::shim::Status;

use crate::base::chain::chain;
use crate::base::clock::{Clock, SystemClock};
use crate::pager::handle::Pager;
use crate::pager::memory::GuestMemory;
use crate::shim::console::{BoundedLog, pump, pump_keeping_tail};
use crate::shim::dirty::{AllPresent, DirtyPages};
use crate::shim::error::RunShimError;
use crate::shim::exit::ExitRecord;
use crate::shim::files::{self, SocketPath};
use crate::shim::freeze::Frozen;
use crate::shim::restore::{PAGER_END_TIMEOUT, Restore, RestoreError, Restored};
use crate::shim::save::{Saveable, Saver, Stand, micros};
use crate::shim::serve::Server;
use crate::shim::source::MemoryLoss;
use crate::shim::spec::ShimSpec;
use crate::shim::watchdog::{Lease, Watchdog};
use crate::vmm::jail::{Side, fork};
use crate::vmm::{self, SpawnVmmError, Started, Vmm, VmmExit};

/// The argument that makes `wrenn` a shim. Compared by whoever looks for shims in `/proc`.
pub const COMMAND: &str = "shim";
/// The option before the sandbox's directory.
pub const DIR_OPTION: &str = "--dir";

/// Longest time a VMM may take to answer first; a busy host starts QEMU in a second.
const VMM_UP_TIMEOUT: Duration = Duration::from_secs(15);
/// How long one wait for the end of the VMM lasts before the next. In between, the driver reads
/// what the VMM has reported: at a few events a second they still fit into the socket by then.
const LONG_WAIT: Duration = Duration::from_secs(300);
/// How long the ends of the VMM's streams are waited for after its own end. They are in the pipe.
const STREAMS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long clients that are owed the exit may take to receive it.
const LINGER: Duration = Duration::from_secs(2);
/// How much of the VMM's complaints goes into the exit record.
const COMPLAINT_BYTES: usize = 4096;
/// Stack of the threads that copy streams: a buffer of 4 KiB and a few calls.
const STACK_BYTES: usize = 64 * 1024;
/// What the shim writes to its starter when all is well; anything else is a reason.
const UP: &str = "up\n";
/// The most of a reason that the starter repeats.
const MAX_REASON_BYTES: u64 = 16 * 1024;

/// Runs `wrenn shim` with the arguments that follow the word. Must be the first thing the
/// process does: it forks, and it must stay small.
#[must_use]
pub fn main(args: &[OsString]) -> ExitCode {
    let [option, dir] = args else {
        return complain("usage: wrenn shim --dir <sandbox directory>");
    };
    if option != DIR_OPTION {
        return complain("usage: wrenn shim --dir <sandbox directory>");
    }
    // Our working directory will be `/`: the daemon's must not be held.
    let dir = match Path::new(dir).canonicalize() {
        Ok(dir) => dir,
        Err(err) => return complain(&format!("use the sandbox directory {dir:?}: {err}")),
    };
    let forked = io::pipe().and_then(|pipe| Ok((pipe, fork()?)));
    match forked {
        Ok(((report, ours), Side::Parent(shim))) => {
            drop(ours);
            await_report(report, shim)
        }
        Ok(((theirs, report), Side::Child)) => {
            drop(theirs);
            run(&dir, report)
        }
        Err(err) => complain(&format!("make the shim process: {err}")),
    }
}

/// The starter's half: waits for the verdict, which a shim that dies gives by closing the pipe.
fn await_report(report: PipeReader, shim: Pid) -> ExitCode {
    let mut said = String::new();
    let heard = report.take(MAX_REASON_BYTES).read_to_string(&mut said);
    if heard.is_ok() && said == UP {
        return ExitCode::SUCCESS;
    }
    // It is ending. Whoever hears its reason may rely on nothing of it being left.
    let _reaped = waitpid(shim, None);
    match heard {
        Ok(_) if said.is_empty() => complain("it ended without giving a reason"),
        Ok(_) => complain(said.trim_end()),
        Err(err) => complain(&format!("hear from the shim: {err}")),
    }
}

fn complain(reason: &str) -> ExitCode {
    // Nobody may be listening; the exit code tells as well.
    let _unheard = writeln!(io::stderr(), "{reason}");
    ExitCode::FAILURE
}

/// The shim's half.
fn run(dir: &Path, mut report: PipeWriter) -> ExitCode {
    let running = match start(dir) {
        Ok(running) => running,
        Err(err) => {
            let reason = chain(&err);
            // A second shim must not write into the first one's log.
            if !matches!(err, RunShimError::Taken { .. }) {
                BoundedLog::new(dir, files::LOG).append(format!("{reason}\n").as_bytes());
            }
            let _unheard = report.write_all(reason.as_bytes());
            return ExitCode::FAILURE;
        }
    };
    let _unheard = report.write_all(UP.as_bytes());
    drop(report);
    running.finish(dir)
}

/// A shim whose VMM runs.
struct Running {
    server: Arc<Server>,
    vmm: Arc<dyn Vmm>,
    /// Of a guest that is bound to the node's lease.
    watchdog: Option<Arc<Watchdog>>,
    /// Of a guest whose memory comes as it is touched.
    loss: MemoryLoss,
    pager: Option<Arc<Pager>>,
    complaints: Receiver<String>,
    console_ended: Receiver<()>,
    /// The right to be this directory's shim.
    _lock: Flock<File>,
}

fn start(dir: &Path) -> Result<Running, RunShimError> {
    let lock = settle(dir)?;
    let spec = ShimSpec::read(dir)?;
    let lease = spec.lease.as_deref().map(Lease::read).transpose()?;
    let restore = spec.restore.as_ref();
    let restore = restore.map(|restore| Restore::open(restore, spec.sandbox, dir));
    let restore = restore.transpose()?;
    let memory = Arc::new(GuestMemory::create(spec.vmm.memory)?);
    let started = start_vmm(&spec, restore.as_ref(), &memory, dir)?;
    let took = started.took;
    let guest = Watched::new(started, lease, dir)?;
    let restored = match &restore {
        Some(restore) => Some(guest.fill(restore, &memory)?),
        None => None,
    };
    let status = status(&spec, &*guest.vmm, took, restored.as_ref());
    guest.serve(status, restored, memory, lock, dir)
}

fn start_vmm(
    spec: &ShimSpec,
    restore: Option<&Restore>,
    memory: &GuestMemory,
    dir: &Path,
) -> Result<Started, SpawnVmmError> {
    let name = dir.to_string_lossy();
    let (ram, deadline) = (memory.as_fd(), Instant::now() + VMM_UP_TIMEOUT);
    match restore {
        None => vmm::spawn(&spec.vmm, &name, ram, deadline),
        Some(restore) => {
            restore.begin();
            let spawn = match restore.asks() {
                true => vmm::spawn_asking,
                false => vmm::spawn_incoming,
            };
            let (hardware, state) = (restore.hardware(), restore.state());
            spawn(&spec.vmm, hardware, state, &name, ram, deadline)
        }
    }
}

/// A VMM whose streams are read and whose lease is watched. Until it is part of a [`Running`] shim
/// it goes when this does, and is reaped.
struct Watched {
    vmm: Arc<dyn Vmm>,
    frozen: Arc<Frozen>,
    watchdog: Option<Arc<Watchdog>>,
    loss: MemoryLoss,
    complaints: Receiver<String>,
    console_ended: Receiver<()>,
    unwanted: Unwanted,
}

/// Ends a VMM, unless it was taken out.
struct Unwanted(Option<Arc<dyn Vmm>>);

impl Drop for Unwanted {
    fn drop(&mut self) {
        if let Some(vmm) = self.0.take() {
            // The kernel kills it with this process, should this fail.
            let _killed = vmm.kill();
            let _reaped = vmm.wait(Instant::now() + STREAMS_TIMEOUT);
        }
    }
}

impl Watched {
    fn new(started: Started, lease: Option<Lease>, dir: &Path) -> Result<Self, RunShimError> {
        let no_thread = |source| RunShimError::System {
            doing: "start a thread",
            source,
        };
        let vmm: Arc<dyn Vmm> = Arc::from(started.vmm);
        let unwanted = Unwanted(Some(Arc::clone(&vmm)));
        let frozen = Arc::new(Frozen::default());
        // Before anything else: the guest runs.
        let watchdog = lease
            .map(|lease| Watchdog::start(Arc::clone(&vmm), Arc::clone(&frozen), lease, dir))
            .transpose()
            .map_err(no_thread)?;
        let (console, console_log) = (started.console, BoundedLog::new(dir, files::CONSOLE));
        let console_ended =
            thread_result("console", move || pump(console, console_log)).map_err(no_thread)?;
        let (stderr, log) = (started.stderr, BoundedLog::new(dir, files::LOG));
        let complaints = thread_result("stderr", move || {
            pump_keeping_tail(stderr, log, COMPLAINT_BYTES)
        })
        .map_err(no_thread)?;
        Ok(Self {
            loss: MemoryLoss::new(Arc::clone(&vmm)),
            vmm,
            frozen,
            watchdog,
            complaints,
            console_ended,
            unwanted,
        })
    }

    /// Brings back the guest. When that fails the VMM has ended, and says why.
    fn fill(&self, restore: &Restore, memory: &GuestMemory) -> Result<Restored, RunShimError> {
        let filled = restore.fill(&*self.vmm, memory, &self.loss);
        filled.map_err(|source| {
            // One that could not read the state is ending by itself, and may just be saying why.
            if matches!(source, RestoreError::Vmm(_)) {
                let _ended = self.vmm.wait(Instant::now() + STREAMS_TIMEOUT);
            }
            let _killed = self.vmm.kill();
            if self.lease_has_ended() {
                return RunShimError::LeaseEnded;
            }
            let complaint = self.complaints.recv_timeout(STREAMS_TIMEOUT);
            let complaint = complaint.unwrap_or_default();
            RunShimError::Restore { complaint, source }
        })
    }

    fn lease_has_ended(&self) -> bool {
        let lost = self.watchdog.as_ref().and_then(|it| it.lost_for());
        lost.is_some()
    }

    /// Answers for the guest from now on.
    fn serve(
        mut self,
        status: Status,
        restored: Option<Restored>,
        memory: Arc<GuestMemory>,
        lock: Flock<File>,
        dir: &Path,
    ) -> Result<Running, RunShimError> {
        let system = |doing| move |source| RunShimError::System { doing, source };
        let (stand, dirty, pager): (_, Box<dyn DirtyPages>, _) = match restored {
            None => (Stand::Running, Box::new(AllPresent), None),
            Some(restored) => (Stand::Still, restored.dirty, restored.pager),
        };
        let guest = Saveable {
            vmm: Arc::clone(&self.vmm),
            frozen: Arc::clone(&self.frozen),
            memory,
            dirty,
            dir: dir.to_owned(),
        };
        let server = Server::new(status, Saver::new(guest, stand), pager.clone());
        let server = server.map_err(system("make a pipe"))?;
        let listener = listen(dir).map_err(system("listen on shim.sock"))?;
        let accepting = Arc::clone(&server);
        thread_result("accept", move || accepting.accept_all(&listener))
            .map_err(system("start a thread"))?;
        self.unwanted.0 = None;
        Ok(Running {
            server,
            vmm: self.vmm,
            watchdog: self.watchdog,
            loss: self.loss,
            pager,
            complaints: self.complaints,
            console_ended: self.console_ended,
            _lock: lock,
        })
    }
}

impl Running {
    fn finish(self, dir: &Path) -> ExitCode {
        let exit = loop {
            match self.vmm.wait(Instant::now() + LONG_WAIT) {
                Ok(Some(exit)) => break exit,
                Ok(None) => {}
                // Not knowing is worse than a dead guest: end it, and say so.
                Err(err) => {
                    let _killed = self.vmm.kill();
                    break VmmExit {
                        reason: chain(&err),
                        ..VmmExit::default()
                    };
                }
            }
        };
        let deadline = Instant::now() + STREAMS_TIMEOUT;
        let left = || deadline.saturating_duration_since(Instant::now());
        let complaint = self.complaints.recv_timeout(left()).unwrap_or_default();
        let _console_on_disk = self.console_ended.recv_timeout(left());
        // It saw the end of the VMM as we did; one that hangs is killed.
        if let Some(pager) = &self.pager {
            pager.end(Instant::now() + PAGER_END_TIMEOUT);
        }
        let asked = self.server.ending().asked();
        let mut record = ExitRecord::new(exit, asked, complaint, SystemClock.now());
        if let Some(lost_for) = self.lease_lost_for(&record) {
            record = record.lease_lost(lost_for);
        } else if let Some(why) = self.loss.reason() {
            record = record.memory_lost(why);
        }
        let written = record.write(dir);
        if let Err(err) = &written {
            let line = format!("write {}: {err}\n", files::EXIT);
            BoundedLog::new(dir, files::LOG).append(line.as_bytes());
        }
        self.server.ending().announce(record);
        self.server.wait_quiet(Instant::now() + LINGER);
        let _gone = files::remove(dir, files::SOCKET);
        if written.is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

impl Running {
    /// How long the node had had no lease, where that is what ended the VMM.
    fn lease_lost_for(&self, record: &ExitRecord) -> Option<Duration> {
        let killed = record.signal == Some(Signal::SIGKILL as i32);
        let watchdog = self.watchdog.as_ref().filter(|_| killed)?;
        watchdog.lost_for()
    }
}

/// Becomes a process of its own: its session, its standard streams, its right to the directory.
fn settle(dir: &Path) -> Result<Flock<File>, RunShimError> {
    let system = |doing| move |source| RunShimError::System { doing, source };
    let directory = |source| RunShimError::Directory {
        dir: dir.to_owned(),
        source,
    };
    setsid().map_err(|errno| system("leave the session")(errno.into()))?;
    std::env::set_current_dir("/").map_err(system("leave the working directory"))?;
    umask(Mode::from_bits_truncate(0o077));
    let lock = files::lock(dir)
        .map_err(directory)?
        .ok_or_else(|| RunShimError::Taken {
            dir: dir.to_owned(),
        })?;
    redirect_streams(dir).map_err(system("redirect the standard streams"))?;
    // What an earlier shim of this directory left would be taken for ours.
    files::remove(dir, files::EXIT).map_err(directory)?;
    files::remove(dir, files::SOCKET).map_err(directory)?;
    Ok(lock)
}

/// Standard error goes to the log: a panic's message is all that is ever written there.
fn redirect_streams(dir: &Path) -> io::Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(dir.join(files::LOG))?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&log)?;
    Ok(())
}

fn listen(dir: &Path) -> io::Result<UnixListener> {
    let path = SocketPath::new(dir)?;
    UnixListener::bind(path.as_path())
}

fn status(spec: &ShimSpec, vmm: &dyn Vmm, took: Duration, restored: Option<&Restored>) -> Status {
    let hardware = vmm.hardware().clone();
    Status {
        protocol_version: version::SHIM,
        shim_pid: std::process::id(),
        vmm_pid: vmm.pid(),
        sandbox: spec.sandbox.0.to_vec(),
        epoch: spec.epoch.0,
        vmm_version: vmm.version().to_owned(),
        accelerator: spec.vmm.accelerator.name().to_owned(),
        vmm_start_us: micros(took),
        lease_bound: spec.lease.is_some(),
        machine: hardware.machine,
        cpu: hardware.cpu,
        memory_us: restored.map_or(0, |it| micros(it.memory)),
        load_us: restored.map_or(0, |it| micros(it.load)),
        // The rest the server knows.
        ..Status::default()
    }
}

/// Runs `work` on a small thread of its own and hands back its result.
fn thread_result<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Receiver<T>> {
    let (sender, result) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _nobody_waits = sender.send(work());
        })?;
    Ok(result)
}
