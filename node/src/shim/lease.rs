//! The node's lease as its shims see it: one small file, and what it asks of a guest.
//!
//! ```text
//! daemon -- LeaseWriter --> <data>/lease -- LeaseReader --> every lease-bound shim's watchdog
//! ```
//!
//! The file holds until when the guests of this node may run, so that shims obey it while the
//! daemon is dead, stopped or cut off. It is [`RECORD_BYTES`] long and rewritten in place by a
//! single `pwrite`: no rename, so that no directory is touched every two seconds, and no `fsync`,
//! because it means something only to processes of this very boot (its id is in the record), and
//! those read the page cache. A reader that meets a half-written record sees a wrong checksum
//! and reads again.
//!
//! Nothing here defaults to "may run". A file that is missing, garbled or of another boot is an
//! error, and the watchdog takes that for a lease that has ended: see [`LeaseTimes::withdrawn`].
//! The daemon must therefore write before it starts a lease-bound sandbox; a shim without a lease
//! refuses to start.
//!
//! Shims outlive the daemon that started them: a later release must go on writing this version
//! for as long as shims of this one may live.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::base::clock::BootInstant;

/// The file's name in the data directory.
const FILE: &str = "lease";
/// What the record begins with.
const MAGIC: [u8; 8] = *b"WRNLEASE";
/// The layout of the record.
const VERSION: u32 = 1;
/// `kind` of a lease that ends.
const LIMITED: u32 = 1;
/// `kind` of a lease that does not.
const UNLIMITED: u32 = 2;
/// Bytes of the checksum: a shortened BLAKE3.
const CHECKSUM_BYTES: usize = 16;
/// The record: magic 8, version 4, kind 4, boot id 16, freeze 8, kill 8, checksum 16; integers
/// little-endian. One page holds it, so that the kernel copies it in one go.
pub const RECORD_BYTES: usize = 64;
/// Tries of a reader before it believes that the record is garbled: each write is over in
/// microseconds, and the next is seconds away.
const READ_TRIES: u32 = 5;
/// Pause between two of them.
const READ_AGAIN: Duration = Duration::from_millis(1);
/// How long a guest whose unlimited lease cannot be read any more stays frozen before it is
/// killed: the cluster's own grace. A frozen guest must not wait for ever to be thawed by a lease
/// that another owner has long been given.
pub const UNREADABLE_GRACE: Duration = Duration::from_secs(60);

/// The lease file of the node whose data lies in `root`.
#[must_use]
pub fn file_in(root: &Path) -> PathBuf {
    root.join(FILE)
}

/// Until when the lease-bound guests of this node may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseTimes {
    /// For ever: the only voter of the cluster is this node.
    Unlimited,
    /// Until an instant, unless it is moved.
    Limited {
        /// From here on guests are frozen.
        freeze_at: BootInstant,
        /// From here on they are killed.
        kill_at: BootInstant,
    },
}

impl LeaseTimes {
    /// What is left of a lease that cannot be read any more: guests freeze at once, and are
    /// killed when the last times that could be read said so. Repeating it changes nothing.
    #[must_use]
    pub fn withdrawn(self, now: BootInstant) -> Self {
        match self {
            Self::Limited { freeze_at, kill_at } => Self::Limited {
                freeze_at: freeze_at.min(now),
                kill_at,
            },
            Self::Unlimited => Self::Limited {
                freeze_at: now,
                kill_at: now + UNREADABLE_GRACE,
            },
        }
    }
}

/// What a watchdog has made of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// It runs.
    Running,
    /// Its VMM is stopped.
    Frozen,
}

/// What a lease asks of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Stop its VMM.
    Freeze,
    /// Let its VMM go on.
    Thaw,
    /// End its VMM for good.
    Kill,
    /// Nothing, until an instant; `None` where only another lease could change that.
    Wait {
        /// When to decide again.
        until: Option<BootInstant>,
    },
}

/// What `times` ask at `now` of a guest in `state`. Pure; knows no clock but the host's boot
/// time, so that a step of the wall clock cannot matter.
#[must_use]
pub fn decide(now: BootInstant, times: LeaseTimes, state: GuestState) -> Decision {
    match (times, state) {
        (LeaseTimes::Limited { kill_at, .. }, _) if now >= kill_at => Decision::Kill,
        (LeaseTimes::Limited { freeze_at, kill_at }, GuestState::Frozen) if now >= freeze_at => {
            Decision::Wait {
                until: Some(kill_at),
            }
        }
        (_, GuestState::Frozen) => Decision::Thaw,
        (LeaseTimes::Unlimited, GuestState::Running) => Decision::Wait { until: None },
        (LeaseTimes::Limited { freeze_at, .. }, GuestState::Running) if now >= freeze_at => {
            Decision::Freeze
        }
        (LeaseTimes::Limited { freeze_at, kill_at }, GuestState::Running) => Decision::Wait {
            until: Some(freeze_at.min(kill_at)),
        },
    }
}

