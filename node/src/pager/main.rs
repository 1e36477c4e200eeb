//! The pager process, from its first packet to its end.
//!
//! `wrenn pager --dir D` is started by a shim, with one end of a socket pair as its standard input.
//! It reads the page map while the shim starts a VMM, and is then told which one it is. It gets hold
//! of that (or of what a pager before it left there), gives up every right it needs no longer, starts
//! its threads, says that it serves, and then waits: for words of the shim, for the end of the VMM,
//! for the end of the shim. Whichever comes, there is nothing to clean up.
//!
//! No async runtime, no thread before the rights are gone, some ten threads of small stacks after.
//! Killed at any time it loses nothing but its counters and the unfinished recording of the working
//! set: page states are the shim's, the descriptor is the VMM's.
//!
//! | exit code | what it means | what the shim does |
//! |---|---|---|
//! | 0 | the VMM or the shim has ended | nothing |
//! | 1 | something broke, or one fault took [`STUCK`]; [`FAILURE`] says what | starts another |
//! | 3 | the guest cannot go on; [`FAILURE`] says why | stops the guest |

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

use crate::base::chain::chain;
use crate::base::fault;
use crate::pager::control::{Channel, FromPager, Setup, ToPager};
use crate::pager::layout::Layout;
use crate::pager::page_map::{PAGES, PageMap, PageMapError};
use crate::pager::pages::PageSet;
use crate::pager::post_copy::{Answerer, Questions};
use crate::pager::region::Region;
use crate::pager::serve::{OnFailure, ServeError, Server};
use crate::pager::source::{Daemon, ImageSource};
use crate::pager::states::StateTable;
use crate::pager::stats::Counters;
use crate::pager::target::{AttachError, Target};
use crate::pager::uffd::sys::keep_capabilities;
use crate::pager::uffd::{Tracking, Uffd};
use crate::pager::working_set::{Recorder, WorkingSet};
use crate::pager::{prefetch, probe};

/// The argument that makes `wrenn` a pager.
pub const COMMAND: &str = "pager";
/// The option before the sandbox's directory.
pub const DIR_OPTION: &str = "--dir";
/// Instead of that: only waits, and is what [`probe`] tries on.
pub const PROBE_OPTION: &str = "--probe";
/// The file, in that directory, with the reason of a failed pager.
pub const FAILURE: &str = "pager-failure.txt";
/// The exit code of a pager whose guest cannot go on.
pub const GONE: u8 = 3;
/// Where a test may end the process in the middle of an injection.
pub const INJECTING: &str = "pager-injecting";

/// Longest that one fault whose window lies on this node may take: a disk that is slow, not one that
/// hangs. Whoever takes over begins the fault anew.
const STUCK: Duration = Duration::from_secs(15);
/// Longest time the VMM's thread may take to stop. It waits for an event, and stops at once.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
/// `CAP_DAC_READ_SEARCH`: packs may lie below a directory that only a person may enter.
const KEPT_CAPABILITIES: u64 = 1 << 2;

