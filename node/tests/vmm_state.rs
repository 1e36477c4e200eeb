//! Device states of real guests: written, taken in, damaged, refused, and VMMs that die over them.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use proto::units::Mib;
use shim_support::{BOOT, SOON, Sandbox, copy_memory, counted, eventually, signal};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::shim::dirty::{AllPresent, DirtyPages};
use wrenn_node::vmm::error::MoveStateError;
use wrenn_node::vmm::{self, Hardware, Started, Vmm, VmmError, VmmSpec};

/// Longest that anything may take that ends in an error. A VMM that is killed or given nonsense
/// must not hold up its shim.
const BOUND: Duration = Duration::from_secs(10);

/// A VMM without a shim, and what its guest has said.
struct Driven {
    memory: GuestMemory,
    vmm: Box<dyn Vmm>,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Driven {
    fn boot(spec: &VmmSpec) -> Self {
        let memory = GuestMemory::create(spec.memory).expect("memory");
        let name = "vmm-state-test";
        let started = vmm::spawn(spec, name, memory.as_fd(), soon()).expect("up");
        Self::listen(memory, started)
    }

    /// A guest that counts.
    fn boot_counting() -> Self {
        let guest = Self::boot(&counting());
        guest.await_count(3);
        guest
    }

    /// A VMM that waits for a state.
    fn incoming(spec: &VmmSpec, hardware: &Hardware) -> Self {
        let memory = GuestMemory::create(spec.memory).expect("memory");
        let name = "vmm-state-test";
        // QEMU looks at the state only when it is told to load it.
        let started =
            vmm::spawn_incoming(spec, hardware, memory.as_fd(), name, memory.as_fd(), soon());
        Self::listen(memory, started.expect("up"))
    }

    fn listen(memory: GuestMemory, started: Started) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let (heard, mut console) = (Arc::clone(&said), started.console);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut bytes) {
                heard.lock().expect("whole").extend(&bytes[..count]);
            }
        });
        Self {
            memory,
            vmm: started.vmm,
            said,
        }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().expect("whole")).into_owned()
    }

    /// What the guest has counted to, and comes to count on from.
    fn await_count(&self, least: u64) -> u64 {
        let reached = || counted(&self.console()).is_some_and(|count| count >= least);
        assert!(eventually(BOOT, reached), "{}", self.console());
        counted(&self.console()).expect("it counts")
    }

    fn save(&self) -> Result<File, VmmError> {
        let mut file = tempfile::tempfile().expect("tempfile");
        self.vmm.save_state(file.as_fd(), soon())?;
        file.rewind().expect("rewound");
        Ok(file)
    }

    fn load(&self, state: &File) -> Result<(), VmmError> {
        let mut state = state;
        state.rewind().expect("rewound");
        self.vmm.load_state(state.as_fd(), soon())
    }

    /// Gives another guest's memory to this one, which has not begun.
    fn take_memory(&self, other: &GuestMemory) {
        let list = AllPresent.list(other, soon()).expect("listed");
        let image = tempfile::NamedTempFile::new().expect("tempfile");
        let from = File::from(other.as_fd().try_clone_to_owned().expect("a clone"));
        copy_memory(&from, list.ranges(), other.region().bytes(), image.path());
        let mut into = File::from(self.memory.as_fd().try_clone_to_owned().expect("a clone"));
        into.rewind().expect("rewound");
        std::io::copy(&mut File::open(image.path()).expect("there"), &mut into).expect("copied");
    }
}

fn counting() -> VmmSpec {
    let spec = Sandbox::new().spec("test.count").vmm;
    VmmSpec { vcpus: 2, ..spec }
}

fn soon() -> Instant {
    Instant::now() + SOON
}

fn changed(state: &File, change: impl FnOnce(&mut Vec<u8>)) -> File {
    let mut content = Vec::new();
    let mut from = state;
    from.rewind().expect("rewound");
    from.read_to_end(&mut content).expect("read");
    change(&mut content);
    let mut file = tempfile::tempfile().expect("tempfile");
    file.write_all(&content).expect("written");
    file
}

