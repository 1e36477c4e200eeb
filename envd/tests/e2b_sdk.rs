//! The real e2b SDK against the real agent.
//!
//! `WRENN_E2B_PYTHON` names a Python that has the SDK (`python3 -m venv v && v/bin/pip install
//! e2b==2.63.0`). Without one the test is skipped, and says so.

mod common;

use std::process::Command;

use common::Envd;

#[test]
fn the_sdk_finds_everything_as_it_expects() {
    let Some(python) = std::env::var_os("WRENN_E2B_PYTHON") else {
        eprintln!("SKIPPED: WRENN_E2B_PYTHON names no Python that has the e2b SDK");
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
    assert!(ran.expect("Python runs").success());
}
