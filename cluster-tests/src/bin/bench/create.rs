//! A cold create, from the request to the first command's answer, and our share of it.
//!
//! ```text
//! POST -- log, reconcile -- record -- slot -- disk -- shim [ vmm: QEMU to its QMP answer ] --
//!      -- [ guest: boot to the agent's first answer ] -- setup -- log -- 201
//! ```
//!
//! Our share is the whole less the two parts in brackets, in each run for itself. The node reports
//! both: `vmm` is the time from QEMU's spawn to its first QMP answer, taken in the shim; `guest`
//! ends when one of the node's looks at the agent succeeds, so up to one interval of looking
//! (25 ms) is counted for the guest although the choice of the interval is ours. Everything else
//! is ours: HTTP, two durable log entries, the records of the sandbox, slot, disk, fork and exec of
//! the shim, waiting for its verdict, telling the agent who it is (the agent's own work for that
//! included).
//!
//! So that nothing of ours hides in QEMU's part, the same QEMU is also started alone after each
//! create ([`crate::qemu`]): `beside_qemu_alone` is the whole less the guest's part and that time.
//!
//! With several creates at once, guests that have come up take the processor from those whose
//! shims are still starting, most of all where they are emulated. That wait is in our share too:
//! the figures at once say what a user sees, the processor time says what we use.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use wrenn_cluster_tests::world::World;

use crate::figures::{Samples, at_most, figure, ms};
use crate::http::Connection;
use crate::qemu::Alone;
use crate::{Outcome, Run, process};

/// The goal for our share of one create, at the median.
const SHARE_GOAL_MS: f64 = 60.0;
/// The goal for its 99th percentile with several at once.
const SHARE_AT_ONCE_GOAL_MS: f64 = 120.0;
/// Creates at once.
const AT_ONCE: usize = 4;
/// Memory of a guest: enough for the template, small enough for [`AT_ONCE`] on a small machine.
const MEMORY_MIB: u32 = 256;
/// Pause between two looks at a create whose request was answered before it ran.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// The stages that are ours, as the node names them and in order of time.
const OWN_STAGES: [&str; 5] = ["record", "slot", "disk", "shim", "setup"];

/// One create, in milliseconds.
struct Created {
    id: String,
    /// Until it runs.
    running: f64,
    /// Until the first command has answered.
    first_answer: f64,
    /// What the node says of its stages.
    stages: BTreeMap<String, f64>,
}

/// Measures creates one by one, then several at once.
pub(crate) fn run(run: &Run) -> Outcome {
    let world = World::new();
    let (first, alone) = warm_up(&world)?;
    run.note(&format!("warm-up: first answer after {first:.0} ms"));
    one_by_one(run, &world, &alone)?;
    at_once(run, &world)
}

/// An uncounted create: fills the page cache, and shows how QEMU is started.
fn warm_up(world: &World) -> Outcome<(f64, Alone)> {
    let mut api = connect(world)?;
    let created = create(&mut api)?;
    let pid = world.vmm_pid(&created.id);
    let dir = world.data().join("sandboxes").join(&created.id);
    let alone = Alone::like(pid, &dir, MEMORY_MIB)?;
    destroy(&mut api, &created.id)?;
    alone.time()?;
    Ok((created.first_answer, alone))
}

fn one_by_one(run: &Run, world: &World, alone: &Alone) -> Outcome {
    let mut api = connect(world)?;
    let mut parts = Parts::default();
    let (mut qemu_alone, mut beside_alone) = (Samples::default(), Samples::default());
    let mut shim_time = Duration::ZERO;
    let daemon_before = process::processor_time(world.pid())?;
    for number in 1..=run.runs {
        run.go_on()?;
        let created = create(&mut api)?;
        shim_time += process::thread_time(world.shim_pid(&created.id))?;
        destroy(&mut api, &created.id)?;
        let qemu = ms(alone.time()?);
        beside_alone.add(created.running - created.stage("guest") - qemu);
        qemu_alone.add(qemu);
        run.note(&format!(
            "create {number}: first answer {:.0} ms, our share {:.1} ms",
            created.first_answer,
            parts.add(&created),
        ));
    }
    let daemon_time = process::processor_time(world.pid())? - daemon_before;
    parts.print("create");
    qemu_alone.print_p50("create_qemu_alone", "ms");
    at_most("create_our_share_p50", parts.share.p50(), SHARE_GOAL_MS);
    let name = "create_our_share_beside_qemu_alone_p50";
    at_most(name, beside_alone.p50(), SHARE_GOAL_MS);
    let runs = run.runs as f64;
    figure("create_daemon_processor", ms(daemon_time) / runs, "ms");
    figure("create_shim_processor", ms(shim_time) / runs, "ms");
    Ok(())
}

fn at_once(run: &Run, world: &World) -> Outcome {
    let mut parts = Parts::default();
    let rounds = run.runs.div_ceil(AT_ONCE);
    for round in 1..=rounds {
        run.go_on()?;
        let created = create_together(world)?;
        let mut api = connect(world)?;
        for one in &created {
            destroy(&mut api, &one.id)?;
            parts.add(one);
        }
        run.note(&format!("{AT_ONCE} at once, round {round} of {rounds}"));
    }
    parts.print(&format!("create_{AT_ONCE}_at_once"));
    let name = format!("create_{AT_ONCE}_at_once_our_share");
    at_most(&format!("{name}_p50"), parts.share.p50(), SHARE_GOAL_MS);
    at_most(
        &format!("{name}_p99"),
        parts.share.p99(),
        SHARE_AT_ONCE_GOAL_MS,
    );
    Ok(())
}

