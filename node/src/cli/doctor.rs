//! `wrenn doctor`: can this machine run a node, and if not, what to do.
//!
//! Every check has a name, a verdict, what was seen, and what to do. `--fix` does what is safe:
//! load a module or set a kernel parameter until the next boot.

mod jail;

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Args;
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use super::error::{CliError, chain};
use super::{Global, Hooks, node, print};
use crate::config::{AcceleratorChoice, Config, Machine, VmmChoice};
use crate::vmm::cloud_hypervisor::version;
use crate::vmm::probe::ask_version;

/// Bits of the effective capabilities that a node needs, with their names.
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];
/// Socket buffers that bulk transfers ask for.
const SOCKET_BUFFER_BYTES: u64 = 4 << 20;
/// Below this no template fits.
const DISK_FAIL_MIB: u32 = 2 << 10;
/// Below this a few capsules fill the disk.
const DISK_WARN_MIB: u32 = 10 << 10;
/// Through which KVM is reached.
const KVM_DEVICE: &str = "/dev/kvm";
/// Processes and threads of a node with many capsules: some forty each, in VMM, shim and pager.
const PROCESSES: u64 = 32_768;
/// Descriptors of a node with many capsules and streams.
const DESCRIPTORS: u64 = 16_384;

/// How to check.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Fix what can be fixed safely.
    #[arg(long)]
    fix: bool,
    /// Do not boot a guest to see whether the accelerator works.
    #[arg(long)]
    no_boot: bool,
    #[command(flatten)]
    node: node::Settings,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was seen.
    detail: String,
    /// What to do; empty where nothing is.
    action: String,
    /// Whether `--fix` can do it.
    fixable: bool,
    #[serde(skip)]
    fix: Option<Fix>,
}

/// Something safe to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fix {
    /// Write a value to a kernel parameter.
    Parameter(&'static str, String),
    /// Load a kernel module.
    Module(&'static str),
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Verdict::Ok, detail, "")
    }

    fn new(
        name: &'static str,
        verdict: Verdict,
        detail: impl Into<String>,
        action: impl Into<String>,
    ) -> Self {
        Self {
            name,
            verdict,
            detail: detail.into(),
            action: action.into(),
            fixable: false,
            fix: None,
        }
    }

    fn fixed_by(mut self, fix: Fix) -> Self {
        self.fixable = true;
        self.fix = Some(fix);
        self
    }
}

/// Checks, fixes if asked to, and tells.
pub(super) fn run(hooks: Hooks, global: &Global, options: Options) -> Result<ExitCode, CliError> {
    let (fix, boot) = (options.fix, !options.no_boot);
    let config = options.node.or_dev_cluster().into_config()?;
    let mut checks = examine(hooks, &config, boot);
    if fix && checks.iter().any(|check| check.fix.is_some()) {
        for check in &checks {
            if let Some(Err(why)) = check.fix.as_ref().map(apply) {
                print::note(&format!("could not fix {}: {why}", check.name));
            }
        }
        checks = examine(hooks, &config, boot);
    }
    tell(global, &checks)?;
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    Ok(ExitCode::from(u8::from(failed)))
}

fn examine(hooks: Hooks, config: &Config, boot: bool) -> Vec<Check> {
    let mut checks = vec![root(), kvm_device()];
    let (program, has_qemu) = qemu(&config.qemu);
    checks.push(program);
    checks.push(cloud_hypervisor(config));
    if boot && Path::new(KVM_DEVICE).exists() && config.accelerator != AcceleratorChoice::Tcg {
        checks.push(kvm_guest(hooks, config));
    }
    if boot && has_qemu {
        checks.push(accelerator(hooks, config));
    }
    checks.extend([paging(hooks), huge_pages()]);
    checks.extend(images(&config.images_dir));
    checks.extend([tun_device(), nftables(), forwarding()]);
    checks.extend(docker());
    checks.extend(["rmem_max", "wmem_max"].map(socket_buffer));
    checks.extend([
        disk(config),
        descriptors(),
        processes(),
        jail::users(),
        jail::limits(),
    ]);
    checks
}

