//! Finding out which accelerator runs a guest here, by running one.
//!
//! A device node proves nothing: nested and restricted KVMs open, run a few instructions and
//! then abort on the first kernel. So the probe boots the very kernel and initramfs that
//! sandboxes will boot, told to say [`OK_LINE`] on its console, first under KVM and, if that does
//! not come in time, under TCG. The whole of it is bounded by the two timeouts.
//!
//! Cloud Hypervisor is tried under KVM only, and has to lay its guest open once before the guest
//! counts: there are KVMs on which its save fails (one that has no state of nested guests), and
//! builds whose own filter of system calls ends them in the middle of it. Either would lose the
//! first sandbox that is paused.
//!
//! An outcome is remembered in a file beside what it depends on (VMM, kernel, initramfs, this boot
//! of the host), so that a restarted node does not boot probes; of a VMM that is only to be
//! preferred, a bad one as well. A crash leaves nothing: the probe's guest dies with the thread that
//! runs it.

mod version;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use proto::units::Mib;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::base::chain::chain;
use crate::pager::memory::GuestMemory;
use crate::vmm::cloud_hypervisor::version as cloud_hypervisor;
use crate::vmm::cmdline::GuestArgs;
use crate::vmm::{
    Accelerator, Confinement, Driver, UnknownVersion, Vmm, VmmSpec, hardware_of, spawn, tiny,
};

pub use version::ask_version;

/// What a guest that runs prints on its console.
pub const OK_LINE: &str = "wrenn-probe: ok";

/// Longest a probe's guest may take under KVM; one second is usual. A KVM that cannot run Linux
/// often just spins, so this is also what such a host waits at its first start.
const KVM_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest under TCG: two seconds are usual, ten on a busy host with one core.
const TCG_TIMEOUT: Duration = Duration::from_secs(45);
/// Longest the smallest guest may take; some 30 ms are usual.
const TINY_TIMEOUT: Duration = Duration::from_secs(5);
/// Memory of a probe's guest: its kernel, its initramfs, and room.
const MEMORY: Mib = Mib(256);
/// The layout of the remembered outcome.
const VERSION: u32 = 2;
/// In the place of an accelerator's name, where none works.
const NONE: &str = "none";
/// How much console is searched. A boot without trouble prints a few lines.
const MAX_CONSOLE_BYTES: usize = 1 << 20;
/// The end of the console that a failed attempt quotes.
const QUOTED_BYTES: usize = 200;
/// The device without which KVM need not be tried.
const KVM_DEVICE: &str = "/dev/kvm";

/// What is to be tried.
#[derive(Clone, Debug)]
pub struct ProbeRequest {
    /// Which hypervisor.
    pub driver: Driver,
    /// Its executable.
    pub program: PathBuf,
    /// The kernel of the sandboxes.
    pub kernel: PathBuf,
    /// Their initramfs.
    pub initramfs: PathBuf,
    /// Where the outcome is remembered; `None` to try anew.
    pub cache: Option<PathBuf>,
    /// Whether a bad outcome is remembered too: where the node can do with another hypervisor.
    pub forgoable: bool,
}

/// How one accelerator did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Whether it ran a guest.
    pub ok: bool,
    /// Why not, or how long it took.
    pub detail: String,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeOutcome {
    /// The fastest accelerator that runs guests.
    pub accelerator: Accelerator,
    /// What was tried, in order: the reason for the choice.
    pub attempts: Vec<Attempt>,
    /// Whether this was remembered from an earlier start.
    pub remembered: bool,
    /// What the hypervisor calls its version.
    pub version: String,
}

/// Why no accelerator could be chosen.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The hypervisor itself does not run.
    #[error("run {program:?}")]
    Program {
        /// The executable.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is a release that we do not know.
    #[error("use {program:?}")]
    Version {
        /// The executable.
        program: PathBuf,
        /// Which release.
        source: UnknownVersion,
    },
    /// The kernel or the initramfs is not there.
    #[error("look at {path:?}")]
    Image {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither accelerator runs a guest.
    #[error("no accelerator runs a guest here: {}", describe(attempts))]
    NoneWorks {
        /// What was tried.
        attempts: Vec<Attempt>,
    },
}

/// What a remembered outcome depends on, and the outcome.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    version: u32,
    key: Key,
    accelerator: String,
    attempts: Vec<Attempt>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    program: String,
    kernel: String,
    initramfs: String,
    boot: String,
    kvm_device: bool,
}

