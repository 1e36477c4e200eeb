//! The windows a guest needs first, in the order it asked for them.
//!
//! Recorded between resume and *ready*, saved beside the guest, pushed ahead at the next resume.
//! One that was given is kept, and what it missed is added behind it.
//!
//! ```text
//! "WRNWSET\0" version:u32 count:u32 window:u32 … BLAKE3 of all of it
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::pager::region::{Region, WindowIndex};
use crate::store::durable;

const MAGIC: [u8; 8] = *b"WRNWSET\0";
const VERSION: u32 = 1;
/// The most windows that are recorded: 1 GiB of them. A guest that touches more before it is ready
/// is better served as it goes.
pub const MAX_WINDOWS: usize = 16 * 1024;
/// The longest file there is.
pub const MAX_FILE_BYTES: u64 = 16 + 4 * MAX_WINDOWS as u64 + 32;

/// Why a working set cannot be used. A guest resumes without one all the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// The file cannot be read or written.
    #[error("use the working set {path:?}")]
    Disk {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else, of another release, cut short or damaged.
    #[error("the file holds no working set")]
    Malformed,
}

/// Windows, each once, in the order in which they are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    windows: Vec<WindowIndex>,
}

impl WorkingSet {
    /// The windows.
    #[must_use]
    pub fn windows(&self) -> &[WindowIndex] {
        &self.windows
    }

    /// Writes it to `path`, whole or not at all.
    ///
    /// # Errors
    /// The disk refused.
    pub fn write(&self, path: &Path) -> Result<(), WorkingSetError> {
        durable::write(path, &self.encode()).map_err(|source| WorkingSetError::Disk {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads it from `path`; an empty one if there is no such file.
    ///
    /// # Errors
    /// See [`WorkingSetError`].
    pub fn read(path: &Path) -> Result<Self, WorkingSetError> {
        let disk = |source| WorkingSetError::Disk {
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(err) => return Err(disk(err)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(disk)?;
        Self::decode(&bytes).ok_or(WorkingSetError::Malformed)
    }

    /// Its file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut file = Vec::from(MAGIC);
        file.extend(VERSION.to_le_bytes());
        let count = u32::try_from(self.windows.len()).unwrap_or(u32::MAX);
        file.extend(count.to_le_bytes());
        for window in &self.windows {
            file.extend(u32::try_from(window.0).unwrap_or(u32::MAX).to_le_bytes());
        }
        let hash = blake3::hash(&file);
        file.extend(hash.as_bytes());
        file
    }

    /// The set that `file` holds, if it holds one. A window may lie past the end of some guest's
    /// memory: whoever uses the set has to look.
    #[must_use]
    pub fn decode(file: &[u8]) -> Option<Self> {
        let (body, hash) = file.split_last_chunk::<32>()?;
        let (magic, rest) = body.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (count, rest) = rest.split_first_chunk::<4>()?;
        let (windows, []) = rest.as_chunks::<4>() else {
            return None;
        };
        let sound = *magic == MAGIC
            && u32::from_le_bytes(*version) == VERSION
            && u32::from_le_bytes(*count) as usize == windows.len()
            && windows.len() <= MAX_WINDOWS
            && blake3::hash(body) == *hash;
        sound.then(|| Self {
            windows: windows
                .iter()
                .map(|window| WindowIndex(u64::from(u32::from_le_bytes(*window))))
                .collect(),
        })
    }
}

/// Writes down which windows are asked for.
#[derive(Debug)]
pub struct Recorder {
    set: WorkingSet,
    /// By window: it is in the set.
    known: Vec<bool>,
    recording: bool,
}

impl Recorder {
    /// Records behind `given`, for a guest of `region`.
    #[must_use]
    pub fn new(region: Region, given: &WorkingSet) -> Self {
        let windows = usize::try_from(region.windows()).unwrap_or(0);
        let mut recorder = Self {
            set: WorkingSet::default(),
            known: vec![false; windows],
            recording: true,
        };
        given
            .windows
            .iter()
            .for_each(|window| recorder.note(*window));
        recorder
    }

    /// A window was asked for.
    pub fn note(&mut self, window: WindowIndex) {
        let index = usize::try_from(window.0).unwrap_or(usize::MAX);
        let room = self.recording && self.set.windows.len() < MAX_WINDOWS;
        match self.known.get_mut(index) {
            Some(known) if room && !*known => {
                *known = true;
                self.set.windows.push(window);
            }
            _ => {}
        }
    }

    /// Ends the recording and hands it out; `None` if it had ended.
    pub fn finish(&mut self) -> Option<WorkingSet> {
        if !self.recording {
            return None;
        }
        self.recording = false;
        self.known = Vec::new();
        Some(std::mem::take(&mut self.set))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::units::Mib;

    use super::*;

    fn set(windows: &[u64]) -> WorkingSet {
        WorkingSet {
            windows: windows.iter().copied().map(WindowIndex).collect(),
        }
    }

    #[test]
    fn each_window_is_recorded_once_in_order_behind_what_was_given() {
        let mut recorder = Recorder::new(Region::new(Mib(1)), &set(&[3, 1]));
        for window in [1, 7, 3, 7, 0, 16, u64::MAX] {
            recorder.note(WindowIndex(window));
        }
        // 16 is past the end of a MiB.
        assert_eq!(recorder.finish(), Some(set(&[3, 1, 7, 0])));
        recorder.note(WindowIndex(2));
        assert_eq!(recorder.finish(), None);
    }

    #[test]
    fn a_recording_is_bounded() {
        let mut recorder = Recorder::new(Region::new(Mib(2048)), &WorkingSet::default());
        (0..32 * 1024).for_each(|window| recorder.note(WindowIndex(window)));
        let recorded = recorder.finish().expect("the first time");
        assert_eq!(recorded.windows().len(), MAX_WINDOWS);
        assert!(recorded.encode().len() as u64 <= MAX_FILE_BYTES);
        assert_eq!(WorkingSet::decode(&recorded.encode()), Some(recorded));
    }

    #[test]
    fn a_file_that_is_not_there_is_an_empty_set_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("set");
        assert_eq!(
            WorkingSet::read(&path).expect("none"),
            WorkingSet::default()
        );
        set(&[5, 2]).write(&path).expect("written");
        assert_eq!(WorkingSet::read(&path).expect("read"), set(&[5, 2]));
        let file = std::fs::read(&path).expect("bytes");
        for cut in 0..file.len() {
            std::fs::write(&path, &file[..cut]).expect("cut");
            let refused = WorkingSet::read(&path);
            assert!(
                matches!(refused, Err(WorkingSetError::Malformed)),
                "cut at {cut}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = WorkingSet::decode(&bytes);
        }
    }
}
