//! Making a userfaultfd inside other processes, whatever they are doing at that moment.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wrenn_node::pager::inject::{InjectError, userfaultfd};
use wrenn_node::vmm::jail::Jail;

const SOON: Duration = Duration::from_secs(5);

fn inject(child: &Child) -> Result<i32, InjectError> {
    let started = Instant::now();
    let made = userfaultfd(child.id(), || (), Instant::now() + SOON);
    println!("injected in {:?}", started.elapsed());
    made
}

fn is_userfaultfd(child: &Child, number: i32) -> bool {
    let link = fs::read_link(format!("/proc/{}/fd/{number}", child.id()));
    link.is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
}

fn state(child: &Child) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("there");
    let line = status.lines().find_map(|line| line.strip_prefix("State:"));
    line.expect("told").trim().chars().take(1).collect()
}

fn tracer(child: &Child) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("there");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"));
    line.expect("told").trim().to_owned()
}

fn wait_for_state(child: &Child, wanted: &str) {
    let deadline = Instant::now() + SOON;
    while state(child) != wanted {
        assert!(Instant::now() < deadline, "still {}", state(child));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(pid, signal).expect("it is there");
}

fn end(mut child: Child) {
    child.kill().expect("killed");
    child.wait().expect("reaped");
}

fn talker() -> Child {
    Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cat")
}

/// Asks a `cat` for an echo.
fn assert_echoes(child: &mut Child) {
    let mut says = child.stdin.take().expect("piped");
    let mut hears = BufReader::new(child.stdout.take().expect("piped"));
    writeln!(says, "still here").expect("it listens");
    let mut line = String::new();
    hears.read_line(&mut line).expect("it answers");
    assert_eq!(line, "still here\n");
    child.stdin = Some(says);
}

#[test]
fn a_process_that_waits_in_a_read_goes_on_waiting_and_reads() {
    let mut child = talker();
    wait_for_state(&child, "S");
    let number = inject(&child).expect("made");
    assert!(is_userfaultfd(&child, number));
    assert_eq!(tracer(&child), "0");
    assert_echoes(&mut child);
    end(child);
}

#[test]
fn a_process_that_sleeps_sleeps_for_as_long_as_it_meant_to() {
    let started = Instant::now();
    let mut child = Command::new("sleep").arg("0.4").spawn().expect("sleep");
    wait_for_state(&child, "S");
    for _ in 0..3 {
        inject(&child).expect("made");
    }
    let status = child.wait().expect("reaped");
    assert!(status.success(), "{status}");
    let slept = started.elapsed();
    assert!(slept >= Duration::from_millis(400), "{slept:?}");
}

#[test]
fn a_process_that_computes_computes_on() {
    // Its answer is wrong if one register is. It stays until it is told to end.
    let sums = "i=0; s=0; while [ $i -lt 60000 ]; do s=$((s + i)); i=$((i + 1)); done; echo $s";
    let mut child = Command::new("sh")
        .args(["-c", &format!("{sums}; read line")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sh");
    for _ in 0..10 {
        let number = inject(&child).expect("made");
        assert!(is_userfaultfd(&child, number));
    }
    drop(child.stdin.take());
    let output = child.wait_with_output().expect("ended");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1799970000\n");
}

#[test]
fn a_stopped_process_stays_stopped() {
    let mut child = talker();
    wait_for_state(&child, "S");
    signal(&child, Signal::SIGSTOP);
    wait_for_state(&child, "T");
    let number = inject(&child).expect("made");
    assert!(is_userfaultfd(&child, number));
    wait_for_state(&child, "T");
    signal(&child, Signal::SIGCONT);
    assert_echoes(&mut child);
    end(child);
}

#[test]
fn signals_that_come_meanwhile_reach_their_handler() {
    let program = "trap 'n=$((n + 1)); echo $n' USR1; echo ready; while :; do read line; done";
    let mut child = Command::new("sh")
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sh");
    let mut hears = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut next = || hears.next().expect("more").expect("readable");
    assert_eq!(next(), "ready");
    for round in 1..=20 {
        signal(&child, Signal::SIGUSR1);
        inject(&child).expect("made");
        assert_eq!(next(), round.to_string());
    }
    end(child);
}

#[test]
fn a_process_without_rights_gets_one_through_the_device() {
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Jail::new(None, &[]).confine(&mut command);
    let mut child = command.spawn().expect("cat");
    wait_for_state(&child, "S");
    let number = inject(&child).expect("made");
    assert!(is_userfaultfd(&child, number));
    let open = fs::read_dir(format!("/proc/{}/fd", child.id())).expect("listed");
    // Its three streams and the descriptor; the device is closed again.
    assert_eq!(open.count(), 4);
    assert_echoes(&mut child);
    end(child);
}

#[test]
fn a_process_that_has_ended_is_gone() {
    let mut child = Command::new("true").spawn().expect("true");
    let pid = child.id();
    child.wait().expect("reaped");
    let refused = userfaultfd(pid, || (), Instant::now() + SOON);
    assert!(matches!(refused, Err(InjectError::Gone)), "{refused:?}");
}
