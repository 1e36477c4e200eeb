//! What lies in a sandbox's directory, and what a shim and its daemon say to each other, as fuzz
//! targets.

use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;
use proto::epoch::Epoch;
use proto::fuzzing::{Target, scratch};
use proto::ids::SandboxId;
use proto::units::{Mib, Stamp};
use proto::wire::shim as wire;

use super::dirty::{Basis, DirtyList};
use super::exit::ExitRecord;
use super::files;
use super::lease::{GuestState, LeaseReader, LeaseTimes, LeaseWriter, decide};
use super::protocol;
use super::saved::Saved;
use super::spec::{MemoryImage, RestoreSpec, ShimSpec};
use super::state::StateFile;
use crate::base::clock::BootInstant;
use crate::fuzzing::{file_with, hashed};
use crate::pager::region::{PAGE_BYTES, Region};
use crate::vmm::{Accelerator, Confinement, Driver, Hardware, NetworkSpec, VmmExit, VmmSpec};

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "shim-request",
        samples: requests,
        run: request,
    },
    Target {
        name: "shim-response",
        samples: responses,
        run: response,
    },
    Target {
        name: "shim-spec",
        samples: specs,
        run: spec,
    },
    Target {
        name: "exit-record",
        samples: exits,
        run: exit,
    },
    Target {
        name: "dirty-list",
        samples: lists,
        run: list,
    },
    Target {
        name: "lease-file",
        samples: leases,
        run: lease,
    },
];

/// The memory that lists are of.
const REGION: Region = Region::new(Mib(1));

fn framed(message: &impl Message) -> Vec<u8> {
    protocol::encode(message).expect("a small message")
}

fn requests() -> Vec<Vec<u8>> {
    use wire::request::Call;
    let calls = [
        Call::Stop(wire::Stop { grace_ms: 3000 }),
        Call::WaitFreeze(wire::WaitFreeze { frozen: true }),
        Call::Save(wire::Save {
            timeout_ms: 20_000,
            since_resume: true,
        }),
    ];
    let requests = calls.map(|call| framed(&wire::Request { call: Some(call) }));
    vec![requests.concat()]
}

fn request(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some(_)) = protocol::read::<wire::Request>(&mut rest) {}
}

fn responses() -> Vec<Vec<u8>> {
    use wire::response::Answer;
    let status = wire::Status {
        protocol_version: 1,
        shim_pid: 10,
        vmm_pid: 11,
        sandbox: vec![3; 16],
        epoch: 7,
        vmm_version: "7.2.22".into(),
        accelerator: "tcg".into(),
        stand: wire::Stand::Saved.into(),
        machine: "pc-q35-7.2/1".into(),
        ..wire::Status::default()
    };
    let saved = wire::Saved {
        shim_pid: 10,
        memory_fd: 5,
        memory_bytes: 1 << 20,
        state_bytes: 30_000,
        state_digest: vec![7; 32],
        dirty_bytes: 1 << 16,
        ..wire::Saved::default()
    };
    let exit = wire::Exit {
        code: -1,
        signal: 9,
        reason: "guest-shutdown".into(),
        ..wire::Exit::default()
    };
    let answers = [
        Answer::Status(status),
        Answer::Saved(saved),
        Answer::Exit(exit),
    ];
    let framed = answers.map(|answer| {
        framed(&wire::Response {
            answer: Some(answer),
        })
    });
    framed.into()
}

fn response(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some(read)) = protocol::read::<wire::Response>(&mut rest) {
        if let Some(wire::response::Answer::Saved(saved)) = read.answer {
            let _refused = Saved::from_wire(Path::new("/D"), saved);
        }
    }
}

fn guest() -> ShimSpec {
    ShimSpec {
        sandbox: SandboxId([3; 16]),
        epoch: Epoch(7),
        lease: Some(PathBuf::from("/data/lease")),
        vmm: VmmSpec {
            driver: Driver::Qemu,
            program: PathBuf::from("/usr/bin/qemu-system-x86_64"),
            accelerator: Accelerator::Tcg,
            kernel: PathBuf::from("/images/kernel"),
            initramfs: PathBuf::from("/images/initramfs"),
            cmdline: "console=ttyS0".into(),
            vcpus: 1,
            memory: Mib(256),
            root_disk: Some(PathBuf::from("/D/disk.qcow2")),
            network: Some(NetworkSpec {
                netns: PathBuf::from("/run/netns/wr-1"),
                tap: "tap0".into(),
                mac: [2, 0, 0, 0, 0, 1],
            }),
            confinement: Confinement::default(),
        },
        restore: None,
    }
}