/// Decides which accelerator guests run under. Blocks for as long as its guests take: a second or
/// two, a minute at most.
///
/// # Errors
/// See [`ProbeError`].
pub fn probe(request: &ProbeRequest) -> Result<ProbeOutcome, ProbeError> {
    let key = key(request)?;
    let known = |source| ProbeError::Version {
        program: request.program.clone(),
        source,
    };
    hardware_of(request.driver, &key.program, Accelerator::Kvm).map_err(known)?;
    if request.driver == Driver::CloudHypervisor
        && let Ok(Some(warning)) = cloud_hypervisor::known(&key.program).map(|it| it.warning())
    {
        warn!("{warning}");
    }
    match recall(request.cache.as_deref(), &key) {
        Some(Err(_)) if !request.forgoable => {}
        Some(outcome) => return outcome,
        None => {}
    }
    let mut attempts = Vec::new();
    for &(accelerator, timeout) in accelerators_of(request.driver) {
        let attempt = if accelerator == Accelerator::Kvm && !key.kvm_device {
            failed(accelerator, format!("there is no {KVM_DEVICE}"))
        } else {
            let (accelerator_name, at_most) = (accelerator.name(), timeout);
            info!(
                accelerator = accelerator_name,
                ?at_most,
                "trying to run a guest"
            );
            attempt(request, accelerator, timeout)
        };
        let ok = attempt.ok;
        attempts.push(attempt);
        if ok {
            let version = key.program.clone();
            remember(request.cache.as_deref(), key, Some(accelerator), &attempts);
            return Ok(ProbeOutcome {
                accelerator,
                attempts,
                remembered: false,
                version,
            });
        }
    }
    if request.forgoable {
        remember(request.cache.as_deref(), key, None, &attempts);
    }
    Err(ProbeError::NoneWorks { attempts })
}

/// What `driver` can run under, the best first, and how long that may take.
fn accelerators_of(driver: Driver) -> &'static [(Accelerator, Duration)] {
    const BOTH: [(Accelerator, Duration); 2] = [
        (Accelerator::Kvm, KVM_TIMEOUT),
        (Accelerator::Tcg, TCG_TIMEOUT),
    ];
    match driver {
        Driver::Qemu => &BOTH,
        Driver::CloudHypervisor => &BOTH[..1],
    }
}

fn attempt(request: &ProbeRequest, accelerator: Accelerator, timeout: Duration) -> Attempt {
    let started = Instant::now();
    match boot(request, accelerator, started + timeout) {
        Ok(()) => Attempt {
            accelerator: accelerator.name().to_owned(),
            ok: true,
            detail: format!("a guest booted in {:.1?}", started.elapsed()),
        },
        Err(reason) => failed(accelerator, reason),
    }
}

fn failed(accelerator: Accelerator, detail: String) -> Attempt {
    Attempt {
        accelerator: accelerator.name().to_owned(),
        ok: false,
        detail,
    }
}

/// Runs the smallest guest there is ([`tiny`]) under KVM, without any image of ours. Under Cloud
/// Hypervisor it is saved as well, and goes on. Returns how long all of it took.
///
/// # Errors
/// Why not, for people.
pub fn prove_kvm(driver: Driver, program: &Path) -> Result<Duration, String> {
    let began = Instant::now();
    if !Path::new(KVM_DEVICE).exists() {
        return Err(format!("there is no {KVM_DEVICE}"));
    }
    let write = |err: io::Error| format!("write the guest: {err}");
    let mut kernel = tempfile::NamedTempFile::new().map_err(write)?;
    kernel.write_all(&tiny::kernel()).map_err(write)?;
    // The VMM may be of another user.
    let readable = fs::Permissions::from_mode(0o644);
    kernel.as_file().set_permissions(readable).map_err(write)?;
    let request = ProbeRequest {
        driver,
        program: program.to_owned(),
        kernel: kernel.path().to_owned(),
        // It has no use for one, and any file is one.
        initramfs: kernel.path().to_owned(),
        cache: None,
        forgoable: false,
    };
    boot(&request, Accelerator::Kvm, began + TINY_TIMEOUT)?;
    Ok(began.elapsed())
}

