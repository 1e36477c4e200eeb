//! What a node remembers about its cluster, as a fuzz target.

use std::fs;

use proto::fuzzing::Target;

use super::member::Member;
use crate::fuzzing::file_with;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[Target {
    name: "member-file",
    samples,
    run: member,
}];

const FILE: &str = "member.json";

fn samples() -> Vec<Vec<u8>> {
    let key = "ab".repeat(32);
    let text = format!(
        r#"{{"format":1,"cluster":"{cluster}","node":2,"index":17,"contacts":[
        {{"node":1,"key":"{key}","control":"10.0.0.1:7321","bulk":"10.0.0.1:7322"}}],"former":[]}}"#,
        cluster = proto::ids::ClusterId([1; 16]),
    );
    vec![text.into_bytes()]
}

fn member(bytes: &[u8]) {
    let (dir, path) = file_with(FILE, bytes);
    if let Ok(Some(read)) = Member::load(dir.path()) {
        read.save(dir.path()).expect("what was read can be written");
        let once = fs::read(&path).expect("just written");
        let again = Member::load(dir.path()).expect("it was written here");
        again
            .expect("it is there")
            .save(dir.path())
            .expect("written");
        assert_eq!(fs::read(&path).expect("just written"), once);
    }
}
