//! Guests that are bound to a lease, with real shims and VMMs and nobody else: this program plays
//! the daemon's part only as far as it writes the lease file.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use shim_support::{SOON, Sandbox, WRENN, eventually, runs, signal};
use tokio::time::Instant;
use wrenn_node::base::clock::BootInstant;
use wrenn_node::shim::client::{self, ShimClient, connect};
use wrenn_node::shim::discover::{FoundState, discover};
use wrenn_node::shim::error::SpawnShimError;
use wrenn_node::shim::exit::{ExitRecord, LEASE_LOST};
use wrenn_node::shim::lease::{self, LeaseTimes, LeaseWriter};
use wrenn_node::shim::spec::ShimSpec;

/// Long enough for a start on a busy machine.
const LONG: Duration = Duration::from_secs(600);
/// How much later than its instant something may be seen on a busy machine.
const SLACK: Duration = Duration::from_millis(700);
/// The most that the watch may add to the memory that is a shim's own: the goal of a whole shim is
/// 8 MiB. Program pages, which all shims share, are not counted: how many are mapped is up to the
/// kernel.
const MAX_WATCH_KIB: u64 = 256;

/// A sandbox directory, and a lease file beside it.
struct Bound {
    sandbox: Sandbox,
    path: PathBuf,
    lease: LeaseWriter,
}

impl Bound {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let path = lease::file_in(sandbox.parent());
        let lease = LeaseWriter::open(&path).expect("opened");
        Self {
            sandbox,
            path,
            lease,
        }
    }

    fn spec(&self, words: &str) -> ShimSpec {
        ShimSpec {
            lease: Some(self.path.clone()),
            ..self.sandbox.spec(words)
        }
    }

    /// A lease whose instants come after `freeze` and `kill`; returns the first.
    fn lease_for(&self, freeze: Duration, kill: Duration) -> BootInstant {
        let now = BootInstant::now();
        let (freeze_at, kill_at) = (now + freeze, now + kill);
        self.lease
            .write(LeaseTimes::Limited { freeze_at, kill_at })
            .expect("written");
        freeze_at
    }

    async fn try_start(&self) -> Result<ShimClient, SpawnShimError> {
        client::spawn(&self.sandbox.dir, &self.spec("test.deaf"), WRENN.as_ref()).await
    }

    /// A guest under a lease that lasts.
    async fn start(&self) -> ShimClient {
        self.lease_for(LONG, LONG);
        self.try_start().await.expect("the shim comes up")
    }

    /// A guest that is frozen by now.
    async fn start_frozen(&self) -> ShimClient {
        let shim = self.start().await;
        self.lease_for(Duration::ZERO, LONG);
        let vmm = shim.known_status().vmm_pid;
        assert!(eventually(SOON, || is_stopped(vmm)), "it goes on");
        shim
    }
}

/// Whether the kernel has stopped process `pid`.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.trim_start().starts_with('T')
}

fn own_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let words = line.expect("resident").split_whitespace().nth(1);
    words.expect("a number").parse().expect("a number")
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_guest_freezes_at_the_instant_and_thaws_when_the_lease_is_renewed() {
    let bound = Bound::new();
    let shim = bound.start().await;
    let status = shim.known_status();
    assert!(status.lease_bound && !status.frozen);
    let told = tokio::spawn({
        let shim = shim.clone();
        async move { shim.wait_freeze(false, Instant::now() + SOON).await }
    });
    let freeze_at = bound.lease_for(Duration::from_millis(300), LONG);
    assert!(!is_stopped(status.vmm_pid), "before its time");
    assert!(eventually(SOON, || is_stopped(status.vmm_pid)));
    let stopped_at = BootInstant::now();
    assert!(stopped_at >= freeze_at, "before its time");
    let late = stopped_at.saturating_duration_since(freeze_at);
    assert!(late < SLACK, "{late:?} late");
    assert_eq!(told.await.expect("no panic").expect("told"), Some(true));
    assert!(shim.status().await.expect("the shim answers").frozen);

    bound.lease_for(LONG, LONG);
    let renewed_at = BootInstant::now();
    let told = shim.wait_freeze(true, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(false));
    assert!(!is_stopped(status.vmm_pid));
    let late = BootInstant::now().saturating_duration_since(renewed_at);
    assert!(late < SLACK, "{late:?} late");
}

