//! Starting Cloud Hypervisor: sockets, the jail around the child, and what it is told until a guest
//! is in it.
//!
//! ```text
//! boot      exec > ping (which version?) > create > boot
//! incoming  exec > ping > receive … Start > MemoryFd x slots > Config … (its memory is mapped)
//! asking    the same, and a second connection on which it asks for pages
//! ```
//!
//! It inherits the guest's memory, the socket of its API, a pipe for its reports, and what it needs
//! to lay its guest open or to take one in. Its standard output is the guest's console. The name by
//! which a sweeper finds it is its first argument: it has no option for one.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use proto::units::Mib;

use crate::pager::post_copy::Questions;
use crate::pager::region::Region;
use crate::pager::target::Target;
use crate::vmm::child::{not_up, open_netns, take_stderr};
use crate::vmm::cloud_hypervisor::api::{Api, Call, MemoryMode};
use crate::vmm::cloud_hypervisor::config::{self, MemoryFrom};
use crate::vmm::cloud_hypervisor::events::Events;
use crate::vmm::cloud_hypervisor::kept::{self, Kept, KeptError};
use crate::vmm::cloud_hypervisor::noise::{self, Refusals};
use crate::vmm::cloud_hypervisor::offload::{codec, link};
use crate::vmm::cloud_hypervisor::sockets::{Meeting, Nameless, path_of};
use crate::vmm::cloud_hypervisor::version::{self, Known};
use crate::vmm::cloud_hypervisor::{CloudHypervisor, Incoming, machine};
use crate::vmm::error::{ForeignStateError, SpecError, TalkError};
use crate::vmm::jail::{Allowed, Jail, JailError, pidfd_open};
use crate::vmm::process::VmmProcess;
use crate::vmm::root::MEETING;
use crate::vmm::{Accelerator, Hardware, SpawnVmmError, Started, VmmSpec};

/// What the first argument begins with; the name of the guest follows.
pub const NAME_PREFIX: &str = "cloud-hypervisor:";

/// Where the loader of a program lies that is not linked statically.
const LIBRARIES: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"];
/// The processor, the network card's other end, and what a pager may have it open
/// ([`crate::pager::inject`]).
const DEVICES: [&str; 3] = ["/dev/kvm", "/dev/net/tun", "/dev/userfaultfd"];

/// Starts `spec` and boots its kernel. See [`crate::vmm::spawn`].
///
/// # Errors
/// See [`SpawnVmmError`]. Nothing is left running.
pub fn boot(
    spec: &VmmSpec,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    let memory = MemoryFrom::Inherited(ram.as_raw_fd());
    let machine = config::machine(spec, memory).map_err(SpawnVmmError::Spec)?;
    let young = Young::start(spec, name, ram, None)?;
    let told = young.boot(&machine, deadline);
    young.grown(spec, told)
}

/// Starts a machine for the guest in `state`, which was saved on `hardware`. See
/// [`crate::vmm::spawn_incoming`].
///
/// # Errors
/// See [`SpawnVmmError`]. Nothing is left running.
pub fn incoming(
    spec: &VmmSpec,
    hardware: &Hardware,
    state: BorrowedFd<'_>,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    let saved = (hardware, state);
    bring_back(spec, saved, name, ram, MemoryMode::Precopy, deadline)
}