/// The files of a guest that boots and of one that is restored.
fn specs() -> Vec<Vec<u8>> {
    let restored = ShimSpec {
        restore: Some(RestoreSpec {
            state: StateFile {
                path: PathBuf::from("/D/state"),
                bytes: 30_000,
                digest: [7; 32].into(),
            },
            hardware: Hardware {
                machine: "pc-q35-7.2/1".into(),
                cpu: "tcg-1".into(),
            },
            memory: MemoryImage::Flat(PathBuf::from("/D/memory")),
        }),
        ..guest()
    };
    let mut paged = restored.clone();
    if let Some(restore) = &mut paged.restore {
        restore.memory = MemoryImage::Paged {
            daemon: PathBuf::from("/data/pager.sock"),
        };
    }
    let written = [guest(), restored, paged].map(|spec| {
        let dir = tempfile::tempdir_in(scratch()).expect("a directory");
        spec.write(dir.path()).expect("written");
        fs::read(dir.path().join(files::SPEC)).expect("just written")
    });
    written.into()
}

fn spec(bytes: &[u8]) {
    let (dir, _path) = file_with(files::SPEC, bytes);
    let Ok(read) = ShimSpec::read(dir.path()) else {
        return;
    };
    read.write(dir.path())
        .expect("what was read can be written");
    let again = ShimSpec::read(dir.path());
    assert_eq!(again.ok(), Some(read), "it changed on its way");
}

fn exits() -> Vec<Vec<u8>> {
    let exit = VmmExit {
        code: Some(1),
        signal: None,
        reason: "guest-shutdown".into(),
    };
    let record = ExitRecord::new(
        exit,
        true,
        "its last words".into(),
        Stamp(1_700_000_000_000),
    );
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    record.write(dir.path()).expect("written");
    vec![fs::read(dir.path().join(files::EXIT)).expect("just written")]
}

fn exit(bytes: &[u8]) {
    let (dir, _path) = file_with(files::EXIT, bytes);
    if let Ok(Some(read)) = ExitRecord::read(dir.path()) {
        read.write(dir.path())
            .expect("what was read can be written");
        let again = ExitRecord::read(dir.path());
        assert_eq!(again.ok(), Some(Some(read)), "it changed on its way");
    }
}

fn lists() -> Vec<Vec<u8>> {
    let pages = |from: u64, to: u64| from * PAGE_BYTES..to * PAGE_BYTES;
    let ranges = vec![pages(0, 1), pages(3, 20), pages(200, 256)];
    let encoded = |basis| {
        let list = DirtyList::new(basis, REGION, ranges.clone()).expect("it is sound");
        let dir = tempfile::tempdir_in(scratch()).expect("a directory");
        let draft = list.draft(dir.path()).expect("written");
        draft.keep().expect("kept");
        fs::read(dir.path().join(files::DIRTY)).expect("just written")
    };
    [Basis::Zeros, Basis::Parent, Basis::LastSeal]
        .map(encoded)
        .into()
}

/// Reads the list as it is, and with its hash made right: what is taken is in order, apart, whole
/// pages, and inside the memory.
fn list(bytes: &[u8]) {
    for bytes in [bytes, &hashed(bytes)] {
        let (dir, _path) = file_with(files::DIRTY, bytes);
        let Ok(read) = DirtyList::read(dir.path(), REGION) else {
            continue;
        };
        let mut reached = 0;
        for range in read.ranges() {
            assert!(range.start >= reached && range.start < range.end);
            assert!(range.start.is_multiple_of(PAGE_BYTES) && range.end.is_multiple_of(PAGE_BYTES));
            reached = range.end;
        }
        assert!(reached <= REGION.bytes());
        assert!(read.bytes() <= REGION.bytes());
    }
}

fn leases() -> Vec<Vec<u8>> {
    let limited = LeaseTimes::Limited {
        freeze_at: BootInstant::from_nanos(8_000_000_000),
        kill_at: BootInstant::from_nanos(68_000_000_000),
    };
    let written = [limited, LeaseTimes::Unlimited].map(|times| {
        let (_dir, path) = file_with("lease", &[]);
        let writer = LeaseWriter::open(&path).expect("it can be written");
        writer.write(times).expect("written");
        fs::read(&path).expect("just written")
    });
    written.into()
}

/// Reads the file as it is, and with its checksum made right; what is taken can be decided by.
fn lease(bytes: &[u8]) {
    /// Of 64 bytes the last 16 are the beginning of a BLAKE3.
    const SUM: usize = 16;
    let body = &bytes[..bytes.len().saturating_sub(SUM)];
    let mended = [body, &blake3::hash(body).as_bytes()[..SUM]].concat();
    for bytes in [bytes, &mended] {
        let (_dir, path) = file_with("lease", bytes);
        let reader = LeaseReader::new(&path).expect("there is a boot id");
        if let Ok(times) = reader.read() {
            let now = BootInstant::from_nanos(9_000_000_000);
            for state in [GuestState::Running, GuestState::Frozen] {
                let _decision = decide(now, times.withdrawn(now), state);
            }
        }
    }
}