#[tokio::test]
#[ignore = "starts real VMMs"]
async fn the_watch_costs_a_shim_little_memory_of_its_own() {
    let (bound, other) = (Bound::new(), Sandbox::new());
    let (watched, plain) = (bound.start().await, other.start("test.deaf").await);
    // Both have answered the same; the watch has frozen and thawed a guest beyond that.
    bound.lease_for(Duration::ZERO, LONG);
    let told = watched.wait_freeze(false, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(true));
    bound.lease_for(LONG, LONG);
    let told = watched.wait_freeze(true, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(false));
    let [watched, plain] = [watched, plain].map(|shim| own_kib(shim.known_status().shim_pid));
    assert!(
        watched < plain + MAX_WATCH_KIB,
        "{watched} KiB with a watch, {plain} KiB without"
    );
    println!("a shim has {watched} KiB with a watch, {plain} KiB without");
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_guest_whose_lease_is_lost_is_killed_and_says_why() {
    let bound = Bound::new();
    let shim = bound.start().await;
    let status = shim.known_status().clone();
    bound.lease_for(Duration::from_millis(300), Duration::from_secs(2));
    let exit = shim.wait_exit(Instant::now() + SOON).await;
    let exit = exit.expect("answered").expect("in time");
    assert_eq!((exit.signal, exit.asked), (Some(9), false));
    assert_eq!(exit.reason, LEASE_LOST);
    assert_eq!(
        exit.explanation,
        "this host lost contact with the cluster for 2 s; the guest was stopped so that it cannot \
         run twice"
    );
    assert!(!runs(status.vmm_pid));
    let recorded = ExitRecord::read(&bound.sandbox.dir).expect("readable");
    assert_eq!(recorded, Some(exit));
    assert!(eventually(SOON, || !runs(status.shim_pid)), "it stays");
    let log = bound.sandbox.file("shim.log");
    assert!(log.contains("the lease was not renewed"), "{log}");
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_guest_that_is_not_bound_runs_on_without_a_lease() {
    let bound = Bound::new();
    bound.lease_for(Duration::ZERO, Duration::ZERO);
    let shim = bound.sandbox.start("test.deaf").await;
    let told = shim.wait_freeze(false, Instant::now() + SLACK).await;
    assert_eq!(told.expect("answered"), None);
    let status = shim.status().await.expect("answers");
    assert!(!status.lease_bound && !status.frozen);
    assert!(runs(status.vmm_pid) && !is_stopped(status.vmm_pid));
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_frozen_guest_is_stopped_at_once_and_leaves_nothing() {
    let bound = Bound::new();
    let shim = bound.start_frozen().await;
    let began = Instant::now();
    let exit = shim.stop(Duration::from_secs(60)).await.expect("stopped");
    assert!(began.elapsed() < SOON, "it was waited for");
    assert_eq!((exit.signal, exit.asked), (Some(9), true));
    assert_ne!(exit.reason, LEASE_LOST);
    let status = shim.known_status();
    assert!(eventually(SOON, || !runs(status.shim_pid)), "it stays");
    assert!(!runs(status.vmm_pid));
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_killed_shim_takes_its_frozen_vmm_with_it() {
    let bound = Bound::new();
    let shim = bound.start_frozen().await;
    let status = shim.known_status();
    signal(status.shim_pid, Signal::SIGKILL);
    assert!(eventually(SOON, || !runs(status.vmm_pid)), "the VMM stays");
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_guest_freezes_when_its_daemon_was_killed_and_is_found_frozen() {
    let bound = Bound::new();
    bound.lease_for(LONG, LONG);
    let spec = bound.spec("test.deaf");
    spec.write(&bound.sandbox.dir).expect("written");
    // A stand-in for the daemon: it starts a shim and goes on living.
    let dir = bound.sandbox.dir.display();
    let mut daemon = Command::new("sh")
        .args(["-c", &format!("{WRENN} shim --dir {dir} && sleep 600")])
        .process_group(0)
        .spawn()
        .expect("sh runs");
    let socket = bound.sandbox.dir.join("shim.sock");
    let up = eventually(SOON, || socket.exists());
    bound.lease_for(Duration::from_millis(300), LONG);
    let group = Pid::from_raw(i32::try_from(daemon.id()).expect("a pid"));
    killpg(group, Signal::SIGKILL).expect("killed");
    daemon.wait().expect("reaped");
    assert!(up, "the shim did not come up");
    let shim = connect(&bound.sandbox.dir).await.expect("answers");
    let told = shim.wait_freeze(false, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(true));
    let found = discover(bound.sandbox.parent()).await.expect("listed");
    let FoundState::Alive(adopted) = &found[0].state else {
        panic!("{found:?}");
    };
    assert!(adopted.known_status().frozen);
    adopted.stop(Duration::ZERO).await.expect("stopped");
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_lease_file_that_is_gone_or_garbled_freezes_until_it_is_written_again() {
    let bound = Bound::new();
    let shim = bound.start().await;
    let remove = || std::fs::remove_file(&bound.path).expect("removed");
    let garble = || std::fs::write(&bound.path, b"not a lease").expect("written");
    for spoil in [&remove as &dyn Fn(), &garble] {
        spoil();
        let told = shim.wait_freeze(false, Instant::now() + SOON).await;
        assert_eq!(told.expect("told"), Some(true));
        // The signal was sent; the VMM's threads take it in their own time.
        let vmm = shim.known_status().vmm_pid;
        assert!(eventually(SOON, || is_stopped(vmm)));
        std::fs::remove_file(&bound.path).unwrap_or_default();
        bound.lease_for(LONG, LONG);
        let told = shim.wait_freeze(true, Instant::now() + SOON).await;
        assert_eq!(told.expect("told"), Some(false));
    }
}

#[tokio::test]
#[ignore = "starts a real VMM"]
async fn a_frozen_vmm_that_somebody_lets_go_on_is_stopped_again() {
    let bound = Bound::new();
    let shim = bound.start_frozen().await;
    let vmm = shim.known_status().vmm_pid;
    for _ in 0..3 {
        signal(vmm, Signal::SIGCONT);
        assert!(eventually(SOON, || is_stopped(vmm)), "it goes on");
    }
}

#[tokio::test]
#[ignore = "starts real shims"]
async fn no_guest_starts_under_a_lease_that_is_not_there_or_has_ended() {
    let bound = Bound::new();
    let never_written = bound.try_start().await.expect_err("refused").to_string();
    assert!(never_written.contains("garbled"), "{never_written}");
    bound.lease_for(Duration::ZERO, LONG);
    let ended = bound.try_start().await.expect_err("refused").to_string();
    assert!(ended.contains("lease has ended"), "{ended}");
    bound.lease.write(LeaseTimes::Unlimited).expect("written");
    bound.try_start().await.expect("the shim comes up");
}