fn tell(global: &Global, checks: &[Check]) -> Result<(), CliError> {
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    if global.json {
        return print::json(&serde_json::json!({"ok": !failed, "checks": checks}));
    }
    for check in checks {
        let verdict = match check.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        print::line(&format!("{verdict}  {}: {}", check.name, check.detail))?;
        if !check.action.is_empty() {
            let by = if check.fixable {
                " (or: wrenn doctor --fix)"
            } else {
                ""
            };
            print::line(&format!("      -> {}{by}", check.action))?;
        }
    }
    Ok(())
}

fn apply(fix: &Fix) -> Result<(), String> {
    match fix {
        Fix::Parameter(path, value) => {
            fs::write(path, value).map_err(|err| format!("{path}: {err}"))
        }
        Fix::Module(name) => {
            let loaded = Command::new("modprobe").arg(name).output();
            let loaded = loaded.map_err(|err| format!("modprobe: {err}"))?;
            if loaded.status.success() {
                return Ok(());
            }
            Err(String::from_utf8_lossy(&loaded.stderr).trim().to_owned())
        }
    }
}

fn root() -> Check {
    let name = "privileges";
    let action = "run the node as root";
    if !nix::unistd::geteuid().is_root() {
        return Check::new(name, Verdict::Fail, "not root", action);
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let lacks = missing_capabilities(bits.unwrap_or(0));
    if lacks.is_empty() {
        return Check::ok(name, "root with the capabilities needed");
    }
    let detail = format!("root without {}", lacks.join(" and "));
    Check::new(
        name,
        Verdict::Fail,
        detail,
        "give the container these capabilities",
    )
}

fn missing_capabilities(bits: u64) -> Vec<&'static str> {
    let lacks = CAPABILITIES.iter().filter(|(bit, _)| bits >> bit & 1 == 0);
    lacks.map(|(_, name)| *name).collect()
}

fn kvm_device() -> Check {
    let name = "kvm device";
    let opened = OpenOptions::new().read(true).write(true).open(KVM_DEVICE);
    match opened {
        Ok(_) => Check::ok(name, "/dev/kvm opens"),
        Err(err) => {
            let detail = format!("/dev/kvm: {err}; guests are emulated, which is slow");
            let action = "enable virtualisation in the firmware or in the outer hypervisor";
            Check::new(name, Verdict::Warn, detail, action)
        }
    }
}

/// The check, and whether there is a QEMU to go on with.
fn qemu(program: &Path) -> (Check, bool) {
    let name = "qemu";
    let reinstall = "reinstall the package qemu-system-x86";
    match ask_version(program) {
        Ok((status, version)) if status.success() => (Check::ok(name, version), true),
        Ok((status, _)) => {
            let detail = format!("{} ended with {status}", program.display());
            (Check::new(name, Verdict::Fail, detail, reinstall), false)
        }
        Err(err) if err.kind() == io::ErrorKind::TimedOut => {
            let detail = format!("{}: {err}", program.display());
            (Check::new(name, Verdict::Fail, detail, reinstall), false)
        }
        Err(err) => {
            let detail = format!("{}: {err}", program.display());
            let action = "apt-get install --no-install-recommends qemu-system-x86";
            (Check::new(name, Verdict::Fail, detail, action), false)
        }
    }
}

/// Whether there is a Cloud Hypervisor, and one that we know. A node can do without.
fn cloud_hypervisor(config: &Config) -> Check {
    let name = "cloud-hypervisor";
    let program = &config.cloud_hypervisor;
    let wanted = config.vmm == VmmChoice::CloudHypervisor;
    let lacks = if wanted { Verdict::Fail } else { Verdict::Warn };
    let action = format!(
        "install an official release of Cloud Hypervisor, {} to {}, or set cloud_hypervisor",
        version::OLDEST,
        version::NEWEST
    );
    let said = match ask_version(program) {
        Ok((_, line)) => line,
        Err(err) if err.kind() == io::ErrorKind::NotFound && !wanted => {
            return Check::ok(name, "not installed; guests run in QEMU");
        }
        Err(err) => {
            let detail = format!("{}: {err}", program.display());
            return Check::new(name, lacks, detail, action);
        }
    };
    match version::known(&said) {
        Ok(known) => match known.warning() {
            None => Check::ok(name, format!("version {}", known.version)),
            Some(warning) => Check::new(name, Verdict::Warn, warning, action),
        },
        Err(err) => Check::new(name, lacks, err.to_string(), action),
    }
}

