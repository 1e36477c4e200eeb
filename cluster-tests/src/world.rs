//! A real daemon with a data directory, ports and network slots of its own.
//!
//! As many worlds exist at once as there are places ([`place`]); whoever wants one more waits. What the
//! first daemon finds out about the accelerator is passed on to the others, since on a host whose
//! KVM runs no guests finding out takes longer than most tests.

mod place;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use std::{env, fs, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use self::place::{PLACES, Place, SLOTS};
use crate::client::wait_for;
use crate::leaks;

pub(crate) use self::place::Site;

/// Longest a daemon may take to be ready: it may have to probe the accelerator with a real boot.
const READY_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest a daemon or a sandbox may take to let go of what it has.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between two looks at something that another process changes.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Slots that a daemon keeps ready.
const SLOT_POOL: u16 = 2;

/// Whether capsules start from a guest that had just booted; off in a world unless it says otherwise.
pub const WARM_CREATE: &str = "WRENN_WARM_CREATE";
/// The variable in which a daemon finds the token it joins with.
const JOIN_TOKEN: &str = "WRENN_JOIN_TOKEN";

/// What a daemon has found out about the accelerator: files of its data directory.
static PROBED: Mutex<Option<Probed>> = Mutex::new(None);

/// The remembered outcome, and the file without which a daemon takes no directory for its own.
struct Probed {
    version: Vec<u8>,
    outcome: Vec<u8>,
}

/// One daemon, and what it needs to be started again.
#[derive(Debug)]
pub struct World {
    dir: TempDir,
    process: Option<Child>,
    has_own_disk: bool,
    /// Extra arguments of `node start`.
    pub arguments: Vec<String>,
    /// Extra environment of the daemon.
    pub environment: Vec<(String, String)>,
    /// What starts the daemon in its own place, if anything: a program that becomes the one named by
    /// its last arguments, under the same process id.
    pub launcher: Vec<String>,
    /// The guest images.
    pub images: PathBuf,
    /// How many network slots the daemon may have.
    pub slots: u16,
    site: Site,
    /// Whose first key opens this one's API, where that is another.
    founder: Option<PathBuf>,
    // Last, since fields are dropped in order: the place is free once everything is gone.
    place: Option<Place>,
}

impl World {
    /// A world whose daemon is ready.
    #[must_use]
    pub fn new() -> Self {
        let mut world = Self::asleep();
        world.start();
        world
    }

    /// A world whose daemon has never been started.
    ///
    /// # Panics
    /// Where the images have not been built: a test of the real thing needs them.
    #[must_use]
    pub fn asleep() -> Self {
        let place = PLACES.take();
        let mut world = Self::at(place::site(&place));
        world.place = Some(place);
        world
    }

    /// A world at `site`, whose daemon has never been started.
    pub(crate) fn at(site: Site) -> Self {
        assert!(
            images().join("initramfs").exists(),
            "no guest images; run deploy/test real-vm"
        );
        let dir = tempfile::Builder::new()
            .prefix("wrenn-test-")
            .tempdir()
            .expect("a temp dir");
        Self {
            dir,
            process: None,
            has_own_disk: false,
            arguments: Vec::new(),
            environment: Vec::new(),
            launcher: Vec::new(),
            images: images(),
            slots: SLOTS,
            site,
            founder: None,
            place: None,
        }
    }

    /// Puts the data directory, which must not exist yet, on a disk of its own.
    ///
    /// # Panics
    /// Where nothing can be mounted.
    pub fn use_small_disk(&mut self, mib: u32) {
        fs::create_dir(self.data()).expect("a new directory");
        let options = format!("size={mib}m");
        let flags = nix::mount::MsFlags::empty();
        let (kind, options) = (Some("tmpfs"), Some(options.as_str()));
        nix::mount::mount(kind, &self.data(), kind, flags, options).expect("a tmpfs");
        self.has_own_disk = true;
    }