#[test]
#[ignore = "boots a real guest"]
fn a_saved_guest_goes_on_as_if_nothing_had_happened_and_can_be_saved_again() {
    let guest = Driven::boot_counting();
    for round in 0..3 {
        let began = Instant::now();
        let state = guest.save().expect("saved");
        let took = began.elapsed();
        let bytes = state.metadata().expect("there").len();
        println!("save {round}: {bytes} bytes in {took:?}");
        assert!(bytes < 4 << 20, "{bytes} bytes: the memory is in it");
        let before = counted(&guest.console()).expect("it counts");
        // Not without going on in between.
        let again = guest.save().expect_err("refused");
        assert!(matches!(again, VmmError::Save(_)), "{again}");
        let began = Instant::now();
        guest.vmm.resume(soon()).expect("resumed");
        println!("resume {round}: {:?}", began.elapsed());
        guest.await_count(before + 3);
    }
    // From its very first line on: it has not started anew.
    assert_eq!(guest.console().matches("guest: up").count(), 1);
}

#[test]
#[ignore = "boots a real guest"]
fn a_saved_guest_counts_on_in_another_vmm_and_can_be_saved_there() {
    let guest = Driven::boot_counting();
    let hardware = guest.vmm.hardware().clone();
    println!("saved on {hardware}, QEMU {}", guest.vmm.version());
    let mut state = guest.save().expect("saved");
    let mut last = guest;
    for round in 0..2 {
        let next = Driven::incoming(&counting(), &hardware);
        let empty = AllPresent.list(&next.memory, soon()).expect("listed");
        assert_eq!(empty.bytes(), 0, "the VMM has touched the memory");
        next.take_memory(&last.memory);
        let before = counted(&last.console()).expect("it counts");
        last.vmm.kill().expect("killed");
        let began = Instant::now();
        next.load(&state).expect("loaded");
        println!("load {round}: {:?}", began.elapsed());
        thread::yield_now();
        assert_eq!(counted(&next.console()), None, "it runs untold");
        next.vmm.resume(soon()).expect("resumed");
        let after = next.await_count(before + 3);
        let console = next.console();
        let first = format!("guest: count {}.", before + 1);
        assert!(console.contains(&first), "{before}, {after}: {console}");
        state = next.save().expect("saved again");
        last = next;
    }
}

#[test]
#[ignore = "starts real VMMs"]
fn a_state_cut_short_or_damaged_ends_in_an_error_in_bounded_time() {
    let guest = Driven::boot(&counting());
    let hardware = guest.vmm.hardware().clone();
    let state = guest.save().expect("saved");
    let length = usize::try_from(state.metadata().expect("there").len()).expect("small");
    for cut in [0, 1, 13, length / 3, length / 2, length * 3 / 4] {
        let (damaged, next) = (
            changed(&state, |bytes| bytes.truncate(cut)),
            Driven::incoming(&counting(), &hardware),
        );
        let began = Instant::now();
        let refused = next.load(&damaged).expect_err("cut short");
        assert!(matches!(refused, VmmError::Load(_)), "{cut}: {refused}");
        assert!(began.elapsed() < BOUND, "{cut}: {:?}", began.elapsed());
    }
    for at in [
        0,
        5,
        8,
        20,
        40,
        length / 4,
        length / 2,
        length - 40,
        length - 3,
    ] {
        let (damaged, next) = (
            changed(&state, |bytes| bytes[at] ^= 0x40),
            Driven::incoming(&counting(), &hardware),
        );
        let began = Instant::now();
        // QEMU has no checksum: some damage it cannot see. The shim's digest does.
        let loaded = next.load(&damaged);
        println!("flipped at {at} of {length}: {loaded:?}");
        assert!(began.elapsed() < BOUND, "{at}: {:?}", began.elapsed());
    }
}

#[test]
#[ignore = "starts real VMMs"]
fn the_state_of_another_machine_or_of_another_guest_is_refused() {
    let guest = Driven::boot(&counting());
    let hardware = guest.vmm.hardware().clone();
    let state = guest.save().expect("saved");
    let other = changed(&state, |bytes| {
        let at = bytes
            .windows(10)
            .position(|it| it == b"pc-q35-7.2")
            .expect("named");
        bytes[at..at + 10].copy_from_slice(b"pc-q35-7.1");
    });
    let next = Driven::incoming(&counting(), &hardware);
    let refused = next.load(&other).expect_err("another machine");
    assert!(matches!(refused, VmmError::Load(_)), "{refused}");
    let exit = next.vmm.wait(soon()).expect("asked").expect("it ends");
    assert_ne!(exit.code, Some(0));
    // A guest with fewer processors than the one that was saved, or with less memory.
    let [mut fewer, mut less] = [counting(), counting()];
    fewer.vcpus = 1;
    less.memory = Mib(128);
    for smaller in [fewer, less] {
        let next = Driven::incoming(&smaller, &hardware);
        let refused = next.load(&state).expect_err("smaller");
        println!("{smaller:?}: {refused:?}");
        let exit = next.vmm.wait(soon()).expect("asked").expect("it ends");
        assert_ne!(exit.code, Some(0));
    }
}

