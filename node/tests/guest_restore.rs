//! A real guest is quiesced, thawed, stopped in time and restored: what its workload sees of it.
//!
//! Ignored unless asked for: needs root, QEMU and the guest images, whose initramfs must hold the
//! agent of this source (`deploy/images/initramfs`).

mod guest_world;
mod shim_support;

use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::epoch::Epoch;
use tokio::io::AsyncReadExt;
use wrenn_node::guest::{
    AgentSetup, Fork, Generation, Guest, ProcessCommand, ProcessEvent, Quiesce, Restore,
    RestoreError, Selector, Signal, Workload,
};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::vmm::{self, Started};

use guest_world::{MEMORY, Place, read_console, sh};
use shim_support::{BOOT, SOON};

/// How long the guest stands still: more than any inaccuracy.
const STOPPED_FOR: Duration = Duration::from_secs(3);
/// How wrong a restored guest's clock may be.
const CLOCK_ERROR: Duration = Duration::from_millis(500);
/// How long the workload is watched standing still while the guest runs.
const WATCHED_FOR: Duration = Duration::from_millis(1500);

fn std_soon() -> std::time::Instant {
    std::time::Instant::now() + SOON
}

fn soon() -> tokio::time::Instant {
    tokio::time::Instant::now() + 2 * SOON
}

fn host_clock() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
}

async fn output(guest: &Guest, line: &str) -> String {
    let ran = guest.run(sh(line), Some(2 * SOON)).await;
    let ran = ran.unwrap_or_else(|err| panic!("{line}: {err:?}"));
    let text = String::from_utf8_lossy(&ran.stdout).trim().to_owned();
    assert_eq!(ran.exit_code, 0, "{line}: {text} {:?}", ran.stderr);
    text
}

