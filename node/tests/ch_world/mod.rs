//! Cloud Hypervisor with a guest of our own: what its tests share.
//!
//! The guest (`payload.s`) needs no kernel and runs on a KVM that cannot run Linux. The binary is
//! the one that `WRENN_CLOUD_HYPERVISOR` names, or the one in `PATH`. Without it, or without KVM,
//! every test says loudly that it was skipped, and passes.

#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod raw;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use proto::units::Mib;
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::vmm::{self, Accelerator, Confinement, Driver, Hardware, Started, Vmm, VmmSpec};

/// Names the binary.
pub(crate) const BINARY_VARIABLE: &str = "WRENN_CLOUD_HYPERVISOR";
/// Longest wait for anything.
const LONG: Duration = Duration::from_secs(60);
/// Where the payload's first page lies.
pub(crate) const FIRST: u64 = 16 << 20;
/// One page in so many is worked on in a round.
pub(crate) const STRIDE: u64 = 16;
/// What the payload multiplies with.
const MULTIPLIER: u32 = 0x9E37_79B1;
/// Words in a page.
const WORDS: u64 = 1024;
/// Where the payload's processors count: the one numbered `n`, from 1 on, in the `n`th double word.
const COUNTS: usize = 0x8800;
/// Memory of the guests.
pub(crate) const MEMORY: Mib = Mib(64);

/// A moment that no test reaches.
pub(crate) fn soon() -> Instant {
    Instant::now() + LONG
}

/// How a payload ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Never,
    PowerOff { after: u64 },
    Reset { after: u64 },
}

/// What a payload does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    pub(crate) pages: u64,
    pub(crate) end: End,
    /// All of them run; those beside the first count.
    pub(crate) vcpus: u8,
}

impl Default for Payload {
    fn default() -> Self {
        Self {
            pages: 256,
            end: End::Never,
            vcpus: 1,
        }
    }
}

impl Payload {
    /// Makes it in `dir`.
    fn assemble(self, dir: &Path) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ch_world");
        let (object, kernel) = (dir.join("payload.o"), dir.join("payload"));
        let (rounds, end) = match self.end {
            End::Never => (0, 0),
            End::PowerOff { after } => (after, 0x34),
            End::Reset { after } => (after, 1),
        };
        let mut assembler = Command::new("as");
        assembler.arg("--64").arg("-o").arg(&object);
        for (symbol, value) in [
            ("FIRST", FIRST),
            ("PAGES", self.pages),
            ("STRIDE", STRIDE),
            ("PAUSE", 10_000_000),
            ("ROUNDS", rounds),
            ("END", end),
            ("OTHERS", u64::from(self.vcpus - 1)),
        ] {
            assembler.arg("--defsym").arg(format!("{symbol}={value}"));
        }
        run(assembler.arg(source.join("payload.s")));
        let mut linker = Command::new("ld");
        linker.args(["-m", "elf_x86_64", "--no-warn-rwx-segments", "-T"]);
        linker.arg(source.join("payload.ld")).arg("-o").arg(&kernel);
        run(linker.arg(&object));
        kernel
    }
}

/// A program that does nothing, whatever it is told, until it is killed.
pub(crate) fn silent_program(home: &Path) -> PathBuf {
    let (source, object) = (home.join("silent.s"), home.join("silent.o"));
    let program = home.join("silent");
    // `pause`, again and again.
    let text = ".globl _start\n_start: mov $34, %eax\nsyscall\njmp _start\n";
    std::fs::write(&source, text).expect("written");
    run(Command::new("as").arg("-o").arg(&object).arg(&source));
    run(Command::new("ld").arg("-o").arg(&program).arg(&object));
    program
}

/// An empty overlay over an empty raw image, which the payload never touches.
fn make_disk(home: &Path) -> PathBuf {
    let (base, overlay) = (home.join("base.raw"), home.join("root.qcow2"));
    let sparse = File::create(&base).and_then(|file| file.set_len(1 << 20));
    sparse.expect("made");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
    run(command.args([&base, &overlay]));
    overlay
}

