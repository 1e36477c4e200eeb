//! What is done to the machine, in which order, and what stays held when something fails: on a
//! machine that only writes down what it is told, with control groups that are plain files.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use envd::agent::{Agent, Surroundings};
use envd::boot::BootError;
use envd::boot::cgroup::Groups;
use envd::connections::ConnectionId;
use envd::environment::Identity;
use envd::snapshot::hold::{HoldError, Workload};
use envd::snapshot::lineage::Generation;
use envd::snapshot::machine::Machine;
use envd::snapshot::quiesce::{self, QuiesceError};
use envd::snapshot::restore::{self, RestoreError, restore};
use jiff::Timestamp;
use tokio::time::Instant;

/// A machine that writes down what it is told, with the state of the workload at that moment.
#[derive(Debug)]
struct Notebook {
    freezer: PathBuf,
    lines: Mutex<Vec<String>>,
    /// What it refuses.
    refuses: Mutex<Option<&'static str>>,
    /// Waits for a word before it syncs.
    slow_sync: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
}

impl Notebook {
    fn note(&self, what: &'static str) -> io::Result<()> {
        let frozen = std::fs::read_to_string(&self.freezer).is_ok_and(|word| word == "1");
        let state = if frozen { " (frozen)" } else { "" };
        let mut lines = self.lines.lock().expect("no panic");
        lines.push(format!("{what}{state}"));
        if *self.refuses.lock().expect("no panic") == Some(what) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn noted(&self) -> Vec<String> {
        std::mem::take(&mut *self.lines.lock().expect("no panic"))
    }

    fn boot_note(&self, what: &'static str) -> Result<(), BootError> {
        self.note(what).map_err(|source| BootError::File {
            step: "write",
            path: what.to_owned(),
            source,
        })
    }
}

impl Machine for Notebook {
    fn sync(&self) {
        self.note("sync").expect("never refused");
        let slow = self.slow_sync.lock().expect("no panic").take();
        if let Some(slow) = slow {
            slow.recv().expect("the test says when");
        }
    }
    fn reclaim(&self) -> io::Result<()> {
        self.note("reclaim")
    }
    fn freeze_disk(&self) -> io::Result<()> {
        self.note("freeze disk")
    }
    fn thaw_disk(&self) -> io::Result<()> {
        self.note("thaw disk")
    }
    fn set_clock(&self, _now: Timestamp) -> io::Result<()> {
        self.note("clock")
    }
    fn add_entropy(&self, _seed: &[u8]) -> io::Result<()> {
        self.note("entropy")
    }
    fn set_hostname(&self, _hostname: &str) -> Result<(), BootError> {
        self.boot_note("hostname")
    }
    fn publish(&self, _identity: &Identity) -> Result<(), BootError> {
        self.boot_note("identity")
    }
    fn renew_machine_id(&self, _machine_id: &str) -> Result<(), BootError> {
        self.boot_note("machine id")
    }
    fn remove_ssh_host_keys(&self) -> Result<usize, BootError> {
        self.boot_note("ssh keys").map(|()| 0)
    }
    fn forget_neighbours(&self) -> io::Result<()> {
        self.note("neighbours")
    }
    fn announce(&self, _generation: Generation) -> Result<(), BootError> {
        self.boot_note("announce")
    }
}

struct World {
    agent: Arc<Agent>,
    machine: Arc<Notebook>,
    _groups: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let groups = Groups::create(directory.path());
        let subtree = directory.path().join("wrenn");
        std::fs::write(subtree.join("cgroup.events"), "frozen 1\n").expect("written");
        let machine = Arc::new(Notebook {
            freezer: subtree.join("cgroup.freeze"),
            lines: Mutex::default(),
            refuses: Mutex::default(),
            slow_sync: Mutex::default(),
        });
        let surroundings = Surroundings {
            groups,
            ..Surroundings::default()
        };
        Self {
            agent: Arc::new(Agent::on(machine.clone(), surroundings)),
            machine,
            _groups: directory,
        }
    }

    fn refuse(&self, what: &'static str) {
        *self.machine.refuses.lock().expect("no panic") = Some(what);
    }

    fn is_frozen(&self) -> bool {
        std::fs::read_to_string(&self.machine.freezer).is_ok_and(|word| word == "1")
    }

    async fn quiesce(&self, wish: quiesce::Order) -> Result<quiesce::Quiesced, QuiesceError> {
        self.agent
            .snapshots
            .quiesce(wish, ConnectionId::FIRST)
            .await
    }

    async fn restore(&self) -> Result<restore::Restored, RestoreError> {
        let order = restore::Order {
            epoch: None,
            generation: "0123456789abcdef0123456789abcdef".parse().expect("one"),
            seed: vec![7; 32],
            now: Timestamp::UNIX_EPOCH,
            received: Instant::now(),
            token: None,
            env: None,
            identity: Identity::default(),
            hostname: Some("twin".to_owned()),
            machine_id: Some("0".repeat(32)),
            renew_ssh_host_keys: false,
        };
        restore(&self.agent, order, ConnectionId::FIRST).await
    }
}

const WISH: quiesce::Order = quiesce::Order {
    epoch: None,
    freeze_workload: true,
    freeze_disk: true,
    reclaim: true,
    timeout: Duration::from_secs(5),
    undo_after: Duration::from_secs(60),
};