/// Numbers, one a line, of a file in the guest.
async fn numbers(guest: &Guest, path: &str) -> Vec<u128> {
    let text = output(guest, &format!("cat {path}")).await;
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// What runs in the guest: a workload that writes down the time, and somebody outside its control
/// groups who keeps counting what the workload has written.
async fn start_workload(guest: &Guest) {
    let ticker = "while :; do date +%s%N >> /tmp/ticks; sleep 0.05; done";
    let outsider = "echo $$ > /sys/fs/cgroup/cgroup.procs; \
                    while :; do wc -l < /tmp/ticks >> /tmp/seen; sleep 0.05; done";
    for (tag, line) in [("ticker", ticker), ("outsider", outsider)] {
        let command = ProcessCommand {
            tag: Some(tag.into()),
            ..sh(line)
        };
        let mut events = guest.start(command, None).await.expect("started");
        let first = events.next().await.expect("an event");
        assert!(matches!(first, Some(ProcessEvent::Start { .. })));
    }
    output(guest, "until [ -s /tmp/seen ]; do sleep 0.1; done").await;
    // The image has no SSH server; what one would have is a key and the program that makes keys.
    let line = "mkdir -p /etc/ssh; echo secret > /etc/ssh/ssh_host_test_key; \
                echo 'echo $* > /etc/ssh/made' > /usr/local/bin/ssh-keygen; \
                chmod +x /usr/local/bin/ssh-keygen";
    output(guest, line).await;
}

const QUIESCE: Quiesce = Quiesce {
    epoch: Epoch(7),
    freeze_disk: false,
    reclaim: true,
    undo_after: Duration::from_secs(60),
};

async fn an_undone_quiesce_costs_only_time(place: &Place, guest: &Guest) {
    let done = guest.quiesce(&QUIESCE, soon()).await.expect("quiesced");
    println!("quiesce: {done:?}");
    assert_eq!(done.workload, Workload::Frozen);
    tokio::time::sleep(WATCHED_FOR).await;
    let began = std::time::Instant::now();
    assert!(guest.undo_quiesce(Epoch(7), soon()).await.expect("undone"));
    println!("undo: {:?}", began.elapsed());
    let seen = numbers(guest, "/tmp/seen").await;
    // The longest row of equal counts: the outsider went on, and the workload did not.
    let same = seen.chunk_by(|a, b| a == b).map(<[_]>::len).max();
    assert!(same >= Some(5), "the workload ran: {seen:?}");
    let ticks = numbers(guest, "/tmp/ticks").await.len();
    let line = format!(
        "until [ $(wc -l < /tmp/ticks) -gt {} ]; do sleep 0.1; done",
        ticks + 3
    );
    output(&place.guest("sealed"), &line).await;
}

/// Processes that fork all the time, and one that writes to the disk all the time.
async fn a_busy_workload_comes_to_a_stop_as_well(guest: &Guest) {
    let forks = "while :; do for i in 1 2 3 4 5 6 7 8; do /bin/true & done; wait; done";
    let writes = "while :; do dd if=/dev/zero of=/root/big bs=1M count=8 2>/dev/null; done";
    for (tag, line) in [("forks", forks), ("writes", writes)] {
        let command = ProcessCommand {
            tag: Some(tag.into()),
            ..sh(line)
        };
        guest.start(command, None).await.expect("started");
    }
    output(guest, "until [ -s /root/big ]; do sleep 0.1; done").await;
    let quiesce = Quiesce {
        freeze_disk: true,
        ..QUIESCE
    };
    for _ in 0..3 {
        let done = guest.quiesce(&quiesce, soon()).await.expect("quiesced");
        println!("busy: {done:?}");
        assert_eq!((done.workload, done.disk_frozen), (Workload::Frozen, true));
        assert!(guest.undo_quiesce(Epoch(7), soon()).await.expect("undone"));
        guest.processes().await.expect("served");
    }
    for tag in ["forks", "writes"] {
        let killed = guest.signal(Selector::Tag(tag.into()), Signal::Kill).await;
        killed.expect("it lives");
    }
}

/// With the disk frozen as well: the agent answers, and its watchdog thaws by itself.
async fn the_watchdog_thaws_a_guest_whose_host_died(guest: &Guest) {
    let quiesce = Quiesce {
        freeze_disk: true,
        undo_after: Duration::from_secs(1),
        ..QUIESCE
    };
    let done = guest.quiesce(&quiesce, soon()).await.expect("quiesced");
    assert!(done.disk_frozen);
    guest.health(SOON).await.expect("it answers");
    // Held until the watchdog goes off, and then done.
    output(guest, "echo written > /root/after && sync").await;
}

async fn a_stopped_guest_is_restored(place: &Place, guest: &Guest, vmm: &dyn vmm::Vmm) {
    let mut idle = guest.dial().dial().await.expect("connected");
    let mut stream = guest.start(sh("sleep 1000"), None).await.expect("started");
    stream.next().await.expect("an event");
    let quiesce = Quiesce {
        // Shorter than the guest stands still: that time must not count.
        undo_after: Duration::from_secs(2),
        ..QUIESCE
    };
    let done = guest.quiesce(&quiesce, soon()).await.expect("quiesced");
    assert_eq!(done.workload, Workload::Frozen);
    assert!(done.streams >= 1, "{done:?}");
    let sealed_at = host_clock();
    vmm.pause(std_soon()).expect("stopped");
    tokio::time::sleep(STOPPED_FOR).await;
    vmm.resume(std_soon()).expect("running");

    let restore = Restore {
        epoch: Epoch(8),
        generation: Generation::fresh(),
        token: "new".into(),
        sandbox_id: "cl-2".into(),
        template: "minimal".into(),
        env: None,
        fork: Some(Fork::named("twin")),
    };
    let began = std::time::Instant::now();
    let done = place.guest("sealed").restore(&restore, soon()).await;
    let done = done.expect("restored");
    println!("restore: {:?}, {done:?}", began.elapsed());
    assert!(done.held, "the workload ran ahead");
    assert!(done.cut >= 2, "{done:?}");
    assert_eq!((done.attempts, done.warnings.len()), (1, 0), "{done:?}");

    let gone = idle.read(&mut [0; 16]).await;
    assert!(matches!(gone, Ok(0) | Err(_)), "{gone:?}");
    assert!(
        !matches!(stream.next().await, Ok(Some(_))),
        "a stream of the past life"
    );
    let guest = place.guest("new");
    clock_is_right(&guest, sealed_at).await;
    it_is_another_guest(&guest, &restore).await;
    orders_are_fenced(place, &guest, &restore).await;
}

async fn clock_is_right(guest: &Guest, sealed_at: Duration) {
    // The first request of the new life, and two more: each bounds the error by the time it takes.
    let mut bound = Duration::MAX;
    for _ in 0..3 {
        let before = host_clock();
        let shown = output(guest, "date +%s%N").await;
        let after = host_clock();
        let shown = Duration::from_nanos(shown.parse().expect("a number"));
        assert!(shown + CLOCK_ERROR > before && shown < after + CLOCK_ERROR);
        bound = bound.min(shown.abs_diff(before).max(shown.abs_diff(after)));
    }
    println!("clock: off by at most {bound:?}");
    // No tick has a time between the seal and the restore.
    let ticks = numbers(guest, "/tmp/ticks").await;
    let stale = (sealed_at + CLOCK_ERROR).as_nanos()
        ..(sealed_at + STOPPED_FOR.saturating_sub(CLOCK_ERROR)).as_nanos();
    let early: Vec<_> = ticks.iter().filter(|tick| stale.contains(tick)).collect();
    assert!(
        early.is_empty(),
        "the workload ran by an old clock: {early:?}"
    );
    let gap = ticks
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]))
        .max();
    assert!(
        gap >= Some((STOPPED_FOR - CLOCK_ERROR).as_nanos()),
        "{gap:?}"
    );
}

