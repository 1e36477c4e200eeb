//! What a peer sends, as fuzz targets.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use prost::Message;
use proto::fuzzing::{Target, scratch};
use tokio::runtime::Builder;

use super::frame;
use super::wire::{Hello, HelloReply, Reply, Request};
use crate::Identity;
use crate::identity::{KEY_FILE, key_of_spki};

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "mesh-request",
        samples: requests,
        run: request,
    },
    Target {
        name: "mesh-reply",
        samples: replies,
        run: reply,
    },
    Target {
        name: "node-key-file",
        samples: key_files,
        run: key_file,
    },
    Target {
        name: "spki",
        samples: || vec![identity().spki()],
        run: |bytes| {
            let _refused = key_of_spki(bytes);
        },
    },
];

/// Longest frame that is read here.
const MAX: usize = 64 << 10;

fn hello() -> Hello {
    Hello {
        oldest: 1,
        newest: 1,
        product: "0.1.0".into(),
        membership_index: 7,
        run: 9,
    }
}

fn framed(message: &impl Message) -> Vec<u8> {
    let frame = frame::encode(message, MAX);
    frame.expect("a small message").to_vec()
}

fn requests() -> Vec<Vec<u8>> {
    let request = |stream, body: Vec<u8>| Request {
        service: 1,
        method: 1,
        patience_ms: 1000,
        body: body.into(),
        stream,
    };
    vec![
        framed(&request(false, hello().encode_to_vec())),
        framed(&request(true, vec![7; 64])),
    ]
}

/// As the accepting side reads it: one frame, and where it is a hello, the hello in it.
fn request(bytes: &[u8]) {
    let read = now(frame::read_only::<Request, _>(&mut &*bytes, MAX));
    let Ok(request) = read else { return };
    assert!(request.encoded_len() <= bytes.len(), "it grew");
    let _refused = frame::decode::<Hello>(request.body);
}

fn replies() -> Vec<Vec<u8>> {
    let settled = HelloReply {
        protocol: 1,
        product: "0.1.0".into(),
        membership_index: 7,
        run: 9,
    };
    let reply = |status, body: Vec<u8>| Reply {
        status,
        body: body.into(),
        reason: "because".into(),
    };
    vec![
        framed(&reply(0, settled.encode_to_vec())),
        framed(&reply(5, Vec::new())),
    ]
}

fn reply(bytes: &[u8]) {
    let mut rest = bytes;
    // As many frames as there are, as on a stream that goes on.
    while let Ok(reply) = now(frame::read_next::<Reply, _>(&mut rest, MAX)) {
        let _refused = frame::decode::<HelloReply>(reply.body);
    }
}

fn identity() -> Identity {
    Identity::ephemeral().expect("randomness")
}

fn key_files() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    Identity::load_or_create(dir.path()).expect("a new key");
    vec![fs::read(dir.path().join(KEY_FILE)).expect("just written")]
}

/// A damaged key is refused and never replaced by a new one, which would be another node.
fn key_file(bytes: &[u8]) {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let path = dir.path().join(KEY_FILE);
    fs::write(&path, bytes).expect("written");
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&path, private).expect("ours");
    let _refused = Identity::load_or_create(dir.path());
    assert_eq!(fs::read(&path).expect("still there"), bytes);
}

/// Runs a reader to its end: bytes in memory are always there.
fn now<T>(reading: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(reading)
}
