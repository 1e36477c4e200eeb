//! Clients written by others, as `deploy/clients` installs them.

use std::env;
use std::path::PathBuf;

use crate::world::workspace;

/// The Python that has a client, under the name of its package; `None`, told loudly, where it has not
/// been made.
#[must_use]
pub fn python_with(client: &str) -> Option<PathBuf> {
    made(client, "bin/python").map(|dir| dir.join("bin/python"))
}

/// What a template is built from, with a `Wrennfile` in it; `None`, told loudly, where it has not been made.
#[must_use]
pub fn context_of(name: &str) -> Option<PathBuf> {
    made(name, "Wrennfile")
}

/// The directory that `deploy/clients NAME` leaves, if `file` is in it.
fn made(name: &str, file: &str) -> Option<PathBuf> {
    let dir = env::var_os("WRENN_DEV_DIR");
    let dir = dir.map_or_else(|| workspace().join(".wrenn-dev"), PathBuf::from);
    let dir = dir.join("clients").join(name);
    let wanted = dir.join(file);
    if wanted.is_file() {
        return Some(dir);
    }
    let path = wanted.display();
    eprintln!("SKIPPED: there is no {path}, which `deploy/clients {name}` makes");
    None
}
