//! What a hypervisor says, and what lies in its device state, as fuzz targets.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proto::fuzzing::Target;
use serde_json::json;

use super::machine;
use super::qmp::{MAX_EVENTS, Qmp};
use super::state;
use crate::vmm::Accelerator;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "qmp",
        samples: conversations,
        run: converse,
    },
    Target {
        name: "device-state-head",
        samples: heads,
        run: head,
    },
];

/// Never waited for: all there is to hear is said before.
const PATIENCE: Duration = Duration::from_secs(10);

fn conversations() -> Vec<Vec<u8>> {
    let greeting =
        r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":["oob"]}}"#;
    let event = r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}"#;
    let lines = [
        greeting,
        r#"{"return":{},"id":1}"#,
        event,
        r#"{"return":{"status":"postmigrate","ram":{"total":268435456}},"id":2}"#,
        r#"{"id":3,"error":{"class":"GenericError","desc":"no such device"}}"#,
        "no json at all",
        event,
    ];
    vec![(lines.join("\r\n") + "\r\n").into_bytes()]
}

/// A whole conversation: the handshake, some commands, and what is left of it.
fn converse(bytes: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("set");
    // What does not fit into the socket's buffer would not be read either.
    let _full = theirs.write_all(bytes);
    theirs.shutdown(Shutdown::Write).expect("shut down");
    let deadline = Instant::now() + PATIENCE;
    let Ok(qmp) = Qmp::connect(ours, deadline) else {
        return;
    };
    for command in ["query-migrate", "query-status"] {
        let _refused = qmp.execute(command, json!({}), deadline);
    }
    qmp.drain(deadline);
    assert!(qmp.events().len() <= MAX_EVENTS);
    assert!(Instant::now() < deadline, "it waited for nobody");
}

fn heads() -> Vec<Vec<u8>> {
    let machine = machine::of_new_guests(Accelerator::Tcg).machine;
    let name = machine::type_of(&machine);
    let mut head = b"QEVM\0\0\0\x03\x07".to_vec();
    head.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
    head.extend(name.as_bytes());
    head.extend(b"\x05and so on");
    vec![head]
}

fn head(bytes: &[u8]) {
    let ours = machine::of_new_guests(Accelerator::Tcg);
    if state::check(bytes, &ours).is_ok() {
        let name = machine::type_of(&ours.machine).as_bytes();
        assert_eq!(&bytes[13..13 + name.len()], name);
    }
}
