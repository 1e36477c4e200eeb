//! The pager on a real QEMU, jailed as the shim jails it, that waits for a guest's state.
//!
//! Ignored unless asked for: needs QEMU.

mod pager_world;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use pager_world::{Elsewhere, Image, PAGE, SOON, eventually, pages_of, stats};
use proto::units::Mib;
use wrenn_node::pager::handle::{Pager, PagerSpec};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::pager::pages::PageSet;
use wrenn_node::pager::region::PageIndex;
use wrenn_node::pager::uffd::Tracking;
use wrenn_node::vmm::jail::Jail;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const MEMORY: Mib = Mib(64);
/// Enough for the kernel to come up in.
const GUEST_MEMORY: Mib = Mib(128);
/// Longest boot of a kernel under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(60);
/// As in the driver's own arguments.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

struct Qemu {
    child: Child,
    hears: BufReader<UnixStream>,
    says: UnixStream,
}

impl Qemu {
    fn start(memory: &GuestMemory, more: &[&str]) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let ram = memory.as_fd();
        let backend = format!(
            "memory-backend-file,id=ram,size={}M,mem-path=/proc/self/fd/{},share=on,prealloc=off",
            memory.region().bytes() >> 20,
            ram.as_raw_fd()
        );
        let mut command = Command::new(QEMU);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "pc-q35-7.2,usb=off,sata=off,memory-backend=ram"])
            .args(["-accel", "tcg,tb-size=16", "-cpu", "max", "-smp", "2"])
            .args(["-m", &format!("{}M", memory.region().bytes() >> 20)])
            .args(["-object", &backend])
            .args([
                "-chardev",
                &format!("socket,id=qmp,fd={}", theirs.as_raw_fd()),
            ])
            .args(["-mon", "chardev=qmp,mode=control"])
            .args(["-sandbox", SANDBOX])
            .args(more)
            .stdin(Stdio::null());
        Jail::new(None, &[ram, theirs.as_fd()]).confine(&mut command);
        let child = command.spawn().expect("QEMU starts");
        drop(theirs);
        ours.set_read_timeout(Some(SOON)).expect("set");
        let mut qemu = Self {
            child,
            hears: BufReader::new(ours.try_clone().expect("a clone")),
            says: ours,
        };
        assert!(qemu.line().contains("QMP"));
        qemu.execute("qmp_capabilities", "{}");
        qemu
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.hears.read_line(&mut line).expect("an answer in time");
        line
    }

    fn execute(&mut self, command: &str, arguments: &str) -> String {
        let text = format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}\n");
        // In one piece: QEMU does what it is told at the last brace, and may be gone after it.
        if let Err(err) = self.says.write_all(text.as_bytes()) {
            panic!("{command}: {err}, QEMU: {:?}", self.child.wait());
        }
        loop {
            let line = self.line();
            if !line.contains("\"event\"") {
                assert!(line.contains("return"), "{line}");
                return line;
            }
        }
    }

    /// Hands it an open file under a name.
    fn give(&mut self, name: &str, file: &File) {
        let text =
            format!("{{\"execute\": \"getfd\", \"arguments\": {{\"fdname\": \"{name}\"}}}}\n");
        let fds = [file.as_raw_fd()];
        let with = [ControlMessage::ScmRights(&fds)];
        let part = [IoSlice::new(text.as_bytes())];
        let socket = self.says.as_raw_fd();
        sendmsg::<()>(socket, &part, &with, MsgFlags::empty(), None).expect("sent");
        assert!(self.line().contains("return"));
    }

    /// Keeps guest memory out of the stream of the device state.
    fn leave_memory_out(&mut self) {
        let capability = r#"{"capabilities": [{"capability": "x-ignore-shared", "state": true}]}"#;
        self.execute("migrate-set-capabilities", capability);
    }

    /// Eight bytes of guest memory, as QEMU reads them.
    fn word_at(&mut self, address: u64) -> u64 {
        let arguments = format!("{{\"command-line\": \"xp /1gx {address:#x}\"}}");
        let said = self.execute("human-monitor-command", &arguments);
        let word = said.split("0x").nth(1).expect("a word");
        let digits = word
            .chars()
            .take_while(char::is_ascii_hexdigit)
            .collect::<String>();
        u64::from_str_radix(&digits, 16).expect("hex")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _gone = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn page(dir: &Path, qemu: &Qemu, memory: &GuestMemory) -> Pager {
    let (daemon, sandbox) = (dir.join("pager.sock"), "cl-test".to_owned());
    let mut spec = PagerSpec::new(dir, qemu.child.id(), daemon, sandbox);
    // This program is no pager.
    spec.program = PathBuf::from(env!("CARGO_BIN_EXE_wrenn"));
    assert_eq!(spec.tracking, Tracking::WriteProtect, "needs Linux 6.7");
    Pager::start(spec, memory, Instant::now() + SOON, drop).expect("it serves")
}

fn word_of(image: &Image, address: u64) -> u64 {
    let at = usize::try_from(address).expect("small");
    u64::from_le_bytes(*image.bytes[at..].first_chunk().expect("inside"))
}

#[test]
#[ignore = "starts a real VMM"]
fn a_jailed_qemu_reads_the_image_and_outlives_a_killed_pager() {
    let dir = tempfile::tempdir().expect("tempdir");
    let image = Image::make(dir.path(), MEMORY, Elsewhere::None);
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let mut qemu = Qemu::start(&memory, &["-incoming", "defer"]);
    let blocks = || {
        nix::sys::stat::fstat(memory.as_fd())
            .expect("fstat")
            .st_blocks
    };
    assert_eq!(blocks(), 0, "QEMU touches nothing before the state comes");

    let asked = Instant::now();
    let pager = page(dir.path(), &qemu, &memory);
    println!("from start to serving: {:?}", asked.elapsed());
    assert_eq!(blocks(), 0, "nor does the pager");
    assert!(qemu.execute("query-status", "{}").contains("inmigrate"));

    // In a window that is there and in one that is a hole, both past the first MiB, where a PC has
    // other things than memory.
    for address in [0x10_0000, 0x10_0008, 0x13_0000, 0x123_4560] {
        let expected = word_of(&image, address);
        assert_eq!(qemu.word_at(address), expected, "at {address:#x}");
    }
    let old = pager.pid();
    kill(
        Pid::from_raw(i32::try_from(old).expect("a pid")),
        Signal::SIGKILL,
    )
    .expect("there");
    assert_eq!(qemu.word_at(0x200_0000), word_of(&image, 0x200_0000));
    assert!(eventually(SOON, || pager.pid() != old));
    assert!(qemu.execute("query-status", "{}").contains("inmigrate"));
    let listed = pages_of(
        &pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed"),
    );
    assert!(listed.is_empty(), "QEMU only read: {listed:?}");
    qemu.execute("quit", "{}");
    let status = qemu.child.wait().expect("reaped");
    assert!(status.success(), "{status}");
}

/// All of a guest's memory.
fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.region().bytes()).expect("64-bit")];
    let file = File::from(memory.as_fd().try_clone_to_owned().expect("a clone"));
    file.read_exact_at(&mut bytes, 0).expect("readable");
    bytes
}