/// Huge pages in shared memory would make every missing page one of 2 MiB.
fn huge_pages() -> Check {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let name = "huge pages";
    let Ok(text) = fs::read_to_string(SETTING) else {
        return Check::ok(name, "the kernel has none for shared memory");
    };
    let setting = chosen_in(&text).unwrap_or("unknown");
    let detail = format!("shared memory: {setting}");
    if ["never", "advise"].contains(&setting) {
        return Check::ok(name, detail);
    }
    let detail = format!("{detail}; a resumed guest gets 2 MiB for each page that it touches");
    let action = format!("echo never > {SETTING}");
    let fix = Fix::Parameter(SETTING, "never".to_owned());
    Check::new(name, Verdict::Warn, detail, action).fixed_by(fix)
}

/// The word in brackets.
fn chosen_in(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(chosen, _)| chosen)
}

/// A device node proves nothing: a guest of some bytes has to run, and under Cloud Hypervisor to be
/// saved. One that needs no image of ours, so that it tells KVM's faults from those of a kernel.
fn kvm_guest(hooks: Hooks, config: &Config) -> Check {
    let name = "kvm guest";
    match (hooks.kvm)(config) {
        Ok(what) => Check::ok(name, what),
        Err(err) => {
            let why = chain(err.as_ref());
            // A node that was told what to use cannot do without it.
            let only_kvm = config.vmm == VmmChoice::CloudHypervisor
                || config.accelerator == AcceleratorChoice::Kvm;
            let verdict = if only_kvm {
                Verdict::Fail
            } else {
                Verdict::Warn
            };
            Check::new(name, verdict, why.clone(), kvm_action(&why))
        }
    }
}

/// What to do about a guest that did not run, or could not be saved.
fn kvm_action(why: &str) -> &'static str {
    if why.contains("cannot be saved") {
        "use an official static release of Cloud Hypervisor, on a host whose KVM knows the state of \
         nested guests (Linux 5.0, not itself nested in one without), or --vmm qemu"
    } else {
        "enable virtualisation in the firmware or in the outer hypervisor, or --accelerator tcg"
    }
}

fn accelerator(hooks: Hooks, config: &Config) -> Check {
    let name = "accelerator";
    match (hooks.probe)(config) {
        Ok(what) => Check::ok(name, format!("a guest booted with {what}")),
        Err(err) => {
            let action = "try --accelerator tcg; the node's log tells more";
            Check::new(name, Verdict::Fail, chain(err.as_ref()), action)
        }
    }
}

/// Without it a node works, and its resumes take longer the more memory they have.
fn paging(hooks: Hooks) -> Check {
    let name = "paging";
    match (hooks.paging)() {
        Ok(how) => Check::ok(name, format!("resumed guests get their memory {how}")),
        Err(err) => {
            let seen = format!(
                "no pager may watch over page faults ({}): Cloud Hypervisor's guests get their memory \
                 as it asks for it, QEMU's all of it before they run",
                chain(err.as_ref())
            );
            let action = "allow ptrace and userfaultfd (CAP_SYS_PTRACE, Yama below 3, seccomp); \
                          else a resume costs the guest's whole memory";
            Check::new(name, Verdict::Warn, seen, action)
        }
    }
}