    /// Puts the data directory, which must not exist yet, on a file system of its own on a device of
    /// its own.
    ///
    /// # Panics
    /// Where there is no loop device to be had.
    pub fn use_own_disk(&mut self, mib: u64) {
        fs::create_dir(self.data()).expect("a new directory");
        let image = self.dir.path().join("disk");
        let file = fs::File::create_new(&image).expect("a new file");
        file.set_len(mib << 20).expect("a sparse file");
        let done = |command: &mut Command| {
            let status = command.stdin(Stdio::null()).status();
            assert!(status.expect("it is installed").success(), "{command:?}");
        };
        done(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        // The device goes with the mount.
        done(
            Command::new("mount")
                .args(["-o", "loop"])
                .args([&image, &self.data()]),
        );
        self.has_own_disk = true;
    }

    /// Where everything of this world lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon's data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The directory of one sandbox.
    #[must_use]
    pub fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.data().join("sandboxes").join(id)
    }

    /// The API's port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.site.port
    }

    /// The port of the cluster (UDP); the one after it is for bulk transfers.
    #[must_use]
    pub const fn cluster_port(&self) -> u16 {
        self.site.cluster_port
    }

    /// The API's base URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    /// Makes this daemon a member of the cluster that `founder` founded: it joins with `token` when
    /// it is started for the first time.
    pub(crate) fn join(&mut self, founder: &Self, token: &str) {
        self.founder = Some(founder.data());
        self.environment.retain(|(name, _)| name != JOIN_TOKEN);
        let variable = (JOIN_TOKEN.to_owned(), token.to_owned());
        self.environment.push(variable);
    }

    /// The bootstrap key.
    ///
    /// # Panics
    /// Before the first start.
    #[must_use]
    pub fn key(&self) -> String {
        let data = self.founder.clone().unwrap_or_else(|| self.data());
        let key = fs::read_to_string(data.join("bootstrap.key")).expect("a bootstrap key");
        key.trim().to_owned()
    }

    /// Starts the daemon and waits until it is ready.
    ///
    /// # Panics
    /// When it does not get ready; its log is shown.
    pub fn start(&mut self) {
        // Held only by the first: whoever finds a result passes it on and starts at once.
        let probed = PROBED.lock().unwrap_or_else(PoisonError::into_inner);
        let first = match &*probed {
            Some(known) => {
                self.hand_on_probe(known);
                None
            }
            None => Some(probed),
        };
        self.spawn();
        self.wait_ready();
        if let Some(mut probed) = first {
            *probed = Some(Probed {
                version: fs::read(self.data().join("version")).expect("a version"),
                outcome: fs::read(self.probe_file()).expect("an outcome"),
            });
        }
    }

    /// Starts the daemon with what is known of the accelerator, and does not wait.
    pub fn begin(&mut self) {
        let probed = PROBED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*probed {
            self.hand_on_probe(known);
        }
        drop(probed);
        self.spawn();
    }

    /// Waits until the daemon is ready.
    ///
    /// # Panics
    /// When it does not get ready; its log is shown.
    pub fn wait_ready(&mut self) {
        let ready = wait_for(READY_TIMEOUT, || {
            assert!(self.is_alive(), "the daemon ended:\n{}", self.log());
            self.is_ready().then_some(())
        });
        assert!(ready.is_some(), "the daemon is not ready:\n{}", self.log());
    }

    fn probe_file(&self) -> PathBuf {
        self.data().join("cache/probe.json")
    }

    /// Other images or another QEMU do not match what is remembered, and are tried anew.
    fn hand_on_probe(&self, probed: &Probed) {
        if !self.data().join("version").exists() {
            fs::create_dir_all(self.data().join("cache")).expect("a directory");
            fs::write(self.probe_file(), &probed.outcome).expect("a file");
            fs::write(self.data().join("version"), &probed.version).expect("a file");
        }
    }

