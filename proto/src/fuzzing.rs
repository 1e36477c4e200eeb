//! What a fuzz target is. The targets themselves live beside the parsers they try; the room `fuzz/`
//! runs them.

use std::env;
use std::path::{Path, PathBuf};

/// One parser of bytes that come from a disk or from somebody else.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, for the command line and for its directory of kept inputs.
    pub name: &'static str,
    /// Bytes that the parser takes, from which damaged ones are made.
    pub samples: fn() -> Vec<Vec<u8>>,
    /// Parses, and panics where the parser broke a promise. Bytes that are refused are no failure.
    pub run: fn(&[u8]),
}

/// Where targets put their files: in memory where there is such a place, since some sync what they
/// write, and a disk that others use too takes its time over that.
#[must_use]
pub fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => memory.to_owned(),
        false => env::temp_dir(),
    }
}
