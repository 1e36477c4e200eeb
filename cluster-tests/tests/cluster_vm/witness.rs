//! Somebody who watches the processes of a capsule from outside, on all nodes at once, and writes
//! down when they stood still, when they were gone, and whether two ever ran.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, mem};

use wrenn_cluster_tests::client::is_vmm;

/// Pause between two looks: short against every margin of a lease, long against a look.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The VMMs of a capsule at one instant, by process id, each with its state letter.
type Sight = BTreeMap<u32, char>;

/// A watch over one capsule that is under way.
pub(crate) struct Witness {
    stop: Arc<AtomicBool>,
    watch: Option<JoinHandle<Report>>,
}

impl Witness {
    /// Watches the VMMs of a capsule from now on.
    pub(crate) fn of(id: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (id, told) = (id.to_owned(), Arc::clone(&stop));
        let watch = thread::spawn(move || {
            let mut changes: Vec<(Instant, Sight)> = Vec::new();
            while !told.load(Ordering::Relaxed) {
                let seen = look(&id);
                if changes.last().is_none_or(|(_, last)| *last != seen) {
                    changes.push((Instant::now(), seen));
                }
                thread::sleep(LOOK_AGAIN);
            }
            Report(changes)
        });
        Self {
            stop,
            watch: Some(watch),
        }
    }

    /// What was seen.
    pub(crate) fn report(mut self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let watch = mem::take(&mut self.watch).expect("a watch ends once");
        watch.join().expect("the watch goes on")
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What was seen, change by change.
pub(crate) struct Report(Vec<(Instant, Sight)>);

impl Report {
    /// When a VMM was first seen frozen.
    pub(crate) fn frozen(&self, pid: u32) -> Option<Instant> {
        let frozen = |seen: &Sight| seen.get(&pid) == Some(&'T');
        self.0
            .iter()
            .find(|(_, seen)| frozen(seen))
            .map(|(at, _)| *at)
    }

    /// When a VMM was first seen to be gone.
    pub(crate) fn gone(&self, pid: u32) -> Option<Instant> {
        let mut after = self
            .0
            .iter()
            .skip_while(|(_, seen)| !seen.contains_key(&pid));
        after
            .find(|(_, seen)| !seen.contains_key(&pid))
            .map(|(at, _)| *at)
    }

    /// When a VMM other than `pid` was first seen.
    pub(crate) fn another(&self, pid: u32) -> Option<Instant> {
        let is_other = |seen: &Sight| seen.keys().any(|other| *other != pid);
        self.0
            .iter()
            .find(|(_, seen)| is_other(seen))
            .map(|(at, _)| *at)
    }

    /// Most VMMs that were there at once, frozen ones included.
    pub(crate) fn most(&self) -> usize {
        self.0.iter().map(|(_, seen)| seen.len()).max().unwrap_or(0)
    }
}

/// Process ids of the VMMs that a node runs, of one capsule or of all where `id` is empty.
pub(crate) fn vmms(data: &Path, id: &str) -> Vec<u32> {
    let data = data.to_string_lossy().into_owned();
    processes()
        .filter(|(_, line)| is_vmm(line) && line.contains(&data) && line.contains(id))
        .map(|(pid, _)| pid)
        .collect()
}

fn look(id: &str) -> Sight {
    let all = processes().filter(|(_, line)| is_vmm(line) && line.contains(id));
    all.filter_map(|(pid, _)| Some((pid, state(pid)?)))
        .collect()
}

fn processes() -> impl Iterator<Item = (u32, String)> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).into_owned()))
    })
}

/// The state letter of a process that has not ended; `None` for a zombie too, which runs nothing.
pub(crate) fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The state follows the name, which ends at the last bracket.
    let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
    (!matches!(state, 'Z' | 'X')).then_some(match state {
        // Whether it waits or computes says nothing here.
        'S' | 'R' | 'D' => 'R',
        other => other,
    })
}