/// Why a lease cannot be read. Whatever it is, there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum ReadLeaseError {
    /// The disk refused, or there is no such file.
    #[error("read the lease file {path:?}")]
    Disk {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no record of ours, or never became whole.
    #[error("the lease file {path:?} is garbled")]
    Garbled {
        /// The file.
        path: PathBuf,
    },
    /// Another release wrote it.
    #[error("the lease file {path:?} has version {found}, and this release knows {VERSION}")]
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It was written before this host last booted.
    #[error("the lease file {path:?} is of another boot of this host")]
    OtherBoot {
        /// The file.
        path: PathBuf,
    },
}

/// This boot of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BootId([u8; 16]);

impl BootId {
    fn of_this_boot() -> io::Result<Self> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// 32 hexadecimal digits with hyphens among them.
    fn parse(text: &str) -> Option<Self> {
        let digits: String = text.trim().chars().filter(|&it| it != '-').collect();
        if digits.len() != 32 || !digits.is_ascii() {
            return None;
        }
        u128::from_str_radix(&digits, 16)
            .ok()
            .map(|id| Self(id.to_be_bytes()))
    }
}

/// The daemon's hand on the lease file. One a data directory.
#[derive(Debug)]
pub struct LeaseWriter {
    path: PathBuf,
    boot: BootId,
}

impl LeaseWriter {
    /// Makes sure that the file can be written. What it says is left as it is: the guests of an
    /// earlier daemon run on under it.
    ///
    /// # Errors
    /// The disk refuses, or `/proc` is not mounted.
    pub fn open(path: &Path) -> io::Result<Self> {
        let boot = BootId::of_this_boot()?;
        let writer = Self {
            path: path.to_owned(),
            boot,
        };
        writer.file()?;
        Ok(writer)
    }

    /// Tells every shim of this node. Holds from their next look on, at most 250 ms from now;
    /// never blocks for longer than one write to the page cache.
    ///
    /// # Errors
    /// The disk refuses; the earlier lease stands.
    pub fn write(&self, times: LeaseTimes) -> io::Result<()> {
        // Opened anew each time: if somebody has removed the file, shims must find the next one.
        self.file()?.write_all_at(&encode(times, self.boot), 0)
    }

    fn file(&self) -> io::Result<std::fs::File> {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.path)
    }
}

/// A shim's eye on the lease file.
#[derive(Debug)]
pub struct LeaseReader {
    path: PathBuf,
    boot: BootId,
}

impl LeaseReader {
    /// A reader of `path`, which need not exist yet.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            boot: BootId::of_this_boot()?,
        })
    }

    /// What the file says now.
    ///
    /// # Errors
    /// See [`ReadLeaseError`]: there is no lease.
    pub fn read(&self) -> Result<LeaseTimes, ReadLeaseError> {
        for _ in 1..READ_TRIES {
            match self.read_once() {
                Err(ReadLeaseError::Garbled { .. }) => thread::sleep(READ_AGAIN),
                read => return read,
            }
        }
        self.read_once()
    }

    fn read_once(&self) -> Result<LeaseTimes, ReadLeaseError> {
        let disk = |source| ReadLeaseError::Disk {
            path: self.path.clone(),
            source,
        };
        // Opened anew each time: see the writer.
        let file = std::fs::File::open(&self.path).map_err(disk)?;
        // One byte more than a record: a longer file is not ours.
        let mut bytes = [0; RECORD_BYTES + 1];
        let count = file.read_at(&mut bytes, 0).map_err(disk)?;
        decode(&bytes[..count], self.boot).map_err(|refused| refused.of(&self.path))
    }
}

/// Why a record is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Garbled,
    UnknownVersion(u32),
    OtherBoot,
}

impl Refused {
    fn of(self, path: &Path) -> ReadLeaseError {
        let path = path.to_owned();
        match self {
            Self::Garbled => ReadLeaseError::Garbled { path },
            Self::UnknownVersion(found) => ReadLeaseError::UnknownVersion { path, found },
            Self::OtherBoot => ReadLeaseError::OtherBoot { path },
        }
    }
}