#[tokio::test]
async fn the_disk_is_written_before_and_after_the_workload_stands_still() {
    let world = World::new();
    let done = world.quiesce(WISH).await.expect("quiesced");
    assert_eq!((done.workload, done.disk_frozen), (Workload::Frozen, true));
    let expected = ["sync", "reclaim", "sync (frozen)", "freeze disk (frozen)"];
    assert_eq!(world.machine.noted(), expected);
    assert!(world.is_frozen() && world.agent.snapshots.gate.is_closed());
}

#[tokio::test]
async fn a_page_cache_that_cannot_be_dropped_keeps_nobody_from_sealing() {
    let world = World::new();
    world.refuse("reclaim");
    world.quiesce(WISH).await.expect("quiesced");
    assert!(world.is_frozen());
}

#[tokio::test]
async fn everything_is_put_right_before_the_workload_runs() {
    let world = World::new();
    world.quiesce(WISH).await.expect("quiesced");
    world.machine.noted();
    let done = world.restore().await.expect("restored");
    assert!(done.applied && done.held);
    assert_eq!(done.warnings, [""; 0]);
    let steps = [
        "thaw disk",
        "clock",
        "entropy",
        "hostname",
        "identity",
        "machine id",
        "neighbours",
        "announce",
    ];
    assert_eq!(
        world.machine.noted(),
        steps.map(|step| format!("{step} (frozen)"))
    );
    assert!(!world.is_frozen() && !world.agent.snapshots.gate.is_closed());
}

#[tokio::test]
async fn without_clock_or_entropy_the_workload_stays_frozen_until_a_retry() {
    for vital in ["clock", "entropy"] {
        let world = World::new();
        world.quiesce(WISH).await.expect("quiesced");
        world.refuse(vital);
        world.restore().await.expect_err("refused");
        assert!(world.is_frozen(), "without {vital}");
        assert!(world.agent.snapshots.gate.is_closed());
        world.refuse("nothing");
        let done = world.restore().await.expect("restored");
        assert!(done.applied && done.held && !world.is_frozen());
    }
}

#[tokio::test]
async fn what_cannot_be_written_is_reported_and_no_more() {
    for file in [
        "hostname",
        "identity",
        "machine id",
        "neighbours",
        "announce",
    ] {
        let world = World::new();
        world.quiesce(WISH).await.expect("quiesced");
        world.refuse(file);
        let done = world.restore().await.expect("restored");
        assert_eq!(done.warnings.len(), 1, "{:?}", done.warnings);
        assert!(!world.is_frozen());
    }
}

#[tokio::test]
async fn an_undo_lets_everything_go_and_sets_the_clock() {
    let world = World::new();
    world.quiesce(WISH).await.expect("quiesced");
    world.machine.noted();
    let now = Some(Timestamp::UNIX_EPOCH);
    let undone = world.agent.snapshots.undo(None, now).await;
    assert!(undone.expect("undone"));
    assert_eq!(
        world.machine.noted(),
        ["clock (frozen)", "thaw disk (frozen)"]
    );
    assert!(!world.is_frozen() && !world.agent.snapshots.gate.is_closed());
}

#[tokio::test]
async fn a_disk_that_does_not_freeze_undoes_the_quiesce() {
    let world = World::new();
    world.refuse("freeze disk");
    let err = world.quiesce(WISH).await.expect_err("refused");
    assert!(
        matches!(err, QuiesceError::Hold(HoldError::Disk(_))),
        "{err}"
    );
    assert!(!world.is_frozen() && !world.agent.snapshots.gate.is_closed());
}

#[tokio::test]
async fn a_sync_that_takes_too_long_undoes_the_quiesce_and_freezes_nothing_later() {
    let world = World::new();
    let (say_when, slow) = std::sync::mpsc::channel();
    *world.machine.slow_sync.lock().expect("no panic") = Some(slow);
    let wish = quiesce::Order {
        timeout: Duration::from_millis(50),
        ..WISH
    };
    let err = world.quiesce(wish).await.expect_err("too slow");
    assert!(matches!(err, QuiesceError::TimedOut { .. }), "{err}");
    assert!(!world.agent.snapshots.gate.is_closed());
    say_when.send(()).expect("it waits");
    // The next one finds nothing held by the first.
    let done = world.quiesce(WISH).await.expect("quiesced");
    assert_eq!(done.workload, Workload::Frozen);
    world
        .agent
        .snapshots
        .undo(None, None)
        .await
        .expect("undone");
    assert!(!world.is_frozen());
}

#[tokio::test]
async fn the_watchdog_lets_everything_go() {
    let world = World::new();
    let wish = quiesce::Order {
        undo_after: Duration::from_millis(100),
        ..WISH
    };
    world.quiesce(wish).await.expect("quiesced");
    let gate = &world.agent.snapshots.gate;
    let until = Instant::now() + Duration::from_secs(10);
    while gate.is_closed() {
        assert!(Instant::now() < until, "the watchdog sleeps");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!world.is_frozen());
    assert_eq!(
        world.machine.noted().last().map(String::as_str),
        Some("thaw disk (frozen)")
    );
    let done = world.restore().await.expect("restored all the same");
    assert!(done.applied && !done.held);
}

#[tokio::test]
async fn a_guest_may_be_quiesced_twice_and_let_go_once() {
    let world = World::new();
    world.quiesce(WISH).await.expect("quiesced");
    world.quiesce(WISH).await.expect("quiesced again");
    world
        .agent
        .snapshots
        .undo(None, None)
        .await
        .expect("undone");
    assert!(!world.is_frozen() && !world.agent.snapshots.gate.is_closed());
}
