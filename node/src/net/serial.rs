//! The book of serials: hands out each number once, also across crashes.
//!
//! Numbers are taken from the file a block at a time, and the file says "used" before the first of
//! a block is. A crash wastes the rest of its block, which costs nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::NetError;
use super::slot::{SERIAL_MAX, Serial};

/// Serials reserved by one durable write: one disk flush for as many slots.
const BLOCK: u64 = 64;
/// The form of the file.
const VERSION: u32 = 1;

/// What the file holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    version: u32,
    /// The first serial that was never handed out.
    next: u64,
}

/// Hands out serials. Blocks on the disk now and then.
pub(super) struct SerialBook {
    path: PathBuf,
    next: u64,
    reserved_until: u64,
}

impl SerialBook {
    /// Opens the book; `seen` is the highest serial still found on the host, in case the file
    /// was lost.
    pub(super) fn open(path: PathBuf, seen: Option<Serial>) -> Result<Self, NetError> {
        let written = read(&path).map_err(|source| NetError::Serials {
            path: path.clone(),
            source,
        })?;
        let next = seen.map_or(0, |serial| serial.0 + 1).max(written);
        Ok(Self {
            path,
            next,
            reserved_until: next,
        })
    }

    /// A serial that was never handed out before.
    pub(super) fn take(&mut self) -> Result<Serial, NetError> {
        if self.next == self.reserved_until {
            self.reserve().map_err(|source| NetError::Serials {
                path: self.path.clone(),
                source,
            })?;
        }
        let serial = Serial(self.next);
        self.next += 1;
        Ok(serial)
    }

    fn reserve(&mut self) -> io::Result<()> {
        // A damaged file may say any number.
        let until = self.next.saturating_add(BLOCK);
        if until > SERIAL_MAX {
            return Err(io::Error::other("no serials are left"));
        }
        write(&self.path, until)?;
        self.reserved_until = until;
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<u64> {
    let text = match fs::read(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(0),
        read => read?,
    };
    let page: Page = serde_json::from_slice(&text)?;
    if page.version != VERSION {
        return Err(io::Error::other(format!(
            "version {} was written by another release",
            page.version
        )));
    }
    Ok(page.next)
}

/// Writes beside the file and renames, so that a crash leaves the old page or the new one.
fn write(path: &Path, next: u64) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder)?;
    let beside = path.with_extension("new");
    let page = Page {
        version: VERSION,
        next,
    };
    let mut file = File::create(&beside)?;
    file.write_all(&serde_json::to_vec(&page)?)?;
    file.sync_data()?;
    fs::rename(&beside, path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(book: &mut SerialBook, count: u64) -> Vec<u64> {
        (0..count).map(|_| book.take().unwrap().0).collect()
    }

    #[test]
    fn serials_count_up_across_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let mut book = SerialBook::open(folder.path().join("net/serial"), None).unwrap();
        let all = take(&mut book, 2 * BLOCK + 3);
        assert_eq!(all, (0..2 * BLOCK + 3).collect::<Vec<_>>());
    }

    /// Found by `deploy/fuzz slot-serials`: the sum wrapped, and serials began at 0 again.
    #[test]
    fn a_book_that_says_more_than_there_are_hands_out_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        for next in [u64::MAX, u64::MAX - BLOCK + 1, SERIAL_MAX] {
            write(&path, next).unwrap();
            let mut book = SerialBook::open(path.clone(), None).unwrap();
            assert!(book.take().is_err(), "{next}");
        }
    }

    #[test]
    fn a_reopened_book_never_repeats_a_serial() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        let mut last = 0;
        for taken in [1, BLOCK - 1, BLOCK, BLOCK + 1] {
            let mut book = SerialBook::open(path.clone(), None).unwrap();
            let serials = take(&mut book, taken);
            assert!(last == 0 || serials[0] > last);
            last = serials[serials.len() - 1];
        }
    }

    #[test]
    fn a_lost_file_is_made_good_by_what_is_on_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        let mut book = SerialBook::open(path, Some(Serial(41))).unwrap();
        assert_eq!(book.take().unwrap(), Serial(42));
    }

    #[test]
    fn a_file_of_another_version_or_none_of_ours_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        for text in ["{\"version\":2,\"next\":1}", "17", "", "{\"version\":1}"] {
            fs::write(&path, text).unwrap();
            let refusal = SerialBook::open(path.clone(), None);
            assert!(matches!(refusal, Err(NetError::Serials { .. })), "{text:?}");
        }
    }
}
