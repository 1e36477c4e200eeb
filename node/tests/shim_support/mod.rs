//! What the tests with real guests share: a tiny guest, a sandbox directory that cleans up after
//! itself however its test ends, and looking at processes.
//!
//! The kernel and its modules come from the guest images (`deploy/images/kernel`): `WRENN_IMAGES`,
//! or `.wrenn-dev/images` in the checkout.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

pub mod debian;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use proto::epoch::Epoch;
use proto::ids::SandboxId;
use proto::units::Mib;
use wrenn_node::shim::client::{self, ShimClient};
use wrenn_node::shim::spec::ShimSpec;
use wrenn_node::shim::sweep::kill_leftovers;
use wrenn_node::vmm::confinement::HostConfinement;
use wrenn_node::vmm::{Accelerator, Confinement, Driver, VmmSpec};

/// Our own executable.
pub const WRENN: &str = env!("CARGO_BIN_EXE_wrenn");
/// QEMU, as Debian installs it.
pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Longest boot of a guest under TCG on a busy machine.
pub const BOOT: Duration = Duration::from_secs(60);
/// Longest wait for something that takes milliseconds on an idle machine.
pub const SOON: Duration = Duration::from_secs(10);
/// The size of the root disk in sectors of 512 bytes.
pub const DISK_SECTORS: u64 = 64 * 2048;

/// Modules of a test guest, in load order, below `kernel/`.
const MODULES: [&str; 11] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "drivers/acpi/button.ko",
    "drivers/input/evdev.ko",
];

/// A kernel and an initramfs with the test guest.
pub struct Images {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// The images, made once per test program.
pub fn images() -> &'static Images {
    static IMAGES: OnceLock<Images> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let package = std::env::var_os("WRENN_IMAGES").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev/images"),
            PathBuf::from,
        );
        let package = package.join("kernel");
        let kernel = package.join("vmlinuz");
        assert!(kernel.exists(), "no guest kernel; run deploy/images/kernel");
        let own = scratch().join(format!("initramfs-{}", std::process::id()));
        fs::write(&own, initramfs_with(&package)).expect("write the initramfs");
        // Another test program may be starting a guest from the old one.
        let initramfs = scratch().join("initramfs");
        fs::rename(&own, &initramfs).expect("rename the initramfs");
        Images { kernel, initramfs }
    })
}

/// A directory of our own below the build's.
pub fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn initramfs_with(package: &Path) -> Vec<u8> {
    let modules = package.join("modules/kernel");
    let mut archive = Cpio::default();
    for dir in ["dev", "proc", "sys", "modules"] {
        archive.add(dir, 0o040_755, b"");
    }
    archive.add("init", 0o100_755, &compile_guest());
    let mut order = String::new();
    for module in MODULES {
        let path = modules.join(module);
        let name = path
            .file_name()
            .expect("a file")
            .to_string_lossy()
            .into_owned();
        let content = fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
        archive.add(&format!("modules/{name}"), 0o100_644, &content);
        order.push_str(&name);
        order.push('\n');
    }
    archive.add("modules/order", 0o100_644, order.as_bytes());
    archive.finish()
}

fn compile_guest() -> Vec<u8> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim_support/guest.rs");
    let binary = scratch().join(format!("guest-{}", std::process::id()));
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let done = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
        ])
        .args([
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
            "--target",
            &target,
            "-o",
        ])
        .args([&binary, &source])
        .status()
        .expect("rustc runs");
    assert!(done.success(), "the test guest does not compile");
    let content = fs::read(&binary).expect("compiled");
    fs::remove_file(&binary).expect("removable");
    content
}

/// A `newc` archive.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: usize,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: usize, content: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08x}").expect("to memory");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A sandbox directory. Dropping it kills what runs there and removes it.
pub struct Sandbox {
    home: tempfile::TempDir,
    pub id: SandboxId,
    pub dir: PathBuf,
}

impl Sandbox {
    pub fn new() -> Self {
        Self::below("")
    }

