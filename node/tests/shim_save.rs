//! Guests that are saved by their shim, let go on, adopted while they stand still, stopped, killed.
//!
//! Ignored unless asked for: needs QEMU and the guest kernel (see `shim_support`).

mod shim_support;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use proto::wire::shim::request::Call;
use proto::wire::shim::{self as wire, Request};
use shim_support::{BOOT, SOON, Sandbox, WRENN, counted, eventually, runs, signal};
use tokio::time::Instant;
use wrenn_node::base::clock::BootInstant;
use wrenn_node::shim::client::{self, ShimClient, connect};
use wrenn_node::shim::discover::{FoundState, discover};
use wrenn_node::shim::error::CallShimError;
use wrenn_node::shim::exit::LEASE_LOST;
use wrenn_node::shim::files::SocketPath;
use wrenn_node::shim::lease::{self, LeaseTimes, LeaseWriter};
use wrenn_node::shim::protocol;
use wrenn_node::shim::saved::GuestStand;
use wrenn_node::shim::spec::ShimSpec;

const LONG: Duration = Duration::from_secs(600);

fn count(sandbox: &Sandbox) -> u64 {
    counted(&sandbox.file("console.log")).unwrap_or(0)
}

fn counts_on(sandbox: &Sandbox) -> bool {
    let before = count(sandbox);
    eventually(SOON, || count(sandbox) > before + 2)
}

/// What the guest has said is on its way to the log for a moment after it has stopped.
fn stands_still(sandbox: &Sandbox) -> bool {
    let mut before = count(sandbox);
    eventually(SOON, || {
        std::thread::sleep(Duration::from_millis(300));
        std::mem::replace(&mut before, count(sandbox)) == count(sandbox)
    })
}

async fn start(sandbox: &Sandbox, spec: &ShimSpec) -> ShimClient {
    let shim = client::spawn(&sandbox.dir, spec, WRENN.as_ref()).await;
    let shim = shim.expect("the shim comes up");
    let counts = eventually(BOOT, || count(sandbox) > 2);
    assert!(counts, "{}", sandbox.file("console.log"));
    shim
}

async fn stand(shim: &ShimClient) -> GuestStand {
    shim.status().await.expect("answers").stand
}

