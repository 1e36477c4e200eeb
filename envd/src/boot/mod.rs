//! The duties of the guest's first process.
//!
//! ```text
//! enter: kernel file systems → console → command line → modules → root disk → move mounts, switch
//!        root → tmpfs, devpts, shm, cgroup2, generation → name, hosts, resolv.conf → lo, eth0, route
//! then the agent serves as usual, and reaps orphans (process::reap)
//! power::off: terminate all → sync → kill all → read-only root → power off
//! ```
//!
//! All of [`enter`] happens on one thread, before the runtime. A step that fails leaves no guest
//! worth having, so it says so in one line on the console and powers off; the host sees both. After
//! the switch of root the agent's own file is out of reach: it stays mapped and is never executed
//! again. Nothing of this is kept on disk, so a crash leaves nothing behind.

pub mod adopt;
pub mod cgroup;
pub mod cmdline;
pub mod command;
pub mod identity;
pub mod modules;
pub mod mounts;
pub mod name;
pub mod network;
pub mod power;
pub mod trust;

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use crate::log::chain;
use crate::snapshot::lineage::Generation;
use crate::snapshot::machine;
use crate::{log, sys};
use cmdline::Options;
use nix::sys::resource::{Resource, setrlimit};

/// The port every host expects the agent on.
pub const PORT: u16 = 49983;
/// What a probe guest prints; the host looks for exactly this line.
const PROBE_LINE: &str = "wrenn-probe: ok";

/// Why the guest cannot come up. Each names the step; nobody inside can repair it.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read or written.
    #[error("{step} {path}")]
    File {
        /// The verb.
        step: &'static str,
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file system could not be mounted or moved.
    #[error("mount {target}")]
    Mount {
        /// Where to.
        target: String,
        /// What the kernel said.
        source: nix::Error,
    },
    /// The command line holds a value we cannot use.
    #[error("kernel option {0} is malformed")]
    Option(String),
    /// The root disk did not appear.
    #[error("root device {path} did not appear within {waited:?}")]
    NoRootDevice {
        /// What was waited for.
        path: String,
        /// For how long.
        waited: std::time::Duration,
    },
    /// The network card did not appear.
    #[error("network interface {name} did not appear within {waited:?}")]
    NoInterface {
        /// What was waited for.
        name: String,
        /// For how long.
        waited: std::time::Duration,
    },
    /// The host name was refused.
    #[error("set the host name")]
    Hostname(#[source] nix::Error),
}

impl BootError {
    /// A failed file operation.
    pub(crate) fn file(
        step: &'static str,
        path: impl Into<String>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { step, path, source }
    }
}

/// Brings the guest up, as the returned options say. Returns only if all went well.
#[must_use]
pub fn enter() -> Options {
    match bring_up() {
        Ok(options) => options,
        Err(err) => {
            log!("cannot boot: {}", chain(&err));
            power::off()
        }
    }
}

fn bring_up() -> Result<Options, BootError> {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    mounts::kernel_file_systems()?;
    open_console()?;
    let text = fs::read_to_string("/proc/cmdline");
    let text = text.map_err(BootError::file("read", "/proc/cmdline"))?;
    let options = Options::parse(&text).map_err(BootError::Option)?;
    if options.probe {
        probe();
    }
    modules::load_all()?;
    mounts::switch_root(&options.root)?;
    mounts::volatile_file_systems()?;
    machine::announce_in(Path::new(machine::GENERATION_FILE), Generation::BOOT)?;
    name::set(&options.hostname)?;
    network::bring_up(&options)?;
    set_limits();
    // So that ctrl-alt-del of the VMM is a signal to us instead of a reset.
    let _ = nix::sys::reboot::set_cad_enabled(false);
    Ok(options)
}

/// Open files that a process gets without asking, and that it may ask for. The kernel's own 1024
/// and 4096 are too few for today's package managers and servers.
const OPEN_FILES: (u64, u64) = (65_536, 524_288);

/// Inotify instances of one user. The kernel's 128 would be taken by our watchers almost alone.
const WATCHERS: (&str, &str) = ("/proc/sys/fs/inotify/max_user_instances", "1024");
/// In directories such as `/tmp`, nobody is led astray by another's link, and nobody links to what is not
/// theirs. Distributions set these at boot; the kernel by itself does not.
const LINKS: [(&str, &str); 2] = [
    ("/proc/sys/fs/protected_symlinks", "1"),
    ("/proc/sys/fs/protected_hardlinks", "1"),
];

fn set_limits() {
    let (soft, hard) = OPEN_FILES;
    if let Err(err) = setrlimit(Resource::RLIMIT_NOFILE, soft, hard) {
        log!("raise the limit of open files: {err}");
    }
    for (file, value) in [WATCHERS].into_iter().chain(LINKS) {
        if let Err(err) = fs::write(file, value) {
            log!("write {file}: {err}");
        }
    }
}

/// The kernel may have found no console when it started us; from here on there is one.
fn open_console() -> Result<(), BootError> {
    let path = "/dev/console";
    let console = OpenOptions::new().read(true).write(true).open(path);
    let console = console.map_err(BootError::file("open", path))?;
    sys::take_console(&console).map_err(BootError::file("take", path))
}

/// Tells the host that this VMM and kernel really run, and ends.
fn probe() -> ! {
    println!("{PROBE_LINE}");
    power::off_now()
}
