//! What an operator puts into the images directory, as a fuzz target.

use proto::fuzzing::Target;

use super::catalog;
use crate::fuzzing::file_with;

/// The targets of this room.
pub(crate) const TARGETS: &[Target] = &[Target {
    name: "template-files",
    samples: || {
        vec![
            br#"{"name":"minimal","disk_mib":512,"description":"Debian, little else"}"#.to_vec(),
            b"6.1.0-41-cloud-amd64\n".to_vec(),
        ]
    },
    run: |bytes| {
        let (_dir, path) = file_with("file", bytes);
        let _refused = catalog::read_description(&path);
        if let Ok(release) = catalog::read_release(&path) {
            assert!(release.len() <= bytes.len() && !release.is_empty());
        }
    },
}];
