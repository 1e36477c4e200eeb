//! What Cloud Hypervisor says, and what is kept of its guests, as fuzz targets.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proto::fuzzing::Target;
use proto::units::Mib;

use super::events::Splitter;
use super::http;
use super::kept::{Foundation, Kept};
use super::offload::codec::{Command, Request};
use super::offload::link;
use super::offload::taking::{Ask, Taking};
use crate::pager::memory::GuestMemory;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "offload",
        samples: hand_overs,
        run: take_over,
    },
    Target {
        name: "cloud-hypervisor-state",
        samples: states,
        run: state,
    },
    Target {
        name: "cloud-hypervisor-api",
        samples: answers,
        run: answer,
    },
    Target {
        name: "cloud-hypervisor-events",
        samples: reports,
        run: report,
    },
];

/// Never waited for: all there is to hear is said before.
const PATIENCE: Duration = Duration::from_secs(10);
/// Memory of the guest that is handed over.
const MEMORY: Mib = Mib(64);
/// A configuration as it is sent.
const CONFIG: &str = r#"{"vm_config":{"cpus":{"boot_vcpus":1}},"common_cpuid":[{"function":1,"index":0,"flags":0,"eax":657009,"ebx":67584,"ecx":4160238083,"edx":395049983}],"memory_manager_data":{"memory_ranges":{"data":[]},"guest_ram_mappings":[{"slot":0,"gpa":0,"size":67108864,"zone_id":"ram","virtio_mem":false,"file_offset":0}],"start_of_device_area":4294967296,"boot_ram":67108864,"current_ram":67108864,"arch_mem_regions":[{"base":0,"size":3221225472,"r_type":"Ram"}],"hotplug_slots":[{"base":0,"length":0,"active":false,"inserting":false,"removing":false}],"next_memory_slot":1,"selected_slot":0,"next_hotplug_slot":0}}"#;
/// A state as it is sent.
const STATE: &str = r#"{"snapshots":{"cpu-manager":{"snapshots":{}}},"snapshot_data":null}"#;

/// A hand-over without its descriptor, which bytes cannot carry.
fn hand_overs() -> Vec<Vec<u8>> {
    let document = |command, text: &str| {
        let header = Request::new(command, text.len() as u64).encode();
        [&header[..], text.as_bytes()].concat()
    };
    let empty = |command| Request::new(command, 0).encode().to_vec();
    let whole = [
        empty(Command::Start),
        [&Request::new(Command::MemoryFd, 4).encode()[..], &[0; 4]].concat(),
        document(Command::Config, CONFIG),
        document(Command::State, STATE),
        empty(Command::CompletePaused),
    ];
    vec![whole.concat()]
}

/// The machine alone gets as far as the bytes do; the socket ends at the first slot, whose
/// descriptor is not there.
fn take_over(bytes: &[u8]) {
    let mut taking = Taking::default();
    let mut rest = bytes;
    let mut whole = false;
    while let Some((header, after)) = rest.split_first_chunk() {
        let Ok(ask) = Request::decode(*header)
            .map_err(Into::into)
            .and_then(|it| taking.hear(it))
        else {
            break;
        };
        assert!(!whole, "something came after the end");
        rest = match ask {
            Ask::Answer => after,
            Ask::Slot => match after.split_first_chunk() {
                Some((number, after)) if taking.slot(u32::from_le_bytes(*number)).is_ok() => after,
                _ => break,
            },
            Ask::Config(length) => match after.split_at_checked(length) {
                Some((config, after)) => {
                    let _refused = Foundation::of_config(config, MEMORY.bytes());
                    after
                }
                None => break,
            },
            Ask::State(length) => match after.split_at_checked(length) {
                Some((_, after)) => after,
                None => break,
            },
            Ask::Whole => {
                whole = true;
                after
            }
        };
    }
    assert!(
        !whole || !taking.slots().is_empty(),
        "a guest without memory"
    );
    by_socket(bytes);
}

fn by_socket(bytes: &[u8]) {
    let memory = GuestMemory::create(Mib(1)).expect("memory");
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("set");
    // What does not fit into the socket's buffer would not be read either.
    let _full = theirs.write_all(bytes);
    theirs.shutdown(Shutdown::Write).expect("shut down");
    let deadline = Instant::now() + PATIENCE;
    assert!(
        link::take(ours, memory.as_fd(), deadline).is_err(),
        "without memory"
    );
    assert!(Instant::now() < deadline, "it waited for nobody");
}

fn states() -> Vec<Vec<u8>> {
    let foundation = Foundation::of_config(CONFIG.as_bytes(), MEMORY.bytes());
    let kept = Kept {
        machine: "cloud-hypervisor-53/1".to_owned(),
        foundation: foundation.expect("a sample"),
        state: STATE.as_bytes().to_vec(),
    };
    vec![kept.encode().expect("a sample")]
}

fn state(bytes: &[u8]) {
    let Ok(kept) = Kept::decode(bytes, MEMORY.bytes()) else {
        return;
    };
    let again = kept.encode().expect("it was read");
    let read = Kept::decode(&again, MEMORY.bytes()).expect("it was written");
    assert_eq!(read, kept);
    assert!(
        !kept.foundation.slots().is_empty(),
        "a guest without memory"
    );
}

fn answers() -> Vec<Vec<u8>> {
    let head = "HTTP/1.1 500 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n";
    let refusal = format!("{head}Content-Length: 15\r\n\r\n[\"not running\"]");
    vec![refusal.into_bytes(), b"HTTP/1.1 204 \r\n\r\n".to_vec()]
}

fn answer(bytes: &[u8]) {
    if let Ok(Some(answer)) = http::decode(bytes) {
        assert!(answer.body.len() <= bytes.len());
        // What is whole stays so, whatever comes after it.
        let more = [bytes, b"more"].concat();
        assert_eq!(http::decode(&more), Ok(Some(answer)));
    }
}

fn reports() -> Vec<Vec<u8>> {
    let report =
        r#"{"timestamp":{"secs":1,"nanos":2},"source":"vm","event":"paused","properties":null}"#;
    vec![format!("{report}\n\n{report}\n\n").into_bytes()]
}

fn report(bytes: &[u8]) {
    let whole = Splitter::default().feed(bytes).len();
    let mut splitter = Splitter::default();
    let halves = bytes.split_at(bytes.len() / 2);
    let found = splitter.feed(halves.0).len() + splitter.feed(halves.1).len();
    // Noise in one half may hide what is in the other, and nothing is found twice.
    assert!(found <= whole.max(2 * bytes.len()));
}
