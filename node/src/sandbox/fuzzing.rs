//! A sandbox's record on its host, as a fuzz target.

use std::fs;

use proto::epoch::Epoch;
use proto::fuzzing::{Target, scratch};
use proto::ids::SandboxId;

use super::record::Record;
use crate::fuzzing::file_with;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[Target {
    name: "sandbox-record",
    samples,
    run: record,
}];

const ID: SandboxId = SandboxId([3; 16]);
const FILE: &str = "sandbox.json";

fn samples() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir_in(scratch()).expect("a directory");
    let mut record = Record::new(ID, Epoch(7), "minimal");
    record.base = Some("01".repeat(32));
    record.save(dir.path()).expect("written");
    vec![fs::read(dir.path().join(FILE)).expect("just written")]
}

fn record(bytes: &[u8]) {
    let (dir, path) = file_with(FILE, bytes);
    if let Ok(read) = Record::load(dir.path(), ID) {
        read.save(dir.path()).expect("what was read can be written");
        let once = fs::read(&path).expect("just written");
        let again = Record::load(dir.path(), ID).expect("it was written here");
        again.save(dir.path()).expect("written");
        assert_eq!(fs::read(&path).expect("just written"), once);
    }
}