/// Boots one guest and waits for its word. The reason of a failure is for people.
fn boot(request: &ProbeRequest, accelerator: Accelerator, deadline: Instant) -> Result<(), String> {
    let spec = VmmSpec {
        driver: request.driver,
        program: request.program.clone(),
        accelerator,
        kernel: request.kernel.clone(),
        initramfs: request.initramfs.clone(),
        cmdline: GuestArgs::probe().to_string(),
        vcpus: 1,
        memory: MEMORY,
        root_disk: None,
        network: None,
        // As sandboxes are: what cannot run in the jail must be known before one is in it.
        confinement: Confinement::of_probe(),
    };
    let memory = GuestMemory::create(spec.memory).map_err(|err| chain(&err))?;
    let mut started =
        spawn(&spec, "wrenn-probe", memory.as_fd(), deadline).map_err(|err| chain(&err))?;
    // Emptied, so that a VMM that complains at length is not held up by its own pipe.
    let mut stderr = started.stderr;
    let complaints = thread::spawn(move || {
        let mut text = Vec::new();
        let _ended = stderr.read_to_end(&mut text);
        text
    });
    let saves = match request.driver {
        Driver::Qemu => Ok(()),
        Driver::CloudHypervisor => save_once(&*started.vmm, deadline),
    };
    let said = saves.and_then(|()| await_word(&mut started.console, deadline));
    // Dropping the VMM kills and reaps it, and that ends its streams.
    drop(started.vmm);
    let complaints = complaints.join().unwrap_or_default();
    said.map_err(|reason| match last_line(&complaints) {
        Some(line) => format!("{reason}; the VMM said: {line}"),
        None => reason,
    })
}

/// Lays a guest open that has just begun to boot, and lets it go on.
fn save_once(vmm: &dyn Vmm, deadline: Instant) -> Result<(), String> {
    let failed = |err: &dyn std::error::Error| format!("it cannot be saved: {}", chain(err));
    let file = tempfile::tempfile().map_err(|err| failed(&err))?;
    let saved = vmm.save_state(file.as_fd(), deadline);
    let gone_on = saved.and_then(|()| vmm.resume(deadline));
    gone_on.map_err(|err| failed(&err))
}

fn await_word(console: &mut UnixStream, deadline: Instant) -> Result<(), String> {
    let mut said = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("the guest did not say it runs{}", quote(&said)));
        }
        console
            .set_read_timeout(Some(left))
            .map_err(|err| format!("listen to the console: {err}"))?;
        match console.read(&mut bytes) {
            Ok(0) => {
                return Err(format!(
                    "the VMM ended before the guest ran{}",
                    quote(&said)
                ));
            }
            Ok(count) => said.extend_from_slice(&bytes[..count]),
            Err(err) if retry(&err) => {}
            Err(err) => return Err(format!("the console broke off: {err}")),
        }
        if contains_line(&said) {
            return Ok(());
        }
        if said.len() > MAX_CONSOLE_BYTES {
            return Err("the guest printed a MiB and did not say it runs".to_owned());
        }
    }
}

fn retry(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Whether a whole line is [`OK_LINE`]: half of one may be an echo of the kernel's arguments.
fn contains_line(said: &[u8]) -> bool {
    said.split(|&byte| byte == b'\n')
        .any(|line| line.trim_ascii() == OK_LINE.as_bytes())
}

fn quote(said: &[u8]) -> String {
    let end = &said[said.len().saturating_sub(QUOTED_BYTES)..];
    let end = String::from_utf8_lossy(end);
    match end.trim() {
        "" => ", and its console is empty".to_owned(),
        end => format!("; its console ends with {end:?}"),
    }
}

fn last_line(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.trim().chars().take(QUOTED_BYTES).collect())
}

fn describe(attempts: &[Attempt]) -> String {
    let lines: Vec<String> = attempts
        .iter()
        .map(|attempt| format!("{}: {}", attempt.accelerator, attempt.detail))
        .collect();
    lines.join("; ")
}

fn key(request: &ProbeRequest) -> Result<Key, ProbeError> {
    Ok(Key {
        program: version_of(&request.program)?,
        kernel: fingerprint(&request.kernel)?,
        initramfs: fingerprint(&request.initramfs)?,
        boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        kvm_device: Path::new(KVM_DEVICE).exists(),
    })
}

