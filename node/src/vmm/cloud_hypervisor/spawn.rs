//! Starting Cloud Hypervisor: sockets, the jail around the child, and what it is told until a guest
//! is in it.
//!
//! ```text
//! boot      exec > ping (which version?) > create > boot
//! incoming  exec > ping > receive … Start > MemoryFd x slots > Config … (its memory is mapped)
//! ```
//!
//! It inherits the guest's memory, the socket of its API, a pipe for its reports, and what it needs
//! to lay its guest open or to take one in. Its standard output is the guest's console. The name by
//! which a sweeper finds it is its first argument: it has no option for one.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use proto::units::Mib;

use crate::pager::region::Region;
use crate::pager::target::Target;
use crate::vmm::child::{not_up, open_netns, take_stderr};
use crate::vmm::cloud_hypervisor::api::{Api, Call};
use crate::vmm::cloud_hypervisor::config::{self, MemoryFrom};
use crate::vmm::cloud_hypervisor::events::Events;
use crate::vmm::cloud_hypervisor::kept::{self, Kept, KeptError};
use crate::vmm::cloud_hypervisor::offload::link;
use crate::vmm::cloud_hypervisor::sockets::{Meeting, Nameless, path_of};
use crate::vmm::cloud_hypervisor::version::{self, Version};
use crate::vmm::cloud_hypervisor::{CloudHypervisor, Incoming, machine};
use crate::vmm::error::{ForeignStateError, SpecError, TalkError};
use crate::vmm::jail::{Allowed, FileRules, Jail, pidfd_open};
use crate::vmm::process::VmmProcess;
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
    let machine = config::machine(spec, MemoryFrom::HandOver).map_err(SpawnVmmError::Spec)?;
    let kept = read_kept(state, hardware, spec.memory).map_err(SpawnVmmError::Saved)?;
    let document = kept.foundation.config_with(&machine);
    let document = document.map_err(SpawnVmmError::Saved)?;
    let meeting = Meeting::create().map_err(|source| start_failed(spec, source))?;
    let young = Young::start(spec, name, ram, Some(meeting))?;
    let told = young.receive(hardware, &kept, &document, deadline);
    young.grown(spec, told)
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
    events: Events,
    memory: OwnedFd,
    region: Region,
    console: UnixStream,
    stderr: ChildStderr,
    spawned: Instant,
}

/// What has become of a young process.
struct Told {
    version: Version,
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
        let region = Region::new(spec.memory);
        Self::exec(spec, name, ram, region, meeting, netns)
            .map_err(|source| start_failed(spec, source))
    }

    fn exec(
        spec: &VmmSpec,
        name: &str,
        ram: BorrowedFd<'_>,
        region: Region,
        meeting: Option<Meeting>,
        netns: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let (api, saves) = (Nameless::bind()?, Nameless::bind()?);
        let (console, console_theirs) = UnixStream::pair()?;
        let (reports, reports_theirs) = io::pipe()?;
        let mut inherited = vec![
            ram,
            api.listener().as_fd(),
            saves.inode(),
            reports_theirs.as_fd(),
        ];
        inherited.extend(meeting.as_ref().map(Meeting::dir));
        let rules = file_rules(spec, meeting.as_ref())?;
        let jail = Jail::new(netns, &inherited).with_rules(rules);
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
        jail.confine(&mut command);
        let spawned = Instant::now();
        let mut child = command.spawn()?;
        // The command holds the child's standard output too: ours must see its end.
        drop(command);
        let stderr = take_stderr(&mut child)?;
        let process = Arc::new(VmmProcess::new(child)?);
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
            memory: ram.try_clone_to_owned()?,
            region,
            console,
            stderr,
            spawned,
        })
    }

    fn boot(&self, machine: &config::VmConfig, deadline: Instant) -> Result<Told, Failed> {
        let (version, version_text) = self.meet(deadline)?;
        self.api.call(&Call::Create(machine), deadline)?;
        self.api.call(&Call::Boot, deadline)?;
        self.check_mapped()?;
        Ok(Told {
            version,
            version_text,
            hardware: machine::of_new_guests(version),
            incoming: None,
        })
    }

    fn receive(
        &self,
        hardware: &Hardware,
        kept: &Kept,
        document: &[u8],
        deadline: Instant,
    ) -> Result<Told, Failed> {
        let (version, version_text) = self.meet(deadline)?;
        machine::check(hardware, version).map_err(Failed::Spec)?;
        let socket = |doing| move |source| TalkError::Socket { doing, source };
        let Some(meeting) = &self.meeting else {
            let source = io::ErrorKind::NotFound.into();
            return Err(socket("find the place for the hand-over")(source).into());
        };
        // Answered when all of it is over.
        let answer = self.api.begin(&Call::Receive(&meeting.url()), deadline)?;
        let stream = meeting.connect(self.process.pidfd(), deadline);
        let stream = stream.map_err(socket("meet the VMM for the hand-over"))?;
        let slots = kept.foundation.slots();
        let given = link::give(stream, &slots, self.memory.as_fd(), document, deadline)?;
        self.check_mapped()?;
        Ok(Told {
            version,
            version_text,
            hardware: hardware.clone(),
            incoming: Some(Incoming {
                given,
                answer,
                foundation: kept.foundation.clone(),
            }),
        })
    }

    /// Waits for its first answer, which tells its version.
    fn meet(&self, deadline: Instant) -> Result<(Version, String), Failed> {
        let pong = self.api.ping(deadline)?;
        let (version, _) = version::known(&pong.version)?;
        let text = if pong.build_version.is_empty() {
            pong.version
        } else {
            pong.build_version
        };
        Ok((version, text))
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
        let vmm = CloudHypervisor::new(
            self.process,
            (self.api, self.api_inode),
            self.saves,
            self.events,
            (self.memory, self.region),
            (told.version, told.version_text, told.hardware),
            told.incoming,
        );
        Ok(Started {
            vmm: Box::new(vmm),
            console: self.console,
            stderr: self.stderr,
            took: self.spawned.elapsed(),
        })
    }
}

/// All that it may write or run: its disk, the devices it works with, itself and its loader.
fn file_rules(spec: &VmmSpec, meeting: Option<&Meeting>) -> io::Result<Option<FileRules>> {
    let Some(rules) = FileRules::nothing()? else {
        return Ok(None);
    };
    rules.allow(&spec.program, Allowed::Run)?;
    for libraries in LIBRARIES {
        rules.allow(Path::new(libraries), Allowed::Run)?;
    }
    for device in DEVICES {
        rules.allow(Path::new(device), Allowed::Write)?;
    }
    if let Some(disk) = &spec.root_disk {
        rules.allow(disk, Allowed::Write)?;
    }
    if let Some(meeting) = meeting {
        rules.allow(meeting.path(), Allowed::MakeSockets)?;
    }
    Ok(Some(rules))
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
