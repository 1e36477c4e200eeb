//! How busy a guest is, in the words that rooms share: who measures, who carries, who shows.

use proto::units::Stamp;

/// Samples in one answer: nobody keeps more of them by one period.
pub const MOST_SAMPLES: usize = 2048;

/// How busy one guest was, up to an instant. Sizes are in KiB: a ring of samples is kept for each
/// guest, and they add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// The instant.
    pub at: Stamp,
    /// Processors of the host that it kept busy, on average since the sample before.
    pub busy_cores: f32,
    /// Memory of the host that it takes.
    pub resident_kib: u32,
    /// Disk of the host that it takes.
    pub disk_kib: u32,
    /// Bytes that it has sent since it began under this ownership.
    pub sent_bytes: u64,
    /// Bytes that it has received.
    pub received_bytes: u64,
    /// What it says of itself; all zero where it has not said anything yet.
    pub inside: Inside,
}

/// What a guest's agent says of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Memory in use.
    pub mem_used_kib: u32,
    /// Memory in all.
    pub mem_total_kib: u32,
    /// Of what is not in use, what holds files.
    pub mem_cache_kib: u32,
    /// Bytes in use on its root disk.
    pub disk_used_kib: u32,
    /// Its root disk in all.
    pub disk_total_kib: u32,
}

/// `bytes` as KiB; more than 4 TiB is 4 TiB.
#[must_use]
pub fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes / 1024).unwrap_or(u32::MAX)
}
