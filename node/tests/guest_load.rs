//! A real guest whose workload takes all there is: its agent goes on answering, and puts an end to it.
//! The same guest shows what the agent itself takes, and that its localhost is reached from outside.
//!
//! Ignored unless asked for: needs root, QEMU and the guest images, whose initramfs must hold the
//! agent of this source (`deploy/images/initramfs`).

mod guest_world;
mod shim_support;

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use futures::stream;
use tokio::io::AsyncReadExt;
use tokio::time::{sleep, timeout};
use wrenn_node::guest::{AgentSetup, Guest, ProcessCommand, Selector, Signal};
use wrenn_node::pager::memory::GuestMemory;
use wrenn_node::vmm::{self, Started};

use guest_world::{MEMORY, Place, read_console, sh};
use shim_support::{BOOT, SOON};

/// What the agent promises, whatever the workload does.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// How long each load is watched.
const WATCHED_FOR: Duration = Duration::from_secs(4);
/// Pause between two questions, as of a host that looks after its guests.
const ASKED_EVERY: Duration = Duration::from_millis(100);
/// Most memory of the agent while it idles.
const IDLE_KIB: u64 = 10 * 1024;
/// From its exec to its readiness on real hardware 100 ms. An emulated guest is some ten times slower,
/// and that again where its host does a dozen things at once; what is printed is the figure.
const READY_WITHIN_MS: u64 = 10_000;

async fn output(guest: &Guest, line: &str) -> String {
    let ran = guest.run(sh(line), Some(2 * SOON)).await;
    let ran = ran.unwrap_or_else(|err| panic!("{line}: {err:?}"));
    String::from_utf8_lossy(&ran.stdout).trim().to_owned()
}

async fn start(guest: &Guest, tag: &str, line: &str) {
    let command = ProcessCommand {
        tag: Some(tag.into()),
        ..sh(line)
    };
    let mut events = guest.start(command, None).await.expect("started");
    events.next().await.expect("an event");
}

