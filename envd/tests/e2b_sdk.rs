//! The real e2b SDK against the real agent.
//!
//! `deploy/clients e2b` makes the Python that has the SDK; `WRENN_E2B_PYTHON` may name another. Without one
//! the test is skipped, and says so.

mod common;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::Envd;

/// Where `deploy/clients` has put it, unless another is named.
fn python() -> Option<PathBuf> {
    if let Some(named) = env::var_os("WRENN_E2B_PYTHON") {
        return Some(named.into());
    }
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.wrenn-dev");
    let dir = env::var_os("WRENN_DEV_DIR").map_or_else(beside, PathBuf::from);
    Some(dir.join("clients/e2b/bin/python")).filter(|python| python.is_file())
}

#[test]
fn the_sdk_finds_everything_as_it_expects() {
    let Some(python) = python() else {
        eprintln!("SKIPPED: no Python has the e2b SDK, which `deploy/clients e2b` makes");
        return;
    };
    let envd = Envd::start();
    let dir = tempfile::tempdir().expect("a directory");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk/behaviours.py");
    let ran = Command::new(python)
        .arg(script)
        .arg(dir.path())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("E2B_DEBUG", "true")
        .env("E2B_SANDBOX_URL", format!("http://{}", envd.address))
        .status();
    let ended = ran.expect("Python runs");
    assert!(ended.success(), "{ended}");
}
