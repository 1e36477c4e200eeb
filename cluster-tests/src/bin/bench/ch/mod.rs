//! Cloud Hypervisor: how fast a guest is back, beside its own ways and its reference offload daemon.
//!
//! | name | from the start of the VMM's process until |
//! |---|---|
//! | `ch_<MiB>_<way>_first` | the guest says something on its serial port: it has run |
//! | `ch_<MiB>_<way>_resident` | none of its memory can be missed any more |
//!
//! Our way is what a shim does, with the product's pager process; its memory comes from a real store
//! and is hashed on its way. `lazy` brings what the guest touches and nothing else, as a resume does;
//! `whole` pushes all of it. All ways of one size take turns in one run, from the page cache.
//!
//! The guest is the payload of the driver's tests ([`payload`]), so this runs wherever KVM runs at all.
//! `WRENN_CLOUD_HYPERVISOR` names the program, or it is found in `PATH`; `WRENN_OFFLOAD_DAEMON` names
//! the reference daemon, without which its ways are left out.

mod at_once;
mod ours;
mod overhead;
mod payload;
mod theirs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::units::Mib;

use self::ours::Image;
use self::theirs::{Snapshots, Way};
use crate::figures::{Samples, ratio};
use crate::snapshots::rounds;
use crate::{Outcome, Run};

/// Names the program.
const PROGRAM: &str = "WRENN_CLOUD_HYPERVISOR";
/// Names the reference daemon.
const DAEMON: &str = "WRENN_OFFLOAD_DAEMON";
/// Longest anything may take.
const PATIENCE: Duration = Duration::from_secs(180);
/// Memory of the guests.
const SIZES: [Mib; 4] = [Mib(64), Mib(512), Mib(1024), Mib(2048)];
/// The reference daemon brings on demand what is touched and no more. Up to this size we wait, once,
/// until the guest has been everywhere: emulated, it takes a millisecond for a page.
const TOURED: Mib = Mib(512);
/// Memory of those that are resumed at once, and of those whose cost is counted.
const ONE_OF_MANY: Mib = Mib(512);
/// Ticks of the processor's clock between two rounds: a hundredth of a millisecond, since what the
/// reference daemon brings on demand is there when the guest has been everywhere.
const BUSY_TICKS: u32 = 30_000;
/// The same for guests that rest: half a second.
const IDLE_TICKS: u32 = 1_500_000_000;
/// Ours over either way on demand, to the first instruction.
const FIRST_GOAL: f64 = 0.6;
/// Ours over the daemon on demand, until all is there.
const DAEMON_RESIDENT_GOAL: f64 = 0.1;
/// Ours over native on demand, until all is there.
const NATIVE_RESIDENT_GOAL: f64 = 0.5;

/// A guest that is back.
struct Resumed {
    first: Duration,
    /// Where it was waited for.
    resident: Option<Duration>,
}

/// What is compared.
struct Tools {
    program: PathBuf,
    daemon: Option<PathBuf>,
}

/// Why this cannot be measured here.
pub(crate) fn lacks() -> Option<&'static str> {
    if !Path::new("/dev/kvm").exists() {
        return Some("/dev/kvm");
    }
    match program() {
        Some(_) => None,
        None => Some("cloud-hypervisor in PATH, nor named by WRENN_CLOUD_HYPERVISOR"),
    }
}

fn program() -> Option<PathBuf> {
    let named = std::env::var_os(PROGRAM).filter(|it| !it.is_empty());
    named.map(PathBuf::from).or_else(|| {
        let path = std::env::var_os("PATH")?;
        let mut programs = std::env::split_paths(&path).map(|dir| dir.join("cloud-hypervisor"));
        programs.find(|program| program.exists())
    })
}

impl Tools {
    fn find() -> Outcome<Self> {
        let program = program().ok_or("there is no Cloud Hypervisor")?;
        let named = std::env::var_os(DAEMON).filter(|it| !it.is_empty());
        let daemon = named.map(PathBuf::from).filter(|it| it.exists());
        if daemon.is_none() {
            eprintln!("!!! THE REFERENCE DAEMON IS LEFT OUT: {DAEMON} names none !!!");
        }
        Ok(Self { program, daemon })
    }

    fn ways(&self) -> Vec<Way> {
        let has_daemon = self.daemon.is_some();
        let mut ways = Way::ALL.to_vec();
        ways.retain(|way| has_daemon || !way.needs_daemon());
        ways
    }
}