#[test]
#[ignore = "starts real VMMs"]
fn a_vmm_killed_at_any_step_of_a_save_is_told_of_at_once() {
    for millis in [0, 1, 3, 6, 10, 15, 25, 40] {
        let guest = Driven::boot(&counting());
        let pid = guest.vmm.pid();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(millis));
            signal(pid, Signal::SIGKILL);
        });
        let began = Instant::now();
        let saved = guest.save();
        assert!(
            began.elapsed() < BOUND,
            "{millis} ms: {:?}",
            began.elapsed()
        );
        killer.join().expect("killed");
        match saved {
            Ok(_) => println!("{millis} ms: saved before"),
            Err(err) => assert!(matches!(err, VmmError::Save(_)), "{millis} ms: {err}"),
        }
        let exit = guest.vmm.wait(soon()).expect("asked").expect("ended");
        assert_eq!(exit.signal, Some(9));
    }
}

#[test]
#[ignore = "starts real VMMs"]
fn a_vmm_killed_at_any_step_of_a_load_is_told_of_at_once() {
    let guest = Driven::boot(&counting());
    let hardware = guest.vmm.hardware().clone();
    let state = guest.save().expect("saved");
    for millis in [0, 1, 3, 6, 10, 15, 25, 40] {
        let next = Driven::incoming(&counting(), &hardware);
        let pid = next.vmm.pid();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(millis));
            signal(pid, Signal::SIGKILL);
        });
        let began = Instant::now();
        let loaded = next.load(&state);
        assert!(
            began.elapsed() < BOUND,
            "{millis} ms: {:?}",
            began.elapsed()
        );
        killer.join().expect("killed");
        match loaded {
            Ok(()) => println!("{millis} ms: loaded before"),
            Err(err) => assert!(matches!(err, VmmError::Load(_)), "{millis} ms: {err}"),
        }
        let exit = next.vmm.wait(soon()).expect("asked").expect("ended");
        assert_eq!(exit.signal, Some(9));
    }
}

#[test]
#[ignore = "boots a real guest"]
fn a_save_that_fails_or_runs_out_of_time_is_called_off_and_the_guest_goes_on() {
    let guest = Driven::boot_counting();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("there");
    let failed = guest
        .vmm
        .save_state(full.as_fd(), soon())
        .expect_err("no room");
    println!("without room: {failed:?}");
    assert!(
        matches!(failed, VmmError::Save(MoveStateError::GaveUp { .. })),
        "{failed:?}"
    );
    let before = counted(&guest.console()).expect("it counts");
    guest.vmm.resume(soon()).expect("resumed");
    guest.await_count(before + 3);
    // One that hears nothing until it is too late: the save must not come about afterwards.
    guest.vmm.freeze().expect("frozen");
    let file = tempfile::tempfile().expect("tempfile");
    let began = Instant::now();
    let deadline = began + Duration::from_millis(300);
    let late = guest
        .vmm
        .save_state(file.as_fd(), deadline)
        .expect_err("silence");
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    assert!(matches!(late, VmmError::Save(_)), "{late:?}");
    guest.vmm.thaw().expect("thawed");
    let before = counted(&guest.console()).expect("it counts");
    guest.vmm.resume(soon()).expect("resumed");
    let after = guest.await_count(before + 20);
    println!("{before}, and after a second {after}");
    guest.save().expect("and it can be saved");
    // Let go on at once, it must not be caught by the end of its own save.
    for _ in 0..30 {
        guest.vmm.resume(soon()).expect("resumed");
        guest.save().expect("saved");
    }
    let before = counted(&guest.console()).expect("it counts");
    guest.vmm.resume(soon()).expect("resumed");
    guest.await_count(before + 3);
}