    /// A sandbox whose directory lies below `path` in a fresh directory.
    pub fn below(path: &str) -> Self {
        let home = tempfile::tempdir().expect("tempdir");
        let id = SandboxId(rand::random());
        let dir = home.path().join(path).join(id.to_string());
        fs::create_dir_all(&dir).expect("mkdir");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).expect("chmod");
        Self { home, id, dir }
    }

    /// The directory that holds this sandbox's.
    pub fn parent(&self) -> &Path {
        self.dir.parent().expect("it has one")
    }

    /// A guest told `words`, without disk and network.
    pub fn spec(&self, words: &str) -> ShimSpec {
        let images = images();
        ShimSpec {
            sandbox: self.id,
            epoch: Epoch(7),
            lease: None,
            vmm: VmmSpec {
                driver: Driver::Qemu,
                program: QEMU.into(),
                accelerator: Accelerator::Tcg,
                kernel: images.kernel.clone(),
                initramfs: images.initramfs.clone(),
                cmdline: words.into(),
                vcpus: 1,
                memory: Mib(256),
                root_disk: None,
                network: None,
                confinement: self.confinement(),
            },
            restore: None,
        }
    }

    /// As a node confines its sandboxes, as far as this host lets it.
    fn confinement(&self) -> Confinement {
        let index = u16::from_be_bytes([self.id.0[0], self.id.0[1]]);
        let host = HostConfinement::of_this_host(&format!("test-{}", std::process::id()));
        host.of_sandbox(&self.id.to_string(), index)
    }

    /// An empty overlay over an empty raw image.
    pub fn make_disk(&self) -> PathBuf {
        let base = self.home.path().join("base, with a comma.raw");
        fs::File::create(&base)
            .and_then(|file| file.set_len(DISK_SECTORS * 512))
            .expect("sparse file");
        let overlay = self.dir.join("root.qcow2");
        let done = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&base, &overlay])
            .status()
            .expect("qemu-img runs");
        assert!(done.success());
        overlay
    }

    pub async fn start(&self, words: &str) -> ShimClient {
        client::spawn(&self.dir, &self.spec(words), Path::new(WRENN))
            .await
            .expect("the shim comes up")
    }

    pub fn file(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join(name)).unwrap_or_default()).into_owned()
    }

    /// Waits until the console has a line that contains `text`.
    pub fn await_console(&self, text: &str) {
        let seen = eventually(BOOT, || self.file("console.log").contains(text));
        let console = self.file("console.log");
        assert!(seen, "no {text:?} on the console:\n{console}");
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Also when the test has failed; a second panic would hide the first.
        let _swept = kill_leftovers(&self.dir);
    }
}

/// The last number on the console of a guest told `test.count`.
pub fn counted(console: &str) -> Option<u64> {
    let said = console.rsplit("guest: count ");
    said.filter_map(|rest| rest.split_once('.'))
        .find_map(|(count, _)| count.parse().ok())
}

/// The process of the VMM in `dir`, whoever started it.
pub fn vmm_in(dir: &Path) -> Option<u32> {
    let named = format!("\0-name\0{}\0", dir.display());
    let pids = fs::read_dir("/proc").expect("listable").flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&named)
    })
}

/// Copies what is listed in `ranges` of a guest's memory to a flat image.
pub fn copy_memory(memory: &fs::File, ranges: &[std::ops::Range<u64>], bytes: u64, image: &Path) {
    let image = fs::File::create(image).expect("created");
    image.set_len(bytes).expect("sparse");
    let mut buffer = vec![0; 1 << 20];
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let length = usize::try_from((range.end - at).min(1 << 20)).expect("a MiB");
            memory
                .read_exact_at(&mut buffer[..length], at)
                .expect("read");
            image.write_all_at(&buffer[..length], at).expect("written");
            at += length as u64;
        }
    }
}

/// Whether `holds` became true within `timeout`.
pub fn eventually(timeout: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(20));
    }
}

/// Whether process `pid` runs. One that nobody has reaped yet does not.
pub fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim().chars().next());
    state.is_some_and(|state| !"ZX".contains(state))
}

/// Sends `signal` to a process this test started.
pub fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    nix::sys::signal::kill(pid, signal).expect("it runs");
}