async fn it_is_another_guest(guest: &Guest, restore: &Restore) {
    assert_eq!(output(guest, "hostname").await, "twin");
    assert_eq!(output(guest, "cat /etc/hostname").await, "twin");
    assert!(
        output(guest, "cat /etc/hosts")
            .await
            .contains("127.0.1.1\ttwin")
    );
    let id = restore.fork.as_ref().expect("a fork").machine_id;
    let id = Generation(id).to_string();
    assert_eq!(output(guest, "cat /etc/machine-id").await, id);
    let generation = restore.generation.to_string();
    let told = output(guest, "cat /run/wrenn/generation").await;
    assert_eq!(told, generation);
    assert_eq!(
        output(guest, "cat /run/wrenn/.WRENN_SANDBOX_ID").await,
        "cl-2"
    );
    assert_eq!(output(guest, "echo $WRENN_SANDBOX_ID").await, "cl-2");
    output(guest, "until [ -s /etc/ssh/made ]; do sleep 0.1; done").await;
    assert_eq!(output(guest, "cat /etc/ssh/made").await, "-A");
    let keys = output(guest, "ls /etc/ssh").await;
    assert!(!keys.contains("ssh_host_test_key"), "{keys}");
    let left = guest.processes().await.expect("listed");
    assert!(left.iter().any(|it| it.tag.as_deref() == Some("ticker")));
    let ticker = Selector::Tag("ticker".into());
    let killed = guest.signal(ticker, Signal::Kill).await;
    killed.expect("the workload lives and obeys");
}

async fn orders_are_fenced(place: &Place, guest: &Guest, restore: &Restore) {
    let again = guest.restore(restore, soon()).await.expect("confirmed");
    assert_eq!(again.cut, 0, "told again, it does nothing");
    let older = Restore {
        epoch: Epoch(7),
        generation: Generation::fresh(),
        ..restore.clone()
    };
    let refused = guest.restore(&older, soon()).await;
    assert!(matches!(refused, Err(RestoreError::Stale { .. })));
    assert!(place.guest("sealed").processes().await.is_err());
}

/// As the same guest again, over and over: nothing wears out, and it is quick.
async fn resumes_may_follow_each_other(place: &Place) {
    for epoch in 9..12 {
        let guest = place.guest("new");
        let quiesce = Quiesce {
            epoch: Epoch(epoch - 1),
            reclaim: false,
            ..QUIESCE
        };
        let quiesced = guest.quiesce(&quiesce, soon()).await.expect("quiesced");
        let restore = Restore {
            epoch: Epoch(epoch),
            generation: Generation::fresh(),
            token: "new".into(),
            sandbox_id: "cl-2".into(),
            template: "minimal".into(),
            env: None,
            fork: None,
        };
        let restored = place.guest("new").restore(&restore, soon()).await;
        let restored = restored.expect("restored");
        println!("quiesce {:?}, restore {:?}", quiesced.took, restored.took);
        assert!(restored.held && restored.warnings.is_empty());
        assert_eq!(output(&place.guest("new"), "hostname").await, "twin");
    }
}

#[test]
#[ignore = "boots a real guest"]
fn a_real_guest_survives_a_failed_pause_and_a_restore_makes_it_right() {
    let place = Place::new("guest-restore");
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let deadline = std_soon();
    let started = vmm::spawn(
        &place.spec(),
        "guest-restore-test",
        memory.as_fd(),
        deadline,
    );
    let Started { vmm, console, .. } = started.expect("up");
    let console = read_console(console);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async {
            let fresh = place.guest("sealed");
            let booted = fresh.wait_ready(tokio::time::Instant::now() + BOOT).await;
            booted.expect("booted");
            let setup = AgentSetup {
                token: "sealed".into(),
                sandbox_id: "cl-1".into(),
                template: "minimal".into(),
                hostname: None,
                default_user: Some("root".into()),
            };
            fresh.set_up(&setup).await.expect("set up");
            start_workload(&fresh).await;
            an_undone_quiesce_costs_only_time(&place, &fresh).await;
            the_watchdog_thaws_a_guest_whose_host_died(&fresh).await;
            a_busy_workload_comes_to_a_stop_as_well(&fresh).await;
            a_stopped_guest_is_restored(&place, &fresh, &*vmm).await;
            resumes_may_follow_each_other(&place).await;
        });
    }));
    vmm.kill().expect("killed");
    drop(vmm);
    if let Err(panic) = outcome {
        eprintln!("--- console\n{}", console.join().expect("read"));
        std::panic::resume_unwind(panic);
    }
}
