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
/// What the kernel counts memory in, where it does not say.
const DEFAULT_PAGE_BYTES: u64 = 4096;

/// Where readings come from.
pub(super) trait Files {
    /// What the file says; `None` where it cannot be read.
    fn text(&self, path: &Path) -> Option<String>;
    /// Bytes that the file takes on its disk; none where there is no file.
    fn allocated_bytes(&self, path: &Path) -> u64;
}

/// The files of this host.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostFiles;

impl Files for HostFiles {
    fn text(&self, path: &Path) -> Option<String> {
        fs::read_to_string(path).ok()
    }

    fn allocated_bytes(&self, path: &Path) -> u64 {
        fs::metadata(path).map_or(0, |it| it.blocks() * STAT_BLOCK_BYTES)
    }
}

/// One reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// Processor time since the VMM began, in milliseconds.
    pub(super) busy_ms: u64,
    pub(super) resident_kib: u32,
    pub(super) outside: Outside,
}

/// What is not the process's own. It costs more than the rest, and moves less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outside {
    pub(super) disk_kib: u32,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
}

/// Reads a VMM, and what is outside of it unless that is `known`; `None` where the process is no
/// more.
pub(super) fn read(
    files: &impl Files,
    pid: u32,
    overlay: &Path,
    known: Option<Outside>,
) -> Option<Reading> {
    let proc = Path::new("/proc").join(pid.to_string());
    let stat = files.text(&proc.join("stat"))?;
    // Not `status`, which says it too: that takes the kernel three times as long.
    let statm = files.text(&proc.join("statm"))?;
    let outside = || {
        let network = files.text(&proc.join("net/dev")).unwrap_or_default();
        let (from_guest, to_guest) = traffic(&network).unwrap_or_default();
        Outside {
            disk_kib: kib(files.allocated_bytes(overlay)),
            sent_bytes: from_guest,
            received_bytes: to_guest,
        }
    };
    Some(Reading {
        busy_ms: busy_ticks(&stat)? * 1000 / said(SysconfVar::CLK_TCK, DEFAULT_TICKS_PER_SECOND),
        resident_kib: resident_kib(&statm, said(SysconfVar::PAGE_SIZE, DEFAULT_PAGE_BYTES))?,
        outside: known.unwrap_or_else(outside),
    })
}

/// What the kernel says of itself.
fn said(what: SysconfVar, otherwise: u64) -> u64 {
    let said = sysconf(what).ok().flatten();
    let said = said.and_then(|it| u64::try_from(it).ok());
    said.filter(|it| *it > 0).unwrap_or(otherwise)
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

/// Pages in memory, of all kinds: the second number.
fn resident_kib(statm: &str, page_bytes: u64) -> Option<u32> {
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib(pages.saturating_mul(page_bytes)))
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
    fn what_is_resident_is_told_in_pages() {
        assert_eq!(resident_kib("900 25 7 1 0 80 0\n", 4096), Some(100));
        assert_eq!(resident_kib("900\n", 4096), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let here = std::process::id();
        let read = |known| read(&HostFiles, here, Path::new("/nonexistent"), known);
        let reading = read(None).expect("it runs");
        assert!(reading.resident_kib > 0);
        assert_eq!(reading.outside.disk_kib, 0);
        let known = Outside {
            disk_kib: 7,
            ..Outside::default()
        };
        assert_eq!(read(Some(known)).expect("it runs").outside, known);
    }
}
