//! Clients written by others, as `deploy/clients` installs them.

use std::env;
use std::path::PathBuf;

use crate::world::workspace;

/// The Python that has a client, under the name of its package; `None`, told loudly, where it has not
/// been made.
#[must_use]
pub fn python_with(client: &str) -> Option<PathBuf> {
    let dir = env::var_os("WRENN_DEV_DIR");
    let dir = dir.map_or_else(|| workspace().join(".wrenn-dev"), PathBuf::from);
    let python = dir.join("clients").join(client).join("bin/python");
    if python.is_file() {
        return Some(python);
    }
    let path = python.display();
    eprintln!("SKIPPED: there is no {path}, which `deploy/clients {client}` makes");
    None
}
