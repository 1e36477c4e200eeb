//! What the kernel says of a VMM: processor time, memory, network, disk.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::unistd::{SysconfVar, sysconf};

use crate::base::sample::kib;
use crate::net::slot::TAP;

/// The unit of `st_blocks`, whatever the file system's own.
const STAT_BLOCK_BYTES: u64 = 512;
/// What the kernel counts processor time in, where it does not say: it is 100 on every Linux that
/// runs guests.
const DEFAULT_TICKS_PER_SECOND: u64 = 100;

/// One reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// Processor time since the VMM began, in milliseconds.
    pub(super) busy_ms: u64,
    pub(super) resident_kib: u32,
    pub(super) disk_kib: u32,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
}

/// Reads all of a VMM and its guest's disk; `None` where the process is no more.
pub(super) fn read(pid: u32, overlay: &Path) -> Option<Reading> {
    let proc = Path::new("/proc").join(pid.to_string());
    let stat = fs::read_to_string(proc.join("stat")).ok()?;
    let status = fs::read_to_string(proc.join("status")).ok()?;
    let network = fs::read_to_string(proc.join("net/dev")).unwrap_or_default();
    let (from_guest, to_guest) = traffic(&network).unwrap_or_default();
    let disk = fs::metadata(overlay).map_or(0, |it| it.blocks() * STAT_BLOCK_BYTES);
    Some(Reading {
        busy_ms: busy_ticks(&stat)? * 1000 / ticks_per_second(),
        resident_kib: resident_kib(&status)?,
        disk_kib: kib(disk),
        sent_bytes: from_guest,
        received_bytes: to_guest,
    })
}

fn ticks_per_second() -> u64 {
    let said = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    let said = said.and_then(|ticks| u64::try_from(ticks).ok());
    said.filter(|ticks| *ticks > 0)
        .unwrap_or(DEFAULT_TICKS_PER_SECOND)
}

/// Ticks in user and kernel mode, of all threads: the fields 14 and 15. The second may hold anything,
/// in parentheses.
fn busy_ticks(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let kernel: u64 = fields.next()?.parse().ok()?;
    Some(user + kernel)
}

fn resident_kib(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(u32::try_from(kib).unwrap_or(u32::MAX))
}

/// Bytes that came from the guest and that went to it, by its tap: what the host receives there the
/// guest has sent.
fn traffic(dev: &str) -> Option<(u64, u64)> {
    let of_tap = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == TAP).then(|| counters.to_owned())
    };
    let counters = dev.lines().find_map(of_tap)?;
    let counters: Vec<u64> = counters
        .split_ascii_whitespace()
        .filter_map(|it| it.parse().ok())
        .collect();
    Some((*counters.first()?, *counters.get(8)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_treacherous_name_is_read_all_the_same() {
        let stat = "7 (a) R (b) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 4 0 100 1 2";
        assert_eq!(busy_ticks(stat), Some(300));
        assert_eq!(busy_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn the_taps_counters_are_seen_from_the_guest() {
        let dev = "Inter-|   Receive\n face |bytes\n    lo:  9 0 0 0 0 0 0 0 9 0 0 0 0 0 0 0\n  \
                   tap0: 100 2 0 0 0 0 0 0 700 5 0 0 0 0 0 0\n";
        assert_eq!(traffic(dev), Some((100, 700)));
        assert_eq!(traffic(""), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let read = read(std::process::id(), Path::new("/nonexistent")).expect("it runs");
        assert!(read.resident_kib > 0);
        assert_eq!(read.disk_kib, 0);
    }
}