fn bring_back(
    spec: &VmmSpec,
    (hardware, state): (&Hardware, BorrowedFd<'_>),
    name: &str,
    ram: BorrowedFd<'_>,
    mode: MemoryMode,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    let machine = config::machine(spec, MemoryFrom::HandOver).map_err(SpawnVmmError::Spec)?;
    let kept = read_kept(state, hardware, spec.memory).map_err(SpawnVmmError::Saved)?;
    let document = kept.foundation.config_with(&machine);
    let document = document.map_err(SpawnVmmError::Saved)?;
    let meeting = Meeting::create(&home_of(name)).map_err(|source| start_failed(spec, source))?;
    let mut young = Young::start(spec, name, ram, Some(meeting))?;
    let told = young.receive(hardware, &kept, &document, mode, deadline);
    young.grown(spec, told)
}

/// As [`incoming`], but Cloud Hypervisor asks for each page of the guest by itself. See
/// [`crate::vmm::spawn_asking`].
///
/// # Errors
/// See [`SpawnVmmError`]. Nothing is left running.
pub fn asking(
    spec: &VmmSpec,
    hardware: &Hardware,
    state: BorrowedFd<'_>,
    name: &str,
    ram: BorrowedFd<'_>,
    deadline: Instant,
) -> Result<Started, SpawnVmmError> {
    let saved = (hardware, state);
    bring_back(spec, saved, name, ram, MemoryMode::Postcopy, deadline)
}

/// The saved guest in `state`, from its beginning on, without moving its position.
fn read_kept(state: BorrowedFd<'_>, hardware: &Hardware, memory: Mib) -> Result<Kept, KeptError> {
    let garbled = |_: io::Error| KeptError::Garbled;
    let file = File::from(state.try_clone_to_owned().map_err(garbled)?);
    let bytes = file.metadata().map_err(garbled)?.len();
    let bytes = usize::try_from(bytes.min(kept::MAX_BYTES)).map_err(|_| KeptError::Garbled)?;
    let mut content = vec![0; bytes];
    file.read_exact_at(&mut content, 0).map_err(garbled)?;
    let kept = Kept::decode(&content, memory.bytes())?;
    if kept.machine == hardware.machine {
        return Ok(kept);
    }
    Err(KeptError::Foreign(ForeignStateError::OtherMachine {
        found: kept.machine,
        wanted: hardware.machine.clone(),
    }))
}

/// A process that has no guest yet. Dropped, it is killed.
struct Young {
    process: Arc<VmmProcess>,
    api: Api,
    api_inode: OwnedFd,
    saves: Nameless,
    meeting: Option<Meeting>,
    mounted_meeting: Option<&'static Path>,
    events: Events,
    memory: OwnedFd,
    region: Region,
    console: UnixStream,
    stderr: ChildStderr,
    spawned: Instant,
}

/// What has become of a young process.
struct Told {
    known: Known,
    version_text: String,
    hardware: Hardware,
    incoming: Option<Incoming>,
}

/// Why it has come to nothing.
enum Failed {
    Spec(SpecError),
    Talk(TalkError),
}

impl<E: Into<TalkError>> From<E> for Failed {
    fn from(err: E) -> Self {
        Self::Talk(err.into())
    }
}

/// What a process talks by: our ends, and those that it inherits.
struct Ends {
    api: Nameless,
    saves: Nameless,
    console: (UnixStream, UnixStream),
    reports: (PipeReader, PipeWriter),
}

impl Ends {
    fn make(spec: &VmmSpec, home: &Path) -> io::Result<Self> {
        let ends = Self {
            api: Nameless::bind(home)?,
            saves: Nameless::bind(home)?,
            console: UnixStream::pair()?,
            reports: io::pipe()?,
        };
        if let Some(user) = spec.confinement.user {
            ends.saves.give_to(user)?;
        }
        Ok(ends)
    }

    /// The jail of a process that inherits what it needs of these.
    fn jail(
        &self,
        spec: &VmmSpec,
        ram: BorrowedFd<'_>,
        meeting: Option<&Meeting>,
        netns: Option<OwnedFd>,
    ) -> Result<Jail, JailError> {
        let mut inherited = vec![
            ram,
            self.api.listener().as_fd(),
            self.saves.inode(),
            self.reports.1.as_fd(),
        ];
        // A descriptor of a directory of the host's would be a way out of its own root.
        let mounted = mounted_meeting(spec);
        inherited.extend(meeting.filter(|_| mounted.is_none()).map(Meeting::dir));
        let met = meeting.map(Meeting::path);
        let rules = allowed(spec, mounted.or(met).filter(|_| meeting.is_some()));
        let jail = Jail::new(netns, &inherited);
        spec.confinement.apply(jail, spec, met, Some(rules))
    }
}

/// Where a process that has a root of its own meets us in there.
fn mounted_meeting(spec: &VmmSpec) -> Option<&'static Path> {
    spec.confinement.user.map(|_| Path::new(MEETING))
}

impl Young {
    fn start(
        spec: &VmmSpec,
        name: &str,
        ram: BorrowedFd<'_>,
        meeting: Option<Meeting>,
    ) -> Result<Self, SpawnVmmError> {
        if spec.accelerator != Accelerator::Kvm {
            return Err(SpawnVmmError::Spec(SpecError::UnknownHardware {
                what: "accelerator of Cloud Hypervisor",
                name: spec.accelerator.name().to_owned(),
            }));
        }
        let netns = open_netns(spec)?;
        let ends = Ends::make(spec, &home_of(name));
        let ends = ends.map_err(|source| start_failed(spec, source))?;
        let jail = ends.jail(spec, ram, meeting.as_ref(), netns)?;
        Self::exec(spec, name, ram, meeting, ends, jail)
            .map_err(|source| start_failed(spec, source))
    }

