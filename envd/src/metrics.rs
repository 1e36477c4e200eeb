//! Load of the guest, for `GET /metrics`.
//!
//! A thread takes a sample each second, so that an answer waits for nothing: not for a disk that
//! hangs, and not for CPU time to pass. CPU use is the mean over the second before the sample. A
//! sample that is late shows it by its time stamp.

use std::fs;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;

/// Bytes in a MiB.
const MIB: u64 = 1024 * 1024;
/// How often a sample is taken.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Fewer clock ticks (of 10 ms) than this since the last reading say too little about the load.
const MIN_TICKS: u64 = 5;

/// One reading.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics {
    ts: i64,
    cpu_count: usize,
    cpu_used_pct: f64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

/// Ticks of all CPUs since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct CpuTicks {
    busy: u64,
    all: u64,
}

/// Takes samples and keeps the latest.
#[derive(Debug, Default)]
pub struct Meter {
    latest: Mutex<Option<Metrics>>,
    /// The CPU clocks at the previous sample, and what they came to.
    last: Mutex<(CpuTicks, f64)>,
}

impl Meter {
    /// Takes samples in the background from now on.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let meter = Arc::clone(self);
        let sample = move || loop {
            let sample = meter.read();
            *lock(&meter.latest) = Some(sample);
            thread::sleep(SAMPLE_INTERVAL);
        };
        thread::Builder::new()
            .name("metrics".into())
            .spawn(sample)
            .map(drop)
    }

    /// The latest sample; taken now where there is none yet.
    #[must_use]
    pub fn latest(&self) -> Metrics {
        let latest = lock(&self.latest).clone();
        latest.unwrap_or_else(|| self.read())
    }

    fn read(&self) -> Metrics {
        let memory = Memory::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let (disk_used, disk_total) = disk();
        Metrics {
            ts: jiff::Timestamp::now().as_second(),
            cpu_count: stat.lines().filter(|line| is_cpu(line)).count(),
            cpu_used_pct: self.cpu_used_percent(CpuTicks::parse(&stat)),
            mem_total_mib: memory.total / MIB,
            mem_used_mib: memory.used() / MIB,
            mem_total: memory.total,
            mem_used: memory.used(),
            mem_cache: memory.cache,
            disk_used,
            disk_total,
        }
    }

    fn cpu_used_percent(&self, now: CpuTicks) -> f64 {
        let mut last = lock(&self.last);
        let (before, percent) = *last;
        let all = now.all.saturating_sub(before.all);
        if all < MIN_TICKS {
            return percent;
        }
        let busy = now.busy.saturating_sub(before.busy);
        let percent = hundredths(busy, all);
        *last = (now, percent);
        percent
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `part` of `whole` as a percentage with two decimals.
#[allow(clippy::cast_precision_loss)] // ticks between two questions fit a double's 53 bits
fn hundredths(part: u64, whole: u64) -> f64 {
    (part as f64 / whole as f64 * 10_000.0).round() / 100.0
}

/// Whether a line of `/proc/stat` is one CPU's.
fn is_cpu(line: &str) -> bool {
    line.strip_prefix("cpu")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

impl CpuTicks {
    /// Reads the sum line: user nice system idle iowait irq softirq steal.
    fn parse(stat: &str) -> Self {
        let line = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = line
            .split_ascii_whitespace()
            .skip(1)
            .take(8)
            .filter_map(|t| t.parse().ok())
            .collect();
        let all = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        Self {
            busy: all - idle,
            all,
        }
    }
}

/// One part in so many of memory may be page cache through a pause: it is what makes the first commands
/// after the resume quick.
const CACHE_KEPT: u64 = 4;

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    total: u64,
    available: u64,
    cache: u64,
    /// What of the cache cannot be read from a disk again: tmpfs and shared memory.
    shared: u64,
}

impl Memory {
    /// Reads `/proc/meminfo`; what it does not say is 0.
    #[must_use]
    pub fn parse(meminfo: &str) -> Self {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line
                .trim_start_matches(':')
                .split_whitespace()
                .next()?
                .parse()
                .ok()?;
            kib.checked_mul(1024)
        };
        let field = |name: &str| field(name).unwrap_or_default();
        Self {
            total: field("MemTotal:"),
            available: field("MemAvailable:"),
            cache: field("Cached:"),
            shared: field("Shmem:"),
        }
    }

    /// Whether more than a quarter of it is files that could be read from the disk again.
    #[must_use]
    pub fn caches_much(self) -> bool {
        self.cache.saturating_sub(self.shared) > self.total / CACHE_KEPT
    }

    fn used(self) -> u64 {
        self.total.saturating_sub(self.available)
    }
}

/// Used and total bytes of the root file system.
fn disk() -> (u64, u64) {
    nix::sys::statvfs::statvfs("/").map_or((0, 0), |root| {
        let unit = root.fragment_size();
        let total = root.blocks().saturating_mul(unit);
        (
            total.saturating_sub(root.blocks_available().saturating_mul(unit)),
            total,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_use_is_the_mean_since_the_last_question() {
        let meter = Meter::default();
        assert!((meter.cpu_used_percent(CpuTicks { busy: 50, all: 200 }) - 25.0).abs() < 1e-9);
        assert!(
            (meter.cpu_used_percent(CpuTicks {
                busy: 150,
                all: 500
            }) - 33.33)
                .abs()
                < 1e-9
        );
        let too_soon = meter.cpu_used_percent(CpuTicks {
            busy: 151,
            all: 501,
        });
        assert!((too_soon - 33.33).abs() < 1e-9);
    }

    #[test]
    fn proc_files_are_parsed_and_garbage_is_zero() {
        let stat = "cpu  10 0 10 70 10 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n";
        assert_eq!(CpuTicks::parse(stat), CpuTicks { busy: 20, all: 100 });
        assert_eq!(stat.lines().filter(|line| is_cpu(line)).count(), 2);
        assert_eq!(CpuTicks::parse("nonsense"), CpuTicks::default());
        let memory = Memory::parse("MemTotal:  2048 kB\nMemAvailable: 1024 kB\nCached: x\n");
        assert_eq!(
            (memory.total, memory.used(), memory.cache),
            (2 << 20, 1 << 20, 0)
        );
    }

    #[test]
    fn more_than_a_quarter_of_files_is_much_and_shared_memory_is_none() {
        let caches_much = |cached, shared| {
            let text = format!("MemTotal: 1000 kB\nCached: {cached} kB\nShmem: {shared} kB\n");
            Memory::parse(&text).caches_much()
        };
        assert!(caches_much(251, 0) && !caches_much(250, 0));
        assert!(!caches_much(900, 800));
        assert!(!Memory::default().caches_much());
    }
}