fn version_of(program: &Path) -> Result<String, ProbeError> {
    let (_, line) = ask_version(program).map_err(|source| ProbeError::Program {
        program: program.to_owned(),
        source,
    })?;
    Ok(line)
}

/// Changes whenever the file is replaced or rewritten: hashing 15 MiB at each start is not worth
/// more certainty.
fn fingerprint(path: &Path) -> Result<String, ProbeError> {
    let meta = fs::metadata(path).map_err(|source| ProbeError::Image {
        path: path.to_owned(),
        source,
    })?;
    let (seconds, nanos) = (meta.mtime(), meta.mtime_nsec());
    Ok(format!(
        "{} {} {seconds}.{nanos}",
        path.display(),
        meta.len()
    ))
}

fn recall(cache: Option<&Path>, key: &Key) -> Option<Result<ProbeOutcome, ProbeError>> {
    let content = fs::read(cache?).ok()?;
    // Whatever cannot be read, or is of another version, is as good as not there.
    let remembered: Remembered = serde_json::from_slice(&content).ok()?;
    if remembered.version != VERSION || remembered.key != *key {
        return None;
    }
    let attempts = remembered.attempts;
    if remembered.accelerator == NONE {
        return Some(Err(ProbeError::NoneWorks { attempts }));
    }
    Some(Ok(ProbeOutcome {
        accelerator: Accelerator::from_name(&remembered.accelerator)?,
        attempts,
        remembered: true,
        version: remembered.key.program,
    }))
}

/// Best effort: without it the next start boots a probe again.
fn remember(
    cache: Option<&Path>,
    key: Key,
    accelerator: Option<Accelerator>,
    attempts: &[Attempt],
) {
    let Some(cache) = cache else {
        return;
    };
    let remembered = Remembered {
        version: VERSION,
        key,
        accelerator: accelerator.map_or(NONE, Accelerator::name).to_owned(),
        attempts: attempts.to_vec(),
    };
    if let Ok(content) = serde_json::to_vec(&remembered) {
        let temporary = cache.with_extension("new");
        let _tried_again =
            fs::write(&temporary, content).and_then(|()| fs::rename(&temporary, cache));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key {
            program: "QEMU 7.2".into(),
            kernel: "k".into(),
            initramfs: "i".into(),
            boot: "b".into(),
            kvm_device: true,
        }
    }

    #[test]
    fn an_outcome_is_remembered_for_the_same_surroundings_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let cache = dir.path().join("probe.json");
        let attempts = [failed(Accelerator::Kvm, "aborted".into())];
        remember(Some(&cache), key(), Some(Accelerator::Tcg), &attempts);
        let outcome = recall(Some(&cache), &key()).expect("remembered");
        let outcome = outcome.expect("a good one");
        assert_eq!(outcome.accelerator, Accelerator::Tcg);
        assert_eq!(outcome.attempts, attempts);
        let upgraded = Key {
            program: "QEMU 10".into(),
            ..key()
        };
        assert!(recall(Some(&cache), &upgraded).is_none());
        remember(Some(&cache), key(), None, &attempts);
        let outcome = recall(Some(&cache), &key()).expect("remembered");
        assert!(matches!(outcome, Err(ProbeError::NoneWorks { .. })));
        fs::write(&cache, "not JSON").expect("spoiled");
        assert!(recall(Some(&cache), &key()).is_none());
    }

    #[test]
    fn only_a_whole_line_counts_as_the_guests_word() {
        assert!(contains_line(b"boot\r\nwrenn-probe: ok\r\n"));
        assert!(!contains_line(b"cmdline wrenn-probe: ok or not\n"));
    }

    #[test]
    fn a_missing_image_is_named() {
        let request = ProbeRequest {
            driver: Driver::Qemu,
            program: "/bin/true".into(),
            forgoable: false,
            kernel: "/nonexistent/vmlinuz".into(),
            initramfs: "/nonexistent/initramfs".into(),
            cache: None,
        };
        let err = probe(&request).expect_err("no kernel");
        assert!(err.to_string().contains("/nonexistent/vmlinuz"), "{err}");
    }
}