fn images(dir: &Path) -> Vec<Check> {
    let action = "run deploy/quickstart, or give --images-dir";
    let kernel = ["kernel/vmlinuz", "kernel/release", "initramfs"];
    let missing: Vec<&str> = kernel
        .into_iter()
        .filter(|file| !dir.join(file).is_file())
        .collect();
    let guest = if missing.is_empty() {
        let release = fs::read_to_string(dir.join("kernel/release")).unwrap_or_default();
        Check::ok("guest kernel", release.trim())
    } else {
        let detail = format!("{} lacks {}", dir.display(), missing.join(", "));
        Check::new("guest kernel", Verdict::Fail, detail, action)
    };
    let names = template_names(&dir.join("templates"));
    let templates = if names.is_empty() {
        let detail = format!("none in {}", dir.join("templates").display());
        Check::new("templates", Verdict::Fail, detail, action)
    } else {
        Check::ok("templates", names.join(", "))
    };
    vec![guest, templates]
}

fn template_names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("rootfs.raw").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn tun_device() -> Check {
    let name = "tun device";
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    match opened {
        Ok(_) => Check::ok(name, "/dev/net/tun opens"),
        Err(err) => {
            let detail = format!("/dev/net/tun: {err}");
            Check::new(name, Verdict::Fail, detail, "modprobe tun").fixed_by(Fix::Module("tun"))
        }
    }
}

fn nftables() -> Check {
    let name = "nftables";
    match ask_nftables() {
        Ok(true) => Check::ok(name, "the kernel answers"),
        Ok(false) => Check::new(
            name,
            Verdict::Fail,
            "the kernel has no nf_tables",
            "modprobe nf_tables",
        )
        .fixed_by(Fix::Module("nf_tables")),
        Err(err) => Check::new(name, Verdict::Fail, format!("ask the kernel: {err}"), ""),
    }
}