    /// Starts the daemon and does not wait.
    ///
    /// # Panics
    /// When the binary cannot be run.
    pub fn spawn(&mut self) {
        let _old = fs::remove_file(self.data().join("ready.json"));
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .expect("a log file");
        let mut command = self.command();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log);
        self.process = Some(command.spawn().expect("the wrenn binary runs"));
    }

    /// The command that starts the daemon.
    #[must_use]
    pub fn command(&self) -> Command {
        let address = |port| format!("127.0.0.1:{port}");
        let mut words = self.launcher.iter().map(OsString::from);
        let mut command = match words.next() {
            None => Command::new(wrenn()),
            Some(program) => {
                let mut command = Command::new(program);
                command.args(words).arg(wrenn());
                command
            }
        };
        command
            .args(["node", "start", "--name", &self.site.name])
            .arg("--data-dir")
            .arg(self.data())
            .arg("--images-dir")
            .arg(&self.images)
            .args(["--listen", &address(self.site.port)])
            .args(["--cluster-listen", &address(self.site.cluster_port)])
            .args(["--slot-base", &self.site.slot_base.to_string()])
            .args(["--slot-count", &self.slots.to_string()])
            .args(["--slot-pool", &SLOT_POOL.to_string()])
            .args(&self.arguments)
            .env("NO_COLOR", "1")
            // How a capsule starts must not depend on which ones were started before.
            .env(WARM_CREATE, "false")
            .envs(self.environment.clone());
        command
    }

    fn is_ready(&self) -> bool {
        self.data().join("ready.json").exists()
            && self
                .get("/healthz")
                .is_some_and(|answer| answer.status == 200)
    }

    /// Whether the daemon's process lives.
    pub fn is_alive(&mut self) -> bool {
        match &mut self.process {
            Some(process) => process.try_wait().expect("an own child").is_none(),
            None => false,
        }
    }

    /// Waits until the daemon's process has ended by itself; tells how.
    ///
    /// # Panics
    /// When it has not after a while.
    pub fn wait_end(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("a started daemon");
        let ended = wait_for(READY_TIMEOUT, || process.try_wait().expect("an own child"));
        if ended.is_none() {
            let log = self.log();
            self.process = Some(process);
            panic!("the daemon does not end:\n{log}");
        }
        ended.expect("it has ended")
    }

    /// The daemon's process id.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running daemon").id()
    }

    /// Ends the daemon as a power cut would: no goodbye.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _gone = process.kill();
            let _status = process.wait();
        }
    }

    /// Asks the daemon to stop and waits until it has.
    ///
    /// # Panics
    /// When it cannot be signalled, does not end, or ends with an error.
    pub fn stop(&mut self) {
        signal(self.pid(), Signal::SIGTERM);
        let status = self.wait_end();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Everything the daemon has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("node.log")
    }

    /// What this world has on the host now.
    #[must_use]
    pub fn footprint(&self) -> BTreeSet<String> {
        leaks::of_node(&self.slot_tag(), self.dir.path())
    }

    /// What this world has on the host beyond a daemon whose sandboxes are `live`: one shim, one
    /// VMM, one directory and one network slot each, and the slots that are kept ready. One that was
    /// resumed has a pager as well.
    ///
    /// # Panics
    /// When the daemon does not run.
    #[must_use]
    pub fn excess(&self, live: &[&str]) -> Vec<String> {
        let daemon = format!("process {} ", self.pid());
        let (mut excess, mut slots) = (Vec::new(), 0);
        let mut awaited: Vec<(&str, usize)> = live.iter().map(|id| (*id, 2)).collect();
        for trace in self.footprint() {
            let of = awaited.iter_mut().find(|(id, _)| trace.contains(*id));
            match of {
                Some(_) if trace.starts_with("process") && trace.contains(" pager ") => {}
                Some((_, processes @ 1..)) if trace.starts_with("process") => *processes -= 1,
                _ if trace.starts_with(&daemon) || trace.starts_with("nft") => {}
                _ if trace.starts_with("mount") && self.has_own_disk => {}
                _ if trace.starts_with("netns") || trace.starts_with("link") => slots += 1,
                _ => excess.push(trace),
            }
        }
        let missing = awaited.iter().filter(|(_, processes)| *processes > 0);
        excess.extend(missing.map(|(id, _)| format!("no shim or no VMM of {id}")));
        // A namespace and a link on the host each.
        let expected = 2 * (usize::from(SLOT_POOL.min(self.slots)) + live.len());
        if slots != expected.min(2 * usize::from(self.slots)) {
            excess.push(format!("{slots} namespaces and links, not {expected}"));
        }
        excess.extend(self.sandbox_dirs().filter(|dir| !live.contains(&&**dir)));
        excess
    }

    fn sandbox_dirs(&self) -> impl Iterator<Item = String> {
        let dirs = fs::read_dir(self.data().join("sandboxes")).into_iter();
        dirs.flatten()
            .flatten()
            .filter_map(|dir| dir.file_name().into_string().ok())
    }

    /// Waits until the host carries exactly what the sandboxes in `live` and an idle daemon need.
    ///
    /// # Panics
    /// When something else stays.
    pub fn wait_only(&self, live: &[&str]) {
        let clean = wait_for(RELEASE_TIMEOUT, || {
            self.excess(live).is_empty().then_some(())
        });
        if clean.is_none() {
            panic!("too much or too little: {:#?}", self.excess(live));
        }
    }

    /// The tag in the names of this world's network slots.
    #[must_use]
    pub fn slot_tag(&self) -> String {
        fs::read_to_string(self.data().join("net/tag"))
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    /// Ends everything this world left on the host; tells what went wrong.
    pub(crate) fn clean_up(&mut self) -> Result<(), String> {
        self.kill();
        if self.data().join("version").exists() {
            let cleaned = Command::new(wrenn())
                .args(["node", "clean-up", "--data-dir"])
                .arg(self.data())
                .output()
                .expect("the wrenn binary runs");
            if !cleaned.status.success() {
                return Err(String::from_utf8_lossy(&cleaned.stderr).into_owned());
            }
        }
        Ok(())
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let failing = thread::panicking();
        if failing {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        let tag = self.slot_tag();
        let cleaned = self.clean_up();
        if self.has_own_disk {
            let _busy = nix::mount::umount(&self.data());
        }
        let mut left = BTreeSet::new();
        if !tag.is_empty() {
            left = leaks::of_node(&tag, self.dir.path());
        }
        if failing {
            // A second panic would hide the first.
            eprintln!("--- cleaned: {cleaned:?}; left: {left:#?}");
        } else {
            assert_eq!(cleaned, Ok(()));
            assert!(left.is_empty(), "left behind: {left:#?}");
        }
    }
}

/// Sends a signal to a process.
///
/// # Panics
/// When there is no such process.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill(pid, signal).expect("the process lives");
}

/// Whether a process exists and is no zombie.
#[must_use]
pub fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the name, which ends at the last bracket.
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// The guest images under test.
#[must_use]
pub fn images() -> PathBuf {
    env::var_os("WRENN_IMAGES").map_or_else(|| workspace().join(".wrenn-dev/images"), PathBuf::from)
}

/// The binary under test.
///
/// # Panics
/// Where it has not been built.
#[must_use]
pub fn wrenn() -> PathBuf {
    let chosen = env::var_os("WRENN_BIN").map(PathBuf::from);
    // Test binaries lie in target/<profile>/deps, the daemon beside that folder.
    let beside = || {
        let own = env::current_exe().expect("a test binary has a path");
        own.ancestors()
            .skip(1)
            .map(|dir| dir.join("wrenn"))
            .find(|path| path.is_file())
    };
    chosen
        .or_else(beside)
        .expect("no wrenn binary; run deploy/test real-vm")
}

pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
}