/// Creates [`AT_ONCE`] capsules at once.
fn create_together(world: &World) -> Outcome<Vec<Created>> {
    let barrier = Barrier::new(AT_ONCE);
    let work = || {
        let api = connect(world);
        barrier.wait();
        create(&mut api?)
    };
    thread::scope(|scope| {
        let begin = |_| scope.spawn(|| work().map_err(|err| err.to_string()));
        let working: Vec<_> = (0..AT_ONCE).map(begin).collect();
        let join = |one: thread::ScopedJoinHandle<'_, Result<Created, String>>| {
            Ok(one.join().map_err(|_| "a create broke")??)
        };
        working.into_iter().map(join).collect()
    })
}

impl Created {
    fn stage(&self, name: &str) -> f64 {
        self.stages.get(name).copied().unwrap_or(0.0)
    }
}

/// The parts of several creates.
#[derive(Default)]
struct Parts {
    first_answer: Samples,
    running: Samples,
    guest: Samples,
    vmm: Samples,
    share: Samples,
    /// Of our share, what is no stage of the sandbox: the request, the log, the answer.
    log_and_api: Samples,
    stages: BTreeMap<&'static str, Samples>,
}

impl Parts {
    /// Adds a create; returns our share of it.
    fn add(&mut self, created: &Created) -> f64 {
        let (guest, vmm) = (created.stage("guest"), created.stage("vmm"));
        let share = created.running - guest - vmm;
        self.first_answer.add(created.first_answer);
        self.running.add(created.running);
        self.guest.add(guest);
        self.vmm.add(vmm);
        self.share.add(share);
        let own: f64 = OWN_STAGES.iter().map(|name| created.stage(name)).sum();
        self.log_and_api.add(share - own);
        for name in OWN_STAGES {
            self.stages
                .entry(name)
                .or_default()
                .add(created.stage(name));
        }
        share
    }

    fn print(&self, name: &str) {
        self.first_answer
            .print(&format!("{name}_first_answer"), "ms");
        self.running.print_p50(&format!("{name}_running"), "ms");
        self.guest.print_p50(&format!("{name}_guest"), "ms");
        self.vmm.print_p50(&format!("{name}_vmm"), "ms");
        self.share.print(&format!("{name}_our_share"), "ms");
        let part = |part: &str| format!("{name}_our_{part}");
        self.log_and_api.print_p50(&part("log_and_api"), "ms");
        for (stage, samples) in &self.stages {
            samples.print_p50(&part(stage), "ms");
        }
    }
}

/// A kept-alive connection to the API of `world`.
pub(crate) fn connect(world: &World) -> Outcome<Connection> {
    let url = world.url();
    let address: SocketAddr = url.trim_start_matches("http://").parse()?;
    let headers = vec![
        ("x-api-key", world.key()),
        ("content-type", "application/json".to_owned()),
    ];
    Ok(Connection::open(address, headers)?)
}

fn create(api: &mut Connection) -> Outcome<Created> {
    let request = json!({ "memory_mb": MEMORY_MIB }).to_string();
    let start = Instant::now();
    let answer = api.call("POST", "/v1/capsules", request.as_bytes())?;
    let mut running = start.elapsed();
    let path = {
        let shown = answer.json()?;
        let id = shown["id"].as_str();
        format!("/v1/capsules/{}", id.ok_or_else(|| shown.to_string())?)
    };
    // An overloaded node answers before the capsule runs.
    while answer.status == 202 && !is_running(api, &path)? {
        thread::sleep(LOOK_AGAIN);
        running = start.elapsed();
    }
    let command = json!({ "cmd": "true" }).to_string();
    api.call("POST", &format!("{path}/exec"), command.as_bytes())?
        .expect(200)?;
    let first_answer = start.elapsed();
    let detail = api.call("GET", &path, b"")?.expect(200)?.json()?;
    let stages = detail["start_ms"].as_object().into_iter().flatten();
    Ok(Created {
        id: path.rsplit('/').next().unwrap_or_default().to_owned(),
        running: ms(running),
        first_answer: ms(first_answer),
        stages: stages
            .filter_map(|(name, took)| Some((name.clone(), took.as_f64()?)))
            .collect(),
    })
}

fn is_running(api: &mut Connection, path: &str) -> Outcome<bool> {
    let shown = api.call("GET", path, b"")?.expect(200)?.json()?;
    match shown["status"].as_str() {
        Some("running") => Ok(true),
        Some("starting") => Ok(false),
        _ => Err(shown.to_string().into()),
    }
}

/// Destroys a capsule and waits until it is gone.
pub(crate) fn destroy(api: &mut Connection, id: &str) -> Outcome {
    api.call("DELETE", &format!("/v1/capsules/{id}"), b"")?
        .expect(204)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_share_is_all_but_the_guest_and_its_vmm() {
        let stages = [
            ("record", 5.0),
            ("slot", 2.0),
            ("disk", 3.0),
            ("shim", 10.0),
            ("vmm", 90.0),
            ("guest", 1000.0),
            ("setup", 4.0),
        ];
        let created = Created {
            id: String::new(),
            running: 1120.0,
            first_answer: 1200.0,
            stages: stages.map(|(name, ms)| (name.to_owned(), ms)).into(),
        };
        let mut parts = Parts::default();
        let share = parts.add(&created);

        assert_eq!(share.to_string(), "30");
        assert_eq!(parts.log_and_api.p50().to_string(), "6");
        assert_eq!(parts.stages["shim"].p50().to_string(), "10");
    }
}