fn encode(times: LeaseTimes, boot: BootId) -> [u8; RECORD_BYTES] {
    let (kind, freeze_at, kill_at) = match times {
        LeaseTimes::Limited { freeze_at, kill_at } => (LIMITED, freeze_at, kill_at),
        LeaseTimes::Unlimited => (UNLIMITED, BootInstant::MAX, BootInstant::MAX),
    };
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&MAGIC);
    record[8..12].copy_from_slice(&VERSION.to_le_bytes());
    record[12..16].copy_from_slice(&kind.to_le_bytes());
    record[16..32].copy_from_slice(&boot.0);
    record[32..40].copy_from_slice(&freeze_at.as_nanos().to_le_bytes());
    record[40..48].copy_from_slice(&kill_at.as_nanos().to_le_bytes());
    let sum = checksum(&record);
    record[48..].copy_from_slice(&sum);
    record
}

fn decode(bytes: &[u8], boot: BootId) -> Result<LeaseTimes, Refused> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(Refused::Garbled)?;
    // Before anything else: another layout has its checksum elsewhere, or another length.
    match rest.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) {
        Some(VERSION) => {}
        Some(found) => return Err(Refused::UnknownVersion(found)),
        None => return Err(Refused::Garbled),
    }
    let record: &[u8; RECORD_BYTES] = bytes.try_into().map_err(|_| Refused::Garbled)?;
    if record[48..] != checksum(record) {
        return Err(Refused::Garbled);
    }
    if record[16..32] != boot.0 {
        return Err(Refused::OtherBoot);
    }
    match u32_at(record, 12) {
        LIMITED => Ok(LeaseTimes::Limited {
            freeze_at: instant_at(record, 32),
            kill_at: instant_at(record, 40),
        }),
        UNLIMITED => Ok(LeaseTimes::Unlimited),
        _ => Err(Refused::Garbled),
    }
}

fn checksum(record: &[u8; RECORD_BYTES]) -> [u8; CHECKSUM_BYTES] {
    let hash = blake3::hash(&record[..RECORD_BYTES - CHECKSUM_BYTES]);
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&hash.as_bytes()[..CHECKSUM_BYTES]);
    sum
}

