//! Joins the lease to the guests that live by it, and the load report to this machine.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use raft::state::HostLoss;

use crate::cluster::lease::Limits;
use crate::cluster::{LeaseSink, LoadSample, LoadSource, View};
use crate::sandbox::{ObservedState, Registry};
use crate::shim::lease::{LeaseReader, LeaseTimes, LeaseWriter, file_in};
use crate::store::DataPaths;

/// The lease file, which the shims of this node read.
#[derive(Debug)]
pub(super) struct LeaseFile {
    writer: LeaseWriter,
    reader: LeaseReader,
    registry: Arc<Registry>,
    view: View,
}

impl LeaseFile {
    /// Opens the lease file of the node with these paths.
    pub(super) fn open(paths: &DataPaths, registry: Arc<Registry>, view: View) -> io::Result<Self> {
        let path = file_in(paths.root());
        Ok(Self {
            writer: LeaseWriter::open(&path)?,
            reader: LeaseReader::new(&path)?,
            registry,
            view,
        })
    }
}

impl LeaseSink for LeaseFile {
    fn written(&self) -> Option<Limits> {
        match self.reader.read().ok()? {
            LeaseTimes::Unlimited => Some(Limits::NONE),
            LeaseTimes::Limited { freeze_at, kill_at } => Some(Limits {
                freeze_at: freeze_at.into(),
                kill_at: kill_at.into(),
            }),
        }
    }

    fn write(&self, limits: Limits) -> io::Result<()> {
        let times = if limits == Limits::NONE {
            LeaseTimes::Unlimited
        } else {
            LeaseTimes::Limited {
                freeze_at: limits.freeze_at.into(),
                kill_at: limits.kill_at.into(),
            }
        };
        self.writer.write(times)
    }

    fn has_bound_guests(&self) -> bool {
        let state = self.view.state();
        let is_bound = |id| {
            let record = state.sandbox(id);
            // Of one that the cluster has forgotten nothing is known: it may be bound.
            record.is_none_or(|record| record.spec.on_host_loss == HostLoss::Restart)
        };
        let observed = self.registry.observed();
        let mut here = observed
            .iter()
            .filter(|(_, seen)| !matches!(seen.state, ObservedState::Gone(_)));
        here.any(|(id, _)| is_bound(*id))
    }
}

/// This machine's load, from `/proc`.
#[derive(Debug)]
pub(super) struct MachineLoad {
    registry: Arc<Registry>,
    /// Busy and all ticks of the processors at the last look.
    ticks: Mutex<(u64, u64)>,
}

impl MachineLoad {
    pub(super) fn new(registry: Arc<Registry>) -> Self {
        Self {
            registry,
            ticks: Mutex::default(),
        }
    }

    /// Processors that were idle since the last look, rounded down.
    fn idle_vcpus(&self) -> Option<u32> {
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        let cores = text
            .lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
            .count();
        let fields: Vec<u64> = text
            .lines()
            .next()?
            .split_whitespace()
            .skip(1)
            .filter_map(|field| field.parse().ok())
            .collect();
        let idle = fields.get(3)? + fields.get(4)?;
        let all: u64 = fields.iter().take(8).sum();
        let mut known = self.ticks.lock().unwrap_or_else(PoisonError::into_inner);
        let (idle_before, all_before) = std::mem::replace(&mut *known, (idle, all));
        let passed = all.saturating_sub(all_before).max(1);
        let share = idle.saturating_sub(idle_before) * cores as u64 / passed;
        u32::try_from(share).ok()
    }
}

impl LoadSource for MachineLoad {
    fn sample(&self) -> LoadSample {
        let running = u32::try_from(self.registry.observed().len()).unwrap_or(u32::MAX);
        LoadSample {
            free_vcpus: self.idle_vcpus().unwrap_or(0),
            free_memory_mib: available_mib().unwrap_or(u32::MAX),
            running,
            create_p95: self.registry.start_p95().unwrap_or_default(),
        }
    }
}

/// Memory that could be had without swapping, by the kernel's own estimate.
fn available_mib() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    u32::try_from(kib / 1024).ok()
}
