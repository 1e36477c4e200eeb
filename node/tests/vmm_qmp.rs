//! The QMP client against a peer that plays every part, the dying one included.

use std::io::{BufRead, BufReader, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use wrenn_node::vmm::qemu::qmp::{MAX_EVENTS, MAX_LINE_BYTES, Qmp, QmpError};

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}"#;
const SOON: Duration = Duration::from_secs(10);

/// The peer's end: what it hears, and what it says.
struct Peer {
    hears: BufReader<UnixStream>,
    says: UnixStream,
}

impl Peer {
    fn command(&mut self) -> Value {
        let mut line = String::new();
        self.hears.read_line(&mut line).expect("readable");
        serde_json::from_str(&line).expect("JSON")
    }

    fn say(&mut self, line: &str) {
        writeln!(self.says, "{line}").expect("somebody listens");
    }

    fn answer(&mut self, command: &Value, returned: Value) {
        self.say(&json!({ "return": returned, "id": command["id"] }).to_string());
    }

    fn shake_hands(&mut self) {
        self.say(GREETING);
        let command = self.command();
        assert_eq!(command["execute"], "qmp_capabilities");
        self.answer(&command, json!({}));
    }
}

/// A client past its handshake, and the peer's script running beside it.
fn play(script: impl FnOnce(Peer) + Send + 'static) -> (Qmp, JoinHandle<()>) {
    let (stream, playing) = play_from_start(|mut peer| {
        peer.shake_hands();
        script(peer);
    });
    let qmp = Qmp::connect(stream, Instant::now() + SOON).expect("hands are shaken");
    (qmp, playing)
}

fn play_from_start(script: impl FnOnce(Peer) + Send + 'static) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    theirs.set_read_timeout(Some(SOON)).expect("set");
    let playing = thread::spawn(move || {
        script(Peer {
            hears: BufReader::new(theirs.try_clone().expect("a clone")),
            says: theirs,
        });
    });
    (ours, playing)
}

fn execute(qmp: &Qmp, timeout: Duration) -> Result<Value, QmpError> {
    qmp.execute("query-status", json!({}), Instant::now() + timeout)
}

#[test]
fn the_greeting_tells_the_version() {
    let (qmp, playing) = play(|_| ());
    assert_eq!(qmp.version(), "7.2.22");
    playing.join().expect("played");
}