/// Asks for a sign of life over and over, each time over a new connection. Tells the longest wait.
async fn longest_silence(place: &Place, load: &str) -> Duration {
    let began = Instant::now();
    let mut waits = Vec::new();
    while began.elapsed() < WATCHED_FOR {
        let asked = Instant::now();
        let answer = place.guest("").health(SOON).await;
        answer.unwrap_or_else(|err| panic!("{load}: no answer within {SOON:?}: {err:?}"));
        waits.push(asked.elapsed());
        sleep(ASKED_EVERY).await;
    }
    waits.sort();
    let (middle, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    println!(
        "{load}: {} answers, p50 {middle:?}, longest {longest:?}",
        waits.len()
    );
    longest
}

/// Ends all commands at once, the one that does it included.
async fn end_workload(guest: &Guest) {
    let line = "echo 1 > /sys/fs/cgroup/wrenn/user/cgroup.kill; sleep 100";
    let ran = guest.run(sh(line), Some(2 * SOON)).await;
    assert_eq!(ran.expect("it is started, and ended").exit_code, -1);
    assert_eq!(output(guest, "echo alive").await, "alive");
}

async fn the_agent_is_small(guest: &Guest) {
    let status = output(guest, "grep VmRSS /proc/1/status").await;
    let resident = status.split_ascii_whitespace().nth(1);
    let resident: u64 = resident.and_then(|it| it.parse().ok()).expect("a number");
    println!("the agent: {resident} KiB resident");
    assert!(resident < IDLE_KIB, "{resident} KiB");
}

/// `perl` is in every Debian.
async fn localhost_is_reached(guest: &Guest) {
    let server = "exec perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(LocalAddr => \
                  \"127.0.0.1\", LocalPort => 8080, Listen => 5) or die; \
                  while ($c = $l->accept) { print $c \"hello\"; close $c }'";
    start(guest, "server", server).await;
    let began = Instant::now();
    let said = loop {
        let dialled = guest.dial().at_port(8080).dial().await;
        let Ok(mut stream) = dialled else {
            assert!(began.elapsed() < SOON, "not reached");
            sleep(ASKED_EVERY).await;
            continue;
        };
        let mut said = String::new();
        let read = timeout(SOON, stream.read_to_string(&mut said)).await;
        read.expect("in time").expect("read");
        break said;
    };
    println!("localhost: reached after {:?}", began.elapsed());
    assert_eq!(said, "hello");
    let server = Selector::Tag("server".into());
    guest.signal(server, Signal::Kill).await.expect("it lives");
}

async fn a_greedy_workload_silences_nobody(place: &Place, guest: &Guest) -> Vec<Duration> {
    let mut silences = Vec::new();
    for (load, line) in [
        (
            "cpu",
            "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
        ),
        ("forks", "f() { f | f & }; f; sleep 1000"),
        (
            "memory",
            "while :; do perl -e 'while (1) { push @a, \"x\" x 1000000 }'; done",
        ),
        (
            "shared memory",
            "dd if=/dev/zero of=/dev/shm/hog bs=1M; sleep 1000",
        ),
    ] {
        start(guest, load, line).await;
        silences.push(longest_silence(place, load).await);
        // The agent's own memory is not the workload's: it can always take something away.
        guest.remove("/dev/shm/hog").await.expect("removed");
        end_workload(guest).await;
    }
    silences
}

async fn a_full_disk_is_said_and_mended(place: &Place, guest: &Guest) -> Duration {
    let fill = "fallocate -l $(df --output=avail -B1 / | tail -n1) /root/fill; \
                dd if=/dev/zero of=/root/rest bs=4k 2> /dev/null; df --output=avail / | tail -n1";
    assert_eq!(output(guest, fill).await, "0");
    let silence = longest_silence(place, "full disk").await;
    let one = || {
        stream::iter([Ok::<_, std::io::Error>(bytes::Bytes::from(vec![
            1;
            1 << 20
        ]))])
    };
    let refused = guest.write_file("/root/more", one()).await;
    let refused = refused.expect_err("no room").to_string();
    assert!(refused.contains("no space"), "{refused}");
    guest.remove("/root/fill").await.expect("removed");
    guest.write_file("/root/more", one()).await.expect("room");
    silence
}

#[test]
#[ignore = "boots a real guest"]
fn a_workload_that_takes_everything_does_not_silence_the_agent() {
    let place = Place::new("guest-load");
    let memory = GuestMemory::create(MEMORY).expect("memory");
    let deadline = Instant::now() + SOON;
    let started = vmm::spawn(&place.spec(), "guest-load-test", memory.as_fd(), deadline);
    let Started { vmm, console, .. } = started.expect("up");
    let console = read_console(console);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            let guest = place.guest("load");
            let booted = guest.wait_ready(tokio::time::Instant::now() + BOOT).await;
            booted.expect("booted");
            let setup = AgentSetup {
                token: "load".into(),
                sandbox_id: "cl-1".into(),
                template: "minimal".into(),
                hostname: None,
                default_user: Some("root".into()),
            };
            guest.set_up(&setup).await.expect("set up");
            the_agent_is_small(&guest).await;
            localhost_is_reached(&guest).await;
            let mut silences = a_greedy_workload_silences_nobody(&place, &guest).await;
            silences.push(a_full_disk_is_said_and_mended(&place, &guest).await);
            the_agent_is_small(&guest).await;
            silences
        })
    }));
    vmm.kill().expect("killed");
    drop(vmm);
    let console = console.join().expect("read");
    let silences = outcome.unwrap_or_else(|panic| {
        eprintln!("--- console\n{console}");
        resume_unwind(panic)
    });
    let ready = console.lines().find_map(|line| {
        let (_, after) = line.split_once(" ready after ")?;
        after.split_once(" ms")?.0.parse::<u64>().ok()
    });
    println!("the agent: ready {ready:?} ms after its exec");
    assert!(ready.is_some_and(|ms| ms < READY_WITHIN_MS), "{ready:?}");
    let late = silences.iter().any(|silence| *silence > ANSWERS_WITHIN);
    assert!(!late, "{silences:?}\n--- console\n{console}");
}
