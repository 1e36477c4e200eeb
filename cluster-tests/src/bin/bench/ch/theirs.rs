//! Cloud Hypervisor without us: its own snapshots, and those of its reference offload daemon.
//!
//! | way | how the guest's memory comes |
//! |---|---|
//! | native, copied | read from its file before the guest runs |
//! | native, on demand | from the same file as it is touched; a thread of the VMM brings the rest |
//! | daemon, copied | into a memfd before the guest runs |
//! | daemon, on demand | over its page-fault connection; the VMM asks for the rest, page by page |

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use node::vmm::cloud_hypervisor::http;
use proto::units::Mib;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::payload::{Console, await_mapped, fill};
use super::{PATIENCE, Resumed};
use crate::Outcome;

/// Pause between two looks for a socket: they come after some milliseconds.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// How a guest is brought back without us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    NativeCopy,
    NativeOnDemand,
    DaemonCopy,
    DaemonOnDemand,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [
        Self::NativeCopy,
        Self::NativeOnDemand,
        Self::DaemonCopy,
        Self::DaemonOnDemand,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::NativeCopy => "native_copy",
            Self::NativeOnDemand => "native_ondemand",
            Self::DaemonCopy => "daemon_copy",
            Self::DaemonOnDemand => "daemon_ondemand",
        }
    }

    pub(super) fn needs_daemon(self) -> bool {
        matches!(self, Self::DaemonCopy | Self::DaemonOnDemand)
    }

    fn is_copy(self) -> bool {
        matches!(self, Self::NativeCopy | Self::DaemonCopy)
    }
}

/// Snapshots of one guest, as Cloud Hypervisor and as its daemon make them.
pub(super) struct Snapshots {
    program: PathBuf,
    daemon: Option<PathBuf>,
    memory: Mib,
    home: TempDir,
}

impl Snapshots {
    /// Boots `kernel`, and saves it in both ways; by the daemon only where there is one.
    pub(super) fn make(
        program: &Path,
        daemon: Option<&Path>,
        kernel: &Path,
        memory: Mib,
    ) -> Outcome<Self> {
        let made = Self {
            program: program.to_owned(),
            daemon: daemon.map(Path::to_owned),
            memory,
            home: tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?,
        };
        let guest = Process::start(program, made.home.path())?;
        guest.call("PUT", "vm.create", Some(&machine(kernel, memory)))?;
        guest.call("PUT", "vm.boot", None)?;
        guest.console.await_up()?;
        guest.call("PUT", "vm.pause", None)?;
        fs::create_dir(made.native())?;
        let place = json!({ "destination_url": format!("file://{}", made.native().display()) });
        guest.call("PUT", "vm.snapshot", Some(&place))?;
        fill(&memory_in(&made.native(), memory)?, memory)?;
        if let Some(daemon) = &made.daemon {
            let socket = made.home.path().join("send");
            let child = Command::new(daemon)
                .arg("snapshot")
                .arg("--socket")
                .arg(&socket)
                .arg("--output-dir")
                .arg(made.offloaded())
                .stderr(Stdio::null())
                .spawn()?;
            let mut child = Killed(child);
            await_there(&socket)?;
            let url = format!("unix:{}", socket.display());
            let place = json!({ "destination_url": url, "local": true });
            guest.call("PUT", "vm.send-migration", Some(&place))?;
            let status = child.0.wait()?;
            if !status.success() {
                return Err(format!("the offload daemon ended with {status}").into());
            }
            fill(&memory_in(&made.offloaded(), memory)?, memory)?;
        }
        Ok(made)
    }

    fn native(&self) -> PathBuf {
        self.home.path().join("native")
    }

    fn offloaded(&self) -> PathBuf {
        self.home.path().join("offloaded")
    }

    /// Brings a guest back, from the start of the VMM's process on, and has it run until its memory
    /// is whole where `whole` says so.
    pub(super) fn resume(&self, way: Way, whole: bool) -> Outcome<Resumed> {
        let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        let began = Instant::now();
        let guest = Process::start(&self.program, dir.path())?;
        let _daemon = if way.needs_daemon() {
            Some(self.by_daemon(&guest, way, dir.path())?)
        } else {
            let mode = if way.is_copy() { "Copy" } else { "OnDemand" };
            let url = format!("file://{}", self.native().display());
            let place = json!({ "source_url": url, "memory_restore_mode": mode, "resume": true });
            guest.call("PUT", "vm.restore", Some(&place))?;
            None
        };
        let first = guest.console.first()?.saturating_duration_since(began);
        let resident = match whole {
            false => None,
            true if way.is_copy() => Some(first),
            true => Some(await_mapped(guest.child.0.id(), self.memory)? - began),
        };
        guest.console.await_sound(2)?;
        Ok(Resumed { first, resident })
    }