/// Boots a kernel that will find no root, and stops it long before it notices. Returns its memory;
/// its devices' state goes into `state`.
fn stop_in_mid_boot(console: &Path, state: &File) -> Vec<u8> {
    let images = std::env::var_os("WRENN_IMAGES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev/images"),
        PathBuf::from,
    );
    let kernel = images.join("kernel/vmlinuz");
    let memory = GuestMemory::create(GUEST_MEMORY).expect("memory");
    let serial = format!("file:{}", console.display());
    let kernel = kernel.to_str().expect("UTF-8");
    let words = "console=ttyS0 no_timer_check cryptomgr.notests";
    let more = ["-serial", &serial, "-kernel", kernel, "-append", words];
    let mut qemu = Qemu::start(&memory, &more);
    let says = |words: &str| fs::read_to_string(console).is_ok_and(|text| text.contains(words));
    assert!(eventually(BOOT, || says("Memory:")), "it boots");
    qemu.execute("stop", "{}");
    qemu.leave_memory_out();
    qemu.give("state", state);
    qemu.execute("migrate", "{\"uri\": \"fd:state\"}");
    assert!(eventually(SOON, || {
        qemu.execute("query-migrate", "{}")
            .contains("\"completed\"")
    }));
    assert!(!says("Kernel panic"), "stopped too late");
    content(&memory)
}

#[test]
#[ignore = "boots a real guest"]
fn a_guest_goes_on_in_mid_boot_and_every_page_it_writes_is_listed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let console = dir.path().join("console");
    let state = dir.path().join("state");
    let parent = stop_in_mid_boot(&console, &File::create(&state).expect("made"));
    Image::of(dir.path(), &parent);

    let memory = GuestMemory::create(GUEST_MEMORY).expect("memory");
    let resumed = dir.path().join("resumed");
    let serial = format!("file:{}", resumed.display());
    let mut qemu = Qemu::start(&memory, &["-serial", &serial, "-incoming", "defer"]);
    let pager = page(dir.path(), &qemu, &memory);
    qemu.leave_memory_out();
    qemu.give("state", &File::open(&state).expect("there"));
    qemu.execute("migrate-incoming", "{\"uri\": \"fd:state\"}");
    assert!(eventually(SOON, || !qemu
        .execute("query-status", "{}")
        .contains("inmigrate")));
    let at_load = stats(&pager).faults;
    qemu.execute("cont", "{}");
    // It comes to the end of its boot by itself, killed pager or not.
    let old = pager.pid();
    kill(
        Pid::from_raw(i32::try_from(old).expect("a pid")),
        Signal::SIGKILL,
    )
    .expect("there");
    let says = |words: &str| fs::read_to_string(&resumed).is_ok_and(|text| text.contains(words));
    assert!(
        eventually(BOOT, || says("Unable to mount root fs")),
        "it went on"
    );
    qemu.execute("stop", "{}");

    let listed = pages_of(
        &pager
            .written_since_parent(Instant::now() + SOON)
            .expect("listed"),
    );
    let now = content(&memory);
    let present = nix::sys::stat::fstat(memory.as_fd())
        .expect("fstat")
        .st_blocks
        / 8;
    let pages = parent.chunks_exact(PAGE).zip(now.chunks_exact(PAGE));
    let mut equal = 0;
    let mut differing = 0;
    // Pages that are not there have read as zero just now, and are as they were.
    let file = File::from(memory.as_fd().try_clone_to_owned().expect("a clone"));
    let existing = PageSet::present_in(file.as_fd(), memory.region()).expect("listed");
    for (page, (before, after)) in (0..).zip(pages) {
        let differs = existing.contains(PageIndex(page)) && before != after;
        let is_listed = listed.binary_search(&page).is_ok();
        assert!(
            is_listed || !differs,
            "page {page} was written and not listed"
        );
        differing += u64::from(differs);
        equal += u64::from(is_listed && !differs);
    }
    println!("{at_load} faults until the state was loaded; {present} pages present at the end");
    println!("{differing} pages differ, all listed; {equal} more were written with what was there");
    println!("{:#?}", stats(&pager));
    assert!(differing > 0 && differing + equal < existing.len());
}