/// Measures all sizes, many at once, and what one costs.
pub(crate) fn run(run: &Run) -> Outcome {
    let tools = Tools::find()?;
    let start_ms = starts(run, &tools)?;
    for memory in SIZES {
        if memory.0 <= run.ch_memory_mib {
            resumes(run, &tools, memory, start_ms)?;
        }
    }
    let home = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let kernel = payload::assemble(home.path(), ONE_OF_MANY, BUSY_TICKS)?;
    at_once::measure(run, &tools, &kernel, ONE_OF_MANY)?;
    let kernel = payload::assemble(home.path(), ONE_OF_MANY, IDLE_TICKS)?;
    let image = Image::make(&tools.program, &kernel, ONE_OF_MANY)?;
    overhead::measure(run, &image, ONE_OF_MANY)
}

/// From nothing to an API that answers, and to a guest that boots. The former, in the middle and in
/// milliseconds, is returned.
fn starts(run: &Run, tools: &Tools) -> Outcome<f64> {
    let home = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let kernel = payload::assemble(home.path(), SIZES[0], BUSY_TICKS)?;
    let (mut ready, mut booted) = (Samples::default(), Samples::default());
    for _ in 0..run.runs {
        run.go_on()?;
        ready.add_ms(Snapshots::api_ready(&tools.program)?);
        booted.add_ms(ours::boot(&tools.program, &kernel, SIZES[0])?);
    }
    ready.print("ch_api_ready", "ms");
    booted.print("ch_booted", "ms");
    Ok(ready.p50())
}

/// The times of one way.
#[derive(Default)]
struct Times {
    first: Samples,
    resident: Samples,
}

impl Times {
    fn add(&mut self, resumed: &Resumed) {
        self.first.add_ms(resumed.first);
        if let Some(resident) = resumed.resident {
            self.resident.add_ms(resident);
        }
    }
}

fn resumes(run: &Run, tools: &Tools, memory: Mib, start_ms: f64) -> Outcome {
    let home = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let kernel = payload::assemble(home.path(), memory, BUSY_TICKS)?;
    let image = Image::make(&tools.program, &kernel, memory)?;
    let (program, daemon) = (&tools.program, tools.daemon.as_deref());
    let snapshots = Snapshots::make(program, daemon, &kernel, memory)?;
    run.note(&format!("{} MiB: saved in all ways", memory.0));
    let (mut lazy, mut whole) = (Times::default(), Times::default());
    let mut theirs: Vec<(Way, Times)> = Vec::new();
    theirs.extend(tools.ways().into_iter().map(|way| (way, Times::default())));
    for round in 1..=rounds(run) {
        run.go_on()?;
        lazy.add(&image.resume(false)?);
        whole.add(&image.resume(true)?);
        for (way, times) in &mut theirs {
            run.go_on()?;
            let is_slow = *way == Way::DaemonOnDemand;
            let whole = !is_slow || (round == 1 && memory <= TOURED);
            times.add(&snapshots.resume(*way, whole)?);
        }
        run.note(&format!("{} MiB: round {round}", memory.0));
    }
    let size = memory.0;
    lazy.first
        .print(&format!("ch_{size}_ours_lazy_first"), "ms");
    print(&format!("ch_{size}_ours_whole"), &whole);
    for (way, times) in &theirs {
        print(&format!("ch_{size}_{}", way.name()), times);
    }
    for (way, times) in &theirs {
        compare(size, start_ms, (&lazy, &whole), *way, times);
    }
    Ok(())
}

fn print(name: &str, times: &Times) {
    times.first.print(&format!("{name}_first"), "ms");
    if !times.resident.is_empty() {
        times.resident.print(&format!("{name}_resident"), "ms");
    }
}

/// Ours over theirs, for the ways on demand: from the start of the process, and without the
/// `start_ms` that Cloud Hypervisor takes before it can be told anything, in all ways alike.
fn compare(size: u32, start_ms: f64, (lazy, whole): (&Times, &Times), way: Way, times: &Times) {
    let resident_goal = match way {
        Way::NativeOnDemand => NATIVE_RESIDENT_GOAL,
        Way::DaemonOnDemand => DAEMON_RESIDENT_GOAL,
        Way::NativeCopy | Way::DaemonCopy => return,
    };
    let name = |what: &str| format!("ch_{size}_{what}_over_{}", way.name());
    let (ours, other) = (lazy.first.p50(), times.first.p50());
    ratio(&name("first"), ours, other, FIRST_GOAL);
    let beyond = |first: f64| first - start_ms;
    let name_beyond = name("first_beyond_start");
    ratio(&name_beyond, beyond(ours), beyond(other), FIRST_GOAL);
    if times.resident.is_empty() {
        return;
    }
    let (ours, other) = (whole.resident.p50(), times.resident.p50());
    ratio(&name("resident"), ours, other, resident_goal);
}