    fn by_daemon(&self, guest: &Process, way: Way, dir: &Path) -> Outcome<(Killed, UnixStream)> {
        let socket = dir.join("receive");
        let mode = if way.is_copy() { "Precopy" } else { "Postcopy" };
        let url = format!("unix:{}", socket.display());
        let body = json!({ "receiver_url": url, "memory_mode": mode });
        // Answered when all is over: nobody waits for it.
        let asked = guest.ask("PUT", "vm.receive-migration", Some(&body))?;
        await_there(&socket)?;
        let program = self.daemon.as_ref().ok_or("there is no offload daemon")?;
        let mut command = Command::new(program);
        command.arg("restore").arg("--socket").arg(&socket);
        command.arg("--input-dir").arg(self.offloaded());
        command.arg("--resume").stderr(Stdio::null());
        if !way.is_copy() {
            command.arg("--ondemand");
        }
        Ok((Killed(command.spawn()?), asked))
    }

    /// From the start of the process until its API answers.
    pub(super) fn api_ready(program: &Path) -> Outcome<Duration> {
        let dir = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
        let began = Instant::now();
        let process = Process::start(program, dir.path())?;
        process.call("GET", "vmm.ping", None)?;
        Ok(began.elapsed())
    }
}

/// The same machine as ours: one processor, and memory that a descriptor can carry.
fn machine(kernel: &Path, memory: Mib) -> Value {
    json!({
        "payload": { "kernel": kernel },
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": memory.bytes(), "shared": true },
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
    })
}

/// The file of a snapshot that is the guest's memory as it lies: both ways have one.
fn memory_in(dir: &Path, memory: Mib) -> Outcome<File> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.metadata()?.len() == memory.bytes() {
            return Ok(File::options().write(true).open(entry.path())?);
        }
    }
    Err(format!("no file in {} is as large as the memory", dir.display()).into())
}

fn await_there(path: &Path) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        if Instant::now() > deadline {
            return Err(format!("nobody listens at {}", path.display()).into());
        }
        thread::sleep(LOOK_AGAIN);
    }
    // Bound, and a moment later listening.
    thread::sleep(LOOK_AGAIN);
    Ok(())
}

/// A socket is bound before it listens: among many that start at once, for a while.
fn connect(socket: &Path) -> Outcome<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Err(err) if err.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                thread::sleep(LOOK_AGAIN);
            }
            connected => return Ok(connected?),
        }
    }
}

/// A process that does not outlive this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself; what matters is that it is reaped.
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

/// One Cloud Hypervisor.
struct Process {
    child: Killed,
    api: PathBuf,
    console: Console,
}

impl Process {
    /// One whose API is there, with its socket in `dir`.
    fn start(program: &Path, dir: &Path) -> Outcome<Self> {
        let api = dir.join("api");
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(program)
            .arg("--api-socket")
            .arg(format!("path={}", api.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::null())
            .spawn()?;
        let child = Killed(child);
        await_there(&api)?;
        Ok(Self {
            child,
            api,
            console: Console::listen(ours),
        })
    }

    fn ask(&self, method: &str, name: &str, body: Option<&Value>) -> Outcome<UnixStream> {
        let mut stream = connect(&self.api)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let body = body.map(Value::to_string);
        let body = body.as_ref().map(String::as_bytes);
        stream.write_all(&http::encode(method, name, body))?;
        Ok(stream)
    }

    fn call(&self, method: &str, name: &str, body: Option<&Value>) -> Outcome {
        let mut stream = self.ask(method, name, body)?;
        let (mut heard, mut bytes) = (Vec::new(), [0; 4096]);
        loop {
            if let Some(answer) = http::decode(&heard)? {
                if answer.status < 300 {
                    return Ok(());
                }
                let why = String::from_utf8_lossy(&answer.body);
                return Err(format!("{name}: {}: {}", answer.status, why.trim()).into());
            }
            match stream.read(&mut bytes)? {
                0 => return Err(format!("{name}: the VMM has ended").into()),
                count => heard.extend_from_slice(&bytes[..count]),
            }
        }
    }
}