fn u32_at(record: &[u8; RECORD_BYTES], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&record[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn instant_at(record: &[u8; RECORD_BYTES], at: usize) -> BootInstant {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&record[at..at + 8]);
    BootInstant::from_nanos(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HERE: BootId = BootId([7; 16]);

    fn at(millis: u64) -> BootInstant {
        BootInstant::default() + Duration::from_millis(millis)
    }

    fn limited(freeze_ms: u64, kill_ms: u64) -> LeaseTimes {
        LeaseTimes::Limited {
            freeze_at: at(freeze_ms),
            kill_at: at(kill_ms),
        }
    }

    fn wait(millis: u64) -> Decision {
        Decision::Wait {
            until: Some(at(millis)),
        }
    }

    #[test]
    fn a_guest_runs_freezes_and_dies_exactly_at_the_instants_of_its_lease() {
        use GuestState::{Frozen, Running};
        let times = limited(8_000, 70_000);
        for (now, state, expected) in [
            (0, Running, wait(8_000)),
            (7_999, Running, wait(8_000)),
            (8_000, Running, Decision::Freeze),
            (8_000, Frozen, wait(70_000)),
            (69_999, Frozen, wait(70_000)),
            (70_000, Frozen, Decision::Kill),
            // The host slept through all of it.
            (70_000, Running, Decision::Kill),
            (7_999, Frozen, Decision::Thaw),
        ] {
            assert_eq!(decide(at(now), times, state), expected, "{now} {state:?}");
        }
    }

    #[test]
    fn an_unlimited_lease_waits_for_nothing_and_thaws_what_is_frozen() {
        let decide = |state| decide(BootInstant::MAX, LeaseTimes::Unlimited, state);
        assert_eq!(decide(GuestState::Running), Decision::Wait { until: None });
        assert_eq!(decide(GuestState::Frozen), Decision::Thaw);
    }

    /// The wall clock is no argument of the decision, and cannot be turned into one: instants are
    /// made of boot time alone. So the same boot time decides the same, wherever the wall clock
    /// stands.
    #[test]
    fn a_step_of_the_wall_clock_changes_no_decision() {
        use crate::base::clock::{BootClock, Clock, HandBootClock, HandClock};
        let (boot, wall) = (HandBootClock::at(at(1_000)), HandClock::default());
        let times = limited(8_000, 70_000);
        let decided = || decide(boot.now(), times, GuestState::Running);
        let before = decided();
        let year = Duration::from_secs(365 * 24 * 3600);
        let shown = wall.now();
        wall.advance(year);
        assert_ne!(wall.now(), shown);
        assert_eq!(decided(), before);
        boot.advance(Duration::from_secs(7));
        assert_eq!(decided(), Decision::Freeze);
    }

    #[test]
    fn a_lease_that_cannot_be_read_freezes_at_once_and_keeps_its_end() {
        let withdrawn = limited(8_000, 70_000).withdrawn(at(3_000));
        assert_eq!(withdrawn, limited(3_000, 70_000));
        assert_eq!(withdrawn.withdrawn(at(5_000)), withdrawn);
        let unlimited = LeaseTimes::Unlimited.withdrawn(at(3_000));
        assert_eq!(unlimited, limited(3_000, 63_000));
        assert_eq!(unlimited.withdrawn(at(50_000)), unlimited);
    }

    #[test]
    fn what_is_written_is_read_and_an_open_changes_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = file_in(dir.path());
        let reader = LeaseReader::new(&path).expect("proc");
        for times in [limited(1, 2), LeaseTimes::Unlimited, limited(3, 4)] {
            let writer = LeaseWriter::open(&path).expect("opened");
            writer.write(times).expect("written");
            LeaseWriter::open(&path).expect("opened again");
            assert_eq!(reader.read().expect("read"), times);
        }
        assert_eq!(
            std::fs::metadata(&path).expect("there").len(),
            RECORD_BYTES as u64
        );
    }

    #[test]
    fn a_writer_finds_its_file_again_when_somebody_removed_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = file_in(dir.path());
        let (writer, reader) = (LeaseWriter::open(&path), LeaseReader::new(&path));
        let (writer, reader) = (writer.expect("opened"), reader.expect("proc"));
        std::fs::remove_file(&path).expect("removed");
        assert!(matches!(reader.read(), Err(ReadLeaseError::Disk { .. })));
        writer.write(limited(1, 2)).expect("written");
        assert_eq!(reader.read().expect("read"), limited(1, 2));
    }

    #[test]
    fn a_file_that_was_never_written_is_no_lease() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = file_in(dir.path());
        LeaseWriter::open(&path).expect("opened");
        let read = LeaseReader::new(&path).expect("proc").read();
        assert!(
            matches!(read, Err(ReadLeaseError::Garbled { .. })),
            "{read:?}"
        );
    }

    #[test]
    fn a_record_that_is_cut_short_or_too_long_is_refused() {
        let record = encode(limited(1, 2), HERE);
        for cut in 0..RECORD_BYTES {
            assert_eq!(decode(&record[..cut], HERE), Err(Refused::Garbled), "{cut}");
        }
        let longer = [&record[..], &[0]].concat();
        assert_eq!(decode(&longer, HERE), Err(Refused::Garbled));
    }

    #[test]
    fn the_record_of_another_boot_or_release_is_refused_by_name() {
        let record = encode(LeaseTimes::Unlimited, HERE);
        assert_eq!(decode(&record, BootId([8; 16])), Err(Refused::OtherBoot));
        let mut newer = record;
        newer[8] = 2;
        assert_eq!(decode(&newer, HERE), Err(Refused::UnknownVersion(2)));
    }

    #[test]
    fn a_boot_id_is_what_the_kernel_prints() {
        let printed = "01234567-89ab-cdef-0123-456789abcdef\n";
        let id = BootId::parse(printed).expect("parsed");
        assert_eq!(id.0[..4], [0x01, 0x23, 0x45, 0x67]);
        assert_eq!(BootId::parse("01234567-89ab\n"), None);
        assert!(BootId::of_this_boot().is_ok());
    }

    proptest! {
        #[test]
        fn any_times_survive_the_record(freeze: u64, kill: u64) {
            let times = LeaseTimes::Limited {
                freeze_at: BootInstant::from_nanos(freeze),
                kill_at: BootInstant::from_nanos(kill),
            };
            prop_assert_eq!(decode(&encode(times, HERE), HERE), Ok(times));
        }

        /// A record half old and half new, or with a flipped bit, is not taken for either.
        #[test]
        fn no_damaged_record_is_a_lease(at in 0..RECORD_BYTES, bit in 0..8_u32) {
            let mut record = encode(limited(1, 2), HERE);
            record[at] ^= 1 << bit;
            prop_assert!(decode(&record, HERE).is_err());
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            prop_assert!(decode(&bytes, HERE).is_err());
        }

        /// Past its end a guest never runs, whatever came before.
        #[test]
        fn nothing_runs_past_its_end(freeze in 0..100_u64, kill in 0..100_u64, now in 0..200_u64) {
            let times = limited(freeze, kill);
            let running = decide(at(now), times, GuestState::Running);
            let frozen = decide(at(now), times, GuestState::Frozen);
            if now >= kill {
                prop_assert_eq!((running, frozen), (Decision::Kill, Decision::Kill));
            } else if now >= freeze {
                prop_assert_eq!((running, frozen), (Decision::Freeze, wait(kill)));
            } else {
                prop_assert_eq!((running, frozen), (wait(freeze.min(kill)), Decision::Thaw));
            }
        }
    }
}
