//! The guest's serial console on disk, in bounded space, without ever holding up the guest.
//!
//! Two files, `console.log` and before it `console.log.1`, each at most [`MAX_LOG_BYTES`]: when
//! the first is full it takes the name of the second. A disk that refuses costs console output
//! and nothing else. The same bounded file also takes the VMM's own complaints ([`super::files::LOG`]).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The size of each of the two files. Half a MiB holds a whole boot with every kernel message
/// several times over, and a thousand sandboxes' logs fit into one GiB.
pub const MAX_LOG_BYTES: u64 = 512 * 1024;
/// Bytes taken from the guest at once; on the stack of a small thread.
const READ_BYTES: usize = 4096;

/// A log that keeps the newest output.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    limit: u64,
    /// `None` after the disk has refused; the next write tries again.
    file: Option<File>,
    written: u64,
}

impl BoundedLog {
    /// The log `name` in `dir`, continued if it is there.
    #[must_use]
    pub fn new(dir: &Path, name: &str) -> Self {
        Self::with_limit(dir, name, MAX_LOG_BYTES)
    }

    fn with_limit(dir: &Path, name: &str, limit: u64) -> Self {
        Self {
            path: dir.join(name),
            limit,
            file: None,
            written: 0,
        }
    }

    /// Appends `bytes`. What the disk refuses is lost.
    pub fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.append_some(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(_) => {
                    self.file = None;
                    return;
                }
            }
        }
    }

    fn append_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.is_some() && self.written >= self.limit {
            self.file = None;
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, older)?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            empty => {
                let file = open(&self.path)?;
                self.written = file.metadata()?.len();
                empty.insert(file)
            }
        };
        let room = usize::try_from(self.limit.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let count = file.write(&bytes[..bytes.len().min(room)])?;
        self.written += count as u64;
        Ok(count)
    }
}

/// Copies `source` into `log` until it ends.
pub fn pump(mut source: impl Read, mut log: BoundedLog) {
    let mut bytes = [0; READ_BYTES];
    loop {
        match source.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => log.append(&bytes[..count]),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            // A VMM that was killed may reset its socket: it ended, that is all.
            Err(_) => return,
        }
    }
}

/// Copies `source` into `log` until it ends, and returns the last `keep` bytes as text.
pub fn pump_keeping_tail(mut source: impl Read, mut log: BoundedLog, keep: usize) -> String {
    let mut bytes = [0; READ_BYTES];
    let mut tail = Vec::new();
    loop {
        match source.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => {
                log.append(&bytes[..count]);
                tail.extend_from_slice(&bytes[..count]);
                tail.drain(..tail.len().saturating_sub(keep));
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&tail).trim().to_owned()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(dir: &Path, name: &str) -> String {
        fs::read_to_string(dir.join(name)).unwrap_or_default()
    }

    #[test]
    fn the_newest_output_is_kept_in_two_bounded_files() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut log = BoundedLog::with_limit(dir.path(), "log", 4);
        log.append(b"aabbccddee");
        assert_eq!(content(dir.path(), "log.1"), "ccdd");
        assert_eq!(content(dir.path(), "log"), "ee");
    }

    #[test]
    fn a_log_is_continued_by_the_next_shim() {
        let dir = tempfile::tempdir().expect("tempdir");
        BoundedLog::with_limit(dir.path(), "log", 4).append(b"abc");
        BoundedLog::with_limit(dir.path(), "log", 4).append(b"de");
        assert_eq!(content(dir.path(), "log.1"), "abcd");
        assert_eq!(content(dir.path(), "log"), "e");
    }

    #[test]
    fn a_disk_that_refuses_costs_output_and_nothing_else() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut log = BoundedLog::with_limit(&dir.path().join("gone"), "log", 4);
        log.append(b"lost");
        fs::create_dir(dir.path().join("gone")).expect("mkdir");
        log.append(b"kept");
        assert_eq!(content(&dir.path().join("gone"), "log"), "kept");
    }

    #[test]
    fn the_tail_of_a_stream_is_returned_as_text() {
        let dir = tempfile::tempdir().expect("tempdir");
        let log = BoundedLog::new(dir.path(), "log");
        let tail = pump_keeping_tail(b"\xffone two\n".as_slice(), log, 5);
        assert_eq!(tail, "two");
    }
}