#[test]
fn events_between_command_and_answer_are_kept_in_order() {
    let (qmp, playing) = play(|mut peer| {
        let command = peer.command();
        peer.say(r#"{"event": "STOP", "timestamp": {}}"#);
        peer.say(r#"{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}"#);
        peer.answer(&command, json!({ "running": true }));
    });
    let returned = execute(&qmp, SOON).expect("answered");
    assert_eq!(returned, json!({ "running": true }));
    let events = qmp.events();
    assert_eq!(events[0].name, "STOP");
    assert_eq!(events[1].data["reason"], "guest-shutdown");
    playing.join().expect("played");
}

#[test]
fn garbage_between_the_lines_does_no_harm() {
    let (qmp, playing) = play(|mut peer| {
        let command = peer.command();
        for garbage in [
            "",
            "no JSON",
            "{\"half\": ",
            "[1, 2]",
            "42",
            "{\"id\": \"other\"}",
        ] {
            peer.say(garbage);
        }
        peer.says.write_all(b"\xff\xfe\0\n").expect("sent");
        peer.answer(&command, json!({}));
    });
    execute(&qmp, SOON).expect("answered all the same");
    playing.join().expect("played");
}

#[test]
fn a_refusal_comes_in_qemus_words() {
    let (qmp, playing) = play(|mut peer| {
        let command = peer.command();
        let error = json!({ "class": "GenericError", "desc": "not now" });
        peer.say(&json!({ "error": error, "id": command["id"] }).to_string());
    });
    let err = execute(&qmp, SOON).expect_err("refused");
    assert_eq!(err.to_string(), "QEMU refused `query-status`: not now");
    playing.join().expect("played");
}

#[test]
fn a_late_answer_is_not_taken_for_the_next() {
    let (qmp, playing) = play(|mut peer| {
        let first = peer.command();
        let second = peer.command();
        peer.answer(&first, json!("late"));
        peer.answer(&second, json!("right"));
    });
    let err = execute(&qmp, Duration::from_millis(50)).expect_err("nothing comes");
    assert!(matches!(err, QmpError::TimedOut { .. }), "{err}");
    assert_eq!(execute(&qmp, SOON).expect("answered"), json!("right"));
    playing.join().expect("played");
}

#[test]
fn a_death_in_mid_answer_is_named_and_stays() {
    let (qmp, playing) = play(|mut peer| {
        peer.command();
        peer.says.write_all(b"{\"return\": {\"run").expect("sent");
    });
    for _ in 0..2 {
        let err = execute(&qmp, SOON).expect_err("dead");
        assert!(matches!(err, QmpError::Closed { .. }), "{err}");
    }
    playing.join().expect("played");
}

#[test]
fn a_death_before_or_during_the_handshake_is_named() {
    for said in ["", "{\"QMP\": {\"ver", GREETING] {
        let (stream, playing) = play_from_start(move |mut peer| {
            peer.says.write_all(said.as_bytes()).expect("sent");
        });
        let err = Qmp::connect(stream, Instant::now() + SOON).expect_err("dead");
        assert!(matches!(err, QmpError::Closed { .. }), "{err}");
        playing.join().expect("played");
    }
}

#[test]
fn silence_is_bounded_in_the_handshake_too() {
    let (stream, playing) = play_from_start(|mut peer| {
        let mut line = String::new();
        // Until the client hangs up.
        let _end = peer.hears.read_line(&mut line);
    });
    let err =
        Qmp::connect(stream, Instant::now() + Duration::from_millis(50)).expect_err("silence");
    assert!(matches!(err, QmpError::TimedOut { .. }), "{err}");
    playing.join().expect("played");
}

#[test]
fn a_line_without_end_fails_one_command_and_is_not_kept() {
    let (qmp, playing) = play(|mut peer| {
        peer.command();
        let huge = vec![b'x'; 3 * MAX_LINE_BYTES];
        peer.says.write_all(&huge).expect("read to its end");
        peer.say("");
        let command = peer.command();
        peer.answer(&command, json!("fine"));
    });
    let err = execute(&qmp, SOON).expect_err("no answer");
    assert!(matches!(err, QmpError::LineTooLong { .. }), "{err}");
    assert_eq!(
        execute(&qmp, SOON).expect("the next one works"),
        json!("fine")
    );
    playing.join().expect("played");
}

#[test]
fn a_flood_of_events_keeps_the_newest() {
    let (qmp, playing) = play(|mut peer| {
        let command = peer.command();
        for number in 0..MAX_EVENTS + 10 {
            peer.say(&json!({ "event": "E", "data": number }).to_string());
        }
        peer.answer(&command, json!({}));
    });
    execute(&qmp, SOON).expect("answered");
    let events = qmp.events();
    assert_eq!(events.len(), MAX_EVENTS);
    assert_eq!(events[MAX_EVENTS - 1].data, json!(MAX_EVENTS + 9));
    playing.join().expect("played");
}

#[test]
fn a_descriptor_goes_with_its_command() {
    let (qmp, playing) = play(|peer| {
        let mut bytes = [0; 4096];
        let mut room = cmsg_space!([RawFd; 1]);
        let (count, fds) = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let (socket, flags) = (peer.says.as_raw_fd(), MsgFlags::empty());
            let heard = recvmsg::<()>(socket, &mut into, Some(&mut room), flags).expect("heard");
            let messages: Vec<_> = heard.cmsgs().expect("whole").collect();
            (heard.bytes, messages)
        };
        let [ControlMessageOwned::ScmRights(fds)] = fds.as_slice() else {
            panic!("{fds:?}");
        };
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fds[0])).expect("open");
        let command: Value = serde_json::from_slice(&bytes[..count]).expect("JSON");
        let mut peer = peer;
        peer.answer(&command, json!({ "got": name.to_string_lossy() }));
    });
    let null = std::fs::File::open("/dev/null").expect("there");
    let deadline = Instant::now() + SOON;
    let returned = qmp.execute_with_fd("getfd", json!({}), null.as_fd(), deadline);
    assert_eq!(returned.expect("answered"), json!({ "got": "/dev/null" }));
    playing.join().expect("played");
}

#[test]
fn commands_of_two_threads_do_not_mix() {
    let (qmp, playing) = play(|mut peer| {
        for _ in 0..20 {
            let command = peer.command();
            let argument = command["arguments"].clone();
            peer.answer(&command, argument);
        }
    });
    thread::scope(|scope| {
        for worker in 0..2 {
            let qmp = &qmp;
            scope.spawn(move || {
                for round in 0..10 {
                    let sent = json!({ "worker": worker, "round": round });
                    let deadline = Instant::now() + SOON;
                    let got = qmp
                        .execute("echo", sent.clone(), deadline)
                        .expect("answered");
                    assert_eq!(got, sent);
                }
            });
        }
    });
    playing.join().expect("played");
}