fn run(command: &mut Command) {
    let output = command.output().expect("binutils are installed");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// What the payload has in word `word` of page `page` after round `round` has worked on it.
pub(crate) fn word_of(page: u64, word: u64, round: u64) -> u32 {
    let number = u32::try_from(page * WORDS + word).expect("small");
    number.wrapping_mul(MULTIPLIER) ^ u32::try_from(round).expect("small")
}

/// The binary, or `None` after having said that there is none.
pub(crate) fn program() -> Option<PathBuf> {
    let named = std::env::var_os(BINARY_VARIABLE).map(PathBuf::from);
    let found = named.or_else(|| {
        let path = std::env::var_os("PATH")?;
        let mut dirs = std::env::split_paths(&path).map(|dir| dir.join("cloud-hypervisor"));
        dirs.find(|program| program.exists())
    });
    if !Path::new("/dev/kvm").exists() {
        skip("there is no /dev/kvm");
        return None;
    }
    if found.is_none() {
        skip("there is no cloud-hypervisor in PATH, and WRENN_CLOUD_HYPERVISOR names none");
    }
    found
}

/// Says that the test that calls it tests nothing.
pub(crate) fn skip(why: &str) {
    say("SKIPPED, NOTHING WAS TESTED", why);
}

/// Says that the test that calls it leaves a part out.
pub(crate) fn leave_out(part: &str) {
    say("NOT TESTED", part);
}

/// Past the harness, which keeps what is printed by tests that pass.
fn say(what: &str, why: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("\n!!! {what}: {test}: {why} !!!\n\n");
    std::io::stderr()
        .write_all(line.as_bytes())
        .expect("standard error");
}

/// The surroundings of a guest.
pub(crate) struct World {
    pub(crate) home: tempfile::TempDir,
    pub(crate) spec: VmmSpec,
    pub(crate) payload: Payload,
}

impl World {
    /// With the payload as usual; `None` where nothing can be tested.
    pub(crate) fn new() -> Option<Self> {
        Self::with(Payload::default())
    }

    pub(crate) fn with(payload: Payload) -> Option<Self> {
        let program = program()?;
        let home = tempfile::tempdir().expect("tempdir");
        let kernel = payload.assemble(home.path());
        let initramfs = home.path().join("initramfs");
        std::fs::write(&initramfs, "none").expect("written");
        let spec = VmmSpec {
            driver: Driver::CloudHypervisor,
            program,
            accelerator: Accelerator::Kvm,
            kernel,
            initramfs,
            cmdline: "wrenn.probe=1".to_owned(),
            vcpus: payload.vcpus,
            memory: MEMORY,
            root_disk: Some(make_disk(home.path())),
            network: None,
            // Without a group: two VMMs of one test may be around at once.
            confinement: Confinement::of_probe(),
        };
        Some(Self {
            home,
            spec,
            payload,
        })
    }

    /// Its disk lies elsewhere from now on, as on another host.
    pub(crate) fn move_disk(&mut self, name: &str) {
        let place = self.home.path().join(name);
        let disk = self.spec.root_disk.replace(place.clone());
        std::fs::rename(disk.expect("it has one"), place).expect("moved");
    }

    /// A guest that has begun to count.
    pub(crate) fn boot(&self) -> Guest {
        let memory = GuestMemory::create(self.spec.memory).expect("memory");
        let started = vmm::spawn(&self.spec, "ch-test", memory.as_fd(), soon()).expect("up");
        let guest = Guest::new(memory, started);
        guest.await_round(2);
        guest
    }

    /// A machine for the guest in `state`, around `memory`.
    pub(crate) fn incoming(&self, saved: &Saved, memory: GuestMemory) -> Guest {
        let started = self.try_incoming(saved, &memory).expect("up");
        Guest::new(memory, started)
    }

    /// The same, which asks for its pages.
    pub(crate) fn asking(&self, saved: &Saved, memory: GuestMemory) -> Guest {
        let (state, ram) = (saved.state.as_fd(), memory.as_fd());
        let hardware = &saved.hardware;
        let started = vmm::spawn_asking(&self.spec, hardware, state, "ch-test", ram, soon());
        Guest::new(memory, started.expect("up"))
    }

    pub(crate) fn try_incoming(
        &self,
        saved: &Saved,
        memory: &GuestMemory,
    ) -> Result<Started, vmm::SpawnVmmError> {
        let (state, ram) = (saved.state.as_fd(), memory.as_fd());
        vmm::spawn_incoming(&self.spec, &saved.hardware, state, "ch-test", ram, soon())
    }
}

/// A guest at one instant.
pub(crate) struct Saved {
    pub(crate) state: File,
    pub(crate) hardware: Hardware,
    pub(crate) memory: Vec<u8>,
    /// Its last round that was reported.
    pub(crate) round: u64,
}

impl Saved {
    /// Memory with the same content.
    pub(crate) fn copied(&self) -> GuestMemory {
        let memory = GuestMemory::create(MEMORY).expect("memory");
        let file = file_of(&memory);
        for (index, page) in self.memory.chunks(4096).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                file.write_all_at(page, index as u64 * 4096)
                    .expect("written");
            }
        }
        memory
    }
}