    fn exec(
        spec: &VmmSpec,
        name: &str,
        ram: BorrowedFd<'_>,
        meeting: Option<Meeting>,
        ends: Ends,
        jail: Jail,
    ) -> io::Result<Self> {
        let region = Region::new(spec.memory);
        let Ends {
            api,
            saves,
            console: (console, console_theirs),
            reports: (reports, reports_theirs),
        } = ends;
        let mut command = Command::new(&spec.program);
        command
            .arg0(first_argument(name))
            .args(arguments(
                api.listener().as_raw_fd(),
                reports_theirs.as_raw_fd(),
            ))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::from(OwnedFd::from(console_theirs)))
            .stderr(Stdio::piped());
        let spawned = Instant::now();
        let (mut child, group) = jail.start(&mut command)?;
        // The command holds the child's standard output too: ours must see its end.
        drop(command);
        let stderr = take_stderr(&mut child)?;
        let process = Arc::new(VmmProcess::new(child, group)?);
        // Only the child listens and reports from here on: its end is the end of both.
        drop(reports_theirs);
        let api_inode = api.into_inode();
        Ok(Self {
            api: Api::new(path_of(api_inode.as_fd())),
            api_inode,
            events: follow(reports, &process)?,
            process,
            saves,
            meeting,
            mounted_meeting: mounted_meeting(spec),
            memory: ram.try_clone_to_owned()?,
            region,
            console,
            stderr,
            spawned,
        })
    }

    fn boot(&self, machine: &config::VmConfig, deadline: Instant) -> Result<Told, Failed> {
        let (known, version_text) = self.meet(deadline)?;
        self.api.call(&Call::Create(machine), deadline)?;
        self.api.call(&Call::Boot, deadline)?;
        self.check_mapped()?;
        Ok(Told {
            known,
            version_text,
            hardware: machine::of_new_guests(known.version),
            incoming: None,
        })
    }

    fn receive(
        &mut self,
        hardware: &Hardware,
        kept: &Kept,
        document: &[u8],
        mode: MemoryMode,
        deadline: Instant,
    ) -> Result<Told, Failed> {
        let (known, version_text) = self.meet(deadline)?;
        let mounted = self.mounted_meeting;
        machine::check(hardware, known.version).map_err(Failed::Spec)?;
        let socket = |doing| move |source| TalkError::Socket { doing, source };
        let Some(meeting) = self.meeting.take() else {
            let source = io::ErrorKind::NotFound.into();
            return Err(socket("find the place for the hand-over")(source).into());
        };
        // Answered when all of it is over.
        let answer = self
            .api
            .begin(&Call::Receive(&meeting.url(mounted), mode), deadline)?;
        let stream = meeting.connect(self.process.pidfd(), deadline);
        let stream = stream.map_err(socket("meet the VMM for the hand-over"))?;
        let questions = match mode {
            MemoryMode::Precopy => None,
            MemoryMode::Postcopy => Some(self.be_asked(&meeting, kept, deadline)?),
        };
        // Whoever is killed from here on leaves no directory.
        drop(meeting);
        let slots = kept.foundation.slots();
        let given = link::give(stream, &slots, self.memory.as_fd(), document, deadline)?;
        self.check_mapped()?;
        Ok(Told {
            known,
            version_text,
            hardware: hardware.clone(),
            incoming: Some(Incoming {
                given,
                answer,
                foundation: kept.foundation.clone(),
                questions,
            }),
        })
    }

    /// The connection on which it will ask for pages. It waits for its turn on the other side, which
    /// looks for it when it is given the state.
    fn be_asked(
        &self,
        meeting: &Meeting,
        kept: &Kept,
        deadline: Instant,
    ) -> Result<Questions, Failed> {
        let doing = "meet the VMM for its questions";
        let socket = |source| TalkError::Socket { doing, source };
        let stream = meeting.connect(self.process.pidfd(), deadline);
        let mut stream = stream.map_err(socket)?;
        let role = codec::FAULT_ROLE.to_le_bytes();
        stream.write_all(&role).map_err(socket)?;
        let slots = kept.foundation.places();
        Ok(Questions { stream, slots })
    }

    /// Waits for its first answer, which tells its version.
    fn meet(&self, deadline: Instant) -> Result<(Known, String), Failed> {
        let pong = self.api.ping(deadline)?;
        let known = version::known(&pong.version)?;
        let text = if pong.build_version.is_empty() {
            pong.version
        } else {
            pong.build_version
        };
        Ok((known, text))
    }

    /// A slot that it has not mapped from our memory would read as zeros, without an error.
    fn check_mapped(&self) -> Result<(), Failed> {
        let doing = "look at the memory that the VMM has mapped";
        let socket = |source| TalkError::Socket { doing, source };
        let pid = self.process.pid();
        let target = Target::new(pid, pidfd_open(pid).map_err(socket)?);
        let layout = target.layout(self.memory.as_fd(), self.region);
        let layout = layout.map_err(|err| socket(io::Error::other(err)))?;
        let found = layout.mappings().iter().map(|it| it.bytes).sum();
        let wanted = self.region.bytes();
        if found == wanted {
            return Ok(());
        }
        Err(TalkError::HalfMapped { found, wanted }.into())
    }

    /// A driver for it, or the reason why there is none.
    fn grown(self, spec: &VmmSpec, told: Result<Told, Failed>) -> Result<Started, SpawnVmmError> {
        let told = match told {
            Ok(told) => told,
            Err(Failed::Spec(err)) => return Err(SpawnVmmError::Spec(err)),
            Err(Failed::Talk(err)) => return Err(not_up(spec, &self.process, self.stderr, err)),
        };
        let refusals = Refusals::default();
        let stderr = noise::filter(self.stderr, refusals.clone());
        let stderr = stderr.map_err(|source| start_failed(spec, source))?;
        let vmm = CloudHypervisor::new(
            self.process,
            (self.api, self.api_inode),
            self.saves,
            (self.events, refusals),
            (self.memory, self.region),
            (told.known, told.version_text, told.hardware),
            told.incoming,
        );
        Ok(Started {
            vmm: Box::new(vmm),
            console: self.console,
            stderr,
            took: self.spawned.elapsed(),
        })
    }
}