/// Why a pager did not come to serve.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{doing}")]
    System {
        doing: &'static str,
        source: io::Error,
    },
    #[error("the shim said something else than what to serve")]
    Unexpected,
    #[error("read the page map")]
    Map(#[from] PageMapError),
    #[error("the page map is of {found} bytes of memory, the guest has {expected}")]
    OtherImage { found: u64, expected: u64 },
    #[error("get hold of the VMM")]
    Attach(#[from] AttachError),
    #[error("start to serve")]
    Serve(#[from] ServeError),
    #[error("the VMM has closed the descriptor of its page faults: what it read since is wrong")]
    DescriptorLost,
}

fn system(doing: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::System { doing, source }
}

/// Runs `wrenn pager` with the arguments that follow the word.
#[must_use]
pub fn main(args: &[OsString]) -> ExitCode {
    if args == [PROBE_OPTION] {
        let waited = probe::wait();
        return waited.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let [option, dir] = args else {
        return usage();
    };
    if option != DIR_OPTION {
        return usage();
    }
    let dir = PathBuf::from(dir);
    // Should it hang, or be stopped, when its shim is killed: nothing may be left of a sandbox. A
    // shim that is dead by now has closed the socket.
    let _best_effort = prctl::set_pdeathsig(Signal::SIGKILL);
    match start(&dir) {
        Ok(None)
        | Err(StartError::Attach(AttachError::Ended) | StartError::Serve(ServeError::Ended)) => {
            ExitCode::SUCCESS
        }
        Ok(Some(mut pager)) => {
            // Where it was not told of an end, another pager is to go on.
            if let Err(err) = pager.attend() {
                leave_reason(&dir, &chain(&err));
                return ExitCode::FAILURE;
            }
            ExitCode::SUCCESS
        }
        Err(err) => {
            leave_reason(&dir, &chain(&err));
            match err {
                StartError::DescriptorLost => ExitCode::from(GONE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn usage() -> ExitCode {
    let text = "usage: wrenn pager --dir <sandbox directory>, by a shim";
    // Nobody may be listening; the exit code tells as well.
    let _unheard = writeln!(io::stderr(), "{text}");
    ExitCode::FAILURE
}

/// For the shim, which reads it after the exit code. A crash of the host makes it meaningless, so
/// it is not made durable.
fn leave_reason(dir: &Path, reason: &str) {
    let _unheard = writeln!(io::stderr(), "pager: {reason}");
    let _no_disk = fs::write(dir.join(FAILURE), reason);
}

/// A pager that serves.
struct Pager {
    channel: Channel,
    target: Target,
    work: Work,
    daemon: Arc<Daemon>,
    record_to: Option<PathBuf>,
    takeovers: u64,
}

/// How pages are known to be missing.
enum Work {
    /// The VMM's page faults are ours.
    Serve(Arc<Server>),
    /// The VMM asks.
    Answer(Arc<Answerer>),
}

impl Work {
    fn counters(&self) -> &Counters {
        match self {
            Self::Serve(server) => server.counters(),
            Self::Answer(answerer) => answerer.counters(),
        }
    }

    fn pushing_done(&self) -> bool {
        match self {
            Self::Serve(server) => server.pushing_done(),
            Self::Answer(answerer) => answerer.pushing_done(),
        }
    }

    fn serving_for(&self) -> Option<Duration> {
        match self {
            Self::Serve(server) => server.serving_for(),
            // It asks for one page at a time, and has its own ways to wait.
            Self::Answer(_) => None,
        }
    }
}

/// What a pager has been told.
struct Told {
    dir: PathBuf,
    setup: Setup,
    channel: Channel,
    memory: OwnedFd,
    target: Target,
    table: Arc<StateTable>,
    map: PageMap,
}

/// `None` if the shim is gone before it said anything.
fn start(dir: &Path) -> Result<Option<Pager>, StartError> {
    let channel = Channel::of_stdin().map_err(system("take the shim's socket"))?;
    // It takes milliseconds, in which the shim has other things to do than to wait for us.
    let ahead = MapAhead::read(dir);
    let heard = channel.receive().map_err(system("hear from the shim"))?;
    let Some((message, fds)) = heard else {
        return Ok(None);
    };
    let ToPager::Setup(setup) = message else {
        return Err(StartError::Unexpected);
    };
    let ([memory, states, vmm], asking) = split(fds)?;
    let map = ahead.of(&setup.pages)?;
    let region = map.region();
    if region.bytes() != setup.memory_bytes {
        return Err(StartError::OtherImage {
            found: region.bytes(),
            expected: setup.memory_bytes,
        });
    }
    let table = StateTable::map(&states, region).map_err(system("map the page states"))?;
    let told = Told {
        dir: dir.to_owned(),
        target: Target::new(setup.vmm_pid, vmm),
        table: Arc::new(table),
        setup,
        channel,
        memory,
        map,
    };
    match (told.setup.slots.clone(), asking) {
        (Some(slots), Some(stream)) => told.answer(Questions::of_parts(stream, slots)).map(Some),
        (None, None) => told.serve().map(Some),
        _ => Err(StartError::Unexpected),
    }
}

/// The page map where it always lies, read before it is known which one is to be served.
struct MapAhead {
    path: PathBuf,
    /// `None` if there was none that could be read yet.
    map: Option<PageMap>,
}

impl MapAhead {
    fn read(dir: &Path) -> Self {
        let path = dir.join(PAGES);
        Self {
            // Should it be the one to serve, it is read again, and that says what is wrong.
            map: PageMap::read(&path).ok(),
            path,
        }
    }

    /// The map at `path`.
    fn of(self, path: &Path) -> Result<PageMap, PageMapError> {
        match self.map {
            Some(map) if self.path == path => Ok(map),
            _ => PageMap::read(path),
        }
    }
}

impl Told {
    /// Gets hold of the VMM's page faults, and serves them.
    fn serve(self) -> Result<Pager, StartError> {
        let region = self.map.region();
        let layout = self.target.layout(self.memory.as_fd(), region)?;
        let uffd = self.attach(&layout)?;
        give_up_rights();
        let tracking = uffd.tracking();
        let set = read_working_set(&self.setup);
        let recorder = recorder(&self.setup, region, &set);
        let (daemon, on_failure) = (self.daemon(), self.on_failure());
        let source = ImageSource::new(self.map, Box::new(Arc::clone(&daemon)));
        let (table, source) = (self.table, Box::new(source));
        let server = Server::new(uffd, layout, table, source, recorder, on_failure);
        let server = Arc::new(server);
        server.start()?;
        tell_serving(&self.channel, tracking)?;
        prefetch::start(&server, &set, self.setup.fill)?;
        Ok(Pager {
            channel: self.channel,
            target: self.target,
            work: Work::Serve(server),
            daemon,
            record_to: self.setup.record_to,
            takeovers: self.setup.takeovers,
        })
    }

    /// The VMM's userfaultfd, made or found, and page states that agree with what is there.
    fn attach(&self, layout: &Layout) -> Result<Uffd, StartError> {
        let (target, takeovers) = (&self.target, self.setup.takeovers);
        // It was there when the guest began to run. Made anew it would serve what is missing from now
        // on, and nobody would see what was read as zero before.
        if takeovers > 0 && !target.has_userfaultfd()? {
            return Err(StartError::DescriptorLost);
        }
        let announce = || {
            // A shim that does not hear it is gone, and its VMM with it.
            let _unheard = self.channel.send(&FromPager::Injecting, &[]);
            fault::point(INJECTING);
        };
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        let (uffd, found) = target.attach(layout, self.setup.tracking, announce, deadline)?;
        match (found, takeovers) {
            (true, _) => self.repair()?,
            (false, 0) => {
                let emptied = discard_all(self.memory.as_fd(), self.map.region());
                emptied.map_err(system("empty the guest's memory"))?;
            }
            (false, _) => return Err(StartError::DescriptorLost),
        }
        Ok(uffd)
    }

    /// Answers a VMM that asks for pages, and touches nothing of it.
    fn answer(self, questions: Questions) -> Result<Pager, StartError> {
        self.repair()?;
        give_up_rights();
        let (daemon, on_failure) = (self.daemon(), self.on_failure());
        let source = Box::new(ImageSource::new(self.map, Box::new(Arc::clone(&daemon))));
        let memory = self.memory.as_fd();
        let answerer = Answerer::new(questions, memory, self.table, source, on_failure);
        let answerer = Arc::new(answerer.map_err(system("keep the guest's memory"))?);
        answerer.start(self.setup.takeovers > 0)?;
        tell_serving(&self.channel, Tracking::Compare)?;
        Ok(Pager {
            channel: self.channel,
            target: self.target,
            work: Work::Answer(answerer),
            daemon,
            record_to: None,
            takeovers: self.setup.takeovers,
        })
    }

    fn repair(&self) -> Result<(), StartError> {
        let existing = PageSet::present_in(self.memory.as_fd(), self.map.region());
        self.table
            .repair(&existing.map_err(system("list the pages of the guest"))?);
        Ok(())
    }

    fn daemon(&self) -> Arc<Daemon> {
        let (socket, sandbox) = (self.setup.daemon.clone(), self.setup.sandbox.clone());
        Arc::new(Daemon::new(socket, sandbox))
    }

    fn on_failure(&self) -> OnFailure {
        let dir = self.dir.clone();
        Box::new(move |err| fail(&dir, &err))
    }
}

fn tell_serving(channel: &Channel, tracking: Tracking) -> Result<(), StartError> {
    channel
        .send(&FromPager::Serving { tracking }, &[])
        .map_err(system("tell the shim"))
}

/// The three descriptors that every pager is given, and the fourth that some are.
fn split(mut fds: Vec<OwnedFd>) -> Result<([OwnedFd; 3], Option<OwnedFd>), StartError> {
    let asking = (fds.len() == 4).then(|| fds.pop()).flatten();
    let fds = <[OwnedFd; 3]>::try_from(fds).map_err(|_| StartError::Unexpected)?;
    Ok((fds, asking))
}

/// What a VMM put into its memory before the guest was resumed is not the image's: its pages are to
/// be brought like all others. QEMU leaves none.
fn discard_all(memory: BorrowedFd<'_>, region: Region) -> io::Result<()> {
    let length = i64::try_from(region.bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(memory, punch, 0, length)?)
}

/// A set that cannot be read is none: the guest comes up all the same.
fn read_working_set(setup: &Setup) -> WorkingSet {
    let path = setup.working_set.as_ref();
    path.map_or_else(WorkingSet::default, |path| {
        WorkingSet::read(path).unwrap_or_else(|err| {
            let _unheard = writeln!(io::stderr(), "pager: go without: {}", chain(&err));
            WorkingSet::default()
        })
    })
}

/// Records nothing where it is not to be saved.
fn recorder(setup: &Setup, region: Region, set: &WorkingSet) -> Recorder {
    let mut recorder = Recorder::new(region, set);
    if setup.record_to.is_none() {
        recorder.finish();
    }
    recorder
}

/// What is left is reading files, and what the descriptors allow.
fn give_up_rights() {
    // A caller that has few rights keeps none.
    let kept = keep_capabilities(KEPT_CAPABILITIES).or_else(|_| keep_capabilities(0));
    let done = kept
        .and_then(|()| prctl::set_no_new_privs())
        // A core file would hold what the guest holds.
        .and_then(|()| setrlimit(Resource::RLIMIT_CORE, 0, 0));
    if let Err(errno) = done {
        let _unheard = writeln!(io::stderr(), "pager: give up rights: {errno}");
    }
}

/// Ends the process, since the guest cannot be served any more.
fn fail(dir: &Path, err: &ServeError) {
    let code = match err {
        // The thread that waits for the end of the VMM sees it once all of the VMM is gone.
        ServeError::Ended => return,
        ServeError::Source(_) => i32::from(GONE),
        ServeError::Kernel { .. } => 1,
    };
    leave_reason(dir, &chain(err));
    process::exit(code);
}

impl Pager {
    /// Returns when the VMM or the shim has ended.
    fn attend(&mut self) -> io::Result<()> {
        loop {
            let mut events = [
                PollFd::new(self.target.pidfd(), PollFlags::POLLIN),
                PollFd::new(self.channel.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut events, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if events[0].any() == Some(true) {
                return Ok(());
            }
            match self.channel.receive()? {
                Some((ToPager::Ready, _)) => self.save_working_set(),
                Some((ToPager::Tell, _)) => {
                    if let Some(since) = self.work.serving_for().filter(|it| *it >= STUCK) {
                        let reason = format!("one page fault took {since:?}");
                        return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
                    }
                    self.tell();
                }
                Some((ToPager::Setup(_), _)) => {}
                None => return Ok(()),
            }
        }
    }

    fn save_working_set(&self) {
        let Work::Serve(server) = &self.work else {
            // All of it is brought: there is no set to record.
            return;
        };
        let recorded = server.recorder().finish();
        if let (Some(set), Some(path)) = (recorded, &self.record_to)
            && let Err(err) = set.write(path)
        {
            let _unheard = writeln!(io::stderr(), "pager: {}", chain(&err));
        }
    }

    fn tell(&self) {
        let mut stats = self.work.counters().tell();
        stats.stalled_questions = self.daemon.stalled();
        stats.pushing_done = self.work.pushing_done();
        stats.takeovers = self.takeovers;
        // The end of the stream follows and is noticed.
        let _unheard = self.channel.send(&FromPager::Told(stats), &[]);
    }
}