/// The memory as a file.
pub(crate) fn file_of(memory: &GuestMemory) -> File {
    let fd: OwnedFd = memory.as_fd().try_clone_to_owned().expect("a clone");
    File::from(fd)
}

/// All of the memory.
pub(crate) fn content_of(memory: &GuestMemory) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(MEMORY.bytes()).expect("small")];
    file_of(memory)
        .read_exact_at(&mut content, 0)
        .expect("read");
    content
}

/// How far each of the payload's processors beside the first has counted in `memory`.
pub(crate) fn counts_in(memory: &[u8], vcpus: u8) -> Vec<u32> {
    let words = memory[COUNTS..].chunks_exact(4).skip(1);
    let words = words.take(usize::from(vcpus) - 1);
    words
        .map(|word| u32::from_le_bytes(word.try_into().expect("four")))
        .collect()
}

/// A VMM without a shim, and what its guest has said.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemory,
    pub(crate) vmm: Box<dyn Vmm>,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Guest {
    pub(crate) fn new(memory: GuestMemory, started: Started) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let (heard, mut console) = (Arc::clone(&said), started.console);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut bytes) {
                heard
                    .lock()
                    .expect("sane")
                    .extend_from_slice(&bytes[..count]);
            }
        });
        let mut stderr = started.stderr;
        thread::spawn(move || {
            let mut text = String::new();
            let _end = stderr.read_to_string(&mut text);
            eprintln!("{text}");
        });
        Self {
            memory,
            vmm: started.vmm,
            said,
        }
    }

    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().expect("sane")).into_owned()
    }

    /// The last round that was reported whole. None of them may have found a wrong word.
    pub(crate) fn round(&self) -> u64 {
        let said = self.said();
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut last = 0;
        for line in whole.lines().filter(|line| line.starts_with("round ")) {
            let (round, bad) = line["round ".len()..].split_once(" bad ").expect(line);
            assert_eq!(bad, "00000000", "{said}");
            last = u64::from_str_radix(round, 16).expect("a number");
        }
        last
    }

    pub(crate) fn await_round(&self, round: u64) {
        let end = soon();
        while self.round() < round {
            assert!(Instant::now() < end, "no round {round}: {}", self.said());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Lays it open, and leaves it saved.
    pub(crate) fn save(&self) -> Saved {
        let mut state = tempfile::tempfile().expect("tempfile");
        self.vmm.save_state(state.as_fd(), soon()).expect("saved");
        std::io::Seek::rewind(&mut state).expect("rewound");
        Saved {
            state,
            hardware: self.vmm.hardware().clone(),
            memory: content_of(&self.memory),
            round: self.round(),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _killed = self.vmm.kill();
        let _reaped = self.vmm.wait(Instant::now() + Duration::from_secs(5));
    }
}
