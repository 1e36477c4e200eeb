//! The list of all targets.

use std::fs;
use std::path::{Path, PathBuf};

use proto::fuzzing::Target;

/// Every target there is, by room from the bottom up.
#[must_use]
pub fn all() -> Vec<Target> {
    let mut all = transport::rpc::fuzzing::TARGETS.to_vec();
    all.extend(raft::fuzzing::TARGETS);
    all.extend(node::fuzzing::targets());
    all.extend(envd::fuzzing::TARGETS);
    all
}

/// The target of that name.
#[must_use]
pub fn named(name: &str) -> Option<Target> {
    all().into_iter().find(|target| target.name == name)
}

/// Where inputs that once broke `target` are kept.
#[must_use]
pub fn corpus_of(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name)
}

/// Inputs that once broke `target`, by file name.
///
/// # Panics
/// The checkout cannot be read.
#[must_use]
pub fn kept(target: &Target) -> Vec<(String, Vec<u8>)> {
    let Ok(listed) = fs::read_dir(corpus_of(target)) else {
        return Vec::new();
    };
    let mut kept: Vec<_> = listed
        .map(|entry| {
            let entry = entry.expect("the checkout can be read");
            let bytes = fs::read(entry.path()).expect("the checkout can be read");
            (entry.file_name().to_string_lossy().into_owned(), bytes)
        })
        .collect();
    kept.sort();
    kept
}