/// Asks the kernel for the generation of its rules, which only one with nftables knows.
fn ask_nftables() -> io::Result<bool> {
    /// The netlink family of packet filters.
    const NETFILTER: isize = 12;
    /// Where a message's type stands.
    const TYPE_AT: usize = 4;
    /// The type that says "error".
    const ERROR: u16 = 2;
    // Length 20, type "get generation" of nftables, flag "request", sequence 1; all families.
    const REQUEST: [u8; 20] = [
        20, 0, 0, 0, 16, 10, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut socket = netlink_sys::Socket::new(NETFILTER)?;
    socket.bind_auto()?;
    socket.send_to(&REQUEST, &netlink_sys::SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let kind = answer.get(TYPE_AT..TYPE_AT + 2).unwrap_or_default();
    Ok(kind != ERROR.to_ne_bytes())
}

fn forwarding() -> Check {
    const PATH: &str = "/proc/sys/net/ipv4/ip_forward";
    let name = "ip forwarding";
    let value = fs::read_to_string(PATH).unwrap_or_default();
    if value.trim() == "1" {
        return Check::ok(name, "on");
    }
    let action = "sysctl -w net.ipv4.ip_forward=1";
    Check::new(
        name,
        Verdict::Warn,
        "off: capsules reach no network",
        action,
    )
    .fixed_by(Fix::Parameter(PATH, "1".into()))
}

/// Docker makes the host drop what it does not know, capsules included.
fn docker() -> Option<Check> {
    let listed = Command::new("iptables").args(["-S", "FORWARD"]).output();
    let rules = String::from_utf8(listed.ok()?.stdout).ok()?;
    let drops = rules.lines().any(|line| line == "-P FORWARD DROP");
    let action = "iptables -I DOCKER-USER -s 198.18.0.0/15 -j ACCEPT; \
                  iptables -I DOCKER-USER -d 198.18.0.0/15 -j ACCEPT";
    let detail = "the host's firewall drops forwarded packets (Docker does that)";
    drops.then(|| Check::new("host firewall", Verdict::Warn, detail, action))
}

fn socket_buffer(which: &'static str) -> Check {
    let (name, path) = match which {
        "rmem_max" => ("receive buffers", "/proc/sys/net/core/rmem_max"),
        _ => ("send buffers", "/proc/sys/net/core/wmem_max"),
    };
    let value = fs::read_to_string(path).unwrap_or_default();
    let Ok(bytes) = value.trim().parse::<u64>() else {
        return Check::ok(name, "set by the host of this container");
    };
    if bytes >= SOCKET_BUFFER_BYTES {
        return Check::ok(name, format!("up to {bytes} bytes"));
    }
    let detail = format!("up to {bytes} bytes; transfers between nodes are slower");
    let action = format!("sysctl -w net.core.{which}={SOCKET_BUFFER_BYTES}");
    let fix = Fix::Parameter(path, SOCKET_BUFFER_BYTES.to_string());
    Check::new(name, Verdict::Warn, detail, action).fixed_by(fix)
}

fn disk(config: &Config) -> Check {
    let name = "disk space";
    let free = match Machine::measure(&config.data_dir) {
        Ok(machine) => machine.disk_free,
        Err(err) => return Check::new(name, Verdict::Warn, chain(&err), ""),
    };
    let detail = format!("{free} free at {}", config.data_dir.display());
    let verdict = match free.0 {
        0..DISK_FAIL_MIB => Verdict::Fail,
        DISK_FAIL_MIB..DISK_WARN_MIB => Verdict::Warn,
        DISK_WARN_MIB.. => return Check::ok(name, detail),
    };
    Check::new(
        name,
        verdict,
        detail,
        "free some, or choose another --data-dir",
    )
}

fn descriptors() -> Check {
    let name = "open files";
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    if hard >= DESCRIPTORS {
        return Check::ok(name, format!("limit {hard}"));
    }
    let action = format!("raise it: ulimit -Hn {DESCRIPTORS}, or LimitNOFILE= in the unit");
    Check::new(name, Verdict::Warn, format!("limit {hard}"), action)
}

/// The kernel's own limits and ours: each capsule is three processes with their threads.
fn processes() -> Check {
    let name = "processes";
    let kernels = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"];
    let told = kernels.iter().filter_map(|path| {
        let value = fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()?;
        Some((value, *path))
    });
    let Some((least, path)) = told.min() else {
        return Check::ok(name, "the kernel does not tell its limits");
    };
    if least >= PROCESSES {
        return Check::ok(name, format!("up to {least}"));
    }
    let detail = format!("up to {least} at a time: {path}");
    let action = format!("echo {PROCESSES} > {path}");
    let fix = Fix::Parameter(path, PROCESSES.to_string());
    Check::new(name, Verdict::Warn, detail, action).fixed_by(fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_capability_is_named() {
        assert_eq!(missing_capabilities(u64::MAX), Vec::<&str>::new());
        assert_eq!(missing_capabilities(1 << 12), ["CAP_SYS_ADMIN"]);
        assert_eq!(missing_capabilities(0).len(), 2);
    }

    #[test]
    fn a_guest_that_cannot_be_saved_is_another_matter_than_one_that_does_not_run() {
        let build = kvm_action("cloud-hypervisor: it cannot be saved: …");
        assert!(build.contains("official"), "{build}");
        let host = kvm_action("qemu: the guest did not say it runs");
        assert!(host.contains("firmware"), "{host}");
    }

    #[test]
    fn missing_images_fail_with_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        let checks = images(dir.path());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Fail));
        assert!(checks[0].detail.contains("initramfs"));
        assert!(checks[0].action.contains("quickstart"));
    }

    #[test]
    fn a_template_is_a_directory_with_a_root_disk() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["b", "a", "half"] {
            fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        for name in ["a", "b"] {
            fs::write(dir.path().join(name).join("rootfs.raw"), "").expect("a file");
        }
        assert_eq!(template_names(dir.path()), ["a", "b"]);
    }

    #[test]
    fn a_program_that_is_not_there_fails_with_the_package_that_has_it() {
        let (check, usable) = qemu(Path::new("/nonexistent/qemu"));
        assert!(!usable && check.verdict == Verdict::Fail);
        assert!(check.action.contains("qemu-system-x86"));
    }
}
