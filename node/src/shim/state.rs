//! The device state of a saved guest, as a file that is known by its digest.
//!
//! A VMM that is fed a damaged state may refuse it, crash, or run a guest with a wrong register.
//! So a state is hashed when it is written, and none is loaded that does not hash to the same.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use crate::shim::files::{self, Draft};
use crate::vmm::{ForeignStateError, Hardware, check_state};

/// Bytes from the beginning of a state that say what it is of.
const HEAD_BYTES: u64 = 256;

/// A device state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// The BLAKE3 of all of it.
    pub digest: blake3::Hash,
}

/// Why a device state is not loaded.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// It is not there, or the disk refuses to read it.
    #[error("read the device state {path:?}")]
    Disk {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was cut short, or something was added.
    #[error("the device state {path:?} has {found} bytes, and {wanted} were written")]
    OtherLength {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// Its length when it was written.
        wanted: u64,
    },
    /// It is not what was written.
    #[error("the device state {path:?} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// It is whole, and of something else.
    #[error("use the device state {path:?}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: ForeignStateError,
    },
}

impl StateFile {
    /// What was written into `draft`, which shall become the state in `dir`.
    pub(super) fn of_draft(dir: &Path, draft: &mut Draft) -> io::Result<Self> {
        let file = draft.file();
        // The VMM has moved the position that we share with it.
        file.rewind()?;
        Ok(Self {
            path: dir.join(files::STATE),
            bytes: file.metadata()?.len(),
            digest: digest_of(file)?,
        })
    }

    /// Opens it, at its beginning, if it is what was written and of a guest on `hardware`.
    ///
    /// # Errors
    /// See [`StateFileError`].
    pub fn open(&self, hardware: &Hardware) -> Result<File, StateFileError> {
        let path = || self.path.clone();
        let disk = |source| StateFileError::Disk {
            path: path(),
            source,
        };
        let mut file = File::open(&self.path).map_err(disk)?;
        let found = file.metadata().map_err(disk)?.len();
        if found != self.bytes {
            return Err(StateFileError::OtherLength {
                path: path(),
                found,
                wanted: self.bytes,
            });
        }
        if digest_of(&file).map_err(disk)? != self.digest {
            return Err(StateFileError::Damaged { path: path() });
        }
        file.rewind().map_err(disk)?;
        let mut head = Vec::new();
        let read = (&file).take(HEAD_BYTES).read_to_end(&mut head);
        read.and_then(|_| file.rewind()).map_err(disk)?;
        check_state(&head, hardware).map_err(|source| StateFileError::Foreign {
            path: path(),
            source,
        })?;
        Ok(file)
    }
}

fn digest_of(file: &File) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const STATE: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x05devices";

    fn hardware(machine: &str) -> Hardware {
        Hardware {
            machine: machine.into(),
            cpu: "tcg-1".into(),
        }
    }

    fn written(dir: &Path) -> StateFile {
        let mut draft = Draft::create(dir, files::STATE).expect("created");
        draft.file().write_all(STATE).expect("written");
        let state = StateFile::of_draft(dir, &mut draft).expect("hashed");
        draft.keep().expect("kept");
        state
    }

    #[test]
    fn what_was_written_is_opened_at_its_beginning() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = written(dir.path());
        let mut file = state.open(&hardware("pc-q35-7.2/1")).expect("whole");
        let mut content = Vec::new();
        file.read_to_end(&mut content).expect("read");
        assert_eq!(content, STATE);
    }

    #[test]
    fn a_state_cut_short_or_with_a_flipped_bit_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = written(dir.path());
        let open = || state.open(&hardware("pc-q35-7.2/1"));
        for cut in 0..STATE.len() {
            std::fs::write(&state.path, &STATE[..cut]).expect("cut");
            assert!(
                matches!(open(), Err(StateFileError::OtherLength { .. })),
                "cut at {cut}"
            );
            let mut flipped = STATE.to_vec();
            flipped[cut] ^= 1;
            std::fs::write(&state.path, &flipped).expect("flipped");
            assert!(
                matches!(open(), Err(StateFileError::Damaged { .. })),
                "flipped at {cut}"
            );
        }
        std::fs::remove_file(&state.path).expect("removed");
        assert!(matches!(open(), Err(StateFileError::Disk { .. })));
    }

    #[test]
    fn the_state_of_another_machine_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let refused = written(dir.path()).open(&hardware("pc-q35-9.0/1"));
        assert!(
            matches!(refused, Err(StateFileError::Foreign { .. })),
            "{refused:?}"
        );
    }
}