/// All that it may write or run: its disk, the devices it works with, itself and its loader.
fn allowed(spec: &VmmSpec, meeting: Option<&Path>) -> Vec<(PathBuf, Allowed)> {
    let mut allowed = vec![(spec.program.clone(), Allowed::Run)];
    allowed.extend(LIBRARIES.map(|libraries| (libraries.into(), Allowed::Run)));
    allowed.extend(DEVICES.map(|device| (device.into(), Allowed::Write)));
    allowed.extend(spec.root_disk.clone().map(|disk| (disk, Allowed::Write)));
    allowed.extend(meeting.map(|meeting| (meeting.to_owned(), Allowed::MakeSockets)));
    allowed
}

/// Reads its reports, and ends it if its guest resets itself.
fn follow(reports: PipeReader, process: &Arc<VmmProcess>) -> io::Result<Events> {
    let process = Arc::downgrade(process);
    Events::follow(reports, move || {
        if let Some(process) = process.upgrade() {
            // One that cannot be killed goes on with a guest that has begun anew.
            let _killed = process.kill();
        }
    })
}

fn start_failed(spec: &VmmSpec, source: io::Error) -> SpawnVmmError {
    SpawnVmmError::Start {
        program: spec.program.clone(),
        source,
    }
}

/// Where the places are made in which sockets are bound. A sandbox's guest is called by its directory,
/// and what is left there by a killed shim goes with it. The guest of a probe has none.
fn home_of(name: &str) -> PathBuf {
    let dir = Path::new(name);
    if dir.is_absolute() && dir.is_dir() {
        dir.to_owned()
    } else {
        env::temp_dir()
    }
}

/// By which a sweeper knows the process of `name`.
#[must_use]
pub fn first_argument(name: &str) -> OsString {
    format!("{NAME_PREFIX}{name}").into()
}

fn arguments(api: i32, reports: i32) -> Vec<String> {
    vec![
        "--api-socket".to_owned(),
        format!("fd={api}"),
        "--event-monitor".to_owned(),
        format!("fd={reports}"),
        // Its default, said all the same.
        "--seccomp".to_owned(),
        "true".to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a killed shim leaves goes with the sandbox then.
    #[test]
    fn sockets_of_a_sandbox_are_made_in_its_directory() {
        let dir = tempfile::tempdir().expect("tempdir");
        let name = dir.path().to_string_lossy();
        assert_eq!(home_of(&name), dir.path());
        for other in ["wrenn-probe", "", "/nonexistent/sandbox"] {
            assert_eq!(home_of(other), env::temp_dir(), "{other}");
        }
    }
}