/// A daemon that dies as soon as it has asked.
fn ask_and_die(sandbox: &Sandbox) {
    let path = SocketPath::new(&sandbox.dir).expect("dir");
    let mut stream = UnixStream::connect(path.as_path()).expect("listens");
    let call = Call::Save(wire::Save {
        timeout_ms: 60_000,
        since_resume: false,
    });
    protocol::write(&mut stream, &Request { call: Some(call) }).expect("sent");
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_saved_guest_stands_still_until_it_is_let_go_on_and_a_later_daemon_can_take_over() {
    let sandbox = Sandbox::new();
    let shim = start(&sandbox, &sandbox.spec("test.count")).await;
    assert_eq!(stand(&shim).await, GuestStand::Running);
    let hardware = shim.known_status().hardware.clone();
    assert_eq!(hardware.to_string(), "pc-q35-7.2/1 with tcg-1");
    let saved = shim.save(SOON).await.expect("saved");
    println!("{saved:#?}");
    assert_eq!(stand(&shim).await, GuestStand::Saved);
    assert!(stands_still(&sandbox));
    assert_eq!(shim.save(SOON).await.expect("known"), saved);
    saved.memory.open().expect("the memory can be read");
    shim.thaw(false).await.expect("goes on");
    shim.thaw(false).await.expect("no harm");
    assert_eq!(stand(&shim).await, GuestStand::Running);
    assert!(counts_on(&sandbox));

    ask_and_die(&sandbox);
    drop(shim);
    let found = discover(sandbox.parent()).await.expect("listed");
    let FoundState::Alive(adopted) = &found[0].state else {
        panic!("{found:?}");
    };
    // Whether it is still being saved or has been: the answer is what was saved.
    let saved = adopted.save(SOON).await.expect("gone on with");
    assert_eq!(stand(adopted).await, GuestStand::Saved);
    assert!(stands_still(&sandbox));
    assert!(saved.memory.dirty_bytes > 0);
    adopted.thaw(false).await.expect("or thawed");
    assert!(counts_on(&sandbox));

    // Or while it is being saved: it goes on once that is done.
    ask_and_die(&sandbox);
    while stand(adopted).await == GuestStand::Running {}
    adopted.thaw(false).await.expect("waited");
    assert!(counts_on(&sandbox));
    adopted.stop(Duration::ZERO).await.expect("stopped");
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_saved_guest_is_stopped_at_once_and_its_disk_is_as_it_was_saved() {
    let sandbox = Sandbox::new();
    let mut spec = sandbox.spec("test.count");
    let disk = sandbox.make_disk();
    spec.vmm.root_disk = Some(disk.clone());
    let shim = start(&sandbox, &spec).await;
    shim.save(SOON).await.expect("saved");
    let saved_disk = std::fs::read(&disk).expect("readable");
    let began = Instant::now();
    let exit = shim.stop(Duration::from_secs(60)).await.expect("stopped");
    assert!(began.elapsed() < SOON, "it was given the grace");
    assert_eq!((exit.asked, exit.reason.as_str()), (true, "host-qmp-quit"));
    assert_eq!(std::fs::read(&disk).expect("readable"), saved_disk);
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_whose_lease_ends_while_it_is_saved_is_frozen_and_killed() {
    let sandbox = Sandbox::new();
    let path = lease::file_in(sandbox.parent());
    let writer = LeaseWriter::open(&path).expect("opened");
    let lease_for = |freeze, kill| {
        let now = BootInstant::now();
        let (freeze_at, kill_at) = (now + freeze, now + kill);
        let times = LeaseTimes::Limited { freeze_at, kill_at };
        writer.write(times).expect("written");
    };
    lease_for(LONG, LONG);
    let spec = ShimSpec {
        lease: Some(path.clone()),
        ..sandbox.spec("test.count")
    };
    let shim = start(&sandbox, &spec).await;
    shim.save(SOON).await.expect("saved");
    lease_for(Duration::ZERO, LONG);
    let told = shim.wait_freeze(false, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(true));
    let refused = shim.thaw(false).await.expect_err("frozen");
    assert!(refused.to_string().contains("no lease"), "{refused}");
    // Thawed as a process, and still saved as a guest.
    lease_for(LONG, LONG);
    let told = shim.wait_freeze(true, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(false));
    assert_eq!(stand(&shim).await, GuestStand::Saved);
    assert!(stands_still(&sandbox));
    shim.thaw(false).await.expect("goes on");
    assert!(counts_on(&sandbox));
    // A frozen guest is not saved: nobody would answer.
    lease_for(Duration::ZERO, LONG);
    let told = shim.wait_freeze(false, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(true));
    let refused = shim.save(SOON).await.expect_err("frozen");
    assert!(matches!(refused, CallShimError::Failed { .. }), "{refused}");
    lease_for(LONG, LONG);
    let told = shim.wait_freeze(true, Instant::now() + SOON).await;
    assert_eq!(told.expect("told"), Some(false));
    shim.save(SOON).await.expect("saved");
    lease_for(Duration::ZERO, Duration::from_millis(300));
    let exit = shim.wait_exit(Instant::now() + SOON).await;
    let exit = exit.expect("answered").expect("in time");
    assert_eq!((exit.signal, exit.reason.as_str()), (Some(9), LEASE_LOST));
    assert!(!runs(shim.known_status().vmm_pid));
}

#[tokio::test]
#[ignore = "boots a real guest"]
async fn a_guest_whose_vmm_hangs_in_a_save_is_known_to_stand_still_and_goes_on_when_told() {
    let sandbox = Sandbox::new();
    let shim = start(&sandbox, &sandbox.spec("test.count")).await;
    let vmm = shim.known_status().vmm_pid;
    signal(vmm, Signal::SIGSTOP);
    let failed = shim.save(Duration::from_millis(300)).await;
    let failed = failed.expect_err("it hears nothing");
    println!("{failed}");
    assert!(matches!(failed, CallShimError::Failed { .. }), "{failed}");
    assert_eq!(stand(&shim).await, GuestStand::Still);
    assert!(!sandbox.dir.join("state").exists());
    signal(vmm, Signal::SIGCONT);
    shim.thaw(false).await.expect("goes on");
    assert_eq!(stand(&shim).await, GuestStand::Running);
    // And is not caught by what it was told while it hung.
    assert!(counts_on(&sandbox) && counts_on(&sandbox));
    shim.save(SOON).await.expect("saved");
}

#[tokio::test]
#[ignore = "starts real VMMs"]
async fn a_vmm_killed_while_its_guest_is_saved_leaves_an_exit_and_no_shim() {
    for millis in [0, 5, 15, 30, 200] {
        let sandbox = Sandbox::new();
        let shim = sandbox.start("test.count").await;
        let status = shim.known_status().clone();
        let saving = tokio::spawn({
            let shim = shim.clone();
            async move { shim.save(SOON).await }
        });
        tokio::time::sleep(Duration::from_millis(millis)).await;
        signal(status.vmm_pid, Signal::SIGKILL);
        match saving.await.expect("no panic") {
            Ok(_) => println!("{millis} ms: saved before"),
            Err(err) => println!("{millis} ms: {err}"),
        }
        let exit = shim.wait_exit(Instant::now() + SOON).await;
        let exit = exit.expect("answered").expect("in time");
        assert_eq!((exit.signal, exit.asked), (Some(9), false));
        assert!(eventually(SOON, || !runs(status.shim_pid)), "it stays");
        assert!(connect(&sandbox.dir).await.is_err());
    }
}
